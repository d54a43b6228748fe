"""`python -m simmim.finetune`: trains an encoder, pretrained or not, to classify images.

What is not given is the encoder's own: its architecture, image size, windows, and pixel statistics.
`conf/finetune.yaml` lists all keys, `stage=…` sets what changes from one stage of training to the next.
"""

import logging
from pathlib import Path
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

from simmim.command import command, quieten_libraries
from simmim.config import Config, image_size_of
from simmim.data.labels import check_labels, check_learnable, match_labels, take_fraction
from simmim.data.module import ImageData, create_sources
from simmim.data.transforms import centre_transform, finetuning_transform, per_channel
from simmim.devices import accumulation, on_gpu
from simmim.encoders.encoder_files import read_encoder_weights, save_encoder
from simmim.length import Length, run_length
from simmim.run import (
    describe_training,
    describe_unreadable,
    explained,
    prepare_torch,
    train,
    training_settings,
)
from simmim.run_folder import ENCODER, shown
from simmim.stages import fill_in, load_classifier
from simmim.tasks.classification import Classification
from simmim.training.callbacks import ClassReport
from simmim.training.checkpoint import find_checkpoint, refuse_changed_settings
from simmim.training.sharding import gather

log = logging.getLogger(__name__)

PREPROCESSING = ("label_fraction", "crop_scale", "crop_ratio", "test_crop", "interpolation")
"""What becomes of an image before it is augmented, and which ones there are."""

LESS_MEMORY = (
    "half of data.batch_size (give data.global_batch_size, and each step keeps its images), "
    "trainer.activation_checkpointing=all, model.attention=sequential, or more devices with trainer=fsdp"
)


def finetune(config: Config) -> dict[str, Any]:
    """Trains a classifier, from an encoder or from scratch, and leaves a run folder.

    Args:
        config: The composed `conf/finetune.yaml`.

    Returns:
        Final step, validation loss, top-1 and top-5 accuracy.

    Raises:
        ValueError: If the config contradicts itself or the encoder, or the data cannot be used.
    """
    quieten_libraries()
    with logging_redirect_tqdm(), explained(lambda: f"it takes less with {LESS_MEMORY}"):
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    output_dir = Path(config["output_dir"])
    checkpoint = find_checkpoint(config["resume"], output_dir)
    known = None if config["encoder"] is None else read_encoder_weights(Path(config["encoder"]))[1]
    config = fill_in(config, known)
    task, data, length = build(config)
    if checkpoint is not None:
        if length.total_steps == 0:
            raise ValueError(
                f"trainer.max_epochs=0 evaluates an encoder=… alone, and resume={config['resume']} continues a "
                "training: give resume=null and another name=…"
            )
        refuse_changed_settings(checkpoint, dict(task.hparams))
    elif known is not None:
        for said in load_classifier(task, Path(config["encoder"]), known, image_size=image_size_of(config)):
            log.info(said)
    if length.total_steps == 0 and (known is None or sorted(known["classes"] or ()) != sorted(task.classes)):
        raise ValueError("trainer.max_epochs=0 evaluates alone: give an encoder=… with a classifier of these classes")
    trainer = train("finetune", config, task, data, length, checkpoint=checkpoint, callbacks=[ClassReport(output_dir)])
    encoder, weights, head = task.best.encoder, gather(task.best.encoder), gather(task.best.head)
    if trainer.is_global_zero:
        save_encoder(
            encoder,
            output_dir / ENCODER,
            image_size=image_size_of(config),
            weights=weights,
            head=head,
            **{key: task.hparams[key] for key in ("classes", "mean", "std", "max_value")},
            **{key: config["data"][key] for key in ("test_crop", "interpolation")},
        )
    metrics = {key: float(trainer.callback_metrics[key]) for key in ("val_loss", "val_top1", "val_top5")}
    log.info(f"validated  {task.describe(metrics)}, of {len(data.val_samples)} images")
    describe_unreadable(output_dir)
    folder = shown(output_dir)
    log.info(f"classes    {folder}/classes.csv" + (f", {folder}/confusion.png" if task.confusion is not None else ""))
    images = "" if config["data"]["source"] == "synthetic" else f" data={config['data']['source']} data.root=<images>"
    log.info(f"done: {folder}; next: python -m simmim.evaluate encoder={folder}{images}")
    return {"step": trainer.global_step, **metrics}


def build(config: Config) -> tuple[Classification, ImageData, Length]:
    """The task, the data and the length of a run, all settings checked."""
    prepare_torch(config)
    data_config, image_size = config["data"], image_size_of(config)
    train_images, val_images = create_sources(data_config, image_size)
    check_learnable(train_images, key="data.root")
    classes = train_images.classes
    check_labels(val_images, key="data.val_root")
    val_images, matched = match_labels(val_images, classes, key="data.val_root")
    if matched:
        log.info(f"validation {matched}")
    train_images = take_fraction(train_images, data_config["label_fraction"])
    length = run_length(config, len(train_images))
    statistics: dict[str, Any] = dict(per_channel(data_config))
    augmentation = dict(config["augmentation"])
    mixing = {key: augmentation.pop(key) for key in ("mixup", "cutmix", "switch")}
    crop = {key: data_config[key] for key in ("crop_scale", "crop_ratio", "interpolation")}
    data = ImageData(
        (train_images, val_images),
        transforms=(
            finetuning_transform(image_size, **crop, **augmentation, **statistics),
            centre_transform(image_size, share=data_config["test_crop"], interpolation=data_config["interpolation"]),
        ),
        masking=None,
        num_batches=length.total_steps * accumulation(config),
        on_gpu=on_gpu(config),
        seed=config["seed"],
        **{key: data_config[key] for key in ("batch_size", "num_workers", "timeout")},
    )
    task = Classification(
        model={**config["model"], "in_channels": data_config["channels"]},
        classes=classes,
        label_smoothing=config["label_smoothing"],
        mixing=mixing,
        image_size=list(image_size),
        preprocessing={**{key: data_config[key] for key in PREPROCESSING}, **augmentation},
        **statistics,
        **training_settings(config, length),
    )
    task.network.encoder.check_image_size(*image_size)
    task.network.encoder.checkpoint_activations(config["trainer"]["activation_checkpointing"])
    if config["trainer"]["compile"]:
        task.network.encoder.compile_blocks()
    _describe(config, task, data, length)
    return task, data, length


def _describe(config: Config, task: Classification, data: ImageData, length: Length) -> None:
    encoder, size = task.network.encoder, image_size_of(config)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    windows = ", ".join(f"{height}x{width}" for height, width in encoder.windows(*size))
    log.info(f"encoder    {config['model']['name']}, {parameters / 1e6:.1f} M parameters")
    log.info(f"images     {size[0]}x{size[1]} px, windows of {windows} tokens")
    log.info(
        f"data       {len(data.train_samples)} images to train on, {len(data.val_samples)} to validate on, "
        f"{len(task.classes)} classes"
    )
    describe_training(config, task, length)


if __name__ == "__main__":
    command(finetune, objective="val_loss")()
