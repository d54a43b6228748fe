"""timm: a folder that `timm.create_model("local-dir:…")` reads, and the Hugging Face Hub as timm's own models."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from simmim.encoders import SIZES
from simmim.encoders.names import to_timm
from simmim.exporting.format import Format, Reader, check_square_windows
from simmim.exporting.model import Model, Outputs

WEIGHTS = "model.safetensors"

WORDS = {"swinv2_t": "tiny", "swinv2_s": "small", "swinv2_b": "base", "swinv2_l": "large"}
"""What timm calls the published sizes, which are the same for both versions."""

NAMES = {1: "swin_{}_patch4_window{}_{}", 2: "swinv2_{}_window{}_{}"}
"""Its names of a size, a window in tokens and images in pixels, by version."""

REGISTERED = {
    1: {*((word, 7, 224) for word in WORDS.values()), *((word, 12, 384) for word in ("base", "large"))},
    2: {
        *((word, window, 256) for word in ("tiny", "small", "base") for window in (8, 16)),
        *((word, 12, 192) for word in ("base", "large")),
    },
}
"""Of these, those that there are."""

SIZE = ("embed_dim", "depths", "num_heads")


def architecture(model: Model) -> tuple[str, dict[str, Any]]:
    """The name of timm's model, and the arguments that make ours of it.

    The windows that V2's position bias was trained with are always among them: whoever enlarges the windows then goes
    on from these.
    """
    assert model.version is not None
    (height, width), name, registered = model.image_size, NAMES[model.version], REGISTERED[model.version]
    size = {key: model.config[key] for key in SIZE}
    published = {word: {key: SIZES[name][key] for key in SIZE} for name, word in WORDS.items()}
    word = next((word for word, other in published.items() if json.dumps(other) == json.dumps(size)), None)
    arguments: dict[str, Any] = {"pretrained_window_sizes": model.windows} if model.version == 2 else {}
    if model.config["patch_size"] != 4:
        arguments["patch_size"] = model.config["patch_size"]
    if model.config["in_channels"] != 3:
        arguments["in_chans"] = model.config["in_channels"]
    if height == width and (word, model.encoder.window_size, height) in registered:
        return name.format(word, model.encoder.window_size, height), arguments
    arguments |= {"img_size": [height, width], "window_size": model.encoder.window_size}
    similar = min(known for known in registered if known[0] == (word or "tiny"))
    return name.format(*similar), arguments if word else arguments | size


def config_of(model: Model) -> dict[str, Any]:
    """What timm's `config.json` says of a model."""
    name, arguments = architecture(model)
    classes = model.classes or []
    images = model.preprocessing
    return {
        "architecture": name,
        "num_classes": len(classes),
        "num_features": model.encoder.channels[-1],
        "global_pool": "avg",
        **({"label_names": classes} if classes else {}),
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [model.config["in_channels"], *model.image_size],
            "fixed_input_size": True,
            "interpolation": images.interpolation,
            "crop_pct": images.crop,
            "crop_mode": "center",
            "mean": images.mean,
            "std": images.std,
            "num_classes": len(classes),
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
        },
    }


def write(model: Model, path: Path) -> None:
    """Writes the folder. The mask token stays behind: timm has none."""
    if model.version == 1:
        check_square_windows(model, "format=timm")
    state = {**to_timm(model.weights), **{f"head.fc.{key}": value for key, value in (model.head or {}).items()}}
    path.mkdir()
    save_file({key: value.contiguous() for key, value in state.items()}, path / WEIGHTS, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config_of(model), indent=2) + "\n")


def readers(model: Model, path: Path) -> Mapping[str, Reader]:
    """By both of timm's ways: the folder, and the file into a model that is made by its name."""
    import timm

    name, arguments = architecture(model)
    classes = len(model.classes or [])
    by_name = timm.create_model(name, checkpoint_path=str(path / WEIGHTS), num_classes=classes, **arguments)
    network: Any = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    for key, value in by_name.state_dict().items():
        if not value.equal(network.state_dict()[key]):
            raise ValueError(f"format=timm: the folder and its file give different values of {key}")

    def outputs(images: Tensor) -> Outputs:
        features = network.forward_features(images)
        return {"features": features} | ({"logits": network.forward_head(features)} if classes else {})

    return {"timm": outputs}


def usage(model: Model, path: str) -> str:
    """The code for the card."""
    name, arguments = architecture(model)
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    shape, classes = ", ".join(map(str, model.input_shape)), len(model.classes or [])
    scores = "probabilities = model(images).softmax(dim=-1)  # one a class, named in config.json\n" if classes else ""
    return f"""\
```python
import timm
import torch

model = timm.create_model({f"local-dir:{path}"!r}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # for a PIL image
images = torch.randn({shape})  # torch.stack([transform(image), …])
features = model.forward_features(images)  # {model.map_shape}
{scores}```

The file alone, into a model made by its name:

```python
import timm

model = timm.create_model(
    "{name}", checkpoint_path={f"{path}/{WEIGHTS}"!r}, num_classes={classes}{given}
)
```
"""


TIMM = Format(
    "timm", "", "timm", "simmim[timm]", with_decoder=False, readable=True, write=write, readers=readers, usage=usage
)
