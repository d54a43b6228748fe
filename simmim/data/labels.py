"""Labels of an image source: whether a task can learn from them, and a part of them."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from simmim.data.files import FileSource, InMemory
from simmim.data.folder import FolderSource
from simmim.seeding import derive_seed


class Labelled:
    """Some images of a source, whose labels may be renumbered.

    Args:
        source: An `ImageSource`.
        indices: The images of it that are kept, in this order.
        classes: Names of the new labels.
        labels: The new label of each class of the source.
    """

    def __init__(self, source: Any, indices: Sequence[int], *, classes: list[str], labels: Sequence[int]) -> None:
        self.source = source
        self.indices = indices
        self.classes = classes
        self._labels = labels

    def __len__(self) -> int:
        """Number of images."""
        return len(self.indices)

    def load(self, index: int) -> tuple[Tensor, int]:
        """The image (C, H, W), and its label."""
        image, label = self.source.load(self.indices[index])
        return image, self._labels[label]

    def label(self, index: int) -> int:
        """The label alone."""
        number: int = self.source.label(self.indices[index])
        return self._labels[number]

    def name(self, index: int) -> str:
        """What to call the image to a person."""
        return self.source.name(self.indices[index])  # type: ignore[no-any-return]


def check_learnable(source: Any, *, key: str) -> None:
    """Refuses images that no classifier can learn from.

    Args:
        source: An `ImageSource`, without the images that are kept for validation.
        key: The config key it came from, for the message.

    Raises:
        ValueError: As `check_labels`; if there is one class only, or a class has no image left.
    """
    check_labels(source, key=key)
    found = {source.label(index) for index in range(len(source))}
    if len(found) == 1:
        raise ValueError(f"{key}: there is one class only ({source.classes[found.pop()]}), and nothing to tell apart")
    if empty := [name for number, name in enumerate(source.classes) if number not in found]:
        raise ValueError(
            f"{key}: {len(empty)} of {len(source.classes)} classes have no image to learn from, the first {empty[0]}: "
            "give it some, number labels from 0 without gaps, or give data.val_root where validation has taken them all"
        )


def check_labels(source: Any, *, key: str) -> None:
    """Refuses images without labels, and folders of classes that are empty.

    Args:
        source: An `ImageSource`.
        key: The config key it came from, for the message.

    Raises:
        ValueError: With the key, and the class.
    """
    _require_labels(source, key)
    files = source.source if isinstance(source, InMemory) else source
    if isinstance(files, FolderSource) and (empty := _empty_folders(files)):
        raise ValueError(f"{key}={files.root}: the class {empty[0]} has no image: remove its folder, or fill it")


def match_labels(source: Any, classes: list[str], *, key: str) -> tuple[Any, str]:
    """A source whose labels are those of given classes, by name; or by number where its folders are numbered.

    Where the classes are numbers alone, as those of a released classifier, as many folders stand for them in the order
    of their names.

    Args:
        source: An `ImageSource`, which may have fewer classes.
        classes: What the labels shall mean.
        key: The config key it came from, for the message.

    Returns:
        The source, and what was done, in words; empty if nothing was.

    Raises:
        ValueError: If it has no labels, or a class of it is not among them.
    """
    _require_labels(source, key)
    if source.classes == classes:
        return source, ""
    known = {name: number for number, name in enumerate(classes)}
    said = f"{len(source.classes)} of the {len(classes)} classes, matched by name"
    unknown = [name for name in source.classes if name not in known]
    if len(unknown) == len(source.classes) and all(name.isdecimal() for name in unknown):  # as ImageNet-V2's folders
        known = {name: int(name) for name in unknown if int(name) < len(classes)}
        said = f"{len(source.classes)} numbered folders, taken as the numbers of the {len(classes)} classes"
        unknown = [name for name in source.classes if name not in known]
    if len(unknown) == len(source.classes) == len(classes) and classes == [str(n) for n in range(len(classes))]:
        known, unknown = {name: number for number, name in enumerate(source.classes)}, []
        said = f"{len(classes)} folders in their order, taken as the classes of the model, which have numbers alone"
    if unknown:
        raise ValueError(
            f"{key} has the class {unknown[0]}, which is none of the {len(classes)} classes known "
            f"({', '.join(classes[:3])}, …): {len(unknown)} of its {len(source.classes)} are unknown"
        )
    numbers = [known[name] for name in source.classes]
    return Labelled(source, range(len(source)), classes=classes, labels=numbers), said


def take_fraction(source: Any, fraction: float) -> Any:
    """The same share of every class, at least one image: always the same ones.

    Args:
        source: An `ImageSource`.
        fraction: Share of the images that is kept.
    """
    if fraction == 1:
        return source
    members: dict[int, list[int]] = defaultdict(list)
    for index in range(len(source)):
        members[source.label(index)].append(index)
    chosen: list[int] = []
    for indices in members.values():
        drawn = sorted(indices, key=lambda index: derive_seed("label fraction", index))
        chosen += drawn[: max(1, round(fraction * len(indices)))]
    return Labelled(source, sorted(chosen), classes=source.classes, labels=range(len(source.classes)))


def _require_labels(source: Any, key: str) -> None:
    if not source.classes:
        files = source.source if isinstance(source, InMemory) else source
        advice = files.how_to_label if isinstance(files, FileSource) else FileSource.how_to_label
        raise ValueError(f"{key}: these images have no labels: {advice}")


def _empty_folders(source: FolderSource) -> list[str]:
    """Class folders in which there is no image. Other sources list images, not folders."""
    folders = {path.name for path in source.root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    return sorted(folders.difference(source.classes))
