"""Loading weights into an encoder, and a classifier that stands on it: all of them, or a refusal that says why."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simmim.encoders import ENCODERS, Encoder, settings_of
from simmim.encoders.encoder_files import find_encoder_file, read_encoder_weights, trained_windows
from simmim.encoders.table_resizing import move_table
from simmim.encoders.vit import spread_table

SIZE_KEYS = ("embed_dim", "depths", "num_heads", "extra_norm_every", "layer_scale", "patch_size", "in_channels")
"""Settings of an encoder that its weights' names and shapes depend on, whatever its position bias."""

UNSAID = {
    "model.window_size": "tokens",
    "model.pretrained_window_size": "tokens, one number or one a stage as [12,12,12,6]",
    "data.image_size": "px",
}
"""What a file of others may not say, and what to give then."""


def load_encoder(
    path: Path,
    *,
    window_size: int | None = None,
    pretrained_window_size: int | Sequence[int | Sequence[int]] | None = None,
) -> Encoder:
    """Rebuilds an encoder from a file alone, on the CPU and in training mode like any new module.

    Args:
        path: What `simmim.encoders.encoder_files.read_encoder_weights` reads.
        window_size: Side of the window in tokens, instead of the file's; of one that does not say it, needed. Not for a
            position bias that is a table: `load_encoder_weights` moves it.
        pretrained_window_size: Those in which a continuous position bias counts, see the class of the encoder; None
            takes those that it was trained with, whatever the size of the images to come.

    Raises:
        ValueError: If there are no weights, they contradict their own configuration, or a window is unknown.
    """
    weights, metadata = read_encoder_weights(path)
    continuous = metadata["config"]["position_bias"].endswith("cpb")
    trained = pretrained_window_size
    if trained is None and (continuous or window_size is not None):
        trained = trained_windows(metadata)
    given = {"window_size": window_size, "pretrained_window_size": trained}
    check_said(path, metadata, {f"model.{key}": value for key, value in given.items()})
    known = settings_of(metadata["architecture"])
    config = metadata["config"] | {key: value for key, value in given.items() if value is not None and key in known}
    with torch.device("meta"):  # the initial values are never computed
        encoder = ENCODERS[metadata["architecture"]](**config)
    _check_fit(encoder, weights, metadata, find_encoder_file(path))
    encoder.to_empty(device="cpu").load_state_dict(weights)
    return encoder


def load_encoder_weights(encoder: Encoder, path: Path, *, image_size: tuple[int, int]) -> str:
    """Loads weights into an encoder that exists, which keeps its own windows, stochastic depth and attention.

    A table of position biases that all blocks share is given to each of them, where the encoder has one for each
    (`simmim.encoders.vit.spread_table`). A position bias that is a table is moved from the windows that it was trained
    with to those that the encoder has at the image size, once and for all: give the largest one, at which the fewest
    windows shrink to their map. The encoder's `table_resizing` says how.

    Args:
        encoder: What to load into.
        path: What `simmim.encoders.encoder_files.read_encoder_weights` reads.
        image_size: Height and width in pixels that the encoder is going to see.

    Returns:
        For the log: what was loaded, from where, how it was trained; of a file of others, what was left out or added.

    Raises:
        ValueError: If there are no weights, a name or shape differs, the position bias is of another kind, or
            the windows change and the model does not say which windows a continuous one was trained with.
    """
    file = find_encoder_file(path)
    weights, metadata = read_encoder_weights(file)
    if (encoder.config["position_bias"], metadata["config"]["position_bias"]) == ("table", "shared_table"):
        weights, metadata = _spread(weights, metadata)
    trained, notes = metadata["windows"], list(metadata["notes"])
    if trained is not None:
        weights, moved = _move_tables(encoder, weights, trained, image_size)
        notes += [f"{moved} position tables were moved, {encoder.config['table_resizing']}"] if moved else []
    if metadata["head"] is not None and metadata["origin"] == "simmim":  # of others, a note says so already
        notes.append(f"beside it lies a classifier of {len(metadata['head']['weight'])} classes")
    _check_fit(encoder, weights, metadata, file)
    if encoder.counts_in_trained_windows:
        given = encoder.config["pretrained_window_size"]
        check_said(file, metadata, {"model.pretrained_window_size": given})
        _check_windows(encoder, metadata, image_size, file)
    floats = {key: weight.to(torch.float32).contiguous() for key, weight in weights.items()}  # FSDP2 shards no others
    encoder.load_state_dict(floats, assign=True)  # an encoder on the meta device has no memory to copy into
    parameters = sum(weight.numel() for weight in weights.values()) / 1e6
    report = f"Loaded all {len(weights)} tensors of the encoder ({parameters:.1f} M parameters) from {file}"
    if metadata["origin"] != "simmim":
        report += f", named as {metadata['origin']} does"
    size, windows = metadata["image_size"], ", ".join(map(_by, trained or []))
    report += f", trained at {_by(size)} px" if size else ", trained at an unknown image size"
    report += f" with windows of {windows} tokens" if windows else ""
    return ". ".join([report, *(f"{note[0].upper()}{note[1:]}" for note in notes)]) + "."


def unsaid(metadata: Mapping[str, Any]) -> dict[str, str]:
    """What a file of others does not say of its training: the keys to give, and of what kind each is.

    Args:
        metadata: See `simmim.encoders.encoder_files.read_encoder_weights`.
    """
    if metadata["origin"] == "simmim":  # what its older files lack is what is usual
        return {}
    known = {
        "model.window_size": metadata["config"]["window_size"],
        "model.pretrained_window_size": trained_windows(metadata),
        "data.image_size": metadata["image_size"],
    }
    return {key: UNSAID[key] for key, value in known.items() if value is None}


