"""simmim: the encoder's own file, which every command reads as `encoder=…`."""

from collections.abc import Mapping
from pathlib import Path

from simmim.encoders.encoder_files import read_encoder_weights, save_encoder
from simmim.encoders.weights import load_encoder
from simmim.exporting.format import Format, Reader
from simmim.exporting.model import Model


def write(model: Model, path: Path) -> None:
    """Writes the encoder, its classifier, and all that is known of both."""
    images = model.preprocessing
    save_encoder(
        model.encoder,
        path,
        image_size=model.image_size,
        mean=images.mean,
        std=images.std,
        max_value=images.max_value,
        head=model.head,
        classes=model.classes,
        test_crop=None if model.head is None else images.crop,
        interpolation=None if model.head is None else images.interpolation,
    )


def readers(model: Model, path: Path) -> Mapping[str, Reader]:
    """By the library's own reading."""
    head = read_encoder_weights(path)[1]["head"]
    again = Model(load_encoder(path).eval(), model.image_size, model.windows, model.preprocessing, head, None, None)
    return {"simmim": again.outputs}


def usage(model: Model, path: str) -> str:
    """The code for the card."""
    return f"""\
```python
from pathlib import Path

import torch

from simmim.encoders.weights import load_encoder

encoder = load_encoder(Path({path!r})).eval()
images = torch.randn({", ".join(map(str, model.input_shape))})  # normalised
features = encoder(images)  # {model.map_shape}
```

Every command reads it, as `python -m simmim.embed encoder={path} images=photos`.
"""


SAFETENSORS = Format(
    "safetensors",
    ".safetensors",
    "simmim",
    "simmim",
    with_decoder=False,
    readable=True,
    write=write,
    readers=readers,
    usage=usage,
)
