"""`python -m simmim.embed`: features of a folder of images, for retrieval, probing and plots."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from simmim.command import Config, command, on_gpu, precision_of
from simmim.data.decoding import UnreadableImage
from simmim.data.files import FileSource, free_memory
from simmim.data.folder import FolderSource, SingleImage
from simmim.data.loader import Notes, WatchedLoader, default_workers, end_with_the_command
from simmim.data.module import stack
from simmim.data.transforms import Transform, centre_transform
from simmim.encoders import SwinTransformerV2
from simmim.encoders.weights import load_encoder_weights, read_encoder_weights
from simmim.feature_files import (
    Listing,
    Part,
    begun_with,
    check_out,
    claim,
    discard,
    join,
    unreadable_images,
    write_part,
)
from simmim.run_folder import shown, whole_file

log = logging.getLogger(__name__)

CPU_BATCH = 16
"""Images at once on a CPU: more are no faster."""

GPU_BATCH = 256
"""Images at once on a GPU, at most: more hardly keep it busier, and the loader would hold many of them."""

PART_BATCHES, PART_BYTES = 16, 64 << 20
"""A part is whole batches, at most so many, and of features hardly more than so many bytes."""

FLOATS_PER_CHANNEL = 24
"""Numbers that the first stage holds at its peak for each channel of each token."""


def embed(config: Config) -> Path:
    """Computes the features of all images that can be read, or goes on with it, and writes them to one file.

    Args:
        config: The composed `conf/embed.yaml`.

    Returns:
        The file. `simmim.feature_files.join` says what it holds.

    Raises:
        ValueError: If the config contradicts itself, the encoder or what lies beside `out`; if no image can be read;
            at Ctrl-C.
    """
    torch.set_flush_denormal(True)  # the -100 of the shifted windows makes denormals, which a CPU is slow with
    folder = Path(config["output_dir"])
    out = folder / "features.npz" if config["out"] is None else Path(config["out"]).expanduser()
    if config["features"] not in ("pooled", "patches"):
        raise ValueError(f"features={config['features']} is unknown: choose pooled or patches")
    check_out(out)
    embedder, facts = create_embedder(config)
    channels = embedder.encoder.config["in_channels"]
    source = open_images(Path(config["images"]).expanduser(), channels=channels)
    embedder.batch_size = config["batch_size"] or begun_with(out).get("batch_size") or fitting_batch(embedder)
    done, parts = claim(out, settings_of(embedder, source, facts)), split(len(source), embedder)
    make_parts(out, parts, done, embedder, source, config)
    unreadable = unreadable_images(out, len(parts))
    list_unreadable(folder / "bad_images.txt", source, unreadable)
    if len(unreadable) == len(source):
        discard(out)
        raise ValueError(f"images={config['images']} holds no image that can be read")
    paths = [source.relative_name(index) for index in range(len(source))]
    labels = np.array([source.label(index) for index in range(len(source))], dtype=np.int64)
    shape = join(out, len(parts), Listing(paths, labels, source.classes, facts))
    log.info(f"done: {shown(out)}, features {' x '.join(f'{side:,}' for side in shape)}, float32")
    return out


def create_embedder(config: Config) -> tuple["Embedder", dict[str, Any]]:
    """What makes the features, on its device, and what to say of it: `encoder`, `image_size`, `mean`, `std`.

    Raises:
        ValueError: If there is no encoder, the size does not fit it, or it does not say how to normalise images.
    """
    gpu, bf16 = on_gpu(config), precision_of(config) == "bf16-mixed"
    metadata = read_encoder_weights(Path(config["encoder"]))[1]
    size = image_size_of(config, metadata)
    mean, std = (statistic(key, config, metadata) for key in ("mean", "std"))
    encoder = load_at_size(Path(config["encoder"]), metadata, size)
    pooled = config["features"] == "pooled"
    embedder = Embedder(encoder, image_size=size, mean=mean, std=std, pooled=pooled, gpu=gpu, bf16=bf16)
    return embedder, {"encoder": config["encoder"], "image_size": list(size), "mean": mean, "std": std}


def load_at_size(path: Path, metadata: dict[str, Any], image_size: tuple[int, int]) -> SwinTransformerV2:
    """The encoder, ready for images of a size.

    Where the size changes the windows, the position bias keeps those that it was trained with, as in a later stage
    of training (Swin V2, section 3.3).

    Args:
        path: What `read_encoder_weights` reads.
        metadata: What it says.
        image_size: Height and width in pixels.

    Raises:
        ValueError: If the size does not fit.
    """
    settings, trained = metadata["config"], metadata["windows"]
    with torch.device("meta"):
        encoder = SwinTransformerV2(**settings)
        check_size(encoder, image_size)
        windows = [list(window) for window in encoder.windows(*image_size)]
        if settings["pretrained_window_size"] is None and trained not in (None, windows):
            sides = [max(window) for window in trained]
            encoder = SwinTransformerV2(**{**settings, "pretrained_window_size": sides})
    log.info(load_encoder_weights(encoder, path, image_size=image_size))
    return encoder


def check_size(encoder: SwinTransformerV2, image_size: tuple[int, int]) -> None:
    """Refuses a size that the encoder's patches and windows do not tile, with the nearest that they do."""
    for side in image_size:
        try:
            encoder.check_image_size(side, side)
        except ValueError as error:
            near = " or ".join(map(str, encoder.nearest_sizes(side)))
            raise ValueError(
                f"image_size={image_size[0]}x{image_size[1]}: {side} px do not fit the encoder's patches of "
                f"{encoder.patch_size} px and windows of {encoder.window_size} tokens: the nearest that do are {near}"
            ) from error


