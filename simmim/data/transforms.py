"""What happens to an image before it reaches the encoder: uint8 tensors in, uint8 tensors out."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor
from torchvision.transforms import v2

Transform = Callable[[Tensor], Tensor]


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
    crop = v2.RandomResizedCrop(image_size, scale=tuple(crop_scale), ratio=tuple(crop_ratio), antialias=True)
    transform: Transform = v2.Compose([crop, v2.RandomHorizontalFlip()])
    return transform


def centre_transform(image_size: tuple[int, int]) -> Transform:
    """Takes the largest centred part of the frame's aspect, and resizes it: for validation and pictures."""
    return partial(_crop_and_resize, image_size=image_size)


def _crop_and_resize(image: Tensor, image_size: tuple[int, int]) -> Tensor:
    # In this order, since a banner of 10 x 10,000 px resized first would fill the memory.
    scale = max(target / length for target, length in zip(image_size, image.shape[-2:], strict=True))
    part = [max(1, round(target / scale)) for target in image_size]
    image = v2.functional.resize(v2.functional.center_crop(image, part), list(image_size), antialias=True)
    return image
