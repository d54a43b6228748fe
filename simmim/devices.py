"""What a config means on this machine: device, precision, processes, and the batches of a step."""

import os
from typing import Any

import torch

from simmim.config import Config
from simmim.processes import started_outside


def on_gpu(config: Config) -> bool:
    """Whether `trainer.accelerator` means a GPU, here.

    Raises:
        ValueError: If it is unknown, or a GPU that PyTorch does not find.
    """
    accelerator = config["trainer"]["accelerator"]
    if accelerator not in ("auto", "cpu", "gpu"):
        raise ValueError(f"trainer.accelerator={accelerator} is unknown: choose auto, cpu or gpu")
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator=gpu, but PyTorch finds no GPU here: give trainer=cpu, or mend its driver")
    return accelerator != "cpu" and torch.cuda.is_available()


def precision_of(config: Config) -> Any:
    """What `trainer.precision` means here: 32-true or bf16-mixed.

    Raises:
        ValueError: If it is unknown.
    """
    precision = config["trainer"]["precision"]
    if precision == "auto":
        return "bf16-mixed" if on_gpu(config) else "32-true"
    if precision not in ("32-true", "bf16-mixed"):
        raise ValueError(
            f"trainer.precision={precision} is unknown: choose auto, 32-true or bf16-mixed (fp16 overflows)"
        )
    return precision


def world_size(config: Config) -> int:
    """Processes that train together.

    Raises:
        ValueError: If there are several and `trainer` is not made for that.
    """
    trainer = config["trainer"]
    devices = trainer["devices"]
    if devices == "auto":
        devices = max(1, torch.cuda.device_count()) if trainer["accelerator"] != "cpu" else 1
    if devices > 1 and trainer["strategy"] == "single":
        raise ValueError(f"trainer.devices={devices}: several devices need trainer=ddp or trainer=fsdp")
    return int(devices * trainer.get("num_nodes", 1))


def check_devices(config: Config) -> None:
    """Refuses devices that are not here, and other numbers of processes than were started.

    Raises:
        ValueError: With the key, and the way out.
    """
    trainer, processes, found = config["trainer"], world_size(config), torch.cuda.device_count()
    nodes = trainer.get("num_nodes", 1)
    started = started_outside()
    if started is not None and started != (processes // nodes, nodes):
        raise ValueError(
            f"trainer.devices={trainer['devices']} x trainer.num_nodes={nodes} is {processes} processes, but "
            f"{started[0] * started[1]} were started: give trainer.devices={started[0]} trainer.num_nodes={started[1]}"
        )
    if on_gpu(config) and processes // nodes > found:
        bound = ", or let each task of Slurm see all of them (--gpus-per-node, not --gpus-per-task)" if started else ""
        raise ValueError(
            f"trainer.devices={trainer['devices']}, but PyTorch finds {found} GPUs here: give auto, or fewer{bound}"
        )
    if nodes > 1 and started is None and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"trainer.num_nodes={nodes}: nobody started the processes of the other machines: use torchrun or Slurm"
        )


def accumulation(config: Config) -> int:
    """Batches of a device that make up an optimizer step.

    Raises:
        ValueError: If no whole number of them makes up `data.global_batch_size`.
    """
    given: int = config["trainer"]["accumulate_grad_batches"]
    images, wanted = config["data"]["batch_size"] * world_size(config), config["data"]["global_batch_size"]
    if wanted is None:
        return given
    if wanted % images or given not in (1, wanted // images):
        raise ValueError(
            f"data.global_batch_size={wanted} is not data.batch_size={config['data']['batch_size']} x "
            f"{world_size(config)} devices x a whole number"
            + (f", or not x trainer.accumulate_grad_batches={given}" if given > 1 else "")
        )
    return wanted // images  # type: ignore[no-any-return]
