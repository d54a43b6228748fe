"""Hugging Face transformers: a folder that `from_pretrained` opens.

transformers adds V2's mask of shifted windows twice, where the authors, timm, torchvision and we add it once: what a
query may then still see of another region, a share of about exp(-100), becomes exp(-200). With scales of up to 100
and biases of up to 16 that is not always nothing, so what it computes is measured both ways.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from simmim.encoders.names import to_transformers
from simmim.exporting.format import Format, Reader, check_square_windows
from simmim.exporting.model import Model, Outputs

WEIGHTS = "model.safetensors"

MASKED_TWICE = """\
transformers (as of 5.23) adds the mask of shifted windows twice, where Swin V2 adds it once; how far its
features are from the model's own stands below. """
"""For the card, of V2."""

RESAMPLING = {"bilinear": 2, "bicubic": 3}
"""Numbers of PIL's."""


def kind_of(model: Model) -> str:
    """What transformers calls the version: in a `config.json`, and where a model with a head keeps the encoder."""
    return "swinv2" if model.version == 2 else "swin"


def architecture(model: Model) -> str:
    """The class of transformers that holds all that the model has."""
    family = kind_of(model).capitalize()
    if model.head is not None:
        return f"{family}ForImageClassification"
    return f"{family}Model" if model.decoder is None else f"{family}ForMaskedImageModeling"


def trained_windows_of(model: Model) -> list[int]:
    """`pretrained_window_sizes`: transformers divides by each, less one, unless it is 0, which stands for the window.

    Raises:
        ValueError: If a position bias was trained with one token and has more now.
    """
    now = [window[0] for window in model.encoder.windows(*model.image_size)]
    trained = [window for window in model.windows if isinstance(window, int)]
    if any(before == 1 < window for before, window in zip(trained, now, strict=True)):
        raise ValueError(f"format=hf cannot count offsets in windows of one token: they were trained so, {trained}")
    return [0 if before == 1 else before for before in trained]


def config_of(model: Model) -> dict[str, Any]:
    """What `config.json` says of a model.

    Raises:
        ValueError: If transformers cannot build it.
    """
    height, width = model.image_size
    if height != width:
        raise ValueError(f"format=hf is for square images, not {height}x{width} px: give format=timm or onnx")
    check_square_windows(model, "format=hf")
    if model.version == 1:
        _check_whole_windows(model)
    trained = {"pretrained_window_sizes": trained_windows_of(model)} if model.version == 2 else {}
    names = dict(enumerate(model.classes or []))
    return {
        "model_type": kind_of(model),
        "architectures": [architecture(model)],
        "image_size": height,
        "num_channels": model.config["in_channels"],
        **{key: model.config[key] for key in ("patch_size", "embed_dim", "depths", "num_heads", "window_size")},
        **trained,
        "drop_path_rate": model.config["drop_path"],
        "encoder_stride": model.encoder.stride,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_absolute_embeddings": False,
        "dtype": "float32",
        **({"id2label": names, "label2id": {name: number for number, name in names.items()}} if names else {}),
    }


def _check_whole_windows(model: Model) -> None:
    """Refuses windows that shrink to their map: to these, V1 of transformers would add the bias of whole ones."""
    windows = [window[0] for window in model.encoder.windows(*model.image_size)]
    if len(set(windows)) > 1 or windows[0] != model.encoder.window_size:
        raise ValueError(
            f"format=hf has the same window in all stages of Swin V1, and at {model.image_size[0]} px the encoder has "
            f"{', '.join(map(str, windows))} tokens: give format=timm, official, onnx or safetensors"
        )


def preprocessor_of(model: Model) -> dict[str, Any]:
    """What `preprocessor_config.json` says: resize the short side, cut out the centre, normalise."""
    side, images = model.image_size[0], model.preprocessing
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": len(images.mean) == 3,
        "do_resize": True,
        "size": {"shortest_edge": round(side / images.crop)},
        "resample": RESAMPLING[images.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / images.max_value,
        "do_normalize": True,
        "image_mean": images.mean,
        "image_std": images.std,
    }


def state_of(model: Model) -> dict[str, Tensor]:
    """All weights by their names there. The mask token goes along where there is a decoder that has a use for it."""
    encoder = to_transformers(model.weights)
    if model.decoder is None:
        del encoder["embeddings.mask_token"]
    if model.head is None and model.decoder is None:
        return encoder
    state = {f"{kind_of(model)}.{key}": value for key, value in encoder.items()}
    state |= {f"classifier.{key}": value for key, value in (model.head or {}).items()}
    if model.decoder is not None:
        state |= {"decoder.0.weight": model.decoder.weight[:, :, None, None], "decoder.0.bias": model.decoder.bias}
    return state


