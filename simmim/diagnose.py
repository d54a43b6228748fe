"""`python -m simmim.diagnose signal`: whether encoders are stable, block by block, before and after they are trained.

How the features' variance, the attention and the gradients change with depth, of encoders side by side: see
`simmim.training.propagation`. `conf/diagnose.yaml` lists all keys.
"""

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from simmim.command import command
from simmim.config import Config, image_size_of
from simmim.data.module import ImageSamples, ImageSource, collate, create_source
from simmim.data.transforms import centre_transform, per_channel
from simmim.devices import on_gpu, precision_of
from simmim.measuring.networks import OBJECTIVE
from simmim.measuring.tables import write_csv
from simmim.pictures import Panel, Point, draw_runs
from simmim.reconstruct import load_pretraining, masking_of
from simmim.run_folder import SIGNAL, shown
from simmim.stages import PUBLISHED
from simmim.tasks.pretraining import Pretraining
from simmim.training.propagation import measure_blocks, rows_of

log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]

PANELS = {
    "variance": "variance of a token over its channels",
    "attention_mean": "highest attention of a query, mean of the heads",
    "attention_max": "highest attention of a query, the extreme head",
    "gradient_norm": "norm of the gradient of a block",
}
"""What is drawn over depth."""

LOGARITHMIC = ("variance", "gradient_norm")


def diagnose(config: Config) -> Rows:
    """Diagnoses encoders, and leaves a table and a picture in the run folder.

    Args:
        config: The composed `conf/diagnose.yaml`.

    Returns:
        The rows of the table.

    Raises:
        ValueError: If the diagnosis is unknown, or the config contradicts itself or an encoder.
    """
    word = config["diagnosis"]
    if word not in DIAGNOSES:
        raise ValueError(f"diagnosis={word} is unknown: choose one of {', '.join(DIAGNOSES)}")
    return DIAGNOSES[word](config)


def signal(config: Config) -> Rows:
    """How the signal goes through the blocks of encoders, on some images and under SimMIM's loss."""
    rows: Rows = []
    images = Images(config)
    for label, task in subjects(config):
        own = _measure(task, images(task), config)
        rows += [{"model": label, **row} for row in own]
        log.info(f"{label}: {_summary(own)}")
    out = Path(config["output_dir"]) / SIGNAL if config["out"] is None else Path(config["out"]).with_suffix(".csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(rows, out)
    picture = out.with_suffix(".png")
    title = f"{images.count} images: the signal through the blocks of {len({row['model'] for row in rows})} encoders"
    draw_runs(_panels(rows), picture, title=title)
    log.info(f"done: {shown(out)}, {shown(picture)}")
    return rows


DIAGNOSES: dict[str, Callable[[Config], Rows]] = {"signal": signal}


def subjects(config: Config) -> Iterator[tuple[str, Pretraining]]:
    """What is diagnosed, one after the other, each with its name: runs as they are, models as they begin."""
    given = config["encoder"]
    paths = [] if given is None else [given] if isinstance(given, str) else given
    names = [Path(path).name for path in paths]
    for path, name in zip(paths, names if len({*names}) == len(names) else paths, strict=True):
        task = load_pretraining(Path(path))
        if config["initial"]:
            yield f"{name}, initial", _drawn(task.hparams)
        yield name, task
    own = config["model"]
    for name in config["models"] or ([] if paths else [own["name"]]):
        model = own if name == own["name"] else {**own, "name": name, **dict.fromkeys(PUBLISHED)}
        settings = {
            "model": {**model, "in_channels": config["data"]["channels"]},
            "objective": OBJECTIVE,
            "masking": config["masking"],
            "image_size": list(image_size_of(config)),
            "seed": config["seed"],
            **per_channel(config["data"]),
        }
        yield name, _drawn({**settings, "optimizer": {}, "schedule": {}, "ema_decay": None})


def _drawn(settings: Any) -> Pretraining:
    """A task with the values that a run begins with."""
    task = Pretraining(**settings)
    task.network.encoder.check_image_size(*settings["image_size"])
    task.configure_model()
    return task.eval()


class Images:
    """The same images for all encoders, each as it takes them, with the masks that it is trained with.

    Args:
        config: The composed config of the command.

    Attributes:
        count: How many there are.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.count: int = config["data"]["batch_size"]
        self.sources: dict[tuple[Any, ...], ImageSource] = {}

    def __call__(self, task: Pretraining) -> dict[str, Any]:
        """A batch, from all over `data.root`."""
        height, width = task.hparams["image_size"]
        key = (height, width, task.network.in_channels, task.max_value)
        if key not in self.sources:
            data = {**self.config["data"], "channels": key[2], "max_value": key[3]}
            self.sources[key] = create_source(data, (height, width))
        source = self.sources[key]
        crop, masking = centre_transform((height, width)), masking_of(task)
        samples = ImageSamples(source, crop, masking, seed=self.config["seed"])
        self.count = min(self.count, len(source))
        return collate([samples[(0, at * len(source) // self.count)] for at in range(self.count)])


def _measure(task: Pretraining, batch: dict[str, Any], config: Config) -> Rows:
    device = torch.device("cuda" if on_gpu(config) else "cpu")
    bf16 = precision_of(config) == "bf16-mixed"
    task, batch = task.to(device), {key: batch[key].to(device) for key in ("image", "mask")}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        blocks = measure_blocks(task.network.encoder, lambda: task.look(batch))
        loss = task.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return rows_of(task.network, blocks)


def _summary(rows: Rows) -> str:
    variances, attention, gradients = (
        [row[key] for row in rows if row["variance"] is not None]
        for key in ("variance", "attention_max", "gradient_norm")
    )
    ratio = max(variances) / min(variances) if min(variances) else math.inf
    return (
        f"variance {min(variances):.3g} to {max(variances):.3g}, {ratio:.3g} times; highest attention "
        f"{max(attention):.3f}; gradient norms {min(gradients):.3g} to {max(gradients):.3g}"
    )


def _panels(rows: Rows) -> list[Panel]:
    return [
        Panel(
            [Point(row["layer"], row[key], row["model"]) for row in rows if row["variance"] is not None],
            "block",
            words,
            logarithmic_y=key in LOGARITHMIC,
        )
        for key, words in PANELS.items()
    ]


if __name__ == "__main__":
    command(diagnose, positional="diagnosis")()
