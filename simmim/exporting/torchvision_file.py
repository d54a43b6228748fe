"""torchvision: the state dict of its `SwinTransformer`, for V2 with the blocks of V2."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simmim.encoders.names import is_buffer, to_torchvision
from simmim.encoders.windows import Windows
from simmim.exporting.format import Format, Reader
from simmim.exporting.model import Model, Outputs


def check(model: Model) -> None:
    """Refuses what its architecture computes differently.

    Raises:
        ValueError: With the reason, and formats that hold it.
    """
    window, ways = model.encoder.window_size, "give format=timm, onnx or safetensors"
    if model.config["in_channels"] != 3:
        raise ValueError(f"format=torchvision has images of 3 channels, not {model.config['in_channels']}: {ways}")
    for stage in range(len(model.encoder.channels)):
        stride = model.encoder.patch_size * 2**stage
        height, width = (side // stride for side in model.image_size)
        if Windows.fit((height, width), window).window != (window, window):
            raise ValueError(
                f"format=torchvision fills maps up to whole windows of {window}x{window} tokens, where Swin "
                f"shrinks the window: at {model.image_size[0]}x{model.image_size[1]} px the map of stage {stage + 1} "
                f"has {height}x{width}; {ways}"
            )
    if model.version == 2 and (
        window == 1 or any(before not in (window, [window, window]) for before in model.windows)
    ):
        raise ValueError(
            f"format=torchvision counts the offsets of the position bias in the window itself, {window} tokens, and "
            f"this one was trained with {model.windows}: {ways}"
        )


def arguments_of(model: Model) -> dict[str, Any]:
    """What makes the model of torchvision's `SwinTransformer`, besides its classes."""
    return {
        "patch_size": [model.config["patch_size"]] * 2,
        "embed_dim": model.config["embed_dim"],
        "depths": model.config["depths"],
        "num_heads": model.config["num_heads"],
        "window_size": [model.encoder.window_size] * 2,
        **({"num_classes": len(model.classes)} if model.classes else {}),
    }


def build(model: Model) -> nn.Module:
    """Torchvision's model, with its initial values; without classes its head is none."""
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    blocks = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if model.version == 2 else {}
    network = SwinTransformer(**arguments_of(model), **blocks)
    if model.head is None:
        network.head = nn.Identity()
    return network.eval()  # type: ignore[no-any-return]


def write(model: Model, path: Path) -> None:
    """Writes weights, classifier and the buffers that it stores. The mask token stays behind: it has none."""
    check(model)
    state = to_torchvision(model.weights) | {f"head.{key}": value for key, value in (model.head or {}).items()}
    buffers = {key: value for key, value in build(model).state_dict().items() if is_buffer(key)}
    torch.save({key: value.contiguous() for key, value in (state | buffers).items()}, path)


def readers(model: Model, path: Path) -> Mapping[str, Reader]:
    """Strictly loaded."""
    network: Any = build(model)
    network.load_state_dict(torch.load(path, weights_only=True))

    def outputs(images: Tensor) -> Outputs:
        features = {"features": network.norm(network.features(images))}
        return features if model.head is None else {**features, "logits": network(images)}

    return {"torchvision": outputs}


def usage(model: Model, path: str) -> str:
    """The code for the card."""
    arguments = "".join(f"    {key}={value!r},\n" for key, value in arguments_of(model).items())
    second = "    block=SwinTransformerBlockV2,\n    downsample_layer=PatchMergingV2,\n" if model.version == 2 else ""
    imported = "PatchMergingV2, SwinTransformer, SwinTransformerBlockV2" if model.version == 2 else "SwinTransformer"
    headless = "network.head = nn.Identity()  # there is no classifier\n" if model.head is None else ""
    scores = "" if model.head is None else "probabilities = network(images).softmax(dim=-1)  # one a class\n"
    return f"""\
```python
import torch
from torch import nn
from torchvision.models.swin_transformer import {imported}

network = SwinTransformer(
{arguments}{second})
{headless}network.load_state_dict(torch.load({path!r}, weights_only=True))
network.eval()
images = torch.randn({", ".join(map(str, model.input_shape))})  # normalised
features = network.norm(network.features(images))  # {model.map_shape}
{scores}```

Images need sides that {model.encoder.stride * model.encoder.window_size} px divide: others torchvision fills up.
"""


TORCHVISION = Format(
    "torchvision",
    ".pth",
    "torchvision",
    "torchvision",
    with_decoder=False,
    readable=True,
    write=write,
    readers=readers,
    usage=usage,
)
