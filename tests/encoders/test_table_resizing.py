"""Tables of offsets come to another window as BEiT's code brings them, or as V2's study does."""

import math
from typing import Any

import pytest
import timm.layers.pos_embed_rel as timm_tables
import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.encoders.position_bias import PositionBiasTable, linear_spaced_offsets
from simmim.encoders.table_resizing import RESIZINGS, move_table, progression, resize_table

HEADS = 3
CPU = torch.device("cpu")


def table_of(height: int, width: int | None = None) -> Tensor:
    shape = (HEADS, 2 * height - 1, 2 * (width or height) - 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(height))


def of_beit(table: Tensor, window: tuple[int, int], old: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """By timm's copy of BEiT's code, which asks SciPy for a function that newer ones call by another name."""
    interpolate = pytest.importorskip("scipy.interpolate")

    def interp2d(x: Any, y: Any, values: Any, *, kind: str) -> Any:
        assert kind == "cubic"
        return lambda at_x, at_y: interpolate.RectBivariateSpline(y, x, values)(at_y, at_x)

    monkeypatch.setattr(timm_tables, "_USE_SCIPY", True)
    monkeypatch.setattr(interpolate, "interp2d", interp2d, raising=False)
    shape = (len(table), 2 * window[0] - 1, 2 * window[1] - 1)
    return timm_tables.resize_rel_pos_bias_table(table, window, shape, old)


@pytest.mark.parametrize(
    ("before", "after"),
    [((6, 6), (7, 7)), ((12, 12), (14, 14)), ((14, 14), (24, 24)), ((5, 5), (6, 8)), ((24, 24), (48, 48))],
)
def test_geometric_is_beits(before: tuple[int, int], after: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """SimMIM's moves of Swin-B, Swin-L and ViT among them."""
    found = resize_table(table_of(*before), after, resizing="geometric")
    expected = of_beit(table_of(*before), after, before, monkeypatch)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)  # its search for q ends at 1e-6


def test_each_distance_of_the_progression_is_longer_by_the_same_factor() -> None:
    distances = torch.tensor([0, *progression(11, 23)], dtype=torch.float64)
    steps = distances.diff()
    assert steps[0] == 1 and float(distances[-1]) == pytest.approx(23, abs=1e-9)
    torch.testing.assert_close(steps[1:] / steps[:-1], torch.full((10,), float(steps[1]), dtype=torch.float64))
    assert progression(5, 3) == [1, 2, 3, 4, 5]
    assert progression(3, 1 + 2 + 4) == pytest.approx([1, 3, 7])


def test_geometric_meets_what_was_trained_where_it_was_placed() -> None:
    """With q = 2, the offsets 1, 2 and 3 come to lie at 1, 3 and 7; a ramp over these places stays a ramp."""
    table, places = table_of(4), [-7, -3, -1, 0, 1, 3, 7]
    moved = resize_table(table, (8, 8), resizing="geometric")
    at = [7 + place for place in places]
    torch.testing.assert_close(moved[:, at][:, :, at], table, atol=1e-6, rtol=0)
    ramp = torch.tensor(places).float()[None, :, None] + torch.zeros(1, 1, 7)
    expected = torch.arange(-7.0, 8)[None, :, None].expand(1, 15, 15)
    torch.testing.assert_close(resize_table(ramp, (8, 8), resizing="geometric"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("resizing", RESIZINGS)
def test_what_both_ways_keep(resizing: str) -> None:
    table = table_of(6)
    assert resize_table(table, (6, 6), resizing=resizing) is table
    mirrored = table + table.flip(1) + table.flip(2) + table.flip(1, 2)
    for window in ((9, 9), (4, 11), (1, 1)):
        moved = resize_table(mirrored, window, resizing=resizing)
        assert moved.shape == (HEADS, 2 * window[0] - 1, 2 * window[1] - 1)
        torch.testing.assert_close(moved, moved.flip(1, 2), atol=1e-5, rtol=0)
        same = resize_table(torch.full((1, 11, 11), 0.7), window, resizing=resizing)
        torch.testing.assert_close(same, torch.full_like(same, 0.7))
        turned = resize_table(table.mT, (window[1], window[0]), resizing=resizing)
        torch.testing.assert_close(turned.mT, resize_table(table, window, resizing=resizing), atol=1e-5, rtol=0)


def test_geometric_keeps_the_offsets_of_a_smaller_window_and_the_shortest_ones() -> None:
    table = table_of(6)
    smaller, larger = (resize_table(table, (side, side), resizing="geometric") for side in (4, 9))
    torch.testing.assert_close(smaller, table[:, 2:9, 2:9], atol=1e-6, rtol=0)
    torch.testing.assert_close(larger[:, 7:10, 7:10], table[:, 4:7, 4:7], atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", [1, 2])
def test_of_windows_too_small_for_a_progression_the_last_offset_goes_on(side: int) -> None:
    table = table_of(side)
    moved = resize_table(table, (4, 4), resizing="geometric")
    assert torch.equal(moved[:, 0, 0], table[:, 0, 0]) and torch.equal(moved[:, 3, 3], table[:, side - 1, side - 1])


@pytest.mark.parametrize(("before", "after"), [(8, 12), (8, 24), (12, 7)])
def test_bicubic_is_that_of_timm(before: int, after: int) -> None:
    table = table_of(before)
    moved = move_table(table, (before, before), (after, after), window_size=after, resizing="bicubic")
    side = 2 * after - 1
    flat = timm_tables.resize_rel_pos_bias_table_simple(table.flatten(1).t(), (after, after), (side**2, HEADS))
    assert torch.equal(moved.flatten(1).t(), flat)


@pytest.mark.parametrize("resizing", RESIZINGS)
def test_a_shrunk_window_moves_its_own_offsets_alone(resizing: str) -> None:
    """Trained in 6 x 8 tokens of a table for 12, moved to 9 x 12 of one for 14; nothing untrained is read."""
    table = torch.full((HEADS, 23, 23), math.nan)
    table[:, 6:17, 4:19] = trained = table_of(6, 8)
    bias = PositionBiasTable(HEADS, window_size=14)
    bias.table.data = move_table(table, (6, 8), (9, 12), window_size=14, resizing=resizing)
    expected = resize_table(trained, (9, 12), resizing=resizing)
    if resizing == "bicubic":
        assert torch.equal(expected, F.interpolate(trained[None], (17, 23), mode="bicubic", align_corners=False)[0])
    assert torch.equal(bias(linear_spaced_offsets((9, 12), (9, 12), CPU)), expected)
    assert torch.equal(bias.table[:, 0, 0], expected[:, 0, 0]) and bias.table.isfinite().all()  # the nearest offset's


def test_a_table_stays_as_it_is_where_its_window_does() -> None:
    table = table_of(8)
    assert move_table(table, (8, 4), (8, 4), window_size=8, resizing="geometric") is table
    wider = move_table(table, (8, 8), (8, 8), window_size=10, resizing="geometric")
    assert wider.shape == (HEADS, 19, 19)
    assert torch.equal(move_table(wider, (8, 8), (8, 8), window_size=8, resizing="geometric"), table)
