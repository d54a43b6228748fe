"""How a signal goes through an encoder: features and attention forward, gradients backward.

In deep pre-norm encoders the variance of the features grows from block to block, and the attention of some heads is
dominated by single keys (Swin Transformer V2, arXiv 2111.09883, sections 3.2 and 3.3). Nothing here changes what is
trained. Shape letters: B images; N windows an image; T tokens a window; C channels; n heads.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from simmim.training.optimizer import norm_of

COLUMNS = ("layer", "part", "variance", "attention_mean", "attention_max", "gradient_norm")
"""Of a table of `rows_of`."""


class Blocks(NamedTuple):
    """What is measured of a forward pass, block by block."""

    variance: Tensor
    """(blocks,), see `feature_variance`."""
    attention: list[Tensor]
    """(n,) a block, see `simmim.encoders.attention.highest_weights`."""

    @property
    def variance_ratio(self) -> float:
        """The highest variance over the lowest."""
        return float(self.variance.max() / self.variance.min())

    @property
    def highest_attention(self) -> float:
        """Of the head that is dominated most."""
        return float(torch.cat(self.attention).max())


def feature_variance(x: Tensor) -> Tensor:
    """The variance of a token over its channels, on average over tokens and images: (..., C) -> a scalar, in fp32.

    As in a layer norm, the squared deviations are divided by C.
    """
    return x.float().var(dim=-1, correction=0).mean()


@torch.no_grad()
def measure_blocks(encoder: Any, forward: Callable[[], Any]) -> Blocks:
    """Measures what comes out of each block of an encoder, and its attention, in one forward pass.

    Args:
        encoder: Its `blocks` are measured: a list of lists, each block with an `attention`.
        forward: Lets the encoder see images, once. Compiled blocks run as they are written, and are not compiled anew.
    """
    blocks = [block for stage in encoder.blocks for block in stage]
    variance, attention = torch.zeros(len(blocks)), [torch.empty(0)] * len(blocks)

    def look_behind(at: int, block: nn.Module, inputs: Any, out: Tensor) -> None:
        variance[at] = feature_variance(out)

    def look_into(at: int, layer: Any, inputs: tuple[Any, ...]) -> None:
        attention[at] = layer.highest_weights(*inputs[:2])

    # Before the attention, and not behind the block: a sharded block has its parameters only while it computes.
    hooks = [block.attention.register_forward_pre_hook(partial(look_into, at)) for at, block in enumerate(blocks)]
    hooks += [block.register_forward_hook(partial(look_behind, at)) for at, block in enumerate(blocks)]
    try:
        with torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return Blocks(variance.to(attention[0].device), attention)


def rows_of(network: Any, blocks: Blocks) -> list[dict[str, Any]]:
    """A row of `COLUMNS` for each block, and for what lies below, between and above them, which has a gradient alone.

    A gradient norm is that of all parameters of a row, over all processes: their squares add up to that of the whole.

    Args:
        network: What holds the gradients, with an `encoder` and a `layer_of`; all processes call this.
        blocks: What was measured of its encoder.
    """
    stages = network.encoder.blocks
    names = [f"stage {at + 1}, block {number + 1}" for at, stage in enumerate(stages) for number in range(len(stage))]
    inside = {parameter for stage in stages for block in stage for parameter in block.parameters()}
    gradients: dict[tuple[int, bool], list[Tensor]] = {}
    for name, parameter in network.named_parameters():
        own = gradients.setdefault((network.layer_of(name), parameter not in inside), [])
        if parameter.grad is not None:
            own.append(parameter.grad)
    rows = []
    for (layer, outside), own in sorted(gradients.items(), key=lambda item: item[0]):
        values: tuple[Any, ...] = (None, None, None)
        if outside:
            part = "patches" if layer == 0 else "merging" if layer <= len(names) else "top"
        else:
            part, heads = names[layer - 1], blocks.attention[layer - 1]
            values = (float(blocks.variance[layer - 1]), float(heads.mean()), float(heads.max()))
        rows.append(dict(zip(COLUMNS, (layer, part, *values, float(norm_of(own))), strict=True)))
    return rows
