"""What a run's numbers may depend on besides its config."""

import os
import platform
import subprocess
from importlib.metadata import version
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Commit of the working directory, versions, device."""
    gpus = torch.cuda.device_count()
    return {
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "lightning")},
        "device": f"{gpus} x {torch.cuda.get_device_name()}" if gpus else f"CPU, {os.cpu_count()} cores",
        "machine": platform.platform(),
    }


def commit() -> str | None:
    """The commit of the working directory, `-dirty` if files have changed; None if it is no repository."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
