"""What `python -m simmim.plan` counts, against what processes really take on a CPU: python benchmarks/plan.py.

Every setting runs in a process of its own, or in two that share it; the highest resident size of the first counts.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from simmim.encoders import create_encoder
from simmim.measuring.footprint import Layout, Step, count_step
from simmim.measuring.memory import peak_resident, resident
from simmim.measuring.networks import OBJECTIVE, OURS, Runner, Work, batch_of
from simmim.measuring.tables import environment_notes, write_table
from simmim.tasks.pretraining import MaskedImageModel
from simmim.training.optimizer import create_optimizer
from simmim.training.sharding import ShardedStrategy, fill

# model, image size, window, batch, attention, bf16, checkpointing, processes
SETTINGS = [
    ("swinv2_t", 192, 12, 32, "sequential", False, "none", 1),
    ("swinv2_t", 192, 12, 32, "sequential", True, "none", 1),
    ("swinv2_t", 192, 12, 16, "sdpa", False, "none", 1),
    ("swinv2_t", 192, 12, 16, "reference", False, "none", 1),
    ("swinv2_t", 192, 12, 16, "sdpa", True, "all", 1),
    ("swinv2_t", 384, 24, 4, "sequential", False, "all", 1),
    ("swinv2_s", 768, 12, 1, "sequential", False, [1, 2], 1),
    ("swinv2_b", 192, 12, 4, "sequential", False, "none", 1),
    ("swinv2_b", 192, 12, 4, "sequential", False, "none", 2),
    ("swinv2_b", 192, 12, 4, "sequential", True, "all", 2),
]
NOTES = [
    "predicted: parameters, optimizer state, communication buffers, and the peak of activations, gradients and "
    "temporary tensors in a step; one process trains with AdamW, two share it with FSDP2 over gloo",
    "measured: the highest resident size of a process in its third step, less what it was before the network was "
    "built, when a small network had been trained in it",
    "ratio: measured to predicted",
    "no GPU has been measured",
]


class ShardedRunner:
    """As `Runner`, for one of several processes."""

    def __init__(self, work: Work) -> None:
        strategy = ShardedStrategy(reshard_after_forward=True, bf16=work.bf16)
        strategy._device_mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data_parallel",))
        with torch.device("meta"):
            network = MaskedImageModel(create_encoder(**work.model), **OBJECTIVE)
        fill(network, seed=0, strategy=strategy)
        network.encoder.checkpoint_activations(work.activation_checkpointing)
        self.optimizer = create_optimizer(
            network, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, layer_decay=1
        )
        self.network, self.work, (self.images, self.mask) = network, work, batch_of(work)

    def __call__(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.work.bf16):
            loss = self.network(self.images, self.mask)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def work_of(setting) -> Work:
    name, size, window, batch, attention, bf16, checkpointing, _ = setting
    model = {"name": name, "window_size": window, "in_channels": 3, "attention": attention}
    return Work(model, (size, size), batch, bf16=bf16, activation_checkpointing=checkpointing)


def predicted(setting) -> int:
    work, processes = work_of(setting), setting[-1]
    step = Step(
        work.model,
        OBJECTIVE,
        work.image_size,
        work.batch_size,
        batch_of(work)[1][0],
        bf16=work.bf16,
        bf16_weights=work.bf16 and processes > 1,
        checkpointing=work.activation_checkpointing,
        gpu=False,
    )
    strategy = "single" if processes == 1 else "fsdp"
    return count_step(step).memory(Layout(strategy, processes, accumulates=False, reshards=True, average=False))["peak"]


def measured(setting) -> int:
    processes = setting[-1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Freed tensors go back to the system at once, so that the resident size is what lives.
    fixed = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    fixed |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, json.dumps(setting)],
            env={**os.environ, **fixed, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    said = [process.communicate()[0] for process in started]
    return max(int(text.splitlines()[-1]) for text in said)


def measure(setting) -> int:
    """The rise of this process's resident size, in a step after two others."""
    work, processes = work_of(setting), setting[-1]
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    tiny = {"name": "swinv2", "window_size": 4, "embed_dim": 32, "depths": [1, 1, 1], "num_heads": [1, 2, 4]}
    model = {**work.model, **tiny, "extra_norm_every": 0}
    small = work.changed(model=model, batch_size=1, image_size=(128, 128), activation_checkpointing="none")
    if processes > 1:
        dist.init_process_group("gloo")
    runners = (lambda work: Runner(OURS, work)) if processes == 1 else ShardedRunner
    warm = runners(small)
    warm()
    warm()
    before = resident()
    runner = runners(work)
    for _ in range(2):
        runner()
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew
    runner()
    rise = peak_resident() - before
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    return rise


def row_of(setting) -> dict:
    name, size, window, batch, attention, bf16, checkpointing, processes = setting
    expected, found = predicted(setting), measured(setting)
    return {
        "model": name,
        "px": size,
        "window": window,
        "batch": batch,
        "attention": attention,
        "precision": "bf16" if bf16 else "fp32",
        "checkpointed": checkpointing if isinstance(checkpointing, str) else " ".join(map(str, checkpointing)),
        "processes": processes,
        "predicted_MB": expected / 1e6,
        "measured_MB": found / 1e6,
        "ratio": found / expected,
    }


def write(rows) -> None:
    notes = ["command: `python benchmarks/plan.py`", *NOTES, *environment_notes(gpu=False)]
    print(write_table(rows, Path(__file__).with_suffix(""), title="Memory: planned and taken", notes=notes))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(json.loads(sys.argv[1])))
    else:
        write([row_of(setting) for setting in SETTINGS])
