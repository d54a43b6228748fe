"""What an export is made of: an encoder, what stands on it, and what is known of both.

Shape letters: B images; c image channels; H, W height and width in pixels; h, w the encoder's map; C its channels;
N classes; r side in pixels of the square that one token predicts.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.checkpoint_files import load, load_rest
from simmim.encoders import Encoder
from simmim.encoders.attention_weights import TABLE
from simmim.encoders.encoder_files import (
    CHECKPOINT_PREFIXES,
    HEAD,
    find_encoder_file,
    read_encoder_weights,
    trained_windows,
)
from simmim.encoders.swin import V1
from simmim.encoders.swinv2 import V2
from simmim.encoders.table_resizing import middle_of
from simmim.encoders.tensor_files import is_safetensors
from simmim.encoders.weights import load_encoder
from simmim.masking import expand_mask
from simmim.run_folder import list_checkpoints, shown
from simmim.training.checkpoint import newest_checkpoint

log = logging.getLogger(__name__)

Outputs = dict[str, Tensor]
"""What a model computes of images: `features` (B, h, w, C), and what it can of `logits` (B, N) and `pixels`
(B, c, H, W), predicted of images whose cells are hidden as a checkerboard."""


UNCLASSIFIED = {"test_crop": 1.0, "interpolation": "bilinear"}
"""How images are made for an encoder without a classifier, as `simmim.embed` makes them."""


@dataclass(frozen=True)
class Decoder:
    """SimMIM's linear head, which predicts the pixels of each token.

    Args:
        weight: (c * r * r, C).
        bias: (c * r * r).
        target: What it predicts, "raw" or "normalized" pixels; None where that is unknown.
    """

    weight: Tensor
    bias: Tensor
    target: str | None


@dataclass(frozen=True)
class Preprocessing:
    """How an image is made ready: a centred square, resized and normalised.

    Args:
        mean: Of each channel, in units of `max_value`.
        std: Standard deviation of each channel.
        max_value: The pixel value that counts as 1.
        interpolation: "bilinear" or "bicubic".
        crop: Side of the centred part, as a share of the largest that there is.
    """

    mean: list[float]
    std: list[float]
    max_value: float
    interpolation: str
    crop: float

    def normalize(self, images: Tensor) -> Tensor:
        """Images (B, c, H, W) as decoded to floats of zero mean and unit deviation."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images.float() / self.max_value - mean) / std


