"""Encoder weights on disk: a safetensors file whose metadata rebuild the encoder with nothing else in hand.

Checkpoints of a run are read likewise, and what others released, see `simmim.encoders.released`: which it is, the
content of a file decides, not its name.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from simmim.checkpoint_files import is_folder_of_shards, load, load_rest
from simmim.encoders import ENCODERS, Encoder, create_encoder
from simmim.encoders.released import read_released
from simmim.encoders.swinv2 import RESIZING, V2, SwinTransformerV2
from simmim.encoders.tensor_files import WEIGHTS, is_safetensors, read_pytorch, read_safetensors
from simmim.run_folder import ENCODER, list_checkpoints, whole_file

CHECKPOINT_PREFIXES = ("average.encoder.", "network.encoder.")
"""Where a training checkpoint's state dict keeps the encoder: the running average counts where there is one."""

HEAD = "head."
"""Where a file, and the network of a fine-tuned checkpoint, keep the classifier."""

BEFORE = V2 | RESIZING
"""What the configuration of older files of a Swin Transformer, which does not say, stands for."""

OURS: dict[str, Any] = {"origin": "simmim", "decoder": None, "notes": []}
"""Whose names a file has, and what was done to read it."""

OPTIONAL = ("mean", "std", "max_value", "classes", "test_crop", "interpolation")
"""What older files do not say."""


