"""Peak memory of a step, each in a process of its own.

`python -m simmim.measuring.memory <JSON>` is that process.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from simmim.measuring.networks import Runner, Work


def peak_memory(name: str, work: Work) -> dict[str, float]:
    """Memory in MB (10^6 bytes) that a network holds between two steps, and that a step takes beyond that.

    Returns:
        `state`: weights and optimizer state, counted. `step`: activations, gradients and temporary tensors at their
        peak. On a CPU it is the rise of the process's resident size, on a GPU of what PyTorch allocates.

    Raises:
        ValueError: If the process fails, with the last line that it wrote: the memory may not suffice.
    """
    task = json.dumps({"name": name, "work": asdict(work), "threads": torch.get_num_threads()})
    # Freed tensors go back to the system at once, so that the resident size is what lives.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    command = [sys.executable, "-m", "simmim.measuring.memory", task]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"signal {-done.returncode}: out of memory, probably"])[-1]
        raise ValueError(f"the step of {name} at {work.image_size[0]}x{work.image_size[1]} px failed: {reason}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def resident() -> int:
    """Bytes of this process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """The most that `resident` has been."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def _measure(task: dict[str, Any]) -> dict[str, float]:
    torch.set_num_threads(task["threads"])
    work = Work(**{**task["work"], "image_size": tuple(task["work"]["image_size"])})
    runner = Runner(task["name"], work)
    for _ in range(2):  # the optimizer's state and the pages of the libraries are there from the second step on
        runner()
    tensors = [*runner.network.parameters(), *(x for s in runner.optimizer.state.values() for x in s.values())]
    state = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return {"state": state / 1e6, "step": (_gpu_rise(runner) if work.gpu else _rise(runner)) / 1e6}


def _rise(runner: Runner) -> int:
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew
    runner()
    return peak_resident() - before


def _gpu_rise(runner: Runner) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
