"""Mean and deviation of the pixels of many images: each pixel counts alike, and sums are exact.

So neither the order of the images nor the number of processes changes a bit of the result. Whole numbers are summed as
such. Of other images mean and squared deviations from it are computed in float64, image by image, and these are
combined as fractions (Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances", 1979, without their rounding).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from simmim.data.decoding import UnreadableImage
from simmim.data.loader import Notes, WatchedLoader, end_with_the_command
from simmim.data.module import ImageSource

LARGEST = 65535
"""Whole numbers up to it are summed in 64 bits, squared too, over as many pixels as an image may have."""

BATCH = 16
"""Images that a process hands over together."""

Exact = int | Fraction
Sample = tuple[int, "Moments | None", str]
"""Position of an image, its moments, and \"\"; or, where it cannot be read, None and the reason."""


@dataclass(frozen=True)
class Moments:
    """Exact sums over pixels.

    Args:
        pixels: How many.
        sums: Of each channel.
        squares: Sum of the squares of each channel.
    """

    pixels: int
    sums: tuple[Exact, ...]
    squares: tuple[Exact, ...]

    def __add__(self, other: "Moments") -> "Moments":
        """Of the pixels of both."""
        sums = tuple(a + b for a, b in zip(self.sums, other.sums, strict=True))
        squares = tuple(a + b for a, b in zip(self.squares, other.squares, strict=True))
        return Moments(self.pixels + other.pixels, sums, squares)

    def mean(self, max_value: float) -> list[float]:
        """Of each channel, in units of `max_value`, rounded once."""
        return [float(Fraction(total) / self.pixels / Fraction(max_value)) for total in self.sums]

    def std(self, max_value: float) -> list[float]:
        """Standard deviation of each channel, likewise."""
        pairs = zip(self.sums, self.squares, strict=True)
        variances = (Fraction(square) / self.pixels - (Fraction(total) / self.pixels) ** 2 for total, square in pairs)
        return [math.sqrt(variance / Fraction(max_value) ** 2) for variance in variances]


def moments_of(image: Tensor) -> Moments:
    """Of one image (C, H, W), uint8 or float32 without NaN and infinities."""
    sums, squares = zip(*map(_channel, image), strict=True)
    return Moments(image[0].numel(), sums, squares)


def _channel(channel: Tensor) -> tuple[Exact, Exact]:
    """Sum and sum of squares of (H, W)."""
    pixels = np.ascontiguousarray(channel.numpy())
    if pixels.dtype == np.uint8 or (np.abs(pixels).max() <= LARGEST and np.array_equal(pixels, np.rint(pixels))):
        whole = pixels.astype(np.int64).ravel()
        return int(whole.sum()), int(whole @ whole)
    values = pixels.astype(np.float64)
    mean = float(values.mean())
    deviations = Fraction(float(np.square(values - mean).sum()))
    return values.size * Fraction(mean), deviations + values.size * Fraction(mean) ** 2


@dataclass(frozen=True)
class Measured(Dataset[Sample]):
    """The moments of the images of a source."""

    source: ImageSource
    notes: Notes

    def __getitem__(self, index: int) -> Sample:
        """Reads and measures an image."""
        self.notes.write(index)
        try:
            return index, moments_of(self.source.load(index)[0]), ""
        except UnreadableImage as error:
            return index, None, str(error)


def measure(source: ImageSource, *, num_workers: int, timeout: float) -> Iterator[Sample]:
    """The moments of every image, in the order of the source.

    Args:
        source: Where the images are.
        num_workers: Processes that read; 0 reads in this one.
        timeout: Seconds that a batch of theirs may take.
    """
    notes = Notes(num_workers)
    batches: Sequence[range] = [range(at, min(at + BATCH, len(source))) for at in range(0, len(source), BATCH)]
    loader = WatchedLoader(
        Measured(source, notes),
        notes=notes,
        name=source.name,
        timeout=timeout,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=end_with_the_command,
    )
    for samples in loader:
        yield from samples
