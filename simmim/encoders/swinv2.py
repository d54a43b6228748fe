"""Swin Transformer V2 (Liu et al., CVPR 2022, arXiv 2111.09883).

Shape letters: B images; H, W height and width of a token map; C channels; N windows an image; T tokens a window;
n heads; d channels a head; K chosen tokens of a batch. Tokens stay (B, N, T, C) throughout: they lie in memory window
by window, in the order of the block that comes next (see `simmim.encoders.windows`).
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.encoders.attention import IMPLEMENTATIONS, highest_weights, resolve_implementation, window_attention
from simmim.encoders.block import MultiHeadAttention, ResidualBlock
from simmim.encoders.encoder import Encoder, check_numbers, drop_rates
from simmim.encoders.position_bias import OFFSETS, PositionBiasTable, create_position_bias
from simmim.encoders.table_resizing import RESIZINGS
from simmim.encoders.windows import Geometry, Windows, merge, places, regions, reorder

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


NORMS = ("res_post", "pre")
"""Where the norms of a block stand: at the end of each residual branch (V2), or at its beginning (V1)."""

SIMILARITIES = ("cosine", "dot")
"""What attention compares queries and keys by: their scaled cosine (V2), or their dot product over sqrt(d) (V1)."""

V2: dict[str, Any] = {"position_bias": "log_cpb", "norm": "res_post", "attention_similarity": "cosine"}
"""What makes the encoder the second version."""

RESIZING = {"table_resizing": "bicubic"}
"""How the second version's paper moves the table that it compares its position bias to."""


class WindowAttention(MultiHeadAttention):
    """Multi-head attention within windows.

    Args:
        dim: Channels C.
        num_heads: Heads n, a divisor of C.
        similarity: One of `SIMILARITIES`.
        position_bias: See `simmim.encoders.position_bias`.
        implementation: See `simmim.encoders.attention`.
    """

    def __init__(
        self, dim: int, num_heads: int, *, similarity: str, position_bias: nn.Module, implementation: str
    ) -> None:
        super().__init__(dim, num_heads, position_bias=position_bias, implementation=implementation)
        self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1)) if similarity == "cosine" else None

    def attend(self, qkv: Tensor, context: Geometry) -> Tensor:
        """See `MultiHeadAttention.attend`; the context is the geometry of the windows."""
        assert self.position_bias is not None
        return window_attention(
            qkv,
            log_scale=self.logit_scale,
            table=self.position_bias(context.offsets),
            geometry=context,
            implementation=self.implementation,
        )

    def highest_weights(self, x: Tensor, context: Geometry) -> Tensor:
        """See `MultiHeadAttention.highest_weights`."""
        assert self.position_bias is not None
        table = self.position_bias(context.offsets)
        return highest_weights(self.project(x), log_scale=self.logit_scale, table=table, geometry=context)


