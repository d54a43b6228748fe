"""Log-spaced continuous position bias (Swin Transformer V2, arXiv 2111.09883, section 3.3, equations 4 and 5).

A small network maps the offset between two tokens to a bias of each head, so that a model moves to another
window size without a table to resize. Shape letters: h, w window in tokens; T = h * w; n heads.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

HIDDEN_WIDTH = 512
"""Width of the hidden layer of the bias network, in all released models."""


@lru_cache(maxsize=32)
def log_spaced_offsets(window: tuple[int, int], trained_window: tuple[int, int], device: torch.device) -> Tensor:
    """All offsets between two tokens of a window, in log space (equation 5).

    Args:
        window: Height and width of the window in tokens.
        trained_window: The window that the bias network was trained with: its largest offset maps to 8 before
            the logarithm, so offsets beyond it extrapolate.
        device: Where to.

    Returns:
        Float ((2h - 1) * (2w - 1), 2), row offset before column offset, row-major, most negative first.
    """
    axes = []
    with torch.inference_mode(False):  # a cached inference tensor could not serve training later
        for size, trained in zip(window, trained_window, strict=True):
            offset = torch.arange(1 - size, size, dtype=torch.float32, device=device)
            offset = 8 * offset / max(trained - 1, 1)
            axes.append(offset.sign() * torch.log2(1 + offset.abs()) / math.log2(8))
        return torch.cartesian_prod(*axes)


@lru_cache(maxsize=32)
def offset_index(window: tuple[int, int], device: torch.device) -> Tensor:
    """For each pair (query, key) of a window, the row of its offset in `log_spaced_offsets`.

    Returns:
        Integer (T, T).
    """
    height, width = window
    with torch.inference_mode(False):  # a cached inference tensor could not serve training later
        token = torch.arange(height * width, device=device)
        row, column = token // width, token % width
        rows = row[:, None] - row[None, :] + height - 1  # (T, T), 0 to 2h - 2
        columns = column[:, None] - column[None, :] + width - 1
        return rows * (2 * width - 1) + columns


class LogSpacedPositionBias(nn.Module):
    """B = 16 sigmoid(MLP(log-spaced offset)), one value a head and pair of tokens.

    Args:
        num_heads: Number of attention heads n.
        trained_window: Side in tokens of the window of an earlier training stage; None: the current window.
    """

    def __init__(self, num_heads: int, *, trained_window: int | None) -> None:
        super().__init__()
        self.trained_window = trained_window
        self.mlp = nn.Sequential(nn.Linear(2, HIDDEN_WIDTH), nn.ReLU(), nn.Linear(HIDDEN_WIDTH, num_heads, bias=False))

    def forward(self, window: tuple[int, int]) -> Tensor:
        """Bias of a window of (h, w) tokens: (n, T, T), in the precision of the weights."""
        weight = next(self.mlp.parameters())
        trained = window if self.trained_window is None else (self.trained_window, self.trained_window)
        offsets = log_spaced_offsets(window, trained, weight.device).to(weight.dtype)
        with torch.autocast(weight.device.type, enabled=False):  # a bias of up to 16 needs more than 8 bits
            table: Tensor = 16 * torch.sigmoid(self.mlp(offsets))  # (offsets, n)
        tokens = window[0] * window[1]
        index = offset_index(window, weight.device)
        return table.t().index_select(1, index.flatten()).view(-1, tokens, tokens)  # (n, T, T)
