"""Dead-leaves images: something to learn from without a file.

Textured shapes with a power-law distribution of sizes fall on one another. Such pictures share much of the
statistics of natural images (Lee, Mumford & Huang, "Occlusion models for natural images", 2001), and networks
learn useful features from them (Baradad et al., "Learning to see by looking at noise", 2021).

Pictures are the same on every platform: the random numbers are raw bits of a generator whose stream NumPy
guarantees, and the arithmetic on pixels is limited to what IEEE 754 rounds exactly (+ - * / and square root;
sines come from a rounded table).

Shape letters: C channels, H x W the picture, h x w the box around a leaf, N leaves.
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SHAPES = ("disc", "square", "triangle", "cross", "crescent")
TEXTURES = ("striped", "mottled")
HUES = ("red", "purple", "blue", "cyan", "green", "yellow")

_LEAVES = 12
_RADIUS = (0.22, 0.9)  # smallest and largest leaf, as fractions of the picture's side
_GRAIN_SHIFTS = 64  # px, how far the mottled texture is moved from leaf to leaf

_Array = NDArray[np.float32]
_SINE = (np.round(np.sin(np.arange(1024) * (2 * np.pi / 1024)) * 2**14) / 2**14).astype(np.float32)


class SyntheticSource:
    """Dead-leaves pictures, each one a function of the seed and its index.

    All leaves of a picture have one shape and one kind of texture. Its class is the hue of its palette, in sixths of
    the colour circle: a network can learn it in a minute, and never quite, since a third of the leaves have the
    opposite hue.

    Args:
        size: Number of pictures.
        image_size: Height and width in pixels.
        channels: Any number; neighbouring channels are correlated, as in a spectrum.
        seed: Not negative; another seed gives other pictures.

    Attributes:
        classes: Names of the classes: hues, as three channels show them.

    Raises:
        ValueError: If `size`, `channels` or a side is not positive, or `seed` is negative.
    """

    def __init__(self, size: int, image_size: tuple[int, int], *, channels: int = 3, seed: int = 0) -> None:
        if min(size, channels, *image_size) < 1 or seed < 0:
            raise ValueError(
                f"synthetic images: size={size}, image_size={tuple(image_size)} and channels={channels} "
                f"must be positive, and seed={seed} not negative"
            )
        self.size = size
        self.image_size = image_size
        self.channels = channels
        self.seed = seed
        self.classes = list(HUES)

    def __len__(self) -> int:
        """Number of pictures."""
        return self.size

    def load(self, index: int) -> tuple[Tensor, int]:
        """Draw one picture.

        Returns:
            uint8 tensor (C, H, W), and its label: an index into `classes`.

        Raises:
            IndexError: If `index` is not in 0..size - 1.
        """
        uniform = self._uniform(index, 6 + 12 * _LEAVES)
        shape, texture = divmod(int(uniform[0] * len(SHAPES) * len(TEXTURES)), len(TEXTURES))
        picture = _draw(uniform[1:], SHAPES[shape], TEXTURES[texture], self.image_size, self.channels)
        return torch.from_numpy(picture), self.label(index)

    def label(self, index: int) -> int:
        """The label alone, without the picture."""
        return int(self._uniform(index, 2)[1] * len(HUES))

    def _uniform(self, index: int, count: int) -> _Array:
        """The first random numbers of a picture, in [0, 1)."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not one of the {self.size} synthetic images")
        raw = np.random.PCG64(np.random.SeedSequence((self.seed, index))).random_raw(count)
        return (raw >> np.uint64(40)).astype(np.float32) / np.float32(2**24)

    def name(self, index: int) -> str:
        """What the picture is called in messages."""
        return f"synthetic/{index:06d}"