def image_size_of(config: Config, metadata: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels that `image_size` means."""
    size = metadata["image_size"] if config["image_size"] is None else config["image_size"]
    if size is None:
        raise ValueError(f"image_size must be given: encoder={config['encoder']} does not say its own")
    height, width = [size, size] if isinstance(size, int) else size
    return height, width


def statistic(key: str, config: Config, metadata: dict[str, Any]) -> list[float]:
    """The mean or the deviation of each channel.

    Raises:
        ValueError: If neither the config nor the encoder says it, or for another number of channels.
    """
    given = config[key]
    channels: int = metadata["config"]["in_channels"]
    if given is None and metadata[key] is None:
        raise ValueError(
            f"{key} must be given: encoder={config['encoder']} does not say it: give data.{key} of its "
            f"training, by default mean=[0.485,0.456,0.406] and std=[0.229,0.224,0.225]"
        )
    values = metadata[key] if given is None else [given] if isinstance(given, int | float) else given
    if len(values) not in (1, channels):
        raise ValueError(f"{key}={values} has {len(values)} values for {channels} channels: give one, or one a channel")
    return [float(value) for value in values] * (channels // len(values))


def open_images(path: Path, *, channels: int) -> FolderSource:
    """A folder of images, or one image."""
    return (SingleImage if path.is_file() else FolderSource)(path, channels=channels, key="images")


class Embedder:
    """An encoder on its device: uint8 images in, features out, so many images at once as its memory holds.

    Args:
        encoder: What makes the features.
        image_size: Height and width of the images in pixels.
        mean: Of each channel, in units of 0 to 1.
        std: Standard deviation of each channel.
        pooled: Whether to take the mean of the final map, which is what a classifier sees, instead of the map.
        gpu: Whether to compute on the GPU.
        bf16: Whether to compute in bfloat16 by autocast; the features are float32 in any case.

    Attributes:
        batch_size: Images at once, at most; halved whenever the GPU's memory runs out.
    """

    def __init__(
        self,
        encoder: SwinTransformerV2,
        *,
        image_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        pooled: bool,
        gpu: bool,
        bf16: bool,
    ) -> None:
        self.device = torch.device("cuda" if gpu else "cpu")
        self.encoder = encoder.eval().to(self.device)
        self.mean, self.std = (torch.tensor(values, device=self.device).view(-1, 1, 1) for values in (mean, std))
        self.image_size = image_size
        self.pooled = pooled
        self.bf16 = bf16
        self.batch_size = 1

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, c, H, W) -> float32 (B, C), or (B, H/stride, W/stride, C); both on the CPU.

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
                raise ValueError(f"out of memory with one image of {height}x{width} px: give a smaller image_size")
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
        x = (images.to(self.device, non_blocking=True).float() / 255 - self.mean) / self.std
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            features: Tensor = self.encoder(x)  # (B, h, w, C)
        features = features.float()
        return (features.mean((1, 2)) if self.pooled else features).cpu()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the features of one image."""
        stride, channels = self.encoder.stride, self.encoder.channels[-1]
        return (channels,) if self.pooled else (*(side // stride for side in self.image_size), channels)


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
        images = torch.zeros(2 * size, settings["in_channels"], height, width, dtype=torch.uint8)
        if embedder.try_at_once(images) is None:
            break
        size *= 2
    torch.cuda.empty_cache()
    return size


def settings_of(embedder: Embedder, source: FileSource, facts: dict[str, Any]) -> dict[str, Any]:
    """What decides about the features to the last bit."""
    weights = hashlib.sha256()
    for name, value in embedder.encoder.state_dict().items():
        weights.update(name.encode())
        weights.update(value.cpu().contiguous().numpy().data)
    return {
        "images": str(source.root.resolve()),
        "names_sha256": source.names_sha256(),
        **facts,
        "encoder_sha256": weights.hexdigest(),
        "model": embedder.encoder.config,
        "features": "pooled" if embedder.pooled else "patches",
        "batch_size": embedder.batch_size,
        "batches_a_part": batches_a_part(embedder),
        "device": embedder.device.type,
        "precision": "bf16" if embedder.bf16 else "fp32",
    }


def batches_a_part(embedder: Embedder) -> int:
    """Batches whose features are computed, kept and written together."""
    return max(1, min(PART_BATCHES, PART_BYTES // (4 * prod(embedder.shape) * embedder.batch_size)))


def split(images: int, embedder: Embedder) -> list[list[range]]:
    """Deals positions of so many images to batches, and these to parts."""
    batch, length = embedder.batch_size, batches_a_part(embedder)
    batches = [range(at, min(at + batch, images)) for at in range(0, images, batch)]
    return [batches[at : at + length] for at in range(0, len(batches), length)]


Sample = tuple[int, Tensor | None, str]
"""Position of an image, its pixels uint8 (c, H, W), and \"\"; or, where it cannot be read, None and the reason."""


@dataclass(frozen=True)
class Crops(Dataset[Sample]):
    """The images of a source, as validation crops them."""

    source: FileSource
    transform: Transform
    notes: Notes

    def __getitem__(self, index: int) -> Sample:
        """Reads an image."""
        self.notes.write(index)
        try:
            return index, self.transform(self.source.load(index)[0]), ""
        except UnreadableImage as error:
            return index, None, str(error)


def collate(
    samples: Sequence[tuple[int, Tensor | None, str]],
) -> tuple[list[int], Tensor | None, list[tuple[int, str]]]:
    """Positions and pixels uint8 (B, c, H, W) of the readable images, and the others with their reasons."""
    positions = [index for index, image, _ in samples if image is not None]
    images = [image for _, image, _ in samples if image is not None]
    unreadable = [(index, reason) for index, image, reason in samples if image is None]
    return positions, stack(images) if images else None, unreadable


def make_parts(
    out: Path, parts: list[list[range]], done: int, embedder: Embedder, source: FileSource, config: Config
) -> None:
    """Writes the parts that are missing behind the first ones, of which so many are done.

    Raises:
        ValueError: At Ctrl-C.
    """
    workers = default_workers(on_gpu=embedder.device.type == "cuda")
    workers = workers if config["num_workers"] is None else config["num_workers"]
    notes = Notes(workers)
    loader = WatchedLoader(
        Crops(source, centre_transform(embedder.image_size), notes),
        notes=notes,
        name=source.name,
        timeout=config["timeout"],
        section="",
        batch_sampler=[batch for part in parts[done:] for batch in part],
        num_workers=workers,
        collate_fn=collate,
        pin_memory=embedder.device.type == "cuda",
        worker_init_fn=end_with_the_command,
    )
    begun = sum(map(len, [batch for part in parts[:done] for batch in part]))
    if begun:
        log.info(f"{begun:,} of {len(source):,} images are done already")
    with logging_redirect_tqdm(), tqdm(total=len(source), initial=begun, unit=" images") as bar:
        batches = iter(loader)
        for number in range(done, len(parts)):
            try:
                part = make_part(islice(batches, len(parts[number])), embedder, source, bar)
                write_part(out, number, part)
            except KeyboardInterrupt:
                raise ValueError(
                    f"stopped after {number} whole parts: the same command with out={shown(out)} goes on behind them"
                ) from None


def make_part(batches: Iterator[Any], embedder: Embedder, source: FileSource, bar: "tqdm[Any]") -> Part:
    """Computes the features of some batches."""
    positions: list[int] = []
    features = [torch.empty(0, *embedder.shape)]
    unreadable: list[tuple[int, str]] = []
    for readable, images, others in batches:
        if images is not None:
            features.append(embedder(images))
        for index, reason in others:
            log.warning(f"{source.name(index)} cannot be read ({reason}): left out")
        positions += readable
        unreadable += others
        bar.update(len(readable) + len(others))
    return Part(np.array(positions, dtype=np.int64), torch.cat(features).numpy(), unreadable)


def list_unreadable(file: Path, source: FileSource, unreadable: list[tuple[int, str]]) -> None:
    """Writes what was left out, and why, a line an image; no file where all could be read."""
    if unreadable:
        with whole_file(file) as temporary:
            lines = "".join(f"{source.name(index)}\t{reason}\n" for index, reason in unreadable)
            temporary.write_bytes(lines.encode("utf-8", "surrogateescape"))
        log.warning(f"{len(unreadable):,} images could not be read and are left out: {shown(file)}")


if __name__ == "__main__":
    command(embed)()
