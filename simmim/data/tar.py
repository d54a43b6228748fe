"""The images of .tar and .tar.gz archives: WebDataset shards, or an archive a class.

A WebDataset shard holds the files of a sample one behind the other:

    KEY.jpg       the image, or .png, .webp, …; KEY has no dot behind its last slash, so KEY.mask.png is no image
    KEY.cls       its class number as text, or
    KEY.json      an object with an integer "label" or "cls"

An archive a class, as ImageNet-22K is handed out, holds images alone, and its own name is their class: n01440764.tar.
Without labels the two look the same, so that nothing is guessed: `data.labels` says which it is.

An image of a .tar is read where it lies, as often and by as many processes as one likes. A .tar.gz has no random
access: its images are held in memory, compressed as JPEG or PNG compress. Nothing is unpacked to the disk.
"""

import itertools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from simmim.data.classes import classes_of_names, classes_of_numbers
from simmim.data.files import free_memory
from simmim.data.folder import SUFFIXES, without_arrays
from simmim.data.listings import KeptListings, Listing
from simmim.data.packed import PackedSource
from simmim.data.patterns import ARCHIVES, find_archives
from simmim.data.tar_members import LABELS, content, label_of, members, opened

log = logging.getLogger(__name__)

_ENDINGS = ", ".join(suffix[1:] for suffix in SUFFIXES)
_IMAGES = {
    "own": f"WebDataset calls them KEY.jpg ({_ENDINGS}), and KEY has no dot",
    "archive": f"their names end in {_ENDINGS}",
}


class TarSource(PackedSource):
    """The images of some archives, archive by archive, sorted by name, and so in each.

    An image is called `<archive>:<member>`, whichever way its archive was given. Links, devices and hidden members are
    ignored. What a .tar holds is listed once, and again when its size or time has changed.

    Args:
        root: A folder of archives; one archive; a glob (`train-*.tar`); or a brace pattern, with a range or a list
            (`train-{000..004}.tar`, `{train,extra}.tar`). `~` is expanded.
        labels: "own": the .cls or .json members, whose numbers from 0 to the largest one, as strings, are the classes;
            without them there are none. "archive": the archive's name, without .tar, is the class of all its images.
        channels: What `load` returns: see `FileSource`.
        key: What `root` is called in messages.

    Attributes:
        in_memory: Whether every archive is compressed, and its images therefore in memory already.

    Raises:
        ValueError: If there is no archive; if one is damaged, truncated or without images, or does not fit into
            memory; if only some images have a label, or a label is none; for other `labels`.
    """

    how_to_label = (
        "KEY.cls beside KEY.jpg gives its class number; where each archive holds one class and is named after it, give "
        "data.labels=archive"
    )

    def __init__(
        self, root: str | os.PathLike[str], *, labels: str = "own", channels: int = 3, key: str = "data.root"
    ) -> None:
        if labels not in _IMAGES:
            raise ValueError(f"data.labels={labels} is unknown: choose {' or '.join(_IMAGES)}")
        folder, archives = find_archives(root, key)
        held = bytearray()  # grows in place: a list of pieces would be there twice at the end

        def scan(archive: Path) -> tuple[Listing, bool]:
            return _list_archive(archive, held, labels=labels, key=key)

        listings = KeptListings(f"tar {labels} {SUFFIXES}", folder).of(archives, scan)
        if held:
            log.info(f"{key}: compressed images in memory, {len(held) / 2**20:,.1f} MiB")
        # A tensor, since processes that are not forked get its memory, where an array would be copied.
        self._held = torch.frombuffer(held or bytearray(1), dtype=torch.uint8)
        shown = [Path(os.path.relpath(archive, folder)).as_posix() for archive in archives]
        classes, numbers = _classes_of(listings, shown, labels, f"{key}={root}")
        super().__init__(folder, archives, listings, classes, numbers, channels=channels, key=key)
        self._shown = shown
        self.in_memory = bool(self.columns["held"].all())

    def read(self, index: int) -> bytes:
        """The content of an image's file.

        Raises:
            UnreadableImage: If its archive cannot be read.
        """
        if not self.column("held", index):
            return super().read(index)
        offset = self.column("offsets", index)
        return self._held[offset : offset + self.column("lengths", index)].numpy().tobytes()

    def relative_name(self, index: int) -> str:
        """Archive and member."""
        at = self._indices[index]
        return f"{self._shown[self._archive_of[at]]}:{self._names[at]}"

    def refuse_gone(self) -> None:
        """Raises a ValueError if the whole folder has gone, unless nothing is read from it any more."""
        if not self.in_memory:
            super().refuse_gone()


