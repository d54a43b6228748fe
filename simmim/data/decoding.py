"""From the bytes of an image file to a tensor: uint8 of pictures, float32 of everything with more than 8 bits.

JPEG files that need no turning, most of all images, are decoded by libjpeg-turbo, straight to a tensor. PIL
decodes all other pictures, and has the last word on every damaged one. Arrays (.npy) and TIFF files whose bands are no
colours, or have more than 8 bits, are read as they are stored: see `simmim.data.bands`.
"""

import io
import warnings

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from simmim.data.bands import ARRAY_SIGNATURE, Bands, BandsError, open_array, open_tiff

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ARRAY = "NPY"
"""An array is told by its content too, but lies beside images as often as it is one."""

MAX_PIXELS = 170_000_000  # a satellite scene passes; just below the limit of PIL itself
HEAD_BYTES = 16  # what `image_format` needs
EIGHT_BIT = 255
"""The `data.max_value` of 8-bit images; with any other one pixels have 16 bits or are floats."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_JPEG_COLOURS = {"YCbCr", "Gray"}  # as stored; the others (CMYK, RGB) are rare, and left to PIL
_JPEG_START_OF_SCAN = 0xDA
_JPEG_APP1 = 0xE1  # holds EXIF, or XMP
_ORIENTATION = 0x0112
_EXTRA_SAMPLES = 0x0152
_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (ARRAY_SIGNATURE, ARRAY),
)


class UnreadableImage(ValueError):
    """The bytes are not a whole image of a known format.

    The message is a short reason without the file's name, for the caller to put behind the name.
    """


def decode(data: bytes, channels: int, max_value: float = EIGHT_BIT) -> Tensor:
    """Decode an image file, upright.

    The format is told by content. EXIF orientation is applied. What else happens depends on `max_value`:

    * 255, 8-bit images. Of pictures, colours become grey as luma (ITU-R 601), grey becomes colour by repetition. Alpha
      is dropped for 1 and 3 channels, as PIL and torchvision do, not blended with a background; images without alpha
      are opaque for 4. The full range of 16-bit values becomes 0..255. Of an animation, the first frame is taken.
      Arrays, and TIFF files with bands that are neither colours nor alpha, must be uint8 and have so many bands.
    * Anything else: 16-bit or float images, of so many bands, as they are stored. Nothing is scaled, clipped or
      rounded.

    Args:
        data: The whole content of the file.
        channels: Of a picture 1 (grey), 3 (RGB) or 4 (RGBA); of bands any number.
        max_value: The pixel value that counts as 1 (`data.max_value`).

    Returns:
        (channels, H, W), uint8 for a `max_value` of 255, else float32. Its memory is laid out as the decoder left it,
        mostly channels last.

    Raises:
        UnreadableImage: If the data are empty, no image, truncated, damaged, or larger than `MAX_PIXELS`; have another
            number of bands, other kinds of numbers, or pixels that are not finite.
    """
    with warnings.catch_warnings():
        # PIL warns of every odd tag and of large sizes; what matters becomes an UnreadableImage.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            return _decode(data, channels, max_value)
        except UnreadableImage:
            raise
        except BandsError as error:
            raise UnreadableImage(str(error)) from error
        except Exception as error:  # damaged bytes make decoders raise anything: struct.error, IndexError, …
            raise UnreadableImage(_reason(data, error)) from error


def image_format(head: bytes) -> str | None:
    """Tell the format (one of `FORMATS`, or `ARRAY`) from a file's first `HEAD_BYTES` bytes; None if it is no image."""
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    # "BM" alone would also match texts; the reserved bytes behind the file size are zero.
    return "BMP" if head[:2] == b"BM" and head[6:10] == bytes(4) else None


def is_upright_jpeg(data: bytes) -> bool:
    """Whether a file that `decode` can read is a JPEG that neither EXIF nor XMP turns."""
    if not data.startswith(_SIGNATURES[0][0]):
        return False
    return not _may_be_turned(data) or _open(data).getexif().get(_ORIENTATION, 1) == 1


def _decode(data: bytes, channels: int, max_value: float) -> Tensor:
    kind = image_format(data[:HEAD_BYTES])
    if kind == ARRAY:
        return _as_stored(open_array(data, channels), max_value)
    if kind == "TIFF" and not (max_value == EIGHT_BIT and _is_picture(data, channels)):
        with open_tiff(data, channels) as bands:
            return _as_stored(bands, max_value)
    if max_value != EIGHT_BIT:
        return _as_stored(_sixteen_bits(_open(data), channels, max_value), max_value)
    if channels not in _MODES:
        name = _open(data).format
        raise UnreadableImage(
            f"a {name} is read as 1 (grey), 3 (RGB) or 4 (RGBA) channels, not data.channels={channels}"
        )
    if channels != 4 and is_upright_jpeg(data):
        try:
            return _decode_jpeg(data, channels)
        except ValueError:
            pass  # PIL knows more kinds, and tells truncated from damaged
    return _decode_with_pil(_open(data), channels)


