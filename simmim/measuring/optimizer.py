"""AdamW as PyTorch offers it, on the parameters of one model."""

import statistics
from typing import Any

import torch

from simmim.measuring.networks import OURS, Runner, Work
from simmim.measuring.speed import interleaved


def optimizer_table(work: Work, *, rounds: int, warmup: int) -> list[dict[str, Any]]:
    """A row a way: `adamw`, `ms` a step (median) and `ratio` of speed to the one without an argument."""
    parameters = list(Runner(OURS, work).network.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    ways: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}, "fused, ours": {"fused": True}}
    steps = {name: torch.optim.AdamW(parameters, lr=1e-9, **arguments).step for name, arguments in ways.items()}
    seconds = interleaved(steps, rounds=rounds, warmup=warmup)
    default = seconds["default"]
    return [
        {
            "adamw": name,
            "ms": 1e3 * statistics.median(seconds[name]),
            "ratio": statistics.median(a / b for a, b in zip(default, seconds[name], strict=True)),
        }
        for name in ways
    ]
