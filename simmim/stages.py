"""What a stage of training takes over from the one before it: architecture, windows, pixel statistics, weights."""

import logging
from pathlib import Path
from typing import Any

import torch

from simmim.config import Config, image_size_of
from simmim.data.decoding import EIGHT_BIT
from simmim.encoders import SIZES, Encoder, architecture_of, create_encoder
from simmim.encoders.encoder_files import trained_windows
from simmim.encoders.weights import check_architecture, check_said, load_encoder_weights, load_head
from simmim.tasks.classification import Classification

log = logging.getLogger(__name__)

USUAL = {"image_size": 192, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
"""Pixels, and ImageNet's statistics of them, where neither config nor encoder says any."""

VALIDATED = {"test_crop": 0.875, "interpolation": "bicubic", "max_value": EIGHT_BIT}
"""How images are made where a file does not say, as that of an encoder without classifier, or an older one."""

NEVER_NULL = ("window_size", "patch_size", "drop_path", "attention")
"""What every model must be told."""

PUBLISHED = (
    *("embed_dim", "depths", "num_heads", "extra_norm_every"),
    *("position_bias", "norm", "attention_similarity", "table_resizing", "layer_scale"),
)
"""What the name of a published size says."""


def fill_in(config: Config, known: dict[str, Any] | None) -> Config:
    """The config with everything that it leaves to the encoder.

    Args:
        config: The composed config of a command with `model: pretrained`, null where the encoder decides.
        known: Metadata of the encoder (see `read_encoder_weights`), or None from scratch.

    Raises:
        ValueError: If there is no encoder, and the config does not say, or only in part, what to build.
    """
    model, data = dict(config["model"]), dict(config["data"])
    if known is None:
        if model["name"] is None:
            raise ValueError(
                "encoder=null trains from scratch, and then model=… says what: model=swinv2_t; or give encoder=<run "
                "folder, checkpoint or file of weights>"
            )
        known = {"config": {"in_channels": 3}, "windows": None}
    else:
        given = {**{f"model.{key}": value for key, value in model.items()}, "data.image_size": data["image_size"]}
        check_said(Path(config["encoder"]), known, given)
        model["name"] = model["name"] or known["architecture"]
        check_architecture(Path(config["encoder"]), known, architecture_of(model["name"]))
        depths = model["depths"] or SIZES.get(model["name"], known["config"])["depths"]
        alike = len(depths) == len(known["config"]["depths"])  # else loading says what differs
        if "pretrained_window_size" in known["config"] and model["pretrained_window_size"] is None and alike:
            model["pretrained_window_size"] = trained_windows(known)
    for key in model:
        if model[key] is None and not (key in PUBLISHED and model["name"] in SIZES):
            model[key] = known["config"].get(key)
    if unsaid := [key for key in NEVER_NULL if model[key] is None]:
        raise ValueError(f"model.{unsaid[0]}=null, and encoder=null has none: model=… says all, as model=swinv2_t")
    if data.get("channels") is None:
        data["channels"] = known["config"]["in_channels"]
    missing = [key for key in USUAL if data[key] is None and not known.get(key)]
    if missing and config["encoder"] is not None:
        log.warning(
            f"encoder={config['encoder']} does not say how its images were made: what is usual is taken, "
            + " ".join(f"data.{key}={USUAL[key]}".replace(" ", "") for key in missing)
        )
    for key, usual in (USUAL | VALIDATED).items():
        if data.get(key, usual) is None:
            data[key] = known.get(key) or usual
    return {**config, "model": model, "data": data}


def open_encoder(config: Config) -> Encoder:
    """The encoder alone, with the weights of its file, at the size and with the windows of a filled-in config.

    Raises:
        ValueError: If the image size or the weights do not fit.
    """
    size = image_size_of(config)
    with torch.device("meta"):  # the initial values are never computed
        encoder = create_encoder(**config["model"], in_channels=config["data"]["channels"])
    encoder.check_image_size(*size)
    log.info(load_encoder_weights(encoder, Path(config["encoder"]), image_size=size))
    return encoder


def load_classifier(
    task: Classification, path: Path, known: dict[str, Any], *, image_size: tuple[int, int]
) -> tuple[str, str]:
    """Loads the encoder, and the classifier where it is of the same classes.

    Args:
        task: What to load into.
        path: The encoder's file, or its run folder.
        known: Its metadata.
        image_size: Height and width in pixels that the task is going to see.

    Returns:
        What became of each, in words.
    """
    for network in filter(None, (task.average, task.network)):
        reports = (
            load_encoder_weights(network.encoder, path, image_size=image_size),
            load_head(network.head, known, task.classes),
        )
    return reports