def write(model: Model, path: Path) -> None:
    """Writes the folder."""
    files = {"config.json": config_of(model), "preprocessor_config.json": preprocessor_of(model)}
    state = {key: value.contiguous() for key, value in state_of(model).items()}
    path.mkdir()
    save_file(state, path / WEIGHTS, {"format": "pt"})
    for name, content in files.items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n")


def readers(model: Model, path: Path) -> Mapping[str, Reader]:
    """As transformers computes, and with its mask counted once."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    token = f"{kind_of(model)}.embeddings.mask_token"
    _check_keys(transformers.AutoModel, path, allowed=("decoder.", "classifier.", token))
    kind = getattr(transformers, architecture(model))
    plain: dict[str, Reader] = {"transformers": partial(_outputs, model, _check_keys(kind, path))}
    if model.version == 1:
        return plain
    once = partial(_outputs, model, _halved(_check_keys(kind, path)))
    return plain | {"transformers with its shift mask counted once": once}


def _check_keys(kind: Any, path: Path, allowed: tuple[str, ...] = ()) -> nn.Module:
    """Opens the folder, strictly.

    Raises:
        ValueError: If a key is missing or, unless its name begins with what is allowed, unexpected.
    """
    network, report = kind.from_pretrained(path, output_loading_info=True)
    wrong = [*report["missing_keys"], *report["mismatched_keys"], *report["error_msgs"]]
    wrong += [key for key in report["unexpected_keys"] if not key.startswith(allowed or ("\0",))]
    if wrong:
        raise ValueError(f"format=hf: {kind.__name__} does not find itself in the file: {', '.join(map(str, wrong))}")
    return network.eval()  # type: ignore[no-any-return]


def _halved(network: nn.Module) -> nn.Module:
    """The same with half the mask, which is then added twice."""
    layers: list[Any] = [layer for layer in network.modules() if hasattr(layer, "get_attn_mask")]
    for layer in layers:
        layer.get_attn_mask = partial(_half, layer.get_attn_mask)
    return network


def _half(mask: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    whole = mask(*args, **kwargs)
    return None if whole is None else whole / 2


def _outputs(model: Model, network: Any, images: Tensor) -> Outputs:
    encoder = network if model.head is None and model.decoder is None else getattr(network, kind_of(model))
    features = encoder(images).last_hidden_state
    outputs = {"features": features.view(len(images), *model.map_shape[1:])}
    if model.head is not None:
        outputs["logits"] = network(images).logits
    if model.decoder is not None:
        outputs["pixels"] = network(images, bool_masked_pos=model.hidden_patches(images)).reconstruction
    return outputs


def usage(model: Model, path: str) -> str:
    """The code for the card."""
    kind = architecture(model)
    task = kind.partition("For")[2]
    patches = (model.image_size[0] // model.config["patch_size"]) ** 2
    more = {
        "": "",
        "ImageClassification": (
            f"\nclassifier = AutoModelForImageClassification.from_pretrained({path!r}).eval()\n"
            "probabilities = classifier(images).logits.softmax(dim=-1)  # one a class: classifier.config.id2label\n"
        ),
        "MaskedImageModeling": (
            f"\npretrained = AutoModelForMaskedImageModeling.from_pretrained({path!r}).eval()\n"
            f"hidden = torch.rand(1, {patches}) < 0.5  # patches\n"
            "predicted = pretrained(images, bool_masked_pos=hidden).reconstruction\n"
        ),
    }[task]
    opened = f"`AutoModel` is the encoder of the {kind}, whose head it leaves out.\n\n" if task else ""
    names = f", AutoModelFor{task}" if task else ""
    return f"""\
```python
import torch
from transformers import AutoImageProcessor, AutoModel{names}

processor = AutoImageProcessor.from_pretrained({path!r})  # processor(image, return_tensors="pt").pixel_values
model = AutoModel.from_pretrained({path!r}).eval()
images = torch.randn({", ".join(map(str, model.input_shape))})
features = model(images).last_hidden_state  # (1, {model.map_shape[1] * model.map_shape[2]}, {model.map_shape[3]})
{more}```

{opened}{MASKED_TWICE if model.version == 2 else ""}Its windows are made for images of {model.image_size[0]} px.
"""


HF = Format(
    "hf", "", "transformers", "simmim[hf]", with_decoder=True, readable=True, write=write, readers=readers, usage=usage
)
