"""Attention within windows in turns, each small enough for the caches of a CPU: two operations of PyTorch's own.

Shape letters: n heads, d channels a head, W windows of a batch, T tokens of a window, m matrices at a time, t queries.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from simmim.encoders.position_bias import bias_of_pairs, table_of_pairs
from simmim.encoders.similarity import Similarity, precise, promoted
from simmim.encoders.windows import PADDING, Window, penalties

LOGITS_AT_A_TIME = 2**21
"""Of the logits of a turn, 8 MB. Fewer take more turns, each with a price; more leave the caches of a CPU."""

ALL = slice(None)


def sequential_attention(
    qkv: Tensor, similarity: Similarity, table: Tensor, window: Window, regions: Tensor | None
) -> Tensor:
    """The same for some heads, windows and queries at a time, in fp32; no T x T matrix outlives its turn.

    The backward pass computes the probabilities again: it needs qkv, and the lengths of queries and keys.
    """
    x: Tensor = _sequential(qkv, similarity.scale, table, regions, window, similarity.cosine)[0]
    return x


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
    return torch.empty_like(qkv[2]), qkv.new_empty(three - 1, heads, windows, tokens, dtype=precise(qkv.dtype))


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
    return promoted(_part(x, heads, windows, tokens).flatten(0, 1))


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
    parts = [promoted(x) for x in torch.split(qkv[:2].flatten(0, 1), at_a_time)]  # some heads at a time
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
