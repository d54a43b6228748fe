"""`python -m simmim.prepare`: a copy of any images in files, made small and packed: read several times faster."""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from simmim.command import command
from simmim.config import Config
from simmim.data.decoding import UnreadableImage
from simmim.data.files import FileSource
from simmim.data.loader import end_with_the_command
from simmim.data.shards import (
    INDEX,
    SETTINGS,
    UNREADABLE,
    PreparedImage,
    finished_shards,
    shard_path,
    shrink,
    write_index,
    write_json,
    write_shard,
)
from simmim.data.sources import open_files
from simmim.run_folder import shown

log = logging.getLogger(__name__)


def prepare(config: Config) -> Path:
    """Makes the copy, or goes on with it, and counts it.

    Args:
        config: The composed `conf/prepare.yaml`.

    Returns:
        The copy: the folder for `data=shards data.root=…`.

    Raises:
        ValueError: If `out` holds anything else than a copy of these images with these settings, or at Ctrl-C.
    """
    source = open_files({**config["data"], "channels": 3})
    out = Path(str(config["out"])).expanduser()
    claim(out, settings_of(source, config))
    records = list(finished_shards(out))
    done = sum(record["taken"] for record in records)
    if done:
        log.info(f"{done:,} of {len(source):,} images are there already")
    try:
        pack(source, out, records, config)
    except KeyboardInterrupt:
        raise ValueError(f"stopped after {len(records)} whole shards: the same command goes on behind them") from None
    if not any(record["names"] for record in records):
        raise ValueError(f"data.root={config['data']['root']} holds no image that can be read")
    write_index(out, records, source.classes, listed=len(source), short_side=config["short_side"])
    summarise(out, records)
    return out


def settings_of(source: FileSource, config: Config) -> dict[str, str | int]:
    """What decides about the bytes of a copy."""
    return {
        "root": os.path.realpath(source.root),
        "images": len(source),
        "names_sha256": source.names_sha256(),
        "labels_sha256": source.labels_sha256(),
        **{key: config[key] for key in ("short_side", "quality", "shard_mb")},
    }


def claim(out: Path, settings: dict[str, str | int]) -> None:
    """Makes `out` the place of this copy, and removes what an interrupted run left half done.

    Raises:
        ValueError: If it is the place of another one, or of something else.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is not a folder: give a new one")
    if (out / SETTINGS).is_file():
        before = json.loads((out / SETTINGS).read_text())
        if changed := next((key for key in settings if before.get(key) != settings[key]), None):
            raise ValueError(
                f"out={out} was prepared with {changed}={before.get(changed)}, now {settings[changed]}: "
                "give another out, or delete that one"
            )
    elif out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise ValueError(f"out={out} holds other files: give a new folder")
    else:
        write_json(out / SETTINGS, settings)
    for leftover in out.glob(".shard-*"):
        leftover.unlink()


def pack(source: FileSource, out: Path, records: list[dict[str, Any]], config: Config) -> None:
    """Writes the shards that are missing behind those whose records are given, and adds their records."""
    done = sum(record["taken"] for record in records)
    with logging_redirect_tqdm(), tqdm(total=len(source), initial=done, unit=" images") as bar:
        images = counted(convert(source, done, config), bar)
        while done < len(source):
            records.append(write_shard(shard_path(out, len(records)), images, config["shard_mb"] << 20))
            done += records[-1]["taken"]


@dataclass(frozen=True)
class Conversions(Dataset[tuple[bytes | None, str]]):
    """For each image of a source its JPEG file, or None and the reason."""

    source: FileSource
    short_side: int
    quality: int

    def __getitem__(self, index: int) -> tuple[bytes | None, str]:
        """Reads, shrinks and encodes an image."""
        try:
            return shrink(self.source.read(index), self.short_side, self.quality), ""
        except UnreadableImage as error:
            self.source.refuse_gone()
            return None, str(error)


def convert(source: FileSource, start: int, config: Config) -> Iterator[PreparedImage]:
    """The images from a position on, in their order, made by several processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = cores if config["workers"] is None else config["workers"]
    loader = DataLoader(
        Conversions(source, config["short_side"], config["quality"]),
        batch_size=None,
        sampler=range(start, len(source)),
        num_workers=workers,
        collate_fn=tuple,
        prefetch_factor=16 if workers else None,
        worker_init_fn=end_with_the_command,
    )
    for index, (data, reason) in enumerate(loader, start):
        yield PreparedImage(source.relative_name(index), source.label(index), data, reason)


def counted(images: Iterator[PreparedImage], bar: "tqdm[PreparedImage]") -> Iterator[PreparedImage]:
    """The same images, each one shown on the bar when it is taken."""
    for image in images:
        bar.update()
        yield image


def summarise(out: Path, records: list[dict[str, Any]]) -> None:
    """Says what there is now, and what to do with it."""
    readable = sum(len(record["names"]) for record in records)
    unreadable = sum(len(record["unreadable"]) for record in records)
    size = sum(shard_path(out, number).stat().st_size for number in range(len(records)))
    log.info(f"{readable:,} images in {len(records)} shards, {size / 2**20:,.1f} MiB; index {shown(out / INDEX)}")
    if unreadable:
        log.warning(f"{unreadable:,} images could not be read and are left out: {shown(out / UNREADABLE)}")
    log.info(f"done: {shown(out)}; next: python -m simmim.pretrain data=shards data.root={shown(out)}")


if __name__ == "__main__":
    command(prepare)()
