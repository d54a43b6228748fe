"""`python -m simmim.pretrain`: pretrains an encoder on images without labels.

With no argument: a small Swin Transformer V2 on synthetic images, in about a minute on two CPU cores.
`conf/pretrain.yaml` lists all keys.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from tqdm.contrib.logging import logging_redirect_tqdm

from simmim.command import command, quieten_libraries
from simmim.config import Config, image_size_of
from simmim.data.labels import check_learnable, match_labels
from simmim.data.module import ImageData, create_sources, fixed_batch
from simmim.data.transforms import centre_transform, per_channel, pretraining_transform
from simmim.devices import accumulation, on_gpu
from simmim.encoders import architecture_of
from simmim.encoders.encoder_files import read_encoder_weights, save_encoder, trained_windows
from simmim.encoders.weights import check_architecture, check_said, load_encoder_weights
from simmim.length import Length, run_length
from simmim.masking import Masking
from simmim.pictures import choose_channels
from simmim.plan import advice
from simmim.run import (
    describe_training,
    describe_unreadable,
    explained,
    prepare_torch,
    train,
    training_settings,
)
from simmim.run_folder import ENCODER, shown
from simmim.tasks.pretraining import Pretraining
from simmim.training.callbacks import Probe, Reconstructions
from simmim.training.checkpoint import find_checkpoint, refuse_changed_settings
from simmim.training.sharding import gather

log = logging.getLogger(__name__)


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
    with logging_redirect_tqdm(), explained(lambda: _advice(config)):
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    output_dir, image_size = Path(config["output_dir"]), image_size_of(config)
    checkpoint = find_checkpoint(config["resume"], output_dir)
    if config["encoder"] is not None and config["model"]["pretrained_window_size"] is None:
        known = read_encoder_weights(Path(config["encoder"]))[1]
        check_architecture(Path(config["encoder"]), known, architecture_of(config["model"]["name"]))
        if "pretrained_window_size" in known["config"]:
            check_said(Path(config["encoder"]), known, {"model.pretrained_window_size": None})
            config = {**config, "model": {**config["model"], "pretrained_window_size": trained_windows(known)}}
    task, data, length = build(config)
    if checkpoint is not None:
        refuse_changed_settings(checkpoint, dict(task.hparams))
    elif config["encoder"] is not None:
        for network in filter(None, (task.average, task.network)):
            report = load_encoder_weights(network.encoder, Path(config["encoder"]), image_size=image_size)
        log.info(report)
    pictures = Reconstructions(
        output_dir / "reconstructions",
        fixed_batch(data.val_samples, config["pictures"]),
        steps_per_epoch=length.steps_per_epoch,
        channels=config["picture_channels"],
    )
    callbacks = [pictures, *_probes(config, data, length)]
    trainer = train("pretrain", config, task, data, length, checkpoint=checkpoint, callbacks=callbacks)
    encoder, weights = task.best.encoder, gather(task.best.encoder)
    if trainer.is_global_zero:
        statistics = {key: task.hparams[key] for key in ("mean", "std", "max_value")}
        save_encoder(encoder, output_dir / ENCODER, image_size=image_size, weights=weights, **statistics)
    return _summarise(output_dir, trainer)


def _probes(config: Config, data: ImageData, length: Length) -> list[Callback]:
    """What `probe_every_n_epochs` asks for: the images of the run as validation crops them, nothing hidden."""
    epochs = config["probe_every_n_epochs"]
    if epochs is None:
        return []
    crop, source = data.val_samples.transform, data.train_samples.source
    try:
        check_learnable(source, key="data.root")
        val, _ = match_labels(data.val_samples.source, source.classes, key="data.val_root")
    except ValueError as error:
        raise ValueError(f"probe_every_n_epochs={epochs} needs labels, or give null: {error}") from error
    samples = (replace(data.train_samples, source=images, transform=crop, masking=None) for images in (source, val))
    return [Probe(*samples, classes=len(source.classes), every_n_steps=epochs * length.steps_per_epoch)]


def _advice(config: Config) -> str:
    try:
        said = advice(config)
    except ValueError as error:  # not every run can be planned
        said = str(error)
    except (RuntimeError, MemoryError):
        said = "too little is left to plan what would fit"
    return f"{said} (python -m simmim.plan says more)"


def build(config: Config) -> tuple[Pretraining, ImageData, Length]:
    """The task, the data and the length of a run, all settings checked."""
    prepare_torch(config)
    data_config, image_size = config["data"], image_size_of(config)
    masking = Masking(image_size, model_patch_size=config["model"]["patch_size"], **config["masking"])
    sources = create_sources(data_config, image_size)
    length = run_length(config, len(sources[0]))
    crop = {key: data_config[key] for key in ("crop_scale", "crop_ratio")}
    data = ImageData(
        sources,
        transforms=(pretraining_transform(image_size, **crop), centre_transform(image_size)),
        masking=masking,
        num_batches=length.total_steps * accumulation(config),
        on_gpu=on_gpu(config),
        seed=config["seed"],
        **{key: data_config[key] for key in ("batch_size", "num_workers", "timeout")},
    )
    task = Pretraining(
        model={**config["model"], "in_channels": data_config["channels"]},
        objective=config["objective"],
        masking=config["masking"],
        image_size=list(image_size),
        **per_channel(data_config),
        **training_settings(config, length),
    )
    choose_channels(data_config["channels"], config["picture_channels"])  # or says which there are
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


def _describe(config: Config, task: Pretraining, data: ImageData, length: Length) -> None:
    parameters = sum(parameter.numel() for parameter in task.network.encoder.parameters())
    hidden = data.train_samples.masking
    assert hidden is not None
    log.info(f"encoder    {config['model']['name']}, {parameters / 1e6:.1f} M parameters")
    log.info(f"data       {len(data.train_samples)} images to train on, {len(data.val_samples)} to validate on")
    log.info(
        f"masking    {hidden.ratio:.0%} of {hidden.grid[0]}x{hidden.grid[1]} cells of {hidden.patch_size} px, "
        f"{hidden.strategy}"
    )
    describe_training(config, task, length)


def _summarise(output_dir: Path, trainer: Trainer) -> dict[str, Any]:
    metrics = trainer.callback_metrics
    loss, trivial = float(metrics["val_loss"]), float(metrics["val_loss_visible_mean"])
    log.info(
        f"validation loss {loss:.4f}: {loss / trivial:.2f} of the {trivial:.4f} that the mean of the visible pixels "
        "gets (1.00 has learnt nothing, lower is better)"
    )
    describe_unreadable(output_dir)
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
    command(pretrain, objective="val_loss")()
