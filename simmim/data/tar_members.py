"""Going through a .tar or .tar.gz from one end to the other, without trust in what it says."""

import gzip
import json
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from simmim.data.classes import class_number
from simmim.data.listings import is_hidden

LABELS = (".cls", ".json")

_GZIP = b"\x1f\x8b"
_END = bytes(tarfile.BLOCKSIZE)  # of an archive, twice
_MAX_LABEL_BYTES = 2**24  # of a .json, which may hold captions too


@contextmanager
def opened(archive: Path, key: str) -> Iterator[tuple[IO[bytes], bool]]:
    """The content of an archive, and whether it is compressed, which its first bytes tell.

    Args:
        archive: Its path.
        key: What the archives are called in messages.

    Raises:
        ValueError: If it turns out to be damaged or truncated while it is read.
    """
    try:
        with archive.open("rb") as raw:
            compressed = raw.peek(len(_GZIP)).startswith(_GZIP)
            with cast(IO[bytes], gzip.open(raw) if compressed else raw) as file:
                yield file, compressed
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(
            f"{key}: {archive} cannot be read to its end ({reason}): is it a whole archive? Copy it anew"
        ) from error


def members(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The visible files of an archive, each when its header has been read; may be left at any place of the content.

    Links, devices and pipes are left out. A name may be absolute or lead upwards: it is a name, and no path.

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
            if member.isreg() and not is_hidden(member.name):
                yield member
    file.seek(archive.offset)
    if (block := file.read(len(_END))) != _END:
        raise tarfile.ReadError("damaged header" if len(block) == len(_END) else "unexpected end of data")
    while file.read(2**20):  # to the checksum of a .gz
        pass


def content(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    """The bytes of a member."""
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def label_of(file: IO[bytes], member: tarfile.TarInfo, what: str) -> int | None:
    """The class number that a .cls or .json holds; None for a .json with other things.

    Args:
        file: The archive.
        member: One whose name ends in one of `LABELS`.
        what: What to call it to a person.

    Raises:
        ValueError: If a .cls holds anything else, or a number is no class.
    """
    if member.size > _MAX_LABEL_BYTES:
        raise ValueError(f"{what} has {member.size:,} bytes, too many for a label")
    text = content(file, member).decode("utf-8", "replace").strip()
    if member.name.lower().endswith(".json"):
        label = _label_of_json(text, what)
        return None if label is None else class_number(str(label), what)
    return class_number(text, what)


def _label_of_json(text: str, what: str) -> int | None:
    try:
        record: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON ({type(error).__name__})") from error
    values = [record[name] for name in ("label", "cls") if name in record] if isinstance(record, dict) else []
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)
