"""`python -m simmim.inspect <file or folder>`: what weights are, and what one must say to use them.

Of run folders, checkpoints and encoder files of ours, and of what the authors of Swin Transformer, timm,
transformers and torchvision wrote. Nothing is computed, and no code of a file is run.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from simmim.checkpoint_files import load_rest
from simmim.command import command
from simmim.config import Config
from simmim.encoders import ENCODERS, PUBLISHED
from simmim.encoders.encoder_files import find_encoder_file, read_encoder_weights, trained_windows
from simmim.encoders.swinv2 import V2
from simmim.encoders.tensor_files import is_safetensors
from simmim.encoders.weights import unsaid
from simmim.run_folder import list_checkpoints, shown, step_of

log = logging.getLogger(__name__)

WIDTH = 11
"""Of the first column."""

STUDIED = ("position_bias", "table_resizing")
"""What may differ in an encoder of a published size."""


def inspect(config: Config) -> dict[str, Any]:
    """Says what a file or folder of weights is.

    Args:
        config: The composed `conf/inspect.yaml`.

    Returns:
        What is said, by the words of the first column.

    Raises:
        ValueError: If there are no weights of a Swin Transformer, or they could run code.
    """
    path = Path(config["encoder"])
    file = find_encoder_file(path)
    weights, known = read_encoder_weights(path)
    said = {
        "file": _file(file, known),
        "run": _run(path),
        "encoder": _encoder(weights, known),
        "trained": _training(known),
        "images": _images(known),
        "classifier": _classifier(known),
        "decoder": _decoder(file, known),
        "notes": known["notes"],
        "missing": [f"give {key}=<{kind}>" for key, kind in unsaid(known).items()],
    }
    for word, lines in said.items():
        for number, line in enumerate(lines):
            log.info(f"{word if number == 0 else '':<{WIDTH}}{line}")
    log.info(_next(path, known))
    return said


def _file(file: Path, known: dict[str, Any]) -> list[str]:
    parts = file.rglob("*") if file.is_dir() else [file]
    size = sum(part.stat().st_size for part in parts if part.is_file())
    kind = "a folder of shards" if file.is_dir() else "safetensors" if is_safetensors(file) else "a PyTorch file"
    return [f"{shown(file)}, {size / 1e6:,.1f} MB, {kind}, named as {known['origin']} does"]


def _run(path: Path) -> list[str]:
    """What else lies in a run folder."""
    steps = [step_of(checkpoint) for checkpoint in list_checkpoints(path)] if path.is_dir() else []
    return [f"{shown(path)}, with checkpoints of the steps {_listed(steps)}"] if steps else []


def _encoder(weights: dict[str, Tensor], known: dict[str, Any]) -> list[str]:
    config = known["config"]
    parameters = sum(value.numel() for value in weights.values())
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in weights.values()})
    extra = f", an extra norm every {config['extra_norm_every']} blocks" if config.get("extra_norm_every") else ""
    return [
        f"{_published(known)}, {parameters / 1e6:,.1f} M parameters, {' and '.join(kinds)}",
        f"embed_dim {config['embed_dim']}, depths {_listed(config['depths'])}, heads {_listed(config['num_heads'])}"
        f"{extra}, patches of {config['patch_size']} px, {config['in_channels']} channels",
    ]


def _published(known: dict[str, Any]) -> str:
    """The name of the published size."""
    for name, size in PUBLISHED[known["architecture"]].items():
        shape = {key: list(value) if isinstance(value, tuple) else value for key, value in size.items()}
        if all(known["config"][key] == value for key, value in shape.items() if key not in STUDIED):
            return name
    return f"a {ENCODERS[known['architecture']].title} of no published size"


def _training(known: dict[str, Any]) -> list[str]:
    config, size, windows = known["config"], known["image_size"], known["windows"]
    trained = trained_windows(known)
    seen = _listed(map(_by, windows)) if windows else config["window_size"]
    version = {key: config[key] for key in ("norm", "attention_similarity") if key in config}
    lines = [
        f"at {f'{_by(size)} px' if size else 'an unknown image size'}, "
        f"{f'windows of {seen} tokens' if seen else 'with unknown windows'}",
        f"position bias {config['position_bias']}",
    ]
    if not version.items() <= V2.items():
        lines.append(", ".join(f"{key} {value}" for key, value in version.items()))
    if config["position_bias"] in ("log_cpb", "linear_cpb"):
        counted = f"windows of {_listed(map(_by, trained))} tokens" if trained else "windows that are unknown"
        lines[1] += f", which counts in {counted}"
    return lines


def _images(known: dict[str, Any]) -> list[str]:
    if known["mean"] is None or known["std"] is None:
        return ["mean and std unknown: ImageNet's are taken, or give data.mean=… data.std=…"]
    crop = f", validated on the middle {known['test_crop']:.1%}" if known["test_crop"] else ""
    resized = f", resized {known['interpolation']}" if known["interpolation"] else ""
    return [f"mean {_listed(known['mean'])}, std {_listed(known['std'])}{crop}{resized}"]


def _classifier(known: dict[str, Any]) -> list[str]:
    classes = known["classes"]
    if known["head"] is None or classes is None:
        return ["none"]
    more = ", …" if len(classes) > 3 else ""
    return [f"{len(classes):,} classes: {', '.join(classes[:3])}{more}"]


def _decoder(file: Path, known: dict[str, Any]) -> list[str]:
    """The head that predicts pixels: a checkpoint of ours keeps it, and those of others their own."""
    if known["origin"] != "simmim":
        return [
            "none"
            if known["decoder"] is None
            else "a linear head that predicts pixels, of a target that it does not say"
        ]
    settings = {} if _is_encoder_alone(file) else load_rest(file)["hyper_parameters"]
    if "objective" not in settings:
        return ["none"]
    objective = settings["objective"]
    return [f"a {objective['head']} head that predicts {objective['target']} pixels"]


def _is_encoder_alone(file: Path) -> bool:
    return file.is_file() and is_safetensors(file)


def _next(path: Path, known: dict[str, Any]) -> str:
    given = "".join(f" {key}=…" for key in unsaid(known))
    job = "evaluate" if known["head"] is not None else "embed"
    images = "data=folder data.root=<images>" if job == "evaluate" else "images=<folder>"
    return f"next: python -m simmim.{job} encoder={shown(path)} {images}{given}"


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _by(size: int | Sequence[int]) -> str:
    return f"{size}x{size}" if isinstance(size, int) else "x".join(map(str, size))


if __name__ == "__main__":
    command(inspect, positional="encoder")()
