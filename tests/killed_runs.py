"""Runs a command again and again in processes that are killed, until one of them comes to the end.

    python killed_runs.py <run folder> <processes> <kills> <seed> <override> ...

Each process is forked from this one, where the libraries are loaded, and is the real run: it trains, saves and resumes
as the command does. SIGKILL comes from inside, at the n-th moment of a kind, both drawn at random. Prints the kinds.
"""

import io
import os
import random
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch

import simmim.checkpoint_files
import simmim.run_folder
from simmim.config import compose_config
from simmim.data.module import ImageData
from simmim.pretrain import pretrain
from simmim.tasks.pretraining import Pretraining

KINDS = (
    "start",
    "training",
    "between backward pass and step",
    "validation",
    "checkpoint half written",
    "checkpoint about to be whole",
    "old checkpoint about to go",
)


def watch(fatal, rank):
    """Counts the moments of the fatal kind down; at the last the process is killed, and with it all its workers."""
    kind, left = fatal

    def moment(name):
        nonlocal left
        left -= name == kind
        if name == kind and left == 0:
            os.write(1, f"killed: {name}\n".encode())
            os.killpg(0, signal.SIGKILL)

    def before(owner, function, name):
        original = getattr(owner, function)

        def watched(*args, **kwargs):
            moment(name)
            return original(*args, **kwargs)

        setattr(owner, function, watched)

    def half_written(tree, file):
        save(tree, file)
        if not isinstance(file, io.BufferedWriter):  # one tensor of many
            return
        file.truncate(file.tell() // 2)
        moment("checkpoint half written")
        file.seek(0)
        file.truncate()
        save(tree, file)

    if rank != 0:
        return
    save = torch.save
    torch.save = half_written
    before(Pretraining, "training_step", "training")
    before(Pretraining, "configure_gradient_clipping", "between backward pass and step")
    before(Pretraining, "validation_step", "validation")
    before(ImageData, "val_dataloader", "start")
    before(simmim.checkpoint_files, "flush", "checkpoint about to be whole")  # of a folder
    before(simmim.run_folder, "flush", "checkpoint about to be whole")  # a file, and metrics too
    before(simmim.training.checkpoint, "remove", "old checkpoint about to go")


def attempt(folder, processes, overrides, *, fatal):
    """Whether the run came to its end."""
    children = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if rank == 0:
                os.setsid()
            if processes > 1:
                os.environ |= {
                    "TORCHELASTIC_RUN_ID": "test",
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "GROUP_RANK": "0",
                    "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            try:
                watch(fatal, rank)
                pretrain(compose_config("pretrain", ["experiment=debug", "resume=auto", *overrides], output_dir=folder))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    failed = False
    while children:
        child, status = os.wait()
        children.remove(child)
        if status and not failed:
            failed = True
            for other in children:  # as torchrun does
                os.kill(other, signal.SIGKILL)
    return not failed


def main(folder, processes, kills, seed, *overrides):
    chance = random.Random(seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(int(kills))]
    chance.shuffle(kinds)
    for kind in kinds:
        fatal = (kind, 1 if kind in ("start", "validation") else chance.randint(1, 3))
        attempt(Path(folder), int(processes), overrides, fatal=fatal)
    assert attempt(Path(folder), int(processes), overrides, fatal=("", 0))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], *sys.argv[5:])