def _draw(uniform: _Array, shape: str, texture: str, image_size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    """Draw a picture (C, H, W) from uniform random numbers, back to front."""
    height, width = image_size
    side = float(np.sqrt(height * width))  # px
    hue, light, saturation, fade_y, fade_x = uniform[:5]
    leaves = uniform[5:].reshape(12, _LEAVES)
    # Leaves have about the picture's hue, or the one opposite: a palette, not a rainbow.
    hues = hue + np.float32(0.2) * leaves[1] + np.float32(0.5) * (leaves[2] < 0.3)
    colours = _colours(hues, np.float32(0.1) + np.float32(0.8) * leaves[3], leaves[4], channels)
    sky = _colours(hue + np.float32(0.3), np.float32(0.3) + np.float32(0.5) * light, saturation, channels)
    rows = np.arange(height, dtype=np.float32)[:, None]
    columns = np.arange(width, dtype=np.float32)[None, :]
    fade = rows * ((fade_y - np.float32(0.5)) / height) + columns * ((fade_x - np.float32(0.5)) / width)
    canvas = sky[:, :, None] * (fade + np.float32(1))  # (C, H, W)
    geometry = zip(
        (leaves[5] * np.float32(height)).tolist(),
        (leaves[6] * np.float32(width)).tolist(),
        (_power_law(leaves[0]) * np.float32(side)).tolist(),
        _sine(leaves[7]).tolist(),
        _sine(leaves[7] + np.float32(0.25)).tolist(),
        (np.float32(1) + np.float32(0.7) * leaves[8]).tolist(),
        strict=True,
    )
    surfaces = leaves[9:].T.tolist()
    for place, surface, colour in zip(geometry, surfaces, colours.T, strict=True):
        y, x, radius, sin, cos, flatness = place
        top, bottom = max(0, int(y - radius)), min(height, int(y + radius) + 2)
        left, right = max(0, int(x - radius)), min(width, int(x + radius) + 2)
        dy, dx = (rows[top:bottom] - y) / radius, (columns[:, left:right] - x) / radius
        along = dx * cos + dy * sin  # (h, w), 1 at the tip
        across = dy * (cos * flatness) - dx * (sin * flatness)
        cover = _extent(shape, along, across)
        cover -= 1
        cover *= -radius
        cover = np.minimum(np.maximum(cover, 0, out=cover), 1, out=cover)  # an edge one pixel wide
        box = canvas[:, top:bottom, left:right]
        change = colour[:, None, None] * _tone(texture, along, across, surface, int(side))  # (C, h, w)
        change -= box
        change *= cover
        box += change
    picture: NDArray[np.uint8] = (np.minimum(np.maximum(canvas, 0), 1) * np.float32(255)).astype(np.uint8)
    return picture


def _tone(texture: str, along: _Array, across: _Array, surface: list[float], side: int) -> _Array:
    """Brightness (h, w) of a leaf's points around 1: texture, and a shade from one end to the other."""
    shade, contrast, phase = surface
    height, width = along.shape
    pattern = _stripes(across, phase) if texture == "striped" else _grain_at(phase, side)[:height, :width]
    depth = 0.1 + 0.4 * contrast
    tone = pattern * np.float32(depth)
    tone += along * ((shade - 0.5) * 0.5)
    tone += 1 - depth / 2
    return tone


def _extent(shape: str, u: _Array, v: _Array) -> _Array:
    """How far out each point lies: below 1 inside the leaf, which fills a circle of radius 1."""
    extent: _Array
    if shape == "disc":
        extent = np.sqrt(u * u + v * v)
    elif shape == "square":
        extent = np.maximum(np.abs(u), np.abs(v)) * np.float32(1.42)
    elif shape == "triangle":
        extent = np.maximum(u * np.float32(-2), u + np.abs(v) * np.float32(1.732))
    elif shape == "cross":
        u, v = np.abs(u), np.abs(v)
        extent = np.maximum(np.maximum(u, v) * np.float32(1.06), np.minimum(u, v) * np.float32(3.2))
    else:  # crescent: a disc without another one beside it
        bite = u - np.float32(0.55)
        extent = np.maximum(np.sqrt(u * u + v * v), np.float32(1.8) - np.sqrt(bite * bite + v * v))
    return extent


def _stripes(v: _Array, phase: float) -> _Array:
    """Waves across the leaf, triangular, in 0..1."""
    wave = v * np.float32(1.5 + 2.5 * phase)
    wave += 16 + 7 * phase
    wave -= np.floor(wave)
    wave -= 0.5
    np.abs(wave, out=wave)
    wave *= 2
    return wave


def _grain_at(phase: float, side: int) -> _Array:
    """A part of the grain that depends on the leaf's phase."""
    shift_y, shift_x = divmod(int(phase * _GRAIN_SHIFTS**2), _GRAIN_SHIFTS)
    return _grain(side)[shift_y:, shift_x:]


@cache
def _grain(side: int) -> _Array:
    """Three octaves of smooth noise in 0..1, large enough for the largest leaf, shifted."""
    span = int(2 * _RADIUS[1] * side) + _GRAIN_SHIFTS + 4
    bits = np.random.PCG64(0)
    total = np.zeros((span, span), np.int64)
    for octave in range(3):
        cell = max(1, side // (12 << octave))  # px
        count = span // cell + 2
        grid = (bits.random_raw(count * count) >> np.uint64(56)).astype(np.int64).reshape(count, count)
        for axis in (0, 1):  # linear interpolation: repeat, then a moving sum; in integers, so exactly
            grid = np.cumsum(np.repeat(grid, cell, axis), axis).swapaxes(0, axis)
            grid = (grid[cell:] - grid[:-cell]).swapaxes(0, axis)
        total += grid[:span, :span] * (4 >> octave) * 1024 // cell**2
    total -= total.min()
    return np.asarray(total / total.max(), dtype=np.float32)


def _power_law(uniform: _Array) -> _Array:
    """Radii with a density proportional to r**-3, which makes the picture look alike at every scale."""
    smallest, largest = (np.float32(radius**-2) for radius in _RADIUS)
    return np.asarray(1 / np.sqrt(smallest + (largest - smallest) * uniform))


def _colours(hue: _Array, light: _Array, saturation: _Array, channels: int) -> _Array:
    """Colours (C, N): a sine over the channels, so that any number of them works and neighbours are alike."""
    channel = np.arange(channels, dtype=np.float32)[:, None] / np.float32(max(channels, 3))
    swing = np.float32(0.04) + np.float32(0.22) * saturation
    return np.asarray(light + swing * _sine(hue + channel), dtype=np.float32)


def _sine(turns: _Array) -> _Array:
    """Sine of an angle in turns."""
    return np.asarray(_SINE[(turns * np.float32(1024)).astype(np.int64) & 1023])
