"""What every encoder is to the program: images, and a mask, in; features out.

An architecture is a file with a subclass of `Encoder` and a table of its published sizes, both named in
`simmim.encoders`, a file in `conf/model/` and a test. Shape letters: B images; H, W height and width of a token map;
C channels; K chosen tokens of a batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simmim.encoders.block import ResidualBlock
from simmim.masking import expand_mask


class Encoder(nn.Module, ABC):
    """An encoder: one or more stages of blocks over a map of tokens.

    The arguments of a subclass's constructor are its settings, which `config` holds: with its `architecture` they
    rebuild it.

    Attributes:
        architecture: Its name in encoder files, and in `model.name` for a size of one's own.
        title: Its name in words.
        implementations: Those of `simmim.encoders.attention` that compute its attention.
        usual: What its settings are where neither the user nor a published size says.
        fills_maps: Whether it computes maps that its windows do not tile too, filled up, as `pyramid` does.
        words: Those of its settings that are words and decide what the weights mean.
        config: The arguments of its constructor.
        patch_size: Side of a patch in pixels.
        window_size: Side in tokens of the largest window that attention sees at once.
        stride: Side in pixels of a token of the last map.
        channels: C of each stage.
        checkpointed_stages: Stages, counted from 0, whose blocks the backward pass computes again instead of keeping
            what is in them. See `checkpoint_activations`.
        embed: Cuts images into patches; what the first stage begins with.
        mask_token: (C,), stands for hidden patches.
        stages: The blocks of each stage.
        norm: Of the last map.
    """

    architecture: ClassVar[str]
    title: ClassVar[str]
    implementations: ClassVar[tuple[str, ...]]
    usual: ClassVar[dict[str, Any]]
    words: ClassVar[tuple[str, ...]]
    fills_maps: ClassVar[bool]

    config: dict[str, Any]
    patch_size: int
    window_size: int
    stride: int
    channels: list[int]
    checkpointed_stages: list[int]
    embed: nn.Module
    mask_token: nn.Parameter
    stages: nn.ModuleList
    norm: nn.LayerNorm

    @abstractmethod
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

    @abstractmethod
    def features_at(self, images: Tensor, mask: Tensor | None, at: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Some of the features of `forward`: what else the last block would compute is left out.

        Args:
            images: See `forward`.
            mask: See `forward`.
            at: Image, row and column of each wanted feature, integers (K,) each.

        Returns:
            (K, channels of the last stage), equal to `forward(images, mask)[at]`.
        """

    @abstractmethod
    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Feature maps of every stage, (B, C, height/s, width/s) for its stride s, for dense tasks.

        Images are padded with zeros to a multiple of the stride; the last map is normalised.
        """

    def pooled(self, images: Tensor) -> Tensor:
        """What a classifier sees of images, none of them hidden: the mean of the features, (B, C)."""
        features = self(images)
        pooled: Tensor = features.mean(dim=(1, 2), dtype=torch.promote_types(features.dtype, torch.float32))
        return pooled

    @abstractmethod
    def windows(self, height: int, width: int) -> list[tuple[int, int]]:
        """The window of each stage, in tokens, on images of a size in pixels: what a later stage was trained with."""

    @abstractmethod
    def init_module(self, module: nn.Module) -> None:
        """Gives initial values to the parameters that one module of the encoder itself holds."""

    @abstractmethod
    def fits(self, size: int) -> bool:
        """Whether images may have this height or width in pixels."""

    @property
    def counts_in_trained_windows(self) -> bool:
        """Whether its position bias must be told in which windows it was trained, as a continuous one."""
        return False

    @property
    def blocks(self) -> list[list[ResidualBlock]]:
        """The blocks of each stage."""
        return [[cast(ResidualBlock, block) for block in stage.children()] for stage in self.stages]

    @property
    def parts(self) -> list[nn.Module]:
        """What is computed one after the other: all blocks, at least."""
        return [block for stage in self.blocks for block in stage]

    @property
    def openings(self) -> list[nn.Module]:
        """The module that each stage begins with, besides its blocks."""
        return [self.embed]

    def layer_of(self, name: str) -> int:
        """How high above the images a parameter stands, for learning rates by layer.

        Patches and tokens are layer 0, block i is i + 1, the rest is on top.
        """
        depths: list[int] = self.config["depths"]
        kind, *place = name.split(".")
        if kind == "stages":
            return 1 + sum(depths[: int(place[0])]) + int(place[1])
        return 0 if kind in ("embed", "mask_token", "class_token") else sum(depths) + 1

    def check_image_size(self, height: int, width: int) -> None:
        """Refuses a size in pixels that the encoder cannot see.

        Raises:
            ValueError: With the nearest sizes that fit.
        """
        bad = {size: self._nearest_sizes(size) for size in (height, width) if not self.fits(size)}
        if bad:
            ways = "; ".join(f"{size} -> {' or '.join(map(str, near))}" for size, near in bad.items())
            raise ValueError(
                f"image size {height}x{width} px does not fit model.patch_size={self.patch_size} and "
                f"model.window_size={self.window_size}: the nearest data.image_size that do are {ways}, or change "
                "the window"
            )

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
        """Gives all parameters their initial values."""
        for module in self.modules():
            self.init_module(module)

    def hide(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Puts the mask token in the place of hidden patches, (B, H, W, C)."""
        if mask is None:
            return x
        hidden = expand_mask(mask, x.shape[1], x.shape[2]).unsqueeze(-1)  # (B, H, W, 1)
        return torch.where(hidden, self.mask_token.to(x.dtype), x)

    def run(self, block: ResidualBlock, stage: int, *inputs: Any) -> Tensor:
        """What a block makes of its inputs, in a way that the backward pass may compute it again."""
        if stage in self.checkpointed_stages and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
        return block(*inputs)  # type: ignore[no-any-return]

    def _nearest_sizes(self, size: int) -> list[int]:
        period = self.stride * self.window_size  # every multiple of it is whole windows
        candidates = [s for s in range(self.stride, size + period + 1, self.stride) if self.fits(s)]
        below = [s for s in candidates if s < size]
        return below[-1:] + [s for s in candidates if s > size][:1]


def drop_rates(drop_path: float, blocks: int) -> list[float]:
    """Stochastic depth of so many blocks: linear from 0 at the first to `drop_path` at the last."""
    return [drop_path * block / max(blocks - 1, 1) for block in range(blocks)]


def check_numbers(
    *,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    window_size: int,
    patch_size: int,
    in_channels: int,
    drop_path: float,
) -> None:
    """Refuses sizes that contradict each other; channels double from stage to stage.

    Raises:
        ValueError: With the setting.
    """
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