@dataclass(frozen=True)
class Model:
    """An encoder in the mode of evaluation, with what stands on it.

    Args:
        encoder: With the reference implementation of the attention.
        image_size: Height and width in pixels that it was trained at.
        windows: Sides in tokens, one a stage, in which its position bias counts offsets, see `trained_windows`.
        preprocessing: How its images are made ready.
        head: The classifier, `weight` (N, C) and `bias` (N); None where there is none.
        classes: Names of its classes; None without a classifier.
        decoder: SimMIM's head; None where there is none.
    """

    encoder: Encoder
    image_size: tuple[int, int]
    windows: list[int | list[int]]
    preprocessing: Preprocessing
    head: dict[str, Tensor] | None
    classes: list[str] | None
    decoder: Decoder | None

    @property
    def config(self) -> dict[str, Any]:
        """Its settings."""
        return self.encoder.config

    @property
    def version(self) -> int | None:
        """Of Swin Transformer; None for what is neither the one nor the other, as studies have it."""
        own = {key: self.config.get(key) for key in V2}
        return 2 if own == V2 else 1 if own.items() <= V1.items() else None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The encoder's state dict, of a table of positions what its windows reach."""
        return self.reached(self.encoder.state_dict())

    def reached(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the encoder with tables as large as the windows: other libraries have no room for more."""
        windows = self.encoder.windows(*self.image_size)
        return {
            key: middle_of(value, windows[_stage_of(key)]) if key.endswith(TABLE) else value
            for key, value in weights.items()
        }

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one image: (1, c, H, W)."""
        return (1, self.config["in_channels"], *self.image_size)

    @property
    def map_shape(self) -> tuple[int, ...]:
        """Of the features of one image: (1, h, w, C)."""
        height, width = (side // self.encoder.stride for side in self.image_size)
        return (1, height, width, self.encoder.channels[-1])

    @torch.no_grad()
    def outputs(self, images: Tensor) -> Outputs:
        """Of normalised images (B, c, H, W), see `Outputs`."""
        features = self.encoder(images)
        outputs = {"features": features}
        if self.head is not None:
            outputs["logits"] = F.linear(self.encoder.pooled(images), self.head["weight"], self.head["bias"])
        if self.decoder is not None:
            predicted = F.linear(self.encoder(images, self.hidden(images)), self.decoder.weight, self.decoder.bias)
            outputs["pixels"] = F.pixel_shuffle(predicted.permute(0, 3, 1, 2), self.encoder.stride)
        return outputs

    def hidden(self, images: Tensor) -> Tensor:
        """Cells of the encoder's stride, hidden as a checkerboard: boolean (B, h, w)."""
        rows, columns = (torch.arange(side // self.encoder.stride) for side in images.shape[-2:])
        return ((rows[:, None] + columns) % 2 == 0).expand(len(images), -1, -1)

    def hidden_patches(self, images: Tensor) -> Tensor:
        """The same for each patch, as other libraries take it: boolean (B, patches)."""
        height, width = (side // self.config["patch_size"] for side in images.shape[-2:])
        return expand_mask(self.hidden(images), height, width).flatten(1)


def _stage_of(table: str) -> int:
    """The stage of a table by its name; one that all blocks share is of the first."""
    kind, number, *_ = table.split(".")
    return int(number) if kind == "stages" else 0


def open_model(path: Path, *, usual: Mapping[str, Any], with_decoder: bool) -> Model:
    """The model of a run folder, a training checkpoint or an encoder file, on the CPU.

    Args:
        path: What `read_encoder_weights` reads.
        usual: How images are made ready (`mean`, `std`, `max_value`, `test_crop`, `interpolation`) where the file does
            not say.
        with_decoder: Whether the head of a pretraining run is wanted too.

    Raises:
        ValueError: If it cannot be read, does not say how it was trained, or predicts pixels in a way that no other
            library can.
    """
    weights, known = read_encoder_weights(path)
    if known["image_size"] is None or known["windows"] is None:
        raise ValueError(f"encoder={path} does not say at which image size it was trained: export the run that did")
    decoder = _find_decoder(path, weights, known) if with_decoder else None
    for note in known["notes"]:
        if decoder is None or not note.startswith("its decoder"):
            log.info(note)
    encoder = load_encoder(path).eval().requires_grad_(False)
    for stage in encoder.blocks:
        for block in stage:
            block.attention.implementation = "reference"
    height, width = known["image_size"]
    windows = trained_windows(known)
    assert windows is not None
    return Model(
        encoder=encoder,
        image_size=(height, width),
        windows=windows,
        preprocessing=_preprocessing(path, known, usual, encoder.config["in_channels"]),
        head=None if known["head"] is None else {key: value.float() for key, value in known["head"].items()},
        classes=known["classes"],
        decoder=decoder,
    )


def _preprocessing(path: Path, known: Mapping[str, Any], usual: Mapping[str, Any], channels: int) -> Preprocessing:
    usual = {**usual, **(UNCLASSIFIED if known["head"] is None else {})}
    values = {key: known[key] or usual[key] for key in ("mean", "std", "max_value", "test_crop", "interpolation")}
    if len(values["mean"]) != channels:
        raise ValueError(f"encoder={path} does not say how its images were normalised: export the run that made it")
    if not (known["mean"] and known["std"]):
        log.warning(f"encoder={path} does not say how its images were normalised: mean={values['mean']} is taken")
    return Preprocessing(
        values["mean"], values["std"], values["max_value"], values["interpolation"], values["test_crop"]
    )


def _find_decoder(path: Path, weights: Mapping[str, Tensor], known: Mapping[str, Any]) -> Decoder | None:
    """The head of a pretraining run, from the checkpoint that holds these very weights; or of a file of others."""
    if known["decoder"] is not None:
        return Decoder(known["decoder"]["weight"].float(), known["decoder"]["bias"].float(), None)
    if known["origin"] != "simmim" or known["head"] is not None:
        return None
    file = find_encoder_file(path)
    if not file.is_dir() and is_safetensors(file):
        if file == path or not list_checkpoints(path):
            log.info(f"encoder={path} has no checkpoint: the encoder is exported without its decoder")
            return None
        checkpoint = newest_checkpoint(path, key="encoder")
    else:
        checkpoint = file
    settings = load_rest(checkpoint)["hyper_parameters"]
    if "objective" not in settings:
        return None
    theirs = read_encoder_weights(checkpoint)[0]
    if any(not torch.equal(value, theirs[key]) for key, value in weights.items()):
        raise ValueError(
            f"encoder={path}: {file.name} and {shown(checkpoint)} hold different weights, and only the checkpoint has "
            f"a decoder: give encoder={shown(checkpoint)}, or encoder={shown(file)} for the encoder alone"
        )
    return _read_decoder(checkpoint, settings["objective"])


def _read_decoder(checkpoint: Path, objective: dict[str, Any]) -> Decoder:
    if objective["head"] != "linear" or objective["target_downsampling"] != 1:
        raise ValueError(
            f"encoder={checkpoint} predicts with objective.head={objective['head']} and objective.target_downsampling="
            f"{objective['target_downsampling']}, which only simmim can: give encoder=<run>/encoder.safetensors, the "
            "encoder alone"
        )
    names = [f"{prefix.removesuffix('encoder.')}{HEAD}" for prefix in CHECKPOINT_PREFIXES]
    for name in names:
        state = load(checkpoint, keep=f"/state_dict/{name}")["state_dict"]
        if (weight := state.get(f"{name}weight")) is not None:
            return Decoder(weight.float(), state[f"{name}bias"].float(), objective["target"])
    raise ValueError(f"encoder={checkpoint} holds no decoder, though it was pretrained: its file is incomplete")