def check_said(path: Path, metadata: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuses weights of others of whose training something is unknown: nothing is guessed.

    Args:
        path: Where they are.
        metadata: See `simmim.encoders.encoder_files.read_encoder_weights`.
        given: What the user says of the keys of `unsaid` that matter; None for what is left to the file.

    Raises:
        ValueError: With the keys to give.
    """
    if lacking := {key: kind for key, kind in unsaid(metadata).items() if key in given and given[key] is None}:
        ways = " ".join(f"{key}=<{kind}>" for key, kind in lacking.items())
        raise ValueError(
            f"encoder={path}, named as {metadata['origin']} does, does not say how it was trained: give {ways}"
        )


def check_architecture(path: Path, metadata: Mapping[str, Any], architecture: str) -> None:
    """Refuses weights of another architecture than that of the model.

    Args:
        path: Where they are.
        metadata: See `simmim.encoders.encoder_files.read_encoder_weights`.
        architecture: That of the model.

    Raises:
        ValueError: With both.
    """
    if (theirs := metadata["architecture"]) != architecture:
        raise ValueError(
            f"encoder={path} holds a {ENCODERS[theirs].title}, and the model is a {ENCODERS[architecture].title}: give "
            f"model={theirs}_…, as it was trained"
        )


def load_head(head: nn.Module, metadata: Mapping[str, Any], classes: Sequence[str]) -> str:
    """Loads a classifier that was saved with an encoder, if it tells the same classes apart.

    Args:
        head: The linear classifier to load into.
        metadata: See `simmim.encoders.encoder_files.read_encoder_weights`.
        classes: Names of the classes in the order of the labels.

    Returns:
        One sentence for the log: whether it was kept, and if not, why.
    """
    if metadata["head"] is None:
        return f"The classifier of {len(classes)} classes starts anew: the file holds none."
    if sorted(metadata["classes"]) != sorted(classes):
        return (
            f"The classifier of {len(classes)} classes ({_first(classes)}) starts anew: the file's is of "
            f"{len(metadata['classes'])} others ({_first(metadata['classes'])}), and was dropped."
        )
    rows = [metadata["classes"].index(name) for name in classes]
    own = {key: value.to(torch.float32)[rows] for key, value in metadata["head"].items()}
    head.load_state_dict(own, assign=True)  # copies: a running average must not be the weights that it follows
    moved = "" if metadata["classes"] == list(classes) else ", in another order"
    return f"The classifier of {len(classes)} classes was kept: they are the same{moved}."


def _check_fit(encoder: Encoder, weights: dict[str, Tensor], metadata: dict[str, Any], file: Path) -> None:
    check_architecture(file, metadata, encoder.architecture)
    theirs, ours = metadata["config"], encoder.config
    if other := next((key for key in encoder.words if theirs[key] != ours[key]), None):
        raise ValueError(
            f"encoder={file} was trained with model.{other}={theirs[other]}, and the model has {ours[other]}: "
            f"give model.{other}={theirs[other]}"
        )
    model = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    held = {key: tuple(value.shape) for key, value in weights.items()}
    wrong = [key for key in model | held if model.get(key) != held.get(key)]
    if not wrong:
        return
    keys = [key for key in SIZE_KEYS if theirs.get(key) != ours.get(key)]
    sizes = [f"{key}={theirs[key]} (model: {ours[key]})" for key in keys]
    first = [f"{key} {held.get(key, 'missing')} (model: {model.get(key, 'none')})" for key in wrong[:2]]
    raise ValueError(
        f"encoder={file} does not fit the model: it holds {', '.join(sizes) or 'the same size'}; "
        f"{len(wrong)} tensors differ in name or shape, the first {', '.join(first)}: choose the model that "
        "it was trained as"
    )


def _move_tables(
    encoder: Encoder, weights: dict[str, Tensor], trained: list[list[int]], image_size: tuple[int, int]
) -> tuple[dict[str, Tensor], int]:
    """Position biases that are tables for the encoder's windows, everything else as it is; how many were resized.

    A table that no block holds is shared by all of them, which are one stage.
    """
    moved, resized, now = dict(weights), 0, encoder.windows(*image_size)
    for stage, (before, window) in enumerate(zip(trained, now, strict=False)):  # stages too many fit nowhere
        for key in weights:
            if key.startswith((f"stages.{stage}.", "position_bias.")) and key.endswith("position_bias.table"):
                moved[key] = move_table(
                    weights[key].float(),
                    (before[0], before[1]),
                    window,
                    window_size=encoder.window_size,
                    resizing=encoder.config["table_resizing"],
                )
                resized += (before[0], before[1]) != window
    return moved, resized


def _spread(weights: dict[str, Tensor], metadata: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights whose blocks have each its own copy of the table that they share, and metadata that say so."""
    spread = spread_table(weights, metadata["config"]["depths"][0])
    note = "the position bias that all blocks shared was given to each of them"
    config = metadata["config"] | {"position_bias": "table"}
    return spread, metadata | {"config": config, "notes": [*metadata["notes"], note]}


def _check_windows(encoder: Encoder, metadata: Mapping[str, Any], image_size: tuple[int, int], file: Path) -> None:
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


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _by(size: int | Iterable[int]) -> str:
    return f"{size}x{size}" if isinstance(size, int) else "x".join(map(str, size))
