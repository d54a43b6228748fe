import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from simmim.data.decoding import FORMATS, MAX_PIXELS, UnreadableImage, decode, image_format

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
STORED = {
    "JPEG": ["RGB", "L", "CMYK"],
    "PNG": ["RGB", "L", "RGBA", "LA", "P", "1"],
    "WEBP": ["RGB", "L", "RGBA"],
    "GIF": ["RGB", "L", "P", "1"],
    "BMP": ["RGB", "L", "P", "1"],
    "TIFF": ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK"],
}
KINDS = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("WEBP", {}),
    ("GIF", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
]


def picture(height=45, width=60, mode="RGB"):
    """A smooth picture with a different gradient in each channel."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height), 255 - x]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8), "RGBA").convert(mode)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pil(data, mode):
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.array(ImageOps.exif_transpose(image).convert(mode))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def same(ours, theirs, *, levels=0):
    return ours.shape == theirs.shape and int((ours.int() - theirs.int()).abs().max()) <= levels


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("channels", MODES)
@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in STORED for mode in STORED[kind]])
def test_every_format_and_mode_decodes_as_pil_does(kind, mode, channels):
    data = encoded(picture(mode=mode), kind)
    image = decode(data, channels)
    assert image.dtype == torch.uint8
    # A JPEG's own luma differs from that of its RGB where colours are clipped.
    assert same(image, by_pil(data, MODES[channels]), levels=8 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), kind, exif=exif)
    assert same(decode(data, 3), by_pil(data, "RGB"))
    assert tuple(decode(data, 3).shape) == ((3, 45, 60) if orientation < 5 else (3, 60, 45))


def test_damaged_exif_does_not_make_a_picture_unreadable():
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff")
    assert decode(data, 3).shape == (3, 45, 60)


@pytest.mark.parametrize("filling", [0, 1, 3])
def test_orientation_is_found_behind_other_segments_of_a_jpeg(filling):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(), "JPEG", exif=exif, comment=b"\xff\xda" * 50)
    profile = b"\xff\xe2" + struct.pack(">H", 5002) + b"\xff\xda" * 2500
    data = data[:2] + profile * filling + data[2:]
    assert same(decode(data, 3), by_pil(data, "RGB"))
    assert decode(data, 3).shape == (3, 60, 45)


def test_orientation_in_xmp_is_applied_too():
    data = encoded(picture(), "JPEG", xmp=b'<x tiff:Orientation="6"/>')
    assert decode(data, 3).shape == (3, 60, 45)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_photographs_take_the_fast_way(kind, monkeypatch):
    data = encoded(picture(), kind)
    expected = by_pil(data, "RGB")
    monkeypatch.setattr("simmim.data.decoding.Image.open", None)  # whatever needs PIL fails from here on
    if kind == "JPEG":
        assert same(decode(data, 3), expected)
    else:
        with pytest.raises(UnreadableImage):
            decode(data, 3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    ramp = np.linspace(0, 65535, 60 * 45).round().astype(np.uint16).reshape(45, 60)
    image = decode(encoded(Image.fromarray(ramp), kind), 3)
    expected = torch.from_numpy((ramp / 257).round().astype(np.uint8))
    assert same(image, expected.expand(3, 45, 60))


def test_sixteen_bits_are_turned_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(np.zeros((45, 60), np.uint16)), "PNG", exif=exif)
    assert decode(data, 3).shape == (3, 60, 45)


def test_sixteen_bit_colour_png_is_scaled():
    # PIL does not write these: a PNG of one row, built by hand.
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    row = b"\0" + struct.pack(">6H", 0, 32768, 65535, 65535, 257, 0)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    image = decode(b"\x89PNG\r\n\x1a\n" + body, 3)
    assert image[:, 0].T.tolist() == [[0, 128, 255], [255, 1, 0]]


def test_pixels_of_unknown_range_are_refused():
    with pytest.raises(UnreadableImage, match="32-bit"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), 3)


def test_animations_give_their_first_frame():
    frames = [picture(), ImageOps.invert(picture())]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert same(decode(data, 3), by_pil(data, "RGB"))


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_cut_anywhere_is_an_error_or_whole(kind, options, channels):
    data = encoded(picture(), kind, **options)
    whole = decode(data, channels)
    refused = 0
    size = len(data)
    for length in (0, 1, 5, 20, 100, size // 3, size // 2, size * 9 // 10, size - 30, size - 1):
        try:
            # The last bytes of a PNG or GIF hold no pixels.
            assert torch.equal(decode(data[:length], channels), whole), f"{length} of {size} bytes"
        except UnreadableImage:
            refused += 1
    assert refused >= 7


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_damaged_bytes_raise_nothing_but_unreadable_image(kind, options):
    data = encoded(picture(), kind, **options)
    random = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        for position in random.integers(0, min(len(data), random.choice([40, 400, 10**6])), size=8):
            damaged[position] = random.integers(256)
        try:
            assert decode(bytes(damaged), 3).shape[0] == 3
        except UnreadableImage as error:
            assert str(error) and "\n" not in str(error)


def bomb(width, height):
    """A BMP header of a size in pixels, without the pixels."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def test_a_jpeg_bomb_is_refused_before_decoding():
    data = bytearray(encoded(picture(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(UnreadableImage, match="refused as a decompression bomb"):
        decode(bytes(data), 3)


@pytest.mark.parametrize("size", [(16_000, 16_000), (13_100, 13_000)])
def test_bombs_are_refused_before_decoding(size):
    assert size[0] * size[1] > MAX_PIXELS
    with pytest.raises(UnreadableImage, match="refused as a decompression bomb"):
        decode(bomb(*size), 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello, world", "not an image"),
        (
            encoded(picture(), "PPM"),
            "not an image",
        ),  # PIL could read it, and would start other programs for EPS
    ],
)
def test_reasons_are_short(data, reason):
    with pytest.raises(UnreadableImage, match=f"^{reason}"):
        decode(data, 3)


def test_a_picture_has_no_other_channels():
    with pytest.raises(UnreadableImage, match=r"^a PNG is read as 1 .* not data\.channels=2$"):
        decode(encoded(picture(), "PNG"), 2)


def test_no_warning_leaks_out():
    palette = encoded(picture(mode="P"), "PNG", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in (encoded(picture(), "JPEG"), encoded(picture(), "WEBP"), palette):
            decode(data, 3)
        with pytest.raises(UnreadableImage, match="px"):
            decode(bomb(13_100, 13_000), 3)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_told_by_content(kind):
    assert image_format(encoded(picture(), kind)[:16]) == kind
    assert image_format(b"BMW and other makes of cars") is None


DIRTY = {
    "cmyk.jpg": (711, 400),
    "exif_rotated.jpg": (400, 711),
    "gif_p_rain141.jpg": (288, 384),
    "gif_p_shine131.jpg": (360, 480),
    "jpeg_l_cloudy66.jpg": (453, 640),
    "jpeg_l_cloudy71.jpg": (254, 600),
    "png_rgb_rain136.jpg": (329, 590),
    "png_rgb_rain26.jpg": (329, 590),
    "png_rgba_shine127.jpg": (177, 284),
    "sixteen_bit.png": (711, 400),
    "thin_8x600.png": (600, 8),
    "empty.jpg": "empty file",
    "text.jpg": "not an image",
    "truncated.jpg": "truncated JPEG",
}


@pytest.mark.parametrize("name", DIRTY)
def test_what_real_folders_contain(shared_data, name):
    data = (shared_data / "dirty" / name).read_bytes()
    if isinstance(DIRTY[name], str):
        with pytest.raises(UnreadableImage, match=DIRTY[name]):
            decode(data, 3)
        return
    assert tuple(decode(data, 3).shape) == (3, *DIRTY[name])
    if name != "sixteen_bit.png":
        assert same(decode(data, 3), by_pil(data, "RGB"), levels=4)


def test_photographs_decode_as_pil_does(shared_data):
    for path in sorted((shared_data / "imagenet-samples").iterdir())[::60]:
        data = path.read_bytes()
        difference = (decode(data, 3).int() - by_pil(data, "RGB").int()).abs()
        assert difference.max() <= 4, path.name
        difference = (decode(data, 1).int() - by_pil(data, "L").int()).abs().float()
        assert difference.mean() < 0.5, path.name