def save_encoder(
    encoder: Encoder,
    path: Path,
    *,
    image_size: tuple[int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_value: float | None = None,
    weights: Mapping[str, Tensor] | None = None,
    head: Mapping[str, Tensor] | None = None,
    classes: Sequence[str] | None = None,
    test_crop: float | None = None,
    interpolation: str | None = None,
) -> None:
    """Writes an encoder as safetensors, whole or not at all.

    The metadata hold its configuration, the image size, the windows of each stage at that size, which a later
    stage of training needs as `pretrained_window_size`, and how images are normalised.

    Args:
        encoder: What to save.
        path: The file, in a folder that exists.
        image_size: Height and width in pixels that the encoder was trained at.
        mean: Of each image channel, in units of `max_value`, as the images were normalised with; None where unknown.
        std: Standard deviation of each image channel, likewise.
        max_value: The pixel value that counts as 1; None where unknown, as in older files, which means 255.
        weights: Its state dict, where it is spread over processes; None takes the encoder's own.
        head: State dict of a linear classifier that stands on it, kept below `head.`.
        classes: Names of the classes that it tells apart.
        test_crop: Share of the short side that it was validated on.
        interpolation: How images were resized, "bicubic" or "bilinear".
    """
    metadata = {
        "format": "simmim",
        "architecture": encoder.architecture,
        "config": json.dumps(encoder.config),
        "image_size": json.dumps(image_size),
        "windows": json.dumps(encoder.windows(*image_size)),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "max_value": json.dumps(max_value),
        "classes": json.dumps(classes),
        "test_crop": json.dumps(test_crop),
        "interpolation": json.dumps(interpolation),
    }
    with whole_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives; safetensors would keep others out
        state = dict(encoder.state_dict() if weights is None else weights)
        state |= {f"{HEAD}{key}": value for key, value in (head or {}).items()}
        save_file({key: value.contiguous() for key, value in state.items()}, temporary, metadata)
        temporary.chmod(mode)


def read_encoder_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the weights of an encoder and what is known of it, without running any code of the file.

    Args:
        path: A run folder, a training checkpoint, an encoder file of ours, or what the authors of Swin Transformer,
            timm, transformers or torchvision wrote: a file of weights, or a folder with them and a `config.json`.

    Returns:
        The state dict, on the CPU, and the metadata: `origin`, "simmim" or who else named the weights; `architecture`;
        `config`, the arguments of its class, with None for a window that others do not say; `image_size` in
        pixels and `windows` of each stage in tokens, [height, width] each; `mean` and `std` of each image channel, in
        units of `max_value`; None where unknown; `head` and `classes` of the classifier, `test_crop` and
        `interpolation` of its validation, None where there is none. Of a file of others: `decoder`, the linear layer
        that predicts pixels in SimMIM, or None; `notes`, what was left out or added, in words.

    Raises:
        ValueError: If there are no weights of a Swin Transformer, they are damaged, or could run code.
    """
    file = find_encoder_file(path)
    if file.is_dir():
        return _read_checkpoint(file)
    if is_safetensors(file):
        weights, metadata = read_safetensors(file)
        return (
            _from_ours(weights, metadata, file) if metadata.get("format") == "simmim" else read_released(weights, file)
        )
    tree = read_pytorch(file)
    return _read_checkpoint(file) if _is_ours(tree) else read_released(tree, file)


def find_encoder_file(path: Path) -> Path:
    """The file to read: of a run folder its encoder.safetensors, else the checkpoint of the highest step.

    Of a folder that timm or transformers wrote: its weights.

    Raises:
        ValueError: If there is none.
    """
    if not path.exists():
        raise ValueError(f"encoder={path} does not exist: give a run folder, a checkpoint or a file of weights")
    if not path.is_dir() or is_folder_of_shards(path):
        return path
    files = [path / ENCODER, *list_checkpoints(path)[-1:], *(path / name for name in WEIGHTS)]
    found = next((file for file in files if file.exists()), None)
    if found is None:
        raise ValueError(
            f"encoder={path} is no folder with weights: it holds neither {ENCODER} nor a checkpoints/step_*.ckpt, as "
            f"a run does, nor {' or '.join(WEIGHTS)}"
        )
    return found


def trained_windows(metadata: Mapping[str, Any]) -> list[int | list[int]] | None:
    """The windows, one a stage, in which the position bias counts offsets: a later stage's `pretrained_window_size`.

    They stay those of the first stage of training: a later one hands them on. A table is moved instead, and has the
    windows of the last stage.

    Args:
        metadata: See `read_encoder_weights`.

    Returns:
        Sides in tokens, [height, width] where these differ; or None where they are unknown.
    """
    moved = metadata["config"]["position_bias"].endswith("table")
    given: list[int | list[int]] | None = metadata["config"].get("pretrained_window_size")
    if (given is not None and not moved) or metadata["windows"] is None:
        return given
    return [height if height == width else [height, width] for height, width in metadata["windows"]]


def _from_ours(
    weights: dict[str, Tensor], metadata: dict[str, str], file: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        values = {key: json.loads(metadata[key]) for key in ("config", "image_size", "windows")}
        values |= {key: json.loads(metadata.get(key, "null")) for key in OPTIONAL}
        architecture = metadata["architecture"]
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"encoder={file} is no encoder file of simmim: its metadata are damaged ({error})") from error
    if architecture not in ENCODERS:
        raise ValueError(
            f"encoder={file} holds an encoder of another kind than {' or '.join(ENCODERS)}: {architecture}"
        )
    if architecture == SwinTransformerV2.architecture:
        values["config"] = BEFORE | values["config"]
    head = {key: weights.pop(key) for key in [key for key in weights if key.startswith(HEAD)]}
    return weights, {
        **OURS,
        "architecture": architecture,
        "head": _named_below(HEAD, head) or None,
        **values,
    }


def _is_ours(tree: Any) -> bool:
    state = tree.get("state_dict") if isinstance(tree, dict) else None
    return isinstance(state, dict) and any(str(key).startswith(CHECKPOINT_PREFIXES) for key in state)


def _read_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        named = load_rest(file).get("state_dict", {})
        prefix = next((p for p in CHECKPOINT_PREFIXES if any(key.startswith(p) for key in named)), "")
        checkpoint = load(file, keep=f"/state_dict/{prefix}")
    except ValueError as error:
        raise ValueError(f"encoder={error}") from error
    if not prefix or "model" not in checkpoint.get("hyper_parameters", {}):
        raise ValueError(
            f"encoder={file} is no checkpoint of simmim: it lacks weights named {CHECKPOINT_PREFIXES[-1]}* or the "
            "hyper-parameter model"
        )
    settings = checkpoint["hyper_parameters"]
    head = None
    if "classes" in settings:  # else the head predicts pixels
        below = f"{prefix.removesuffix('encoder.')}{HEAD}"
        head = _named_below(below, load(file, keep=f"/state_dict/{below}")["state_dict"])
    weights = _named_below(prefix, checkpoint["state_dict"])
    with torch.device("meta"):
        encoder = create_encoder(**settings["model"])
    size = settings.get("image_size")
    windows = None if size is None else [list(window) for window in encoder.windows(*size)]
    return weights, {
        **OURS,
        "architecture": encoder.architecture,
        "config": encoder.config,
        "image_size": None if size is None else list(size),
        "windows": windows,
        "mean": settings.get("mean"),
        "std": settings.get("std"),
        "max_value": settings.get("max_value"),
        "head": head,
        "classes": settings.get("classes"),
        **{key: settings.get("preprocessing", {}).get(key) for key in ("test_crop", "interpolation")},
    }


def _named_below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
