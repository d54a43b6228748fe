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
    crop = v2.RandomResizedCrop(image_size, scale=tuple(crop_scale), ratio=tuple(crop_ratio), antialias=True)
    transform: Transform = v2.Compose([crop, v2.RandomHorizontalFlip()])
    return transform


def centre_transform(image_size: tuple[int, int]) -> Transform:
    """Resizes an image until it just covers the frame, and crops the centre: for validation and pictures."""
    return partial(_cover_and_crop, image_size=image_size)


def _cover_and_crop(image: Tensor, image_size: tuple[int, int]) -> Tensor:
    pairs = list(zip(image_size, image.shape[-2:], strict=True))
    scale = max(target / length for target, length in pairs)
    size = [max(target, round(length * scale)) for target, length in pairs]
    image = v2.functional.resize(image, size, antialias=True)
    image = v2.functional.center_crop(image, list(image_size))
    return image
