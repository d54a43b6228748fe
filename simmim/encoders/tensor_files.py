"""Files of tensors from outside: told apart by their content, whatever their name, and read without running their code.

A safetensors file holds tensors and nothing else. A PyTorch file is a pickle, which could run anything: it is opened
with `weights_only=True`, and refused where it needs more.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
"""What Hugging Face's libraries write beside the weights."""

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""How they call the weights, what is safe first."""

ZIP = b"PK\x03\x04"


def is_safetensors(file: Path) -> bool:
    """Whether a file begins as a safetensors file does: the length of its header, then the header, which is JSON."""
    with file.open("rb") as opened:
        return opened.read(9)[8:] == b"{"


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by their names, and its metadata.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        with safe_open(file, framework="pt") as reader:
            return {key: reader.get_tensor(key) for key in reader.keys()}, reader.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"encoder={file} cannot be read, perhaps it was cut short: {_one_line(error)}") from error


def read_pytorch(file: Path) -> Any:
    """What `torch.save` wrote: tensors in dicts and lists with plain values. It is never unpickled.

    Raises:
        ValueError: If it holds more than that, and then which class; if it is damaged, or of another kind.
    """
    with file.open("rb") as opened:
        zipped = opened.read(4) == ZIP
    try:
        if zipped and file.suffix != ".safetensors":  # PyTorch would go by that name
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        with file.open("rb") as opened:
            return torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises is anything
        if found := re.search(r"(?:GLOBAL|Unsupported class) ([A-Za-z_][\w.]+)", str(error)):
            raise ValueError(_refusal(file, found[1])) from error
        raise ValueError(
            f"encoder={file} cannot be read: it was cut short, or is no file of weights ({_one_line(error)})"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file says; nothing where there is none.

    Raises:
        ValueError: If it is no JSON.
    """
    if not file.is_file():
        return {}
    try:
        said = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {_one_line(error)}") from error
    return said if isinstance(said, dict) else {}


def _refusal(file: Path, name: str) -> str:
    return (
        f"encoder={file} needs {name} to be unpickled, which could run any code, and is not opened. "
        "Write its tensors alone, if you trust its origin and where nothing can be lost, as in a container without "
        f"network: python -c \"import torch; tree = torch.load('{file.name}', weights_only=False); "
        "torch.save(tree.get('model', tree), 'weights.pth')\", and give encoder=weights.pth"
    )


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
