"""Trains several runs, one after the other, in processes that are of one group.

    torchrun --nproc-per-node 2 sharded_runs.py <folder> '{"<name>": ["<override>", ...], ...}' [finetune]

Besides its run folder each run leaves `<name>.<rank>.json`: what this process holds of the parameters and of the
optimizer's state, as shares of the whole, and how often gradients were sent.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from simmim.config import compose_config


class Sent(TorchDispatchMode):
    """Counts the reductions of gradients."""

    def __init__(self):
        super().__init__()
        self.reductions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reductions += "reduce_scatter" in function.__name__
        return function(*args, **(kwargs or {}))


def share(tensors):
    tensors = list(tensors)
    own = sum(t.to_local().numel() if isinstance(t, DTensor) else t.numel() for t in tensors)
    return own / sum(t.numel() for t in tensors)


def main(folder, runs, command="pretrain"):
    folder, built = Path(folder), {}
    module = importlib.import_module(f"simmim.{command}")
    build = module.build

    def watched(config):
        built["task"], data, length = build(config)
        return built["task"], data, length

    module.build = watched
    for name, overrides in json.loads(runs).items():
        config = compose_config(command, ["experiment=debug", *overrides], output_dir=folder / name)
        with Sent() as sent:
            getattr(module, command)(config)
        task = built["task"]
        facts = {
            "parameters": share(task.network.parameters()),
            "optimizer": share(v for s in task.optimizers().state.values() for k, v in s.items() if k != "step"),
            "reductions": sent.reductions,
        }
        (folder / f"{name}.{torch.distributed.get_rank()}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
