"""`python -m simmim.reconstruct`: shows what a pretrained model makes of the hidden parts of any images."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simmim.command import Config, command
from simmim.data.decoding import UnreadableImage, decode
from simmim.data.folder import list_images
from simmim.data.transforms import centre_transform
from simmim.masking import Masking, average_distance
from simmim.pictures import draw_panels
from simmim.seeding import generator_from
from simmim.tasks.pretraining import Pretraining
from simmim.training.checkpoint import find_checkpoint

log = logging.getLogger(__name__)


def reconstruct(config: Config) -> Path:
    """Draws original, masked, reconstruction and both pasted for each image.

    Args:
        config: The composed `conf/reconstruct.yaml`.

    Returns:
        The PNG.

    Raises:
        ValueError: If the checkpoint has no prediction head, or no image can be read.
    """
    task = load_pretraining(Path(config["encoder"]))
    masking = masking_of(task, **config["masking"])
    names, images = load_images(Path(config["images"]), task, config["count"])
    masks = torch.stack([masking(generator_from(config["seed"], "mask", index)) for index in range(len(images))])
    path = Path(config["output_dir"]) / "reconstruction.png"
    caption = task.caption(ratio=masking.ratio, patch_size=masking.patch_size)
    draw_panels(task.panels(images, masks), path, caption=caption)
    for name, loss, trivial in zip(names, *losses(task, images, masks), strict=True):
        log.info(f"loss {loss:.3f}, {loss / trivial:.2f} of the visible mean's {trivial:.3f}: {name}")
    distance = sum(average_distance(mask, masking.patch_size) for mask in masks) / len(masks)
    log.info(f"AvgDist of the masks {distance:.1f} px")
    log.info(f"picture    {path}")
    return path


def load_pretraining(path: Path) -> Pretraining:
    """The pretraining task of a run folder (its newest checkpoint) or a checkpoint, ready to predict.

    Raises:
        ValueError: If there is no checkpoint of a pretraining run.
    """
    if path.suffix == ".safetensors":
        raise ValueError(
            f"encoder={path} holds an encoder without its prediction head: give the run folder or a *.ckpt"
        )
    checkpoint = find_checkpoint(str(path), path)
    assert checkpoint is not None
    return Pretraining.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).eval()


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
    """The first readable images of a file or folder, cropped to the model's size.

    Returns:
        Their paths, and uint8 (B, C, H, W).

    Raises:
        ValueError: If none can be read.
    """
    if not path.exists():
        raise ValueError(f"images={path} does not exist: give a file or a folder of images")
    height, width = task.hparams["image_size"]
    crop = centre_transform((height, width))
    names: list[str] = []
    images: list[Tensor] = []
    for file in [path] if path.is_file() else (path / name for name in list_images(path)):
        try:
            images.append(crop(decode(file.read_bytes(), task.network.in_channels)))
            names.append(str(file))
        except UnreadableImage as error:
            log.warning(f"{file} cannot be read ({error})")
        if len(images) == count:
            break
    if not images:
        raise ValueError(f"images={path} holds no image that can be read")
    return names, torch.stack(images)


@torch.no_grad()
def losses(task: Pretraining, images: Tensor, masks: Tensor) -> tuple[list[float], list[float]]:
    """The loss of each uint8 image (B, C, H, W), and that of the mean colour of its visible pixels."""
    network, alone = task.network, [(task.normalize(i[None]), m[None]) for i, m in zip(images, masks, strict=True)]
    return [float(network(*pair)) for pair in alone], [float(network.visible_mean_loss(*pair)) for pair in alone]


if __name__ == "__main__":
    command(reconstruct)()
