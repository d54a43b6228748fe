"""Whether what was written computes what the model does, told by the library whose format it is."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simmim.encoders.encoder_files import read_encoder_weights, trained_windows
from simmim.exporting.format import Format
from simmim.exporting.model import Model, Outputs
from simmim.exporting.silence import silence

TOLERANCE = 1e-4
"""Largest difference that an export may show, as a share of the largest number in the output."""


def verify(model: Model, form: Format, path: Path, images: Tensor, shown_as: str) -> list[str]:
    """Reads an export back and compares what it computes with the model.

    Args:
        model: What was exported.
        form: How.
        path: What was written.
        images: uint8 (B, c, H, W).
        shown_as: What the images are, in words.

    Returns:
        Sentences: what was compared and how far apart it is, or why it could not be.

    Raises:
        ValueError: If no way of reading it agrees to `TOLERANCE`.
    """
    try:
        version = import_module(form.library).__version__
    except ImportError:
        return [f"not verified: {form.library} is not installed: pip install '{form.install}' and export again"]
    inputs = model.preprocessing.normalize(images)
    expected, said, agreed = model.outputs(inputs), [], False
    with silence(), torch.no_grad():
        for words, read in form.readers(model, path).items():
            differences = _differences(read(inputs), expected)
            agrees = all(relative <= TOLERANCE for _, relative in differences.values())  # nan does not
            agreed |= agrees
            figures = "; ".join(
                f"{name} by at most {absolute:.1e}, {relative:.1e} of the largest"
                for name, (absolute, relative) in differences.items()
            )
            said.append(f"{words} ({version}), on {shown_as}: differs in {figures}")
    if not agreed:
        raise ValueError(
            f"format={form.name}: what was written computes something else, more than {TOLERANCE:.0e} apart, and was "
            f"removed: {'; '.join(said)}"
        )
    return said


def read_back(model: Model, form: Format, path: Path) -> list[str]:
    """Reads an export as `encoder=…` and compares the weights with the model, bit by bit.

    Returns:
        A sentence, or nothing where we do not read the format.

    Raises:
        ValueError: If a weight, the classifier, a window, or what is said of the images, is another one.
    """
    if not form.readable:
        return []
    weights, known = read_encoder_weights(path)
    ours, weights = model.weights, model.reached(weights)
    token_stays = any("mask token starts anew" in note for note in known["notes"])
    kept = [key for key in ours if not (key == "mask_token" and token_stays)]
    wrong = [key for key in kept if not ours[key].equal(weights[key])]
    decoder = {} if model.decoder is None else {"weight": model.decoder.weight, "bias": model.decoder.bias}
    for name, layer in (("head", model.head or {}), ("decoder", decoder)):
        held = known[name] or {}
        wrong += [f"{name}.{key}" for key, value in layer.items() if key not in held or not value.equal(held[key])]
    if trained_windows(known) not in (None, model.windows):
        wrong.append("the windows of the position bias")
    wrong += _other_images(model, known)
    if wrong:
        raise ValueError(f"format={form.name}: {', '.join(wrong[:3])} changed on the way, and all was removed")
    rest = " (the mask token is written beside a decoder alone)" if token_stays else ""
    return [f"read back by simmim: {len(kept)} tensors of the encoder are the same bit by bit{rest}"]


def _other_images(model: Model, known: Mapping[str, Any]) -> list[str]:
    """What it says otherwise of how images are made ready; what it does not say is no contradiction."""
    images, side = model.preprocessing, min(model.image_size)
    numbers: dict[str, Any] = {"mean": images.mean, "std": images.std, "max_value": images.max_value}
    wrong = [key for key, own in numbers.items() if known[key] is not None and not np.allclose(known[key], own)]
    if known["interpolation"] not in (None, images.interpolation):
        wrong.append("interpolation")
    if (crop := known["test_crop"]) is not None and round(side / crop) != round(side / images.crop):
        wrong.append("test_crop")  # formats may have it in whole pixels
    return wrong


def _differences(found: Outputs, expected: Outputs) -> dict[str, tuple[float, float]]:
    """Of each output: the largest difference, and its share of the largest number."""
    return {
        name: (float(far := (value - expected[name]).abs().max()), float(far / expected[name].abs().max()))
        for name, value in found.items()
    }
