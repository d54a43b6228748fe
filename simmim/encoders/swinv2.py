"""Swin Transformer V2 (Liu et al., CVPR 2022, arXiv 2111.09883).

Shape letters: B images; H, W height and width of a token map; C channels; N windows an image; T tokens a window;
n heads; d channels a head; K chosen tokens of a batch. Tokens stay (B, N, T, C) throughout: they lie in memory window
by window, in the order of the block that comes next (see `simmim.encoders.windows`).
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from simmim.encoders.attention import resolve_implementation, window_attention
from simmim.encoders.mlp import MLP
from simmim.encoders.position_bias import OFFSETS, PositionBiasTable, create_position_bias
from simmim.encoders.table_resizing import RESIZINGS
from simmim.encoders.windows import Geometry, Windows, merge, places, regions, reorder
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


NORMS = ("res_post", "pre")
"""Where the norms of a block stand: at the end of each residual branch (V2), or at its beginning (V1)."""

SIMILARITIES = ("cosine", "dot")
"""What attention compares queries and keys by: their scaled cosine (V2), or their dot product over sqrt(d) (V1)."""

V2: dict[str, Any] = {"position_bias": "log_cpb", "norm": "res_post", "attention_similarity": "cosine"}
"""What makes the encoder the second version."""

RESIZING = {"table_resizing": "bicubic"}
"""How the second version's paper moves the table that it compares its position bias to."""


class WindowAttention(nn.Module):
    """Multi-head attention within windows. The key has no bias: to a softmax over keys it would make no difference.

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
        super().__init__()
        self.num_heads = num_heads
        self.implementation = implementation
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.empty(dim))
        self.v_bias = nn.Parameter(torch.empty(dim))
        self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1)) if similarity == "cosine" else None
        self.position_bias = position_bias
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, geometry: Geometry, rows: Tensor | None = None) -> Tensor:
        """Attends within each window: (B, N, T, C) -> (B, N, T, C), or (K, C) of the B * N * T tokens in rows."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = torch.addmm(bias[:, None], self.qkv.weight, x.flatten(0, 2).t())  # (3C, B * N * T)
        out = window_attention(
            qkv.view(3, self.num_heads, -1, x.shape[0] * x.shape[1], x.shape[2]),  # (3, n, d, B * N, T)
            log_scale=self.logit_scale,
            table=self.position_bias(geometry.offsets),
            geometry=geometry,
            implementation=self.implementation,
        )
        out = out.reshape(x.shape[3], -1).t()  # (B * N * T, C)
        if rows is not None:
            return self.proj(out[rows])  # type: ignore[no-any-return]
        return self.proj(out).view(x.shape)  # type: ignore[no-any-return]


