"""What lies where in a run folder, and files that are whole or absent."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKPOINTS = "checkpoints"
ENCODER = "encoder.safetensors"
UNREADABLE = "bad_images.txt"
SKIPPED = "skipped.csv"
SIGNAL = "signal.csv"


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
    """The checkpoints of a run folder, files or folders of shards, oldest step first."""
    found = (run / CHECKPOINTS).glob("step_*.ckpt")
    return sorted((path for path in found if path.stem.removeprefix("step_").isdigit()), key=step_of)


def partial_name(path: Path) -> str:
    """Name of what is being written, until it is whole and gets the name of path."""
    return f".{path.name}.partial"


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
    temporary = path.with_name(partial_name(path))
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_entries(path: Path) -> Iterator[Path]:
    """Gives a temporary folder whose files and folders move beside path when the block ends well, path itself last.

    As of `whole_file`, nobody ever sees half of one, and nothing is left of what failed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(partial_name(path))
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir()
    try:
        yield temporary
        for entry in temporary.rglob("*"):
            flush(entry)
        for entry in sorted(temporary.iterdir(), key=lambda entry: entry.name == path.name):
            entry.replace(path.parent / entry.name)
        flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def append(path: Path, text: str) -> None:
    """Adds text at a file's end, all of it or nothing.

    Raises:
        OSError: If there is no room.
    """
    with path.open("ab", buffering=0) as file:
        end, data = file.tell(), text.encode("utf-8", "surrogateescape")
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(end)
            raise


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
