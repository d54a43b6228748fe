"""What happens to an image before it reaches the encoder: uint8 tensors in, uint8 tensors out; or floats, and floats.

Floats are images of more than 8 bits, in the units of their files: nothing rounds or clips them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from simmim.data.decoding import EIGHT_BIT

Transform = Callable[[Tensor], Tensor]
Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""

_ATTEMPTS = 10
_BILINEAR = v2.InterpolationMode.BILINEAR


def pretraining_transform(
    image_size: tuple[int, int],
    *,
    crop_scale: Sequence[float],
    crop_ratio: Sequence[float],
    interpolation: str = "bilinear",
) -> Transform:
    """Random crop, resized, and horizontal flip: all that SimMIM augments in pretraining (section 4.1).

    It draws from PyTorch's global CPU generator.

    Args:
        image_size: Height and width of the result in pixels.
        crop_scale: Smallest and largest area of the crop, as a share of the image.
        crop_ratio: Smallest and largest aspect of the crop, width over height.
        interpolation: "bilinear", as the authors' pretraining, or "bicubic".

    Raises:
        ValueError: If a range is empty or not positive, or the interpolation is unknown.
    """
    _check_interpolation(interpolation)
    for key, (low, high) in {"crop_scale": crop_scale, "crop_ratio": crop_ratio}.items():
        if not 0 < low <= high:
            raise ValueError(f"data.{key}=[{low}, {high}] must be positive, the smaller number first")
    if crop_scale[1] > 1:
        raise ValueError(f"data.crop_scale={list(crop_scale)} are shares of the image's area, at most 1")
    return partial(
        _crop_and_flip,
        image_size=image_size,
        crop_scale=crop_scale,
        crop_ratio=crop_ratio,
        interpolation=interpolation,
    )


def finetuning_transform(
    image_size: tuple[int, int],
    *,
    crop_scale: Sequence[float],
    crop_ratio: Sequence[float],
    interpolation: str,
    randaugment: int | None,
    color_jitter: float,
    erasing: float,
    mean: Sequence[float],
    std: Sequence[float],
    max_value: float = EIGHT_BIT,
) -> Transform:
    """Random crop, resized; horizontal flip; RandAugment or colour jitter; random erasing.

    The augmentation of supervised Swin and SimMIM's fine-tuning. It draws from PyTorch's global CPU generator.

    Args:
        image_size: Height and width of the result in pixels.
        crop_scale: Smallest and largest area of the crop, as a share of the image.
        crop_ratio: Smallest and largest aspect of the crop, width over height.
        interpolation: "bicubic" or "bilinear".
        randaugment: Magnitude of `RandAugment`, of 10; None for none.
        color_jitter: Largest change of brightness, contrast and saturation, as a share. Used where there is no
            RandAugment, which has these operations itself; so did timm, and with it the authors.
        erasing: Probability that a rectangle is replaced by noise.
        mean: Mean of each channel, in units of `max_value`; the noise has it too, and fills what operations lay bare.
        std: Standard deviation of each channel, likewise of the noise.
        max_value: The pixel value that counts as 1.

    Raises:
        ValueError: If a range is empty or not positive, or channels or `max_value` do not suit RandAugment.
    """
    crop = pretraining_transform(image_size, crop_scale=crop_scale, crop_ratio=crop_ratio, interpolation=interpolation)
    odd = [] if len(mean) in (1, 3) else [f"data.channels={len(mean)}"]
    odd += [] if max_value == EIGHT_BIT else [f"data.max_value={max_value:g}"]
    if odd and (randaugment is not None or color_jitter):
        raise ValueError(
            f"{' '.join(odd)}: colours are changed in 8-bit images of 1 or 3 channels alone: give "
            "augmentation.randaugment=null augmentation.color_jitter=0"
        )
    steps: list[Transform] = [crop]
    if randaugment is not None:
        fill = [255 * value for value in mean]
        steps.append(RandAugment(randaugment, fill=fill))
    elif color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    if erasing:
        steps.append(NoiseErasing(erasing, mean=mean, std=std, max_value=max_value))
    return v2.Compose(steps)  # type: ignore[no-any-return]


class RandAugment(v2.RandAugment):  # type: ignore[misc]
    """Two random operations, each of which touches every second image (arXiv 1909.13719).

    The probability of one half, and what a magnitude means, are those of timm, from whose names the authors' recipe has
    them; its noise on the magnitudes is left out, and torchvision's operations lack two of its fifteen.

    Args:
        magnitude: Of 10.
        fill: Of each channel, what lies outside of the image.
    """

    _AUGMENTATION_SPACE = {  # noqa: RUF012, torchvision's own is no ClassVar
        **v2.RandAugment._AUGMENTATION_SPACE,
        # Bits that are left. One at least: without any, the image is black.
        "Posterize": (lambda bins, height, width: (4 - 4 * torch.arange(bins) // (bins - 1)).clamp(min=1), False),
    }

    def __init__(self, magnitude: int, *, fill: list[float]) -> None:
        super().__init__(magnitude=magnitude, num_magnitude_bins=11, fill=fill, interpolation=_BILINEAR)

    def _apply_image_or_video_transform(self, image: Any, *operation: Any, **settings: Any) -> Any:
        return super()._apply_image_or_video_transform(image, *operation, **settings) if torch.rand(()) < 0.5 else image


class NoiseErasing(v2.RandomErasing):  # type: ignore[misc]
    """Random erasing by noise that is standard normal once the image is normalised, but for clipping in 8 bits.

    Args:
        probability: Of an image to be touched.
        mean: Mean of each channel, in units of `max_value`.
        std: Standard deviation of each channel.
        max_value: The pixel value that counts as 1.
    """

    def __init__(
        self, probability: float, *, mean: Sequence[float], std: Sequence[float], max_value: float = EIGHT_BIT
    ) -> None:
        super().__init__(p=probability, value=0)
        self.max_value = max_value
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Erases where `RandomErasing` has chosen to."""
        if params["v"] is not None:
            noise = self.max_value * (torch.randn(len(self.mean), params["h"], params["w"]) * self.std + self.mean)
            value = noise if inpt.is_floating_point() else noise.round().clamp(0, EIGHT_BIT).to(inpt.dtype)
            params = {**params, "v": value}
        return super().transform(inpt, params)


