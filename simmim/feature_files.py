"""Features of many images on disk: whole parts while they are made, one file in the end.

Neither the making nor the joining holds more than one part in memory; while they are joined, the disk holds them twice.
"""

import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from simmim.run_folder import whole_file

SETTINGS = "settings.json"

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Features of some images.

    Args:
        positions: Where each image stands in the list of all: (n,), ascending.
        features: Of each image: (n, C), or (n, h, w, C).
        unreadable: Positions of the images that could not be read, each with the reason.
    """

    positions: Integers
    features: Floats
    unreadable: list[tuple[int, str]]


@dataclass(frozen=True)
class Listing:
    """The images whose features these are, and how they were made.

    Args:
        paths: Relative names of all images, the unreadable ones too.
        labels: For each image an index into `classes`, or -1 without classes.
        classes: Class names; empty for unlabelled images.
        facts: `encoder`, `image_size`, `mean` and `std`, as plain values.
    """

    paths: Sequence[str]
    labels: Integers
    classes: list[str]
    facts: dict[str, Any]


def check_out(out: Path) -> None:
    """Refuses a file that cannot be written, before anything is computed for it.

    Raises:
        ValueError: If its ending is unknown, or a library is missing, or it exists and is whole.
    """
    if out.suffix not in (".npz", ".parquet"):
        raise ValueError(f"out={out} must end in .npz or .parquet")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError(f"out={out} needs pyarrow: pip install 'simmim[parquet]', or give an out that ends in .npz")
    if out.exists() and not parts_folder(out).exists():
        raise ValueError(f"out={out} exists already: give another out, or delete that one")


def parts_folder(out: Path) -> Path:
    """Where the parts lie until they are joined."""
    return out.with_name(f"{out.name}.partial")


def begun_with(out: Path) -> dict[str, Any]:
    """The settings of the run that began to write this file; empty if none did."""
    file = parts_folder(out) / SETTINGS
    settings: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return settings


def claim(out: Path, settings: dict[str, Any]) -> int:
    """Makes the folder of the parts the place of a run with these settings.

    Args:
        out: The file that the parts become.
        settings: What decides about the features, as JSON has it.

    Returns:
        The number of parts that are there already.

    Raises:
        ValueError: If it is the place of another run, or of something else.
    """
    folder, before = parts_folder(out), begun_with(out)
    if changed := next((key for key in settings if before and before.get(key) != settings[key]), None):
        raise ValueError(
            f"out={out} was begun with {changed}={before.get(changed)}, now {settings[changed]}: give another out, or "
            f"delete {folder}"
        )
    if not before:
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"out={out}: {folder} holds other files: give another out")
        with whole_file(folder / SETTINGS) as temporary:
            temporary.write_text(json.dumps(settings, indent=1))
    return next(number for number in range(10**9) if not part_path(out, number).exists())


def part_path(out: Path, number: int) -> Path:
    """Where a part lies."""
    return parts_folder(out) / f"part-{number:05d}.npz"


def write_part(out: Path, number: int, part: Part) -> None:
    """Writes a part, whole or not at all."""
    with whole_file(part_path(out, number)) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            positions=part.positions,
            features=part.features,
            unreadable=np.array([position for position, _ in part.unreadable], dtype=np.int64),
            reasons=np.array([reason for _, reason in part.unreadable], dtype=np.str_),
        )


def read_part(out: Path, number: int) -> Part:
    """Reads a part."""
    with np.load(part_path(out, number), allow_pickle=False) as arrays:
        return Part(arrays["positions"], arrays["features"], _unreadable(arrays))


def unreadable_images(out: Path, parts: int) -> list[tuple[int, str]]:
    """Positions and reasons of the images that no part could read, without their features."""
    found: list[tuple[int, str]] = []
    for number in range(parts):
        with np.load(part_path(out, number), allow_pickle=False) as arrays:
            found += _unreadable(arrays)
    return found


def join(out: Path, parts: int, listing: Listing) -> tuple[int, ...]:
    """Makes the file of its parts, and removes them.

    A `.npz` holds `paths` (N,), `features` (N, C) or (N, h, w, C), the facts as arrays of their own, and with classes
    `labels` (N,) and `classes`. A `.parquet` has a row an image: `path`, `vector` (the features, flattened) and with
    classes `label`; the schema's metadata hold as JSON the facts, `classes`, and `shape`, that of one image's features.

    Args:
        out: The file.
        parts: How many there are, with at least one image in them.
        listing: The images.

    Returns:
        The shape of all features.
    """
    positions = []
    for number in range(parts):
        with np.load(part_path(out, number), allow_pickle=False) as arrays:
            positions.append(arrays["positions"])
    readable = np.concatenate(positions)
    shape = (len(readable), *read_part(out, 0).features.shape[1:])
    with whole_file(out) as temporary:
        if out.suffix == ".npz":
            _write_npz(temporary, out, parts, listing, readable, shape)
        else:
            _write_parquet(temporary, out, parts, listing, shape)
    discard(out)
    return shape


def discard(out: Path) -> None:
    """Removes the parts."""
    for file in sorted(parts_folder(out).iterdir(), key=lambda file: file.name == SETTINGS):
        file.unlink()  # the settings last: killed in between, the folder still says whose it is
    parts_folder(out).rmdir()


def _write_npz(file: Path, out: Path, parts: int, listing: Listing, readable: Integers, shape: tuple[int, ...]) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "paths": np.array([listing.paths[position] for position in readable], dtype=np.str_)
    }
    if listing.classes:
        arrays |= {"labels": listing.labels[readable], "classes": np.array(listing.classes, dtype=np.str_)}
    arrays |= {name: np.array(value) for name, value in listing.facts.items()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with _member(archive, name) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        with _member(archive, "features") as member:
            header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_2_0(member, header)
            for number in range(parts):
                member.write(read_part(out, number).features.tobytes())


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """Named alone, an entry has no time of its own: the same features are the same file."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def _write_parquet(file: Path, out: Path, parts: int, listing: Listing, shape: tuple[int, ...]) -> None:
    import pyarrow as pa  # an extra: only who wants such a file needs it
    from pyarrow import parquet

    fields = [("path", pa.string()), ("vector", pa.list_(pa.float32()))]
    fields += [("label", pa.int64())] if listing.classes else []
    facts = {**listing.facts, "shape": shape[1:], **({"classes": listing.classes} if listing.classes else {})}
    schema = pa.schema(fields, metadata={key: json.dumps(value) for key, value in facts.items()})
    with parquet.ParquetWriter(file, schema) as writer:
        for part in (read_part(out, number) for number in range(parts)):
            ends = np.arange(len(part.positions) + 1, dtype=np.int32) * int(np.prod(shape[1:]))
            columns = [
                pa.array(list(_texts(listing.paths, part.positions)), pa.string()),
                pa.ListArray.from_arrays(pa.array(ends), pa.array(part.features.reshape(-1))),
            ]
            columns += [pa.array(listing.labels[part.positions])] if listing.classes else []
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _texts(paths: Sequence[str], positions: Integers) -> Iterator[str]:
    """Names as valid Unicode, which Parquet asks for and file systems do not."""
    for position in positions:
        yield paths[position].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _unreadable(arrays: Any) -> list[tuple[int, str]]:
    return list(zip(arrays["unreadable"].tolist(), arrays["reasons"].tolist(), strict=True))
