"""Exact statistics: against NumPy on all pixels at once, and the same to the last bit in any order."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.data.decoding import UnreadableImage
from simmim.data.folder import FolderSource
from simmim.data.moments import Moments, measure, moments_of

RANDOM = np.random.default_rng(0)
SIZES = [(7, 5), (64, 48), (1, 1), (33, 129), (20, 20), (5, 90)]


def images(kind, channels=3):
    """Of many sizes, each channel with a mean and deviation of its own."""
    found = []
    for number, size in enumerate(SIZES):
        shape, at = (channels, *size), 10.0 ** np.arange(channels)[:, None, None]
        if kind == "uint8":
            pixels = RANDOM.integers(0, 256, shape).astype(np.uint8)
        elif kind == "uint16":
            pixels = RANDOM.integers(0, 65536, shape).astype(np.float32)
        elif kind == "far from zero":
            pixels = (1e6 + RANDOM.normal(size=shape)).astype(np.float32)
        else:
            pixels = (at * (number + RANDOM.normal(size=shape))).astype(np.float32)
        found.append(torch.from_numpy(pixels))
    return found


def total(found, channels=3):
    return sum(map(moments_of, found), Moments(0, (0,) * channels, (0,) * channels))


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32", "far from zero"])
def test_they_are_numpys_of_all_pixels_together(kind):
    found = images(kind)
    pixels = np.concatenate([image.flatten(1).numpy() for image in found], axis=1).astype(np.float64)
    moments = total(found)
    assert moments.pixels == pixels.shape[1]
    assert np.allclose(moments.mean(1), pixels.mean(axis=1), rtol=1e-13, atol=0)
    assert np.allclose(moments.std(1), pixels.std(axis=1), rtol=1e-9 if kind == "far from zero" else 1e-13, atol=0)
    high = 255 if kind == "uint8" else 10000
    assert np.allclose(moments.mean(high), pixels.mean(axis=1) / high, rtol=1e-13, atol=0)
    assert np.allclose(moments.std(high), pixels.std(axis=1) / high, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_whole_numbers_are_summed_without_rounding(kind):
    found = images(kind)
    pixels = np.concatenate([image.flatten(1).numpy() for image in found], axis=1).astype(object)
    moments = total(found)
    for channel, values in enumerate(pixels.tolist()):
        values = list(map(int, values))
        mean = Fraction(sum(values), len(values))
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        assert moments.mean(1)[channel] == float(mean)
        assert moments.std(1)[channel] == float(variance) ** 0.5


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_no_order_changes_a_bit(kind):
    found = images(kind)
    expected = total(found)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(found))
        again = total([found[index] for index in order])
        assert (again.mean(10000), again.std(10000)) == (expected.mean(10000), expected.std(10000))
    halves = total(found[:2]) + total(found[2:])
    assert (halves.mean(1), halves.std(1)) == (expected.mean(1), expected.std(1))
    turned = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in found]  # another layout in memory
    assert (total(turned).mean(1), total(turned).std(1)) == (expected.mean(1), expected.std(1))


def test_large_images_do_not_overflow():
    image = torch.full((1, 3000, 3000), 65535.0)
    image[0, 0, 0] = 0
    count = 9_000_000
    moments = moments_of(image)
    assert moments.sums == ((count - 1) * 65535,)
    assert moments.squares == ((count - 1) * 65535**2,)


def test_a_constant_has_no_deviation():
    assert total([torch.full((1, 9, 9), 0.1)] * 3, 1).std(1) == [0.0]


def test_no_number_of_processes_changes_a_bit(tmp_path, shared_data):
    for number, path in enumerate(sorted((shared_data / "imagenet-samples").iterdir())[:40:2]):
        image = Image.open(path).convert("RGB")
        image.resize((40 + number, 50)).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    source = FolderSource(tmp_path)
    results = []
    for workers in (0, 1, 2):
        samples = list(measure(source, num_workers=workers, timeout=60))
        assert [index for index, _, _ in samples] == list(range(21))
        assert [reason for _, moments, reason in samples if moments is None] == [samples[-1][2]]
        results.append(sum((moments for _, moments, _ in samples if moments), Moments(0, (0,) * 3, (0,) * 3)))
    assert results[0] == results[1] == results[2]
    pixels = np.concatenate([np.asarray(Image.open(path)).reshape(-1, 3) for path in tmp_path.glob("[0-9]*")])
    assert np.allclose(results[0].mean(255), pixels.mean(axis=0) / 255, rtol=1e-12, atol=0)
    with pytest.raises(UnreadableImage):
        source.load(20)
