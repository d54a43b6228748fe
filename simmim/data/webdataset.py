"""WebDataset shards: .tar and .tar.gz archives in which the files of a sample follow one another.

    KEY.jpg       the image, or .png, .webp, …; KEY has no dot behind its last slash, so KEY.mask.png is no image
    KEY.cls       its class number as text, or
    KEY.json      an object with an integer "label" or "cls"

An image of a .tar is read where it lies, as often and by as many processes as one likes. A .tar.gz has no random
access: its images are held in memory, compressed as JPEG or PNG compress. Nothing is unpacked to the disk.
"""

import glob
import gzip
import itertools
import json
import logging
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from simmim.data.decoding import UnreadableImage
from simmim.data.files import FileSource, PackedStrings, free_memory
from simmim.data.folder import SUFFIXES, without_arrays

log = logging.getLogger(__name__)

ARCHIVES = (".tar", ".tar.gz", ".tgz")

_GZIP = b"\x1f\x8b"
_END = bytes(tarfile.BLOCKSIZE)  # of an archive, twice
_LABELS = (".cls", ".json")
_MAX_LABEL_BYTES = 2**24  # of a .json, which may hold captions too
_MAX_CLASS = 10**6
_MAX_ARCHIVES = 10**5
_MAGIC = re.compile(r"[*?\[{]")
_BRACES = re.compile(r"\{([^{}]*)\}")


class WebDatasetSource(FileSource):
    """The images of WebDataset shards, archive by archive, sorted by name, and in the order of each.

    The classes are the numbers from 0 to the largest label, as strings; without labels there are none. An image is
    called `<archive>:<member>`, whichever way its archive was given. Links, devices and hidden members are ignored.

    Args:
        root: A folder of archives; one archive; a glob (`train-*.tar`); or a brace pattern, with a range or a list
            (`train-{000..004}.tar`, `{train,extra}.tar`). `~` is expanded.
        channels: What `load` returns: see `FileSource`.
        key: What `root` is called in messages.

    Attributes:
        in_memory: Whether every archive is compressed, and its images therefore in memory already.

    Raises:
        ValueError: If there is no archive; if one is damaged, truncated or without images, or does not fit into
            memory; if only some images have a label, or a label is none.
    """

    def __init__(self, root: str | os.PathLike[str], *, channels: int = 3, key: str = "data.root") -> None:
        folder, self._archives = find_archives(root, key)
        content = bytearray()  # grows in place: a list of pieces would be there twice at the end
        listings = [_list_archive(archive, content, key) for archive in self._archives]
        if content:
            log.info(f"{key}: compressed images in memory, {len(content) / 2**20:,.1f} MiB")
        # A tensor, since processes that are not forked get its memory, where an array would be copied.
        self._content = torch.frombuffer(content or bytearray(1), dtype=torch.uint8)
        counts = [len(listing.names) for listing in listings]
        self._archive_of = np.repeat(np.arange(len(listings), dtype=np.int32), counts)
        self._compressed = np.array([listing.compressed for listing in listings])
        self._offsets = np.concatenate([np.array(listing.offsets, dtype=np.int64) for listing in listings])
        self._lengths = np.concatenate([np.array(listing.lengths, dtype=np.int64) for listing in listings])
        self.in_memory = bool(self._compressed.all())
        names = [
            f"{Path(os.path.relpath(archive, folder)).as_posix()}:{name}"
            for archive, listing in zip(self._archives, listings, strict=True)
            for name in listing.names
        ]
        labels = [label for listing in listings for label in listing.labels]
        packed = PackedStrings.pack(names)
        super().__init__(folder, packed, *_classes(labels, names, f"{key}={root}"), channels=channels, key=key)

    def read(self, index: int) -> bytes:
        """The content of an image's file.

        Raises:
            UnreadableImage: If its archive cannot be read.
        """
        at = self._indices[index]
        offset, length, archive = self._offsets[at], self._lengths[at], self._archive_of[at]
        if self._compressed[archive]:
            return self._content[offset : offset + length].numpy().tobytes()
        try:
            with open(self._archives[archive], "rb", buffering=0) as file:
                file.seek(offset)
                return file.read(length)
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from error

    def file_size(self, index: int) -> int:
        """Bytes of an image's file."""
        return int(self._lengths[self._indices[index]])

    def name(self, index: int) -> str:
        """Archive and member of an image, as shown to a user."""
        return str(self.root / self.relative_name(index))

    def refuse_gone(self) -> None:
        """Raises a ValueError if the whole folder has gone, unless nothing is read from it any more."""
        if not self.in_memory:
            super().refuse_gone()


