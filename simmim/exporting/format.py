"""What every format of an export can do: be written, be read back by those whose it is, and be explained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from simmim.encoders.swinv2 import V2, SwinTransformerV2
from simmim.encoders.windows import Windows
from simmim.exporting.model import Model, Outputs

Reader = Callable[[Tensor], Outputs]
"""Normalised images (B, c, H, W) to what a library computes of them with the file that was written."""


@dataclass(frozen=True)
class Format:
    """A format that a model is exported to.

    Args:
        name: As in `format=<name>`.
        ending: Of the file that it is; "" for a folder.
        library: Module that reads it back.
        install: What to give to pip for it.
        with_decoder: Whether it has a place for SimMIM's head.
        readable: Whether `encoder=…` reads it.
        write: Writes a model to a path, which does not exist yet. A ValueError says what the format cannot hold.
        readers: Ways of computing with what was written, each in a few words. It is right if one of them agrees.
        usage: Markdown with the code that loads it from a path.
    """

    name: str
    ending: str
    library: str
    install: str
    with_decoder: bool
    readable: bool
    write: Callable[[Model, Path], None]
    readers: Callable[[Model, Path], Mapping[str, Reader]]
    usage: Callable[[Model, str], str]


def check_version(model: Model, form: Format) -> None:
    """Refuses what is no version of Swin Transformer, where a library's is what reads the export.

    Raises:
        ValueError: With the settings.
    """
    if not isinstance(model.encoder, SwinTransformerV2):
        if form.name not in ("safetensors", "official"):
            raise ValueError(
                f"format={form.name} is not written of a {model.encoder.title}: give format=official or safetensors"
            )
        return
    if model.version is None and form.name not in ("safetensors", "onnx"):
        own = ", ".join(f"model.{key}={model.config[key]}" for key in V2)
        raise ValueError(
            f"format={form.name} holds Swin V1 or V2, and the encoder is neither, with {own}: give format=safetensors "
            "or onnx"
        )


def check_square_windows(model: Model, key: str) -> None:
    """Refuses windows that are no squares, or shift along one axis alone: others have one number for both.

    Args:
        model: What is exported.
        key: What asks for it, as `format=hf`.

    Raises:
        ValueError: With the stage.
    """
    ways = "format=onnx or safetensors" if model.version == 1 else "format=timm, onnx or safetensors"
    for stage in range(len(model.encoder.channels)):
        stride = model.encoder.patch_size * 2**stage
        height, width = (side // stride for side in model.image_size)
        fitted = Windows.fit((height, width), model.encoder.window_size, shifted=True)
        if len(set(fitted.window)) > 1 or len(set(fitted.shift)) > 1:
            raise ValueError(
                f"{key} has square windows alone, and at {model.image_size[0]}x{model.image_size[1]} px stage "
                f"{stage + 1} has windows of {fitted.window[0]}x{fitted.window[1]} tokens, shifted by "
                f"{fitted.shift[0]} and {fitted.shift[1]}: give {ways}"
            )
    if wide := [window for window in model.windows if isinstance(window, list)]:
        raise ValueError(
            f"{key} has one number for the window that a position bias was trained with, and here that is "
            f"{wide[0][0]}x{wide[0][1]} tokens: give {ways}"
        )
