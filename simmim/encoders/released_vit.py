"""Weights of a Vision Transformer as SimMIM's authors release them, and BEiT's alike: names, there and back."""

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from simmim.encoders.vit import SHARED, VisionTransformer

State = Mapping[str, Tensor]

TABLE = "relative_position_bias_table"
"""((2s - 1)^2 + 3, heads): offsets row by row for a map of s patches a side, then the pairs with the class token."""

NAMES = {
    r"patch_embed\.proj\.(weight|bias)": r"embed.\1",
    r"cls_token": r"class_token",
    r"mask_token": r"mask_token",
    r"(?:fc_)?norm\.(weight|bias)": r"norm.\1",
    r"blocks\.(\d+)\.norm([12])\.(weight|bias)": r"stages.0.\1.norm\2.\3",
    r"blocks\.(\d+)\.gamma_([12])": r"stages.0.\1.gamma\2",
    r"blocks\.(\d+)\.attn\.(q_bias|v_bias|qkv\.weight|proj\.weight|proj\.bias)": r"stages.0.\1.attention.\2",
    r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)": r"stages.0.\1.mlp.0.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(weight|bias)": r"stages.0.\1.mlp.2.\2",
    rf"rel_pos_bias\.{TABLE}": SHARED,
    rf"blocks\.(\d+)\.attn\.{TABLE}": rf"stages.0.\1.attention.{SHARED}",
}
"""Theirs to ours. A fine-tuned one, whose norm comes after the mean of the patches, calls it fc_norm."""

HEADS = ("head.", "decoder.", "lm_head.")
"""What is no part of the encoder: a classifier, what predicts pixels, and what BEiT predicts visual words with."""


def is_vision_transformer(state: State) -> bool:
    """Whether these are the names of a Vision Transformer with tables of relative positions, and no absolute ones."""
    names = {key.removeprefix("encoder.") for key in state}
    return "cls_token" in names and "pos_embed" not in names and any(name.endswith(TABLE) for name in names)


