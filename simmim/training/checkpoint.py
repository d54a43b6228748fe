"""Checkpoints that are whole or absent, and which one a run continues from."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name in the same folder, flushes to the disk, and renames; reads tensors only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint that is either whole or not there."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        """Reads a checkpoint without ever unpickling code."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)


class Checkpoints(Callback):
    """Writes `step_<n>.ckpt` every n optimizer steps and at the end, and keeps the newest.

    Args:
        folder: Where to.
        every_n_steps: Optimizer steps between two.
        keep: How many of the newest to keep; None keeps all.
    """

    def __init__(self, folder: Path, *, every_n_steps: int, keep: int | None) -> None:
        if every_n_steps < 1 or (keep is not None and keep < 1):
            raise ValueError(f"checkpoint.every_n_steps={every_n_steps} and checkpoint.keep={keep} must be positive")
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.keep = keep

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves after each optimizer step whose number is a multiple of n."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last step."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        path = self.folder / f"step_{trainer.global_step:07d}.ckpt"
        if not path.exists():
            trainer.save_checkpoint(path)
        if self.keep is not None:
            for old in list_checkpoints(self.folder)[: -self.keep]:
                old.unlink()


def list_checkpoints(folder: Path) -> list[Path]:
    """The `step_<n>.ckpt` of a folder, oldest first."""
    return sorted(folder.glob("step_*.ckpt"), key=lambda path: int(path.stem.removeprefix("step_")))


def find_checkpoint(resume: str | None, output_dir: Path) -> Path | None:
    """What a run continues from.

    Args:
        resume: None starts afresh; "auto" takes the newest checkpoint of the run folder if there is one; a run
            folder or a checkpoint is taken as given.
        output_dir: The run folder.

    Returns:
        A checkpoint, or None to start afresh.

    Raises:
        ValueError: If the run folder has checkpoints and `resume` is None, or what it names does not exist.
    """
    own = list_checkpoints(output_dir / "checkpoints")
    if resume is None:
        if own:
            raise ValueError(
                f"{output_dir} already holds checkpoints up to step {_step(own[-1])}, and a run is never "
                "overwritten: resume=auto continues it, another name=… starts afresh"
            )
        return None
    if resume == "auto":
        return own[-1] if own else None
    path = Path(resume)
    found = [path] if path.is_file() else list_checkpoints(path / "checkpoints")
    if not found:
        raise ValueError(f"resume={resume} is neither a checkpoint nor a run folder with checkpoints")
    return found[-1]


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))
