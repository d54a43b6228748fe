"""A prepared copy of a folder: images made small once, packed into a few large files.

    images.json               what the copy was made from, and how
    shard-00000.tar           JPEG files under the names of the originals; `tar xf` unpacks them
    shard-00000.json          for each of them name, label, and where its bytes lie in the .tar
    index.json                classes and shards; written last, so it marks a whole copy
    unreadable.txt            images left out, each with the reason

A file is whole or absent, and a function of the images and the settings: a copy that was interrupted goes on behind
its last whole shard and ends up the same to the last byte.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import simplejpeg
from torch import Tensor
from torch.nn.functional import interpolate

from simmim.data.decoding import decode, is_upright_jpeg
from simmim.data.files import PackedStrings
from simmim.data.folder import require_folder
from simmim.data.listings import Listing
from simmim.data.packed import PackedSource
from simmim.run_folder import whole_file

SETTINGS, INDEX, UNREADABLE = "images.json", "index.json", "unreadable.txt"

_SHARD_NAME = r"shard-\d{5,}\.tar"  # and no path, which would lead elsewhere
_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)  # of an archive


class ShardSource(PackedSource):
    """The images of a prepared copy, in the order of what it was made from, with its names, classes and labels.

    Args:
        root: The copy; `~` is expanded.
        channels: What `load` returns: see `FileSource`.
        key: What the copy is called in messages.

    Attributes:
        short_side: Largest length of the shorter side of an image in pixels.

    Raises:
        ValueError: If there is no whole copy at `root`.
    """

    how_to_label = "prepare a copy of labelled ones"

    def __init__(self, root: str | os.PathLike[str], *, channels: int = 3, key: str = "data.root") -> None:
        folder = Path(root).expanduser()
        index = _read_index(folder, key)
        self.short_side: int = index["short_side"]
        shards = [folder / name for name in index["shards"]]
        listings = [_listing_of(_read_record(shard, key)) for shard in shards]
        labels = np.concatenate([listing.columns["labels"] for listing in listings]).astype(np.int32)
        super().__init__(folder, shards, listings, index["classes"], labels, channels=channels, key=key)


@dataclass(frozen=True)
class PreparedImage:
    """What becomes of one image: a JPEG file, or the reason why there is none."""

    name: str
    label: int
    data: bytes | None
    reason: str = ""


def shrink(data: bytes, short_side: int, quality: int) -> bytes:
    """An image file as an upright JPEG of limited size.

    A JPEG that is small and upright stays as it is. Grey stays grey, alpha is dropped.

    Args:
        data: The image file.
        short_side: Largest length of the shorter side in pixels.
        quality: 1 to 100, as JPEG encoders count.

    Raises:
        UnreadableImage: If it cannot be decoded.
    """
    image = decode(data, 3)
    height, width = image.shape[-2:]
    scale = short_side / min(height, width)
    if scale >= 1 and is_upright_jpeg(data):
        return data
    if scale < 1:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        # Bicubic keeps more detail than the bilinear filter that will follow it in training.
        rows = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # the strides of a batch that is channels last
        image = interpolate(rows, size, mode="bicubic", antialias=True)[0]
    return _encode(image, quality)


def _encode(image: Tensor, quality: int) -> bytes:
    red, green, blue = image
    colours = "GRAY" if red.equal(green) and green.equal(blue) else "RGB"
    pixels = image[: 1 if colours == "GRAY" else 3].permute(1, 2, 0).contiguous().numpy()  # (H, W, C)
    # Chroma at half the resolution, as cameras and the web store it: half the work of decoding.
    data: bytes = simplejpeg.encode_jpeg(pixels, quality, colorspace=colours, colorsubsampling="420")
    return data


def finished_shards(out: Path) -> Iterator[dict[str, Any]]:
    """The records of the shards that are whole, as far as they follow one another."""
    number = 0
    while (shard := shard_path(out, number)).is_file() and shard.with_suffix(".json").is_file():
        yield json.loads(shard.with_suffix(".json").read_text())
        number += 1


def shard_path(out: Path, number: int) -> Path:
    """Where a shard lies."""
    return out / f"shard-{number:05d}.tar"


def write_shard(shard: Path, images: Iterator[PreparedImage], limit: int) -> dict[str, Any]:
    """Packs images until the shard is large enough or they end, and its record beside it.

    Args:
        shard: The .tar to write; it appears when it is whole.
        images: As many are taken from it as the shard holds.
        limit: Bytes after which no other image begins.

    Returns:
        The record: name, label, offset and length of each image, `taken` images and the unreadable ones.
    """
    record: dict[str, Any] = {"names": [], "labels": [], "offsets": [], "lengths": [], "taken": 0, "unreadable": []}
    with whole_file(shard) as temporary, temporary.open("wb") as file:
        for image in images:
            record["taken"] += 1
            if image.data is None:
                record["unreadable"].append([image.name, image.reason])
                continue
            record["names"].append(image.name)
            record["labels"].append(image.label)
            record["offsets"].append(_append(file, image.name, image.data))
            record["lengths"].append(len(image.data))
            if file.tell() >= limit:
                break
        file.write(_END)
        record["bytes"] = file.tell()
    write_json(shard.with_suffix(".json"), record)
    return record


def _append(file: IO[bytes], name: str, data: bytes) -> int:
    """Adds a member to an archive; returns where its content begins."""
    member = tarfile.TarInfo(_inside(name))  # of no owner and no date: the same bytes every time
    member.size = len(data)
    file.write(member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
    offset = file.tell()
    file.write(data)
    file.write(bytes(-len(data) % _BLOCK))
    return offset


def _inside(name: str) -> str:
    """A name that leads nowhere else where the archive is unpacked, as one of a zip or a list of files may."""
    parts = ("_" if part in (".", "..") else part for part in name.split("/"))
    return "/".join(part for part in parts if part)


def write_index(
    out: Path, records: Sequence[dict[str, Any]], classes: list[str], *, listed: int, short_side: int
) -> None:
    """Marks a copy as whole, after it was counted.

    Args:
        out: The copy.
        records: Of all shards, in order.
        classes: Names of the labels.
        listed: Images of the folder, unreadable ones included.
        short_side: Largest length of the shorter side of an image in pixels.

    Raises:
        ValueError: If shards and unreadable images do not add up to the images listed, or a shard is cut.
    """
    shards = [shard_path(out, number) for number in range(len(records))]
    for shard in shards:
        _read_record(shard, "out")
    unreadable = [entry for record in records for entry in record["unreadable"]]
    images = sum(len(record["names"]) for record in records)
    if images + len(unreadable) != listed:
        raise ValueError(
            f"out={out} holds {images} images and {len(unreadable)} were unreadable, of {listed} listed: delete it and "
            "prepare it anew"
        )
    with whole_file(out / UNREADABLE) as temporary:
        lines = "".join(f"{name}\t{reason}\n" for name, reason in unreadable)
        temporary.write_bytes(lines.encode("utf-8", "surrogateescape"))
    names = [shard.name for shard in shards]
    write_json(out / INDEX, {"images": images, "short_side": short_side, "classes": classes, "shards": names})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file that is whole or absent."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content))  # ASCII, file names of any bytes included


def _read_index(folder: Path, key: str) -> dict[str, Any]:
    require_folder(folder, key)
    if (folder / INDEX).is_file():
        index: dict[str, Any] = json.loads((folder / INDEX).read_text())
        if planted := [name for name in index["shards"] if not re.fullmatch(_SHARD_NAME, str(name))]:
            raise ValueError(
                f"{key}={folder}: {INDEX} names {planted[0]!r}, which is no shard of a copy: prepare it anew"
            )
        return index
    if (folder / SETTINGS).is_file():
        raise ValueError(f"{key}={folder} is an unfinished copy: give the command that began it again")
    raise ValueError(
        f"{key}={folder} is no prepared copy: data=folder reads images as they are, and "
        f"python -m simmim.prepare data.root={folder} out=… makes a copy"
    )


def is_copy(folder: Path) -> bool:
    """Whether a folder is a prepared copy, or one that is not finished. Others have an index.json too."""
    if (folder / SETTINGS).is_file():
        return True
    try:
        index = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and {"short_side", "shards"} <= index.keys()


def _listing_of(record: dict[str, Any]) -> Listing:
    columns = {key: np.array(record[key], dtype=np.int64) for key in ("offsets", "lengths", "labels")}
    return Listing(PackedStrings.pack(record["names"]), columns)


def _read_record(shard: Path, key: str) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(shard.with_suffix(".json").read_text())
        size = shard.stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"{key}={shard.parent} lacks {Path(error.filename).name}: copy or prepare it anew") from error
    if size != record["bytes"]:
        raise ValueError(
            f"{key}={shard.parent}: {shard.name} has {size:,} bytes instead of {record['bytes']:,}: copy or prepare "
            "it anew"
        )
    return record
