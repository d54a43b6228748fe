"""The three position biases: their formulas, their way to another window, and attention with each of them."""

import math
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import WindowAttention as TimmAttention
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

from simmim.encoders import SwinTransformerV2, create_encoder
from simmim.encoders.position_bias import (
    OFFSETS,
    PositionBiasTable,
    bias_of_pairs,
    create_position_bias,
    linear_spaced_offsets,
    log_spaced_offsets,
)

CPU = torch.device("cpu")
HEADS = 3
BIASES = tuple(OFFSETS)


def table_of(window_size: int, seed: int = 0) -> PositionBiasTable:
    bias = PositionBiasTable(HEADS, window_size=window_size)
    bias.table.data = torch.randn(bias.table.shape, generator=torch.Generator().manual_seed(seed))
    return bias


def pairs_of(bias: nn.Module, window: tuple[int, int]) -> Tensor:
    """(n, T, T)."""
    return bias_of_pairs(bias(linear_spaced_offsets(window, window, CPU)), window)


def encoder_of(seed: int = 0, **overrides: Any) -> SwinTransformerV2:
    """Maps of 12 x 12 and 6 x 6 tokens at 24 px: whole, shifted, and shrunk windows. No parameter is at rest."""
    settings = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3), "extra_norm_every": 0, "patch_size": 2}
    torch.manual_seed(seed)
    encoder = create_encoder("swinv2", **{"window_size": 6, **settings, **overrides})
    for name, parameter in encoder.named_parameters():
        parameter.data += (1.0 if "position_bias" in name else 0.3) * torch.randn_like(parameter)
    return encoder


def images_of(size: int = 24) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_from_a_window_of_8_to_16_log_space_extrapolates_least() -> None:
    """The article's check: 1.14 times linearly, 0.33 times in log space."""
    linear = float(linear_spaced_offsets((16, 16), (8, 8), CPU).max())
    assert linear == pytest.approx(15 / 7) and linear - 1 == pytest.approx(1.14, abs=0.01)
    logarithmic = [float(log_spaced_offsets((size, size), (9, 9), CPU).max()) for size in (8, 16)]  # offsets as such
    assert logarithmic[1] / logarithmic[0] - 1 == pytest.approx(0.33, abs=0.01)


@pytest.mark.parametrize(("window", "trained"), [((3, 5), (3, 5)), ((4, 6), (2, 3)), ((1, 2), (1, 1))])
def test_linear_offsets_are_counted_in_trained_windows(window: tuple[int, int], trained: tuple[int, int]) -> None:
    offsets = linear_spaced_offsets(window, trained, CPU)
    assert offsets.shape == (2 * window[0] - 1, 2 * window[1] - 1, 2)
    for row in range(1 - window[0], window[0]):
        for column in range(1 - window[1], window[1]):
            place = offsets[row + window[0] - 1, column + window[1] - 1]
            expected = [row / max(trained[0] - 1, 1), column / max(trained[1] - 1, 1)]
            assert place.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["log_cpb", "linear_cpb"])
def test_a_continuous_bias_is_16_sigmoids_of_a_network(name: str) -> None:
    bias = create_position_bias(name, HEADS, window_size=8)
    first, last = (layer.weight.double() for layer in bias.modules() if isinstance(layer, nn.Linear))
    (shift,) = (
        layer.bias.double() for layer in bias.modules() if isinstance(layer, nn.Linear) and layer.bias is not None
    )
    window, trained = (3, 5), (4, 4)
    found = bias(OFFSETS[name](window, trained, CPU))
    for row in range(1 - window[0], window[0]):
        for column in range(1 - window[1], window[1]):
            x = torch.tensor([row, column], dtype=torch.float64) / 3
            if name == "log_cpb":
                x = x.sign() * (1 + 8 * x.abs()).log() / math.log(8)
            expected = 16 / (1 + (-last @ (first @ x + shift).clamp(min=0)).exp())
            torch.testing.assert_close(found[:, row + 2, column + 4].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [(7, 7), (4, 6)])
