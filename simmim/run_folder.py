"""What lies where in a run folder, and files that are whole or absent."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKPOINTS = "checkpoints"
ENCODER = "encoder.safetensors"


def checkpoint_name(step: int) -> str:
    """File name of the checkpoint after an optimizer step."""
    return f"step_{step:07d}.ckpt"


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint's name says.

    Raises:
        ValueError: If it is not named `step_<n>.ckpt`.
    """
    if not (found := re.fullmatch(r"step_(\d+)\.ckpt", checkpoint.name)):
        raise ValueError(f"{checkpoint} is not named step_<n>.ckpt, as the checkpoints of a run are")
    return int(found[1])


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest step first."""
    files = (path for path in (run / CHECKPOINTS).glob("step_*.ckpt") if path.is_file())
    return sorted((path for path in files if path.stem.removeprefix("step_").isdigit()), key=step_of)


def shown(path: Path) -> Path:
    """A path as a person would type it: relative, where it lies below the working directory."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to, which becomes `path` when the block ends well, and else is removed.

    Nobody ever sees half a file, also after a power cut: content and name are flushed to the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
