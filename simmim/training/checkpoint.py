"""When a run saves its state, when it stops to be continued, and which checkpoint it continues from."""

import logging
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from torch.distributed.tensor import DTensor

from simmim.checkpoint_files import damage, load, load_rest, save_file, save_folder
from simmim.encoders.swinv2 import V2
from simmim.processes import STOP_SIGNALS
from simmim.run_folder import CHECKPOINTS, checkpoint_name, list_checkpoints, partial_name, shown, step_of
from simmim.training.ranks import total_over_ranks

log = logging.getLogger(__name__)

BEFORE = {**{f"model.{key}": value for key, value in V2.items()}, "max_value": 255}
"""What older checkpoints, which do not hold a setting, were trained with."""

OF_THE_START = ("model.table_resizing",)
"""Settings that had their say when the run began."""


class Stopped(Exception):
    """A run was asked to stop, has saved its state, and can be continued."""


class Checkpointing(CheckpointIO):
    """Writes a checkpoint whole or not at all, and reads tensors and plain values only.

    Attributes:
        failure: Why the last one could not be written; empty if it was.
    """

    def __init__(self) -> None:
        self.failure = ""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a file, or with all processes a folder where the state is sharded. Notes a failure, raises none."""
        sharded = any(isinstance(value, DTensor) for value in checkpoint["state_dict"].values())
        try:
            (save_folder if sharded else save_file)(checkpoint, Path(path))
            self.failure = ""
        except OSError as error:
            self.failure = error.strerror or str(error)

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        """Reads a file or a folder, tensors in full, on the CPU."""
        return load(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a file or a folder."""
        remove(Path(path))