def _is_picture(data: bytes, channels: int) -> bool:
    """Whether a TIFF is grey or colours, and perhaps alpha, for so many channels; otherwise it holds bands."""
    if channels not in _MODES:
        return False
    try:
        image = _open(data)
    except UnidentifiedImageError:
        return False
    extra = image.tag_v2.get(_EXTRA_SAMPLES, ())  # type: ignore[attr-defined]
    pages = getattr(image, "n_frames", 1) if channels == 4 and image.mode == "L" else 1  # four bands, one a page
    return 0 not in np.atleast_1d(extra) and pages != 4


def _as_stored(bands: Bands, max_value: float) -> Tensor:
    """The pixels of bands, which must be of the kind that `max_value` stands for."""
    _refuse_bomb(bands.width, bands.height)
    kinds = ("uint8",) if max_value == EIGHT_BIT else ("uint16", "float32")
    if bands.dtype.name not in kinds:
        raise UnreadableImage(
            f"{bands.dtype.name} pixels, where data.max_value={max_value:g} stands for {' or '.join(kinds)}"
            + (", and 65535, 1 or what else counts as 1 for others" if max_value == EIGHT_BIT else "")
        )
    pixels: NDArray[np.generic] = bands.read()  # (channels, H, W)
    image = torch.from_numpy(pixels.astype(np.uint8 if max_value == EIGHT_BIT else np.float32))
    if image.is_floating_point() and not image.isfinite().all():
        raise UnreadableImage("some pixels are NaN or infinite")
    return image


def _sixteen_bits(image: Image.Image, channels: int, max_value: float) -> Bands:
    """A 16-bit grey PNG: all that PIL reads with more than 8 bits, besides TIFF."""
    if not image.mode.startswith("I;16"):
        raise UnreadableImage(
            f"a {image.format} read with 8 bits a channel, where data.max_value={max_value:g} stands for 16-bit or "
            "float pixels: 255 for 8-bit images; convert others to TIFF or .npy"
        )
    if channels != 1:
        raise UnreadableImage(f"1 band, and data.channels={channels}")
    dtype = np.dtype(np.uint16)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return Bands(image.height, image.width, dtype, lambda: np.asarray(image).astype(dtype)[None])


def _open(data: bytes) -> Image.Image:
    """Reads the header alone."""
    # A closed list of formats: PIL would also start Ghostscript for an EPS file named .jpg.
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _refuse_bomb(*image.size)
    return image


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            f"{width}x{height} px, more than the limit of {MAX_PIXELS:,} px: refused as a decompression bomb"
        )


def _may_be_turned(data: bytes) -> bool:
    """Whether a JPEG has metadata before its pixels, or a header too odd to tell. PIL takes five times as long."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] >= 0xC0:
        marker = data[at + 1]
        if marker in (_JPEG_APP1, _JPEG_START_OF_SCAN):
            return marker == _JPEG_APP1
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return True


def _decode_jpeg(data: bytes, channels: int) -> Tensor:
    """Decodes with libjpeg-turbo, as PIL does too; its grey is the file's luma plane, PIL's is made from RGB.

    Raises:
        ValueError: If the file is damaged, truncated, or of a kind left to PIL.
    """
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    if colours not in _JPEG_COLOURS:
        raise ValueError(f"stored as {colours}")
    _refuse_bomb(width, height)
    pixels = simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")  # (H, W, C)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_with_pil(image: Image.Image, channels: int) -> Tensor:
    if image.mode in ("I", "F"):
        raise UnreadableImage("32-bit pixels, whose range is not known: data.max_value=… says what counts as 1")
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):  # PIL's own conversion to 8 bit clips at 255
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    pixels = np.array(image.convert(_MODES[channels]))  # (H, W) or (H, W, C)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def _reason(data: bytes, error: Exception) -> str:
    """A few words for the user: what is wrong with these bytes."""
    if not data:
        return "empty file"
    if isinstance(error, Image.DecompressionBombError):
        return f"{str(error).split(',')[0]}: refused as a decompression bomb"
    name = image_format(data[:HEAD_BYTES])
    if name is None:
        return f"not an image (none of {', '.join((*FORMATS, ARRAY))})"
    if "truncated" in str(error).lower():
        return f"truncated {name}"
    if isinstance(error, UnidentifiedImageError):
        return f"damaged {name}, or a kind of it that PIL cannot read"
    return f"damaged {name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
