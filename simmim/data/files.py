"""Images that lie in files, whatever holds the files: names, labels, subsets, and a copy in memory."""

import copy
import hashlib
import logging
import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simmim.data.decoding import EIGHT_BIT, UnreadableImage, decode

log = logging.getLogger(__name__)
_READERS = 8  # threads, for disks and servers that answer several at once
_MEMORY_FACTS = Path("/proc/meminfo")
_GROUP_FACTS = Path("/sys/fs/cgroup")


class FileSource(ABC):
    """Image files by relative name. A subclass says how to read one.

    Args:
        root: The folder that holds them.
        names: Relative names, with forward slashes on every system.
        classes: Class names; empty for unlabelled images.
        labels: For each name an index into `classes`, or -1 without classes.
        channels: What `load` returns: of pictures 1 (grey), 3 (RGB) or 4 (RGBA), of bands any number.
        key: What the folder is called in messages.

    Attributes:
        classes: See above. A subset keeps all of them.
        in_memory: Whether all images are in memory already.
        how_to_label: What to do where labels are needed and there are none.
        max_value: The pixel value that counts as 1: see `simmim.data.decoding.decode`.
    """

    in_memory = False
    how_to_label = "put those of each class into a folder of its own, named after it"
    max_value: float = EIGHT_BIT

    def __init__(
        self,
        root: Path,
        names: "PackedStrings",
        classes: list[str],
        labels: NDArray[np.int32],
        *,
        channels: int,
        key: str,
    ) -> None:
        self.root = root
        self.key = key
        self.channels = channels
        self.classes = classes
        self._names = names
        self._labels = labels
        self._indices = np.arange(len(names))

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The content of an image's file. Raises `UnreadableImage`, without the file's name."""

    @abstractmethod
    def file_size(self, index: int) -> int:
        """Bytes of an image's file; 0 if it cannot be opened."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Where an image lies, as shown to a user."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self._indices)

    def load(self, index: int) -> tuple[Tensor, int]:
        """Read and decode one image.

        Returns:
            The image (channels, H, W), uint8 or float32 as `decode` has it, and its label: an index into `classes`, or
            -1 without classes.

        Raises:
            UnreadableImage: If the file cannot be opened or decoded; the message does not name the file.
            ValueError: If the whole folder has gone.
        """
        try:
            return decode(self.read(index), self.channels, self.max_value), self.label(index)
        except UnreadableImage:
            self.refuse_gone()
            raise

    def refuse_gone(self) -> None:
        """Raises a ValueError if the whole folder has gone, as an unmounted disk."""
        if not self.root.is_dir() or next(self.root.iterdir(), None) is None:
            raise ValueError(
                f"{self.key}={self.root} is no longer there: mount or restore it; a run continues with resume=auto"
            )

    def label(self, index: int) -> int:
        """Index into `classes`, or -1 without classes."""
        return int(self._labels[self._indices[index]])

    def relative_name(self, index: int) -> str:
        """Path of an image relative to `root`, with forward slashes on every system."""
        return self._names[self._indices[index]]

    def names_sha256(self) -> str:
        """A hash of all names in their order: two sources of the same list have the same."""
        names = "\0".join(self.relative_name(index) for index in range(len(self)))
        return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()

    def labels_sha256(self) -> str:
        """A hash of the classes and of all labels in their order."""
        labels = self._labels[self._indices].astype("<i4").tobytes()
        return hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogateescape") + labels).hexdigest()

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> Self:
        """The images at these positions, in this order, as a source that shares the listing."""
        chosen = copy.copy(self)
        chosen._indices = self._indices[np.asarray(indices, dtype=np.int64)]
        return chosen

    def in_units_of(self, max_value: float) -> Self:
        """The same images, of the kind that this `max_value` stands for."""
        same = copy.copy(self)
        same.max_value = max_value
        return same


