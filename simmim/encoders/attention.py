"""Attention within windows, by scaled cosines or by dot products.

The first is Swin Transformer V2's (arXiv 2111.09883, section 3.3, equation 2), the second Swin Transformer's (arXiv
2103.14030, section 3.2, equation 4).
Several implementations of one function stand behind `window_attention`: "reference" spells the formula out and is
what the others are tested against. Queries, keys and values come with their channels first and the tokens of all
windows last: a matrix product writes them so, every step reads memory in order, and no head has to be cut out.
Shape letters: n heads, d channels a head, N windows an image, W windows of a batch (N times the images), h, w a
window's height and width in tokens, T = h * w.
"""

import math
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention as flex

from simmim.encoders.position_bias import bias_of_pairs
from simmim.encoders.sequential_attention import LOGITS_AT_A_TIME, sequential_attention
from simmim.encoders.similarity import Similarity, promoted, unit
from simmim.encoders.windows import PADDING, Geometry, Window, penalties


def window_attention(
    qkv: Tensor,
    *,
    log_scale: Tensor | None,
    table: Tensor,
    geometry: Geometry,
    implementation: str,
) -> Tensor:
    """Attention by the cosine between query and key, with a learnt temperature a head; or by their dot product.

    Args:
        qkv: Queries, keys and values: (3, n, d, W, T).
        log_scale: (n, 1, 1), logarithm of the cosine's scale, clamped to ln 100; None for the dot product, whose scale
            is 1 / sqrt(d).
        table: (n, 2h - 1, 2w - 1), added to the scaled similarities by the offset between the tokens.
        geometry: The windows.
        implementation: "auto" or a key of `IMPLEMENTATIONS`.

    Returns:
        (n, d, W, T) in the precision of qkv.
    """
    similarity = Similarity.of(log_scale, table, qkv.shape[2])
    attend = IMPLEMENTATIONS[resolve_implementation(implementation, qkv.device)]
    return attend(qkv, similarity, table, geometry.window, geometry.regions)


def pairwise_attention(qkv: Tensor, *, bias: Tensor, implementation: str) -> Tensor:
    """Attention by dot products over all tokens of an image, each pair with a bias of its own.

    Args:
        qkv: Queries, keys and values: (3, n, d, W, T).
        bias: (n, T, T), added to the scaled products, queries before keys.
        implementation: "auto" or a key of `PAIRWISE`.

    Returns:
        (n, d, W, T) in the precision of qkv.
    """
    attend = PAIRWISE[resolve_implementation(implementation, qkv.device, PAIRWISE)]
    return attend(qkv, Similarity.of(None, bias, qkv.shape[2]), bias[None])


def reference_attention(
    qkv: Tensor, similarity: Similarity, table: Tensor, window: Window, regions: Tensor | None
) -> Tensor:
    """The formula as it stands: softmax(scale * cos(query, key) + bias) value, up to the softmax in fp32."""
    return _spelt_out(qkv, similarity, _bias(table, window, regions))


def _spelt_out(qkv: Tensor, similarity: Similarity, bias: Tensor) -> Tensor:
    """The formula, with the bias of each pair of tokens: (1 or N, n, T, T)."""
    value = qkv[2].permute(2, 0, 3, 1)  # (W, n, T, d)
    x: Tensor = attention_probabilities(qkv, similarity, bias).to(value.dtype) @ value
    return x.permute(1, 3, 0, 2)


def attention_probabilities(qkv: Tensor, similarity: Similarity, bias: Tensor) -> Tensor:
    """What each query gives to each key, softmax(scale * cos(query, key) + bias): (W, n, T, T), in fp32."""
    query, key, _ = qkv.permute(0, 3, 1, 4, 2)  # (W, n, T, d)
    with torch.autocast(qkv.device.type, enabled=False):
        query, key = promoted(query), promoted(key)
        if similarity.cosine:
            query, key = unit(query), unit(key)
        products = query @ key.transpose(-2, -1)  # (W, n, T, T)
        logits = products.view(-1, *bias.shape) * similarity.scale[:, None, None] + bias
        return logits.softmax(dim=-1).view_as(products)


