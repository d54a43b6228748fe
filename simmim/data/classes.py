"""The names and numbers of classes, from what names or labels a source has."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_MAX_CLASS = 10**6


def sort_classes(found: Iterable[str]) -> list[str]:
    """Class names in order, each once: by number where all are numbers, so that 0 to 999 keep their meaning."""
    names = set(found)
    numbered = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name) if numbered else 0, name))


def classes_of_names(names: Sequence[str]) -> tuple[list[str], NDArray[np.int32]]:
    """Classes of images from the class name of each, and a label for each image."""
    classes = sort_classes(names)
    label = {name: index for index, name in enumerate(classes)}
    return classes, np.fromiter((label[name] for name in names), np.int32, len(names))


def classes_of_folders(names: Iterable[str]) -> tuple[list[str], NDArray[np.int32]]:
    """Classes of images by their first-level folder; no names and -1 if an image lies in none."""
    parts = [name.partition("/") for name in names]
    if not all(slash for _, slash, _ in parts):
        return [], np.full(len(parts), -1, dtype=np.int32)
    return classes_of_names([folder for folder, _, _ in parts])


def classes_of_numbers(numbers: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int32]]:
    """Classes of images from the class number of each: 0 to the largest one, as strings; none if all are negative."""
    return [str(number) for number in range(int(numbers.max()) + 1)], np.asarray(numbers, dtype=np.int32)


def class_number(text: str, what: str) -> int:
    """A class number, as text.

    Raises:
        ValueError: If it is none, or too large.
    """
    if not re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII):
        raise ValueError(f"{what} holds {text[:40]!r} instead of a class number alone")
    if not 0 <= (label := int(text)) < _MAX_CLASS:
        raise ValueError(f"{what}: the class number {label} must lie between 0 and {_MAX_CLASS - 1:,}")
    return label
