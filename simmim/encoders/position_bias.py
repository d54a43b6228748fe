"""Log-spaced continuous position bias (Swin Transformer V2, arXiv 2111.09883, section 3.3, equations 4 and 5).

A small network maps the offset between two tokens to a bias of each head, so that a model moves to another
window size without a table to resize. Shape letters: h, w window in tokens; T = h * w; n heads.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.encoders.windows import kept

HIDDEN_WIDTH = 512
"""Width of the hidden layer of the bias network, in all released models."""


@kept(maxsize=32)
def log_spaced_offsets(window: tuple[int, int], trained_window: tuple[int, int], device: torch.device) -> Tensor:
    """All offsets between two tokens of a window, in log space (equation 5).

    Args:
        window: Height and width of the window in tokens.
        trained_window: The window that the bias network was trained with: its largest offset maps to 8 before
            the logarithm, so offsets beyond it extrapolate.
        device: Where to.

    Returns:
        Float (2h - 1, 2w - 1, 2), row offset before column offset, the most negative first.
    """
    axes = []
    for size, trained in zip(window, trained_window, strict=True):
        offset = torch.arange(1 - size, size, dtype=torch.float32)
        offset = 8 * offset / max(trained - 1, 1)
        axes.append(offset.sign() * torch.log2(1 + offset.abs()) / math.log2(8))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).to(device)


def bias_of_pairs(table: Tensor, window: tuple[int, int]) -> Tensor:
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


def table_of_pairs(gradient: Tensor, window: tuple[int, int]) -> Tensor:
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
        self.mlp = nn.Sequential(nn.Linear(2, HIDDEN_WIDTH), nn.ReLU(), nn.Linear(HIDDEN_WIDTH, num_heads, bias=False))

    def forward(self, offsets: Tensor) -> Tensor:
        """Offsets of `log_spaced_offsets` (2h - 1, 2w - 1, 2) -> (n, 2h - 1, 2w - 1), in fp32 or float64."""
        first, last = cast(nn.Linear, self.mlp[0]), cast(nn.Linear, self.mlp[2])
        precision = torch.promote_types(first.weight.dtype, torch.float32)  # a bias of up to 16 needs more than 8 bits
        with torch.autocast(offsets.device.type, enabled=False):
            hidden = F.linear(offsets.to(precision), first.weight.to(precision), first.bias.to(precision)).relu()
            table = 16 * torch.sigmoid(F.linear(hidden, last.weight.to(precision)))
        return table.permute(2, 0, 1).contiguous()