def _list_archive(archive: Path, held: bytearray, *, labels: str, key: str) -> tuple[Listing, bool]:
    """Goes through an archive once.

    Args:
        archive: Its path.
        held: Gets the images of a compressed one; their offsets count from where it begins.
        labels: See `TarSource`.
        key: What the archives are called in messages.

    Returns:
        Its images, and whether they are read where they lie.
    """
    names: list[str] = []
    columns: dict[str, list[int]] = {"offsets": [], "lengths": [], "held": []}
    found: dict[str, dict[str, int]] = {suffix: {} for suffix in LABELS}
    with opened(archive, key) as (file, compressed):
        room = _room(held) if compressed else None
        for member in members(file):
            sample, suffix = _split(member.name) if labels == "own" else os.path.splitext(member.name.lower())
            what = f"{key}: {archive}:{member.name}"
            if suffix in SUFFIXES:
                names.append(member.name)
                columns["offsets"].append(len(held) if compressed else member.offset_data)
                columns["lengths"].append(member.size)
                columns["held"].append(compressed)
                if compressed:
                    _hold(file, member, held, room=room, what=what)
            elif suffix in found and (label := label_of(file, member, what)) is not None:
                if labels == "archive":
                    raise ValueError(f"{what} is a label: data.labels=own reads archives with labels of their own")
                found[suffix][sample] = label
    if not names:
        raise ValueError(f"{key}: {archive} holds no image: {_IMAGES[labels]}")
    images = set(without_arrays(names, f"{key}: {archive}"))
    kept = [name in images for name in names]
    columns = {column: list(itertools.compress(values, kept)) for column, values in columns.items()}
    names = list(itertools.compress(names, kept))
    numbers = found[".json"] | found[".cls"]
    columns["labels"] = [numbers.get(_split(name)[0], -1) for name in names]
    try:
        return Listing.sorted(names, columns), not compressed
    except ValueError as error:
        raise ValueError(f"{key}: {archive} {error}") from error


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member, as WebDataset splits them: at the first dot behind the last slash."""
    folder, slash, base = name.rpartition("/")
    sample, dot, suffix = base.partition(".")
    return f"{folder}{slash}{sample}", f"{dot}{suffix}".lower()


def _room(held: bytearray) -> int | None:
    """Bytes that `held` may have, as memory is free now; None if not known."""
    free = free_memory()
    return None if free is None else len(held) + free


def _hold(file: IO[bytes], member: Any, held: bytearray, *, room: int | None, what: str) -> None:
    needed = len(held) + member.size
    if room is not None and needed > room:
        raise ValueError(
            f"{what}: compressed archives are held in memory, where up to here {needed / 2**30:.2f} GiB are needed and "
            f"{room / 2**30:.2f} GiB are free: gunzip the archives, a plain .tar is read where it lies"
        )
    held += content(file, member)


def _classes_of(
    listings: Sequence[Listing], archives: Sequence[str], labels: str, given: str
) -> tuple[list[str], NDArray[np.int32]]:
    """Class names and labels of all images."""
    if labels == "archive":
        classes, of_archive = classes_of_names([_stem(archive) for archive in archives])
        return classes, np.repeat(of_archive, [len(listing.names) for listing in listings])
    numbers = np.concatenate([listing.columns["labels"] for listing in listings])
    bare, labelled = np.flatnonzero(numbers < 0), np.flatnonzero(numbers >= 0)
    if len(bare) and len(labelled):
        everywhere = [f"{a}:{name}" for a, listing in zip(archives, listings, strict=True) for name in listing.names]
        raise ValueError(
            f"{given}: {everywhere[bare[0]]} has no label (KEY.cls, or KEY.json with an integer label), while "
            f"{everywhere[labelled[0]]} has one; {len(bare):,} of {len(numbers):,} images lack it: label all or none"
        )
    return classes_of_numbers(numbers)


def _stem(archive: str) -> str:
    """The class that an archive is named after."""
    name = Path(archive).name
    return next(name[: len(name) - len(ending)] for ending in (*ARCHIVES, "") if name.lower().endswith(ending))
