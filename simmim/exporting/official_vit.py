"""The authors' own layout of a Vision Transformer, as SimMIM pretrains and fine-tunes it; timm's BEiT reads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simmim.encoders.released_vit import to_simmim
from simmim.exporting.format import Reader
from simmim.exporting.model import Model, Outputs


def check(model: Model) -> None:
    """Refuses images that are not square.

    Raises:
        ValueError: With their size.
    """
    height, width = model.image_size
    if height != width:
        raise ValueError(f"format=official has square images alone, not {height}x{width} px: give format=safetensors")


def write(model: Model, path: Path) -> None:
    """Writes weights and the head: of a pretraining run as their SimMIM has them, else as their classifier."""
    check(model)
    encoder = to_simmim(model.weights)
    if model.decoder is not None:
        state = {f"encoder.{key}": value for key, value in encoder.items()}
        state |= {"decoder.0.weight": model.decoder.weight[:, :, None, None], "decoder.0.bias": model.decoder.bias}
    else:
        del encoder["mask_token"]
        state = {_norm_of(model, key): value for key, value in encoder.items()}
        state |= {f"head.{key}": value for key, value in (model.head or {}).items()}
    torch.save({"model": {key: value.contiguous() for key, value in state.items()}}, path)


def _norm_of(model: Model, key: str) -> str:
    """The norm of a classifier stands behind the mean, and has a name of its own."""
    return f"fc_{key}" if model.head is not None and key.startswith("norm.") else key


def readers(model: Model, path: Path) -> Mapping[str, Reader]:
    """By timm's BEiT, which names all alike."""
    from timm.models.beit import Beit

    config, shared = model.config, model.config["position_bias"] == "shared_table"
    network: Any = Beit(
        img_size=model.image_size,
        patch_size=config["patch_size"],
        in_chans=config["in_channels"],
        num_classes=len(model.classes or []),
        global_pool="" if model.head is None else "avg",
        embed_dim=config["embed_dim"],
        depth=config["depths"][0],
        num_heads=config["num_heads"][0],
        init_values=config["layer_scale"] or None,
        use_abs_pos_emb=False,
        use_rel_pos_bias=not shared,
        use_shared_rel_pos_bias=shared,
    )
    held = torch.load(path, weights_only=True)["model"]
    state = {key.removeprefix("encoder."): value for key, value in held.items() if not key.startswith("decoder.")}
    state.pop("mask_token", None)
    network.load_state_dict(state)
    network.eval()

    def outputs(images: Tensor) -> Outputs:
        patches = network.fc_norm(network.forward_features(images)[:, 1:])
        features = {"features": patches.unflatten(1, model.map_shape[1:3])}
        return features if model.head is None else {**features, "logits": network(images)}

    return {"timm": outputs}


def settings(model: Model) -> str:
    """What the authors' code wants to be told, as YAML: to fine-tune, whose blocks have a table each."""
    config = model.config
    return f"""\
DATA:
  IMG_SIZE: {model.image_size[0]}
MODEL:
  TYPE: vit
  NUM_CLASSES: {len(model.classes or [])}
  VIT:
    PATCH_SIZE: {config["patch_size"]}
    IN_CHANS: {config["in_channels"]}
    EMBED_DIM: {config["embed_dim"]}
    DEPTH: {config["depths"][0]}
    NUM_HEADS: {config["num_heads"][0]}
    INIT_VALUES: {config["layer_scale"] or None}
    USE_APE: False
    USE_RPB: True
    USE_SHARED_RPB: False
    USE_MEAN_POOLING: True"""
