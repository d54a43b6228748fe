"""Encoders: what turns an image, and a mask, into features. They know nothing of Lightning or Hydra."""

import inspect
from typing import Any

from simmim.encoders import swin, swinv2, vit
from simmim.encoders.encoder import Encoder
from simmim.encoders.swinv2 import SwinTransformerV2
from simmim.encoders.vit import VisionTransformer

__all__ = [
    "ENCODERS",
    "PUBLISHED",
    "SIZES",
    "Encoder",
    "SwinTransformerV2",
    "VisionTransformer",
    "architecture_of",
    "create_encoder",
    "settings_of",
]

ENCODERS: dict[str, type[Encoder]] = {
    encoder.architecture: encoder for encoder in (SwinTransformerV2, VisionTransformer)
}
"""All architectures."""

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "swinv2": {
        **{name: {**swinv2.V2, **swinv2.RESIZING, **size} for name, size in swinv2.SIZES.items()},
        **{name: {**swin.RESIZING, **size} for name, size in swin.SIZES.items()},
    },
    "vit": vit.SIZES,
}
"""The published sizes of each; those of both versions of Swin, with what makes each the one or the other."""

USUAL: dict[str, Any] = {"in_channels": 3, "drop_path": 0.0, "attention": "auto"}
"""What the settings of any are where nobody says."""

SIZES = {name: size for sizes in PUBLISHED.values() for name, size in sizes.items()}
"""All of them."""


def architecture_of(name: str) -> str:
    """The architecture of a published size, or of the word for a size of one's own.

    Args:
        name: See `create_encoder`.

    Raises:
        ValueError: If the name is unknown.
    """
    for architecture, sizes in PUBLISHED.items():
        if name == architecture or name in sizes:
            return architecture
    raise ValueError(f"model.name={name} is unknown: choose one of {', '.join([*SIZES, *PUBLISHED])}")


def settings_of(architecture: str) -> list[str]:
    """The settings that an architecture has: the arguments of its constructor."""
    return list(inspect.signature(ENCODERS[architecture]).parameters)


def create_encoder(name: str, **settings: Any) -> Encoder:
    """Makes an encoder of a published size, or of one's own.

    Args:
        name: "swinv2_t", "_s", "_b", "_l", "_h", "_g"; "swin_t", "_s", "_b", "_l" of the first version; "vit_s",
            "_b", "_l"; or the name of an architecture, "swinv2" or "vit", for a size of one's own, given in full.
        **settings: Arguments of the class of the architecture, `window_size` at least. What is None or left out is as
            published, or as usual for the architecture; a setting that it does not have must be None.

    Raises:
        ValueError: If the name is unknown, a size is incomplete, the architecture has no such setting, or the numbers
            contradict each other.
    """
    architecture = architecture_of(name)
    encoder, known = ENCODERS[architecture], settings_of(architecture)
    given = {key: value for key, value in settings.items() if value is not None}
    if foreign := [key for key in given if key not in known]:
        key = foreign[0]
        raise ValueError(f"model.{key}={given[key]} is nothing that model.name={name} has: give model.{key}=null")
    size = USUAL | encoder.usual | SIZES.get(name, {}) | given
    if missing := [key for key in known if key not in size]:
        raise ValueError(f"model.name={name} does not say all: give model.{', model.'.join(missing)} too")
    return encoder(**size)