class Checkpoints(Callback):
    """Writes `checkpoints/step_<n>.ckpt` every n optimizer steps, at the end, and when the run is asked to stop.

    Args:
        run: The run folder.
        every_n_steps: Optimizer steps between two.
        keep: How many of the newest to keep; None keeps all.
        on_error: What follows when one cannot be written: "stop" the run, or "continue" with the older ones.
    """

    def __init__(self, run: Path, *, every_n_steps: int, keep: int | None, on_error: str) -> None:
        if on_error not in ("stop", "continue"):
            raise ValueError(f"checkpoint.on_error={on_error} is unknown: choose stop or continue")
        self.run = run
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.on_error = on_error
        self._signalled = False
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clears up what a killed run has left, and takes the signals over.

        A handler sets a flag only: neither is a step cut in two, nor do processes wait for one another in a handler.
        """
        if trainer.is_global_zero:
            for partial in (self.run / CHECKPOINTS).glob(partial_name(Path("step_*.ckpt"))):
                remove(partial)
            for damaged in (path for path in list_checkpoints(self.run) if step_of(path) > trainer.global_step):
                damaged.replace(damaged.with_name(f"{damaged.name}.damaged"))
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._signal) for number in STOP_SIGNALS}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Saves before the next optimizer step begins: by now the metrics of the last one are written."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._save_if_due(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves before a validation too, which can be long."""
        self._save_if_due(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops after an optimizer step if any process was told to."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and any(total_over_ranks(trainer, self._signalled)):
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last step."""
        self._save(trainer)
        self._release()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes back that Lightning counts the next batch as begun, and that one was the last.

        A resumed run begins that batch again, and it may be made longer.
        """
        counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        counts["is_last_batch"] = False
        for count in (counts["total"], counts["current"]):
            count["ready"] = count["started"] = count["processed"] = count["completed"]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self._release()

    def _signal(self, number: int, *_: Any) -> None:
        if self._signalled and number == signal.SIGINT:  # a person who will not wait
            self._release()
            signal.raise_signal(number)
        self._signalled = True

    def _release(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _save_if_due(self, trainer: Trainer) -> None:
        if trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        path = self.run / CHECKPOINTS / checkpoint_name(trainer.global_step)
        if trainer.strategy.broadcast(path.exists()):
            return
        trainer.save_checkpoint(path)
        writer = trainer.strategy.checkpoint_io
        assert isinstance(writer, Checkpointing)
        if failure := trainer.strategy.broadcast(writer.failure):
            self._tell(path, failure)
        elif self.keep is not None and trainer.is_global_zero:
            for old in list_checkpoints(self.run)[: -self.keep]:
                remove(old)

    def _tell(self, path: Path, failure: str) -> None:
        kept = list_checkpoints(self.run)
        newest = f"the newest is that of step {step_of(kept[-1])}" if kept else "there is none yet"
        report = f"{shown(path)} could not be written ({failure}); {newest}"
        if self.on_error == "stop":
            raise OSError(f"{report}: make room and continue with resume=auto, or give checkpoint.on_error=continue")
        log.warning(f"{report}, and the run goes on (checkpoint.on_error=continue)")


def find_checkpoint(resume: str | None, run: Path) -> Path | None:
    """What a run continues from.

    Args:
        resume: None starts afresh; "auto" takes the newest checkpoint of the run folder that is not damaged, if there
            is one; of another run folder likewise; a checkpoint is taken as given.
        run: The run folder.

    Returns:
        A checkpoint, or None to start afresh.

    Raises:
        ValueError: If what `resume` names does not exist or is damaged, or the run folder holds checkpoints that would
            be lost.
    """
    own = list_checkpoints(run)
    if resume == "auto" and not own:
        log.info(f"resume=auto: no checkpoint in {shown(run)}, so the run starts afresh (was it another name=…?)")
        return None
    chosen = None if resume is None else newest_checkpoint(run if resume == "auto" else Path(resume), key="resume")
    newest = [path for path in own if chosen is not None and path.resolve() == chosen.resolve()]
    if own and not (newest and all(damage(path) for path in own if step_of(path) > step_of(newest[0]))):
        raise ValueError(
            f"{run} already holds checkpoints up to step {step_of(own[-1])}, and a run is never overwritten: "
            "resume=auto continues it, another name=… starts afresh"
        )
    return chosen


def newest_checkpoint(path: Path, *, key: str) -> Path:
    """A checkpoint itself, or the newest of a run folder that is not damaged.

    Args:
        path: A checkpoint, or a run folder.
        key: The config key it came from, for the message.

    Raises:
        ValueError: If there is none, or every one is damaged.
    """
    if not path.exists():
        raise ValueError(f"{key}={path} does not exist: give a run folder, as outputs/pretrain/<name>, or a *.ckpt")
    found = [path] if path.suffix == ".ckpt" else list_checkpoints(path) if path.is_dir() else []
    if not found:
        raise ValueError(f"{key}={path} is neither a checkpoint nor a run folder with checkpoints")
    for checkpoint in reversed(found):
        step_of(checkpoint)
        if not (reason := damage(checkpoint)):
            return checkpoint
        log.warning(f"{shown(checkpoint)} is {reason}: passed over")
    raise ValueError(f"{key}={path}: no checkpoint there is whole ({reason})")


def remove(checkpoint: Path) -> None:
    """Removes a file or a folder."""
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink()


def refuse_changed_settings(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Refuses to go on with a checkpoint under settings that its state contradicts or would silently override.

    The length of the run may change. Anything else starts a new run from the old encoder.

    Args:
        checkpoint: What the run continues from.
        settings: The hyper-parameters of the task that is to go on.

    Raises:
        ValueError: With the first setting that differs.
    """
    saved = load_rest(checkpoint)["hyper_parameters"]
    for section in (key for key in settings if key != "schedule"):
        before = BEFORE | (_flat(section, saved[section]) if section in saved else {})
        now = _flat(section, settings[section])
        for key in (key for key in now if key not in OF_THE_START):
            if before.get(key) != now[key]:
                raise ValueError(
                    f"{checkpoint} was trained with {key}={before.get(key)}, now {now[key]}: keep it, or start a "
                    "new run with another name=… and encoder=…"
                )


def _flat(section: str, value: Any) -> dict[str, Any]:
    return {f"{section}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {section: value}