def find_archives(root: str | os.PathLike[str], key: str) -> tuple[Path, list[Path]]:
    """The archives that a folder, a path or a pattern means.

    Args:
        root: See `WebDatasetSource`.
        key: What it is called in messages.

    Returns:
        The folder that the pattern begins with, and the archives below it, sorted, each once.

    Raises:
        ValueError: If there is none, or none for one of the names that the braces stand for.
    """
    path = Path(root).expanduser()
    if path.is_dir():
        if archives := sorted(entry for entry in path.iterdir() if _is_archive(entry)):
            return path, archives
        raise ValueError(
            f"{key}={path} holds no archive ({', '.join(ARCHIVES)}): data=folder reads images that lie in a folder"
        )
    if path.is_file():
        return path.parent, [path]
    fixed = itertools.takewhile(lambda part: not _MAGIC.search(part), path.parent.parts)
    names = list(itertools.islice(_expanded(str(path), f"{key}={path}"), _MAX_ARCHIVES + 1))
    if len(names) > _MAX_ARCHIVES:
        raise ValueError(f"{key}={path} stands for more than {_MAX_ARCHIVES:,} archives: give a smaller range")
    found = {name: _matching(name) for name in names}
    if lacking := [name for name in names if not found[name]]:
        which = "" if lacking[0] == str(path) else f": {lacking[0]}"
        problem = "matches no archive" if _MAGIC.search(lacking[0]) else "does not exist"
        raise ValueError(
            f"{key}={path}{which} {problem}: give a folder of {', '.join(ARCHIVES)}, one of them, or a pattern, which "
            """needs quotes inside quotes, "data.root='train-{000..004}.tar'\""""
        )
    return Path(*fixed), sorted({archive for archives in found.values() for archive in archives})


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVES) and not path.name.startswith(".") and path.is_file()


def _matching(name: str) -> list[Path]:
    if Path(name).is_file():
        return [Path(name)]
    return [path for path in map(Path, glob.glob(name)) if _is_archive(path)]


def _expanded(pattern: str, given: str) -> Iterator[str]:
    """The names that a pattern's braces stand for, as a shell would write them out."""
    if not (braces := _BRACES.search(pattern)):
        yield pattern
        return
    ends = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", braces[1], re.ASCII)
    if ends and int(ends[1]) <= int(ends[2]):
        padded = any(end.startswith("0") and len(end) > 1 for end in ends.groups())
        width = max(map(len, ends.groups())) if padded else 0
        words: Iterator[str] = (f"{number:0{width}d}" for number in range(int(ends[1]), int(ends[2]) + 1))
    elif "," in braces[1]:
        words = iter(braces[1].split(","))
    else:
        raise ValueError(f"{given}: {braces[0]} is neither a range, as {{000..004}}, nor a list, as {{a,b}}")
    for word in words:
        yield from _expanded(f"{pattern[: braces.start()]}{word}{pattern[braces.end() :]}", given)


@dataclass
class _Listing:
    """The images of one archive.

    `offsets` count bytes from where the archive begins, or the memory if it is compressed.
    """

    compressed: bool
    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    """-1 for none."""

    def keep(self, names: list[str]) -> None:
        """Forgets all other images."""
        chosen = set(names)
        kept = [name in chosen for name in self.names]
        self.names = names
        self.offsets = list(itertools.compress(self.offsets, kept))
        self.lengths = list(itertools.compress(self.lengths, kept))


def _list_archive(archive: Path, content: bytearray, key: str) -> _Listing:
    """Goes through an archive once.

    Args:
        archive: Its path.
        content: Gets the images of a compressed one.
        key: What the archives are called in messages.
    """
    found: dict[str, dict[str, int]] = {suffix: {} for suffix in _LABELS}
    with _damage_told(f"{key}: {archive}"), archive.open("rb") as raw:
        compressed = raw.peek(len(_GZIP)).startswith(_GZIP)
        listing = _Listing(compressed)
        room = _room(content) if compressed else None
        with cast(IO[bytes], gzip.open(raw) if compressed else raw) as file:
            for member in _members(file):
                sample, suffix = _split(member.name)
                what = f"{key}: {archive}:{member.name}"
                if suffix in SUFFIXES:
                    listing.names.append(member.name)
                    listing.lengths.append(member.size)
                    listing.offsets.append(len(content) if compressed else member.offset_data)
                    if compressed:
                        _refuse_too_much(len(content) + member.size, room, what)
                        content += _content(file, member)
                elif suffix in found and (label := _label(file, member, what)) is not None:
                    found[suffix][sample] = label
    if not listing.names:
        raise ValueError(
            f"{key}: {archive} holds no image: WebDataset calls them KEY.jpg ({', '.join(s[1:] for s in SUFFIXES)}), "
            "and KEY has no dot"
        )
    if len(set(listing.names)) < len(listing.names):
        twice = next(name for name, count in Counter(listing.names).items() if count > 1)
        raise ValueError(f"{key}: {archive} holds {twice} twice: pack it anew")
    listing.keep(without_arrays(listing.names, f"{key}: {archive}"))
    label_of = found[".json"] | found[".cls"]
    listing.labels = [label_of.get(_split(name)[0], -1) for name in listing.names]
    return listing


