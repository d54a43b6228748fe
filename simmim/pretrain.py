"""`python -m simmim.pretrain`: pretrains a Swin Transformer V2 on images without labels.

With no argument: a small one on synthetic images, in about a minute on two CPU cores. `conf/pretrain.yaml` lists
all keys.
"""

import gc
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
import wandb
from lightning import Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import OmegaConf
from tqdm.contrib.logging import logging_redirect_tqdm

from simmim.command import (
    Config,
    accumulation,
    check_devices,
    command,
    image_size_of,
    on_gpu,
    precision_of,
    quieten_libraries,
    world_size,
)
from simmim.data.module import MaskedImageData, create_sources, fixed_batch
from simmim.encoders.weights import load_encoder_weights, save_encoder
from simmim.masking import Masking
from simmim.plan import advice
from simmim.run_folder import ENCODER, shown, step_of, whole_file
from simmim.tasks.pretraining import Pretraining
from simmim.training.callbacks import NonFiniteSteps, Progress, Reconstructions, UnreadableImages, ValidationOnResume
from simmim.training.checkpoint import (
    Checkpointing,
    Checkpoints,
    Stopped,
    find_checkpoint,
    refuse_changed_settings,
)
from simmim.training.metrics import MetricsFile
from simmim.training.sharding import ShardedStrategy, gather

log = logging.getLogger(__name__)

NO_MEMORY = "can't allocate memory"
"""What PyTorch says when the memory of the machine is used up."""

LOST_CONTACT = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
"""What gloo and NCCL say when a process is gone."""

WANDB_PATIENCE = 15.0
"""Seconds that Weights & Biases may take to answer when a run begins; it asks twice."""


@dataclass(frozen=True)
class Length:
    """How long a run is, in optimizer steps."""

    images_per_step: int
    steps_per_epoch: int
    total_steps: int
    max_epochs: float

    @property
    def steps_between_validations(self) -> int:
        """An epoch, or the whole of a shorter run."""
        return min(self.steps_per_epoch, self.total_steps)

    def steps(self, epochs: float) -> int:
        """Epochs of the schedule in steps: a run cut or stretched by `trainer.max_steps` keeps its shape."""
        return round(epochs * self.total_steps / self.max_epochs)


def pretrain(config: Config) -> dict[str, Any]:
    """Runs SimMIM pretraining and leaves a run folder.

    Args:
        config: The composed `conf/pretrain.yaml`.

    Returns:
        Final step, validation loss, the trivial predictor's, and their ratio.

    Raises:
        ValueError: If the config contradicts itself or the data cannot be used.
    """
    quieten_libraries()
    with logging_redirect_tqdm(), _explained(config):
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    output_dir, image_size = Path(config["output_dir"]), image_size_of(config)
    checkpoint = find_checkpoint(config["resume"], output_dir)
    task, data, length = build(config)
    if checkpoint is not None:
        refuse_changed_settings(checkpoint, dict(task.hparams))
    elif config["encoder"] is not None:
        for network in filter(None, (task.average, task.network)):
            report = load_encoder_weights(network.encoder, Path(config["encoder"]), image_size=image_size)
        log.info(report)
    output_dir.mkdir(parents=True, exist_ok=True)
    trainer = create_trainer(config, data, length, resumed_step=step_of(checkpoint) if checkpoint else 0)
    if trainer.is_global_zero:  # last: a refused config leaves the run's own
        OmegaConf.save(OmegaConf.create(config), output_dir / "config.yaml")
    log.info(f"run folder {shown(output_dir)}" + (f", continued from {checkpoint.name}" if checkpoint else ""))
    try:
        trainer.fit(task, data, ckpt_path=checkpoint)
        if trainer.global_step < length.total_steps:
            raise Stopped(
                f"stopped at step {trainer.global_step} of {length.total_steps}, saved: the same command with "
                f"name={config['name']} and resume=auto continues"
            )
        if length.total_steps % length.steps_between_validations or "val_loss" not in trainer.callback_metrics:
            trainer.validate(task, data, verbose=False)
    finally:
        if wandb.run is not None:
            wandb.finish()  # else the next job of a sweep would write into this one's run
    encoder, weights = task.best.encoder, gather(task.best.encoder)
    if trainer.is_global_zero:
        statistics = {key: task.hparams[key] for key in ("mean", "std")}
        save_encoder(encoder, output_dir / ENCODER, image_size=image_size, weights=weights, **statistics)
    return _summarise(output_dir, trainer)


@contextmanager
def _explained(config: Config) -> Iterator[None]:
    """Says in one line what the libraries below say in many, and what to do about it."""
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
            raise ValueError(f"out of memory: {_advice(config)} (python -m simmim.plan says more)") from error
        if any(words in text for words in LOST_CONTACT):
            raise ValueError(
                "another process of this run has ended, and its own lines say why: a run continues with resume=auto"
            ) from error
        raise


