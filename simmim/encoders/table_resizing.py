"""Tables of relative positions, brought to another window: a table knows no other offsets than it was trained with.

Shape letters: h, w window in tokens; n heads. A table (n, 2h - 1, 2w - 1) holds the bias of each offset between two
tokens, the most negative first, and that of no offset in its middle.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.encoders.windows import Window

BISECTIONS = 100
"""More than a double has digits."""


def move_table(table: Tensor, trained_window: Window, window: Window, *, window_size: int, resizing: str) -> Tensor:
    """Brings what a window was trained with to another window, in a table with room for a third.

    The offsets of the new window come to lie in the middle of the new table; those beyond take the nearest one's value.

    Args:
        table: (n, 2s - 1, 2s - 1), s at least the trained window's sides.
        trained_window: Height and width in tokens of the window that the table was trained with.
        window: Those of the window that it is going to serve.
        window_size: Side in tokens of the window that the new table has room for.
        resizing: A key of `RESIZINGS`.

    Returns:
        (n, 2 * window_size - 1, 2 * window_size - 1); the table itself where nothing changes.
    """
    side = 2 * window_size - 1
    if trained_window == window and table.shape[-1] == side:
        return table
    middle = resize_table(middle_of(table, trained_window), window, resizing=resizing)
    rows, columns = ((side - length) // 2 for length in middle.shape[1:])
    return F.pad(middle[None], (columns, columns, rows, rows), mode="replicate")[0]


def resize_table(table: Tensor, window: Window, *, resizing: str) -> Tensor:
    """A table of exactly one window for another one.

    Args:
        table: Float (n, 2h - 1, 2w - 1), of any window (h, w).
        window: Height and width in tokens of the window that it is going to serve.
        resizing: A key of `RESIZINGS`.

    Returns:
        (n, 2 * window[0] - 1, 2 * window[1] - 1); the table itself where nothing changes.
    """
    extent = extent_of(window)
    return table if table.shape[1:] == extent else RESIZINGS[resizing](table, extent)


def extent_of(window: Window) -> tuple[int, int]:
    """Offsets along each axis of a window."""
    return 2 * window[0] - 1, 2 * window[1] - 1


def middle_of(table: Tensor, window: Window) -> Tensor:
    """The offsets of a smaller window, or of the same: (n, H, W) -> (n, 2h - 1, 2w - 1)."""
    extent = extent_of(window)
    top, left = ((length - part) // 2 for length, part in zip(table.shape[1:], extent, strict=True))
    return table[:, top : top + extent[0], left : left + extent[1]]


def _bicubic(table: Tensor, extent: tuple[int, int]) -> Tensor:
    """All offsets stretched alike, and the pixels between them by bicubic interpolation."""
    return F.interpolate(table[None], extent, mode="bicubic", align_corners=False)[0]


def _geometric(table: Tensor, extent: tuple[int, int]) -> Tensor:
    """Near offsets stay where they are, far ones are stretched more and more, and a cubic spline runs through them.

    On each axis the trained offsets 1, 2, 3, … are placed at the distances 1, 1 + q, 1 + q + q², …, the last one at
    the last offset of the new window. A smaller window takes its own offsets as they are.
    """
    down, across = (_spline_between(old, new, table) for old, new in zip(table.shape[1:], extent, strict=True))
    return (down @ table.double() @ across.t()).to(table.dtype)


RESIZINGS: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {"geometric": _geometric, "bicubic": _bicubic}
"""How a table comes to another window: as SimMIM fine-tunes Swin V1 and ViT (its released code, after BEiT's), or as
Swin Transformer V2 moves the table that it compares its continuous biases to (arXiv 2111.09883, table 1)."""


def _spline_between(old: int, new: int, like: Tensor) -> Tensor:
    """(new, old): what each of so many new offsets takes of the values at the old ones."""
    distances = torch.tensor(progression(old // 2, new // 2), dtype=torch.float64)
    places = torch.cat([-distances.flip(0), distances.new_zeros(1), distances])
    wanted = torch.arange(-(new // 2), new // 2 + 1, dtype=torch.float64).clamp(places[0], places[-1])
    return cubic_spline(places, wanted).to(like.device)


def progression(count: int, reach: float) -> list[float]:
    """Distances 1, 1 + q, 1 + q + q², …, so many, the last of which is the reach.

    q is at least 1: where the reach is shorter, the distances are 1, 2, 3, …; and a single one is 1 in any case.
    """
    low, high = 1.0, max(1.0, float(reach))
    for _ in range(BISECTIONS):
        q = (low + high) / 2
        low, high = (low, q) if sum(q**power for power in range(count)) > reach else (q, high)
    return [sum(low**power for power in range(length)) for length in range(1, count + 1)]


def cubic_spline(places: Tensor, wanted: Tensor) -> Tensor:
    """The interpolating cubic spline without a knot at the second and the last place but one, as a matrix.

    Args:
        places: (m), ascending, where values are known; of fewer than four places the parabola, or the constant.
        wanted: (k), from the first place to the last.

    Returns:
        (k, m): times the values at the places, those at what is wanted.
    """
    degree = min(3, len(places) - 1)
    knots = torch.cat([places[:1].repeat(degree + 1), places[2:-2], places[-1:].repeat(degree + 1)])
    matrix: Tensor = torch.linalg.solve(
        _b_splines(knots, degree, places), _b_splines(knots, degree, wanted), left=False
    )
    return matrix


def _b_splines(knots: Tensor, degree: int, at: Tensor) -> Tensor:
    """Values of all B-splines, by the recursion of de Boor: (k) -> (k, len(knots) - degree - 1)."""
    between = torch.searchsorted(knots, at, right=True).clamp(max=len(knots) - degree - 1) - 1
    values = F.one_hot(between, len(knots) - 1).to(at.dtype)
    x = at[:, None]
    for order in range(1, degree + 1):
        spans = knots[order:] - knots[:-order]
        shares = ((x - knots[:-order]) / spans).nan_to_num(0, 0, 0)
        values = shares[:, :-1] * values[:, :-1] + (1 - shares[:, 1:]) * values[:, 1:]
    return values
