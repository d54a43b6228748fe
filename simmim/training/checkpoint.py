"""Checkpoints that are whole or absent, and which one a run continues from."""

import logging
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from simmim.run_folder import CHECKPOINTS, checkpoint_name, list_checkpoints, shown, step_of, whole_file

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, straight to the disk, and reads tensors only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint; one of the same name stays until the new one is whole."""
        with whole_file(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        """Reads a checkpoint without ever unpickling code."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)


class Checkpoints(Callback):
    """Writes `checkpoints/step_<n>.ckpt` every n optimizer steps and at the end, and keeps the newest.

    Args:
        run: The run folder.
        every_n_steps: Optimizer steps between two.
        keep: How many of the newest to keep; None keeps all.
    """

    def __init__(self, run: Path, *, every_n_steps: int, keep: int | None) -> None:
        self.run = run
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.interrupted = False
        self._previous: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes Ctrl-C over: the handler sets a flag only, so that a step is never cut in two."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves after each optimizer step whose number is a multiple of n, and stops if Ctrl-C came."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)
        trainer.should_stop = trainer.should_stop or self.interrupted

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last step."""
        self._save(trainer)
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives Ctrl-C back."""
        self._release()

    def _interrupt(self, *_: Any) -> None:
        self.interrupted = True

    def _release(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _save(self, trainer: Trainer) -> None:
        path = self.run / CHECKPOINTS / checkpoint_name(trainer.global_step)
        if not path.exists():
            trainer.save_checkpoint(path)
        if self.keep is not None:
            for old in list_checkpoints(self.run)[: -self.keep]:
                old.unlink()


def find_checkpoint(resume: str | None, run: Path) -> Path | None:
    """What a run continues from.

    Args:
        resume: None starts afresh; "auto" takes the newest checkpoint of the run folder if there is one; a run
            folder or a checkpoint is taken as given.
        run: The run folder.

    Returns:
        A checkpoint, or None to start afresh.

    Raises:
        ValueError: If what `resume` names does not exist, or the run folder holds checkpoints that would be lost.
    """
    own = list_checkpoints(run)
    if resume == "auto":
        if not own:
            log.info(f"resume=auto: no checkpoint in {shown(run)}, so the run starts afresh (was it another name=…?)")
        return own[-1] if own else None
    chosen = None if resume is None else newest_checkpoint(Path(resume), key="resume")
    if own and (chosen is None or chosen.resolve() != own[-1].resolve()):
        raise ValueError(
            f"{run} already holds checkpoints up to step {step_of(own[-1])}, and a run is never overwritten: "
            "resume=auto continues it, another name=… starts afresh"
        )
    return chosen


def newest_checkpoint(path: Path, *, key: str) -> Path:
    """A checkpoint itself, or the newest of a run folder.

    Args:
        path: File or folder.
        key: The config key it came from, for the message.

    Raises:
        ValueError: If there is none.
    """
    if not path.exists():
        raise ValueError(f"{key}={path} does not exist: give a run folder, as outputs/pretrain/<name>, or a *.ckpt")
    found = [path] if path.is_file() else list_checkpoints(path)
    if not found:
        raise ValueError(f"{key}={path} is neither a checkpoint nor a run folder with checkpoints")
    step_of(found[-1])
    return found[-1]


def refuse_changed_settings(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Refuses to go on with a checkpoint under settings that its state contradicts or would silently override.

    The length of the run may change. Anything else starts a new run from the old encoder.

    Args:
        checkpoint: What the run continues from.
        settings: The hyper-parameters of the task that is to go on.

    Raises:
        ValueError: With the first setting that differs.
    """
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["hyper_parameters"]
    for section in (key for key in settings if key != "schedule"):
        before, now = _flat(section, saved.get(section)), _flat(section, settings[section])
        for key in now:
            if before.get(key) != now[key]:
                raise ValueError(
                    f"{checkpoint} was trained with {key}={before.get(key)}, now {now[key]}: keep it, or start a "
                    "new run with another name=… and encoder=…"
                )


def _flat(section: str, value: Any) -> dict[str, Any]:
    return {f"{section}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {section: value}
