"""The images of a .zip, each read where it lies; labels from a map beside it, or from its folders.

    train.zip        images, stored or deflated, in folders or not
    train_map.txt    for each of them a line: its name in the zip, a tab, its class number

So the authors of Swin Transformer lay out ImageNet.
"""

import itertools
import os
import stat
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmim.data.classes import class_number, classes_of_folders, classes_of_numbers
from simmim.data.decoding import UnreadableImage
from simmim.data.folder import SUFFIXES, without_arrays
from simmim.data.listings import KeptListings, Listing, is_hidden
from simmim.data.packed import PackedSource

_ENCRYPTED = 1  # bit of a member's flags
_LOCAL_HEADER = 30  # bytes, before name and extra field, whose lengths end it
_SIGNATURE = b"PK\3\4"
_MAX_BYTES = 2**30  # of an image file: 2^17 times that fit into a small zip


class ZipSource(PackedSource):
    """The images of a .zip, sorted by name.

    With a map, the classes are the numbers from 0 to the largest one, as strings. Without one, and if every image lies
    in a folder, the folders are the classes, as below a folder of images; those that all images share do not count.
    Links and hidden members are ignored. What the zip holds is listed once, and again when its size or time has
    changed.

    Args:
        root: The .zip; `~` is expanded. The map of `train.zip` is `train_map.txt` beside it.
        channels: What `load` returns: see `FileSource`.
        key: What `root` is called in messages.

    Raises:
        ValueError: If it is no .zip, damaged, encrypted, compressed by a method other than deflate, or without images;
            if the map and the zip do not name the same images, or a line of it is none.
    """

    how_to_label = (
        "lay a map beside the zip (train_map.txt beside train.zip; in each line a name, a tab, a class number), or put "
        "the images of each class into a folder of the zip"
    )

    def __init__(self, root: str | os.PathLike[str], *, channels: int = 3, key: str = "data.root") -> None:
        file = Path(root).expanduser()
        _require_zip(file, key)
        kind = f"zip {SUFFIXES}"
        listing = KeptListings(kind, file.parent).of([file], lambda archive: (_list_zip(archive, key), True))[0]
        names = list(listing.names)
        mapping = file.with_name(f"{file.stem}_map.txt")
        if mapping.is_file():
            classes, labels = classes_of_numbers(_mapped(mapping, names, file, key))
        else:
            classes, labels = classes_of_folders(_without_shared_folders(names))
        super().__init__(file.parent, [file], [listing], classes, labels, channels=channels, key=key)

    def read(self, index: int) -> bytes:
        """The content of an image's file.

        Raises:
            UnreadableImage: If the zip cannot be read, or is damaged here.
        """
        start, length, size = (self.column(name, index) for name in ("offsets", "packed", "lengths"))
        if size > _MAX_BYTES:
            raise UnreadableImage(f"{size:,} bytes are too many for an image: refused as a decompression bomb")
        header = self.read_at(index, start, _LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or not header.startswith(_SIGNATURE):
            raise UnreadableImage("its place in the zip is damaged")
        between = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = self.read_at(index, start + _LOCAL_HEADER + between, length)
        if self.column("deflated", index):
            data = _inflate(data, size)
        if len(data) != size or zlib.crc32(data) != self.column("checksums", index):
            raise UnreadableImage("damaged in the zip: its checksum is another one")
        return data


def _require_zip(file: Path, key: str) -> None:
    if file.is_dir():
        inside = sorted(path.name for path in file.glob("*.zip"))
        found = f"it holds {', '.join(inside[:3])}: {key}={file / inside[0]}" if inside else "data=folder reads it"
        raise ValueError(f"{key}={file} is a folder: {found}")
    if not file.is_file():
        raise ValueError(f"{key}={file} does not exist: give a .zip of images")


def _list_zip(file: Path, key: str) -> Listing:
    try:
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if _is_image(member)]
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{key}={file} is damaged, cut, or no zip ({reason}): copy it anew") from error
    if not members:
        raise ValueError(f"{key}={file} holds no image ({', '.join(suffix[1:] for suffix in SUFFIXES)})")
    images = set(without_arrays([member.filename for member in members], f"{key}={file}"))
    members = [member for member in members if member.filename in images]
    if locked := next((member for member in members if member.flag_bits & _ENCRYPTED), None):
        raise ValueError(f"{key}={file}: {locked.filename} is encrypted: pack the images anew, without a password")
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if other := next((member for member in members if member.compress_type not in methods), None):
        raise ValueError(
            f"{key}={file}: {other.filename} is compressed by method {other.compress_type}, where a zip is read whose "
            "images are stored or deflated: pack them anew, zip -0 -r images.zip ."
        )
    columns = {
        "offsets": [member.header_offset for member in members],
        "packed": [member.compress_size for member in members],
        "lengths": [member.file_size for member in members],
        "checksums": [member.CRC for member in members],
        "deflated": [int(member.compress_type == zipfile.ZIP_DEFLATED) for member in members],
    }
    try:
        return Listing.sorted([member.filename for member in members], columns)
    except ValueError as error:
        raise ValueError(f"{key}={file} {error}") from error


def _is_image(member: zipfile.ZipInfo) -> bool:
    """Whether a member is a visible file, named as an image is. Its name is a name, and no path to anywhere."""
    kind = stat.S_IFMT(member.external_attr >> 16)
    named = member.filename.lower().endswith(SUFFIXES) and not is_hidden(member.filename)
    return named and kind in (0, stat.S_IFREG)


def _inflate(data: bytes, size: int) -> bytes:
    """Undoes deflate; gives no more than one byte above `size`, however much there is."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise UnreadableImage(f"damaged in the zip: {error}") from error


def _without_shared_folders(names: Sequence[str]) -> list[str]:
    """Names without the folders that lead to all of them, as `zip -r photos.zip photos` writes them."""
    folders = [name.split("/")[:-1] for name in names]
    pairs = zip(min(folders), max(folders), strict=False)  # what the first and the last share, all share
    start = sum(len(one) + 1 for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return [name[start:] for name in names]


def _mapped(mapping: Path, names: Sequence[str], file: Path, key: str) -> NDArray[np.int64]:
    """The class number of each image."""
    numbers = _read_map(mapping, f"{key}={file}")
    given = f"{key}={file}: {mapping.name}"
    if lacking := sorted(numbers.keys() - set(names)):
        raise ValueError(
            f"{given} names {lacking[0]}, which the zip does not hold; {len(lacking):,} of {len(numbers):,} lines: "
            "give the map of this zip, or none"
        )
    if unnamed := [name for name in names if name not in numbers]:
        raise ValueError(
            f"{given} has no line for {unnamed[0]}, nor for {len(unnamed) - 1:,} others of {len(names):,} images: "
            "label all or none"
        )
    return np.fromiter((numbers[name] for name in names), np.int64, len(names))


def _read_map(mapping: Path, given: str) -> dict[str, int]:
    numbers: dict[str, int] = {}
    text = mapping.read_bytes().decode("utf-8-sig", "surrogateescape")
    for at, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        name, tab, number = line.rpartition("\t")
        what = f"{given}: line {at} of {mapping.name}"
        if not tab:
            raise ValueError(f"{what} is {line[:60]!r}, and no name, tab, class number")
        if name in numbers:
            raise ValueError(f"{what} names {name} a second time")
        numbers[name] = class_number(number.strip(), what)
    return numbers
