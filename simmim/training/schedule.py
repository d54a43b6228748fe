"""The learning rate as a pure function of the optimizer step."""

import math
from collections.abc import Sequence
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def lr_factor(
    step: int,
    *,
    name: str,
    warmup_steps: int,
    total_steps: int,
    final_ratio: float,
    milestones: Sequence[int],
) -> float:
    """What the peak learning rate is multiplied with at a step.

    Args:
        step: Optimizer step, from 0.
        name: "cosine": half a cosine from 1 to `final_ratio`. "multistep": times 0.1 at each milestone.
        warmup_steps: Steps of the linear rise to 1.
        total_steps: Length of the run.
        final_ratio: Last learning rate of the cosine, as a share of the peak.
        milestones: Steps of the drops.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "multistep":
        return 0.1 ** sum(step >= milestone for milestone in milestones)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * progress)) / 2


def create_schedule(
    optimizer: Optimizer,
    *,
    name: str,
    warmup_steps: int,
    total_steps: int,
    final_ratio: float,
    milestones: Sequence[int],
) -> LambdaLR:
    """`lr_factor` as a PyTorch scheduler, stepped once an optimizer step.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in ("cosine", "multistep"):
        raise ValueError(f"schedule.name={name} is unknown: choose cosine or multistep")
    factor = partial(
        lr_factor,
        name=name,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        final_ratio=final_ratio,
        milestones=milestones,
    )
    return LambdaLR(optimizer, factor)
