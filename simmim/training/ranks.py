"""What the processes of a run tell one another, besides gradients."""

import torch
from lightning import Trainer


def total_over_ranks(trainer: Trainer, *numbers: float) -> list[float]:
    """Sums of numbers over all processes, each of which calls it at the same point of the run."""
    if trainer.world_size == 1:
        return list(numbers)
    own = torch.tensor(numbers, dtype=torch.float64, device=trainer.strategy.root_device)
    total: list[float] = trainer.strategy.reduce(own, reduce_op="sum").tolist()
    return total