def test_a_table_is_that_of_swin_transformer(window: tuple[int, int]) -> None:
    """Of torchvision and timm; a window that is not square takes the middle of a square table."""
    bias = table_of(max(window))
    lost = max(window) - window[0]
    own = bias.table.data[:, lost : lost + 2 * window[0] - 1].flatten(1).t()  # theirs: (offsets, n)
    torchvision = ShiftedWindowAttention(12, list(window), [0, 0], HEADS)
    timm = TimmAttention(12, HEADS, window_size=window)
    for theirs in (torchvision, timm):
        theirs.relative_position_bias_table.data = own
    found = pairs_of(bias, window)
    assert torch.equal(found, torchvision.get_relative_position_bias()[0])
    assert torch.equal(found, timm._get_rel_pos_bias()[0])


def test_offsets_of_a_smaller_window_keep_their_biases() -> None:
    """A corner of the larger window holds all pairs of the smaller one."""
    bias, (height, width) = table_of(5), (2, 4)
    whole = pairs_of(bias, (5, 5)).view(HEADS, 5, 5, 5, 5)
    part = pairs_of(bias, (height, width)).view(HEADS, height, width, height, width)
    assert torch.equal(part, whole[:, :height, :width, :height, :width])


def test_initial_values_of_a_table() -> None:
    torch.manual_seed(0)
    encoder = create_encoder("swinv2_t", window_size=8, position_bias="table")
    for stage, heads in enumerate((3, 6, 12, 24)):
        table = encoder.blocks[stage][1].attention.position_bias.table
        assert table.shape == (heads, 15, 15)
        assert 0.018 < table.std() < 0.022


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_in_bfloat16_is_computed_in_fp32(name: str) -> None:
    bias = create_position_bias(name, HEADS, window_size=6)
    for parameter in bias.parameters():
        nn.init.normal_(parameter)
    offsets = OFFSETS[name]((6, 4), (6, 6), CPU)
    expected = bias(offsets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bias(offsets), expected)
    assert expected.is_contiguous()
    assert bias.to(torch.bfloat16)(offsets).dtype == torch.float32
    assert bias.double()(offsets.double()).dtype == torch.float64


@pytest.mark.parametrize(("name", "changes"), [("log_cpb", True), ("linear_cpb", True), ("table", False)])
def test_the_trained_window_is_a_matter_of_continuous_biases(name: str, changes: bool) -> None:
    features, others, same = (
        encoder_of(position_bias=name, pretrained_window_size=pretrained)(images_of()) for pretrained in (None, 4, 6)
    )
    assert torch.equal(features, same)  # windows of 6 as they are
    assert torch.equal(features, others) is not changes


@pytest.mark.parametrize("pretrained", [None, (4, 3)])
@pytest.mark.parametrize("attention", ["sdpa", "sequential"])
@pytest.mark.parametrize("name", BIASES)
def test_attention_is_the_same_with_every_bias(name: str, attention: str, pretrained: Any) -> None:
    """Features and gradients of whole encoders against the reference, those of the bias among them."""
    results = []
    for implementation in ("reference", attention):
        encoder = encoder_of(attention=implementation, position_bias=name, pretrained_window_size=pretrained)
        features = encoder(images_of())
        (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        results.append((features, {key: parameter.grad for key, parameter in encoder.named_parameters()}))
    (expected, theirs), (found, ours) = results
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    for key, gradient in theirs.items():
        if key == "mask_token":
            assert gradient is None
            continue
        assert gradient is not None and ours[key] is not None
        assert (ours[key] - gradient).norm() < 1e-3 * gradient.norm() or gradient.norm() < 1e-6, key
        assert "position_bias" not in key or gradient.norm() > 1e-3, key


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", BIASES)
def test_forward_of_flex_is_the_same_with_every_bias(name: str) -> None:
    with torch.no_grad():
        features, expected = (
            encoder_of(attention=attention, position_bias=name)(images_of()) for attention in ("flex", "reference")
        )
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)


def test_what_a_smaller_map_does_not_reach_stands_still() -> None:
    """At 12 px the last stage sees 3 x 3 tokens of a table for 6."""
    encoder = encoder_of(position_bias="table")
    encoder(images_of(12)).square().sum().backward()
    gradient = encoder.blocks[1][0].attention.position_bias.table.grad
    reached = torch.zeros(11, 11, dtype=torch.bool)
    reached[3:8, 3:8] = True
    assert (gradient[:, reached] != 0).all() and (gradient[:, ~reached] == 0).all()


def test_an_unknown_bias_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.position_bias=rope is unknown: choose one of log_cpb, linear_cpb, t"):
        encoder_of(position_bias="rope")
