"""The image files that `data.source` means, whatever holds them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simmim.data.files import FileSource
from simmim.data.folder import FolderSource
from simmim.data.hf import HFSource
from simmim.data.list import ListSource
from simmim.data.patterns import find_archives
from simmim.data.shards import ShardSource, is_copy
from simmim.data.tar import TarSource
from simmim.data.zip import ZipSource


def open_shards(
    root: str | os.PathLike[str], *, labels: str = "own", channels: int = 3, key: str = "data.root"
) -> ShardSource | TarSource:
    """A prepared copy, or archives: what lies there tells. See `ShardSource` and `TarSource`.

    Raises:
        ValueError: As they do; for `labels` other than "own" of a prepared copy, and for a part of one.
    """
    folder = Path(root).expanduser()
    if not is_copy(folder):
        if not folder.is_dir() and is_copy(place := find_archives(folder, key)[0]):
            raise ValueError(f"{key}={root} is a part of a prepared copy: give its folder, {key}={place}")
        return TarSource(root, labels=labels, channels=channels, key=key)
    if labels != "own":
        raise ValueError(
            f"data.labels={labels}: {key}={root} is a prepared copy, whose images have labels of their own"
        )
    return ShardSource(root, channels=channels, key=key)


FILE_SOURCES: dict[str, tuple[Callable[..., FileSource], tuple[str, ...]]] = {
    "folder": (FolderSource, ()),
    "shards": (open_shards, ("labels",)),
    "zip": (ZipSource, ()),
    "hf": (HFSource, ("image_column", "label_column")),
    "list": (ListSource, ()),
}
"""For each `data.source` what opens it, and the keys of the `data` section that are its alone."""


def open_files(config: dict[str, Any], root: str = "root") -> FileSource:
    """The images of a `data` section.

    Args:
        config: The section: `source`, `root`, `channels`, and what `FILE_SOURCES` names.
        root: The key that says where they lie: "root" or "val_root".

    Raises:
        ValueError: If the source is unknown, or cannot be opened.
    """
    if config["source"] not in FILE_SOURCES:
        raise ValueError(f"data.source={config['source']} is unknown: choose synthetic, {', '.join(FILE_SOURCES)}")
    opened, own = FILE_SOURCES[config["source"]]
    options = {key: config[key] for key in own}
    return opened(config[root], channels=config["channels"], key=f"data.{root}", **options)
