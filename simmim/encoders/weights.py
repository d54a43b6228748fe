"""Encoder weights on disk, and their names in timm and transformers.

A file of ours is a safetensors file whose metadata rebuild the encoder with nothing else in hand. The
functions `to_*` and `from_*` rename a state dict, or a dict of gradients alike.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from simmim.checkpoint_files import load, load_rest
from simmim.encoders import SwinTransformerV2, create_encoder
from simmim.encoders.position_bias import move_table
from simmim.run_folder import ENCODER, list_checkpoints, whole_file

CHECKPOINT_PREFIXES = ("average.encoder.", "network.encoder.")
"""Where a training checkpoint's state dict keeps the encoder: the running average counts where there is one."""

HEAD = "head."
"""Where a file, and the network of a fine-tuned checkpoint, keep the classifier."""

SIZE_KEYS = ("embed_dim", "depths", "num_heads", "extra_norm_every", "patch_size", "in_channels")
"""Settings of an encoder that its weights' names and shapes depend on, whatever its position bias."""

BEFORE = {"position_bias": "log_cpb"}
"""What the configuration of older files, which does not say, stands for."""

OPTIONAL = ("mean", "std", "max_value", "classes", "test_crop", "interpolation")
"""What older files do not say."""

BUFFERS = ("relative_coords_table", "relative_position_index", "attn_mask", "k_bias")
"""What other libraries store, or once stored, though it can be recomputed."""

# Rules of renaming, ours to theirs: {s} stage, {b} block, {l} layer. What follows (.weight, .bias) stays.
TIMM_NAMES = {
    "embed.proj": "patch_embed.proj",
    "embed.norm": "patch_embed.norm",
    "merges.{s}.reduction": "layers.{s+1}.downsample.reduction",  # theirs opens the next stage
    "merges.{s}.norm": "layers.{s+1}.downsample.norm",
    "norm": "norm",
    "stages.{s}.{b}.attention.qkv": "layers.{s}.blocks.{b}.attn.qkv",
    "stages.{s}.{b}.attention.q_bias": "layers.{s}.blocks.{b}.attn.q_bias",
    "stages.{s}.{b}.attention.v_bias": "layers.{s}.blocks.{b}.attn.v_bias",
    "stages.{s}.{b}.attention.logit_scale": "layers.{s}.blocks.{b}.attn.logit_scale",
    "stages.{s}.{b}.attention.position_bias.mlp.{l}": "layers.{s}.blocks.{b}.attn.cpb_mlp.{l}",
    "stages.{s}.{b}.attention.proj": "layers.{s}.blocks.{b}.attn.proj",
    "stages.{s}.{b}.norm1": "layers.{s}.blocks.{b}.norm1",
    "stages.{s}.{b}.mlp.0": "layers.{s}.blocks.{b}.mlp.fc1",
    "stages.{s}.{b}.mlp.2": "layers.{s}.blocks.{b}.mlp.fc2",
    "stages.{s}.{b}.norm2": "layers.{s}.blocks.{b}.norm2",
}

TRANSFORMERS_NAMES = {
    "mask_token": "embeddings.mask_token",
    "embed.proj": "embeddings.patch_embeddings.projection",
    "embed.norm": "embeddings.norm",
    "merges.{s}.reduction": "encoder.layers.{s}.downsample.reduction",  # theirs closes the stage
    "merges.{s}.norm": "encoder.layers.{s}.downsample.norm",
    "norm": "layernorm",
    "stages.{s}.{b}.attention.query": "encoder.layers.{s}.blocks.{b}.attention.self.query",
    "stages.{s}.{b}.attention.key": "encoder.layers.{s}.blocks.{b}.attention.self.key",
    "stages.{s}.{b}.attention.value": "encoder.layers.{s}.blocks.{b}.attention.self.value",
    "stages.{s}.{b}.attention.logit_scale": "encoder.layers.{s}.blocks.{b}.attention.self.logit_scale",
    "stages.{s}.{b}.attention.position_bias.mlp.{l}": (
        "encoder.layers.{s}.blocks.{b}.attention.self.continuous_position_bias_mlp.{l}"
    ),
    "stages.{s}.{b}.attention.proj": "encoder.layers.{s}.blocks.{b}.attention.output.dense",
    "stages.{s}.{b}.norm1": "encoder.layers.{s}.blocks.{b}.layernorm_before",
    "stages.{s}.{b}.mlp.0": "encoder.layers.{s}.blocks.{b}.intermediate.dense",
    "stages.{s}.{b}.mlp.2": "encoder.layers.{s}.blocks.{b}.output.dense",
    "stages.{s}.{b}.norm2": "encoder.layers.{s}.blocks.{b}.layernorm_after",
}


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names an encoder's weights as timm's `SwinTransformerV2` does; it has no mask token, which is left out.

    Raises:
        ValueError: If a weight has no place there: the extra norms of H and G, or another position bias than log_cpb.
    """
    return _rename_ours({key: value for key, value in state.items() if key != "mask_token"}, TIMM_NAMES, "timm")


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names timm's weights as our encoder does: all but the mask token. The classifier (`head.`) is left out.

    Raises:
        ValueError: If a key is neither the encoder's, nor the classifier's, nor a buffer of the geometry. The
            authors' released files are such a case: their patch mergings close a stage.
    """
    return _rename_theirs(state, TIMM_NAMES, heads=("head.",), library="timm")


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names an encoder's weights as transformers' `Swinv2Model` does, made with `use_mask_token=True`.

    Raises:
        ValueError: If a weight has no place there: the extra norms of H and G, or another position bias than log_cpb.
    """
    return _rename_ours(_split_qkv(state), TRANSFORMERS_NAMES, "transformers")


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names the weights of transformers' `Swinv2Model` as our encoder does.

    Models with a head keep the encoder below `swinv2.`: that prefix goes, and so do the heads (`classifier.`,
    `decoder.`). The mask token is there if theirs has one.

    Raises:
        ValueError: If a key is neither the encoder's, nor a head's, nor a buffer of the geometry.
    """
    state = {key.removeprefix("swinv2."): value for key, value in state.items()}
    heads = ("classifier.", "decoder.")
    return _join_qkv(_rename_theirs(state, TRANSFORMERS_NAMES, heads=heads, library="transformers"))


