"""What it takes to build SwinV2-G, 3.0 B parameters, in two processes on a CPU: python benchmarks/giant.py."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from simmim.encoders import create_encoder
from simmim.measuring.memory import peak_resident, resident
from simmim.measuring.networks import OBJECTIVE
from simmim.measuring.tables import environment_notes, write_table
from simmim.tasks.pretraining import MaskedImageModel
from simmim.training.sharding import ShardedStrategy, fill

PROCESSES = 2


def build() -> None:
    """One of the processes that share SwinV2-G."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    strategy = ShardedStrategy(reshard_after_forward=True, bf16=False)
    strategy._device_mesh = init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("data_parallel",))
    with torch.device("meta"):
        network = MaskedImageModel(create_encoder("swinv2_g", window_size=12), **OBJECTIVE)
    before, started = resident(), time.perf_counter()
    fill(network, seed=0, strategy=strategy)
    seconds = time.perf_counter() - started
    own = sum(parameter.to_local().nbytes for parameter in network.parameters())
    whole = sum(parameter.nbytes for parameter in network.parameters())
    print(json.dumps({"GB": (peak_resident() - before) / 1e9, "own": own / 1e9, "all": whole / 1e9, "s": seconds}))
    dist.destroy_process_group()


def built() -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES)}
    # Freed tensors go back to the system at once, so that the resident size is what lives.
    shared |= {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    command = [sys.executable, __file__, "build"]
    started = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(PROCESSES)
    ]
    facts = max((json.loads(process.communicate()[0].splitlines()[-1]) for process in started), key=lambda f: f["GB"])
    return {
        "what": "swinv2_g built and sharded",
        "own_parameters_GB": facts["own"],
        "all_parameters_GB": facts["all"],
        "peak_GB_a_process": facts["GB"],
        "seconds": facts["s"],
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["build"]:
        build()
    else:
        notes = [
            "command: `python benchmarks/giant.py`",
            "peak: the rise of the resident size over the process before it; on the CPU, where the parts stay",
            *environment_notes(gpu=False),
        ]
        print(write_table([built()], Path(__file__).with_suffix(""), title="SwinV2-G in two processes", notes=notes))
