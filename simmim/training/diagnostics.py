"""How the signal goes through the encoder of a run, while it trains."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer

from simmim.training.metrics import StepTable
from simmim.training.propagation import COLUMNS, Blocks, measure_blocks, rows_of
from simmim.training.ranks import mean_over_ranks


class Diagnostics(Callback):
    """Measures features, attention and gradients of every n-th step, block by block; the run is the same without it.

    Features and attention are those of the weights that the step begins with, on the first batch of each process, in a
    forward pass of its own, without stochastic depth and, of compiled blocks, as they are written. The gradients are
    those of the step itself, before they are clipped. All are of the images of all processes.

    Args:
        path: `signal.csv` of the run; the loggers are given two numbers of it.
        every_n_steps: Optimizer steps from one measurement to the next.
    """

    def __init__(self, path: Path, *, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.table = StepTable(path, COLUMNS)
        self.blocks: Blocks | None = None
        self.rows: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Forgets what was measured behind the checkpoint: it is done again."""
        if trainer.is_global_zero:
            self.table.begin(trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Looks at features and attention before the step begins."""
        if batch_idx % trainer.accumulate_grad_batches or (trainer.global_step + 1) % self.every_n_steps:
            return
        pl_module.network.eval()
        with trainer.precision_plugin.forward_context():
            own = measure_blocks(pl_module.network.encoder, lambda: pl_module.look(batch))
        pl_module.network.train()
        mean = mean_over_ranks(trainer, torch.cat([own.variance, *own.attention]))
        variance, *attention = torch.split(mean, [len(own.variance), *map(len, own.attention)])
        self.blocks = Blocks(variance, attention)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Looks at the gradients, which all batches of the step have added up to."""
        if self.blocks is not None:
            self.rows = rows_of(pl_module.network, self.blocks)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Writes and logs what the step was."""
        if self.blocks is None or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step, blocks, self.blocks = trainer.global_step, self.blocks, None
        if trainer.is_global_zero:
            self.table.add([{"step": step, **row} for row in self.rows])
        # Not through the module's log, which would say them again at all steps that follow.
        numbers = {"variance_ratio": blocks.variance_ratio, "highest_attention": blocks.highest_attention}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step)
