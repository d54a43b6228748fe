"""Encoders: what turns an image, and a mask, into features. They know nothing of Lightning or Hydra."""

from collections.abc import Sequence
from typing import Any

from simmim.encoders import swin, swinv2
from simmim.encoders.swinv2 import SwinTransformerV2

__all__ = ["SIZES", "SwinTransformerV2", "create_encoder"]

SIZES = {
    **{name: {**swinv2.V2, **swinv2.RESIZING, **size} for name, size in swinv2.SIZES.items()},
    **{name: {**swin.RESIZING, **size} for name, size in swin.SIZES.items()},
}
"""The published sizes of both versions, with what makes each the one or the other."""


def create_encoder(
    name: str,
    *,
    window_size: int,
    pretrained_window_size: int | Sequence[int | Sequence[int]] | None = None,
    patch_size: int = 4,
    in_channels: int = 3,
    drop_path: float = 0.0,
    attention: str = "auto",
    embed_dim: int | None = None,
    depths: Sequence[int] | None = None,
    num_heads: Sequence[int] | None = None,
    extra_norm_every: int | None = None,
    position_bias: str | None = None,
    norm: str | None = None,
    attention_similarity: str | None = None,
    table_resizing: str | None = None,
) -> SwinTransformerV2:
    """Makes an encoder of a published size, or of one's own.

    Args:
        name: "swinv2_t", "_s", "_b", "_l", "_h", "_g"; "swin_t", "_s", "_b", "_l" of the first version; or "swinv2" for
            a size of one's own, given in full.
        window_size: See `SwinTransformerV2`, as all that follow.
        pretrained_window_size: Window of an earlier training stage.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of the images.
        drop_path: Stochastic depth of the last block.
        attention: Implementation of the attention.
        embed_dim: Overrides the published value where given; so do all that follow.
        depths: Blocks a stage.
        num_heads: Heads a stage.
        extra_norm_every: Blocks between two extra norms.
        position_bias: Kind of the position bias; that of V2 where neither this nor the published size says.
        norm: Place of the norms, likewise.
        attention_similarity: What attention compares by, likewise.
        table_resizing: How a table of positions is moved to another window, likewise.

    Raises:
        ValueError: If the name is unknown, a size is incomplete, or the numbers contradict each other.
    """
    if name != "swinv2" and name not in SIZES:
        raise ValueError(f"model.name={name} is unknown: choose one of {', '.join(SIZES)}, or swinv2")
    own: dict[str, Any] = {
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": num_heads,
        "extra_norm_every": extra_norm_every,
        "position_bias": position_bias,
        "norm": norm,
        "attention_similarity": attention_similarity,
        "table_resizing": table_resizing,
    }
    given = {key: value for key, value in own.items() if value is not None}
    size = {**swinv2.V2, **swinv2.RESIZING, **SIZES.get(name, {}), **given}
    if missing := [key for key in own if key not in size]:
        raise ValueError(f"model.name={name} is a size of one's own: give model.{', model.'.join(missing)} too")
    return SwinTransformerV2(
        window_size=window_size,
        pretrained_window_size=pretrained_window_size,
        patch_size=patch_size,
        in_channels=in_channels,
        drop_path=drop_path,
        attention=attention,
        **size,
    )
