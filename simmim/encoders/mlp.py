"""The MLP of a block, which keeps one of its two wide tensors for the backward pass instead of both."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MLP_RATIO = 4
"""Width of the hidden layer, in multiples of the block's channels."""


class MLP(nn.Sequential):
    """Linear, GELU, linear: (..., C) -> (..., C).

    The activation is computed again in the backward pass: that costs less time than a third of a block's memory is
    worth.

    Args:
        dim: Channels C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, MLP_RATIO * dim), nn.GELU(), nn.Linear(MLP_RATIO * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        widen, _, narrow = self
        hidden: Tensor = widen(x)  # (..., 4C), in the precision of autocast
        out: Tensor = _GELULinear.apply(hidden, narrow.weight.to(hidden.dtype), narrow.bias.to(hidden.dtype))
        return out


class _GELULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        grad_weight = flat.t() @ F.gelu(x).flatten(0, -2)
        return torch.ops.aten.gelu_backward(gradient @ weight, x), grad_weight, flat.sum(0)