def read_file(path: Path) -> bytes:
    """The content of a regular file: a pipe would block its reader, a device may have no end.

    Raises:
        UnreadableImage: If it is none, or cannot be opened; the message does not name the file.
    """
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        data = path.read_bytes() if regular else b""
    except (OSError, ValueError) as error:  # the latter where a name holds a zero
        raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from error
    if not regular:
        raise UnreadableImage("not a regular file")
    return data


class InMemory:
    """A source whose files, as they are, were read into one block of memory that all loader processes share.

    Args:
        source: Image files.
        key: What the source is called in messages.

    Raises:
        ValueError: If they need more memory than is free.
    """

    def __init__(self, source: FileSource, *, key: str = "data.root") -> None:
        self.source = source
        self.classes = source.classes
        with ThreadPoolExecutor(_READERS) as threads:
            sizes = np.fromiter(threads.map(source.file_size, range(len(source))), np.int64, len(source))
            self._starts, self._lengths = np.cumsum(sizes) - sizes, sizes
            _refuse_too_much(int(sizes.sum()), f"{key}={source.root}")
            # A tensor, since processes that are not forked get its memory, where an array would be copied.
            self._content = torch.empty(int(sizes.sum()), dtype=torch.uint8)
            for _ in threads.map(self._keep, range(len(source))):
                pass
        log.info(f"{key}: {len(source):,} files in memory, {sizes.sum() / 2**20:,.1f} MiB (data.cache=ram)")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.source)

    def load(self, index: int) -> tuple[Tensor, int]:
        """Decode one image. See `FileSource.load`."""
        data = self._place(index).numpy().tobytes()  # empty if it could not be read: asked for again, for the reason
        image = decode(data or self.source.read(index), self.source.channels, self.source.max_value)
        return image, self.source.label(index)

    def label(self, index: int) -> int:
        """Index into `classes`, or -1 without classes."""
        return self.source.label(index)

    def name(self, index: int) -> str:
        """Where the image lies, as shown to a user."""
        return self.source.name(index)

    def _place(self, index: int) -> Tensor:
        return self._content[self._starts[index] : self._starts[index] + self._lengths[index]]

    def _keep(self, index: int) -> None:
        try:
            data = self.source.read(index)[: self._lengths[index]]
        except UnreadableImage:
            data = b""
        self._lengths[index] = len(data)
        self._place(index).numpy()[:] = np.frombuffer(data, dtype=np.uint8)


def _refuse_too_much(needed: int, what: str) -> None:
    free = free_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"data.cache=ram needs {needed / 2**30:.2f} GiB for the files of {what}, and {free / 2**30:.2f} GiB are "
            "free: data.cache=none, or make a smaller copy with python -m simmim.prepare"
        )


def free_memory() -> int | None:
    """Bytes that this process may still take, within the limit of its container or job; None if not known."""
    if not sys.platform.startswith("linux"):
        return None
    lines = (line.split() for line in _MEMORY_FACTS.read_text().splitlines())
    free = next(int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:")
    try:
        limit = (_GROUP_FACTS / "memory.max").read_text().strip()
        used = int((_GROUP_FACTS / "memory.current").read_text())
        stat = dict(line.split() for line in (_GROUP_FACTS / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    files = int(stat["inactive_file"])  # cached pages of files, given up on demand
    return free if limit == "max" else min(free, int(limit) - used + files)


class PackedStrings:
    """An immutable list of strings in two arrays.

    A Python list of a million strings would be copied into every data-loading process, page by page, as its
    reference counts are touched.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text = text  # all strings in UTF-8, one behind the other
        self.ends = ends  # where each one ends, in bytes

    @classmethod
    def pack(cls, strings: Sequence[str]) -> Self:
        """Keeps strings of any bytes that a file name can have."""
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), np.cumsum(lengths))

    def __len__(self) -> int:
        """Number of strings."""
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        """One of them."""
        start = self.ends[index - 1] if index > 0 else 0
        return self.text[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        """All of them, in order."""
        return (self[index] for index in range(len(self)))
