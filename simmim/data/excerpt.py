"""A few images from all over a folder, to look at or to compare with."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from simmim.data.decoding import UnreadableImage, decode
from simmim.data.folder import FolderSource
from simmim.data.transforms import Transform

log = logging.getLogger(__name__)


def read_excerpt(
    path: Path, *, channels: int, max_value: float, crop: Transform, count: int
) -> tuple[list[str], Tensor]:
    """Readable images of a file, or from all over a folder.

    Args:
        path: The file or folder.
        channels: To decode to.
        max_value: The pixel value that counts as 1: see `simmim.data.decoding.decode`.
        crop: Makes them one size.
        count: How many, at most.

    Returns:
        Their paths, and (B, C, H, W), uint8 or floats as `decode` has it.

    Raises:
        ValueError: If none can be read.
    """
    if path.is_file():
        try:
            return [str(path)], crop(decode(path.read_bytes(), channels, max_value))[None]
        except UnreadableImage as error:
            raise ValueError(f"images={path} cannot be read ({error})") from error
    source = FolderSource(path, channels=channels, key="images").in_units_of(max_value)
    readable: dict[str, Tensor] = {}
    stride = max(1, len(source) // count)
    for index in sorted(range(len(source)), key=lambda index: (index % stride, index)):
        try:
            readable[source.name(index)] = crop(source.load(index)[0])
        except UnreadableImage as error:
            log.warning(f"{source.name(index)} cannot be read ({error})")
        if len(readable) == count:
            break
    if not readable:
        raise ValueError(f"images={path} holds no image that can be read")
    return list(readable), torch.stack(list(readable.values()))
