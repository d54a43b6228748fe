"""`python -m simmim.evaluate`: what a model recognises, at any size of image; or what its frozen features tell.

Without `probe`, the classifier of a fine-tuned model is counted on all images of `data.root`. With one, an encoder
is judged by what its features give away, on images that have labels. Mind that kNN and linear probes rank models of
masked images below contrastive ones that are no better once they are fine-tuned (SimMIM, arXiv 2111.09886; MAE,
arXiv 2111.06377, section 4.3): a short fine-tuning on few labels is the number to decide by.
"""

import json
import logging
from pathlib import Path
from typing import Any

from lightning import Trainer
from tqdm.contrib.logging import logging_redirect_tqdm

from simmim.command import Config, command, image_size_of, on_gpu, precision_of, quieten_libraries
from simmim.data.labels import check_labels, match_labels
from simmim.data.module import ImageData, create_source
from simmim.data.transforms import centre_transform, per_channel
from simmim.encoders.weights import read_encoder_weights
from simmim.run import describe_unreadable, explained, prepare_torch
from simmim.run_folder import shown, whole_file
from simmim.stages import fill_in, load_classifier
from simmim.tasks.classification import Classification
from simmim.training.callbacks import ClassReport, UnreadableImages

log = logging.getLogger(__name__)


def evaluate(config: Config) -> dict[str, Any]:
    """Counts what a classifier recognises, and leaves `result.json`, `classes.csv` and `confusion.png`.

    Args:
        config: The composed `conf/evaluate.yaml`.

    Returns:
        Images, loss, top-1 and top-5 accuracy.

    Raises:
        ValueError: If the file holds no classifier, or the images are of other classes.
    """
    quieten_libraries()
    with logging_redirect_tqdm(), explained(lambda: "it takes less with a smaller data.batch_size"):
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    path, output_dir = Path(config["encoder"]), Path(config["output_dir"])
    known = read_encoder_weights(path)[1]
    if known["head"] is None:
        raise ValueError(f"encoder={path} holds no classifier: fine-tune it first, or give probe=knn or probe=linear")
    config = fill_in(config, known)
    task, data, matched = build(config, known["classes"])
    for report in filter(None, (*load_classifier(task, path, known, image_size=image_size_of(config)), matched)):
        log.info(report)
    output_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        accelerator=config["trainer"]["accelerator"],
        devices=1,
        precision=precision_of(config),
        logger=False,
        callbacks=[
            ClassReport(output_dir),
            UnreadableImages(
                output_dir / "bad_images.txt",
                on_error=config["data"]["on_error"],
                max_fraction=config["data"]["max_bad_fraction"],
            ),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=output_dir,
    )
    trainer.validate(task, data, verbose=False)
    metrics = {key: float(trainer.callback_metrics[f"val_{key}"]) for key in ("loss", "top1", "top5")}
    describe_unreadable(output_dir)
    return _report(config, task, {"images": len(data.val_samples), **metrics}, output_dir)


def build(config: Config, classes: list[str]) -> tuple[Classification, ImageData, str]:
    """The task, the images, and how their labels were matched with the classes; all settings checked."""
    prepare_torch(config)
    image_size, data_config = image_size_of(config), config["data"]
    source = create_source(data_config, image_size)
    check_labels(source, key="data.root")
    source, matched = match_labels(source, classes, key="data.root")
    statistics: dict[str, Any] = dict(per_channel(data_config))
    transform = centre_transform(image_size, share=data_config["test_crop"], interpolation=data_config["interpolation"])
    data = ImageData(
        (source, source),
        transforms=(transform, transform),
        masking=None,
        num_batches=0,
        on_gpu=on_gpu(config),
        seed=config["seed"],
        **{key: data_config[key] for key in ("batch_size", "num_workers", "timeout")},
    )
    task = Classification(
        model={**config["model"], "in_channels": data_config["channels"]},
        classes=classes,
        image_size=list(image_size),
        label_smoothing=0,
        mixing={"mixup": 0, "cutmix": 0, "switch": 0},
        optimizer={},
        schedule={},
        ema_decay=None,
        seed=config["seed"],
        **statistics,
    )
    task.network.encoder.check_image_size(*image_size)
    return task, data, matched


def _report(config: Config, task: Classification, result: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    size = image_size_of(config)
    windows = task.network.encoder.windows(*size)
    with whole_file(output_dir / "result.json") as temporary:
        facts = {"encoder": config["encoder"], "image_size": size, "windows": windows}
        temporary.write_text(json.dumps({**facts, **result}, indent=2) + "\n")
    shape = f"{size[0]}x{size[1]} px, windows of " + ", ".join(f"{height}x{width}" for height, width in windows)
    top5 = f", top-5 {result['top5']:.2%}" if len(task.classes) > 5 else ""
    log.info(f"top-1 {result['top1']:.2%}{top5} of {result['images']} images at {shape}")
    confusion = "" if task.confusion is None else ", confusion.png"
    log.info(f"done: {shown(output_dir)}/result.json, classes.csv{confusion}")
    return result


if __name__ == "__main__":
    command(evaluate)()
