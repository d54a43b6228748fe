"""Scaled cosine attention within windows (Swin Transformer V2, arXiv 2111.09883, section 3.3, equation 2).

Several implementations of one function stand behind `cosine_attention`: "reference" spells the formula out and
is what the others are tested against. Shape letters: B images, N windows an image, n heads, T tokens a window,
d channels a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOG_SCALE = math.log(100)
"""The learnt scale never exceeds 100: a temperature of at least 0.01."""


def reference_attention(query: Tensor, key: Tensor, value: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The formula as it stands: softmax(scale * query key^T + bias) value, with the logits in fp32."""
    cosine = query @ key.transpose(-2, -1)  # (B, N, n, T, T)
    return (cosine.float() * scale + bias).softmax(dim=-1).to(value.dtype) @ value


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The same through PyTorch's fused `scaled_dot_product_attention`, whose kernels take one batch dimension."""
    batched = bias.ndim == 3  # then the windows join the images, else, with a bias for each window, the heads
    join = (0, 1) if batched else (1, 2)
    bias = (bias if batched else bias.flatten(0, 1)).to(value.dtype)[None]
    query, key, joined = ((query * scale).to(value.dtype).flatten(*join), key.flatten(*join), value.flatten(*join))
    return F.scaled_dot_product_attention(query, key, joined, attn_mask=bias, scale=1.0).view_as(value)


IMPLEMENTATIONS = {"reference": reference_attention, "sdpa": sdpa_attention}


def resolve_implementation(name: str, device: torch.device) -> str:
    """The implementation that `auto` stands for on a device; other names are checked and returned.

    Raises:
        ValueError: If the name is unknown.
    """
    if name == "auto":
        # The fused CPU kernel has no backward for a bias that needs a gradient: PyTorch then spells it out itself.
        return "reference" if device.type == "cpu" else "sdpa"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"model.attention={name} is unknown: choose one of auto, {', '.join(IMPLEMENTATIONS)}")
    return name


def cosine_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_scale: Tensor,
    position_bias: Tensor,
    mask: Tensor | None,
    implementation: str,
) -> Tensor:
    """Attention by the cosine between query and key, with a learnt temperature a head.

    Args:
        query: (B, N, n, T, d); key and value alike.
        key: See query.
        value: See query.
        log_scale: (n, 1, 1), logarithm of the scale, clamped to ln 100.
        position_bias: (n, T, T), added to the scaled cosines.
        mask: (N, T, T) added for each window (0 within a region, -100 across), or None.
        implementation: "auto" or a key of `IMPLEMENTATIONS`.

    Returns:
        (B, N, n, T, d) in the precision of value.
    """
    scale = log_scale.clamp(max=MAX_LOG_SCALE).exp()
    query = F.normalize(query.float(), dim=-1).to(value.dtype)  # in fp32: the square of a norm overflows in half
    key = F.normalize(key.float(), dim=-1).to(value.dtype)
    bias = position_bias if mask is None else position_bias + mask[:, None]  # (n, T, T) or (N, n, T, T)
    attend = IMPLEMENTATIONS[resolve_implementation(implementation, query.device)]
    return attend(query, key, value, scale, bias)