class PostNorm(nn.LayerNorm):
    """The norm at the end of a residual branch; it begins at zero, and with it the branch."""

    def reset_parameters(self) -> None:
        """Zeros."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Block(ResidualBlock):
    """Window attention and MLP, each with its norm at the end of the residual branch (section 3.2), or as V1 in front.

    Args:
        dim: Channels C.
        num_heads: Heads n.
        shifted: Whether the windows are shifted by half a window.
        drop_path: Probability of dropping a residual branch for an image.
        extra_norm: Whether a norm follows on the main branch (models H and G).
        norm: One of `NORMS`.
        similarity: One of `SIMILARITIES`.
        position_bias: See `simmim.encoders.position_bias`.
        implementation: See `simmim.encoders.attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shifted: bool,
        drop_path: float,
        extra_norm: bool,
        norm: str,
        similarity: str,
        position_bias: nn.Module,
        implementation: str,
    ) -> None:
        attention = WindowAttention(
            dim, num_heads, similarity=similarity, position_bias=position_bias, implementation=implementation
        )
        norm_first = norm == "pre"
        create_norm = nn.LayerNorm if norm_first else PostNorm
        super().__init__(
            dim,
            attention,
            norm_first=norm_first,
            create_norm=create_norm,
            drop_path=drop_path,
            extra_norm=extra_norm,
        )
        self.shifted = shifted


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
    """Halves the map and doubles the channels; the norm comes last, or first as in the blocks."""

    def __init__(self, dim: int, *, norm: str) -> None:
        super().__init__()
        self.norm_first = norm == "pre"
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim if self.norm_first else 2 * dim)

    def forward(self, x: Tensor, source: Windows, target: Windows) -> Tensor:
        """(B, N, T, C) in the windows of source -> (B, N', T', 2C) in those of target, on half the map."""
        x = merge(x, source, target)
        x = self.reduction(self.norm(x)) if self.norm_first else self.norm(self.reduction(x))
        return x


class SwinTransformerV2(Encoder):
    """The encoder: four stages of blocks, the map halved between them.

    `simmim.encoders.create_encoder` makes the published sizes.

    Args:
        embed_dim: Channels of the first stage.
        depths: Blocks a stage.
        num_heads: Heads a stage; each divides its stage's channels.
        extra_norm_every: A norm on the main branch after so many blocks of a stage; 0 for none.
        window_size: Side of the attention window in tokens.
        pretrained_window_size: Window of an earlier training stage in tokens, one number, or for each stage of the
            encoder a number or [height, width], which
            a continuous position bias was trained with; None where this is the first training stage. A table has the
            room of `window_size` in any case: `simmim.encoders.weights.load_encoder_weights` moves it.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of the images.
        drop_path: Stochastic depth of the last block; it grows linearly from 0 at the first.
        attention: Implementation of the attention, see `simmim.encoders.attention`.
        position_bias: "log_cpb", "linear_cpb" or "table", see `simmim.encoders.position_bias`.
        norm: One of `NORMS`.
        attention_similarity: One of `SIMILARITIES`.
        table_resizing: A key of `RESIZINGS`: how `simmim.encoders.weights.load_encoder_weights` moves a table.

    Raises:
        ValueError: If the numbers contradict each other.
    """

    architecture = "swinv2"
    title = "Swin Transformer"
    implementations = tuple(IMPLEMENTATIONS)
    usual: ClassVar[dict[str, Any]] = {**V2, **RESIZING, "pretrained_window_size": None, "patch_size": 4}
    words = tuple(V2)
    fills_maps = True

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        extra_norm_every: int,
        window_size: int,
        pretrained_window_size: int | Sequence[int | Sequence[int]] | None,
        patch_size: int,
        in_channels: int,
        drop_path: float,
        attention: str,
        position_bias: str,
        norm: str,
        attention_similarity: str,
        table_resizing: str,
    ) -> None:
        super().__init__()
        trained_windows = _per_stage(pretrained_window_size, len(depths))
        check_numbers(
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            patch_size=patch_size,
            in_channels=in_channels,
            drop_path=drop_path,
        )
        _check_words(norm, attention_similarity, table_resizing)
        resolve_implementation(attention, torch.device("cpu"))
        self.config = {
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
            "position_bias": position_bias,
            "norm": norm,
            "attention_similarity": attention_similarity,
            "table_resizing": table_resizing,
        }
        self.patch_size = patch_size
        self.window_size = window_size
        self.trained_windows = trained_windows
        self.checkpointed_stages = []
        self.stride = patch_size * 2 ** (len(depths) - 1)
        self.channels = [embed_dim * 2**stage for stage in range(len(depths))]
        rates = iter(drop_rates(drop_path, sum(depths)))

        self.embed = PatchEmbedding(in_channels, embed_dim, patch_size)
        self.mask_token = nn.Parameter(torch.empty(embed_dim))
        self.stages = nn.ModuleList(
            nn.ModuleList(
                Block(
                    self.channels[stage],
                    num_heads[stage],
                    shifted=block % 2 == 1,
                    drop_path=next(rates),
                    extra_norm=extra_norm_every > 0 and (block + 1) % extra_norm_every == 0,
                    norm=norm,
                    similarity=attention_similarity,
                    position_bias=create_position_bias(position_bias, num_heads[stage], window_size=window_size),
                    implementation=attention,
                )
                for block in range(depth)
            )
            for stage, depth in enumerate(depths)
        )
        self.merges = nn.ModuleList(PatchMerging(channels, norm=norm) for channels in self.channels[:-1])
        self.norm = nn.LayerNorm(self.channels[-1])
        self.init_weights()

    @property
    def counts_in_trained_windows(self) -> bool:
        """Unless the position bias is a table."""
        return bool(self.config["position_bias"] != "table")

    @property
    def parts(self) -> list[nn.Module]:
        """What is computed one after the other: blocks and mergings."""
        return [*super().parts, *self.merges]

    @property
    def openings(self) -> list[nn.Module]:
        """Patches, and mergings."""
        return [self.embed, *self.merges]

    def layer_of(self, name: str) -> int:
        """See `Encoder.layer_of`; a merging belongs to the block below."""
        kind, *place = name.split(".")
        if kind == "merges":
            return sum(self.config["depths"][: int(place[0]) + 1])
        return super().layer_of(name)

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        """Linear weights from a truncated normal, biases zero; post-norms zero: such blocks start as identity."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, WindowAttention):
            nn.init.zeros_(module.q_bias)
            nn.init.zeros_(module.v_bias)
            if module.logit_scale is not None:
                nn.init.constant_(module.logit_scale, math.log(10))
        elif isinstance(module, PositionBiasTable):
            nn.init.trunc_normal_(module.table, std=0.02)
        elif isinstance(module, SwinTransformerV2):
            nn.init.trunc_normal_(module.mask_token, std=0.02)
        elif isinstance(module, nn.LayerNorm | nn.Conv2d):
            module.reset_parameters()

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Encoder.forward`."""
        self.check_image_size(*images.shape[-2:])
        x, windows = self._stage_outputs(images, mask)[-1]
        features: Tensor = self.norm(_as_map(x, windows))
        return features

    def features_at(self, images: Tensor, mask: Tensor | None, at: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """See `Encoder.features_at`."""
        self.check_image_size(*images.shape[-2:])
        x, _ = self._stage_outputs(images, mask, at)[-1]
        features: Tensor = self.norm(x)
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
        maps = [_as_map(x, windows) for x, windows in self._stage_outputs(images, None)]
        maps[-1] = self.norm(maps[-1])
        strides = [self.patch_size * 2**stage for stage in range(len(maps))]
        return [
            x[:, : math.ceil(height / s), : math.ceil(width / s)].permute(0, 3, 1, 2)
            for x, s in zip(maps, strides, strict=True)
        ]

    def windows(self, height: int, width: int) -> list[tuple[int, int]]:
        """See `Encoder.windows`: where the map is smaller, the window shrinks to it."""
        strides = [self.patch_size * 2**stage for stage in range(len(self.channels))]
        return [Windows.fit((height // s, width // s), self.window_size).window for s in strides]

    def fits(self, size: int) -> bool:
        """Whether whole patches, merges and windows tile images of a height or width in pixels."""
        if size < self.stride or size % self.stride:
            return False
        maps = (size // (self.patch_size * 2**stage) for stage in range(len(self.channels)))
        return all(length <= self.window_size or length % self.window_size == 0 for length in maps)

    def _stage_outputs(
        self, images: Tensor, mask: Tensor | None, at: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> list[tuple[Tensor, Windows]]:
        x = self.embed(images)  # (B, H, W, C)
        size = x.shape[1:3]
        x = self.hide(x, mask)
        x, windows = x.flatten(1, 2).unsqueeze(1), Windows.whole(size)  # (B, 1, H * W, C)
        outputs = []
        for number, stage in enumerate(self.blocks):
            if number > 0:
                size = (size[0] // 2, size[1] // 2)
                source, windows = windows, Windows.fit(size, self.window_size)
                x = self.merges[number - 1](x, source, windows)
            for block in stage:
                source, windows = windows, Windows.fit(size, self.window_size, shifted=block.shifted)
                rows = _rows(at, windows) if at is not None and block is self.blocks[-1][-1] else None
                geometry = self._geometry(windows, number, x.device)
                x = self.run(block, number, reorder(x, source, windows), geometry, rows)
            outputs.append((x, windows))
        return outputs

    def _geometry(self, windows: Windows, stage: int, device: torch.device) -> Geometry:
        trained = self.trained_windows[stage]
        spaced = OFFSETS[self.config["position_bias"]]
        offsets = spaced(windows.window, windows.window if trained is None else _sides(trained), device)
        return Geometry(windows.window, offsets, regions(windows, device))


def _as_map(x: Tensor, windows: Windows) -> Tensor:
    """(B, N, T, C) -> (B, H, W, C)."""
    return reorder(x, windows, Windows.whole(windows.size)).view(x.shape[0], *windows.size, -1)


def _rows(at: tuple[Tensor, Tensor, Tensor], windows: Windows) -> Tensor:
    """Where tokens of an image, a row and a column lie among the B * N * T of the windows: (K,)."""
    image, row, column = at
    slots = places(windows, image.device).argsort()  # of each place of the map
    return image * len(slots) + slots[row * windows.size[1] + column]


def _per_stage(value: int | Sequence[int | Sequence[int]] | None, stages: int) -> list[Any]:
    values = [value] * stages if value is None or isinstance(value, int) else list(value)
    if len(values) != stages:
        raise ValueError(f"model.pretrained_window_size={values} must be one number or one for each of {stages} stages")
    return values


def _sides(window: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a window that one number may stand for."""
    return (window, window) if isinstance(window, int) else (window[0], window[1])


def _check_words(norm: str, similarity: str, resizing: str) -> None:
    for key, value, words in (
        ("norm", norm, NORMS),
        ("attention_similarity", similarity, SIMILARITIES),
        ("table_resizing", resizing, tuple(RESIZINGS)),
    ):
        if value not in words:
            raise ValueError(f"model.{key}={value} is unknown: choose {' or '.join(words)}")
