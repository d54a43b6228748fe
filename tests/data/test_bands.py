"""Arrays and TIFF files of bands: what is read is what was written, and what is not is said."""

import builtins
import io

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from simmim.data.decoding import UnreadableImage, decode
from simmim.data.folder import FolderSource
from simmim.data.tar import TarSource

HIGHEST = {"uint8": 255, "uint16": 65535, "float32": 1}


def bands(channels, kind, *, height=20, width=30):
    """Numbers over the whole range, (C, H, W)."""
    random = np.random.default_rng(channels)
    if kind == "float32":
        return random.normal(size=(channels, height, width)).astype(np.float32)
    return random.integers(0, HIGHEST[kind] + 1, (channels, height, width)).astype(kind)


def npy(array, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def tiff(array, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def same(image, pixels):
    """Equal to the last bit, in the dtype that the kind of the pixels asks for."""
    assert image.dtype == (torch.uint8 if pixels.dtype.name == "uint8" else torch.float32)
    return image.shape == pixels.shape and np.array_equal(image.numpy().astype(np.float64), pixels.astype(np.float64))


@pytest.mark.parametrize("kind", HIGHEST)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_arrays_of_either_layout_are_read_as_they_are(channels, kind):
    pixels = bands(channels, kind)
    high = HIGHEST[kind]
    assert same(decode(npy(pixels), channels, high), pixels)
    assert same(decode(npy(np.moveaxis(pixels, 0, -1)), channels, high), pixels)
    assert same(decode(npy(np.asfortranarray(pixels)), channels, high), pixels)
    assert same(decode(npy(pixels.astype(pixels.dtype.newbyteorder(">"))), channels, high), pixels)
    if channels == 1:
        assert same(decode(npy(pixels[0]), 1, high), pixels)


LAYOUTS = {
    "interleaved": lambda p: tiff(np.moveaxis(p, 0, -1), photometric="minisblack", planarconfig="contig"),
    "planes": lambda p: tiff(p, photometric="minisblack", planarconfig="separate"),
    "pages": lambda p: tiff(p, photometric="minisblack"),
    "tiles": lambda p: tiff(
        np.moveaxis(p, 0, -1), photometric="minisblack", planarconfig="contig", tile=(16, 16), compression="zlib"
    ),
    "big-endian": lambda p: tiff(p, photometric="minisblack", planarconfig="separate", byteorder=">", bigtiff=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", HIGHEST)
@pytest.mark.parametrize("channels", [2, 4, 13])
def test_tiff_files_of_any_layout_are_read_as_they_are(channels, kind, layout):
    pixels = bands(channels, kind)
    assert same(decode(LAYOUTS[layout](pixels), channels, HIGHEST[kind]), pixels)


@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_one_band_is_read_as_it_is(kind):
    pixels = bands(1, kind)
    assert same(decode(tiff(pixels[0]), 1, HIGHEST[kind]), pixels)
    if kind == "uint16":
        file = io.BytesIO()
        Image.fromarray(pixels[0]).save(file, "PNG")
        assert same(decode(file.getvalue(), 1, 65535), pixels)


def test_three_bands_of_sixteen_bits_keep_them():
    pixels = bands(3, "uint16")
    data = tiff(np.moveaxis(pixels, 0, -1), photometric="rgb")
    assert same(decode(data, 3, 10000), pixels)
    assert decode(data, 3).dtype == torch.uint8  # as a picture of 8 bits, as ever


def test_a_fourth_band_is_alpha_only_where_the_file_says_so(monkeypatch):
    pixels = bands(4, "uint8")
    rows = np.moveaxis(pixels, 0, -1)
    infrared = tiff(rows, photometric="rgb", extrasamples=["unspecified"])
    assert same(decode(infrared, 4), pixels)
    with pytest.raises(UnreadableImage, match=r"^4 bands, and data\.channels=3$"):
        decode(infrared, 3)
    alpha = tiff(rows, photometric="rgb", extrasamples=["unassalpha"])
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)  # a picture needs PIL alone
    assert same(decode(alpha, 3), pixels[:3])
    assert same(decode(alpha, 4), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_files_are_turned_upright(orientation):
    pixels = bands(2, "uint16")
    data = tiff(
        np.moveaxis(pixels, 0, -1),
        photometric="minisblack",
        planarconfig="contig",
        extratags=[(274, "H", 1, orientation, False)],
    )
    planes = []
    for plane in pixels:
        image = Image.fromarray(plane.astype(np.int32))
        image.getexif()[0x0112] = orientation
        planes.append(np.asarray(ImageOps.exif_transpose(image)))
    assert same(decode(data, 2, 65535), np.stack(planes).astype(np.uint16))


REFUSED = {
    "another number of bands": (npy(bands(4, "uint16")), 13, 65535, r"\(4, 20, 30\), with data\.channels=13 neither"),
    "no axis of bands": (npy(bands(1, "uint16")[0]), 3, 65535, r"^1 band, and data\.channels=3$"),
    "two axes of bands": (npy(bands(30, "uint8")), 30, 255, r"channels=30 as the first and as the last axis"),
    "too many axes": (npy(np.zeros((2, 3, 4, 5), np.uint8)), 3, 255, r"an image has \(H, W\), "),
    "no pixel": (npy(np.zeros((3, 0, 5), np.uint8)), 3, 255, r"an image has \(H, W\), "),
    "NaN": (npy(np.full((2, 4, 4), np.nan, np.float32)), 2, 1, r"^some pixels are NaN or infinite$"),
    "infinity": (tiff(np.full((4, 4), -np.inf, np.float32)), 1, 1, r"^some pixels are NaN or infinite$"),
    "floats for 8 bits": (npy(bands(2, "float32")), 2, 255, r"^float32 pixels, .*=255 stands for uint8, and 65535"),
    "8 bits for 16": (npy(bands(2, "uint8")), 2, 10000, r"^uint8 pixels, .*=10000 stands for uint16 or float32$"),
    "signed": (npy(bands(2, "uint8").astype(np.int16)), 2, 10000, r"^int16 pixels"),
    "doubles": (tiff(bands(1, "float32")[0].astype(np.float64)), 1, 1, r"^float64 pixels"),
    "complex": (npy(np.zeros((2, 4, 4), np.complex64)), 2, 1, r"^complex64 pixels"),
    "bands for a picture": (tiff(bands(5, "uint8"), planarconfig="separate"), 3, 255, r"^5 bands"),
    "pages of other sizes": (None, 2, 65535, r"^a TIFF whose pages are no images of bands, all of one size$"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_so_many_bands_is_refused_in_words(what):
    data, channels, high, words = REFUSED[what]
    if data is None:
        file = io.BytesIO()
        with tifffile.TiffWriter(file) as writer:
            writer.write(bands(1, "uint16")[0])
            writer.write(bands(1, "uint16", height=10)[0])
        data = file.getvalue()
    with pytest.raises(UnreadableImage, match=words) as caught:
        decode(data, channels, high)
    assert "\n" not in str(caught.value)


def test_pictures_of_8_bits_are_none_of_16():
    for kind in ("JPEG", "PNG", "WEBP"):
        file = io.BytesIO()
        Image.effect_noise((30, 20), 50).convert("RGB").save(file, kind)
        with pytest.raises(
            UnreadableImage, match=rf"^a {kind} read with 8 bits a channel, where data\.max_value=65535"
        ):
            decode(file.getvalue(), 3, 65535)
        with pytest.raises(UnreadableImage, match=rf"^a {kind} is read as 1 .* not data\.channels=13$"):
            decode(file.getvalue(), 13)
    for channels, high in ((3, 65535), (13, 255), (13, 1)):
        with pytest.raises(UnreadableImage, match=r"^not an image \(none of .*NPY\)$"):
            decode(b"hello, world", channels, high)


class Payload:
    def __reduce__(self):
        return print, ("unpickled",)


def test_nothing_is_unpickled(capsys):
    data = npy(np.array([[Payload(), 1], [2, 3]], dtype=object), allow_pickle=True)
    with pytest.raises(UnreadableImage, match=r"^a \.npy of Python objects, which are not read$"):
        decode(data, 1, 1)
    assert "unpickled" not in capsys.readouterr().out


def test_a_header_that_promises_too_much_takes_no_memory():
    lying = io.BytesIO()
    shape = {"shape": (3, 9_999_999, 9_999), "fortran_order": False, "descr": "|u1"}
    np.lib.format.write_array_header_1_0(lying, shape)
    with pytest.raises(UnreadableImage, match=r"^truncated NPY$"):
        decode(lying.getvalue() + bytes(100), 3)
    data = bytearray(tiff(np.zeros((64, 64), np.float32)))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        places = [file.pages.first.tags[name].valueoffset for name in ("ImageWidth", "ImageLength")]
    for place in places:
        data[place : place + 4] = (60_000).to_bytes(4, "little")
    with pytest.raises(UnreadableImage, match="refused as a decompression bomb"):
        decode(bytes(data), 1, 1)


@pytest.mark.parametrize("data", [npy(bands(13, "uint16")), *(LAYOUTS[key](bands(13, "uint16")) for key in LAYOUTS)])
def test_a_file_cut_or_damaged_anywhere_is_an_error_or_whole(data):
    whole = decode(data, 13, 65535)
    refused = 0
    for length in (5, 20, 100, len(data) // 3, len(data) // 2, len(data) * 9 // 10, len(data) - 1):
        try:
            assert torch.equal(decode(data[:length], 13, 65535), whole)
        except UnreadableImage:
            refused += 1
    assert refused >= 6
    random = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(data)
        for position in random.integers(0, random.choice([60, 600, len(data)]), size=8):
            damaged[position] = random.integers(256)
        try:
            assert decode(bytes(damaged), 13, 65535).shape[0] == 13
        except UnreadableImage as error:
            assert str(error) and "\n" not in str(error)


def test_what_tifffile_needs_is_said(monkeypatch):
    data = LAYOUTS["interleaved"](bands(13, "uint16"))

    def without(name, *args, real=builtins.__import__, **options):
        if name == "tifffile":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnreadableImage, match=r"pip install 'simmim\[tiff\]'$"):
        decode(data, 13, 65535)


def test_arrays_are_images_where_nothing_else_is(tmp_path, caplog):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", bands(5, "uint16"))
    source = FolderSource(tmp_path, channels=5).in_units_of(65535)
    assert len(source) == 3
    assert same(source.load(1)[0], bands(5, "uint16"))
    assert source.subset([2]).load(0)[0].shape == (5, 20, 30)
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    assert [FolderSource(tmp_path).relative_name(0)] == ["photo.png"]
    assert "3 .npy files beside images are left out" in caplog.text


def test_archives_too(tmp_path):
    import tarfile

    def pack(name, files):
        with tarfile.open(tmp_path / name, "w") as archive:
            for member, data in files.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))

    pack("bands.tar", {"a.npy": npy(bands(5, "uint16")), "b.npy": npy(bands(5, "uint16") // 2)})
    source = TarSource(tmp_path / "bands.tar", channels=5).in_units_of(65535)
    assert same(source.load(1)[0], bands(5, "uint16") // 2)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    pack("pictures.tar", {"a.npy": npy(np.zeros(768)), "a.png": picture.getvalue(), "a.cls": b"0"})
    source = TarSource(tmp_path / "pictures.tar")
    assert [len(source), source.load(0)[0].shape] == [1, (3, 8, 8)]
