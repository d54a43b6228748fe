"""From an image source to batches: which images, in which order, what happens to them, what is hidden."""

import logging
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from simmim.data.decoding import EIGHT_BIT, UnreadableImage
from simmim.data.files import FileSource, InMemory
from simmim.data.folder import split_by_hash
from simmim.data.loader import Notes, WatchedLoader, default_workers
from simmim.data.sampler import SampleKey, SampleStream
from simmim.data.shards import ShardSource
from simmim.data.sources import open_files
from simmim.data.synthetic import SyntheticSource
from simmim.data.transforms import Transform
from simmim.masking import Masking
from simmim.seeding import generator_from, torch_random_from

MAX_REPLACEMENTS = 100
"""So many unreadable images in a row are no accident of a large collection any more."""

FILLER = -1
"""The epoch of a validation sample that does not count."""

log = logging.getLogger(__name__)


class ImageSource(Protocol):
    """Where images come from. Adding a source is a file with this, a line in `create_sources` and a config.

    Where it reads files, the line is one of `FILE_SOURCES` in `sources.py`.
    """

    classes: list[str]
    """Names of the labels; empty where there are none."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def load(self, index: int) -> tuple[Tensor, int]:
        """The image (C, H, W), uint8 or float32 by `data.max_value`, and its label or -1. Raises `UnreadableImage`."""
        ...

    def label(self, index: int) -> int:
        """The label alone, without reading the image."""
        ...

    def name(self, index: int) -> str:
        """What to call the image to a person: its path."""
        ...


def create_sources(config: dict[str, Any], image_size: tuple[int, int]) -> tuple[ImageSource, ImageSource]:
    """The training and the validation images.

    Args:
        config: The `data` section of a config: `source` and `channels`, and what `conf/data/<source>.yaml` lists.
        image_size: Height and width in pixels, of synthetic images and of what others become.

    Raises:
        ValueError: If a value is out of range or a folder holds no image.
    """
    if config["source"] == "synthetic":
        return _synthetic(config, image_size, "train"), _synthetic(config, image_size, "val")
    images = _open_files(config, image_size)
    if config["val_root"] is not None:
        aside, key = _open_files(config, image_size, "val_root"), "data.val_root"
    elif len(images) < 2:
        raise ValueError(f"data.root={config['root']} holds one image only: give more, or data.val_root")
    else:
        (images, aside), key = split_by_hash(images, config["val_fraction"]), "data.root"
    return _cached(images, config), _cached(aside, config, key=key)


def create_source(config: dict[str, Any], image_size: tuple[int, int]) -> ImageSource:
    """All images of `data.root`; of synthetic ones those to validate on. Arguments and errors as `create_sources`."""
    if config["source"] == "synthetic":
        return _synthetic(config, image_size, "val")
    return _cached(_open_files(config, image_size), config)


def _synthetic(config: dict[str, Any], image_size: tuple[int, int], part: str) -> SyntheticSource:
    if (max_value := config.get("max_value", EIGHT_BIT)) != EIGHT_BIT:
        raise ValueError(
            f"data.max_value={max_value:g}: synthetic images have 8 bits: give {EIGHT_BIT}, or data=folder"
        )
    seed = {"train": 0, "val": 1}[part]
    return SyntheticSource(config[f"{part}_images"], image_size, channels=config["channels"], seed=seed)


def _open_files(config: dict[str, Any], image_size: tuple[int, int], root: str = "root") -> FileSource:
    files = open_files(config, root).in_units_of(config.get("max_value", EIGHT_BIT))
    if isinstance(files, ShardSource) and files.short_side < min(image_size):
        log.warning(
            f"data.image_size: {min(image_size)} px out of a copy whose images have {files.short_side} px at most on "
            "their short side: prepare one with a larger short_side"
        )
    return files


def _cached(files: FileSource, config: dict[str, Any], *, key: str = "data.root") -> ImageSource:
    """What `data.cache` says: the files where they lie, or a copy in memory, unless they are there already."""
    if config["cache"] not in ("none", "ram"):
        raise ValueError(f"data.cache={config['cache']} is unknown: choose none or ram")
    return files if config["cache"] == "none" or files.in_memory else InMemory(files, key=key)


@dataclass(frozen=True)
class ImageSamples(Dataset[dict[str, Any]]):
    """Images, with masks where there is a masking. A sample is a function of (seed, epoch, index) alone.

    An unreadable image is replaced by the next readable one and named in the sample; what to do about it is
    decided where batches arrive (`simmim.training.callbacks.UnreadableImages`), not in a worker.
    """

    source: ImageSource
    transform: Transform
    masking: Masking | None
    seed: int
    notes: Notes | None = None
    """Where a loader process says which image it reads."""

    def __len__(self) -> int:
        """Number of images in the source."""
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """Image (C, H, W), label, [(name, reason), ...] of unreadable images, and perhaps a mask bool (h, w).

        `counts` is false for a sample that only fills a batch up, or stands in for an unreadable one.
        """
        epoch, index = key
        image, label, unreadable = self._load(index)
        with torch_random_from(self.seed, "transform", epoch, index):
            image = self.transform(image)
        sample = {
            "image": image,
            "label": label,
            "counts": epoch != FILLER and not unreadable,
            "unreadable": unreadable,
        }
        if self.masking is not None:
            sample["mask"] = self.masking(generator_from(self.seed, "mask", epoch, index))
        return sample

    def _load(self, index: int) -> tuple[Tensor, int, list[tuple[str, str]]]:
        unreadable: list[tuple[str, str]] = []
        for attempt in range(min(MAX_REPLACEMENTS, len(self.source))):
            candidate = (index + attempt) % len(self.source)
            if self.notes is not None:
                self.notes.write(candidate)
            try:
                return (*self.source.load(candidate), unreadable)
            except UnreadableImage as error:
                unreadable.append((self.source.name(candidate), str(error)))
        name, reason = unreadable[0]
        raise ValueError(f"{len(unreadable)} images in a row cannot be read, the first being {name}: {reason}")


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks samples to a batch; the lists of unreadable images become one."""
    unreadable = [entry for sample in samples for entry in sample["unreadable"]]
    others = [{k: v for k, v in sample.items() if k not in ("image", "unreadable")} for sample in samples]
    image = stack([sample["image"] for sample in samples])
    return {"image": image, **default_collate(others), "unreadable": unreadable}


