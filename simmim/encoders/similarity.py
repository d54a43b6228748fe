"""How much a query is like a key: by a scaled cosine, or by a dot product.

Shape letters: n heads, d channels a head, T tokens of a window.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOG_SCALE = math.log(100)
"""The learnt scale never exceeds 100: a temperature of at least 0.01."""


class Similarity(NamedTuple):
    """What makes a logit of a query and a key, before anything is added."""

    cosine: bool
    """Whether their lengths are left out."""
    scale: Tensor
    """(n,), what the cosine or dot product is multiplied by."""

    @classmethod
    def of(cls, log_scale: Tensor | None, bias: Tensor, channels: int) -> "Similarity":
        """The scaled cosine; without a scale the dot product of so many channels over their root."""
        if log_scale is None:
            return cls(cosine=False, scale=bias.new_full((len(bias),), channels**-0.5))
        return cls(cosine=True, scale=log_scale.flatten().clamp(max=MAX_LOG_SCALE).exp())

    def operands(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """What to multiply for the logits: (..., n, T, d) each, in their own precision."""
        scale = self.scale[:, None, None]
        if self.cosine:
            return unit(query, scale), unit(key)
        return (promoted(query) * scale).to(query.dtype), key


def unit(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Vectors along the last axis at the length of scale; in fp32, since a squared norm overflows in half."""
    return (F.normalize(promoted(x), dim=-1) * scale).to(x.dtype)


def precise(dtype: torch.dtype) -> torch.dtype:
    """Single precision, or double where that is given."""
    return torch.promote_types(dtype, torch.float32)


def promoted(x: Tensor) -> Tensor:
    """In at least single precision."""
    return x.to(precise(x.dtype))
