"""What the tensors of a released file tell of its training: windows, those of an earlier stage, and the image size.

Files of the authors' code, and of older libraries, hold buffers that could be recomputed. They are not loaded, but
their shapes and values are all that such a file says of its geometry. V1's tables of positions tell their windows.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from simmim.encoders.names import Layout, stage_of
from simmim.encoders.position_bias import log_spaced_offsets
from simmim.encoders.windows import Window

TOLERANCE = 5e-3
"""Of stored offsets, which may have been rounded to half precision."""


def stored_geometry(state: Mapping[str, Tensor], layout: Layout, *, stages: int, patch_size: int) -> dict[str, Any]:
    """Windows and image size, as far as the buffers of a state dict tell them.

    Args:
        state: As the library names it, without a prefix.
        layout: The library.
        stages: Number of stages.
        patch_size: In pixels.

    Returns:
        `windows` of each stage in tokens, `pretrained_windows` likewise, in which the position bias counts, and
        `image_size` in pixels, [height, width] each; without what the tensors do not tell.

    Raises:
        ValueError: If the offsets are not spaced as log_cpb has them.
    """
    buffers: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        if (stage := stage_of(key, layout)) is not None:
            buffers.setdefault(key.rpartition(".")[2], {}).setdefault(stage, value)
    tables, masks = buffers.get("relative_coords_table", {}), buffers.get("attn_mask", {})
    learnt = buffers.get("relative_position_bias_table", {})
    windows = {stage: _window_of_table(table) for stage, table in tables.items()}
    windows |= {stage: _window_of_offsets(table) for stage, table in learnt.items()}
    for name in ("relative_position_index", "attn_mask"):
        for stage, buffer in buffers.get(name, {}).items():
            windows.setdefault(stage, _window_of_pairs(buffer))
    if len(windows) < stages:
        return {}
    known: dict[str, Any] = {"windows": [list(windows[stage]) for stage in range(stages)]}
    if len(tables) == stages:
        known["pretrained_windows"] = [list(_trained_window(tables[stage])) for stage in range(stages)]
    elif len(learnt) == stages:
        known["pretrained_windows"] = known["windows"]
    if size := _image_size(windows, masks, patch_size):
        known["image_size"] = list(size)
    return known


def _window_of_table(table: Tensor) -> Window:
    """(1, 2h - 1, 2w - 1, 2) -> (h, w)."""
    return (table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2


def _window_of_offsets(table: Tensor) -> Window:
    """(offsets, n): those of a square window, as `simmim.encoders.names` asks."""
    side = math.isqrt(len(table)) // 2 + 1
    return side, side


def _window_of_pairs(buffer: Tensor) -> Window:
    """(..., T, T), or all pairs in a row as torchvision has them: a square of T tokens."""
    tokens = math.isqrt(buffer.numel()) if buffer.ndim == 1 else buffer.shape[-1]
    return math.isqrt(tokens), math.isqrt(tokens)


def _trained_window(table: Tensor) -> Window:
    """The window in which a table of log-spaced offsets counts: its largest offset is log2(1 + 8 d / (w0 - 1)) / 3."""
    window = _window_of_table(table)
    largest = table[0, -1, -1].double().tolist()
    sides = [
        side if side == 1 or value <= 0 else round(8 * (side - 1) / (2 ** (3 * value) - 1)) + 1
        for side, value in zip(window, largest, strict=True)
    ]
    trained = (sides[0], sides[1])
    expected = log_spaced_offsets(window, trained, torch.device("cpu"))
    if not torch.allclose(table[0].float(), expected, atol=TOLERANCE, rtol=TOLERANCE):
        raise ValueError("its relative_coords_table is not spaced as in log_cpb: it was trained with another bias")
    return trained


def _image_size(windows: Mapping[int, Window], masks: Mapping[int, Tensor], patch_size: int) -> Window | None:
    """From the number of shifted windows, or from a window that shrank to its map; None if neither tells it."""
    sizes = set()
    for stage, mask in masks.items():
        if len(torch.unique(mask[-1], dim=0)) < 4:  # shifted along one axis alone: the windows could lie either way
            continue
        rows, columns = _grid(mask)
        height, width = windows[stage]
        sizes.add((rows * height * patch_size * 2**stage, columns * width * patch_size * 2**stage))
    largest = max(windows.values())
    for stage, (height, width) in windows.items():
        if height < largest[0] and width < largest[1]:
            sizes.add((height * patch_size * 2**stage, width * patch_size * 2**stage))
    return sizes.pop() if len(sizes) == 1 else None


def _grid(mask: Tensor) -> Window:
    """Windows down and across: (N, T, T). Only those of the last column and the last row hide anything."""
    first = int(mask.flatten(1).ne(0).any(dim=1).int().argmax())
    return len(mask) // (first + 1), first + 1