def create_mixing(classes: int, *, mixup: float, cutmix: float, switch: float) -> Callable[..., Any] | None:
    """Mixes the images of a batch with one another, and their labels likewise.

    Mixup (arXiv 1710.09412) blends two images, CutMix (arXiv 1905.04899) pastes a part of one into the other.

    Args:
        classes: Number of classes N.
        mixup: Both parameters of the beta distribution of the blend; 0 for none.
        cutmix: Likewise, of the area of the part.
        switch: Probability of CutMix in a batch, where both are wanted.

    Returns:
        A function of float images (B, C, H, W) and labels (B) that gives images and shares of classes (B, N), or
        None where nothing is mixed.
    """
    ways = [way(alpha=alpha, num_classes=classes) for way, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    if len(ways) < 2:
        return ways[0] if ways else None
    return v2.RandomChoice(ways, p=[1 - switch, switch])  # type: ignore[no-any-return]


def centre_transform(image_size: tuple[int, int], *, share: float = 1.0, interpolation: str = "bilinear") -> Transform:
    """Takes a centred part of the frame's aspect, and resizes it: for validation and pictures.

    Args:
        image_size: Height and width of the result in pixels.
        share: Side of the part, of the largest that there is: 0.875 is the usual 224 out of 256 px.
        interpolation: "bilinear" or "bicubic".

    Raises:
        ValueError: If the interpolation is unknown.
    """
    _check_interpolation(interpolation)
    return partial(_crop_centre, image_size=image_size, share=share, interpolation=interpolation)


def resized_crop(image: Tensor, box: Box, image_size: tuple[int, int], interpolation: str = "bilinear") -> Tensor:
    """Cuts a box out of an image (C, H, W) and resizes it, antialiased, as PIL does.

    The crop stays a view in the layout that the decoder left, mostly channels last, which the resizing keeps.
    """
    top, left, height, width = box
    # PyTorch tells channels last by the stride of the batch, which a batch of one made by [None] in front of the
    # channels does not show: it would then go the slow way, through channels first.
    part = image.permute(1, 2, 0)[None, top : top + height, left : left + width].permute(0, 3, 1, 2)
    return interpolate(part, image_size, mode=interpolation, antialias=True)[0]


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


def _check_interpolation(interpolation: str) -> None:
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"data.interpolation={interpolation} is unknown: choose bilinear or bicubic")


def _crop_and_flip(
    image: Tensor,
    image_size: tuple[int, int],
    crop_scale: Sequence[float],
    crop_ratio: Sequence[float],
    interpolation: str,
) -> Tensor:
    box = random_box(image.shape[-2], image.shape[-1], crop_scale, crop_ratio)
    image = resized_crop(image, box, image_size, interpolation)
    return image.flip(-1) if torch.rand(1) < 0.5 else image


def _crop_centre(image: Tensor, image_size: tuple[int, int], share: float, interpolation: str) -> Tensor:
    # In this order, since a banner of 10 x 10,000 px resized first would fill the memory.
    height, width = image.shape[-2:]
    scale = max(image_size[0] / height, image_size[1] / width)
    h, w = (max(1, round(share * target / scale)) for target in image_size)
    return resized_crop(image, (round((height - h) / 2), round((width - w) / 2), h, w), image_size, interpolation)


def per_channel(config: Mapping[str, Any]) -> dict[str, Any]:
    """How images are normalised by the data section of a config: what a task, and all that stands in for one, is given.

    Returns:
        `mean` and `std`, one number for each of the config's `channels`; and `max_value`, in units of which they are.

    Raises:
        ValueError: If neither one is given, nor one a channel.
    """
    channels: int = config["channels"]
    statistics: dict[str, Any] = {}
    for key in ("mean", "std"):
        values: list[float] = [config[key]] if isinstance(config[key], int | float) else config[key]
        if len(values) not in (1, channels):
            raise ValueError(
                f"data.{key}={values} has {len(values)} values for data.channels={channels}: give one, or one a "
                "channel (python -m simmim.statistics finds them)"
            )
        statistics[key] = values * (channels // len(values))
    return {**statistics, "max_value": config["max_value"]}
