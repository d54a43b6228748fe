"""Features of images by an encoder that is not trained: so many images at once as its memory holds, in their order."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from simmim.config import Config, image_size_of
from simmim.data.decoding import EIGHT_BIT, UnreadableImage
from simmim.data.files import free_memory
from simmim.data.loader import Notes, WatchedLoader, default_workers, end_with_the_command
from simmim.data.module import ImageSource, stack
from simmim.data.transforms import Transform, per_channel
from simmim.devices import on_gpu, precision_of
from simmim.encoders import Encoder
from simmim.run_folder import shown, whole_file

log = logging.getLogger(__name__)

CPU_BATCH = 16
"""Images at once on a CPU: more are no faster."""

GPU_BATCH = 256
"""Images at once on a GPU, at most: more hardly keep it busier, and the loader would hold many of them."""

FLOATS_PER_CHANNEL = 24
"""Numbers that the first stage holds at its peak for each channel of each token."""


class Embedder:
    """An encoder on its device: images in, features out, so many images at once as its memory holds.

    Args:
        encoder: What makes the features.
        image_size: Height and width of the images in pixels.
        mean: Of each channel, in units of `max_value`.
        std: Standard deviation of each channel.
        pooled: Whether to take what a classifier sees, the mean of the final map, instead of the map.
        gpu: Whether to compute on the GPU.
        bf16: Whether to compute in bfloat16 by autocast; the features are float32 in any case.
        max_value: The pixel value that counts as 1.

    Attributes:
        batch_size: Images at once, at most; halved whenever the GPU's memory runs out.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        image_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        pooled: bool,
        gpu: bool,
        bf16: bool,
        max_value: float = EIGHT_BIT,
    ) -> None:
        self.device = torch.device("cuda" if gpu else "cpu")
        self.encoder = encoder.eval().to(self.device)
        self.mean, self.std = (torch.tensor(values, device=self.device).view(-1, 1, 1) for values in (mean, std))
        self.max_value = max_value
        self.image_size = image_size
        self.pooled = pooled
        self.bf16 = bf16
        self.batch_size = 1

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, c, H, W), uint8 or floats -> float32 (B, C), or (B, H/stride, W/stride, C); both on the CPU.

        Raises:
            ValueError: If the memory does not hold one image.
        """
        features: list[Tensor] = []
        while (done := sum(map(len, features))) < len(images):
            some = images[done : done + self.batch_size]
            if (result := self.try_at_once(some)) is not None:
                features.append(result)
            elif len(some) == 1:
                height, width = some.shape[-2:]
                raise ValueError(f"out of memory with one image of {height}x{width} px: give a smaller data.image_size")
            else:
                self.batch_size = 2 ** ((len(some) - 1).bit_length() - 1)
                log.warning(f"out of memory: {self.batch_size} images at once from here on")
        return torch.cat(features)

    def try_at_once(self, images: Tensor) -> Tensor | None:
        """The features, or None if the GPU's memory does not hold them."""
        try:
            return self._compute(images)
        except torch.OutOfMemoryError:
            pass  # and the error lets go of what was computed
        torch.cuda.empty_cache()
        return None

    @torch.inference_mode()
    def _compute(self, images: Tensor) -> Tensor:
        x = (images.to(self.device, non_blocking=True).float() / self.max_value - self.mean) / self.std
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            features: Tensor = self.encoder.pooled(x) if self.pooled else self.encoder(x)  # (B, C) or (B, h, w, C)
        return features.float().cpu()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the features of one image."""
        stride, channels = self.encoder.stride, self.encoder.channels[-1]
        return (channels,) if self.pooled else (*(side // stride for side in self.image_size), channels)


def create_embedder(config: Config, encoder: Encoder, *, pooled: bool) -> Embedder:
    """An encoder on the device, in the precision and for the images that a filled-in config asks for."""
    return Embedder(
        encoder,
        image_size=image_size_of(config),
        pooled=pooled,
        gpu=on_gpu(config),
        bf16=precision_of(config) == "bf16-mixed",
        **per_channel(config["data"]),
    )


def fitting_batch(embedder: Embedder) -> int:
    """Images at once: on a GPU the largest power of two that fits, found by trying; on a CPU by the memory free."""
    settings = embedder.encoder.config
    height, width = embedder.image_size
    if embedder.device.type == "cpu":
        tokens: int = height * width // settings["patch_size"] ** 2
        needed, free = 4 * FLOATS_PER_CHANNEL * tokens * settings["embed_dim"], free_memory()
        fits: int = CPU_BATCH if free is None else max(1, free // 2 // needed)
        return min(CPU_BATCH, 1 << fits.bit_length() - 1)
    size = 1
    while size < GPU_BATCH:
        dtype = torch.uint8 if embedder.max_value == EIGHT_BIT else torch.float32
        images = torch.zeros(2 * size, settings["in_channels"], height, width, dtype=dtype)
        if embedder.try_at_once(images) is None:
            break
        size *= 2
    torch.cuda.empty_cache()
    return size


Sample = tuple[int, Tensor | None, str]
"""Position of an image, its pixels (c, H, W), and \"\"; or, where it cannot be read, None and the reason."""

