"""The geometry of (shifted) windows (Swin Transformer, arXiv 2103.14030, section 3.2; V2, arXiv 2111.09883).

A token map lies in memory window by window, in the order in which the next block reads it: between two blocks
one gather takes the place of cutting, rolling and putting together. Nothing here has a parameter, and nothing is
stored in a checkpoint. Shape letters: B images; H, W height and width of a token map; C channels; h, w a window's
height and width in tokens; T = h * w; N windows an image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
R = TypeVar("R")

Window = tuple[int, int]
"""Height and width of a window in tokens."""

PADDING = -1
"""The region of tokens that fill up the last windows of a map."""

CROSS_REGION = -100.0
"""What is added to the logit of a query and a key that the cyclic shift alone made neighbours. Not minus
infinity: with a scale of up to 100 and a bias of up to 16, released models see through it a little."""

UNREACHABLE = -1e5
"""What is added where one of the two is padding: its exponential is zero."""


def kept(maxsize: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keeps what a function of hashable values returns, so many of them: plain tensors, whoever asks first.

    A kept inference tensor could not serve training later, nor one without values, of a run that only counts.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @lru_cache(maxsize)
        @wraps(function)
        @torch.inference_mode(False)
        def plain(*args: P.args, **kwargs: P.kwargs) -> R:
            with _disable_current_modes():
                return function(*args, **kwargs)

        return plain  # type: ignore[return-value]

    return decorate


@dataclass(frozen=True)
class Windows:
    """How the tokens of a map are dealt to windows.

    Where whole windows do not tile the map, it is filled up below and on the right; where a shift is given, the
    filled map is rolled up and left by it first. A map row by row is one window of its own size.

    Args:
        size: Height and width of the map in tokens.
        window: Height and width of a window in tokens.
        shift: Rows and columns of the shift.
    """

    size: tuple[int, int]
    window: Window
    shift: tuple[int, int] = (0, 0)

    @classmethod
    def fit(cls, size: tuple[int, int], window_size: int, *, shifted: bool = False) -> "Windows":
        """The windows of a block: along an axis not larger than the window, it shrinks to the map and stays put."""
        window = (min(size[0], window_size), min(size[1], window_size))
        shift = [window_size // 2 if shifted and length > window_size else 0 for length in size]
        return cls(size, window, (shift[0], shift[1]))

    @classmethod
    def whole(cls, size: tuple[int, int]) -> "Windows":
        """The map row by row."""
        return cls(size, size)

    @property
    def grid(self) -> tuple[int, int]:
        """Windows down and across."""
        return math.ceil(self.size[0] / self.window[0]), math.ceil(self.size[1] / self.window[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(N, T)."""
        return math.prod(self.grid), math.prod(self.window)


class Geometry(NamedTuple):
    """What attention has to know of the windows of a block."""

    window: Window
    offsets: Tensor
    """Between two tokens of a window: see `simmim.encoders.position_bias.OFFSETS`."""
    regions: Tensor | None
    """Which tokens see one another: see `regions`."""


def reorder(x: Tensor, source: Windows, target: Windows) -> Tensor:
    """Deals a map's tokens to other windows: (B, N, T, C) -> (B, N', T', C).

    Padding takes the place of some token and is never read: see `regions`.
    """
    if source == target:
        return x
    moved: Tensor = _Gather.apply(x.flatten(1, 2), *_exchange(source, target, 1, x.device))
    return moved.view(x.shape[0], *target.shape, -1)


def merge(x: Tensor, source: Windows, target: Windows) -> Tensor:
    """Joins four neighbours to a token of half the map: (B, N, T, C) -> (B, N', T', 4C).

    Neighbours go down the columns first: even row and even column, odd and even, even and odd, odd and odd.
    """
    moved: Tensor = _Gather.apply(x.flatten(1, 2), *_exchange(source, target, 2, x.device))
    return moved.view(x.shape[0], *target.shape, 4 * x.shape[3])


@kept(maxsize=64)
def places(windows: Windows, device: torch.device) -> Tensor:
    """Where on the map each token of the windows lies, counted row by row; H * W or more is padding.

    Returns:
        Integer (N * T,), a permutation of 0 to N * T - 1.
    """
    return _places(windows).to(device)


@kept(maxsize=64)
def regions(windows: Windows, device: torch.device) -> Tensor | None:
    """Which tokens of a window may see one another: those of one region, neighbours before any shift.

    Returns:
        Integer (N, T), `PADDING` or 0 to 3; None where every window is one region.
    """
    (height, width), (_, columns) = windows.size, windows.grid
    if windows.shift == (0, 0) and math.prod(windows.shape) == height * width:
        return None
    place = _places(windows).view(windows.shape)
    y, x = torch.div(place, width, rounding_mode="floor"), place % width
    region = torch.zeros_like(place)
    if windows.shift[0]:  # windows of the last row hold what was rolled out at the top: another region
        region[-columns:] += (y[-columns:] < windows.shift[0]).long()
    if windows.shift[1]:
        region[columns - 1 :: columns] += 2 * (x[columns - 1 :: columns] < windows.shift[1]).long()
    return region.masked_fill(place >= height * width, PADDING).to(device)


@kept(maxsize=8)
def penalties(device: torch.device) -> Tensor:
    """What is added to the logit of a query and a key, by the regions of both (padding first): (5, 5)."""
    costs = CROSS_REGION * (1 - torch.eye(5))
    costs[0, 1:] = costs[1:, 0] = UNREACHABLE
    return costs.to(device)


def _places(windows: Windows) -> Tensor:
    (height, width), (h, w), (rows, columns) = windows.size, windows.window, windows.grid
    y, x = torch.arange(rows * h)[:, None], torch.arange(columns * w)
    place = y * width + x  # (rows * h, columns * w)
    filled = (y >= height) | (x >= width)
    place[filled] = torch.arange(height * width, place.numel())
    place = place.roll((-windows.shift[0], -windows.shift[1]), dims=(0, 1))
    return place.view(rows, h, columns, w).transpose(1, 2).flatten()


@kept(maxsize=128)
def _exchange(source: Windows, target: Windows, factor: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens of source each token of target is made of, where each one went, and which ones are padding.

    Args:
        source: Windows that the tokens lie in.
        target: Windows that they go to.
        factor: Side of the square of the source's map that is one token of the target's.
        device: Where to.

    Returns:
        Integer (N' * T' * factor**2,), (N * T,) and (padding of the source,).
    """
    place = _places(target)
    y, x = torch.div(place, target.size[1], rounding_mode="floor"), place % target.size[1]
    right, down = torch.cartesian_prod(torch.arange(factor), torch.arange(factor)).unbind(1)
    at = (factor * y[:, None] + down) * source.size[1] + factor * x[:, None] + right  # (N' * T', factor**2)
    real = (place < math.prod(target.size)).repeat_interleave(factor**2)
    slot = _places(source).argsort()  # of each place of the source's map
    forth = slot[at.flatten().where(real, 0)]
    back = torch.zeros_like(slot)
    back[forth[real]] = torch.arange(len(forth))[real]
    return forth.to(device), back.to(device), slot[math.prod(source.size) :].to(device)


class _Gather(torch.autograd.Function):
    """Rows in another order: (B, L, C) -> (B, L', C). The gradient is a gather too, for each row counts once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forth: Tensor, back: Tensor, padding: Tensor) -> Tensor:
        ctx.save_for_backward(back, padding)
        return x.index_select(1, forth)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        back, padding = ctx.saved_tensors
        return gradient.index_select(1, back).index_fill_(1, padding, 0), None, None, None
