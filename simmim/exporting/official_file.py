"""The authors' own layout: `{"model": state dict}`, as their code and tools for their releases read it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simmim.encoders.names import to_official
from simmim.encoders.position_bias import log_spaced_offsets
from simmim.encoders.vit import VisionTransformer
from simmim.encoders.windows import Windows, regions
from simmim.exporting import official_vit
from simmim.exporting.format import Format, Reader, check_square_windows
from simmim.exporting.model import Model, Outputs
from simmim.exporting.timm_folder import architecture

CPU = torch.device("cpu")


def buffers_of(model: Model) -> dict[str, Tensor]:
    """What the authors' code stores of the geometry of each block, by its names."""
    buffers: dict[str, Tensor] = {}
    for stage, blocks in enumerate(model.encoder.blocks):
        stride = model.encoder.patch_size * 2**stage
        size = (model.image_size[0] // stride, model.image_size[1] // stride)
        trained = model.windows[stage]
        assert isinstance(trained, int)
        for number, block in enumerate(blocks):
            windows = Windows.fit(size, model.encoder.window_size, shifted=block.shifted)
            name = f"layers.{stage}.blocks.{number}"
            if model.version == 2:
                table = log_spaced_offsets(windows.window, (trained, trained), CPU)
                buffers[f"{name}.attn.relative_coords_table"] = table[None]
            buffers[f"{name}.attn.relative_position_index"] = _positions(windows.window)
            if (region := regions(windows, CPU)) is not None:
                apart = region[:, :, None] != region[:, None, :]
                buffers[f"{name}.attn_mask"] = torch.zeros(apart.shape).masked_fill(apart, -100.0)
    return buffers


def _positions(window: tuple[int, int]) -> Tensor:
    """Where in the table of (2h - 1) * (2w - 1) offsets that of a query and a key lies: (T, T)."""
    height, width = window
    rows, columns = torch.cartesian_prod(torch.arange(height), torch.arange(width)).unbind(1)
    down = rows[:, None] - rows + height - 1
    return down * (2 * width - 1) + columns[:, None] - columns + width - 1


def state_of(model: Model) -> dict[str, Tensor]:
    """All weights by the authors' names; those of a pretraining run as their SimMIM has them."""
    encoder = to_official(model.weights) | buffers_of(model)
    if model.decoder is None:
        del encoder["mask_token"]
        return encoder | {f"head.{key}": value for key, value in (model.head or {}).items()}
    state = {f"encoder.{key}": value for key, value in encoder.items()}
    decoder = {"decoder.0.weight": model.decoder.weight[:, :, None, None], "decoder.0.bias": model.decoder.bias}
    return state | decoder


def write(model: Model, path: Path) -> None:
    """Writes the file."""
    if isinstance(model.encoder, VisionTransformer):
        return official_vit.write(model, path)
    check_square_windows(model, "format=official")
    torch.save({"model": {key: value.contiguous() for key, value in state_of(model).items()}}, path)


def readers(model: Model, path: Path) -> Mapping[str, Reader]:
    """By timm, which knows the authors' layout; not the prefix of SimMIM, which it is spared, as by the authors."""
    if isinstance(model.encoder, VisionTransformer):
        return official_vit.readers(model, path)
    import timm
    from timm.models import swin_transformer, swin_transformer_v2

    theirs = swin_transformer if model.version == 1 else swin_transformer_v2
    name, arguments = architecture(model)
    network: Any = timm.create_model(name, num_classes=len(model.classes or []), **arguments)
    held = torch.load(path, weights_only=True)["model"]
    state = {key.removeprefix("encoder."): value for key, value in held.items() if not key.startswith("decoder.")}
    state.pop("mask_token", None)
    network.load_state_dict(theirs.checkpoint_filter_fn(state, network))
    network.eval()

    def outputs(images: Tensor) -> Outputs:
        features = {"features": network.forward_features(images)}
        return features if model.head is None else {**features, "logits": network(images)}

    return {"timm": outputs}


def usage(model: Model, path: str) -> str:
    """What the card says."""
    vision_transformer = isinstance(model.encoder, VisionTransformer)
    settings = official_vit.settings(model) if vision_transformer else _settings(model)
    taken = f"The authors' code (Swin-Transformer, main_simmim_ft.py) takes the file as `--pretrained {path}`, with"
    if vision_transformer and model.config["position_bias"] == "shared_table":
        taken = f"The authors' code (SimMIM) takes the file as `--pretrained {path}` to fine-tune it, with"
    elif vision_transformer:  # --pretrained would look for the table that all blocks share
        taken = "It is the state dict of the network that the authors' code (SimMIM) fine-tunes, with"
    return f"""\
{taken}

```yaml
{settings}
```

What it holds:

```python
import torch

state = torch.load({path!r}, weights_only=True)["model"]
shapes = {{name: tuple(value.shape) for name, value in state.items()}}
```
"""


def _settings(model: Model) -> str:
    windows = f"\n    PRETRAINED_WINDOW_SIZES: [{', '.join(map(str, model.windows))}]" if model.version == 2 else ""
    kind = "swinv2" if model.version == 2 else "swin"
    return f"""\
DATA:
  IMG_SIZE: {model.image_size[0]}
MODEL:
  TYPE: {kind}
  NUM_CLASSES: {len(model.classes or [])}
  {kind.upper()}:
    PATCH_SIZE: {model.config["patch_size"]}
    IN_CHANS: {model.config["in_channels"]}
    EMBED_DIM: {model.config["embed_dim"]}
    DEPTHS: {model.config["depths"]}
    NUM_HEADS: {model.config["num_heads"]}
    WINDOW_SIZE: {model.encoder.window_size}{windows}"""


OFFICIAL = Format(
    "official",
    ".pth",
    "timm",
    "simmim[timm]",
    with_decoder=True,
    readable=True,
    write=write,
    readers=readers,
    usage=usage,
)
