"""The geometry of windows against cutting, rolling and padding spelt out."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.encoders.windows import PADDING, Windows, merge, places, regions, reorder

CPU = torch.device("cpu")
SHAPES = [
    Windows((8, 8), (4, 4)),
    Windows((8, 8), (4, 4), (2, 2)),
    Windows((6, 12), (6, 4), (0, 2)),
    Windows((12, 6), (5, 6), (2, 0)),
    Windows((10, 13), (4, 4), (2, 2)),
    Windows((10, 13), (4, 3), (1, 0)),
    Windows((5, 7), (5, 7)),
]


def spelt_out(x: Tensor, shape: Windows) -> Tensor:
    """(B, H, W, C) padded, rolled and cut: (B, N, T, C), with zeros for padding."""
    (height, width), (h, w) = shape.size, shape.window
    x = F.pad(x, (0, 0, 0, -width % w, 0, -height % h)).roll((-shape.shift[0], -shape.shift[1]), dims=(1, 2))
    windows = [part for band in x.split(h, dim=1) for part in band.split(w, dim=2)]
    return torch.stack([window.flatten(1, 2) for window in windows], dim=1)


def dealt(x: Tensor, shape: Windows) -> Tensor:
    return reorder(x.flatten(1, 2).unsqueeze(1), Windows.whole(shape.size), shape)


def map_of(shape: Windows) -> Tensor:
    return 1 + torch.rand(2, *shape.size, 3, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_windows_hold_what_cutting_and_rolling_gives(shape: Windows) -> None:
    x = map_of(shape)
    expected, found = spelt_out(x, shape), dealt(x, shape)
    assert found.shape == (2, *shape.shape, 3)
    assert torch.equal(found.where(expected > 0, 0), expected)
    padding = places(shape, CPU).view(shape.shape) >= shape.size[0] * shape.size[1]
    assert torch.equal(padding, expected[0, :, :, 0] == 0)


def test_from_windows_to_windows_and_back() -> None:
    x = map_of(SHAPES[4])
    moved = dealt(x, SHAPES[4])
    for source, target in pairwise([SHAPES[4], SHAPES[5], SHAPES[4], Windows.whole((10, 13))]):
        moved = reorder(moved, source, target)
    assert torch.equal(moved.view_as(x), x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_a_move(shape: Windows) -> None:
    """As of plain indexing, with what stands in the padding left out."""
    x = map_of(shape).requires_grad_()
    weight = torch.rand(2, *shape.shape, 3, dtype=torch.float64)
    real = (spelt_out(x.detach(), shape) > 0).double()
    (dealt(x, shape) * weight * real).sum().backward()
    expected = torch.autograd.grad((spelt_out(x, shape) * weight).sum(), x)[0]
    assert torch.equal(x.grad, expected)


def test_padding_gets_no_gradient() -> None:
    shape = SHAPES[4]
    x = torch.rand(2, *shape.shape, 3, requires_grad=True)
    reorder(x, shape, Windows.whole(shape.size)).sum().backward()
    padding = places(shape, CPU).view(shape.shape) >= shape.size[0] * shape.size[1]
    assert torch.equal(x.grad[0, :, :, 0], (~padding).float())


@pytest.mark.parametrize("shift", [(0, 0), (2, 2)])
def test_merging_joins_four_neighbours(shift: tuple[int, int]) -> None:
    source, target = Windows((20, 28), (4, 4), shift), Windows((10, 14), (4, 4))
    x = map_of(source).requires_grad_()
    joined = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
    expected = spelt_out(joined, target)
    found = merge(dealt(x, source), source, target)
    real = expected > 0
    assert torch.equal(found.where(real, 0), expected)
    weight = torch.rand_like(expected) * real
    assert torch.equal(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, expected)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_of_a_region_were_neighbours_before_the_shift(shape: Windows) -> None:
    """Two tokens of one window see one another if they lie within a window of one another on the map itself."""
    found, place = regions(shape, CPU), places(shape, CPU).view(shape.shape)
    padding = place >= shape.size[0] * shape.size[1]
    row, column = torch.div(place, shape.size[1], rounding_mode="floor"), place % shape.size[1]
    near = [
        (at[:, :, None] - at[:, None, :]).abs() < side
        for at, side in ((row, shape.window[0]), (column, shape.window[1]))
    ]
    real = ~padding[:, :, None] & ~padding[:, None, :]
    if found is None:
        assert bool((near[0] & near[1]).all()) and not padding.any()
    else:
        same = found[:, :, None] == found[:, None, :]
        assert torch.equal(same[real], (near[0] & near[1])[real])
        assert torch.equal(found == PADDING, padding)


def test_windows_fit_the_map() -> None:
    assert Windows.fit((48, 48), 12, shifted=True) == Windows((48, 48), (12, 12), (6, 6))
    assert Windows.fit((6, 24), 12, shifted=True) == Windows((6, 24), (6, 12), (0, 6))
    assert Windows.fit((6, 24), 12) == Windows((6, 24), (6, 12))
