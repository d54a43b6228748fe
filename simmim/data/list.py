"""Images named by a text file: a path in each line, and perhaps a class."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmim.data.classes import class_number, classes_of_names, classes_of_numbers
from simmim.data.files import FileSource, PackedStrings, read_file


class ListSource(FileSource):
    """The images that a list names, sorted by path.

    A line is a path, absolute or relative to the folder of the list, or a path, a tab, and the name or the number of
    the class. Where all are numbers, the classes are 0 to the largest one, as strings; otherwise they are the names,
    sorted. Every line of text counts, also one that begins with #.

    Args:
        root: The list, in UTF-8; `~` is expanded.
        channels: What `load` returns: see `FileSource`.
        key: What the list is called in messages.

    Raises:
        ValueError: If there is no such list, or no text or path in it; if it names a file twice, or none that exists;
            if only some lines have a class.
    """

    how_to_label = "write a tab and the class behind each path of the list"

    def __init__(self, root: str | os.PathLike[str], *, channels: int = 3, key: str = "data.root") -> None:
        file = Path(root).expanduser()
        entries = sorted(_read_list(file, key).items())
        names = [name for name, _ in entries]
        if not any((file.parent / name).exists() for name in names):
            raise ValueError(
                f"{key}={file}: none of its {len(names):,} files exists, the first being {file.parent / names[0]}: "
                "paths are absolute, or relative to the folder of the list"
            )
        given = f"{key}={file}"
        labelled = _classes([word for _, word in entries], names, given)
        super().__init__(file.parent, PackedStrings.pack(names), *labelled, channels=channels, key=key)

    def read(self, index: int) -> bytes:
        """The content of an image's file.

        Raises:
            UnreadableImage: If it cannot be opened, or is no regular file.
        """
        return read_file(Path(self.name(index)))

    def file_size(self, index: int) -> int:
        """Bytes of an image's file; 0 if it cannot be opened."""
        try:
            return Path(self.name(index)).stat().st_size
        except (OSError, ValueError):
            return 0

    def name(self, index: int) -> str:
        """Path of an image, as shown to a user."""
        return str(self.root / self.relative_name(index))


def _read_list(file: Path, key: str) -> dict[str, str | None]:
    """The class of each path, None without one."""
    if not file.is_file():
        problem = "is not a file" if file.exists() else "does not exist"
        raise ValueError(f"{key}={file} {problem}: give a text file with a path in each line")
    data = file.read_bytes()
    if b"\0" in data:
        raise ValueError(f"{key}={file} is no text: give a text file with a path in each line")
    entries: dict[str, str | None] = {}
    for line in data.decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n").split("\n"):
        name, tab, word = line.partition("\t")
        if not line.strip():
            continue
        if not name.strip() or (tab and not word.strip()):
            raise ValueError(f"{key}={file}: the line {line[:60]!r} is neither a path nor path, tab, class")
        if name in entries:
            raise ValueError(f"{key}={file} names {name} twice")
        entries[name] = word.strip() if tab else None
    if not entries:
        raise ValueError(f"{key}={file} is empty: write a path into each line")
    return entries


def _classes(words: list[str | None], names: list[str], given: str) -> tuple[list[str], NDArray[np.int32]]:
    """Class names and labels; refuses lines without a class among others that have one."""
    told = [word for word in words if word is not None]
    if not told:
        return [], np.full(len(words), -1, dtype=np.int32)
    if len(told) < len(words):
        raise ValueError(
            f"{given}: {names[words.index(None)]} has no class, as {len(words) - len(told):,} of {len(words):,} lines: "
            "give all a class or none"
        )
    if not all(word.isascii() and word.isdecimal() for word in told):
        return classes_of_names(told)
    numbers = [class_number(word, f"{given}: {name}") for word, name in zip(told, names, strict=True)]
    return classes_of_numbers(np.array(numbers, dtype=np.int64))
