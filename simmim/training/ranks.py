"""What the processes of a run tell one another, besides gradients."""

import torch
from lightning import Trainer
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors


def total_over_ranks(trainer: Trainer, *numbers: float) -> list[float]:
    """Sums of numbers over all processes, each of which calls it at the same point of the run."""
    if trainer.world_size == 1:
        return list(numbers)
    own = torch.tensor(numbers, dtype=torch.float64, device=trainer.strategy.root_device)
    total: list[float] = trainer.strategy.reduce(own, reduce_op="sum").tolist()
    return total


def mean_over_ranks(trainer: Trainer, values: Tensor) -> Tensor:
    """The mean over all processes of values (...) that each has computed of its own images."""
    mean: Tensor = trainer.strategy.reduce(values, reduce_op="mean") if trainer.world_size > 1 else values
    return mean


def rows_of_all_ranks(trainer: Trainer, rows: Tensor) -> Tensor:
    """Rows (n, ...) of all processes below one another, (N, ...): of any number n, each calls it at the same point."""
    return rows if trainer.world_size == 1 else torch.cat(gather_all_tensors(rows))