Unreadable = list[tuple[int, str]]
"""Positions of images, each with the reason why it cannot be read."""


@dataclass(frozen=True)
class Crops(Dataset[Sample]):
    """The images of a source, as validation crops them."""

    source: ImageSource
    transform: Transform
    notes: Notes

    def __getitem__(self, index: int) -> Sample:
        """Reads an image."""
        self.notes.write(index)
        try:
            return index, self.transform(self.source.load(index)[0]), ""
        except UnreadableImage as error:
            return index, None, str(error)


def collate(samples: Sequence[Sample]) -> tuple[list[int], Tensor | None, Unreadable]:
    """Positions and pixels (B, c, H, W) of the readable images, and the others with their reasons."""
    positions = [index for index, image, _ in samples if image is not None]
    images = [image for _, image, _ in samples if image is not None]
    unreadable = [(index, reason) for index, image, reason in samples if image is None]
    return positions, stack(images) if images else None, unreadable


def crops_of(source: ImageSource, batches: Any, config: Config, *, transform: Transform) -> WatchedLoader:
    """Batches of images, as `collate` has them, in the order of these positions.

    Args:
        source: Where the images are.
        batches: Positions in it, a list a batch.
        config: The composed config of the command, for `data.num_workers` and `data.timeout`.
        transform: What makes the images of one size.
    """
    gpu, workers = on_gpu(config), config["data"]["num_workers"]
    workers = default_workers(on_gpu=gpu) if workers is None else workers
    notes = Notes(workers)
    return WatchedLoader(
        Crops(source, transform, notes),
        notes=notes,
        name=source.name,
        timeout=config["data"]["timeout"],
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=gpu,
        worker_init_fn=end_with_the_command,
    )


def features_of(
    batches: Iterable[Any], embedder: Embedder, source: ImageSource, bar: "tqdm[Any]"
) -> tuple[list[int], Tensor, Unreadable]:
    """Computes the features of some batches of `crops_of`.

    Returns:
        Positions of the readable images, their features (n, ...) on the CPU, and the images that are left out.
    """
    positions: list[int] = []
    features = [torch.empty(0, *embedder.shape)]
    unreadable: Unreadable = []
    for readable, images, others in batches:
        if images is not None:
            features.append(embedder(images))
        for index, reason in others:
            log.warning(f"{source.name(index)} cannot be read ({reason}): left out")
        positions += readable
        unreadable += others
        bar.update(len(readable) + len(others))
    return positions, torch.cat(features), unreadable


def list_unreadable(file: Path, unreadable: Sequence[tuple[str, str]]) -> None:
    """Writes the names of images that were left out, and why, a line an image; no file where all could be read."""
    file.unlink(missing_ok=True)
    if unreadable:
        with whole_file(file) as temporary:
            lines = "".join(f"{name}\t{reason}\n" for name, reason in unreadable)
            temporary.write_bytes(lines.encode("utf-8", "surrogateescape"))
        log.warning(f"{len(unreadable):,} images could not be read and are left out: {shown(file)}")
