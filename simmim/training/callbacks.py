"""What a run says and draws while it trains, and when it stops itself."""

import csv
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from tqdm import tqdm

from simmim.pictures import draw_confusion, draw_panels
from simmim.probes import knn_accuracy
from simmim.run_folder import append, shown, whole_file
from simmim.training.ranks import rows_of_all_ranks, total_over_ranks
from simmim.training.tracker import Tracker

log = logging.getLogger(__name__)

NEIGHBOURS = 20
"""Of kNN in a probe."""

TEMPERATURE = 0.07
"""Of their votes."""

PROBED = 5000
"""So many images of each set a probe looks at, at most."""


class Progress(Callback):
    """A bar with loss, learning rate, images a second and time left; a line in the log at each validation.

    Args:
        steps_per_epoch: Optimizer steps that count as an epoch.
        images_per_step: Images of a global batch.
        every_n_steps: Optimizer steps between two readings of the loss, each of which waits for the device.
    """

    def __init__(self, *, steps_per_epoch: int, images_per_step: int, every_n_steps: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.images_per_step = images_per_step
        self.every_n_steps = every_n_steps
        self.bar: tqdm[Any] | None = None
        self.started: float | None = None
        self.steps_since = 0
        self.images_per_second = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the bar where the run stands; without a terminal there is none."""
        self.bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            unit="step",
            dynamic_ncols=True,
            disable=None if trainer.is_global_zero else True,
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock behind a validation, so that it measures training alone."""
        if self.started is None:
            self.started, self.steps_since = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar after each optimizer step."""
        assert self.bar is not None
        assert self.started is not None
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.steps_since += 1
        self.images_per_second = self.steps_since * self.images_per_step / (time.perf_counter() - self.started)
        pl_module.log("images_per_second", self.images_per_second)
        if not self.bar.disable and trainer.global_step % self.every_n_steps == 0:
            loss = float(trainer.callback_metrics["train_loss"])
            speed = f"{self.images_per_second:.3g} images/s"
            self.bar.set_description(f"epoch {trainer.global_step / self.steps_per_epoch:.1f}", refresh=False)
            self.bar.set_postfix_str(f"loss {loss:.3f}, lr {_lr(trainer):.1e}, {speed}", refresh=False)
        self.bar.update()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Logs where the run stands, and what the task says of it."""
        metrics = trainer.callback_metrics
        train = f"train {float(metrics['train_loss']):.4f}, " if "train_loss" in metrics else ""
        speed = f", {self.images_per_second:.3g} images/s" if self.steps_since else ""
        log.info(
            f"epoch {trainer.global_step / self.steps_per_epoch:.1f}, step {trainer.global_step}: {train}"
            f"{pl_module.describe(metrics)}{speed}"
        )
        self.started = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()


class Reconstructions(Callback):
    """Draws `epoch_<n>.png` of the same validation images with the same masks after each validation.

    Args:
        folder: Where to.
        batch: The images and masks to show, from `simmim.data.module.fixed_batch`.
        steps_per_epoch: Optimizer steps that count as an epoch.
        channels: Those that are shown; None for the usual ones.
    """

    def __init__(
        self, folder: Path, batch: dict[str, Any], *, steps_per_epoch: int, channels: list[int] | None = None
    ) -> None:
        self.folder = folder
        self.channels = channels
        self.batch = batch
        self.steps_per_epoch = steps_per_epoch

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Reconstructs, draws, and hands the picture to the loggers."""
        images, mask = (self.batch[key].to(pl_module.device) for key in ("image", "mask"))
        with trainer.precision_plugin.forward_context():
            panels = pl_module.panels(images, mask, self.channels)
        path = self.folder / f"epoch_{math.ceil(trainer.global_step / self.steps_per_epoch):04d}.png"
        masking = pl_module.hparams["masking"]
        caption = pl_module.caption(ratio=masking["ratio"], patch_size=masking["patch_size"], channels=self.channels)
        if not trainer.is_global_zero:
            return
        try:
            draw_panels(panels, path, caption=f"step {trainer.global_step}: {caption}")
        except OSError as error:
            log.warning(f"{shown(path)} cannot be written ({error.strerror or error}): the run goes on without it")
            return
        for logger in trainer.loggers:
            if isinstance(logger, Tracker):
                logger.log_picture("reconstructions", path, step=trainer.global_step)


class Probe(Callback):
    """Tells classes by the encoder's pooled features after the validation of every so many epochs, and at the end.

    The accuracy of nearest neighbours is logged as `val_knn`. It leaves the random numbers as they are: the run is the
    same without it.

    Args:
        train: `ImageSamples` whose labels are learnt from, with the transform of the validation, without masks.
        val: Those that are told, with labels of the same classes.
        classes: Number of classes.
        every_n_steps: Optimizer steps between two probes.

    Raises:
        ValueError: If there are fewer training images than neighbours.
    """

    def __init__(self, train: Any, val: Any, *, classes: int, every_n_steps: int) -> None:
        if len(train) < NEIGHBOURS:
            raise ValueError(
                f"probe_every_n_epochs needs {NEIGHBOURS} training images, and there are {len(train)}: give null"
            )
        self.samples = (train, val)
        self.classes = classes
        self.every_n_steps = every_n_steps

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Embeds images of both sets, and counts."""
        if trainer.global_step % self.every_n_steps and trainer.global_step < trainer.max_steps:
            return
        with torch.random.fork_rng(devices=[]):  # loaders draw a seed, of which nobody makes use
            train, val = (self._embed(samples, trainer, pl_module) for samples in self.samples)
        found = knn_accuracy(*train, *val, k=NEIGHBOURS, temperature=TEMPERATURE, classes=self.classes)
        accuracy = found[NEIGHBOURS]
        pl_module.log("val_knn", accuracy, sync_dist=True)
        log.info(
            f"kNN {accuracy:.1%} of {len(val[0]):,} validation images, by {NEIGHBOURS} neighbours of {len(train[0]):,} "
            "training images"
        )

    def _embed(self, samples: Any, trainer: Any, pl_module: Any) -> tuple[Tensor, Tensor]:
        """Features (N, C) and labels (N), the same in all processes."""
        indices = range(0, len(samples), math.ceil(len(samples) / PROBED))  # of folders, then, all classes
        features, labels = [], []
        for batch in trainer.datamodule.batches_of(samples, indices):
            with trainer.precision_plugin.forward_context():
                found = pl_module.features(batch["image"].to(pl_module.device))
            features.append(found[batch["counts"]].float())
            labels.append(batch["label"][batch["counts"]].to(pl_module.device))
        return rows_of_all_ranks(trainer, torch.cat(features)), rows_of_all_ranks(trainer, torch.cat(labels))


class ClassReport(Callback):
    """Writes, after each validation, how well every class is recognised, and what is taken for what.

    Args:
        folder: Where `classes.csv` and `confusion.png` go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Counts over all processes, writes on the first."""
        hits, images = (values.tolist() for values in pl_module.hits_and_images())
        confusion = None if pl_module.confusion is None else pl_module.confusion.compute().cpu()
        if not trainer.is_global_zero:
            return
        table = self.folder / "classes.csv"
        picture = self.folder / "confusion.png"
        try:
            with (
                whole_file(table) as temporary,
                temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
            ):
                writer = csv.writer(file)
                writer.writerow(["class", "images", "top1"])
                for name, hit, count in zip(pl_module.classes, hits, images, strict=True):
                    writer.writerow([name, int(count), f"{hit / count:.4f}" if count else ""])
            if confusion is not None:
                step = f"step {trainer.global_step}: " if trainer.global_step else ""
                title = f"{step}{pl_module.describe(trainer.callback_metrics)}"
                draw_confusion(confusion, pl_module.classes, picture, title=title)
        except OSError as error:
            log.warning(f"{shown(table)} cannot be written ({error.strerror or error}): the run goes on without it")
            return
        for logger in trainer.loggers:
            if isinstance(logger, Tracker) and confusion is not None:
                logger.log_picture("confusion", picture, step=trainer.global_step)


class ValidationOnResume(Callback):
    """Validates first where a run goes on at a step that ends in a validation: it may have been killed before that.

    Args:
        every_n_steps: Optimizer steps between two validations.
    """

    def __init__(self, *, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does what Lightning does after a training batch."""
        if trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.restarting = False  # the checkpoint was written before it began
            trainer.validating = True
            validation.run()
            trainer.training = True


class UnreadableImages(Callback):
    """What to do about images that cannot be read: list them, count them, and stop when they are too many.

    Args:
        path: `bad_images.txt` of the run: a line for each, its path and the reason.
        on_error: "skip" goes on with the replacement, "raise" stops at the first.
        max_fraction: With "skip", the run stops once more than this share of the samples was unreadable.
        check_after: So many samples are drawn before the share is looked at.
    """

    def __init__(self, path: Path, *, on_error: str, max_fraction: float, check_after: int = 1000) -> None:
        if on_error not in ("skip", "raise"):
            raise ValueError(f"data.on_error={on_error} is unknown: choose skip or raise")
        self.path = path
        self.on_error = on_error
        self.max_fraction = max_fraction
        self.check_after = check_after
        self.listed: set[str] = set()
        self.unwritten = ""
        self.waiting = False
        self.drawn = 0
        self.unreadable = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Looks at a training batch."""
        self._look_at(trainer, batch)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Looks at a validation batch."""
        self._look_at(trainer, batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at an evaluation as a whole: its images may be few."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._check_share()

    def state_dict(self) -> dict[str, Any]:
        """The counts, so that a resumed run goes on with them."""
        return {"drawn": self.drawn, "unreadable": self.unreadable, "listed": sorted(self.listed)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the counts up again."""
        self.drawn, self.unreadable = state_dict["drawn"], state_dict["unreadable"]
        self.listed = set(state_dict["listed"])

    def _look_at(self, trainer: Trainer, batch: dict[str, Any]) -> None:
        for name, reason in batch["unreadable"]:
            if self.on_error == "raise":
                log.error(f"{name} cannot be read ({reason})")
            elif name not in self.listed:
                self.listed.add(name)
                fate = "another image takes its place" if trainer.training else "it is left out"
                log.warning(f"{name} cannot be read ({reason}): {fate}")
                self.unwritten += f"{name}\t{reason}\n"
        if self.unwritten:
            self._write()
        drawn, unreadable = total_over_ranks(trainer, len(batch["image"]), len(batch["unreadable"]))
        self.drawn, self.unreadable = self.drawn + int(drawn), self.unreadable + int(unreadable)
        if unreadable and self.on_error == "raise":
            names = " and ".join(name for name, _ in batch["unreadable"]) or "an image of another process"
            raise ValueError(f"{names} cannot be read: mend or remove it, or set data.on_error=skip")
        if self.drawn >= self.check_after:
            self._check_share()

    def _check_share(self) -> None:
        if self.unreadable > self.max_fraction * self.drawn:
            raise ValueError(
                f"{self.unreadable} of {self.drawn} images could not be read, more than "
                f"data.max_bad_fraction={self.max_fraction}: they are listed in {self.path}"
            )

    def _write(self) -> None:
        try:
            append(self.path, self.unwritten)
        except OSError as error:
            if not self.waiting:
                log.warning(f"{shown(self.path)} cannot be written ({error.strerror}): its lines wait in memory")
            self.waiting = True
        else:
            self.unwritten, self.waiting = "", False


def _lr(trainer: Trainer) -> float:
    return float(max(group["lr"] for group in trainer.optimizers[0].param_groups))
