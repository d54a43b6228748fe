"""Weights of Swin Transformer, V1 or V2, that others released: the authors' code, timm, transformers, torchvision.

Which of them wrote a file is told by the names in it. The architecture is that of the tensors; windows and image size
are what stored buffers or a `config.json` beside the file say, and stay unknown where neither does.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simmim.encoders import swin, swinv2
from simmim.encoders.attention_weights import COSINE, TABLE
from simmim.encoders.hub_config import Facts, facts_of_timm, facts_of_transformers
from simmim.encoders.names import (
    OFFICIAL,
    TIMM,
    TORCHVISION,
    TRANSFORMERS,
    Layout,
    from_official,
    from_timm,
    from_torchvision,
    from_transformers,
    is_buffer,
    without_prefix,
)
from simmim.encoders.released_vit import is_vision_transformer, read_vision_transformer
from simmim.encoders.stored_windows import stored_geometry
from simmim.encoders.swin import V1
from simmim.encoders.swinv2 import V2, SwinTransformerV2
from simmim.encoders.table_resizing import move_table
from simmim.encoders.tensor_files import CONFIG, PREPROCESSOR, read_json

State = Mapping[str, Tensor]

READERS: dict[str, Callable[[State], dict[str, Tensor]]] = {
    OFFICIAL.library: from_official,
    TIMM.library: from_timm,
    TRANSFORMERS.library: from_transformers,
    TORCHVISION.library: from_torchvision,
}

CLASSIFIERS = {
    OFFICIAL.library: "head.",
    TIMM.library: "head.fc.",
    TRANSFORMERS.library: "classifier.",
    TORCHVISION.library: "head.",
}
"""Where a linear classifier lies."""

OTHERS = {
    "cls_token": "a Vision Transformer (ViT), not of SimMIM",
    "class_token": "a Vision Transformer (ViT), not of SimMIM",
    "pos_embed": "a Vision Transformer (ViT)",
    "pos_embedding": "a Vision Transformer (ViT)",
}
"""What the last part of a name betrays."""

TOLD_BY = ("logit_scale", "relative_position_bias_table")
"""The ends of names that each version of Swin Transformer has."""

KEY_BIASES = ("qkv.bias", "key.bias")
"""The ends of names of what holds a bias of the keys."""

CLAIMS = ("embed_dim", "depths", "num_heads", "patch_size", "in_channels")
"""What both the tensors and a `config.json` say."""


def read_released(tree: Any, file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under our names, and what is known of them.

    Args:
        tree: What the file holds: a state dict, or one below `model` or `state_dict`.
        file: Where it lies, for a `config.json` beside it and for messages.

    Returns:
        As `simmim.encoders.encoder_files.read_encoder_weights`.

    Raises:
        ValueError: If it holds no Swin Transformer, or one that our encoder is not.
    """
    try:
        state = _state_of(tree)
        if is_vision_transformer(state):
            return read_vision_transformer(state, facts_of_timm(read_json(file.parent / CONFIG), stages=1))
        layout = _recognise(state)
        weights = READERS[layout.library](state)
        shape = _shape_of(weights)
        plain = without_prefix(state, layout)
        facts = _facts(plain, layout, shape, file.parent)
        known = _geometry(shape, facts)
        notes = _complete(weights, plain, layout)
        _make_room(weights, known)
        _check_complete(weights, known)
        head, classes = _classifier(plain, layout, facts)
    except ValueError as error:
        raise ValueError(f"encoder={file}: {error}") from error
    about = {key: facts.get(key) for key in ("mean", "std", "max_value", "test_crop", "interpolation")}
    return weights, {
        "origin": layout.library,
        "architecture": "swinv2",
        **known,
        **about,
        "head": head,
        "classes": classes,
        "decoder": _decoder(plain),
        "notes": notes,
    }


