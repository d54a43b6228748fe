"""What training runs share: how long they are, what trains them, what they write, and how they end.

Pretraining and fine-tuning give a task, its data and what is drawn on the way.
"""

import gc
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from simmim.config import Config, save_config
from simmim.devices import accumulation, check_devices, precision_of, world_size
from simmim.length import Length
from simmim.processes import cluster_environments
from simmim.run_folder import SIGNAL, SKIPPED, UNREADABLE, shown, step_of
from simmim.tasks.task import Task
from simmim.training.callbacks import Progress, UnreadableImages, ValidationOnResume
from simmim.training.checkpoint import Checkpointing, Checkpoints, Stopped
from simmim.training.diagnostics import Diagnostics
from simmim.training.guard import Guard
from simmim.training.loggers import closing, create_loggers
from simmim.training.sharding import ShardedStrategy

log = logging.getLogger(__name__)

NO_MEMORY = "can't allocate memory"
"""What PyTorch says when the memory of the machine is used up."""

LOST_CONTACT = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
"""What gloo and NCCL say when a process is gone."""


def train(
    command: str,
    config: Config,
    task: Task,
    data: LightningDataModule,
    length: Length,
    *,
    checkpoint: Path | None,
    callbacks: Sequence[Callback],
) -> Trainer:
    """Trains a task in its run folder, and validates what no validation has seen.

    Args:
        command: Its name.
        config: Its composed config.
        task: What is trained.
        data: Its batches.
        length: How long; a run of no steps is a validation.
        checkpoint: What the run continues from, or None.
        callbacks: Besides those of every run.

    Returns:
        The trainer, whose `callback_metrics` hold the last validation.

    Raises:
        Stopped: If the run was asked to stop, and has saved its state.
    """
    output_dir = Path(config["output_dir"])
    output_dir.mkdir(parents=True, exist_ok=True)
    resumed_step = step_of(checkpoint) if checkpoint else 0
    if resumed_step > length.total_steps:
        raise ValueError(f"{checkpoint} lies beyond the {length.total_steps} steps of this run: give it more epochs")
    loggers = create_loggers(config, resumed_step=resumed_step, job_type=command)
    with closing(loggers):
        trainer = create_trainer(config, length, callbacks=callbacks, loggers=loggers)
        if trainer.is_global_zero:  # last: a refused config leaves the run's own
            save_config(config, output_dir / "config.yaml")
            if checkpoint is None:
                (output_dir / UNREADABLE).unlink(missing_ok=True)  # of a run that came to no checkpoint
        log.info(f"run folder {shown(output_dir)}" + (f", continued from {checkpoint.name}" if checkpoint else ""))
        if length.total_steps:
            trainer.fit(task, data, ckpt_path=checkpoint)
        if trainer.global_step < length.total_steps:
            raise Stopped(
                f"stopped at step {trainer.global_step} of {length.total_steps}, saved: the same command with "
                f"name={config['name']} and resume=auto continues"
            )
        if trainer.global_step % length.steps_between_validations or "val_loss" not in trainer.callback_metrics:
            trainer.validate(task, data, verbose=False)
    return trainer


def training_settings(config: Config, length: Length) -> dict[str, Any]:
    """What `optimizer`, `schedule` and `seed` mean to a task in a run so long. See `simmim.tasks.task.Task`."""
    optimizer, schedule = dict(config["optimizer"]), config["schedule"]
    lr = optimizer.pop("base_lr") * length.images_per_step / 512
    ema_decay = optimizer.pop("ema_decay")
    optimizer.pop("clip_grad_norm")  # the trainer's
    warmup = schedule["warmup_steps"]
    return {
        "optimizer": {"lr": lr, **optimizer},
        "schedule": {
            "name": schedule["name"],
            "warmup_steps": length.steps(schedule["warmup_epochs"]) if warmup is None else warmup,
            "total_steps": length.total_steps,
            "final_ratio": schedule["final_ratio"],
            "milestones": [length.steps(epoch) for epoch in schedule["milestone_epochs"]],
        },
        "ema_decay": ema_decay,
        "seed": config["seed"],
    }


def prepare_torch(config: Config) -> None:
    """Checks the devices, and seeds what libraries draw from."""
    check_devices(config)
    torch.set_flush_denormal(True)  # the -100 of the shifted windows makes denormals, which a CPU is slow with
    lightning.seed_everything(config["seed"], verbose=False)