def _advice(config: Config) -> str:
    try:
        return advice(config)
    except ValueError as error:  # not every run can be planned
        return str(error)
    except (RuntimeError, MemoryError):
        return "too little is left to plan what would fit"


def build(config: Config) -> tuple[Pretraining, MaskedImageData, Length]:
    """The task, the data and the length of a run, all settings checked."""
    check_devices(config)
    torch.set_flush_denormal(True)  # the -100 of the shifted windows makes denormals, which a CPU is slow with
    lightning.seed_everything(config["seed"], verbose=False)
    data_config, image_size = config["data"], image_size_of(config)
    masking = Masking(image_size, model_patch_size=config["model"]["patch_size"], **config["masking"])
    sources = create_sources(data_config, image_size)
    length = run_length(config, len(sources[0]))
    data = MaskedImageData(
        sources,
        masking=masking,
        image_size=image_size,
        num_batches=length.total_steps * accumulation(config),
        on_gpu=on_gpu(config),
        seed=config["seed"],
        **{key: data_config[key] for key in ("crop_scale", "crop_ratio", "batch_size", "num_workers", "timeout")},
    )
    optimizer = dict(config["optimizer"])
    lr = optimizer.pop("base_lr") * length.images_per_step / 512
    ema_decay = optimizer.pop("ema_decay")
    optimizer.pop("clip_grad_norm")  # the trainer's
    schedule = config["schedule"]
    warmup = schedule["warmup_steps"]
    task = Pretraining(
        model={**config["model"], "in_channels": data_config["channels"]},
        objective=config["objective"],
        optimizer={"lr": lr, **optimizer},
        schedule={
            "name": schedule["name"],
            "warmup_steps": length.steps(schedule["warmup_epochs"]) if warmup is None else warmup,
            "total_steps": length.total_steps,
            "final_ratio": schedule["final_ratio"],
            "milestones": [length.steps(epoch) for epoch in schedule["milestone_epochs"]],
        },
        masking=config["masking"],
        image_size=list(image_size),
        mean=_per_channel(data_config, "mean"),
        std=_per_channel(data_config, "std"),
        ema_decay=ema_decay,
        seed=config["seed"],
    )
    task.network.encoder.check_image_size(*image_size)
    task.network.encoder.checkpoint_activations(config["trainer"]["activation_checkpointing"])
    if config["trainer"]["compile"]:
        task.network.encoder.compile_blocks()
    if masking.patch_size % config["objective"]["target_downsampling"]:
        raise ValueError(
            f"objective.target_downsampling={config['objective']['target_downsampling']} must divide "
            f"masking.patch_size={masking.patch_size}"
        )
    _describe(config, task, data, length)
    return task, data, length


def run_length(config: Config, images: int) -> Length:
    """Counts a run over so many training images in optimizer steps."""
    trainer = config["trainer"]
    images_per_step = config["data"]["batch_size"] * accumulation(config) * world_size(config)
    steps_per_epoch = max(1, round(images / images_per_step))
    total_steps = trainer["max_steps"] or round(trainer["max_epochs"] * steps_per_epoch)
    return Length(images_per_step, steps_per_epoch, max(1, total_steps), trainer["max_epochs"])


def create_strategy(config: Config) -> Any:
    """Lightning's strategy that `trainer.strategy` means."""
    settings = config["trainer"]
    if settings["strategy"] == "single":
        return "auto"
    if settings["strategy"] == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True)  # else gradients would be held twice
    bf16 = precision_of(config) == "bf16-mixed"
    return ShardedStrategy(reshard_after_forward=settings["reshard_after_forward"], bf16=bf16)


def create_trainer(config: Config, data: MaskedImageData, length: Length, *, resumed_step: int) -> Trainer:
    """Lightning's trainer with everything that a run writes.

    The run is one long epoch of Lightning's, and validation comes every so many batches: then the step alone says
    where a run stands.
    """
    settings, output_dir = config["trainer"], Path(config["output_dir"])
    accumulate = accumulation(config)
    # Slurm's own way of requeueing would save inside of a signal handler, where processes wait for one another.
    slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
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
        logger=_loggers(config, resumed_step),
        callbacks=[
            UnreadableImages(
                output_dir / "bad_images.txt",
                on_error=config["data"]["on_error"],
                max_fraction=config["data"]["max_bad_fraction"],
            ),
            Progress(
                steps_per_epoch=length.steps_per_epoch,
                images_per_step=length.images_per_step,
                every_n_steps=config["log_every_n_steps"],
            ),
            Reconstructions(
                output_dir / "reconstructions",
                fixed_batch(data.val_samples, config["pictures"]),
                steps_per_epoch=length.steps_per_epoch,
            ),
            ValidationOnResume(every_n_steps=length.steps_between_validations),
            NonFiniteSteps(limit=settings["max_nonfinite_steps"]),
            Checkpoints(
                output_dir,
                every_n_steps=min(config["checkpoint"]["every_n_steps"], length.steps_per_epoch),
                keep=config["checkpoint"]["keep"],
                on_error=config["checkpoint"]["on_error"],
            ),
        ],
        plugins=[Checkpointing(), *slurm],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=output_dir,
    )


