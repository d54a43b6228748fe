"""What an attention is made of, as libraries keep it: its queries, keys and values together or apart, its bias flat.

Of both versions of Swin Transformer: by what an attention holds, no library says it otherwise. Shape letters: h, w
window in tokens; n heads.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

ATTENTION = "attention."
COSINE, TABLE = "logit_scale", "position_bias.table"
"""In an attention of ours: what V2 alone has, and what V1 alone has."""

WHOLE, APART = ("qkv.weight", "q_bias", "v_bias"), ("query", "key", "value")
"""What an attention of ours makes queries, keys and values of, and how they are called where each has its own."""

State = dict[str, Tensor]


def in_attentions(state: Mapping[str, Tensor], change: Callable[[State], State]) -> dict[str, Tensor]:
    """Changes what lies in each attention, by the last parts of its names; all else stays."""
    changed: dict[str, Tensor] = {}
    inside: dict[str, State] = {}
    for key, value in state.items():
        stem, found, leaf = key.rpartition(ATTENTION)
        (inside.setdefault(stem, {}) if found else changed)[leaf] = value
    for stem, leaves in inside.items():
        changed |= {f"{stem}{ATTENTION}{leaf}": value for leaf, value in change(leaves).items()}
    return changed


def packed(leaves: State, *, qkv: str) -> State:
    """What an attention of ours holds, as a library keeps it.

    Args:
        leaves: By the last parts of their names.
        qkv: See `simmim.encoders.names.Layout`.
    """
    first = COSINE not in leaves
    theirs = {leaf: value for leaf, value in leaves.items() if leaf not in (*WHOLE, TABLE)}
    if TABLE in leaves:
        theirs[TABLE] = leaves[TABLE].flatten(1).t()  # (n, 2h - 1, 2w - 1) -> (offsets, n)
    weight, query, value = (leaves[leaf] for leaf in WHOLE)
    biases = [query, torch.zeros_like(query), value]
    if qkv == "apart":
        theirs |= {f"{name}.weight": part for name, part in zip(APART, weight.chunk(3), strict=True)}
        theirs |= {f"{name}.bias": bias for name, bias in zip(APART, biases, strict=True) if first or name != "key"}
    elif first or qkv == "one bias":
        theirs |= {"qkv.weight": weight, "qkv.bias": torch.cat(biases)}
    else:
        theirs |= dict(zip(WHOLE, (weight, query, value), strict=True))
    return theirs


def unpacked(leaves: State) -> State:
    """What a library keeps of an attention, as ours holds it: without a bias of the keys.

    Raises:
        ValueError: If a table is of no square window.
    """
    ours = {leaf: value for leaf, value in leaves.items() if leaf.partition(".")[0] not in APART}
    if all(f"{name}.weight" in leaves for name in APART):
        ours["qkv.weight"] = torch.cat([leaves[f"{name}.weight"] for name in APART])
    ours |= {f"{name[0]}_bias": leaves[f"{name}.bias"] for name in ("query", "value") if f"{name}.bias" in leaves}
    if "qkv.bias" in ours:
        ours["q_bias"], _, ours["v_bias"] = ours.pop("qkv.bias").chunk(3)
    if TABLE in ours:
        ours[TABLE] = _square(ours[TABLE])
    return ours


def _square(table: Tensor) -> Tensor:
    """(offsets, n) -> (n, side, side)."""
    side = math.isqrt(len(table))
    if side**2 != len(table) or side % 2 == 0:
        raise ValueError(f"its position biases are tables of {len(table)} offsets, and no square window has so many")
    return table.t().reshape(-1, side, side)