def describe_training(config: Config, task: Task, length: Length) -> None:
    """Says in the log how long a run is, and how it learns."""
    log.info(
        f"length     {length.total_steps} steps of {length.images_per_step} images, {length.steps_per_epoch} an epoch"
    )
    log.info(
        f"lr         {config['optimizer']['base_lr']:g} base x {length.images_per_step} images a step / 512 = "
        f"{task.optimizer['lr']:.3g} after {task.schedule['warmup_steps']} steps of warm-up"
    )
    if task.schedule["warmup_steps"] >= length.total_steps > 0:
        log.warning("the warm-up takes the whole run: give a smaller schedule.warmup_epochs")


def describe_unreadable(output_dir: Path) -> None:
    """Says in the log how many images could not be read, if any."""
    if (unreadable := output_dir / UNREADABLE).exists():
        log.info(
            f"unreadable {len(unreadable.read_bytes().splitlines())} images, replaced or left out: {shown(unreadable)}"
        )


@contextmanager
def explained(advise: Callable[[], str]) -> Iterator[None]:
    """Says in one line what the libraries below say in many, and what to do about it.

    Args:
        advise: What to do where memory is short.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        causes: list[BaseException] = [error]  # clearing up after one error, Lightning can meet the next
        while causes[-1].__context__ is not None:
            causes.append(causes[-1].__context__)
        text = " ".join(map(str, causes))
        if any(isinstance(cause, torch.OutOfMemoryError | MemoryError) for cause in causes) or NO_MEMORY in text:
            for cause in causes:  # what the run held: its plan needs memory too
                traceback.clear_frames(cause.__traceback__)
            gc.collect()
            raise ValueError(f"out of memory: {advise()}") from error
        if any(words in text for words in LOST_CONTACT):
            raise ValueError(
                "another process of this run has ended, and its own lines say why: a run continues with resume=auto"
            ) from error
        raise


def create_strategy(config: Config) -> Any:
    """Lightning's strategy that `trainer.strategy` means."""
    settings = config["trainer"]
    if settings["strategy"] == "single":
        return "auto"
    if settings["strategy"] == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True)  # else gradients would be held twice
    bf16 = precision_of(config) == "bf16-mixed"
    return ShardedStrategy(reshard_after_forward=settings["reshard_after_forward"], bf16=bf16)


def create_trainer(
    config: Config, length: Length, *, callbacks: Sequence[Callback], loggers: Sequence[Logger]
) -> Trainer:
    """Lightning's trainer with everything that a run writes.

    The run is one long epoch of Lightning's, and validation comes every so many batches: then the step alone says
    where a run stands.
    """
    settings, output_dir = config["trainer"], Path(config["output_dir"])
    accumulate, every = accumulation(config), config["diagnostics"]["every_n_steps"]
    return Trainer(
        accelerator=settings["accelerator"],
        strategy=create_strategy(config),
        devices=world_size(config) // settings.get("num_nodes", 1),
        num_nodes=settings.get("num_nodes", 1),
        use_distributed_sampler=False,  # ours knows the processes
        precision=precision_of(config),
        max_steps=length.total_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=config["optimizer"]["clip_grad_norm"],
        val_check_interval=length.steps_between_validations * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=config["log_every_n_steps"],
        logger=list(loggers),
        callbacks=[
            UnreadableImages(
                output_dir / UNREADABLE,
                on_error=config["data"]["on_error"],
                max_fraction=config["data"]["max_bad_fraction"],
            ),
            Progress(
                steps_per_epoch=length.steps_per_epoch,
                images_per_step=length.images_per_step,
                every_n_steps=config["log_every_n_steps"],
            ),
            *callbacks,
            ValidationOnResume(every_n_steps=length.steps_between_validations),
            *([Diagnostics(output_dir / SIGNAL, every_n_steps=every)] if every else []),
            Guard(output_dir / SKIPPED, seed=config["seed"], **config["guard"]),
            Checkpoints(
                output_dir,
                every_n_steps=min(config["checkpoint"]["every_n_steps"], length.steps_per_epoch),
                keep=config["checkpoint"]["keep"],
                on_error=config["checkpoint"]["on_error"],
            ),
        ],
        plugins=[Checkpointing(), *cluster_environments()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=output_dir,
    )