def _loggers(config: Config, resumed_step: int) -> list[Logger]:
    output_dir = Path(config["output_dir"])
    loggers: list[Logger] = [MetricsFile(output_dir / "metrics.csv", until_step=resumed_step)]
    if config["logger"]["name"] == "wandb":
        mode = config["logger"]["mode"]
        if mode not in ("offline", "online"):
            raise ValueError(f"logger.mode={mode} is unknown: choose offline or online")
        loggers.append(_wandb_logger(config, resumed_step))
    return loggers


def _wandb_logger(config: Config, resumed_step: int) -> WandbLogger:
    """A resumed run goes on in the run of Weights & Biases that it began, whose id the run folder keeps."""
    output_dir, offline = Path(config["output_dir"]), config["logger"]["mode"] == "offline"
    identity = output_dir / "wandb" / "id"
    known = identity.read_text().strip() if resumed_step and identity.is_file() else None
    logger = WandbLogger(
        name=str(config["name"]),
        project=config["logger"]["project"],
        save_dir=output_dir,
        offline=offline,
        id=known,
        settings=wandb.Settings(init_timeout=WANDB_PATIENCE),
    )
    try:
        if not (offline or wandb.login(prompt=False, verify=False)):
            raise wandb.Error("there is no API key: `wandb login` asks for it once")
        logger.log_hyperparams(config)  # the first process begins the run
    except wandb.Error as error:
        raise ValueError(
            f"logger.mode=online: Weights & Biases cannot be reached ({' '.join(str(error).split())}): give "
            "logger.mode=offline, and upload later with `wandb sync`"
        ) from error
    if known is None and logger.version is not None:
        with whole_file(identity) as temporary:
            temporary.write_text(str(logger.version))
    return logger


def _per_channel(data: Config, key: str) -> list[float]:
    channels: int = data["channels"]
    values: list[float] = [data[key]] if isinstance(data[key], int | float) else data[key]
    if len(values) not in (1, channels):
        raise ValueError(
            f"data.{key}={values} has {len(values)} values for data.channels={channels}: give one, or one a channel"
        )
    return values * (channels // len(values))


def _describe(config: Config, task: Pretraining, data: MaskedImageData, length: Length) -> None:
    parameters = sum(parameter.numel() for parameter in task.network.encoder.parameters())
    hidden = data.train_samples.masking
    log.info(f"encoder    {config['model']['name']}, {parameters / 1e6:.1f} M parameters")
    log.info(f"data       {len(data.train_samples)} images to train on, {len(data.val_samples)} to validate on")
    log.info(
        f"masking    {hidden.ratio:.0%} of {hidden.grid[0]}x{hidden.grid[1]} cells of {hidden.patch_size} px, "
        f"{hidden.strategy}"
    )
    log.info(
        f"length     {length.total_steps} steps of {length.images_per_step} images, {length.steps_per_epoch} an epoch"
    )
    log.info(
        f"lr         {config['optimizer']['base_lr']:g} base x {length.images_per_step} images a step / 512 = "
        f"{task.optimizer['lr']:.3g} after {task.schedule['warmup_steps']} steps of warm-up"
    )
    if task.schedule["warmup_steps"] >= length.total_steps:
        log.warning("the warm-up takes the whole run: give a smaller schedule.warmup_epochs")


def _summarise(output_dir: Path, trainer: Trainer) -> dict[str, Any]:
    metrics = trainer.callback_metrics
    loss, trivial = float(metrics["val_loss"]), float(metrics["val_loss_visible_mean"])
    log.info(
        f"validation loss {loss:.4f}: {loss / trivial:.2f} of the {trivial:.4f} that the mean of the visible pixels "
        "gets (1.00 has learnt nothing, lower is better)"
    )
    if (unreadable := output_dir / "bad_images.txt").exists():
        log.info(f"unreadable {len(unreadable.read_bytes().splitlines())} images, replaced: {shown(unreadable)}")
    folder = shown(output_dir)
    if pictures := sorted((output_dir / "reconstructions").glob("*.png")):
        log.info(f"picture    {shown(pictures[-1])}")
    log.info(f"done: {folder}; next: python -m simmim.reconstruct encoder={folder} images=<file or folder>")
    return {
        "step": trainer.global_step,
        "val_loss": loss,
        "val_loss_visible_mean": trivial,
        "ratio": loss / trivial,
    }


if __name__ == "__main__":
    command(pretrain)()
