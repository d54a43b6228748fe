"""Swin Transformer V2 (Liu et al., CVPR 2022, arXiv 2111.09883).

Shape letters: B images; H, W height and width of a token map; C channels; h, w a window's height and width in
tokens; T = h * w; N windows an image; n heads; d channels a head. Tokens stay (B, H, W, C) throughout.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from simmim.encoders.attention import cosine_attention, resolve_implementation
from simmim.encoders.position_bias import LogSpacedPositionBias
from simmim.encoders.windows import fit_window, from_windows, to_windows, window_mask
from simmim.masking import expand_mask

SIZES: dict[str, dict[str, Any]] = {
    "swinv2_t": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "extra_norm_every": 0},
    "swinv2_s": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "extra_norm_every": 0},
    "swinv2_b": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "extra_norm_every": 0},
    "swinv2_l": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "extra_norm_every": 0},
    "swinv2_h": {"embed_dim": 352, "depths": (2, 2, 18, 2), "num_heads": (11, 22, 44, 88), "extra_norm_every": 6},
    "swinv2_g": {"embed_dim": 512, "depths": (2, 2, 42, 4), "num_heads": (16, 32, 64, 128), "extra_norm_every": 6},
}
"""The published sizes (table 1 and section 4.1). One article prints 2,2,42,2 for G: that gives 2.6 B parameters,
while the paper's 2,2,42,4 gives the 3.0 B that it states. The head counts of H and G keep the 32 channels a head
of the others; the paper does not print them."""

MLP_RATIO = 4
"""Width of the hidden layer of a block's MLP, in multiples of the block's channels."""


class WindowAttention(nn.Module):
    """Multi-head scaled cosine attention within windows. The key has no bias.

    Args:
        dim: Channels C.
        num_heads: Heads n, a divisor of C.
        trained_window: See `LogSpacedPositionBias`.
        implementation: See `simmim.encoders.attention`.
    """

    def __init__(self, dim: int, num_heads: int, *, trained_window: int | None, implementation: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.implementation = implementation
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.empty(dim))
        self.v_bias = nn.Parameter(torch.empty(dim))
        self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.position_bias = LogSpacedPositionBias(num_heads, trained_window=trained_window)
        self.proj = nn.Linear(dim, dim)

    def forward(self, windows: Tensor, window: tuple[int, int], mask: Tensor | None) -> Tensor:
        """Attends within each window: (B, N, T, C) -> (B, N, T, C)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(windows, self.qkv.weight, bias)  # (B, N, T, 3C)
        qkv = qkv.view(*qkv.shape[:3], 3, self.num_heads, -1).permute(3, 0, 1, 4, 2, 5)  # (3, B, N, n, T, d)
        query, key, value = qkv.unbind(0)
        x = cosine_attention(
            query,
            key,
            value,
            log_scale=self.logit_scale,
            position_bias=self.position_bias(window),
            mask=mask,
            implementation=self.implementation,
        )
        out: Tensor = self.proj(x.transpose(2, 3).flatten(-2))  # (B, N, T, C)
        return out


class Block(nn.Module):
    """Window attention and MLP, each with its norm at the end of the residual branch (section 3.2).

    Args:
        dim: Channels C.
        num_heads: Heads n.
        window_size: Side of the window in tokens.
        trained_window: See `LogSpacedPositionBias`.
        shifted: Whether the windows are shifted by half a window.
        drop_path: Probability of dropping a residual branch for an image.
        extra_norm: Whether a norm follows on the main branch (models H and G).
        implementation: See `simmim.encoders.attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int,
        trained_window: int | None,
        shifted: bool,
        drop_path: float,
        extra_norm: bool,
        implementation: str,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shifted = shifted
        self.attention = WindowAttention(dim, num_heads, trained_window=trained_window, implementation=implementation)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, MLP_RATIO * dim), nn.GELU(), nn.Linear(MLP_RATIO * dim, dim))
        self.norm2 = nn.LayerNorm(dim)
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.extra_norm = nn.LayerNorm(dim) if extra_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.drop_path(self.norm1(self.attend(x)))
        x = x + self.drop_path(self.norm2(self.mlp(x)))
        x = self.extra_norm(x)
        return x

    def attend(self, x: Tensor) -> Tensor:
        """Attention within the (shifted) windows of a map: (B, H, W, C) -> (B, H, W, C)."""
        height, width = x.shape[1:3]
        window, shift = fit_window((height, width), self.window_size)
        shift = shift if self.shifted else (0, 0)
        bottom, right = -height % window[0], -width % window[1]
        x = F.pad(x, (0, 0, 0, right, 0, bottom)).roll((-shift[0], -shift[1]), dims=(1, 2))
        padded = (height + bottom, width + right)
        mask = window_mask((height, width), padded, window, shift, x.device)
        windows = self.attention(to_windows(x, window), window, mask)
        x = from_windows(windows, window, padded).roll(shift, dims=(1, 2))
        return x[:, :height, :width]


class PatchEmbedding(nn.Module):
    """Cuts the image into patches, each one token: a strided convolution and a norm."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, height, width) -> (B, H, W, C)."""
        x: Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return x


