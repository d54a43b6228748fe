"""SimMIM: predict the pixels of hidden cells (Xie et al., CVPR 2022, arXiv 2111.09886).

Shape letters: B images; c image channels; H, W height and width in pixels; s stride of the encoder; h = H/s and
w = W/s its feature map; C its channels; K tokens that the loss reads; r = s / downsampling, side in predicted
pixels of the square that one token predicts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.data.decoding import EIGHT_BIT
from simmim.encoders import Encoder, create_encoder
from simmim.masking import expand_mask
from simmim.pictures import RANGE, choose_channels, four_panels, stretch
from simmim.targets import denormalize_locally, normalize_locally
from simmim.tasks.task import Task

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


class MaskedImageModel(nn.Module):
    """Encoder, prediction head and loss as one network, whose `forward` returns the loss.

    Args:
        encoder: What sees the visible cells.
        head: "linear" or "mlp" (two layers).
        loss: "l1", "l2" or "smooth_l1" (section 3.4 and table 5).
        predict: "hidden" pixels only, or "all" of them: reconstruction instead of prediction (section 4.1.5).
        target: "raw" or "normalized" pixels, see `simmim.targets`.
        target_window: Side in pixels of the window of the normalised target.
        target_downsampling: Image pixels, a side, that one predicted pixel stands for (table 4).

    Raises:
        ValueError: If an option is unknown or the numbers contradict each other.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        head: str,
        loss: str,
        predict: str,
        target: str,
        target_window: int,
        target_downsampling: int,
    ) -> None:
        super().__init__()
        _choose("objective.head", head, ["linear", "mlp"])
        _choose("objective.loss", loss, list(LOSSES))
        _choose("objective.predict", predict, ["hidden", "all"])
        _choose("objective.target", target, ["raw", "normalized"])
        if target_downsampling < 1 or encoder.stride % target_downsampling:
            raise ValueError(
                f"objective.target_downsampling={target_downsampling} must divide the encoder's stride of "
                f"{encoder.stride} px"
            )
        if target_window < 3 or target_window % 2 == 0:
            raise ValueError(f"objective.target_window={target_window} must be odd and at least 3 px: the paper has 47")
        self.encoder = encoder
        self.loss = loss
        self.predict = predict
        self.target_window = target_window if target == "normalized" else None
        self.downsampling = target_downsampling
        self.side = encoder.stride // target_downsampling
        self.in_channels = encoder.config["in_channels"]
        width, outputs = encoder.channels[-1], self.in_channels * self.side**2
        self.head = (
            nn.Linear(width, outputs)
            if head == "linear"
            else nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs))
        )

    @property
    def parts(self) -> list[nn.Module]:
        """What sharded training gathers one after the other: see `simmim.training.sharding.Shardable`."""
        return [*self.encoder.parts, self.head]

    entries = ("reconstruct", "pooled")

    def layer_of(self, name: str) -> int:
        """See `Encoder.layer_of`; the head stands on top."""
        return self.encoder.layer_of(name.removeprefix("encoder."))

    def init_module(self, name: str, module: nn.Module) -> None:
        """Gives initial values to the parameters that one module, of this name, itself holds."""
        if name.startswith("encoder"):
            self.encoder.init_module(module)
        else:
            module.reset_parameters()  # type: ignore[operator]  # the head's layers, as PyTorch has them

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """The loss: mean error of the predicted pixels that the objective counts.

        Args:
            images: (B, c, H, W), normalised.
            mask: Boolean (B, rows, columns) cells over the image, True is hidden.

        Returns:
            A scalar.
        """
        counted = self.to_tokens(self.counted_pixels(mask, images))  # (B, h, w, 1, r * r)
        image, row, column = counted.any(dim=-1).squeeze(-1).nonzero(as_tuple=True)  # K places: all the loss reads
        at = (image, row, column)
        features = self.encoder.features_at(images, mask, at)  # (K, C)
        predicted = self.head(features).view(-1, self.in_channels, self.side**2)  # (K, c, r * r)
        target = self.to_tokens(self.target(images))  # (B, h, w, c, r * r)
        return self.mean_error(predicted, target[at], counted[at])

    def pooled(self, images: Tensor) -> Tensor:
        """What a classifier would see of normalised images (B, c, H, W), none of them hidden: (B, C)."""
        return self.encoder.pooled(images).float()

    def mean_error(self, predicted: Tensor, target: Tensor, counted: Tensor) -> Tensor:
        """sum(error * counted) / (sum(counted) + 1e-5) / channels, in fp32."""
        error = LOSSES[self.loss](predicted.float(), target, reduction="none")
        loss: Tensor = (error * counted).sum() / (counted.sum() + 1e-5) / self.in_channels
        return loss

    def target(self, images: Tensor) -> Tensor:
        """What is predicted: (B, c, H/downsampling, W/downsampling)."""
        if self.target_window is not None:
            images = normalize_locally(images, self.target_window)
        return F.avg_pool2d(images, self.downsampling) if self.downsampling > 1 else images

    def counted_pixels(self, mask: Tensor, images: Tensor) -> Tensor:
        """Which predicted pixels the loss counts: boolean (B, 1, H/downsampling, W/downsampling)."""
        height, width = (size // self.downsampling for size in images.shape[-2:])
        counted = expand_mask(mask, height, width)[:, None]
        return counted if self.predict == "hidden" else torch.ones_like(counted)

    def to_tokens(self, maps: Tensor) -> Tensor:
        """Gathers the square of pixels of each token: (B, c, h * r, w * r) -> (B, h, w, c, r * r)."""
        batch, channels, height, width = maps.shape
        r = self.side
        maps = maps.reshape(batch, channels, height // r, r, width // r, r)
        return maps.permute(0, 2, 4, 1, 3, 5).flatten(4)

    def visible_mean_loss(self, images: Tensor, mask: Tensor) -> Tensor:
        """The loss of the trivial predictor: for each image, the mean colour of its visible pixels."""
        target = self.target(images)
        visible = ~expand_mask(mask, *target.shape[-2:])[:, None]  # (B, 1, H, W)
        colour = (target * visible).sum(dim=(2, 3), keepdim=True) / visible.sum(dim=(2, 3), keepdim=True).clamp(min=1)
        return self.mean_error(colour.expand_as(target), target, self.counted_pixels(mask, images))

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """The whole predicted image, in the space of the images: (B, c, H, W).

        A normalised target is undone with the statistics of the true images (see `denormalize_locally`).
        """
        predicted = self.head(self.encoder(images, mask)).float()  # (B, h, w, c * r * r)
        predicted = F.pixel_shuffle(predicted.permute(0, 3, 1, 2), self.side)  # (B, c, h * r, w * r)
        if self.downsampling > 1:
            predicted = F.interpolate(predicted, images.shape[-2:], mode="nearest")
        if self.target_window is not None:
            predicted = denormalize_locally(predicted, images, self.target_window)
        return predicted


class Pretraining(Task):
    """Trains a `MaskedImageModel` on batches of images and their masks.

    Args:
        model: Arguments of `create_encoder`.
        objective: Arguments of `MaskedImageModel`.
        masking: Arguments of `Masking` that the run used, kept for those who open the checkpoint.
        image_size: Height and width in pixels, likewise.
        **training: See `Task`.
    """

    network: MaskedImageModel
    average: MaskedImageModel | None

    def __init__(
        self,
        *,
        model: dict[str, Any],
        objective: dict[str, Any],
        masking: dict[str, Any],
        image_size: list[int],
        **training: Any,
    ) -> None:
        super().__init__(lambda: MaskedImageModel(create_encoder(**model), **objective), **training)
        self.save_hyperparameters()

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Of the pixels that the objective counts."""
        return self.network(self.normalize(batch["image"]), batch["mask"])  # type: ignore[no-any-return]

    def look(self, batch: dict[str, Any]) -> None:
        """With its masks; the loss alone would compute the last block for the hidden cells only."""
        self.network.reconstruct(self.normalize(batch["image"]), batch["mask"])

    def describe(self, metrics: dict[str, Any]) -> str:
        """The loss, and what it is worth."""
        loss, trivial = float(metrics["val_loss"]), float(metrics["val_loss_visible_mean"])
        return f"val {loss:.4f} ({loss / trivial:.2f} of the visible mean's {trivial:.4f})"

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """The loss and the trivial predictor's, weighted so that the batch size does not matter."""
        images, mask = self.normalize(batch["image"]), batch["mask"]
        pixels = int(self.best.counted_pixels(mask[batch["counts"]], images[batch["counts"]]).sum())
        self.log("val_loss", self.best(images, mask), batch_size=pixels, sync_dist=True)
        trivial = self.best.visible_mean_loss(images, mask)
        self.log("val_loss_visible_mean", trivial, batch_size=pixels, sync_dist=True)
        self.log("step", float(self.global_step), reduce_fx="max", sync_dist=True)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pooled features of images (B, c, H, W): (B, C)."""
        return self.best.pooled(self.normalize(images))  # type: ignore[no-any-return]

    @property
    def photographs(self) -> bool:
        """Whether images are 8-bit grey or colours, which a picture shows as they are."""
        return self.max_value == EIGHT_BIT and self.network.in_channels in (1, 3, 4)

    @torch.no_grad()
    def panels(self, images: Tensor, mask: Tensor, channels: list[int] | None = None) -> Tensor:
        """Original, masked, reconstruction and both pasted, of images as a source gives them.

        Args:
            images: (B, c, H, W).
            mask: Boolean (B, h, w) cells, True is hidden.
            channels: Those that are shown; None for the usual ones. See `simmim.pictures.choose_channels`.

        Returns:
            (B, 4, channels, H, W) between 0 and 1: see `simmim.pictures.four_panels`. Where they are no
            photographs, stretched.
        """
        predicted = self.denormalize(self.best.reconstruct(self.normalize(images), mask))
        original = images / self.max_value
        if channels is not None or not self.photographs:
            shown = choose_channels(self.network.in_channels, channels)
            original, predicted = original[:, shown], predicted[:, shown]
        if not self.photographs:
            original, predicted = stretch(original, original), stretch(predicted, original)
        return four_panels(original, predicted.clamp(0, 1), mask)

    def caption(self, *, ratio: float, patch_size: int, channels: list[int] | None = None) -> str:
        """What must be said below a picture of `panels`, for the masking and the channels that it shows."""
        parts = [f"{ratio:.0%} of the {patch_size}-px cells hidden"]
        if not self.photographs:
            shown = ", ".join(map(str, choose_channels(self.network.in_channels, channels)))
            low, high = (f"{100 * share:.0f}" for share in RANGE)
            parts.append(f"channels {shown}, each from percentile {low} to {high} of the original")
        if self.network.predict == "hidden":
            parts.append("what is predicted for visible cells was never trained")
        if self.network.target_window is not None:
            parts.append("the normalised target is undone with the true image's local mean and deviation")
        return "; ".join(parts)

    def denormalize(self, images: Tensor) -> Tensor:
        """Undoes `normalize`, to floats in units of `max_value`."""
        return images * self.std + self.mean


def _choose(key: str, value: str, options: list[str]) -> None:
    if value not in options:
        raise ValueError(f"{key}={value} is unknown: choose one of {', '.join(options)}")
