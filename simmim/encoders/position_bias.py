"""The position biases that Swin Transformer V2 compares (arXiv 2111.09883, section 3.3, equations 4 and 5).

A bias is added to the logits of each head by the offset between two tokens. A continuous one is a small network of
the offset, in log space ("log_cpb": what V2 uses) or as it is ("linear_cpb"): it moves to another window as it
stands. A table ("table", of Swin Transformer, arXiv 2103.14030, section 3.2) learns a number an offset, and must be
resized (`simmim.encoders.table_resizing`). Shape letters: h, w window in tokens; T = h * w; n heads.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.encoders.similarity import precise
from simmim.encoders.table_resizing import middle_of
from simmim.encoders.windows import Window, kept

HIDDEN_WIDTH = 512
"""Width of the hidden layer of the bias network, in all released models."""


@kept(maxsize=32)
def log_spaced_offsets(window: Window, trained_window: Window, device: torch.device) -> Tensor:
    """All offsets between two tokens of a window, in log space (equation 5).

    Args:
        window: Height and width of the window in tokens.
        trained_window: The window that the bias network was trained with: its largest offset maps to 8 before
            the logarithm, so offsets beyond it extrapolate.
        device: Where to.

    Returns:
        Float (2h - 1, 2w - 1, 2), row offset before column offset, the most negative first.
    """
    offset = 8 * _offsets(window, trained_window)
    return (offset.sign() * torch.log2(1 + offset.abs()) / math.log2(8)).to(device)


@kept(maxsize=32)
def linear_spaced_offsets(window: Window, trained_window: Window, device: torch.device) -> Tensor:
    """The same without a logarithm.

    The largest offset of the trained window maps to 1, without the 8 that shapes the logarithm: so the network is
    trained over about the same range as in log space, where that offset maps to 1.06.
    """
    return _offsets(window, trained_window).to(device)


def _offsets(window: Window, trained_window: Window) -> Tensor:
    axes = [
        torch.arange(1 - size, size, dtype=torch.float32) / max(trained - 1, 1)
        for size, trained in zip(window, trained_window, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def bias_of_pairs(table: Tensor, window: Window) -> Tensor:
    """Spreads a table of offsets to all pairs of tokens, without an index: the pairs are the table's own windows.

    The offset between query q and key k is q - k on each axis. So the biases of one key are the part of (h, w) of
    the table that begins at the key's place, counted from the window's end.

    Args:
        table: (n, 2h - 1, 2w - 1), the bias of each offset.
        window: Height and width of the window in tokens.

    Returns:
        (n, T, T), queries before keys.
    """
    parts = F.unfold(table[None], window)  # (1, n * T, T)
    return parts.view(len(table), -1, parts.shape[-1]).flip(-1)


def table_of_pairs(gradient: Tensor, window: Window) -> Tensor:
    """The gradient of `bias_of_pairs`, which folds the parts together: (n, T, T) -> (n, 2h - 1, 2w - 1)."""
    parts = gradient.flip(-1).view(1, -1, gradient.shape[-1])
    return F.fold(parts, (2 * window[0] - 1, 2 * window[1] - 1), window)[0]


class LogSpacedPositionBias(nn.Module):
    """B = 16 sigmoid(MLP(log-spaced offset)), one value a head and offset.

    Args:
        num_heads: Number of attention heads n.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.mlp = _network(num_heads)

    def forward(self, offsets: Tensor) -> Tensor:
        """Offsets of `log_spaced_offsets` (2h - 1, 2w - 1, 2) -> (n, 2h - 1, 2w - 1), in fp32 or float64."""
        return _bias(self.mlp, offsets)


class LinearSpacedPositionBias(nn.Module):
    """B = 16 sigmoid(MLP(offset)). Its network has a name of its own: read as a log-spaced one, it would mislead.

    Args:
        num_heads: Number of attention heads n.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.linear_mlp = _network(num_heads)

    def forward(self, offsets: Tensor) -> Tensor:
        """Offsets of `linear_spaced_offsets` (2h - 1, 2w - 1, 2) -> (n, 2h - 1, 2w - 1), in fp32 or float64."""
        return _bias(self.linear_mlp, offsets)


class PositionBiasTable(nn.Module):
    """One learnt value a head and offset, without bounds.

    Args:
        num_heads: Number of attention heads n.
        window_size: Side of the largest window in tokens; a smaller one takes the middle, where its offsets lie.
    """

    def __init__(self, num_heads: int, *, window_size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_heads, 2 * window_size - 1, 2 * window_size - 1))

    def forward(self, offsets: Tensor) -> Tensor:
        """Any offsets of a window (2h - 1, 2w - 1, 2) -> (n, 2h - 1, 2w - 1), in fp32 or float64."""
        middle = middle_of(self.table, (offsets.shape[0] // 2 + 1, offsets.shape[1] // 2 + 1))
        return middle.to(precise(middle.dtype)).contiguous()


OFFSETS: dict[str, Callable[[Window, Window, torch.device], Tensor]] = {
    "log_cpb": log_spaced_offsets,
    "linear_cpb": linear_spaced_offsets,
    "table": linear_spaced_offsets,
}
"""What each position bias is given."""


def create_position_bias(name: str, num_heads: int, *, window_size: int) -> nn.Module:
    """The bias of one attention layer, from the offsets of `OFFSETS[name]`.

    Args:
        name: A key of `OFFSETS`.
        num_heads: Number of attention heads n.
        window_size: Side of the largest window in tokens.

    Raises:
        ValueError: If the name is unknown.
    """
    if name == "log_cpb":
        return LogSpacedPositionBias(num_heads)
    if name == "linear_cpb":
        return LinearSpacedPositionBias(num_heads)
    if name == "table":
        return PositionBiasTable(num_heads, window_size=window_size)
    raise ValueError(f"model.position_bias={name} is unknown: choose one of {', '.join(OFFSETS)}")


def _network(num_heads: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, HIDDEN_WIDTH), nn.ReLU(), nn.Linear(HIDDEN_WIDTH, num_heads, bias=False))


def _bias(network: nn.Sequential, offsets: Tensor) -> Tensor:
    first, last = cast(nn.Linear, network[0]), cast(nn.Linear, network[2])
    precision = precise(first.weight.dtype)
    with torch.autocast(offsets.device.type, enabled=False):
        hidden = F.linear(offsets.to(precision), first.weight.to(precision), first.bias.to(precision)).relu()
        table = 16 * torch.sigmoid(F.linear(hidden, last.weight.to(precision)))
    return table.permute(2, 0, 1).contiguous()