class PostNorm(nn.LayerNorm):
    """The norm at the end of a residual branch; it begins at zero, and with it the branch."""

    def reset_parameters(self) -> None:
        """Zeros."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Block(nn.Module):
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
        super().__init__()
        self.shifted = shifted
        self.norm_first = norm == "pre"
        create_norm = nn.LayerNorm if self.norm_first else PostNorm
        self.attention = WindowAttention(
            dim, num_heads, similarity=similarity, position_bias=position_bias, implementation=implementation
        )
        self.norm1 = create_norm(dim)
        self.mlp = MLP(dim)
        self.norm2 = create_norm(dim)
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.extra_norm = nn.LayerNorm(dim) if extra_norm else nn.Identity()

    def forward(self, x: Tensor, geometry: Geometry, rows: Tensor | None = None) -> Tensor:
        """(B, N, T, C) -> (B, N, T, C), or (K, C) of the B * N * T tokens in rows, the only ones to go on."""
        attended = self.attention(self.norm1(x) if self.norm_first else x, geometry, rows)
        batch, image = x.shape[0], None
        if rows is not None:
            image = torch.div(rows, x.shape[1] * x.shape[2], rounding_mode="floor")
            x = x.flatten(0, 2)[rows]
        x = x + self.drop(attended if self.norm_first else self.norm1(attended), batch, image)
        mixed = self.mlp(self.norm2(x)) if self.norm_first else self.norm2(self.mlp(x))
        x = x + self.drop(mixed, batch, image)
        x = self.extra_norm(x)
        return x

    def drop(self, branch: Tensor, batch: int, image: Tensor | None) -> Tensor:
        """Drops the branch for some images: all tokens, or those whose image is given, of a batch of so many."""
        if image is None or not self.training:
            return self.drop_path(branch)  # type: ignore[no-any-return]
        kept: Tensor = self.drop_path(branch.new_ones(batch, 1))
        return branch * kept[image]


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


class SwinTransformerV2(nn.Module):
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

    Attributes:
        checkpointed_stages: Stages, counted from 0, whose blocks the backward pass computes again instead of keeping
            what is in them. See `checkpoint_activations`.

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
        _check(embed_dim, depths, num_heads, window_size, patch_size, in_channels, drop_path)
        _check_words(norm, attention_similarity, table_resizing)
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
            "position_bias": position_bias,
            "norm": norm,
            "attention_similarity": attention_similarity,
            "table_resizing": table_resizing,
        }
        self.patch_size = patch_size
        self.window_size = window_size
        self.trained_windows = trained_windows
        self.checkpointed_stages: list[int] = []
        self.stride = patch_size * 2 ** (len(depths) - 1)
        self.channels = [embed_dim * 2**stage for stage in range(len(depths))]
        blocks = sum(depths)
        rates = iter(drop_path * block / max(blocks - 1, 1) for block in range(blocks))

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
    def blocks(self) -> list[list[Block]]:
        """The blocks of each stage."""
        return [[cast(Block, block) for block in stage.children()] for stage in self.stages]

    @property
    def parts(self) -> list[nn.Module]:
        """What is computed one after the other: blocks and mergings."""
        return [*(block for stage in self.blocks for block in stage), *self.merges]

    def layer_of(self, name: str) -> int:
        """How high above the images a parameter stands, for learning rates by layer.

        Patches and mask token are layer 0, block i is i + 1, a merging belongs to the block below, the rest is on top.
        """
        depths: list[int] = self.config["depths"]
        kind, *place = name.split(".")
        if kind == "stages":
            return 1 + sum(depths[: int(place[0])]) + int(place[1])
        if kind == "merges":
            return sum(depths[: int(place[0]) + 1])
        return 0 if kind in ("embed", "mask_token") else sum(depths) + 1

    def checkpoint_activations(self, stages: str | Sequence[int]) -> None:
        """Chooses the stages whose blocks are computed again in the backward pass, instead of being kept in memory.

        Args:
            stages: "none", "all", or some, counted from 1 as in the paper.

        Raises:
            ValueError: If a stage does not exist.
        """
        every = list(range(1, len(self.stages) + 1))
        chosen = {"none": [], "all": every}.get(stages) if isinstance(stages, str) else list(stages)
        if chosen is None or not set(chosen) <= set(every):
            raise ValueError(
                f"trainer.activation_checkpointing={stages} must be none, all, or a list of stages, 1 to {every[-1]}"
            )
        self.checkpointed_stages = [stage - 1 for stage in chosen]

    def compile_blocks(self) -> None:
        """Compiles each block in place: blocks of one geometry share their code, parameters keep their names."""
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # one a geometry
        for stage in self.blocks:
            for block in stage:
                block.compile()

    def init_weights(self) -> None:
        """Linear weights from a truncated normal, biases zero; post-norms zero: such blocks start as identity."""
        for module in self.modules():
            self.init_module(module)

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        """Gives initial values to the parameters that one module of the encoder itself holds."""
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
        x, windows = self._stage_outputs(images, mask)[-1]
        features: Tensor = self.norm(_as_map(x, windows))
        return features

    def features_at(self, images: Tensor, mask: Tensor | None, at: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Some of the features of `forward`: what else the last block would compute is left out.

        Args:
            images: See `forward`.
            mask: See `forward`.
            at: Image, row and column of each wanted feature, integers (K,) each.

        Returns:
            (K, channels of the last stage), equal to `forward(images, mask)[at]`.
        """
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
        """The window of each stage, in tokens, on images of a size in pixels: what a later stage was trained with."""
        strides = [self.patch_size * 2**stage for stage in range(len(self.channels))]
        return [Windows.fit((height // s, width // s), self.window_size).window for s in strides]

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

    def _stage_outputs(
        self, images: Tensor, mask: Tensor | None, at: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> list[tuple[Tensor, Windows]]:
        x = self.embed(images)  # (B, H, W, C)
        size = x.shape[1:3]
        if mask is not None:
            hidden = expand_mask(mask, *size).unsqueeze(-1)  # (B, H, W, 1)
            x = torch.where(hidden, self.mask_token.to(x.dtype), x)
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
                inputs = (reorder(x, source, windows), self._geometry(windows, number, x.device), rows)
                if number in self.checkpointed_stages and torch.is_grad_enabled():
                    x = checkpoint(block, *inputs, use_reentrant=False)
                else:
                    x = block(*inputs)
            outputs.append((x, windows))
        return outputs

    def _geometry(self, windows: Windows, stage: int, device: torch.device) -> Geometry:
        trained = self.trained_windows[stage]
        spaced = OFFSETS[self.config["position_bias"]]
        offsets = spaced(windows.window, windows.window if trained is None else _sides(trained), device)
        return Geometry(windows.window, offsets, regions(windows, device))

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


def _check_words(norm: str, similarity: str, resizing: str) -> None:
    for key, value, words in (
        ("norm", norm, NORMS),
        ("attention_similarity", similarity, SIMILARITIES),
        ("table_resizing", resizing, tuple(RESIZINGS)),
    ):
        if value not in words:
            raise ValueError(f"model.{key}={value} is unknown: choose {' or '.join(words)}")