def read_vision_transformer(state: State, facts: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under our names, and what is known of them.

    Args:
        state: For which `is_vision_transformer` holds.
        facts: What a `config.json` beside it says of images and classes, see `simmim.encoders.hub_config`.

    Returns:
        As `simmim.encoders.encoder_files.read_encoder_weights`.

    Raises:
        ValueError: If a name is unknown, or the tensors are not those of one encoder.
    """
    plain = {key.removeprefix("encoder."): value for key, value in state.items()}
    weights, side = _renamed(plain)
    notes = []
    if buffers := sum(key.endswith("relative_position_index") for key in plain):
        notes.append(f"{buffers} buffers were left out: they are computed")
    if "decoder.0.weight" in plain:
        notes.append("its decoder was left out: it predicts pixels, and reconstruct alone needs it")
    head = _layer(plain, "head.")
    if head is not None and "fc_norm.weight" in plain:
        notes.append("its classifier was set aside: evaluate and finetune take it where the classes are the same")
    elif head is not None:
        head = None
        notes.append("its classifier was left out: it looks at the class token, and ours at the mean of the patches")
    if "mask_token" not in weights:
        generator = torch.Generator().manual_seed(0)
        token = torch.empty_like(weights["class_token"], dtype=torch.float32)
        weights["mask_token"] = nn.init.trunc_normal_(token, std=0.02, generator=generator)
        notes.append("the mask token starts anew: it has none")
    config = _config_of(weights, side)
    _check_complete(weights, config)
    pixels = side * config["patch_size"]
    names = facts.get("classes") or []
    if head is not None and len(names) != len(head["weight"]):
        names = [str(number) for number in range(len(head["weight"]))]
    return weights, {
        "origin": "the authors' code",
        "architecture": VisionTransformer.architecture,
        "config": config,
        "image_size": [pixels, pixels],
        "windows": [[side, side]],
        **{key: facts.get(key) for key in ("mean", "std", "max_value", "test_crop", "interpolation")},
        "head": head,
        "classes": None if head is None else names,
        "decoder": _layer(plain, "decoder.0."),
        "notes": notes,
    }


def to_simmim(weights: State) -> dict[str, Tensor]:
    """Names an encoder's weights as the authors' `VisionTransformerForSimMIM` does, without its `encoder.`."""
    renamed = {}
    for key, value in weights.items():
        if key.endswith(f"{SHARED}table"):
            pairs = weights[key.replace(f"{SHARED}table", f"{SHARED}class_token")]
            renamed[_theirs(key.removesuffix("table"))] = torch.cat([value.flatten(1), pairs], dim=1).t().contiguous()
        elif not key.endswith(f"{SHARED}class_token"):
            renamed[_theirs(key)] = value.view(1, 1, -1) if key in ("class_token", "mask_token") else value
    return renamed


def _theirs(key: str) -> str:
    """Their name of one of ours, as `NAMES` has it the other way round."""
    stem = key.replace("embed.", "patch_embed.proj.").replace("class_token", "cls_token")
    stem = stem.replace("stages.0.", "blocks.").replace(".gamma", ".gamma_").replace(".attention.", ".attn.")
    stem = stem.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.2.", ".mlp.fc2.")
    if stem == SHARED:
        return f"rel_pos_bias.{TABLE}"
    return stem.replace(f"attn.{SHARED}", f"attn.{TABLE}")


def _renamed(plain: State) -> tuple[dict[str, Tensor], int]:
    """Weights under our names, and the side of the map that the tables are for."""
    weights, sides = {}, set()
    for key, value in plain.items():
        if key.startswith(HEADS) or key.endswith("relative_position_index"):
            continue
        rule = next((rule for rule in NAMES if re.fullmatch(rule, key)), None)
        if rule is None:
            raise ValueError(f"{key} is nothing that SimMIM's Vision Transformer has")
        name = re.sub(rule, NAMES[rule], key)
        if name.endswith(SHARED):
            length = isqrt(len(value) - 3)
            if length**2 != len(value) - 3 or length % 2 == 0:
                raise ValueError(f"{key} of {len(value)} rows is for maps that are not square")
            sides.add((length + 1) // 2)
            weights[f"{name}table"] = value[:-3].t().reshape(-1, length, length)
            weights[f"{name}class_token"] = value[-3:].t().contiguous()
        else:
            weights[name] = value.flatten() if name in ("class_token", "mask_token") else value
    if len(sides) > 1:
        raise ValueError(
            f"its tables of positions are for maps of {' and '.join(map(str, sorted(sides)))} patches a side"
        )
    return weights, sides.pop()


def _config_of(weights: State, side: int) -> dict[str, Any]:
    patches, shared = weights.get("embed.weight"), f"{SHARED}table" in weights
    blocks = {int(key.split(".")[2]) for key in weights if key.startswith("stages.")}
    if patches is None or not blocks:
        raise ValueError("it lacks the patch embedding, or all blocks")
    tables = [value for key, value in weights.items() if key.endswith(f"{SHARED}table")]
    return {
        "embed_dim": len(patches),
        "depths": [max(blocks) + 1],
        "num_heads": [len(tables[0])],
        "window_size": side,
        "patch_size": patches.shape[2],
        "in_channels": patches.shape[1],
        "drop_path": 0.0,
        "attention": "auto",
        "position_bias": "shared_table" if shared else "table",
        "layer_scale": VisionTransformer.usual["layer_scale"] if "stages.0.0.gamma1" in weights else 0,
        "table_resizing": VisionTransformer.usual["table_resizing"],
    }


def _check_complete(weights: State, config: dict[str, Any]) -> None:
    """Refuses weights that the encoder of this configuration is not made of."""
    with torch.device("meta"):
        encoder = VisionTransformer(**config)
    model = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    held = {key: tuple(value.shape) for key, value in weights.items()}
    if wrong := [key for key in model | held if model.get(key) != held.get(key)]:
        first = f"{wrong[0]} {held.get(wrong[0], 'missing')} (the encoder's: {model.get(wrong[0], 'none')})"
        raise ValueError(f"{len(wrong)} of its tensors are not those of a Vision Transformer, the first {first}")


def _layer(plain: State, prefix: str) -> dict[str, Tensor] | None:
    """A linear layer below a prefix; a convolution of one pixel is one."""
    weight, bias = plain.get(f"{prefix}weight"), plain.get(f"{prefix}bias")
    return None if weight is None or bias is None else {"weight": weight.flatten(1), "bias": bias}
