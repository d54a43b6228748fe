"""Data sets as `save_to_disk` leaves them, and folders that are none."""

import json
import pickle
import shutil
import sys

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from layouts import rows

from simmim.data.decoding import UnreadableImage
from simmim.data.hf import HFSource

IMAGES = [b"one", b"two", b"three"]


def saved(path, **columns):
    """A data set of (feature, values) by name."""
    features = Features({name: feature for name, (feature, _) in columns.items()})
    Dataset.from_dict({name: values for name, (_, values) in columns.items()}, features=features).save_to_disk(path)
    return path


def image(contents=IMAGES):
    return datasets.Image(), [None if data is None else {"bytes": data, "path": "x.jpg"} for data in contents]


def refusal(path, **options):
    with pytest.raises(ValueError, match=r"^data\.root") as caught:
        HFSource(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_keep_their_order_and_the_data_set_its_names(tmp_path):
    source = HFSource(rows(tmp_path / "x", IMAGES, [2, 0, 2], ["ü b", "c", "a"]))
    assert [source.read(index) for index in range(3)] == IMAGES
    assert (source.classes, [source.label(index) for index in range(3)]) == (["ü b", "c", "a"], [2, 0, 2])
    assert source.name(1) == f"{tmp_path}/x:row 1"
    assert HFSource(saved(tmp_path / "y", picture=image())).name(1) == f"{tmp_path}/y:row 1 (x.jpg)"
    part = pickle.loads(pickle.dumps(source.subset([2, 0])))
    assert [(part.read(at), part.label(at), part.name(at)[-5:]) for at in range(2)] == [
        (b"three", 2, "row 2"),
        (b"one", 2, "row 0"),
    ]


def test_rows_without_an_image_are_unreadable(tmp_path):
    source = HFSource(saved(tmp_path / "x", image=image([b"one", None])))
    assert (source.read(0), source.file_size(0), source.file_size(1)) == (b"one", 3, 0)
    with pytest.raises(UnreadableImage, match=r"^the row has no image$"):
        source.read(1)
    assert source.name(1) == f"{tmp_path}/x:row 1"


def test_columns_by_name(tmp_path):
    path = saved(
        tmp_path / "x",
        first=image(),
        second=image([b"4", b"5", b"6"]),
        raw=(Value("binary"), IMAGES),
        coarse=(ClassLabel(names=["a", "b"]), [1, 0, 1]),
        fine=(ClassLabel(names=["u", "v", "w"]), [2, 0, 1]),
        number=(Value("int64"), [3, 0, 1]),
        unsigned=(Value("uint8"), [3, 0, 1]),
        none=(Value("int64"), [-1, -1, -1]),
        some=(Value("int64"), [0, None, -1]),
        words=(Value("string"), ["a", "b", "c"]),
    )
    assert "has the columns first, second of the type Image: give data.image_column=…" in refusal(path)
    assert "the columns coarse, fine of the type ClassLabel: give data.label_column" in refusal(
        path, image_column="first"
    )
    for column, contents in (("second", [b"4", b"5", b"6"]), ("raw", IMAGES)):
        source = HFSource(path, image_column=column, label_column="fine")
        assert [source.read(index) for index in range(3)] == contents and source.classes == ["u", "v", "w"]
    for column in ("number", "unsigned"):
        source = HFSource(path, image_column="first", label_column=column)
        assert (source.classes, source.label(0)) == (["0", "1", "2", "3"], 3)
    assert HFSource(path, image_column="first", label_column="none").classes == []
    line = refusal(path, image_column="first", label_column="some")
    assert "2 of 3 rows have no label in some, the first being row 1: label all or none" in line
    assert "data.label_column=words holds no whole numbers" in refusal(path, image_column="first", label_column="words")
    assert "data.label_column=x is no column of it: choose one of first," in refusal(
        path, image_column="first", label_column="x"
    )
    assert "data.image_column=x is no column" in refusal(path, image_column="x", label_column="fine")
    assert "data.image_column=number holds no images" in refusal(path, image_column="number", label_column="fine")


def test_what_is_no_data_set_is_one_line(tmp_path, monkeypatch):
    assert "does not exist: give the folder that save_to_disk wrote" in refusal(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "is no data set of the library datasets (it lacks dataset_info.json" in refusal(tmp_path / "empty")
    assert "has no column of the type Image (it has words): give data.image_column=…" in refusal(
        saved(tmp_path / "w", words=(Value("string"), ["a"]))
    )
    assert "has no rows" in refusal(saved(tmp_path / "e", image=image([])))
    path = rows(tmp_path / "x", IMAGES)
    whole = (path / "data-00000-of-00001.arrow").read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"garbage" * 100):
        (path / "data-00000-of-00001.arrow").write_bytes(damaged)
        assert "cannot be read (" in refusal(path) and "copy the data set anew" in refusal(path)
    (path / "data-00000-of-00001.arrow").unlink()
    assert "lacks data-00000-of-00001.arrow: copy the data set anew" in refusal(path)
    (path / "state.json").write_text("{")
    assert "state.json is no JSON (JSONDecodeError)" in refusal(path)
    path = rows(tmp_path / "y", IMAGES)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"^data=hf needs the library datasets: pip install 'simmim\[hf\]'$"):
        HFSource(path)


def test_several_splits_are_named_and_one_is_taken(tmp_path):
    data = Dataset.from_dict({"image": IMAGES}, features=Features({"image": datasets.Image()}))
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "x")
    assert f"has the splits train, test: give the folder of one, data.root={tmp_path}/x/train" in refusal(
        tmp_path / "x"
    )
    assert len(HFSource(tmp_path / "x" / "test")) == 3
    shutil.rmtree(tmp_path / "x" / "test")
    for splits, words in (([], "names no splits"), (["../x/train"], "names no splits"), ("train", "names no splits")):
        (tmp_path / "x" / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
        assert words in refusal(tmp_path / "x")
    (tmp_path / "x" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert HFSource(tmp_path / "x").root == tmp_path / "x" / "train"


@pytest.mark.parametrize("name", ["../secret/data-00000-of-00001.arrow", "/etc/passwd", "..", "", None, 7])
def test_a_data_set_never_leads_out_of_its_folder(tmp_path, name):
    rows(tmp_path / "secret", IMAGES)
    path = rows(tmp_path / "x", IMAGES)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": name}]}))
    assert "state.json names " in refusal(path) and "which is no file of the data set" in refusal(path)
