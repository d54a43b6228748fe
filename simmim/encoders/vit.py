"""Vision Transformer, as SimMIM pretrains it (Xie et al., CVPR 2022, arXiv 2111.09886, section 4.1).

It is BEiT's (Bao et al., ICLR 2022, arXiv 2106.08254): pre-norm blocks, branches that are scaled a channel at a time,
a class token among the patches, and no absolute positions but a learnt bias for each offset between two patches.
Shape letters: B images; H, W height and width of the map of patches; C channels; T = 1 + H * W tokens, the class
token first; n heads; d channels a head; K chosen tokens of a batch.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.encoders.attention import PAIRWISE, highest_pairwise_weights, pairwise_attention, resolve_implementation
from simmim.encoders.block import MultiHeadAttention, ResidualBlock
from simmim.encoders.encoder import Encoder, check_numbers, drop_rates
from simmim.encoders.position_bias import PositionBiasTable, bias_of_pairs, linear_spaced_offsets
from simmim.encoders.table_resizing import RESIZINGS

SIZES: dict[str, dict[str, Any]] = {
    "vit_s": {"embed_dim": 384, "depths": (12,), "num_heads": (6,)},
    "vit_b": {"embed_dim": 768, "depths": (12,), "num_heads": (12,)},
    "vit_l": {"embed_dim": 1024, "depths": (24,), "num_heads": (16,)},
}
"""The published sizes (ViT, arXiv 2010.11929, table 1; S: DeiT, arXiv 2012.12877, table 1). SimMIM trains B."""

POSITION_BIASES = ("shared_table", "table")
"""One table for all blocks, as SimMIM pretrains, or one for each, as it fine-tunes."""

SHARED = "position_bias."
"""Where the one table lies."""

STD = 0.02
"""Standard deviation of new weights, which are also cut off there."""

create_norm = partial(nn.LayerNorm, eps=1e-6)


class Tokens(NamedTuple):
    """What attention has to know of the tokens of an image."""

    offsets: Tensor
    """Between two patches: see `simmim.encoders.position_bias.linear_spaced_offsets`."""
    bias: Tensor | None
    """(n, T, T), the bias that all blocks share; None where each has its own."""


class TokenPositionBias(PositionBiasTable):
    """One learnt value a head and offset between patches, and three for the pairs that the class token is in.

    Args:
        num_heads: Number of attention heads n.
        window_size: Side of the largest map in patches; a smaller one takes the middle, where its offsets lie.
    """

    def __init__(self, num_heads: int, *, window_size: int) -> None:
        super().__init__(num_heads, window_size=window_size)
        self.class_token = nn.Parameter(torch.empty(num_heads, 3))

    def forward(self, offsets: Tensor) -> Tensor:
        """Any offsets of a map (2H - 1, 2W - 1, 2) -> the bias of all pairs (n, T, T), queries before keys."""
        height, width = ((length + 1) // 2 for length in offsets.shape[:2])
        patches = bias_of_pairs(super().forward(offsets), (height, width))
        to_patch, from_patch, to_itself = self.class_token.to(patches.dtype)[:, :, None, None].unbind(1)
        count = height * width
        above = torch.cat([to_itself, to_patch.expand(-1, 1, count)], dim=2)  # (n, 1, T): the class token's queries
        return torch.cat([above, torch.cat([from_patch.expand(-1, count, 1), patches], dim=2)], dim=1)


class TokenAttention(MultiHeadAttention):
    """Attention among all tokens of an image. Its position bias is None where all blocks share one."""

    def attend(self, qkv: Tensor, context: Tokens) -> Tensor:
        """See `MultiHeadAttention.attend`."""
        return pairwise_attention(qkv, bias=self._bias(context), implementation=self.implementation)

    def highest_weights(self, x: Tensor, context: Tokens) -> Tensor:
        """See `MultiHeadAttention.highest_weights`."""
        return highest_pairwise_weights(self.project(x), bias=self._bias(context))

    def _bias(self, context: Tokens) -> Tensor:
        bias = context.bias if self.position_bias is None else self.position_bias(context.offsets)
        assert bias is not None
        return bias


class VisionTransformer(Encoder):
    """The encoder: one stage of blocks over all patches of an image and a class token.

    `simmim.encoders.create_encoder` makes the published sizes.

    Args:
        embed_dim: Channels C.
        depths: Blocks of the one stage, as [12].
        num_heads: Heads of its blocks, as [12]; they divide the channels.
        window_size: Side in patches of the largest map that the position bias has room for: 14 for 224 px.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of the images.
        drop_path: Stochastic depth of the last block; it grows linearly from 0 at the first.
        attention: "auto" or a key of `simmim.encoders.attention.PAIRWISE`.
        position_bias: One of `POSITION_BIASES`.
        layer_scale: What the channels of each branch are multiplied with at first; 0 for no such scales.
        table_resizing: A key of `RESIZINGS`: how `simmim.encoders.weights.load_encoder_weights` moves a table; as
            SimMIM does, "geometric".

    Raises:
        ValueError: If the numbers contradict each other.
    """

    architecture = "vit"
    title = "Vision Transformer"
    implementations = tuple(PAIRWISE)
    usual: ClassVar[dict[str, Any]] = {
        "patch_size": 16,
        "position_bias": "shared_table",
        "layer_scale": 0.1,
        "table_resizing": "geometric",
    }
    words = ("position_bias",)
    fills_maps = False

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int,
        patch_size: int,
        in_channels: int,
        drop_path: float,
        attention: str,
        position_bias: str,
        layer_scale: float,
        table_resizing: str,
    ) -> None:
        super().__init__()
        self.config = {
            "embed_dim": embed_dim,
            "depths": list(depths),
            "num_heads": list(num_heads),
            "window_size": window_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "drop_path": drop_path,
            "attention": attention,
            "position_bias": position_bias,
            "layer_scale": layer_scale,
            "table_resizing": table_resizing,
        }
        _check(self.config)
        self.patch_size = self.stride = patch_size
        self.window_size = window_size
        self.checkpointed_stages = []
        self.channels = [embed_dim]
        shared = position_bias == "shared_table"

        def create_position_bias() -> TokenPositionBias:
            return TokenPositionBias(num_heads[0], window_size=window_size)

        self.mask_token = nn.Parameter(torch.empty(embed_dim))
        self.class_token = nn.Parameter(torch.empty(embed_dim))
        self.embed = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)
        self.position_bias = create_position_bias() if shared else None
        blocks = (
            ResidualBlock(
                embed_dim,
                TokenAttention(
                    embed_dim,
                    num_heads[0],
                    position_bias=None if shared else create_position_bias(),
                    implementation=attention,
                ),
                norm_first=True,
                create_norm=create_norm,
                drop_path=rate,
                layer_scale=layer_scale > 0,
            )
            for rate in drop_rates(drop_path, depths[0])
        )
        self.stages = nn.ModuleList([nn.ModuleList(blocks)])
        self.norm = create_norm(embed_dim)
        self.init_weights()

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        """A truncated normal, biases and tables zero; the last layer of a branch is the smaller the higher it stands.

        That by 1 / sqrt(2 l) in block l, counted from 1 (BEiT, section 2.4).
        """
        if isinstance(module, nn.Linear | nn.Conv2d):
            _truncated(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if level := self._ends_branch_of(module):
                module.weight.div_(math.sqrt(2 * level))
        elif isinstance(module, TokenAttention):
            nn.init.zeros_(module.q_bias)
            nn.init.zeros_(module.v_bias)
        elif isinstance(module, TokenPositionBias):
            nn.init.zeros_(module.table)
            nn.init.zeros_(module.class_token)
        elif isinstance(module, ResidualBlock) and module.gamma1 is not None and module.gamma2 is not None:
            nn.init.constant_(module.gamma1, self.config["layer_scale"])
            nn.init.constant_(module.gamma2, self.config["layer_scale"])
        elif isinstance(module, VisionTransformer):
            _truncated(module.mask_token)
            _truncated(module.class_token)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Encoder.forward`. The class token is none of the features."""
        self.check_image_size(*images.shape[-2:])
        features: Tensor = self.norm(self._patches(images, mask))
        return features

    def features_at(self, images: Tensor, mask: Tensor | None, at: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """See `Encoder.features_at`."""
        self.check_image_size(*images.shape[-2:])
        features: Tensor = self.norm(self._tokens(images, mask, at))
        return features

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """The one map, normalised, of images that are padded with zeros to whole patches.

        Raises:
            ValueError: If the position bias has no room for the map.
        """
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.stride, 0, -height % self.stride))
        self.check_image_size(*images.shape[-2:])
        return [self.norm(self._patches(images, None)).permute(0, 3, 1, 2)]

    def pooled(self, images: Tensor) -> Tensor:
        """The mean of the patches, then the norm, as SimMIM fine-tunes: (B, C). Elsewhere the norm comes first."""
        self.check_image_size(*images.shape[-2:])
        pooled: Tensor = self.norm(self._patches(images, None).mean(dim=(1, 2)))
        return pooled

    def windows(self, height: int, width: int) -> list[tuple[int, int]]:
        """The map, which attention sees as a whole."""
        return [(height // self.patch_size, width // self.patch_size)]

    def fits(self, size: int) -> bool:
        """Whether it is whole patches, and no more than the position bias has room for."""
        return size % self.patch_size == 0 and 1 <= size // self.patch_size <= self.window_size

    def _patches(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, W, C), before the norm."""
        height, width = (side // self.patch_size for side in images.shape[-2:])
        return self._tokens(images, mask)[:, 0, 1:].view(len(images), height, width, -1)

    def _tokens(self, images: Tensor, mask: Tensor | None, at: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """All tokens of all images, as of one window each, (B, 1, T, C); or those of some patches, (K, C)."""
        x = self.hide(self.embed(images).permute(0, 2, 3, 1), mask)  # (B, H, W, C)
        (height, width), rows = x.shape[1:3], None
        if at is not None:
            rows = at[0] * (1 + height * width) + 1 + at[1] * width + at[2]
        offsets = linear_spaced_offsets((height, width), (height, width), x.device)
        context = Tokens(offsets, None if self.position_bias is None else self.position_bias(offsets))
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x.flatten(1, 2)], dim=1)  # (B, T, C)
        x = x.unsqueeze(1)  # (B, 1, T, C)
        blocks = self.blocks[0]
        for block in blocks:
            x = self.run(block, 0, x, context, rows if block is blocks[-1] else None)
        return x

    def _ends_branch_of(self, layer: nn.Module) -> int | None:
        """The block, counted from 1, of which this is the last layer of a branch."""
        ends = ((block.attention.proj, block.mlp[-1]) for block in self.blocks[0])
        return next((number for number, layers in enumerate(ends, 1) if layer in layers), None)


def spread_table(weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Gives each of so many blocks the position bias that all have shared: how SimMIM begins to fine-tune."""
    shared = {key.removeprefix(SHARED): value for key, value in weights.items() if key.startswith(SHARED)}
    own = {
        f"stages.0.{block}.attention.{SHARED}{key}": value.clone()  # else all would be trained as one
        for block in range(depth)
        for key, value in shared.items()
    }
    return {key: value for key, value in weights.items() if not key.startswith(SHARED)} | own


def _truncated(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, std=STD, a=-STD, b=STD)


def _check(config: Mapping[str, Any]) -> None:
    others = {"attention", "position_bias", "layer_scale", "table_resizing"}
    check_numbers(**{key: config[key] for key in config if key not in others})
    if len(config["depths"]) != 1:
        raise ValueError(f"model.depths={config['depths']}: a Vision Transformer has one stage, as model.depths=[12]")
    if config["layer_scale"] < 0:
        raise ValueError(f"model.layer_scale={config['layer_scale']} must not be negative; 0 is for none")
    if config["position_bias"] not in POSITION_BIASES:
        raise ValueError(
            f"model.position_bias={config['position_bias']} is none of a Vision Transformer: choose "
            f"{' or '.join(POSITION_BIASES)}"
        )
    if config["table_resizing"] not in RESIZINGS:
        raise ValueError(f"model.table_resizing={config['table_resizing']} is unknown: choose {' or '.join(RESIZINGS)}")
    resolve_implementation(config["attention"], torch.device("cpu"), PAIRWISE)
