"""What the hidden pixels are regressed to: the normalised image itself, or its local contrast.

The local normalisation is that of the authors' SwinV2 configuration: each pixel of each channel minus the mean,
over the standard deviation, of the window around it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6
"""Added to the local variance, so that flat areas stay finite."""


def local_statistics(images: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over the window around each pixel; what lies outside the image is not counted.

    Args:
        images: (B, C, H, W).
        window: Side of the window in pixels, odd.

    Returns:
        Mean and variance, (B, C, H, W) each; the variance is at least 0.
    """
    mean = _box_mean(images, window)
    mean_of_squares = _box_mean(images.square(), window)
    counts = [_pixels_in_window(length, window, images) for length in images.shape[-2:]]
    count = counts[0][:, None] * counts[1]  # (H, W)
    variance = (mean_of_squares - mean.square()) * count / (count - 1).clamp(min=1)
    return mean, variance.clamp(min=0)


def normalize_locally(images: Tensor, window: int) -> Tensor:
    """(x - m) / sqrt(v + 1e-6) with the statistics of the window around each pixel: (B, C, H, W)."""
    mean, variance = local_statistics(images, window)
    return (images - mean) / (variance + EPSILON).sqrt()


def denormalize_locally(predicted: Tensor, images: Tensor, window: int) -> Tensor:
    """Undoes `normalize_locally` with the statistics of the true images, which a prediction alone does not have.

    A picture made this way shows more than the model knows; its caption must say so.

    Args:
        predicted: (B, C, H, W) in the space of the target.
        images: (B, C, H, W), the true images.
        window: Side of the window in pixels.

    Returns:
        (B, C, H, W) in the space of the images.
    """
    mean, variance = local_statistics(images, window)
    return predicted * (variance + EPSILON).sqrt() + mean


def _box_mean(images: Tensor, window: int) -> Tensor:
    # One axis after the other: the same mean over a rectangle at 2 x window instead of window x window operations.
    rows = F.avg_pool2d(images, (window, 1), stride=1, padding=(window // 2, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, window), stride=1, padding=(0, window // 2), count_include_pad=False)


def _pixels_in_window(length: int, window: int, like: Tensor) -> Tensor:
    at = torch.arange(length, device=like.device)
    last, first = (at + window // 2).clamp(max=length - 1), (at - window // 2).clamp(min=0)
    return (last - first + 1).to(like.dtype)