@contextmanager
def _damage_told(what: str) -> Iterator[None]:
    """Makes one line of what an archive that is damaged or truncated raises."""
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{what} cannot be read to its end ({reason}): is it a whole archive? Copy it anew") from error


def _members(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The visible files of an archive, each when its header has been read; may be left at any place of the content.

    Raises:
        tarfile.ReadError: Also where `tarfile` would take damage for the end.
    """
    end = 0
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
        while (member := archive.next()) is not None:
            if archive.offset <= end or member.size < 0:
                raise tarfile.ReadError("damaged header")
            end = archive.offset
            archive.members.clear()  # type: ignore[attr-defined]  # a million of them take a gigabyte
            if member.issparse():
                raise tarfile.ReadError(f"{member.name} is stored as a sparse file")
            if member.isreg() and not member.name.rpartition("/")[2].startswith("."):
                yield member
    file.seek(archive.offset)
    if (block := file.read(len(_END))) != _END:
        raise tarfile.ReadError("damaged header" if len(block) == len(_END) else "unexpected end of data")
    while file.read(2**20):  # to the checksum of a .gz
        pass


def _content(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member, as WebDataset splits them: at the first dot behind the last slash."""
    folder, slash, base = name.rpartition("/")
    sample, dot, suffix = base.partition(".")
    return f"{folder}{slash}{sample}", f"{dot}{suffix}".lower()


def _label(file: IO[bytes], member: tarfile.TarInfo, what: str) -> int | None:
    """The class number that a .cls or .json holds; None for a .json with other things."""
    if member.size > _MAX_LABEL_BYTES:
        raise ValueError(f"{what} has {member.size:,} bytes, too many for a label")
    text = _content(file, member).decode("utf-8", "replace").strip()
    if member.name.lower().endswith(".json"):
        label = _label_of_json(text, what)
        if label is None:
            return None
    elif re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII):
        label = int(text)
    else:
        raise ValueError(f"{what} holds {text[:40]!r} instead of a class number alone")
    if not 0 <= label < _MAX_CLASS:
        raise ValueError(f"{what}: the class number {label} must lie between 0 and {_MAX_CLASS - 1:,}")
    return label


def _label_of_json(text: str, what: str) -> int | None:
    try:
        record: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON ({type(error).__name__})") from error
    values = [record[name] for name in ("label", "cls") if name in record] if isinstance(record, dict) else []
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _room(content: bytearray) -> int | None:
    """Bytes that `content` may have, as memory is free now; None if not known."""
    free = free_memory()
    return None if free is None else len(content) + free


def _refuse_too_much(needed: int, room: int | None, what: str) -> None:
    if room is not None and needed > room:
        raise ValueError(
            f"{what}: compressed archives are held in memory, where up to here {needed / 2**30:.2f} GiB are needed and "
            f"{room / 2**30:.2f} GiB are free: gunzip the archives, a plain .tar is read where it lies"
        )


def _classes(labels: list[int], names: list[str], given: str) -> tuple[list[str], NDArray[np.int32]]:
    """Class names and labels; refuses images without a label among others that have one."""
    array = np.array(labels, dtype=np.int32)
    bare = np.flatnonzero(array < 0)
    if 0 < len(bare) < len(array):
        labelled = names[int(np.flatnonzero(array >= 0)[0])]
        raise ValueError(
            f"{given}: {names[int(bare[0])]} has no label (KEY.cls, or KEY.json with an integer label), while "
            f"{labelled} has one; {len(bare):,} of {len(array):,} images lack it: label all or none"
        )
    return [str(number) for number in range(int(array.max()) + 1)], array
