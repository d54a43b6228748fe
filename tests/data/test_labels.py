"""Labels: what a classifier can learn from, what they mean to another model, and a share of each class."""

from collections import Counter

import pytest
import torch
from PIL import Image

from simmim.data.files import InMemory
from simmim.data.folder import FolderSource
from simmim.data.labels import Labelled, check_labels, check_learnable, match_labels, take_fraction


class Listed:
    """Images that are nothing but their index and label."""

    def __init__(self, labels, classes):
        self.labels, self.classes = labels, classes

    def __len__(self):
        return len(self.labels)

    def load(self, index):
        return torch.full((1, 1, 1), index, dtype=torch.uint8), self.labels[index]

    def label(self, index):
        return self.labels[index]

    def name(self, index):
        return f"image {index}"


def folder(root, counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(root / name / f"{number}.png")
    return root


def labels_of(source):
    return [source.label(index) for index in range(len(source))]


def test_images_without_labels_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(folder(tmp_path, {"hat": 1}) / "astray.png")
    with pytest.raises(ValueError, match=r"^data\.root: these images have no labels.*a folder of its own"):
        check_labels(FolderSource(tmp_path), key="data.root")


def test_one_class_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^data\.root: there is one class only \(hat\)"):
        check_learnable(FolderSource(folder(tmp_path, {"hat": 2})), key="data.root")


def test_labels_count_and_not_the_names_of_classes():
    with pytest.raises(ValueError, match=r"^data\.root: there is one class only \(3\)"):
        check_learnable(Listed([3, 3], list("0123")), key="data.root")
    with pytest.raises(
        ValueError, match=r"^data\.root: 2 of 4 classes have no image .* the first 1: give it some, number"
    ):
        check_learnable(Listed([0, 3], list("0123")), key="data.root")
    check_learnable(Listed([1, 0], ["a", "b"]), key="data.root")


@pytest.mark.parametrize("cached", [False, True])
def test_a_class_folder_without_images_is_refused(tmp_path, cached):
    source = FolderSource(folder(tmp_path, {"hat": 2, "skirt": 0, "dress": 1}))
    with pytest.raises(ValueError, match=rf"^data\.root={tmp_path}: the class skirt has no image"):
        check_labels(InMemory(source) if cached else source, key="data.root")
    (tmp_path / "skirt").rmdir()
    (tmp_path / ".cache").mkdir()  # hidden: no class
    check_labels(FolderSource(tmp_path), key="data.root")


def test_the_same_classes_are_left_as_they_are():
    source = Listed([0, 1], ["a", "b"])
    assert match_labels(source, ["a", "b"], key="data.root") == (source, "")


def test_classes_are_matched_by_name():
    source = Listed([0, 1, 1, 0], ["dress", "skirt"])
    matched, said = match_labels(source, ["boot", "skirt", "dress"], key="data.root")
    assert labels_of(matched) == [2, 1, 1, 2]
    assert [matched.load(index)[1] for index in range(4)] == [2, 1, 1, 2]
    assert matched.classes == ["boot", "skirt", "dress"]
    assert said == "2 of the 3 classes, matched by name"


def test_numbered_folders_are_numbers_and_not_words(tmp_path):
    """As ImageNet-V2's 0 to 999, which sort as 0, 1, 10, 100, 101, … where they are taken for words."""
    classes = [f"n{number:08d}" for number in range(1000)]
    numbers = [0, 1, 2, 9, 10, 11, 99, 100, 101, 999]
    source = FolderSource(folder(tmp_path, {str(number): 1 for number in numbers}))
    matched, said = match_labels(source, classes, key="data.root")
    found = {source.name(index).split("/")[-2]: matched.label(index) for index in range(len(source))}
    assert found == {str(number): number for number in numbers}
    assert said == "10 numbered folders, taken as the numbers of the 1000 classes"


def test_classes_that_are_named_by_numbers_are_matched_by_name():
    matched, said = match_labels(Listed([0, 1], ["3", "7"]), ["7", "5", "3"], key="data.root")
    assert labels_of(matched) == [2, 0]
    assert "by name" in said


def test_as_many_folders_stand_for_numbered_classes_in_their_order():
    """As the classes of a released classifier, whose file has no names."""
    matched, said = match_labels(Listed([0, 1, 2], ["cat", "dog", "fox"]), ["0", "1", "2"], key="data.root")
    assert (labels_of(matched), matched.classes) == ([0, 1, 2], ["0", "1", "2"])
    assert said == "3 folders in their order, taken as the classes of the model, which have numbers alone"
    for known in (["0", "1", "2", "3"], ["0", "1", "two"], ["0", "2", "1"]):
        with pytest.raises(ValueError, match=r"^data\.root has the class cat, which is none of"):
            match_labels(Listed([0, 1, 2], ["cat", "dog", "fox"]), known, key="data.root")


@pytest.mark.parametrize(
    ("classes", "unknown"),
    [(["dress", "wig"], "wig"), (["0", "3"], "3"), (["0", "hat"], "0"), (["wig", "2"], "wig")],
    ids=["another name", "too high a number", "a number among names", "names and numbers"],
)
def test_an_unknown_class_is_refused(classes, unknown):
    known = ["boot", "dress", "hat"]
    with pytest.raises(ValueError, match=rf"^data\.val_root has the class {unknown}, .* 3 classes known \(boot, dress"):
        match_labels(Listed([0, 1], classes), known, key="data.val_root")


def test_images_without_labels_match_nothing():
    with pytest.raises(ValueError, match=r"^data\.val_root: these images have no labels"):
        match_labels(Listed([-1, -1], []), ["a", "b"], key="data.val_root")


LABELS = [0] * 40 + [1] * 7 + [2] * 200 + [3]


def test_a_fraction_holds_the_same_share_of_every_class():
    part = take_fraction(Listed(LABELS, list("abcd")), 0.1)
    assert Counter(labels_of(part)) == {0: 4, 1: 1, 2: 20, 3: 1}  # of each at least one
    assert part.classes == list("abcd")
    assert len({part.name(index) for index in range(len(part))}) == len(part) == 26
    kept = [int(part.load(index)[0]) for index in range(len(part))]
    assert [LABELS[index] for index in kept] == labels_of(part)
    first = [index for start, count in ((0, 4), (40, 1), (47, 20), (247, 1)) for index in range(start, start + count)]
    assert kept != first  # drawn


@pytest.mark.parametrize(("fraction", "count", "kept"), [(0.07, 100, 7), (0.14, 50, 7), (0.29, 100, 29)])
def test_a_fraction_is_not_rounded_up_by_the_arithmetic(fraction, count, kept):
    """0.07 * 100 is 7.000000000000001."""
    assert len(take_fraction(Listed([0] * count, ["a"]), fraction)) == kept


def test_a_fraction_is_always_the_same_and_grows_by_adding():
    source, smaller = Listed(LABELS, list("abcd")), set()
    for fraction in (0.001, 0.01, 0.05, 0.1, 0.33, 0.5, 0.99):
        names = [[part.name(i) for i in range(len(part))] for part in (take_fraction(source, fraction),) * 2]
        assert names[0] == names[1]
        assert smaller <= set(names[0])
        smaller = set(names[0])
    assert take_fraction(source, 1) is source


def test_a_labelled_part_of_a_source():
    part = Labelled(Listed([0, 1, 2, 1], ["a", "b", "c"]), [3, 0], classes=["x", "y"], labels=[1, 0, 1])
    assert len(part) == 2
    assert part.classes == ["x", "y"]
    assert labels_of(part) == [0, 1]
    image, label = part.load(1)
    assert (int(image), label, part.name(0)) == (0, 1, "image 3")
