"""Image classification: what a pretrained encoder is fine-tuned for (SimMIM, arXiv 2111.09886, section 4.1).

Shape letters: B images; c image channels; H, W height and width in pixels; h, w the encoder's feature map; C its
channels; N classes.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassStatScores

from simmim.data.transforms import create_mixing
from simmim.encoders import Encoder, create_encoder
from simmim.tasks.task import Task

MOST_CONFUSED = 100
"""Up to so many classes are counted against one another: more are a picture that nobody can read."""


class ImageClassifier(nn.Module):
    """Encoder, its pooled features, and a linear classifier, as one network whose `forward` returns the loss.

    Args:
        encoder: What sees the images.
        classes: Number of classes N.
        label_smoothing: Share of each target that is spread over all classes.
    """

    def __init__(self, encoder: Encoder, *, classes: int, label_smoothing: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder.mask_token.requires_grad_(False)  # nothing is hidden
        self.head = nn.Linear(encoder.channels[-1], classes)
        self.label_smoothing = label_smoothing

    @property
    def parts(self) -> list[nn.Module]:
        """What sharded training gathers one after the other: see `simmim.training.sharding.Shardable`."""
        return [*self.encoder.parts, self.head]

    entries = ("logits",)

    def layer_of(self, name: str) -> int:
        """See `Encoder.layer_of`; the classifier stands on top."""
        return self.encoder.layer_of(name.removeprefix("encoder."))

    def init_module(self, name: str, module: nn.Module) -> None:
        """Gives initial values to the parameters that one module, of this name, itself holds."""
        self.encoder.init_module(module)  # the classifier is a linear layer like any other: small, without bias

    def logits(self, images: Tensor) -> Tensor:
        """Normalised images (B, c, H, W) -> (B, N)."""
        return self.head(self.encoder.pooled(images))  # type: ignore[no-any-return]

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy of normalised images with classes (B), or shares of classes (B, N): a scalar."""
        return F.cross_entropy(self.logits(images).float(), targets, label_smoothing=self.label_smoothing)


class Classification(Task):
    """Trains an `ImageClassifier` on batches of images and their labels.

    Args:
        model: Arguments of `create_encoder`.
        classes: Names of the classes, in the order of the labels.
        label_smoothing: See `ImageClassifier`.
        mixing: Arguments of `create_mixing`.
        image_size: Height and width in pixels that the run used, kept for those who open the checkpoint.
        preprocessing: How its images were cropped and augmented, likewise; a resumed run must not change it.
        **training: See `Task`.

    Attributes:
        val_loss: Mean of the last validation.
        stats: Counts of the last validation: hits and images of each class.
        confusion: How often images of one class (rows) were taken for another; None where there are too many.
    """

    network: ImageClassifier
    average: ImageClassifier | None

    def __init__(
        self,
        *,
        model: dict[str, Any],
        classes: list[str],
        label_smoothing: float,
        mixing: dict[str, Any],
        image_size: list[int],
        preprocessing: dict[str, Any],
        **training: Any,
    ) -> None:
        count = len(classes)
        super().__init__(
            lambda: ImageClassifier(create_encoder(**model), classes=count, label_smoothing=label_smoothing), **training
        )
        self.save_hyperparameters()
        self.classes = classes
        self.mix = create_mixing(count, **mixing)
        self.val_loss = MeanMetric()  # Lightning's own mean rounds the images that a process has on average
        self.stats = MulticlassStatScores(count, average="none")
        self.top5 = MulticlassAccuracy(count, top_k=min(5, count), average="micro")
        self.confusion = MulticlassConfusionMatrix(count) if count <= MOST_CONFUSED else None

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Of images that are mixed with one another, where they are."""
        images, targets = self.normalize(batch["image"]), batch["label"]
        if self.mix is not None:
            images, targets = self.mix(images, targets)
        return self.network(images, targets)  # type: ignore[no-any-return]

    def look(self, batch: dict[str, Any]) -> None:
        """Without mixing, which would draw random numbers."""
        self.network.logits(self.normalize(batch["image"]))

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """The loss, without smoothing, and what the metrics count."""
        counts, labels = batch["counts"], batch["label"][batch["counts"]]
        logits = self.best.logits(self.normalize(batch["image"])).float()[counts]  # (B, N), fillers left out
        self.log("step", float(self.global_step), reduce_fx="max", sync_dist=True)
        if len(labels):
            self.val_loss.update(F.cross_entropy(logits, labels), weight=len(labels))
            for metric in filter(None, (self.stats, self.top5, self.confusion)):
                metric.update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        """Loss, top-1 and top-5 accuracy, over all processes."""
        self.log("val_loss", self.val_loss.compute())
        hits, images = self.hits_and_images()
        self.log("val_top1", hits.sum() / images.sum())
        self.log("val_top5", self.top5.compute())

    def on_validation_epoch_start(self) -> None:
        """Counts anew."""
        for metric in filter(None, (self.val_loss, self.stats, self.top5, self.confusion)):
            metric.reset()

    def hits_and_images(self) -> tuple[Tensor, Tensor]:
        """Of the last validation: images of each class that were recognised, and all of them; float (N) each."""
        table = self.stats.compute()  # (N, 5): hits, false alarms, rightly none of it, misses, images
        return table[:, 0].float(), table[:, 4].float()

    def describe(self, metrics: dict[str, Any]) -> str:
        """Loss and accuracy."""
        top5 = f", top-5 {float(metrics['val_top5']):.1%}" if len(self.classes) > 5 else ""
        return f"val {float(metrics['val_loss']):.4f}, top-1 {float(metrics['val_top1']):.1%}{top5}"
