"""`python -m simmim.reconstruct`: shows what a pretrained model makes of the hidden parts of any images."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simmim.checkpoint_files import load
from simmim.command import command
from simmim.config import Config
from simmim.data.excerpt import read_excerpt
from simmim.data.transforms import centre_transform
from simmim.encoders.encoder_files import read_encoder_weights
from simmim.encoders.weights import unsaid
from simmim.masking import Masking, average_distance
from simmim.pictures import draw_panels
from simmim.run_folder import list_checkpoints, shown
from simmim.seeding import generator_from
from simmim.stages import USUAL
from simmim.tasks.pretraining import Pretraining
from simmim.training.checkpoint import newest_checkpoint

log = logging.getLogger(__name__)

MASKING = {"strategy": "random", "patch_size": 32, "ratio": 0.6}
"""How SimMIM's released models were pretrained (arXiv 2111.09886, section 4.1.2): their files do not say it."""


def reconstruct(config: Config) -> Path:
    """Draws original, masked, reconstruction and both pasted for each image.

    Args:
        config: The composed `conf/reconstruct.yaml`.

    Returns:
        The PNG.

    Raises:
        ValueError: If the checkpoint has no prediction head, or no image can be read.
    """
    task = load_pretraining(Path(config["encoder"]), target=config["target"])
    masking = masking_of(task, **config["masking"])
    names, images = load_images(Path(config["images"]), task, config["count"])
    masks = torch.stack([masking(generator_from(config["seed"], "mask", index)) for index in range(len(images))])
    path = Path(config["output_dir"]) / "reconstruction.png"
    channels = config["picture_channels"]
    caption = task.caption(ratio=masking.ratio, patch_size=masking.patch_size, channels=channels)
    draw_panels(task.panels(images, masks, channels), path, caption=caption)
    for name, loss, trivial in zip(names, *losses(task, images, masks), strict=True):
        log.info(f"loss {loss:.3f}, {loss / trivial:.2f} of the visible mean's {trivial:.3f}: {name}")
    distance = sum(average_distance(mask, masking.patch_size) for mask in masks) / len(masks)
    log.info(f"AvgDist of the masks {distance:.1f} px")
    log.info(f"picture    {shown(path)}")
    return path


def load_pretraining(path: Path, *, target: str | None = None) -> Pretraining:
    """The pretraining task of a run folder (its newest checkpoint) or a checkpoint, ready to predict.

    Args:
        path: One of them, or what others released with SimMIM's decoder.
        target: What a released decoder predicts, "raw" or "normalized" pixels; None for a run of ours, which says it.

    Raises:
        ValueError: If there is no checkpoint of a pretraining run.
    """
    if path.exists() and (path.is_file() or not list_checkpoints(path)):
        weights, known = read_encoder_weights(path)
        if known["origin"] != "simmim":
            return _released(path, weights, known, target)
    if target is not None:
        raise ValueError(f"target={target} is for decoders that others released: encoder={path} says its own")
    if path.suffix == ".safetensors":
        raise ValueError(
            f"encoder={path} holds an encoder without its prediction head: give the run folder or a *.ckpt"
        )
    checkpoint = newest_checkpoint(path, key="encoder")
    read_encoder_weights(checkpoint)  # says in one line what is wrong with a file that is none of ours
    state = load(checkpoint, keep="/state_dict/")
    if "objective" not in state["hyper_parameters"]:
        raise ValueError(f"encoder={path} was not pretrained but fine-tuned, and has no head that predicts pixels")
    task = Pretraining(**state["hyper_parameters"])
    task.load_state_dict(state["state_dict"], assign=True)
    return task.eval()


def _released(path: Path, weights: dict[str, Tensor], known: dict[str, Any], target: str | None) -> Pretraining:
    """The task of weights that others pretrained by SimMIM, with its linear head and masking."""
    decoder = known["decoder"]
    if decoder is None:
        raise ValueError(
            f"encoder={path} holds no decoder, which predicts pixels: give what SimMIM's pretraining wrote"
        )
    if lacking := unsaid(known):
        raise ValueError(f"encoder={path} does not say its {' and '.join(lacking)}: reconstruct takes no others")
    if target not in ("raw", "normalized"):
        raise ValueError(
            f"target={target}: encoder={path} does not say which pixels its decoder predicts: give target=raw, or "
            "target=normalized, as SimMIM's SwinV2 was pretrained"
        )
    task = Pretraining(
        model={"name": known["architecture"], **known["config"]},
        objective={
            "head": "linear",
            "loss": "l1",
            "predict": "hidden",
            "target": target,
            "target_window": 47,
            "target_downsampling": 1,
        },
        masking=MASKING,
        image_size=known["image_size"],
        **{key: known[key] or USUAL[key] for key in ("mean", "std")},
        optimizer={},
        schedule={},
        ema_decay=None,
        seed=0,
    )
    head = task.network.head
    assert isinstance(head, nn.Linear)
    if decoder["weight"].shape != head.weight.shape:
        raise ValueError(
            f"encoder={path} has a decoder of {len(decoder['weight'])} numbers a token, and the pixels below one are "
            f"{len(head.weight)}"
        )
    task.network.encoder.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True)
    head.load_state_dict({key: value.float() for key, value in decoder.items()}, assign=True)
    return task.eval()


def masking_of(task: Pretraining, **changes: Any) -> Masking:
    """The masking that a model was pretrained with, changed where a value is given.

    Args:
        task: The pretraining task.
        **changes: `strategy`, `patch_size` in pixels, `ratio`; None keeps the model's own.
    """
    settings = {**task.hparams["masking"], **{k: v for k, v in changes.items() if v is not None}}
    height, width = task.hparams["image_size"]
    return Masking((height, width), model_patch_size=task.hparams["model"]["patch_size"], **settings)


def load_images(path: Path, task: Pretraining, count: int) -> tuple[list[str], Tensor]:
    """Readable images of a file, or from all over a folder, cropped to the model's size (see `read_excerpt`)."""
    height, width = task.hparams["image_size"]
    crop = centre_transform((height, width))
    return read_excerpt(path, channels=task.network.in_channels, max_value=task.max_value, crop=crop, count=count)


@torch.no_grad()
def losses(task: Pretraining, images: Tensor, masks: Tensor) -> tuple[list[float], list[float]]:
    """The loss of each image (B, C, H, W), and that of the mean colour of its visible pixels."""
    network, alone = task.best, [(task.normalize(i[None]), m[None]) for i, m in zip(images, masks, strict=True)]
    return [float(network(*pair)) for pair in alone], [float(network.visible_mean_loss(*pair)) for pair in alone]


if __name__ == "__main__":
    command(reconstruct)()