def _state_of(tree: Any) -> dict[str, Tensor]:
    """The state dict of a tree, without what DataParallel puts before each name."""
    for key in ("model", "state_dict"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    if not isinstance(tree, dict) or not tree or not all(isinstance(value, Tensor) for value in tree.values()):
        raise ValueError("it holds no state dict, neither bare nor below model or state_dict")
    parallel = all(str(key).startswith("module.") for key in tree)
    return {str(key).removeprefix("module.") if parallel else str(key): value for key, value in tree.items()}


def _recognise(state: State) -> Layout:
    """Whose names these are."""
    for key in state:
        if other := OTHERS.get(key.rpartition(".")[2]):
            raise ValueError(f"it holds {other} ({key}), and the encoder is a Swin Transformer")
    if not any(key.endswith(TOLD_BY) for key in state):
        raise ValueError(f"it holds no Swin Transformer that is known: its first name is {next(iter(state))}")
    if "features.0.0.weight" in state:
        return TORCHVISION
    if "embeddings.patch_embeddings.projection.weight" in without_prefix(state, TRANSFORMERS):
        return TRANSFORMERS
    plain = without_prefix(state, OFFICIAL)
    if "patch_embed.proj.weight" not in plain:
        raise ValueError(f"it holds no Swin Transformer that is known: its first name is {next(iter(state))}")
    opens = any(key.startswith("layers.1.downsample.") for key in plain) or "head.fc.weight" in plain
    return TIMM if opens and not any(key.startswith("layers.0.downsample.") for key in plain) else OFFICIAL


def _shape_of(weights: State) -> dict[str, Any]:
    """What the tensors say of the architecture."""
    patches = weights.get("embed.proj.weight")
    heads, norms = {}, []
    for key, value in weights.items():
        part = key.split(".")
        if key.endswith((COSINE, TABLE)):
            heads[int(part[1]), int(part[2])] = len(value)
        elif key.endswith("extra_norm.weight"):
            norms.append(int(part[2]) + 1)
    stages = max((stage for stage, _ in heads), default=-1) + 1
    if patches is None or patches.ndim != 4 or any((stage, 0) not in heads for stage in range(stages)):
        raise ValueError("it lacks the patch embedding, or the first block of a stage")
    if patches.shape[2] != patches.shape[3]:
        raise ValueError(f"its patches are {patches.shape[2]}x{patches.shape[3]} px, and the encoder's are square")
    return {
        "embed_dim": len(patches),
        "depths": [max(block for at, block in heads if at == stage) + 1 for stage in range(stages)],
        "num_heads": [heads[stage, 0] for stage in range(stages)],
        "extra_norm_every": min(norms, default=0),
        "patch_size": patches.shape[2],
        "in_channels": patches.shape[1],
        **(V2 if any(key.endswith(COSINE) for key in weights) else {key: V1[key] for key in V2}),
    }


def _facts(plain: State, layout: Layout, shape: Mapping[str, Any], folder: Path) -> Facts:
    """What buffers and the files beside say of the training."""
    stages, config = len(shape["depths"]), {}
    if layout in (TIMM, TRANSFORMERS):
        config = read_json(folder / CONFIG)
    facts: Facts = {}
    if layout is TIMM:
        facts = facts_of_timm(config, stages=stages)
    elif layout is TRANSFORMERS:
        name = "swinv2" if shape["position_bias"] == V2["position_bias"] else "swin"
        facts = facts_of_transformers(config, read_json(folder / PREPROCESSOR), stages=stages, model_type=name)
    if wrong := [key for key in CLAIMS if _plain(facts.get(key)) not in (None, shape[key])]:
        raise ValueError(f"its config.json has {wrong[0]}={facts[wrong[0]]}, and its tensors {shape[wrong[0]]}")
    return facts | stored_geometry(plain, layout, stages=stages, patch_size=shape["patch_size"])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _geometry(shape: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """Configuration, image size and windows: None where unknown."""
    size, windows, asked = (facts.get(key) for key in ("image_size", "windows", "window_sizes"))
    if windows is None and asked and size:
        maps = [[side // (shape["patch_size"] * 2**stage) for side in size] for stage in range(len(asked))]
        windows = [[min(pair) for pair in zip(*sides, strict=True)] for sides in zip(asked, maps, strict=True)]
    trained = facts.get("pretrained_windows")
    if windows is None or trained is None:  # windows alone would pass for those that the position bias counts in
        windows, trained = None, None
    else:
        trained = [given or own for given, own in zip(trained, windows, strict=True)]
    config = {
        **shape,
        "window_size": max((max(window) for window in asked or facts.get("windows") or []), default=None),
        "pretrained_window_size": None if trained == windows else [_short(window) for window in trained or []],
        "drop_path": 0.0,
        "attention": "auto",
        **(swinv2.RESIZING if shape["position_bias"] == V2["position_bias"] else swin.RESIZING),
    }
    return {"config": config, "image_size": size, "windows": windows}


def _short(window: list[int]) -> int | list[int]:
    return window[0] if window[0] == window[1] else window


def _make_room(weights: dict[str, Tensor], known: Mapping[str, Any]) -> None:
    """Tables of windows that shrink to their map become as large as the others, whose middle they are then."""
    for key in [key for key in weights if key.endswith(TABLE)]:
        window = ((weights[key].shape[1] + 1) // 2,) * 2
        room = max(known["config"]["window_size"] or 0, *window)
        weights[key] = move_table(weights[key], window, window, window_size=room, resizing="bicubic")


def _check_complete(weights: State, known: Mapping[str, Any]) -> None:
    """Refuses weights that the encoder of this configuration is not made of, and windows that it would not have."""
    config = known["config"]
    with torch.device("meta"):
        encoder = SwinTransformerV2(**config | {"window_size": config["window_size"] or 1})
    model = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    held = {key: tuple(value.shape) for key, value in weights.items()}
    if wrong := [key for key in model | held if model.get(key) != held.get(key)]:
        first = f"{wrong[0]} {held.get(wrong[0], 'missing')} (the encoder's: {model.get(wrong[0], 'none')})"
        raise ValueError(f"{len(wrong)} of its tensors are not those of a Swin Transformer, the first {first}")
    size, windows = known["image_size"], known["windows"]
    if size and windows and (ours := [list(window) for window in encoder.windows(*size)]) != windows:
        raise ValueError(f"its windows of {windows} tokens are not those of one window at {size} px, which are {ours}")


def _complete(weights: dict[str, Tensor], plain: State, layout: Layout) -> list[str]:
    """Adds a mask token where there is none; says what was left out or added, and why."""
    notes = []
    if buffers := sum(map(is_buffer, plain)):
        notes.append(f"{buffers} buffers were left out: they are computed")
    if any(key.startswith("decoder.") for key in plain):
        notes.append("its decoder was left out: it predicts pixels, and reconstruct alone needs it")
    if any(key.startswith(CLASSIFIERS[layout.library]) for key in plain):
        notes.append("its classifier was set aside: evaluate and finetune take it where the classes are the same")
    if any(key.endswith(KEY_BIASES) for key in plain):
        notes.append("its bias of keys was left out: it makes no difference to the softmax, or counts as zero")
    if layout is TORCHVISION:
        notes.append(
            "where a map is no whole number of windows, torchvision fills it up, and the encoder shrinks the window: "
            "another function"
        )
    if "mask_token" not in weights:
        patches, generator = weights["embed.proj.weight"], torch.Generator().manual_seed(0)
        token = torch.nn.init.trunc_normal_(torch.empty(len(patches)), std=0.02, generator=generator)
        weights["mask_token"] = token.to(patches.dtype)
        notes.append("the mask token starts anew: it has none")
    return notes


def _decoder(plain: State) -> dict[str, Tensor] | None:
    """SimMIM's linear head: a convolution of one pixel, whose outputs are the pixels of a token, channel by channel."""
    weight, bias = plain.get("decoder.0.weight"), plain.get("decoder.0.bias")
    return None if weight is None or bias is None else {"weight": weight.flatten(1), "bias": bias}


def _classifier(plain: State, layout: Layout, facts: Facts) -> tuple[dict[str, Tensor] | None, list[str] | None]:
    """The linear classifier and the names of its classes, or their numbers."""
    prefix = CLASSIFIERS[layout.library]
    weight, bias = plain.get(f"{prefix}weight"), plain.get(f"{prefix}bias")
    if weight is None or weight.ndim != 2:
        return None, None
    names = facts.get("classes") or []
    classes = names if len(names) == len(weight) else [str(number) for number in range(len(weight))]
    return {"weight": weight, "bias": torch.zeros_like(weight[:, 0]) if bias is None else bias}, classes