class PatchMerging(nn.Module):
    """Halves the map and doubles the channels; as everywhere in V2, the norm comes last."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H/2, W/2, 2C); the four neighbours go down the columns first."""
        batch, height, width, channels = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, channels)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # (B, H/2, W/2, 4C)
        x = self.norm(self.reduction(x))
        return x


class SwinTransformerV2(nn.Module):
    """The encoder: four stages of blocks, the map halved between them.

    `simmim.encoders.create_encoder` makes the published sizes.

    Args:
        embed_dim: Channels of the first stage.
        depths: Blocks a stage.
        num_heads: Heads a stage; each divides its stage's channels.
        extra_norm_every: A norm on the main branch after so many blocks of a stage; 0 for none.
        window_size: Side of the attention window in tokens.
        pretrained_window_size: Window of an earlier training stage in tokens, one number or one a stage, which
            the position bias was trained with; None where this is the first training stage.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of the images.
        drop_path: Stochastic depth of the last block; it grows linearly from 0 at the first.
        attention: Implementation of the attention, see `simmim.encoders.attention`.

    Raises:
        ValueError: If the numbers contradict each other.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        extra_norm_every: int,
        window_size: int,
        pretrained_window_size: int | Sequence[int] | None,
        patch_size: int,
        in_channels: int,
        drop_path: float,
        attention: str,
    ) -> None:
        super().__init__()
        trained_windows = _per_stage(pretrained_window_size, len(depths))
        _check(embed_dim, depths, num_heads, window_size, patch_size, in_channels, drop_path)
        resolve_implementation(attention, torch.device("cpu"))
        self.config: dict[str, Any] = {
            "embed_dim": embed_dim,
            "depths": list(depths),
            "num_heads": list(num_heads),
            "extra_norm_every": extra_norm_every,
            "window_size": window_size,
            "pretrained_window_size": None if pretrained_window_size is None else trained_windows,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "drop_path": drop_path,
            "attention": attention,
        }
        self.patch_size = patch_size
        self.window_size = window_size
        self.stride = patch_size * 2 ** (len(depths) - 1)
        self.channels = [embed_dim * 2**stage for stage in range(len(depths))]
        blocks = sum(depths)
        rates = iter(drop_path * block / max(blocks - 1, 1) for block in range(blocks))

        self.embed = PatchEmbedding(in_channels, embed_dim, patch_size)
        self.mask_token = nn.Parameter(torch.empty(embed_dim))
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    Block(
                        self.channels[stage],
                        num_heads[stage],
                        window_size=window_size,
                        trained_window=trained_windows[stage],
                        shifted=block % 2 == 1,
                        drop_path=next(rates),
                        extra_norm=extra_norm_every > 0 and (block + 1) % extra_norm_every == 0,
                        implementation=attention,
                    )
                    for block in range(depth)
                )
            )
            for stage, depth in enumerate(depths)
        )
        self.merges = nn.ModuleList(PatchMerging(channels) for channels in self.channels[:-1])
        self.norm = nn.LayerNorm(self.channels[-1])
        self.init_weights()

    def init_weights(self) -> None:
        """Linear weights from a truncated normal, biases zero, post-norms zero: each block starts as identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, Block):
                for norm in (module.norm1, module.norm2):
                    nn.init.zeros_(norm.weight)
                    nn.init.zeros_(norm.bias)
                nn.init.zeros_(module.attention.q_bias)
                nn.init.zeros_(module.attention.v_bias)
                nn.init.constant_(module.attention.logit_scale, math.log(10))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of images, some of whose cells may be hidden.

        Args:
            images: (B, in_channels, height, width), normalised; see `check_image_size`.
            mask: Boolean (B, rows, columns) grid of cells over the image, True is hidden, or None. A hidden
                patch's embedding is replaced by the mask token (SimMIM, arXiv 2111.09886, section 3.2).

        Returns:
            (B, height/stride, width/stride, channels of the last stage), normalised.

        Raises:
            ValueError: If the size of the images does not fit.
        """
        self.check_image_size(*images.shape[-2:])
        features: Tensor = self.norm(self._stage_outputs(images, mask)[-1])
        return features

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Feature maps of every stage, for dense tasks.

        Images of any size: they are padded with zeros to a multiple of the stride, maps to whole windows.

        Returns:
            One (B, C, ceil(height/s), ceil(width/s)) map for each stride s = patch size times 1, 2, 4, 8; the
            last one normalised.
        """
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.stride, 0, -height % self.stride))
        maps = self._stage_outputs(images, None)
        maps[-1] = self.norm(maps[-1])
        strides = [self.patch_size * 2**stage for stage in range(len(maps))]
        return [
            x[:, : math.ceil(height / s), : math.ceil(width / s)].permute(0, 3, 1, 2)
            for x, s in zip(maps, strides, strict=True)
        ]

    def windows(self, height: int, width: int) -> list[tuple[int, int]]:
        """The window of each stage, in tokens, on images of a size in pixels: what a later stage was trained with."""
        strides = [self.patch_size * 2**stage for stage in range(len(self.channels))]
        return [fit_window((height // s, width // s), self.window_size)[0] for s in strides]

    def check_image_size(self, height: int, width: int) -> None:
        """Refuses a size in pixels that whole patches, merges and windows do not tile.

        Raises:
            ValueError: With the nearest sizes that fit.
        """
        bad = {size: self._nearest_sizes(size) for size in (height, width) if not self._fits(size)}
        if bad:
            ways = "; ".join(f"{size} -> {' or '.join(map(str, near))}" for size, near in bad.items())
            raise ValueError(
                f"image size {height}x{width} px does not fit model.patch_size={self.patch_size} and "
                f"model.window_size={self.window_size}: the nearest data.image_size that do are {ways}, or change "
                "the window"
            )

    def _stage_outputs(self, images: Tensor, mask: Tensor | None) -> list[Tensor]:
        x = self.embed(images)  # (B, H, W, C)
        if mask is not None:
            hidden = expand_mask(mask, *x.shape[1:3]).unsqueeze(-1)  # (B, H, W, 1)
            x = torch.where(hidden, self.mask_token.to(x.dtype), x)
        outputs = [self.stages[0](x)]
        for merge, stage in zip(self.merges, self.stages[1:], strict=True):
            outputs.append(stage(merge(outputs[-1])))
        return outputs

    def _fits(self, size: int) -> bool:
        if size < self.stride or size % self.stride:
            return False
        maps = (size // (self.patch_size * 2**stage) for stage in range(len(self.channels)))
        return all(length <= self.window_size or length % self.window_size == 0 for length in maps)

    def _nearest_sizes(self, size: int) -> list[int]:
        period = self.stride * self.window_size  # every multiple of it fits
        candidates = [s for s in range(self.stride, size + period + 1, self.stride) if self._fits(s)]
        below = [s for s in candidates if s < size]
        return below[-1:] + [s for s in candidates if s > size][:1]


def _per_stage(value: int | Sequence[int] | None, stages: int) -> list[Any]:
    values = [value] * stages if value is None or isinstance(value, int) else list(value)
    if len(values) != stages:
        raise ValueError(f"model.pretrained_window_size={values} must be one number or one for each of {stages} stages")
    return values


def _check(
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    window_size: int,
    patch_size: int,
    in_channels: int,
    drop_path: float,
) -> None:
    if len(depths) != len(num_heads) or not depths:
        raise ValueError(f"model.depths={list(depths)} and model.num_heads={list(num_heads)} must name the same stages")
    numbers = {"embed_dim": embed_dim, "window_size": window_size, "patch_size": patch_size, "in_channels": in_channels}
    for key, value in {**numbers, "depths": min(depths), "num_heads": min(num_heads)}.items():
        if value < 1:
            raise ValueError(f"model.{key}={value} must be positive")
    if not 0 <= drop_path < 1:
        raise ValueError(f"model.drop_path={drop_path} must be at least 0 and below 1")
    for stage, heads in enumerate(num_heads):
        if embed_dim * 2**stage % heads:
            raise ValueError(
                f"model.num_heads={list(num_heads)}: stage {stage + 1} has {embed_dim * 2**stage} channels, "
                f"which {heads} heads do not divide"
            )