def stack(images: Sequence[Tensor]) -> Tensor:
    """The batch (B, C, H, W) in the layout of its images: turning decoded ones round takes five times as long."""
    batch: Tensor
    if all(image.stride(0) == 1 for image in images):  # channels last
        batch = default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    else:
        batch = default_collate(list(images))
    return batch


class ImageData(LightningDataModule):
    """Training and validation batches of images, uint8 or floats; labels; and masks where there is a masking.

    Args:
        sources: Training and validation images.
        transforms: What happens to the ones, and to the others.
        masking: Draws the masks; None for none.
        batch_size: Images a device.
        num_workers: Loader processes a device; None takes `default_workers`.
        timeout: Seconds that a batch of theirs may take.
        on_gpu: Whether a GPU trains.
        num_batches: Training batches of the whole run.
        seed: Seed of order, transforms and masks.
    """

    def __init__(
        self,
        sources: tuple[ImageSource, ImageSource],
        *,
        transforms: tuple[Transform, Transform],
        masking: Masking | None,
        batch_size: int,
        num_workers: int | None,
        timeout: float,
        on_gpu: bool,
        num_batches: int,
        seed: int,
    ) -> None:
        super().__init__()
        train, validation = sources
        self.train_samples = ImageSamples(train, transforms[0], masking, seed)
        self.val_samples = ImageSamples(validation, transforms[1], masking, seed)
        self.batch_size = batch_size
        self.num_workers = default_workers(on_gpu=on_gpu) if num_workers is None else num_workers
        self.timeout = timeout
        self.on_gpu = on_gpu
        self.num_batches = num_batches
        self.seed = seed

    def train_dataloader(self) -> WatchedLoader:
        """Batches from where the run stands: its step is all the state that the data need."""
        assert self.trainer is not None
        return self.loader_from(
            self.trainer.global_step * self.trainer.accumulate_grad_batches,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def loader_from(self, start: int, *, rank: int = 0, world_size: int = 1) -> WatchedLoader:
        """Training batches of one process from a position on. See `SampleStream`."""
        stream = SampleStream(
            len(self.train_samples),
            self.batch_size,
            num_batches=self.num_batches,
            start=start,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )
        return self._loader(self.train_samples, stream)

    def keys_of_step(self, step: int, images: int) -> list[SampleKey]:
        """Epoch and index of the samples of an optimizer step, of all processes: what rebuilds its batch exactly.

        `collate([self.train_samples[key] for key in keys])` is that batch, in the order of the processes.

        Args:
            step: Counted from 1, as in `metrics.csv`.
            images: That a step has, of all processes and batches.
        """
        stream = SampleStream(len(self.train_samples), images, num_batches=step, start=step - 1, seed=self.seed)
        return next(iter(stream))

    def val_dataloader(self) -> WatchedLoader:
        """The same images with the same masks every time, dealt to the processes."""
        return self.batches_of(self.val_samples, range(len(self.val_samples)))

    def batches_of(self, samples: ImageSamples, indices: Sequence[int]) -> WatchedLoader:
        """Some images, each of them once, dealt to the processes.

        All processes get as many batches, since they compute together: one that has none left gets a filler.
        """
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        own = [(0, index) for index in indices[rank::world_size]]
        batches = [own[at : at + self.batch_size] for at in range(0, len(own), self.batch_size)]
        longest = math.ceil(math.ceil(len(indices) / world_size) / self.batch_size)
        return self._loader(samples, batches + [[(FILLER, 0)]] * (longest - len(batches)))

    def _loader(self, samples: ImageSamples, batches: Any) -> WatchedLoader:
        notes = Notes(self.num_workers)
        return WatchedLoader(
            replace(samples, notes=notes),
            notes=notes,
            name=samples.source.name,
            timeout=self.timeout,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=self.on_gpu,
            worker_init_fn=_leave_signals_to_the_run,
            persistent_workers=self.num_workers > 0,
        )


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, and what Slurm sends every process of a job."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # The first SIGTERM may be Slurm's, the second is the loader's own, for a process that hangs.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def fixed_batch(samples: ImageSamples, count: int) -> dict[str, Any]:
    """The first samples of a validation set, as one batch: what the pictures of a run show."""
    return collate([samples[(0, index)] for index in range(min(count, len(samples)))])
