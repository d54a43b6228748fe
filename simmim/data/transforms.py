"""What happens to an image before it reaches the encoder: uint8 tensors in, uint8 tensors out."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Transform = Callable[[Tensor], Tensor]
Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""

_ATTEMPTS = 10


def pretraining_transform(
    image_size: tuple[int, int], *, crop_scale: Sequence[float], crop_ratio: Sequence[float]
) -> Transform:
    """Random crop, resized, and horizontal flip: all that SimMIM augments (section 4.1).

    It draws from PyTorch's global CPU generator.

    Args:
        image_size: Height and width of the result in pixels.
        crop_scale: Smallest and largest area of the crop, as a share of the image.
        crop_ratio: Smallest and largest aspect of the crop, width over height.

    Raises:
        ValueError: If a range is empty or not positive.
    """
    for key, (low, high) in {"crop_scale": crop_scale, "crop_ratio": crop_ratio}.items():
        if not 0 < low <= high:
            raise ValueError(f"data.{key}=[{low}, {high}] must be positive, the smaller number first")
    if crop_scale[1] > 1:
        raise ValueError(f"data.crop_scale={list(crop_scale)} are shares of the image's area, at most 1")
    return partial(_crop_and_flip, image_size=image_size, crop_scale=crop_scale, crop_ratio=crop_ratio)


def centre_transform(image_size: tuple[int, int]) -> Transform:
    """Takes the largest centred part of the frame's aspect, and resizes it: for validation and pictures."""
    return partial(_crop_centre, image_size=image_size)


def resized_crop(image: Tensor, box: Box, image_size: tuple[int, int]) -> Tensor:
    """Cuts a box out of an image (C, H, W) of uint8 and resizes it, bilinear and antialiased, as PIL does.

    The crop stays a view in the layout that the decoder left, mostly channels last, which the resizing keeps.
    """
    top, left, height, width = box
    # PyTorch tells channels last by the stride of the batch, which a batch of one made by [None] in front of the
    # channels does not show: it would then go the slow way, through channels first.
    part = image.permute(1, 2, 0)[None, top : top + height, left : left + width].permute(0, 3, 1, 2)
    return interpolate(part, image_size, mode="bilinear", antialias=True)[0]


def random_box(height: int, width: int, crop_scale: Sequence[float], crop_ratio: Sequence[float]) -> Box:
    """A box of random area and aspect inside an image: from the same generator the same as torchvision's.

    Its `RandomResizedCrop` takes four times as long to draw one. Where no draw fits, the largest centred box of an
    allowed aspect is taken.
    """
    low, high = torch.tensor(crop_ratio).log().tolist()
    for _ in range(_ATTEMPTS):
        area = height * width * torch.empty(1).uniform_(crop_scale[0], crop_scale[1]).item()
        ratio = torch.empty(1).uniform_(low, high).exp().item()
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            top = int(torch.randint(0, height - h + 1, (1,)))
            return top, int(torch.randint(0, width - w + 1, (1,))), h, w
    h, w = min(height, round(width / crop_ratio[0])), min(width, round(height * crop_ratio[1]))
    return (height - h) // 2, (width - w) // 2, max(1, h), max(1, w)


def _crop_and_flip(
    image: Tensor, image_size: tuple[int, int], crop_scale: Sequence[float], crop_ratio: Sequence[float]
) -> Tensor:
    box = random_box(image.shape[-2], image.shape[-1], crop_scale, crop_ratio)
    image = resized_crop(image, box, image_size)
    return image.flip(-1) if torch.rand(1) < 0.5 else image


def _crop_centre(image: Tensor, image_size: tuple[int, int]) -> Tensor:
    # In this order, since a banner of 10 x 10,000 px resized first would fill the memory.
    height, width = image.shape[-2:]
    scale = max(image_size[0] / height, image_size[1] / width)
    h, w = (max(1, round(target / scale)) for target in image_size)
    return resized_crop(image, (round((height - h) / 2), round((width - w) / 2), h, w), image_size)


def per_channel(config: Mapping[str, Any]) -> dict[str, list[float]]:
    """`mean` and `std` of the data section of a config, one number for each of its `channels`.

    Raises:
        ValueError: If neither one is given, nor one a channel.
    """
    channels: int = config["channels"]
    statistics = {}
    for key in ("mean", "std"):
        values: list[float] = [config[key]] if isinstance(config[key], int | float) else config[key]
        if len(values) not in (1, channels):
            raise ValueError(
                f"data.{key}={values} has {len(values)} values for data.channels={channels}: give one, or one a channel"
            )
        statistics[key] = values * (channels // len(values))
    return statistics
