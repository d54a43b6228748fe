"""Who starts the processes that train together: torchrun, Slurm, or the run itself."""

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what clusters send before they kill; what Slurm can be told to send earlier."""


def started_outside() -> tuple[int, int] | None:
    """Processes that torchrun or Slurm started on each machine, and machines; None where the run starts its own.

    One task of Slurm is a machine to itself: it starts its own, as on a laptop.

    Raises:
        ValueError: If Slurm may have dealt them unevenly.
    """
    if TorchElasticEnvironment.detect():
        each = int(os.environ["LOCAL_WORLD_SIZE"])
        return each, int(os.environ["WORLD_SIZE"]) // each
    tasks = int(os.environ["SLURM_NTASKS"]) if SLURMEnvironment.detect() else 1
    if tasks == 1:
        return None
    if "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ValueError(f"Slurm started {tasks} tasks by --ntasks: give --nodes and --ntasks-per-node instead")
    each = int(os.environ["SLURM_NTASKS_PER_NODE"])
    return each, tasks // each


def cluster_environments() -> list[ClusterEnvironment]:
    """What Lightning shall take ranks and addresses from, where it would choose otherwise."""
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    if started_outside() is None:
        return [LightningEnvironment()]
    # Lightning's own way of requeueing would save inside of a signal handler, where processes wait for one another.
    return [SLURMEnvironment(auto_requeue=False)]


def run_apart(command: Sequence[str], environment: dict[str, str]) -> tuple[int, bool]:
    """Runs a command to its end, and hands the signals that ask a run to stop on to all of its processes.

    Returns:
        Its exit code, and whether it was asked to stop.
    """
    asked: list[int] = []
    # A session of its own: Ctrl-C reaches it through here, once.
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def hand_on(number: int, *_: Any) -> None:
        asked.append(number)
        _signal_all(process.pid, number)

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, hand_on) for number in STOP_SIGNALS}
    try:
        code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if code < 0:  # killed, it cannot have seen to the processes that it started
        _signal_all(process.pid, signal.SIGKILL)
    return code, bool(asked)


def _signal_all(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)
