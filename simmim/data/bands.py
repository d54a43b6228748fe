"""Images of any number of bands, as they are stored: NumPy arrays (.npy), and TIFF files by tifffile.

Both are opened before they are read: size and kind of the numbers are known, and may be refused, before the pixels take
any memory.
"""

import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

ARRAY_SIGNATURE = npy.MAGIC_PREFIX

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_ORIENTATION = 0x0112
_AXES = {"YX": (None, 0, 1), "YXS": (2, 0, 1), "SYX": (0, 1, 2)}
"""Of a page of a TIFF: where bands, rows and columns are."""


class BandsError(ValueError):
    """Why the bytes are not so many bands, in a few words."""


@dataclass(frozen=True)
class Bands:
    """An image that is open.

    Args:
        height: In pixels, as it will be read.
        width: Likewise.
        dtype: Kind of its numbers.
        read: Gives the pixels (C, H, W).
    """

    height: int
    width: int
    dtype: np.dtype[Any]
    read: Callable[[], NDArray[Any]]


def open_array(data: bytes, channels: int) -> Bands:
    """Opens a .npy file of shape (H, W), (H, W, C) or (C, H, W).

    The bands are the axis, first or last, that has `channels` entries. Nothing is unpickled.

    Args:
        data: The whole content of the file.
        channels: Number of bands C.

    Raises:
        BandsError: If it is of another shape, or both the first and the last axis have `channels` entries; if it is cut
            short or holds Python objects.
    """
    file = io.BytesIO(data)
    version = npy.read_magic(file)
    if version not in _HEADERS:
        raise BandsError(f"a .npy of version {version[0]}.{version[1]}, which no array of numbers needs")
    shape, by_columns, dtype = _HEADERS[version](file)
    axis = _band_axis(shape, channels)
    if dtype.hasobject:
        raise BandsError("a .npy of Python objects, which are not read")
    start, count = file.tell(), math.prod(shape)
    if len(data) - start < count * dtype.itemsize:
        raise BandsError("truncated NPY")

    def read() -> NDArray[Any]:
        order = "F" if by_columns else "C"
        pixels = np.frombuffer(data, dtype, count, start).reshape(shape, order=order)  # type: ignore[call-overload]
        return pixels[None] if axis is None else np.moveaxis(pixels, axis, 0)

    height, width = (side for number, side in enumerate(shape) if axis is None or number != axis % 3)
    return Bands(height, width, dtype, read)


def _band_axis(shape: Sequence[int], channels: int) -> int | None:
    """The axis of the bands; None where there is one band and no axis."""
    if len(shape) not in (2, 3) or 0 in shape:
        raise BandsError(f"a .npy of shape {tuple(shape)}: an image has (H, W), (H, W, C) or (C, H, W)")
    if len(shape) == 2:
        _refuse_other(1, channels)
        return None
    fits = [axis for axis in (0, -1) if shape[axis] == channels]
    if len(fits) != 1:
        what = "as the first and as the last axis" if fits else "neither as the first nor as the last axis"
        raise BandsError(f"a .npy of shape {tuple(shape)}, with data.channels={channels} {what}")
    return fits[0]


@contextmanager
def open_tiff(data: bytes, channels: int) -> Iterator[Bands]:
    """Opens the first page of a TIFF file; or all pages, where each has one band and there are `channels` of them.

    Args:
        data: The whole content of the file.
        channels: Number of bands.

    Raises:
        BandsError: If it has another number of bands, or tifffile is not installed or cannot read it.
    """
    try:
        from tifffile import TiffFile
    except ImportError as error:
        raise BandsError(
            "a TIFF of bands, of more than 8 bits, or of a kind that PIL cannot read: pip install 'simmim[tiff]'"
        ) from error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what matters is an error
    with TiffFile(io.BytesIO(data)) as file:
        first: Any = file.pages.first
        every = first.axes == "YX" and len(file.pages) == channels
        pages: list[Any] = list(file.pages) if every else [first]
        if first.axes not in _AXES or any((page.axes, page.shape) != (first.axes, first.shape) for page in pages):
            raise BandsError("a TIFF whose pages are no images of bands, all of one size")
        bands, rows, columns = _AXES[first.axes]
        _refuse_other(len(pages) if bands is None else first.shape[bands], channels)
        turn = first.tags.valueof(_ORIENTATION, default=1)
        sides = first.shape[rows], first.shape[columns]
        yield Bands(*(sides[::-1] if turn > 4 else sides), first.dtype, lambda: _upright(_stacked(pages), turn))


def _stacked(pages: list[Any]) -> NDArray[Any]:
    """The pixels (C, H, W) of pages."""
    try:
        images = [page.asarray(maxworkers=1).reshape(page.shape) for page in pages]
    except ValueError as error:
        if "imagecodecs" in str(error):
            name = pages[0].compression.name
            raise BandsError(f"a TIFF compressed by {name}: pip install imagecodecs") from error
        raise
    if pages[0].axes == "YX":
        return np.stack(images)
    axis: int | None = _AXES[pages[0].axes][0]
    assert axis is not None
    return np.moveaxis(images[0], axis, 0)


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turns (C, H, W) as the tag of TIFF and EXIF says: 1 to 8."""
    if orientation > 4:
        pixels = pixels.swapaxes(1, 2)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[:, ::rows, ::columns]


def _refuse_other(bands: int, channels: int) -> None:
    if bands != channels:
        raise BandsError(f"{bands} band{'s' if bands > 1 else ''}, and data.channels={channels}")
