"""Compares ways to turn JPEG files into augmented uint8 tensors, on one core.

python -m benchmarks.decoding FOLDER --out benchmarks/decoding.md
"""

import argparse
import io
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as v1
from torchvision.transforms.v2 import functional as v2

from simmim.data.decoding import decode

SIZE = 192  # px
SCALE = (0.67, 1.0)
RATIO = (3 / 4, 4 / 3)

Box = tuple[int, int, int, int]  # top, left, height, width in pixels


def pil_v1(data: bytes, box: Box, flip: bool) -> Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = v1.resized_crop(image, *box, [SIZE, SIZE])
    return v1.pil_to_tensor(v1.hflip(image) if flip else image)


def ours_v2(data: bytes, box: Box, flip: bool) -> Tensor:
    return tensor_crop(decode(data, 3), box, flip)


def pil_v2(data: bytes, box: Box, flip: bool) -> Tensor:
    pixels = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    return tensor_crop(torch.from_numpy(pixels).permute(2, 0, 1), box, flip)


def tensor_crop(image: Tensor, box: Box, flip: bool) -> Tensor:
    image = v2.resized_crop(image, *box, [SIZE, SIZE], antialias=True)
    return v2.horizontal_flip(image) if flip else image


METHODS: dict[str, Callable[[bytes, Box, bool], Tensor]] = {
    "(a) PIL, v1 transforms on the PIL image": pil_v1,
    "(b) `simmim.data.decoding`, v2 on uint8 tensors": ours_v2,
    "(c) PIL, v2 on uint8 tensors": pil_v2,
}


def samples(folder: Path, seed: int = 0) -> list[tuple[bytes, Box, bool]]:
    """The upright JPEG files in memory, each with its own fixed crop and flip."""
    torch.manual_seed(seed)
    random.seed(seed)
    chosen = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in (".jpg", ".jpeg"):
            continue
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if image.getexif().get(0x0112, 1) == 1:  # (a) and (c) do not turn images
                box = RandomResizedCrop.get_params(image, list(SCALE), list(RATIO))
                chosen.append((data, box, random.random() < 0.5))
    return chosen


def seconds(method: Callable[[bytes, Box, bool], Tensor], items: list[tuple[bytes, Box, bool]]) -> float:
    start = time.perf_counter()
    for item in items:
        method(*item)
    return time.perf_counter() - start


def psnr(method: Callable[[bytes, Box, bool], Tensor], items: list[tuple[bytes, Box, bool]]) -> float:
    """Peak signal-to-noise ratio in dB against (a), from the squared error over all images."""
    errors = [(method(*item).float() - pil_v1(*item).float()).square().mean().item() for item in items]
    mean = statistics.fmean(errors)
    return 10 * float(np.log10(255**2 / mean)) if mean else float("inf")


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of JPEG files")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved passes over the folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    items = samples(arguments.folder)
    if not items:
        parser.error(f"{arguments.folder} holds no JPEG file")

    for method in METHODS.values():  # warm up
        seconds(method, items[:20])
    passes = [{name: seconds(METHODS[name], items) for name in METHODS} for _ in range(arguments.repeats)]
    median = {name: statistics.median(one[name] for one in passes) for name in METHODS}
    base = next(iter(METHODS))

    lines = [
        "# JPEG decoding and augmentation on one core",
        "",
        f"Decode, RandomResizedCrop({SIZE}, scale {SCALE[0]}-{SCALE[1]:g}, bilinear) and horizontal flip",
        "to a uint8 tensor, the same boxes and flips for all; files in memory.",
        "",
        "| method | images/s | ratio to (a) | PSNR against (a) |",
        "|---|---:|---:|---:|",
    ]
    for name, method in METHODS.items():
        ratio = statistics.median(one[base] / one[name] for one in passes)
        quality = "-" if name == base else f"{psnr(method, items):.1f} dB"
        lines.append(f"| {name} | {len(items) / median[name]:.0f} | {ratio:.2f} | {quality} |")
    lines += [
        "",
        f"* {len(items)} files, medians of {arguments.repeats} interleaved passes",
        f"* command: `python -m benchmarks.decoding {shlex.join(sys.argv[1:])}`",
        f"* torch {torch.__version__}, torchvision {torchvision.__version__}, pillow {PIL.__version__}, "
        f"Python {platform.python_version()}",
        f"* device: CPU {cpu_model()}, 1 thread",
        f"* date: {date.today().isoformat()}",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
