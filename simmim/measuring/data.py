"""How fast images come: decoding and cropping on one core, and batches from the training loader."""

import copy
import io
import itertools
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as v1

from simmim.data.decoding import UnreadableImage, decode, is_upright_jpeg
from simmim.data.files import FileSource
from simmim.data.folder import FolderSource
from simmim.data.module import ImageData
from simmim.data.shards import PreparedImage, ShardSource, shard_path, shrink, write_index, write_shard
from simmim.data.transforms import Box, random_box, resized_crop

CROP_SCALE, CROP_RATIO = (0.67, 1.0), (3 / 4, 4 / 3)  # of the paper, whatever a run's config says
SHORT_SIDE, QUALITY = 256, 90  # of the prepared copy, as the command makes it
BASELINE = "PIL, torchvision v1 on the PIL image"

Crop = tuple[bytes, Box, bool]
"""A JPEG file, the box to cut out, and whether to flip it."""


def decoding_table(folder: Path, image_size: tuple[int, int], *, repeats: int) -> list[dict[str, Any]]:
    """Decode, crop, resize and flip JPEG files on one core: PIL's way, ours, and ours from a prepared copy.

    The files are read beforehand. Methods take turns, pass by pass, so that other work on the machine hits all.

    Args:
        folder: Images; of them the upright JPEG files count, since PIL's way does not turn the others.
        image_size: Height and width of the crops in pixels.
        repeats: Passes over the folder.

    Returns:
        A row a method: `method`, `images_per_s` (median of the passes), `ratio` to the first row (median of the
        ratios within a pass), `psnr_db` against the first row where the pixels should be the same, else None.

    Raises:
        ValueError: If there is no such file.
    """
    source = _upright_jpegs(FolderSource(folder))
    with tempfile.TemporaryDirectory() as place, one_thread():
        files, prepared = _crops(source), _crops(_prepared(source, Path(place)))
        methods: dict[str, tuple[Callable[[Crop], Any], list[Crop]]] = {
            BASELINE: (lambda crop: pil_crop(crop, image_size), files),
            "simmim, from files": (lambda crop: tensor_crop(crop, image_size), files),
            "simmim, from a prepared copy": (lambda crop: tensor_crop(crop, image_size), prepared),
            "simmim, from files, decoding alone": (lambda crop: decode(crop[0], 3), files),
        }
        for method, crops in methods.values():
            _seconds(method, crops[:20])  # warm up
        passes = [{name: _seconds(*how) for name, how in methods.items()} for _ in range(repeats)]
        noise = {"simmim, from files": _psnr(files, image_size)}
    return [
        {
            "method": name,
            "images_per_s": len(files) / statistics.median(one[name] for one in passes),
            "ratio": statistics.median(one[BASELINE] / one[name] for one in passes),
            "psnr_db": noise.get(name),
        }
        for name in methods
    ]


def loader_table(data: ImageData, workers: Sequence[int], *, seconds: float) -> list[dict[str, Any]]:
    """What the training loader gives: read, decode, crop, flip, mask, collate.

    Args:
        data: As the training builds it; its own number of workers does not matter here.
        workers: Numbers of loader processes to try; 0 loads in this one.
        seconds: How long to measure each, once its processes have started.

    Returns:
        A row a number: `workers`, `images_per_s`.
    """
    return [{"workers": count, "images_per_s": _loader_speed(data, count, seconds)} for count in workers]


def workers_needed(table: Sequence[dict[str, Any]], images_per_s: float) -> int:
    """Loader processes that keep up with a model: the fewest measured, or more at the best rate of one of them.

    Args:
        table: Rows of `loader_table`, at least one of them with a worker.
        images_per_s: Speed of the model on one device.
    """
    rates: dict[int, float] = {row["workers"]: row["images_per_s"] for row in table if row["workers"] > 0}
    if enough := [count for count, rate in rates.items() if rate >= images_per_s]:
        return min(enough)
    return math.ceil(images_per_s / max(rate / count for count, rate in rates.items()))


def pil_crop(crop: Crop, image_size: tuple[int, int]) -> Tensor:
    """The way of most training code: uint8 (3, H, W)."""
    data, box, flip = crop
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = v1.resized_crop(image, *box, list(image_size))
    pixels: Tensor = v1.pil_to_tensor(v1.hflip(image) if flip else image)
    return pixels


def tensor_crop(crop: Crop, image_size: tuple[int, int]) -> Tensor:
    """Our way: uint8 (3, H, W)."""
    data, box, flip = crop
    image = resized_crop(decode(data, 3), box, image_size)
    return image.flip(-1) if flip else image


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block PyTorch computes on one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _upright_jpegs(source: FolderSource) -> FolderSource:
    chosen = [index for index in range(len(source)) if _is_usable(source, index)]
    if not chosen:
        raise ValueError(f"data.root={source.root} holds no upright JPEG file, with which decoding is measured")
    return source.subset(chosen)


def _is_usable(source: FolderSource, index: int) -> bool:
    try:
        data = source.read(index)
        return decode(data, 3).numel() > 0 and is_upright_jpeg(data)
    except UnreadableImage:
        return False


def _prepared(source: FolderSource, out: Path) -> ShardSource:
    images = (
        PreparedImage(source.relative_name(index), source.label(index), shrink(source.read(index), SHORT_SIDE, QUALITY))
        for index in range(len(source))
    )
    record = write_shard(shard_path(out, 0), images, limit=2**62)
    write_index(out, [record], source.classes, listed=len(source), short_side=SHORT_SIDE)
    return ShardSource(out)


def _crops(source: FileSource) -> list[Crop]:
    """The files in memory, each with its own fixed box and flip."""
    flips, crops = random.Random(0), []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for index in range(len(source)):
            data = source.read(index)
            height, width = decode(data, 3).shape[-2:]
            crops.append((data, random_box(height, width, CROP_SCALE, CROP_RATIO), flips.random() < 0.5))
    return crops


def _seconds(method: Callable[[Crop], Any], crops: list[Crop]) -> float:
    start = time.perf_counter()
    for crop in crops:
        method(crop)
    return time.perf_counter() - start


def _psnr(crops: list[Crop], image_size: tuple[int, int]) -> float:
    """Peak signal-to-noise ratio in dB of our way against PIL's, from the squared error over all images."""
    differences = (tensor_crop(crop, image_size).float() - pil_crop(crop, image_size).float() for crop in crops)
    error = statistics.fmean(float(difference.square().mean()) for difference in differences)
    return 10 * math.log10(255**2 / error) if error else math.inf


def _loader_speed(data: ImageData, workers: int, seconds: float) -> float:
    """Images a second, after what the processes made ahead while they started is used up."""
    data = copy.copy(data)
    data.num_workers, data.num_batches = workers, 2**40
    batches = iter(data.loader_from(0))
    for _ in itertools.islice(batches, 1 + 2 * workers):
        pass
    images, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds or not images:
        images += len(next(batches)["image"])
    return images / spent
