"""`python -m simmim.evaluate`: what a model recognises, at any size of image; or what its frozen features tell.

Without `probe`, the classifier of a fine-tuned model is counted on all images of `data.root`. With one, an encoder
is judged by what its features give away: labels of `data.root` are learnt, those of `data.val_root` told. Mind that
kNN and linear probes rank models of masked images below contrastive ones that are no better once they are fine-tuned
(SimMIM, arXiv 2111.09886; MAE, arXiv 2111.06377, section 4.3): a short fine-tuning on few labels
(`python -m simmim.finetune experiment=low_label`) is the number to decide by.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from simmim.command import command, quieten_libraries
from simmim.config import Config, image_size_of
from simmim.data.labels import check_labels, check_learnable, match_labels, take_fraction
from simmim.data.module import ImageData, ImageSource, create_source, create_sources
from simmim.data.transforms import centre_transform, per_channel
from simmim.devices import on_gpu, precision_of
from simmim.embedding import Embedder, create_embedder, crops_of, features_of, list_unreadable
from simmim.encoders import Encoder
from simmim.encoders.encoder_files import read_encoder_weights
from simmim.probes import HELD_OUT, OPTIMIZERS, feature_diagnostics, knn_accuracy, linear_probe
from simmim.run import describe_unreadable, explained, prepare_torch
from simmim.run_folder import UNREADABLE, shown, whole_file
from simmim.stages import fill_in, load_classifier, open_encoder
from simmim.tasks.classification import Classification
from simmim.training.callbacks import ClassReport, UnreadableImages

log = logging.getLogger(__name__)

LEAST = 3
"""So many training images a linear probe needs: some to learn from, one to choose by."""

Features = tuple[Tensor, Tensor]
"""Of images: (n, C), and their labels (n)."""

LISTS = (("knn", "k"), ("linear", "lrs"), ("linear", "optimizers"))
"""Settings of which there must be one at least."""


def evaluate(config: Config) -> dict[str, Any]:
    """Counts what a classifier recognises, and leaves `result.json`, `classes.csv` and `confusion.png`.

    With a probe: learns to tell classes by frozen features, and leaves `result.json` alone.

    Args:
        config: The composed `conf/evaluate.yaml`.

    Returns:
        Images, loss, top-1 and top-5 accuracy; with a probe what `result.json` holds.

    Raises:
        ValueError: If the file holds no classifier and there is no probe, or the images are of other classes.
    """
    quieten_libraries()
    with logging_redirect_tqdm(), explained(lambda: "it takes less with a smaller data.batch_size"):
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    prepare_torch(config)
    path, output_dir = Path(config["encoder"]), Path(config["output_dir"])
    if config["probe"] == "finetune":
        raise ValueError(
            "probe=finetune is a run of its own, with checkpoints: python -m simmim.finetune experiment=low_label "
            f"encoder={path} data=… data.root=… data.val_root=…"
        )
    known = read_encoder_weights(path)[1]
    if config["probe"] is not None:
        return _probe(fill_in(config, known))
    if known["head"] is None:
        raise ValueError(f"encoder={path} holds no classifier: fine-tune it first, or give probe=knn or probe=linear")
    if config["data"].get("val_root") is not None or config["data"]["label_fraction"] != 1:
        raise ValueError(
            "data.val_root and data.label_fraction are for probes: without one, all images of data.root are counted"
        )
    config = fill_in(config, known)
    task, data, matched = build(config, known["classes"])
    for report in filter(None, (*load_classifier(task, path, known, image_size=image_size_of(config)), matched)):
        log.info(report)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / UNREADABLE).unlink(missing_ok=True)
    trainer = Trainer(
        accelerator=config["trainer"]["accelerator"],
        devices=1,
        precision=precision_of(config),
        logger=False,
        callbacks=[
            ClassReport(output_dir),
            UnreadableImages(
                output_dir / UNREADABLE,
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
    return _report(config, task, {"images": int(task.hits_and_images()[1].sum()), **metrics}, output_dir)


def build(config: Config, classes: list[str]) -> tuple[Classification, ImageData, str]:
    """The task, the images, and how their labels were matched with the classes; all settings checked."""
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
        preprocessing={},
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
    _save(config, task.network.encoder, result)
    top5 = f", top-5 {result['top5']:.2%}" if len(task.classes) > 5 else ""
    shape = _shape(config, task.network.encoder)
    log.info(f"top-1 {result['top1']:.2%}{top5} of {result['images']} images at {shape}")
    confusion = "" if task.confusion is None else ", confusion.png"
    log.info(f"done: {shown(output_dir)}/result.json, classes.csv{confusion}")
    return result


def _save(config: Config, encoder: Encoder, result: dict[str, Any]) -> None:
    size = image_size_of(config)
    facts = {"encoder": config["encoder"], "image_size": size, "windows": encoder.windows(*size)}
    with whole_file(Path(config["output_dir"]) / "result.json") as temporary:
        temporary.write_text(json.dumps({**facts, **result}, indent=2) + "\n")


def _shape(config: Config, encoder: Encoder) -> str:
    height, width = image_size_of(config)
    windows = ", ".join(f"{rows}x{columns}" for rows, columns in encoder.windows(height, width))
    return f"{height}x{width} px, windows of {windows}"


def _probe(config: Config) -> dict[str, Any]:
    """Judges an encoder by a filled-in config."""
    data_config, output_dir = config["data"], Path(config["output_dir"])
    _check_probe(config)
    train, test = create_sources(data_config, image_size_of(config))
    check_learnable(train, key="data.root")
    classes = train.classes
    check_labels(test, key="data.val_root")
    test, matched = match_labels(test, classes, key="data.val_root")
    train = take_fraction(train, data_config["label_fraction"])
    _check_enough(config, len(train))
    embedder = create_embedder(config, open_encoder(config), pooled=True)
    log.info(f"data       {len(train):,} images to learn from, {len(test):,} to test on, {len(classes)} classes")
    if matched:
        log.info(matched)
    (learnt, lost), (told, lost_too) = (_embed(source, embedder, config) for source in (train, test))
    list_unreadable(output_dir / UNREADABLE, lost + lost_too)
    _check_enough(config, len(learnt[0]))
    result = {"probe": config["probe"], "train_images": len(learnt[0]), "images": len(told[0]), "classes": len(classes)}
    result |= PROBES[config["probe"]](config, learnt, told, len(classes))
    result["features"] = _diagnose(learnt[0])
    output_dir.mkdir(parents=True, exist_ok=True)
    _save(config, embedder.encoder, result)
    log.info(f"done: {shown(output_dir)}/result.json")
    return result


def _check_probe(config: Config) -> None:
    for key, value, words in (
        ("probe", [config["probe"]], tuple(PROBES)),
        ("data.on_error", [config["data"]["on_error"]], ("skip", "raise")),
        ("linear.optimizers", config["linear"]["optimizers"], tuple(OPTIMIZERS)),
    ):
        if unknown := [word for word in value if word not in words]:
            raise ValueError(f"{key}={unknown[0]} is unknown: choose {' or '.join(words)}")
    if empty := [f"{section}.{key}" for section, key in LISTS if not config[section][key]]:
        raise ValueError(f"{empty[0]}=[] must hold something")


def _check_enough(config: Config, images: int) -> None:
    if config["probe"] == "knn" and (largest := max(config["knn"]["k"])) > images:
        raise ValueError(f"knn.k={largest} neighbours of {images} training images: give fewer, or more images")
    if images < LEAST:
        raise ValueError(f"a probe needs {LEAST} training images, and has {images}: give more in data.root")


def _embed(source: ImageSource, embedder: Embedder, config: Config) -> tuple[Features, list[tuple[str, str]]]:
    """The readable images, on the device, and the names of the others with reasons.

    Raises:
        ValueError: If `data.on_error` or `data.max_bad_fraction` says so, or no image can be read.
    """
    data_config, size = config["data"], config["data"]["batch_size"]
    embedder.batch_size = size
    transform = centre_transform(
        embedder.image_size, share=data_config["test_crop"], interpolation=data_config["interpolation"]
    )
    batches = [range(at, min(at + size, len(source))) for at in range(0, len(source), size)]
    loader = crops_of(source, batches, config, transform=transform)
    with logging_redirect_tqdm(), tqdm(total=len(source), unit=" images") as bar:
        readable = loader if data_config["on_error"] == "skip" else _strictly(loader, source)
        positions, features, unreadable = features_of(readable, embedder, source, bar)
    share = data_config["max_bad_fraction"]
    if len(unreadable) > share * len(source) or not positions:
        raise ValueError(
            f"{len(unreadable)} of {len(source)} images could not be read, more than data.max_bad_fraction={share}: "
            f"mend or remove them, the first being {source.name(unreadable[0][0])}"
        )
    labels = torch.tensor([source.label(index) for index in positions])
    lost = [(source.name(index), reason) for index, reason in unreadable]
    return (features.to(embedder.device), labels.to(embedder.device)), lost


def _strictly(batches: Iterable[Any], source: ImageSource) -> Iterator[Any]:
    for batch in batches:
        for index, reason in batch[-1]:
            raise ValueError(
                f"{source.name(index)} cannot be read ({reason}): mend or remove it, or set data.on_error=skip"
            )
        yield batch


def _neighbours(config: Config, train: Features, test: Features, classes: int) -> dict[str, Any]:
    accuracies = knn_accuracy(*train, *test, classes=classes, **config["knn"])
    for k, accuracy in accuracies.items():
        log.info(f"kNN        top-1 {accuracy:.2%} by {k} neighbours")
    return {"knn": accuracies}


def _linear(config: Config, train: Features, test: Features, classes: int) -> dict[str, Any]:
    probe = linear_probe(*train, *test, classes=classes, seed=config["seed"], **config["linear"])
    heads = []
    for (name, lr), accuracy in probe.accuracies.items():
        held_out = probe.held_out[name, lr]
        heads.append({"optimizer": name, "lr": lr, "top1": accuracy, "held_out_top1": held_out})
        log.info(f"           top-1 {accuracy:.2%} by {name} with lr {lr:g}, {held_out:.2%} held out")
    name, lr = probe.best
    log.info(
        f"linear     top-1 {probe.accuracy:.2%} by {name} with lr {lr:g}, the best on the {HELD_OUT:.0%} of the "
        "training images that were held out"
    )
    return {"top1": probe.accuracy, "best": {"optimizer": name, "lr": lr}, "heads": heads}


PROBES = {"knn": _neighbours, "linear": _linear}


def _diagnose(features: Tensor) -> dict[str, Any]:
    found, channels = feature_diagnostics(features), features.shape[1]
    even = channels**-0.5
    log.info(
        f"features   deviation {found.std:.4f} a channel once normalised: {found.std / even:.0%} of the {even:.4f} "
        f"(1/sqrt({channels})) that they have where they point everywhere alike, 0% where all are one"
    )
    log.info(f"           effective rank {found.effective_rank:.1f} of {channels}")
    return {"channels": channels, "std": found.std, "even_std": even, "effective_rank": found.effective_rank}


if __name__ == "__main__":
    command(evaluate)()
