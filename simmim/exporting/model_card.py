"""The model card: what a model is, what it has seen, what it is worth, and how to load it. Markdown."""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simmim.exporting.format import Format
from simmim.exporting.model import Model
from simmim.run_folder import CHECKPOINTS, ENCODER

CARD = "MODEL_CARD.md"

RECIPE = (
    *("encoder", "seed", "trainer.max_epochs", "trainer.max_steps", "trainer.precision"),
    *("trainer.accumulate_grad_batches", "data.batch_size", "data.global_batch_size", "data.crop_scale"),
    *("optimizer.base_lr", "optimizer.weight_decay", "optimizer.betas", "optimizer.layer_decay"),
    *("optimizer.clip_grad_norm", "optimizer.ema_decay", "schedule.name", "schedule.warmup_epochs"),
    *("model.drop_path", "masking.strategy", "masking.patch_size", "masking.ratio", "objective.target"),
    *("objective.loss", "objective.head", "objective.predict", "augmentation.randaugment", "augmentation.color_jitter"),
    *("augmentation.erasing", "augmentation.mixup", "augmentation.cutmix", "label_smoothing"),
)
"""What the card says of a run's settings, where the run has them: `encoder` is what it started from."""

ARCHITECTURES = {
    1: "Swin Transformer (arXiv 2103.14030)",
    2: "Swin Transformer V2 (arXiv 2111.09883)",
    None: "Swin Transformer, between its versions",
}
"""Of Swin Transformers, by version."""

DATA = ("data.source", "data.root", "data.train_images", "data.label_fraction")
"""What it says of the images. Of paths only the last part: the rest is the machine's."""


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Args:
        encoder: What was exported, as it was typed.
        config: Settings of its run; None where they are unknown.
        run: Folder of its run, likewise.
        license: Of the weights, in the words of whoever exports them.
    """

    encoder: str
    config: Mapping[str, Any] | None
    run: Path | None
    license: str

    @property
    def metrics(self) -> dict[str, str]:
        """The last value of each of the run's metrics."""
        file = self.run / "metrics.csv" if self.run else None
        if file is None or not file.is_file():
            return {}
        with file.open() as lines:
            rows = list(csv.DictReader(lines))
        return {key: value for row in rows for key, value in row.items() if value}


def find_run(path: Path) -> Path | None:
    """The run folder that a run folder, one of its checkpoints or its encoder file belongs to; None if to none."""
    folder = path.parent if path.name == ENCODER else path.parent.parent if path.parent.name == CHECKPOINTS else path
    return folder if (folder / "config.yaml").is_file() else None


def card_of(model: Model, form: Format, origin: Origin, checks: Iterable[str], path: str) -> str:
    """The card of an export.

    Args:
        model: What was exported.
        form: How.
        origin: Where it comes from.
        checks: What its verification said.
        path: Where it lies, as the code of the card names it.
    """
    return "\n".join(
        [
            f"# {Path(path).name}: {_kind(model)}\n",
            f"Licence of the weights: **{origin.license}**\n",
            _table(_facts(model)),
            "## Data\n",
            _of_run(origin, DATA),
            "## Recipe\n",
            _of_run(origin, RECIPE),
            "## Metrics\n",
            "Of the run's last validation and step, as its metrics.csv has them.\n",
            _table(origin.metrics) if origin.metrics else "Unknown: no metrics.csv lay beside the weights.\n",
            "## Preprocessing\n",
            _preprocessing(model),
            f"## How to load it: {form.name}\n",
            form.usage(model, path),
            "## How it was checked\n",
            "\n".join(f"* {check}" for check in checks) + "\n",
            "## How to share it\n",
            _sharing(form, path),
        ]
    )


def _kind(model: Model) -> str:
    name = f"a {model.encoder.title}" + (f" V{model.version}" if model.version else "")
    if model.classes is not None:
        return f"{name} that tells {len(model.classes)} classes apart"
    return f"{name} pretrained with SimMIM" if model.decoder else f"{name} encoder"


def _architecture(model: Model) -> str:
    return (
        ARCHITECTURES[model.version] if model.encoder.architecture == "swinv2" else f"{model.encoder.title}, of SimMIM"
    )


def _facts(model: Model) -> dict[str, str]:
    config = model.config
    facts = {
        "architecture": _architecture(model),
        "parameters of the encoder": f"{sum(value.numel() for value in model.weights.values()) / 1e6:.1f} M",
        **{key: str(config[key]) for key in ("embed_dim", "depths", "num_heads", "patch_size", "window_size")},
        "image size": "x".join(map(str, model.image_size)) + " px",
        "windows of the position bias": ", ".join(map(str, model.windows)) + " tokens",
        "features of an image": "x".join(map(str, model.map_shape[1:])),
    }
    if model.decoder is not None:
        facts["decoder predicts"] = f"{model.decoder.target or 'raw or normalized (unknown)'} pixels"
    if model.classes is not None:
        more = f", … ({len(model.classes)})" if len(model.classes) > 20 else ""
        facts["classes"] = ", ".join(model.classes[:20]) + more
    return facts


def _preprocessing(model: Model) -> str:
    images = model.preprocessing
    return _table(
        {
            "size": "x".join(map(str, model.image_size)) + " px",
            "crop": f"the centre: {images.crop:g} of the largest part of this aspect",
            "interpolation": f"{images.interpolation}, antialiased",
            "a pixel of 1": f"{images.max_value:g} in the file",
            "mean": str(images.mean),
            "std": str(images.std),
        }
    )


def _of_run(origin: Origin, keys: Iterable[str]) -> str:
    if origin.config is None:
        return "Unknown: no config.yaml lay beside the weights. Fill in.\n"
    values = {key: _value(origin.config, key) for key in keys}
    return _table({key: _last_part(key, value) for key, value in values.items() if value is not None})


def _value(config: Mapping[str, Any], key: str) -> Any:
    found: Any = config
    for word in key.split("."):
        found = found.get(word) if isinstance(found, Mapping) else None
    return found


def _last_part(key: str, value: Any) -> str:
    return Path(str(value)).name if key in ("data.root", "encoder") else str(value)


def _table(rows: Mapping[str, str]) -> str:
    escaped = (f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *escaped]) + "\n"


def _sharing(form: Format, path: str) -> str:
    card = f"{path}/{CARD}" if form.ending == "" else str(Path(path).parent / CARD)
    return f"""\
With the Hugging Face Hub's own command (`pip install huggingface_hub`, `hf auth login`); there a card is `README.md`:

```bash
hf upload <user>/<name> {path}
hf upload <user>/<name> {card} README.md
```
"""