def save_encoder(
    encoder: SwinTransformerV2,
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
        "architecture": "swinv2",
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


def load_encoder(path: Path) -> SwinTransformerV2:
    """Rebuilds an encoder from a file alone, on the CPU and in training mode like any new module.

    Args:
        path: What `read_encoder_weights` reads.

    Raises:
        ValueError: If there are no weights of ours, or they contradict their own configuration.
    """
    file = find_encoder_file(path)
    weights, metadata = read_encoder_weights(file)
    with torch.device("meta"):  # the initial values are never computed
        encoder = SwinTransformerV2(**metadata["config"])
    _check_fit(encoder, weights, metadata, file)
    encoder.to_empty(device="cpu").load_state_dict(weights)
    return encoder


def load_encoder_weights(encoder: SwinTransformerV2, path: Path, *, image_size: tuple[int, int]) -> str:
    """Loads weights into an encoder that exists, which keeps its own windows, stochastic depth and attention.

    A position bias that is a table is moved from the windows that it was trained with to those that the encoder has at
    the image size, once and for all: give the largest one, at which the fewest windows shrink to their map.

    Args:
        encoder: What to load into.
        path: What `read_encoder_weights` reads.
        image_size: Height and width in pixels that the encoder is going to see.

    Returns:
        One sentence for the log: what was loaded, from where, and how it was trained.

    Raises:
        ValueError: If there are no weights of ours, a name or shape differs, the position bias is of another kind, or
            the windows change and the model does not say which windows a continuous one was trained with.
    """
    file = find_encoder_file(path)
    weights, metadata = read_encoder_weights(file)
    trained = metadata["windows"]
    if trained is not None:
        weights = _move_tables(encoder, weights, trained, image_size)
    _check_fit(encoder, weights, metadata, file)
    if encoder.config["position_bias"] != "table":
        _check_windows(encoder, metadata, image_size, file)
    floats = {key: weight.to(torch.float32) for key, weight in weights.items()}
    encoder.load_state_dict(floats, assign=True)  # an encoder on the meta device has no memory to copy into
    parameters = sum(weight.numel() for weight in weights.values()) / 1e6
    report = f"Loaded all {len(weights)} tensors of the encoder ({parameters:.1f} M parameters) from {file}"
    if trained is None:
        return f"{report}, trained at an unknown image size."
    windows = ", ".join(map(_by, trained))
    return f"{report}, trained at {_by(metadata['image_size'])} px with windows of {windows} tokens."


def read_encoder_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the weights of an encoder and what is known of it, without running any code of the file.

    Args:
        path: A run folder, a training checkpoint (*.ckpt) or an encoder file of ours (*.safetensors).

    Returns:
        The state dict, on the CPU, and the metadata: `architecture`; `config`, the arguments of
        `SwinTransformerV2`; `image_size` in pixels and `windows` of each stage in tokens, [height, width]
        each; `mean` and `std` of each image channel, in units of `max_value`; None where unknown; `head` and `classes`
        of the classifier, `test_crop` and `interpolation` of its validation, None where there is none.

    Raises:
        ValueError: If nothing of ours is there, or it is damaged.
    """
    file = find_encoder_file(path)
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_checkpoint(file)


def trained_windows(metadata: Mapping[str, Any]) -> list[int | list[int]] | None:
    """The windows, one a stage, in which the position bias counts offsets: a later stage's `pretrained_window_size`.

    They stay those of the first stage of training: a later one hands them on.

    Args:
        metadata: See `read_encoder_weights`.

    Returns:
        Sides in tokens, [height, width] where these differ; or None where they are unknown.
    """
    given: list[int | list[int]] | None = metadata["config"]["pretrained_window_size"]
    if given is not None or metadata["windows"] is None:
        return given
    return [height if height == width else [height, width] for height, width in metadata["windows"]]


def load_head(head: nn.Module, metadata: Mapping[str, Any], classes: Sequence[str]) -> str:
    """Loads a classifier that was saved with an encoder, if it tells the same classes apart.

    Args:
        head: The linear classifier to load into.
        metadata: See `read_encoder_weights`.
        classes: Names of the classes in the order of the labels.

    Returns:
        One sentence for the log: whether it was kept, and if not, why.
    """
    if metadata["head"] is None:
        return f"The classifier of {len(classes)} classes starts anew: the file holds none."
    if metadata["classes"] != list(classes):
        return (
            f"The classifier of {len(classes)} classes ({', '.join(classes[:3])}, …) starts anew: the file's is of "
            f"{len(metadata['classes'])} others ({', '.join(metadata['classes'][:3])}, …), and was dropped."
        )
    own = {key: value.to(torch.float32, copy=True) for key, value in metadata["head"].items()}
    head.load_state_dict(own, assign=True)  # copies: a running average must not be the weights that it follows
    return f"The classifier of {len(classes)} classes was kept: they are the same."


def find_encoder_file(path: Path) -> Path:
    """The file to read: of a run folder its encoder.safetensors, else the checkpoint of the highest step.

    Raises:
        ValueError: If there is none, or the file is of another kind.
    """
    if path.is_dir() and path.suffix != ".ckpt":
        return _find_in_run(path)
    if not path.exists():
        raise ValueError(f"encoder={path} does not exist: give a run folder, a *.ckpt or a *.safetensors file")
    if path.suffix not in (".ckpt", ".safetensors"):
        raise ValueError(f"encoder={path} has an unknown ending: give a run folder, a *.ckpt or a *.safetensors file")
    return path


def _find_in_run(folder: Path) -> Path:
    if (folder / ENCODER).is_file():
        return folder / ENCODER
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise ValueError(
            f"encoder={folder} is no run folder with weights: it holds neither encoder.safetensors nor "
            "a file checkpoints/step_*.ckpt"
        )
    return checkpoints[-1]


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as reader:
            metadata = reader.metadata() or {}
            weights = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"encoder={file} cannot be read, perhaps it was cut short: {_first_line(error)}") from error
    if metadata.get("format") != "simmim":
        raise ValueError(f"encoder={file} was not written by simmim: its metadata lack the encoder's configuration")
    values = {key: json.loads(metadata[key]) for key in ("config", "image_size", "windows")}
    values |= {key: json.loads(metadata.get(key, "null")) for key in OPTIONAL}
    values["config"] = BEFORE | values["config"]
    head = {key: weights.pop(key) for key in [key for key in weights if key.startswith(HEAD)]}
    return weights, {"architecture": metadata["architecture"], "head": _named_below(HEAD, head) or None, **values}


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
        "architecture": "swinv2",
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


def _check_fit(encoder: SwinTransformerV2, weights: dict[str, Tensor], metadata: dict[str, Any], file: Path) -> None:
    theirs, ours = metadata["config"], encoder.config
    if (bias := theirs["position_bias"]) != ours["position_bias"]:
        raise ValueError(
            f"encoder={file} was trained with model.position_bias={bias}, and the model has {ours['position_bias']}: "
            f"give model.position_bias={bias}"
        )
    model = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    held = {key: tuple(value.shape) for key, value in weights.items()}
    wrong = [key for key in model | held if model.get(key) != held.get(key)]
    if not wrong:
        return
    sizes = [f"{key}={theirs[key]} (model: {ours[key]})" for key in SIZE_KEYS if theirs[key] != ours[key]]
    first = [f"{key} {held.get(key, 'missing')} (model: {model.get(key, 'none')})" for key in wrong[:2]]
    raise ValueError(
        f"encoder={file} does not fit the model: it holds {', '.join(sizes) or 'the same size'}; "
        f"{len(wrong)} tensors differ in name or shape, the first {', '.join(first)}: choose the model that "
        "it was trained as"
    )


def _move_tables(
    encoder: SwinTransformerV2, weights: dict[str, Tensor], trained: list[list[int]], image_size: tuple[int, int]
) -> dict[str, Tensor]:
    """Position biases that are tables for the encoder's windows; everything else as it is."""
    moved, now = dict(weights), encoder.windows(*image_size)
    for stage, (before, window) in enumerate(zip(trained, now, strict=False)):  # stages too many fit nowhere
        for key in weights:
            if key.startswith(f"stages.{stage}.") and key.endswith("position_bias.table"):
                moved[key] = move_table(
                    weights[key].float(), (before[0], before[1]), window, window_size=encoder.window_size
                )
    return moved


def _check_windows(
    encoder: SwinTransformerV2, metadata: Mapping[str, Any], image_size: tuple[int, int], file: Path
) -> None:
    """Refuses an encoder that would count the offsets of the position bias in other windows than the weights do."""
    theirs = trained_windows(metadata)
    ours = trained_windows({"config": encoder.config, "windows": encoder.windows(*image_size)})
    if theirs is not None and ours is not None and theirs != ours:
        sides = json.dumps(theirs, separators=(",", ":"))
        raise ValueError(
            f"encoder={file} was trained with windows of {', '.join(map(_by, theirs))} tokens, and the model has "
            f"{', '.join(map(_by, ours))}: give model.pretrained_window_size={sides}, or the position bias would "
            "mean other offsets"
        )


def _rename_ours(state: Mapping[str, Tensor], names: dict[str, str], library: str) -> dict[str, Tensor]:
    if other := next((key for key in state if ".position_bias." in key and ".position_bias.mlp." not in key), None):
        raise ValueError(f"{library} knows model.position_bias=log_cpb alone, and the encoder has {other}")
    complaint = f"the encoder has weights without a place in {library}, which lacks the extra norms of H and G"
    return _rename(state, list(names.items()), complaint)


def _rename_theirs(
    state: Mapping[str, Tensor], names: dict[str, str], *, heads: tuple[str, ...], library: str
) -> dict[str, Tensor]:
    needed = {
        key: value
        for key, value in state.items()
        if not key.startswith(heads) and key.rpartition(".")[2] not in BUFFERS
    }
    rules = [(theirs, ours) for ours, theirs in names.items()]
    return _rename(needed, rules, f"these are not the weights of a Swin V2 encoder of {library}: unknown keys")


def _rename(state: Mapping[str, Tensor], rules: list[tuple[str, str]], complaint: str) -> dict[str, Tensor]:
    names = {key: next(filter(None, (_translate(key, *rule) for rule in rules)), None) for key in state}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(f"{complaint}: {', '.join(unknown[:3])}{more}")
    return {name: state[key] for key, name in names.items() if name is not None}


def _translate(key: str, source: str, target: str) -> str | None:
    """The key in the form of target if it has the form of source; {s+1} is one more than {s}."""
    found = _pattern(source).fullmatch(key)
    if found is None:
        return None
    numbers = {slot: int(found[slot]) - int(f"{{{slot}+1}}" in source) for slot in "sbl" if f"{{{slot}" in source}
    if min(numbers.values(), default=0) < 0:
        return None
    for slot, number in numbers.items():
        target = target.replace(f"{{{slot}}}", str(number)).replace(f"{{{slot}+1}}", str(number + 1))
    return target + (found["leaf"] or "")


@lru_cache(maxsize=128)
def _pattern(template: str) -> re.Pattern[str]:
    escaped = template.replace(".", r"\.")
    return re.compile(re.sub(r"\{(\w)(\+1)?\}", r"(?P<\1>\\d+)", escaped) + r"(?P<leaf>\.weight|\.bias)?")


def _split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    split = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition("attention.")
        if leaf == "qkv.weight":
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                split[f"{stem}attention.{name}.weight"] = part
        elif leaf in ("q_bias", "v_bias"):
            split[f"{stem}attention.{'query' if leaf == 'q_bias' else 'value'}.bias"] = value
        else:
            split[key] = value.view(1, 1, -1) if key == "mask_token" else value
    return split


def _join_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition("attention.")
        if leaf == "query.weight":
            parts = [state[f"{stem}attention.{name}.weight"] for name in ("query", "key", "value")]
            joined[f"{stem}attention.qkv.weight"] = torch.cat(parts)
        elif leaf in ("query.bias", "value.bias"):
            joined[f"{stem}attention.{leaf[0]}_bias"] = value
        elif leaf not in ("key.weight", "value.weight"):
            joined[key] = value.flatten() if key == "mask_token" else value
    return joined


def _by(size: int | Iterable[int]) -> str:
    return f"{size}x{size}" if isinstance(size, int) else "x".join(map(str, size))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
