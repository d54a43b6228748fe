"""The geometry of (shifted) windows (Swin Transformer, arXiv 2103.14030, section 3.2; V2, arXiv 2111.09883).

Nothing here has a parameter, and nothing is stored in a checkpoint. Shape letters: B images; H, W height and width
of a token map; C channels; h, w a window's height and width in tokens; T = h * w; N windows an image.
"""

from functools import lru_cache

import torch
from torch import Tensor

CROSS_REGION = -100.0
"""What is added to the logit of a query and a key that the cyclic shift alone made neighbours. Not minus
infinity: with a scale of up to 100 and a bias of up to 16, released models see through it a little."""


def fit_window(size: tuple[int, int], window_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The window, and the shift of a shifted block, on a token map of (H, W).

    Along an axis where the map is not larger than the window, the window shrinks to it and does not shift.

    Returns:
        ((h, w), (row shift, column shift)) in tokens.
    """
    window = (min(size[0], window_size), min(size[1], window_size))
    shift = tuple(0 if length <= window_size else window_size // 2 for length in size)
    return window, (shift[0], shift[1])


def to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Cuts a map into windows, row by row: (B, H, W, C) -> (B, N, T, C)."""
    batch, height, width, channels = x.shape
    h, w = window
    x = x.view(batch, height // h, h, width // w, w, channels).transpose(2, 3)  # (B, H/h, W/w, h, w, C)
    return x.reshape(batch, -1, h * w, channels)


def from_windows(windows: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Undoes `to_windows`: (B, N, T, C) -> (B, H, W, C)."""
    batch, _, _, channels = windows.shape
    (h, w), (height, width) = window, size
    x = windows.view(batch, height // h, width // w, h, w, channels).transpose(2, 3)
    return x.reshape(batch, height, width, channels)


@lru_cache(maxsize=64)
def window_mask(
    size: tuple[int, int],
    padded: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    device: torch.device,
) -> Tensor | None:
    """What to add to the logits of each window after a padding and a cyclic shift of the map.

    Tokens of one window that were not neighbours before the shift get -100; padding is unreachable.

    Args:
        size: Height and width of the map in tokens.
        padded: The same after padding to whole windows.
        window: Height and width of a window in tokens.
        shift: Rows and columns that the padded map was rolled up and left by.
        device: Where to.

    Returns:
        Float (N, T, T), or None where every window is one region.
    """
    if size == padded and shift == (0, 0):
        return None
    with torch.inference_mode(False):  # a cached inference tensor could not serve training later
        region = torch.zeros(padded, dtype=torch.int64, device=device)
        for axis, (length, w, s) in enumerate(zip(padded, window, shift, strict=True)):
            at = torch.arange(length, device=device)
            band = (at >= length - w).long() + (at >= length - s).long() if s else torch.zeros_like(at)
            region += band.unsqueeze(1 - axis) * 3**axis
        real = torch.zeros(padded, dtype=torch.bool, device=device)
        real[: size[0], : size[1]] = True
        real = real.roll((-shift[0], -shift[1]), dims=(0, 1))
        regions = to_windows(region[None, :, :, None], window).squeeze(0, 3)  # (N, T)
        reals = to_windows(real[None, :, :, None], window).squeeze(0, 3)
        mask = torch.zeros(*regions.shape, regions.shape[1], device=device)
        mask[regions[:, :, None] != regions[:, None, :]] = CROSS_REGION
        mask[reals[:, :, None] != reals[:, None, :]] = -torch.inf
        return mask
