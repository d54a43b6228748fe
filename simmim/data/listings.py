"""What an archive holds and where, kept in the user's cache folder until the archive changes."""

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from simmim.data.files import PackedStrings
from simmim.run_folder import whole_file

log = logging.getLogger(__name__)

CLOCK_TICK_NS = 2_000_000_000  # the coarsest time stamps in use (FAT)

_VERSION = "simmim archive listing 1"
_PATIENCE = 10.0  # s, after which a person wonders


@dataclass(frozen=True)
class Listing:
    """The images in an archive, sorted by name.

    `columns` have an entry for each image: "offsets" and "lengths" in bytes, and what else a kind of archive needs.
    """

    names: PackedStrings
    columns: dict[str, NDArray[np.int64]]

    @classmethod
    def sorted(cls, names: Sequence[str], columns: dict[str, list[int]]) -> Self:
        """A listing of images in any order.

        Raises:
            ValueError: If there is a name twice; the message does not name the archive.
        """
        if len(set(names)) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise ValueError(f"holds {twice} twice: pack it anew")
        order = sorted(range(len(names)), key=names.__getitem__)
        arrays = {key: np.array(values, dtype=np.int64)[order] for key, values in columns.items()}
        return cls(PackedStrings.pack([names[at] for at in order]), arrays)

    @classmethod
    def joined(cls, parts: Sequence["Listing"]) -> Self:
        """Several listings, one behind the other."""
        starts = np.cumsum([0, *(len(part.names.text) for part in parts)])
        ends = [part.names.ends + start for part, start in zip(parts, starts, strict=False)]
        names = PackedStrings(np.concatenate([part.names.text for part in parts]), np.concatenate(ends))
        columns = {key: np.concatenate([part.columns[key] for part in parts]) for key in parts[0].columns}
        return cls(names, columns)

    def part(self, start: int, stop: int) -> Self:
        """The images from one position to another."""
        first = int(self.names.ends[start - 1]) if start else 0
        text = self.names.text[first : self.names.ends[stop - 1] if stop > start else first]
        names = PackedStrings(text, self.names.ends[start:stop] - first)
        return type(self)(names, {key: values[start:stop] for key, values in self.columns.items()})


Stamp = tuple[int, int]
"""Size in bytes and time of the last change in ns: an archive whose stamp is the same is taken for the same."""


class KeptListings:
    """The listings of the archives in a folder, each made once.

    Args:
        kind: What else than the archives decides about a listing: their kind, and how they are read.
        folder: Where the archives lie, or most of them.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self._cache = cache_file("archives", _VERSION, kind, os.path.realpath(folder))
        self._kept = _read(self._cache) if self._cache else {}

    def of(self, archives: Sequence[Path], scan: Callable[[Path], tuple[Listing, bool]]) -> list[Listing]:
        """The listing of each archive.

        Args:
            archives: Their paths.
            scan: Goes through one; gives the listing, and whether it may be kept.
        """
        listings, fresh, told = [], False, time.monotonic()
        try:
            for number, archive in enumerate(archives, 1):
                stamp, name = _stamp(archive), os.path.realpath(archive)
                if name in self._kept and self._kept[name][0] == stamp:
                    listings.append(self._kept[name][1])
                    continue
                # One that changed within the clock's last tick may change again under the same stamp.
                settled = stamp[1] < time.time_ns() - CLOCK_TICK_NS
                listing, keep = scan(archive)
                listings.append(listing)
                if keep and settled:
                    self._kept[name], fresh = (stamp, listing), True
                if time.monotonic() - told > _PATIENCE:
                    log.info(f"{number:,} of {len(archives):,} archives are listed")
                    told = time.monotonic()
        finally:  # also where a later one is refused
            if fresh and self._cache:
                _write(self._cache, {name: kept for name, kept in self._kept.items() if os.path.exists(name)})
        return listings


def is_hidden(name: str) -> bool:
    """Whether a name in an archive, or that of a folder on its way, begins with a dot, as `._1.jpg`."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def cache_file(kind: str, *what: str) -> Path | None:
    """Where a list of this kind is kept for what it depends on, or None on a system without a home folder."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    key = "\n".join(what).encode("utf-8", "surrogateescape")
    return home / "simmim" / f"{kind}-{hashlib.sha256(key).hexdigest()[:32]}.npz"


def _stamp(archive: Path) -> Stamp:
    status = archive.stat()
    return status.st_size, status.st_mtime_ns


def _read(cache: Path) -> dict[str, tuple[Stamp, Listing]]:
    """The listings by path of the archive; none if there are none or they are damaged."""
    try:
        with np.load(cache, allow_pickle=False) as file:
            arrays = dict(file)
        archives = PackedStrings(arrays.pop("archives"), arrays.pop("archive_ends"))
        stamps, counts = arrays.pop("stamps"), arrays.pop("counts")
        everything = Listing(PackedStrings(arrays.pop("names"), arrays.pop("name_ends")), arrays)
        stops = np.cumsum(counts)
        if any(len(values) != stops[-1] for values in (everything.names.ends, *arrays.values())):
            raise ValueError("columns of unequal length")
        return {
            name: ((int(stamp[0]), int(stamp[1])), everything.part(int(stop - count), int(stop)))
            for name, stamp, count, stop in zip(archives, stamps, counts, stops, strict=True)
        }
    except Exception as error:  # a damaged zip raises half a dozen kinds; listing anew is always right
        log.debug("no usable listings in %s: %s", cache, error)
        return {}


def _write(cache: Path, kept: dict[str, tuple[Stamp, Listing]]) -> None:
    """Keeps listings; a cache folder that cannot be written is no error."""
    archives = PackedStrings.pack(list(kept))
    everything = Listing.joined([listing for _, listing in kept.values()])
    try:
        with whole_file(cache) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                archives=archives.text,
                archive_ends=archives.ends,
                stamps=np.array([stamp for stamp, _ in kept.values()], dtype=np.int64),
                counts=np.array([len(listing.names) for _, listing in kept.values()], dtype=np.int64),
                names=everything.names.text,
                name_ends=everything.names.ends,
                **everything.columns,  # type: ignore[arg-type]
            )
    except OSError as error:
        log.debug("the listings are not kept: %s", error)
