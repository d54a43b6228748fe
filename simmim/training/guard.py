"""Which optimizer steps are taken: a bad batch must not undo what a run has learnt."""

import logging
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from simmim.run_folder import shown
from simmim.training.metrics import StepTable
from simmim.training.ranks import total_over_ranks

log = logging.getLogger(__name__)

COLUMNS = ("reason", "loss", "grad_norm", "median", "seed", "samples")


class Guard(Callback):
    """Leaves out steps whose loss or gradient is not finite, or whose gradient is far larger than those before it.

    What is left out changes neither the weights, nor the optimizer's state, nor the running average. It counts as a
    step nevertheless: the learning rate follows its schedule, and the next step has the next batch. All processes
    decide alike. Each such step has a row in a file, with all that rebuilds its batch (see `ImageData.keys_of_step`).

    Args:
        path: `skipped.csv` of the run.
        seed: Of the run, for the file.
        max_norm_ratio: The gradient norm, before clipping, may be so many times the median of those of the last steps
            that were taken; None for any.
        window: So many steps the median is of, at most.
        warmup_steps: So many are taken before one is judged by the median.
        max_in_a_row: So many may be left out in a row.

    Raises:
        ValueError: If the median would never be known.
    """

    def __init__(
        self,
        path: Path,
        *,
        seed: int,
        max_norm_ratio: float | None,
        window: int,
        warmup_steps: int,
        max_in_a_row: int,
    ) -> None:
        if warmup_steps > window:
            raise ValueError(
                f"guard.warmup_steps={warmup_steps} must be at most guard.window={window}: no more are kept"
            )
        self.seed = seed
        self.max_norm_ratio = max_norm_ratio
        self.warmup_steps = warmup_steps
        self.max_in_a_row = max_in_a_row
        self.norms: deque[float] = deque(maxlen=window)
        self.in_a_row = self.skipped = 0
        self.table = StepTable(path, COLUMNS)

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Takes its place beside the optimizer."""
        pl_module.guard = self

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Forgets what was left out behind the checkpoint: it is done again."""
        if trainer.is_global_zero:
            self.table.begin(trainer.global_step)

    def refuses(self, trainer: Any, *, loss: float, norm: float) -> bool:
        """Whether to leave out the step that is about to be taken. All processes call it at once.

        Args:
            trainer: Of the run.
            loss: Of the images of this process.
            norm: Of all gradients of all processes, before clipping.
        """
        reason = self._doubt(loss, norm)
        doubts, total = total_over_ranks(trainer, bool(reason), loss)
        if not doubts:
            self.norms.append(norm)
            self.in_a_row = 0
            return False
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if trainer.is_global_zero:
            self._record(
                trainer, reason or "the loss of another process is not finite", total / trainer.world_size, norm
            )
        return True

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts after each optimizer step, and stops the run when too many were left out."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        pl_module.log("skipped_steps", float(self.skipped))
        if self.in_a_row > self.max_in_a_row:
            raise ValueError(
                f"{self.in_a_row} steps in a row were left out, more than guard.max_in_a_row={self.max_in_a_row}: see "
                f"{shown(self.table.path)} for reasons and samples; those steps changed nothing, the checkpoints are "
                "good; try a smaller optimizer.base_lr or optimizer.clip_grad_norm, or trainer.precision=32-true"
            )

    def state_dict(self) -> dict[str, Any]:
        """All that it judges by, so that a resumed run goes on with it."""
        return {"norms": list(self.norms), "in_a_row": self.in_a_row, "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it up again; of a larger window the newest."""
        self.norms.extend(state_dict["norms"])
        self.in_a_row, self.skipped = state_dict["in_a_row"], state_dict["skipped"]

    @property
    def median(self) -> float | None:
        """Of the norms of the last steps taken; None while there are too few."""
        return statistics.median(self.norms) if len(self.norms) >= self.warmup_steps else None

    def _doubt(self, loss: float, norm: float) -> str:
        """Why not to take the step; empty if there is no reason."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        if self.max_norm_ratio is None or self.median is None or norm <= self.max_norm_ratio * self.median:
            return ""
        return (
            f"the gradient norm {norm:.3g} is above guard.max_norm_ratio={self.max_norm_ratio:g} times the median "
            f"{self.median:.3g}"
        )

    def _record(self, trainer: Any, reason: str, loss: float, norm: float) -> None:
        step, data = trainer.global_step + 1, trainer.datamodule
        images = data.batch_size * trainer.accumulate_grad_batches * trainer.world_size
        samples = " ".join(f"{epoch}:{index}" for epoch, index in data.keys_of_step(step, images))
        numbers = {"loss": loss, "grad_norm": norm, "median": self.median, "seed": self.seed}
        self.table.add([{"step": step, "reason": reason, **numbers, "samples": samples}])
        log.warning(f"step {step} is left out: {reason}; its samples are in {shown(self.table.path)}")
