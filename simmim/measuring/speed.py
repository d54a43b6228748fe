"""Clocks: works that take turns, the machine's own rate, and floating-point operations counted."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode

from simmim.measuring.networks import OURS, Runner, Work


def interleaved(works: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of each work, round by round: A B C, A B C, so that what else the machine does hits all of them."""
    for _ in range(warmup):
        for work in works.values():
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def matmul_rate(work: Work) -> float:
    """Floating-point operations a second of a large square matrix product, in the precision of the work."""
    side, dtype = (8192 if work.gpu else 2048), (torch.bfloat16 if work.bf16 else torch.float32)
    a = torch.randn(side, side, device="cuda" if work.gpu else "cpu").to(dtype)

    def product() -> None:
        a @ a
        if work.gpu:
            torch.cuda.synchronize()

    return 2 * side**3 / statistics.median(interleaved({"": product}, rounds=20, warmup=5)[""])


def model_flops(work: Work) -> int:
    """Floating-point operations of the products in a step of the whole batch, counted while one image runs.

    Counted with the reference attention: what other ways compute again is not the model's.
    """
    one = work.changed(
        model={**work.model, "attention": "reference"}, batch_size=1, compiled=False, activation_checkpointing="none"
    )
    runner = Runner(OURS, one)
    with FlopCounterMode(display=False) as counter:
        runner()
    return int(counter.get_total_flops() * work.batch_size)
