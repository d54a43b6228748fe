"""Attention within windows, by scaled cosines or by dot products.

The first is Swin Transformer V2's (arXiv 2111.09883, section 3.3, equation 2), the second Swin Transformer's (arXiv
2103.14030, section 3.2, equation 4).
Several implementations of one function stand behind `window_attention`: "reference" spells the formula out and is
what the others are tested against. Queries, keys and values come with their channels first and the tokens of all
windows last: a matrix product writes them so, every step reads memory in order, and no head has to be cut out.
Shape letters: n heads, d channels a head, N windows an image, W windows of a batch (N times the images), h, w a
window's height and width in tokens, T = h * w; in sequential attention, m matrices at a time and t queries.
"""

import math
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention as flex

from simmim.encoders.position_bias import bias_of_pairs, table_of_pairs
from simmim.encoders.windows import PADDING, Geometry, kept

MAX_LOG_SCALE = math.log(100)
"""The learnt scale never exceeds 100: a temperature of at least 0.01."""

CROSS_REGION = -100.0
"""What is added to the logit of a query and a key that the cyclic shift alone made neighbours. Not minus
infinity: with a scale of up to 100 and a bias of up to 16, released models see through it a little."""

UNREACHABLE = -1e5
"""What is added where one of the two is padding: its exponential is zero."""

LOGITS_AT_A_TIME = 2**21
"""Of sequential attention, 8 MB. Fewer take more turns, each with a price; more leave the caches of a CPU."""

ALL = slice(None)

Window = tuple[int, int]