@torch.no_grad()
def highest_weights(qkv: Tensor, *, log_scale: Tensor | None, table: Tensor, geometry: Geometry) -> Tensor:
    """What the queries of each head give to the key that they attend to most, on average over queries and windows.

    Between 1/T, where all keys get alike, and 1, where one gets all. Some windows of one head are looked at at a time.

    Args:
        qkv: See `window_attention`, as all that follow.
        log_scale: (n, 1, 1), or None for the dot product.
        table: (n, 2h - 1, 2w - 1).
        geometry: The windows.

    Returns:
        (n,), in fp32.
    """
    similarity, regions = Similarity.of(log_scale, table, qkv.shape[2]), geometry.regions
    image = 1 if regions is None else len(regions)  # windows that must stay together
    at_a_time = image * max(1, LOGITS_AT_A_TIME // (image * qkv.shape[4] ** 2))
    real = torch.ones(qkv.shape[3:], device=qkv.device)  # (W, T), 0 in padding
    if regions is not None:
        real *= regions.ne(PADDING).repeat(len(real) // image, 1)
    totals = []
    for head in range(qkv.shape[1]):
        one = slice(head, head + 1)
        alone = Similarity(similarity.cosine, similarity.scale[one])
        highest = [
            attention_probabilities(windows, alone, _bias(table[one], geometry.window, regions)).amax(-1)  # (W, 1, T)
            for windows in torch.split(qkv[:, one], at_a_time, dim=3)
        ]
        totals.append((torch.cat(highest).squeeze(1) * real).sum())
    return torch.stack(totals) / real.sum()


@torch.no_grad()
def highest_pairwise_weights(qkv: Tensor, *, bias: Tensor) -> Tensor:
    """As `highest_weights`, of `pairwise_attention`: (n,), in fp32."""
    cosine, scale = Similarity.of(None, bias, qkv.shape[2])
    heads = (slice(head, head + 1) for head in range(qkv.shape[1]))
    each = (attention_probabilities(qkv[:, one], Similarity(cosine, scale[one]), bias[None, one]) for one in heads)
    return torch.stack([probabilities.amax(-1).mean() for probabilities in each])


def sdpa_attention(
    qkv: Tensor, similarity: Similarity, table: Tensor, window: Window, regions: Tensor | None
) -> Tensor:
    """The same through PyTorch's `scaled_dot_product_attention`, whose fused kernels take one batch dimension."""
    return _fused(qkv, similarity, _bias(table, window, regions))


def _fused(qkv: Tensor, similarity: Similarity, bias: Tensor) -> Tensor:
    """The same as `_spelt_out`."""
    query, key, value = qkv.permute(0, 3, 1, 4, 2)
    query, key, joined = (  # windows with a bias each become heads, so that the images share it
        x.reshape(-1, math.prod(bias.shape[:2]), *x.shape[2:]) for x in (*similarity.operands(query, key), value)
    )
    bias = bias.flatten(0, 1).to(value.dtype)[None]
    x = F.scaled_dot_product_attention(query, key, joined, attn_mask=bias, scale=1.0)
    return x.reshape(value.shape).permute(1, 3, 0, 2)


def flex_attention(
    qkv: Tensor, similarity: Similarity, table: Tensor, window: Window, regions: Tensor | None
) -> Tensor:
    """The same through PyTorch's FlexAttention: the bias is read from its table, and no T x T matrix is stored.

    On a GPU it is compiled to one kernel; on a CPU it serves the tests, in as much memory as the reference.
    """
    query, key, value = qkv.permute(0, 3, 1, 4, 2)
    height, width = window
    costs = penalties(table.device)

    def biased(logit: Tensor, at: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        logit = logit + table[head, q // width - k // width + height - 1, q % width - k % width + width - 1]
        if regions is None:
            return logit
        at = at % regions.shape[0]
        return logit + costs[regions[at, q] - PADDING, regions[at, k] - PADDING]

    if not qkv.is_cuda and qkv.requires_grad:
        raise ValueError("model.attention=flex trains on a GPU only: give model.attention=auto")
    attend = _compiled_flex() if qkv.is_cuda else flex
    x: Tensor = attend(*similarity.operands(query, key), value, score_mod=biased, scale=1.0)
    return x.permute(1, 3, 0, 2)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Similarity, Tensor, Window, Tensor | None], Tensor]] = {
    "reference": reference_attention,
    "sdpa": sdpa_attention,
    "sequential": sequential_attention,
    "flex": flex_attention,
}


PAIRWISE: dict[str, Callable[[Tensor, Similarity, Tensor], Tensor]] = {"reference": _spelt_out, "sdpa": _fused}
"""Those that take any bias of pairs of tokens, and not only one by the offset between places of a window."""


def resolve_implementation(name: str, device: torch.device, among: Collection[str] = IMPLEMENTATIONS) -> str:
    """The implementation that `auto` stands for; other names are checked and returned.

    Args:
        name: "auto" or one of those.
        device: Where.
        among: Those that there are.

    Raises:
        ValueError: If the name is none of them.
    """
    if name == "auto":
        return "sequential" if device.type == "cpu" and "sequential" in among else "sdpa"
    if name not in among:
        word = "unknown" if name not in IMPLEMENTATIONS else "for attention within windows"
        raise ValueError(f"model.attention={name} is {word}: choose one of auto, {', '.join(among)}")
    return name


def _bias(table: Tensor, window: Window, regions: Tensor | None) -> Tensor:
    """What is added to the logits, position bias and regions together: (1 or N, n, T, T)."""
    bias = bias_of_pairs(table, window)[None]
    if regions is None:
        return bias
    kind = regions - PADDING
    return bias + penalties(table.device)[kind[:, :, None], kind[:, None, :]][:, None]


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    return torch.compile(flex, dynamic=False)
