"""The block that encoders are made of: attention and MLP, each on a residual branch with its norm.

Shape letters: B images; N windows an image; T tokens a window; C channels; n heads; d channels a head; K chosen
tokens of a batch.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from simmim.encoders.mlp import MLP


class MultiHeadAttention(nn.Module):
    """Self-attention of several heads. The key has no bias: to a softmax over keys it would make no difference.

    Args:
        dim: Channels C.
        num_heads: Heads n, a divisor of C.
        position_bias: What is added to the logits by place, or None if it comes from elsewhere.
        implementation: See `simmim.encoders.attention`.
    """

    def __init__(self, dim: int, num_heads: int, *, position_bias: nn.Module | None, implementation: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.implementation = implementation
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.empty(dim))
        self.v_bias = nn.Parameter(torch.empty(dim))
        self.position_bias = position_bias
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Any, rows: Tensor | None = None) -> Tensor:
        """Attends within each window: (B, N, T, C) -> (B, N, T, C), or (K, C) of the B * N * T tokens in rows."""
        out = self.attend(self.project(x), context)
        out = out.reshape(x.shape[3], -1).t()  # (B * N * T, C)
        if rows is not None:
            return self.proj(out[rows])  # type: ignore[no-any-return]
        return self.proj(out).view(x.shape)  # type: ignore[no-any-return]

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values: (B, N, T, C) -> (3, n, d, B * N, T)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = torch.addmm(bias[:, None], self.qkv.weight, x.flatten(0, 2).t())  # (3C, B * N * T)
        return qkv.view(3, self.num_heads, -1, x.shape[0] * x.shape[1], x.shape[2])

    @abstractmethod
    def attend(self, qkv: Tensor, context: Any) -> Tensor:
        """Queries, keys and values (3, n, d, B * N, T), and what else the encoder says, -> (n, d, B * N, T)."""

    @abstractmethod
    def highest_weights(self, x: Tensor, context: Any) -> Tensor:
        """By how much each head is dominated by single keys, on the tokens (B, N, T, C) of `forward`: (n,).

        See `simmim.encoders.attention.highest_weights`.
        """


class ResidualBlock(nn.Module):
    """Attention and MLP, each on a residual branch, whose norm stands at its beginning or at its end.

    Args:
        dim: Channels C.
        attention: What is on the first branch.
        norm_first: Whether the norms stand at the beginning.
        create_norm: Makes a norm of so many channels.
        drop_path: Probability of dropping a residual branch for an image.
        extra_norm: Whether a norm follows on the main branch.
        layer_scale: Whether each branch is scaled by a learnt number a channel, `gamma1` and `gamma2`.

    Attributes:
        shifted: Whether its windows are shifted by half a window.
    """

    def __init__(
        self,
        dim: int,
        attention: MultiHeadAttention,
        *,
        norm_first: bool,
        create_norm: Callable[[int], nn.Module],
        drop_path: float,
        extra_norm: bool = False,
        layer_scale: bool = False,
    ) -> None:
        super().__init__()
        self.shifted = False
        self.norm_first = norm_first
        self.attention = attention
        self.norm1 = create_norm(dim)
        self.mlp = MLP(dim)
        self.norm2 = create_norm(dim)
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.extra_norm = nn.LayerNorm(dim) if extra_norm else nn.Identity()
        self.gamma1 = nn.Parameter(torch.empty(dim)) if layer_scale else None
        self.gamma2 = nn.Parameter(torch.empty(dim)) if layer_scale else None

    def forward(self, x: Tensor, context: Any, rows: Tensor | None = None) -> Tensor:
        """(B, N, T, C) -> (B, N, T, C), or (K, C) of the B * N * T tokens in rows, the only ones to go on."""
        attended = self.attention(self.norm1(x) if self.norm_first else x, context, rows)
        batch, image = x.shape[0], None
        if rows is not None:
            image = torch.div(rows, x.shape[1] * x.shape[2], rounding_mode="floor")
            x = x.flatten(0, 2)[rows]
        attended = _scaled(attended if self.norm_first else self.norm1(attended), self.gamma1)
        x = x + self.drop(attended, batch, image)
        mixed = _scaled(self.mlp(self.norm2(x)) if self.norm_first else self.norm2(self.mlp(x)), self.gamma2)
        x = x + self.drop(mixed, batch, image)
        x = self.extra_norm(x)
        return x

    def drop(self, branch: Tensor, batch: int, image: Tensor | None) -> Tensor:
        """Drops the branch for some images: all tokens, or those whose image is given, of a batch of so many."""
        if image is None or not self.training:
            return self.drop_path(branch)  # type: ignore[no-any-return]
        kept: Tensor = self.drop_path(branch.new_ones(batch, 1))
        return branch * kept[image]


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else gamma * branch