class Similarity(NamedTuple):
    """What makes a logit of a query and a key, before anything is added."""

    cosine: bool
    """Whether their lengths are left out."""
    scale: Tensor
    """(n,), what the cosine or dot product is multiplied by."""

    @classmethod
    def of(cls, log_scale: Tensor | None, table: Tensor, channels: int) -> "Similarity":
        """The scaled cosine; without a scale the dot product of so many channels over their root."""
        if log_scale is None:
            return cls(cosine=False, scale=table.new_full((len(table),), channels**-0.5))
        return cls(cosine=True, scale=log_scale.flatten().clamp(max=MAX_LOG_SCALE).exp())

    def operands(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """What to multiply for the logits: (..., n, T, d) each, in their own precision."""
        scale = self.scale[:, None, None]
        if self.cosine:
            return _unit(query, scale), _unit(key)
        return (_promoted(query) * scale).to(query.dtype), key


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
        query, key = _promoted(query), _promoted(key)
        if similarity.cosine:
            query, key = _unit(query), _unit(key)
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


def sequential_attention(
    qkv: Tensor, similarity: Similarity, table: Tensor, window: Window, regions: Tensor | None
) -> Tensor:
    """The same for some heads, windows and queries at a time, in fp32; no T x T matrix outlives its turn.

    The backward pass computes the probabilities again: it needs qkv, and the lengths of queries and keys.
    """
    x: Tensor = _sequential(qkv, similarity.scale, table, regions, window, similarity.cosine)[0]
    return x


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


def _unit(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Vectors along the last axis at the length of scale; in fp32, since a squared norm overflows in half."""
    return (F.normalize(_promoted(x), dim=-1) * scale).to(x.dtype)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _promoted(x: Tensor) -> Tensor:
    return x.to(_precise(x.dtype))


def _bias(table: Tensor, window: Window, regions: Tensor | None) -> Tensor:
    """What is added to the logits, position bias and regions together: (1 or N, n, T, T)."""
    bias = bias_of_pairs(table, window)[None]
    if regions is None:
        return bias
    kind = regions - PADDING
    return bias + penalties(table.device)[kind[:, :, None], kind[:, None, :]][:, None]


@kept(maxsize=8)
def penalties(device: torch.device) -> Tensor:
    """What is added to the logit of a query and a key, by the regions of both (padding first): (5, 5)."""
    costs = CROSS_REGION * (1 - torch.eye(5))
    costs[0, 1:] = costs[1:, 0] = UNREACHABLE
    return costs.to(device)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    return torch.compile(flex, dynamic=False)


def _forward_in_turns(
    qkv: Tensor, scale: Tensor, table: Tensor, regions: Tensor | None, window: Sequence[int], cosine: bool
) -> tuple[Tensor, Tensor]:
    """Returns the attention's output and by how much queries and keys were stretched, (2, n, W, T)."""
    out, stretch = torch.empty_like(qkv[2]), _stretch(qkv, scale, cosine=cosine)
    at_query, at_key = _region_vectors(qkv, regions)
    head_turns, window_turns, query_turns = _turns(qkv)
    with torch.autocast(qkv.device.type, enabled=False):
        for heads in head_turns:
            bias = bias_of_pairs(table[heads], (window[0], window[1]))
            for windows in window_turns:
                key = _append(_stretched(qkv[1], stretch[1], heads, windows), at_key, windows)
                value = _cut(qkv[2], heads, windows)
                for queries in query_turns:
                    query = _stretched(qkv[0], stretch[0], heads, windows, queries)
                    query = _append(query, at_query, windows, queries)
                    probabilities = _probabilities(query, key, bias[:, queries])
                    _part(out, heads, windows, queries).copy_(
                        _by_head(torch.bmm(value, probabilities.transpose(1, 2)), bias)
                    )
    return out, stretch


def _backward_in_turns(
    grad_out: Tensor,
    qkv: Tensor,
    scale: Tensor,
    table: Tensor,
    regions: Tensor | None,
    stretch: Tensor,
    window: Sequence[int],
    cosine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_qkv, grad_scale, grad_table = torch.empty_like(qkv), torch.zeros_like(scale), torch.empty_like(table)
    at_query, at_key = _region_vectors(qkv, regions)
    head_turns, window_turns, query_turns = _turns(qkv)
    size, one = (window[0], window[1]), scale.new_ones(1)
    with torch.autocast(qkv.device.type, enabled=False):
        for heads in head_turns:
            bias = bias_of_pairs(table[heads], size)
            grad_bias = torch.zeros_like(bias)
            for windows in window_turns:
                key, value = _stretched(qkv[1], stretch[1], heads, windows), _cut(qkv[2], heads, windows)
                seen = _append(key, at_key, windows)
                grad_keys, grad_values = [], []
                for queries in query_turns:
                    query = _stretched(qkv[0], stretch[0], heads, windows, queries)
                    sees = _append(query, at_query, windows, queries)
                    probabilities = _probabilities(sees, seen, bias[:, queries])
                    grad_x = _cut(grad_out, heads, windows, queries)
                    grad_values.append(torch.bmm(grad_x, probabilities))
                    grad = torch.bmm(grad_x.transpose(1, 2), value)
                    grad = torch.ops.aten._softmax_backward_data(grad, probabilities, -1, grad.dtype)  # of the logits
                    grad_bias[:, queries] += _by_head(grad, bias).sum(1)
                    grad_keys.append(torch.bmm(query, grad))
                    grad_query = torch.bmm(key, grad.transpose(1, 2))
                    along = (grad_query * query).sum(1, keepdim=True)
                    grad_scale[heads] += _by_head(along, bias).sum((1, 2, 3))
                    if cosine:
                        _lose(grad_query, query, along, scale[heads])
                    _through_stretch(grad_query, stretch[0], grad_qkv[0], heads, windows, queries)
                grad_key = _total(grad_keys)
                if cosine:
                    _lose(grad_key, key, (grad_key * key).sum(1, keepdim=True), one)
                _through_stretch(grad_key, stretch[1], grad_qkv[1], heads, windows)
                _part(grad_qkv[2], heads, windows).copy_(_by_head(_total(grad_values), bias))
            grad_table[heads] = table_of_pairs(grad_bias, size)
    return grad_qkv, grad_scale / scale, grad_table


_sequential = torch.library.custom_op("simmim::sequential_attention", _forward_in_turns, mutates_args=())
_sequential_backward = torch.library.custom_op(
    "simmim::sequential_attention_backward", _backward_in_turns, mutates_args=()
)

IN_TURNS: dict[Any, Callable[..., tuple[Tensor, ...]]] = {
    torch.ops.simmim.sequential_attention.default: _forward_in_turns,
    torch.ops.simmim.sequential_attention_backward.default: _backward_in_turns,
}
"""What each operation of sequential attention does, for those who count what is within."""


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.cosine = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad_out: Tensor, grad_stretch: Tensor) -> tuple[Tensor | None, ...]:
    return *_sequential_backward(grad_out, *ctx.saved_tensors, ctx.window, ctx.cosine), None, None, None


@_sequential.register_fake
def _(qkv: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    three, heads, _, windows, tokens = qkv.shape
    return torch.empty_like(qkv[2]), qkv.new_empty(three - 1, heads, windows, tokens, dtype=_precise(qkv.dtype))


@_sequential_backward.register_fake
def _(grad_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in inputs[:3])


_sequential.register_autograd(_backward, setup_context=_keep_for_backward)


def _turns(qkv: Tensor) -> tuple[list[slice], list[slice], list[slice]]:
    """What is taken at a time of heads, windows and queries, so that the logits of a turn stay in cache.

    Whole windows while they fit, of several heads where those of one leave room; else some queries of one window.
    """
    _, heads, _, windows, tokens = qkv.shape
    matrices = max(1, LOGITS_AT_A_TIME // tokens**2)
    at_a_time = (max(1, matrices // windows), matrices, max(1, LOGITS_AT_A_TIME // tokens))
    heads_turns, windows_turns, queries_turns = (
        [slice(at, min(at + step, length)) for at in range(0, length, step)]
        for length, step in zip((heads, windows, tokens), at_a_time, strict=True)
    )
    return heads_turns, windows_turns, queries_turns


def _part(x: Tensor, heads: slice, windows: slice, tokens: slice = ALL) -> Tensor:
    """What a turn takes of (n, d, W, T) as a view, (heads, windows, d, t)."""
    return x[heads, :, windows, tokens].transpose(1, 2)


def _cut(x: Tensor, heads: slice, windows: slice, tokens: slice = ALL) -> Tensor:
    """The same as matrices (m, d, t), in fp32."""
    return _promoted(_part(x, heads, windows, tokens).flatten(0, 1))


def _by_head(x: Tensor, heads: Tensor) -> Tensor:
    """The matrices of a turn under its heads: (m, ...) -> (heads, m / heads, ...)."""
    return x.view(len(heads), -1, *x.shape[1:])


def _stretch(qkv: Tensor, scale: Tensor, *, cosine: bool) -> Tensor:
    """By how much to stretch queries and keys: (2, n, W, T), fp32.

    For cosines to the lengths of scale and one; for dot products by scale and one.
    """
    if not cosine:
        return torch.stack([scale, torch.ones_like(scale)])[:, :, None, None].expand(qkv[:2, :, 0].shape).contiguous()
    at_a_time = max(1, LOGITS_AT_A_TIME // math.prod(qkv.shape[2:]))
    parts = [_promoted(x) for x in torch.split(qkv[:2].flatten(0, 1), at_a_time)]  # some heads at a time
    stretch = torch.cat([(x * x).sum(1) for x in parts]).clamp_(min=1e-24).rsqrt_()
    stretch[: len(scale)].mul_(scale[:, None, None])
    return stretch.view(2, -1, *stretch.shape[1:])


def _stretched(x: Tensor, stretch: Tensor, heads: slice, windows: slice, tokens: slice = ALL) -> Tensor:
    """Queries or keys of a turn at their new length: (m, d, t)."""
    part, by = _part(x, heads, windows, tokens), stretch[heads, windows, tokens].unsqueeze(2)
    out = by.new_empty(part.shape)
    torch.mul(part, by, out=out)
    return out.flatten(0, 1)


def _lose(grad: Tensor, x: Tensor, along: Tensor, length: Tensor) -> None:
    """Takes out of grad what it has along x, which is always at the length: a cosine does not see it."""
    share = _by_head(along, length) / -length.square()[:, None, None, None]
    grad.addcmul_(x, share.view_as(along))


def _through_stretch(
    grad: Tensor, stretch: Tensor, grad_in: Tensor, heads: slice, windows: slice, tokens: slice = ALL
) -> None:
    """The gradient of `_stretched`, written to grad_in."""
    place = _part(grad_in, heads, windows, tokens)
    place.copy_(grad.view(place.shape).mul_(stretch[heads, windows, tokens].unsqueeze(2)))


def _total(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _region_vectors(qkv: Tensor, regions: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Regions as more dimensions of queries and keys, (W, 5, T) each: no T x T mask is needed.

    A query holds 1 in the dimension of its own region, a key what it costs to be seen from each one.
    """
    if regions is None:
        return None, None
    costs = penalties(qkv.device)
    kind = (regions - PADDING).repeat(qkv.shape[3] // len(regions), 1)
    return torch.eye(len(costs), device=qkv.device)[kind].transpose(1, 2), costs[kind].transpose(1, 2)


def _append(x: Tensor, vectors: Tensor | None, windows: slice, tokens: slice = ALL) -> Tensor:
    """Further dimensions for the matrices of a turn: (m, d, t) -> (m, d + 5, t)."""
    if vectors is None:
        return x
    part = vectors[windows, :, tokens]
    return torch.cat([x, part.repeat(len(x) // len(part), 1, 1)], dim=1)


def _probabilities(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    """Softmax over the keys: (m, d, t), (m, d, T) and (heads, t, T) -> (m, t, T)."""
    logits = torch.bmm(query.transpose(1, 2), key)
    _by_head(logits, bias).add_(bias[:, None])
    return torch.softmax(logits, -1, out=logits)
