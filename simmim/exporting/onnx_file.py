"""ONNX: images to features, and to the scores of a classifier, in one file for any runtime."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simmim.exporting.format import Format, Reader
from simmim.exporting.model import Model, Outputs
from simmim.exporting.silence import silence

OPSET = 18
"""Of the operators: what PyTorch's exporter writes without converting, and runtimes know since 2023."""

LARGEST = 2 * 2**30
"""Bytes of one ONNX file, at most."""

BATCHES = [1, 3]
"""Sizes of batch that it is checked with."""


class Network(nn.Module):
    """Encoder and classifier as one module: normalised images to features, and to logits.

    Args:
        model: What is traced.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.head: nn.Linear | None = None
        if model.head is not None:
            classes, width = model.head["weight"].shape
            self.head = nn.Linear(width, classes).requires_grad_(False)
            self.head.load_state_dict(model.head)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, c, H, W) -> (B, h, w, C), and (B, N) where there is a classifier."""
        features = self.encoder(images)
        return (features,) if self.head is None else (features, self.head(features.mean(dim=(1, 2))))


def outputs_of(model: Model) -> list[str]:
    """Names of what the file computes."""
    return ["features"] if model.head is None else ["features", "logits"]


def write(model: Model, path: Path) -> None:
    """Traces the model with the reference implementation of the attention, for any number of images at once.

    Raises:
        ValueError: If what traces it is not installed, or it is too large for one file.
    """
    for library in ("onnx", "onnxscript"):
        try:
            import_module(library)
        except ImportError as error:
            raise ValueError(
                f"format=onnx needs {library}, which is not installed: pip install 'simmim[onnx]'"
            ) from error
    size = sum(value.nbytes for value in model.weights.values())
    if size > 0.95 * LARGEST:
        raise ValueError(f"format=onnx: {size / 2**30:.1f} GB of weights, and one file holds 2: give another format")
    with silence():
        program: Any = torch.onnx.export(
            Network(model).eval(),
            (torch.zeros(2, *model.input_shape[1:]),),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=outputs_of(model),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
    images = model.preprocessing
    facts = {
        "mean": images.mean,
        "std": images.std,
        "max_value": images.max_value,
        "image_size": model.image_size,
        "classes": model.classes,
    }
    program.model.metadata_props.update({f"simmim.{key}": json.dumps(value) for key, value in facts.items()})
    program.save(path, external_data=False)


def readers(model: Model, path: Path) -> Mapping[str, Reader]:
    """By ONNX Runtime on the CPU, in batches of one and of three."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def outputs(images: Tensor) -> Outputs:
        parts = [session.run(outputs_of(model), {"images": part.numpy()}) for part in torch.split(images, BATCHES)]
        joined = [torch.cat([torch.from_numpy(value) for value in values]) for values in zip(*parts, strict=True)]
        return dict(zip(outputs_of(model), joined, strict=True))

    return {"onnxruntime": outputs}


def usage(model: Model, path: str) -> str:
    """The code for the card."""
    results = ", ".join(outputs_of(model)) + ("," if model.head is None else "")
    sides, features = (", ".join(map(str, shape[1:])) for shape in (model.input_shape, model.map_shape))
    return f"""\
```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession({path!r})
images = np.random.randn(3, {sides}).astype("float32")  # normalised, any number of them
{results} = session.run({outputs_of(model)!r}, {{"images": images}})  # features: (3, {features})
```

Opset {OPSET}; any number of images at once, of this size.
"""


ONNX = Format(
    "onnx",
    ".onnx",
    "onnxruntime",
    "simmim[onnx]",
    with_decoder=False,
    readable=False,
    write=write,
    readers=readers,
    usage=usage,
)
