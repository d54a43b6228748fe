"""Buffers of released files tell how they were trained: against those that timm's network computes."""

from typing import Any

import pytest
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor

from simmim.encoders.names import OFFICIAL
from simmim.encoders.stored_windows import stored_geometry

DEPTHS = (2, 2, 2, 2)


def buffers_of(size: Any, window: int, trained: Any = (0, 0, 0, 0), patch: int = 4) -> dict[str, Tensor]:
    shape = {"embed_dim": 8, "depths": DEPTHS, "num_heads": (1, 1, 2, 2)}
    network = TimmSwinV2(
        img_size=size, patch_size=patch, window_size=window, pretrained_window_sizes=trained, num_classes=0, **shape
    )
    return {key: value.clone() for key, value in network.named_buffers() if "layers" in key}


def told_by(buffers: dict[str, Tensor], patch: int = 4) -> dict[str, Any]:
    return stored_geometry(buffers, OFFICIAL, stages=4, patch_size=patch)


@pytest.mark.parametrize(
    ("size", "window", "trained", "patch"),
    [
        ((192, 192), 12, None, 4),
        ((256, 256), 16, [12, 12, 12, 6], 4),
        ((384, 384), 24, [12, 12, 12, 6], 4),
        ((256, 256), 8, None, 4),
        ((128, 256), 8, None, 2),
        ((512, 256), 8, [6, 6, 6, 3], 4),
        ((224, 224), 7, None, 4),
    ],
)
def test_windows_and_image_size(size: Any, window: int, trained: list[int] | None, patch: int) -> None:
    """Of square and other images, where windows shrink and where they do not."""
    told = told_by(buffers_of(size, window, trained or (0, 0, 0, 0), patch), patch)
    maps = [[side // (patch * 2**stage) for side in size] for stage in range(4)]
    windows = [[min(window, side) for side in sides] for sides in maps]
    assert told["image_size"] == list(size)
    assert told["windows"] == windows
    assert told["pretrained_windows"] == (windows if trained is None else [[side, side] for side in trained])


def table_of(window: int, trained: int) -> Tensor:
    layer = WindowAttention(2, (window, window), 1, pretrained_window_size=(trained, trained))
    return layer.relative_coords_table


def told_by_table(table: Tensor) -> Any:
    buffers = {"layers.0.blocks.0.attn.relative_coords_table": table}
    return stored_geometry(buffers, OFFICIAL, stages=1, patch_size=4)["pretrained_windows"]


@pytest.mark.parametrize("window", [2, 7, 16])
def test_every_trained_window_is_told_apart(window: int) -> None:
    for trained in range(2, 65, 3):
        assert told_by_table(table_of(window, trained)) == [[trained, trained]]


@pytest.mark.parametrize(("window", "trained"), [(16, 12), (24, 12), (12, 12), (8, 8), (16, 16), (14, 6)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tells_published_windows(window: int, trained: int, dtype: torch.dtype) -> None:
    assert told_by_table(table_of(window, trained).to(dtype)) == [[trained, trained]]


def test_pairs_alone_tell_the_window_and_not_where_it_counts() -> None:
    """As torchvision stores them, in a row, and others in a square."""
    buffers = {key: value for key, value in buffers_of((256, 256), 16).items() if "position_index" in key}
    in_a_row = {key: value.flatten() for key, value in buffers.items()}
    for some in (buffers, in_a_row):
        told = told_by(some)
        assert told["windows"] == [[16, 16]] * 3 + [[8, 8]]
        assert "pretrained_windows" not in told


def test_without_buffers_nothing_is_told() -> None:
    assert told_by({}) == {}
    part = {key: value for key, value in buffers_of((256, 256), 16).items() if ".2." not in key.split("blocks")[0]}
    assert told_by(part) == {}


def test_where_nothing_shrinks_nor_shifts_the_image_size_is_unknown() -> None:
    """One block a stage has no shifted windows; as torchvision's, which never shrink."""
    tables = {key: value for key, value in buffers_of((256, 256), 8).items() if "attn_mask" not in key}
    told = told_by(tables)
    assert "image_size" not in told
    assert told["windows"] == [[8, 8]] * 4


def test_other_offsets_are_refused() -> None:
    buffers = buffers_of((256, 256), 16)
    linear = {
        key: value.sign() * (2 ** (3 * value.abs()) - 1) / 8 if "table" in key else value
        for key, value in buffers.items()
    }
    with pytest.raises(ValueError, match="not spaced as in log_cpb"):
        told_by(linear)
