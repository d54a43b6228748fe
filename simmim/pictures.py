"""What a person sees of a model: original, masked, reconstruction, and both together."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from simmim.masking import expand_mask
from simmim.run_folder import whole_file

GREY = 0.5
"""Colour of a hidden cell in a picture."""

LONGEST_NAME = 24
"""Letters of a class that a picture shows."""

MOST_NUMBERED = 20
"""Up to so many classes, their counts can be read in a picture."""

PANELS = ("original", "masked", "reconstruction", "with visible part")


def four_panels(original: Tensor, reconstruction: Tensor, mask: Tensor) -> Tensor:
    """The four panels of a batch.

    Args:
        original: (B, C, H, W) between 0 and 1.
        reconstruction: Alike, predicted everywhere.
        mask: Boolean (B, h, w) cells, True is hidden.

    Returns:
        (B, 4, C, H, W): original, original with grey cells, reconstruction, and the reconstruction of the hidden
        cells pasted into the original.
    """
    hidden = expand_mask(mask, *original.shape[-2:])[:, None]  # (B, 1, H, W)
    masked = original.masked_fill(hidden, GREY)
    pasted = torch.where(hidden, reconstruction, original)
    return torch.stack([original, masked, reconstruction, pasted], dim=1)


def draw_panels(panels: Tensor, path: Path, *, titles: Sequence[str] = PANELS, caption: str = "") -> None:
    """Writes a PNG of rows of images, one row a sample, one column a panel.

    Args:
        panels: (rows, columns, C, H, W) between 0 and 1. One channel is drawn grey; of more than three, the first
            three are drawn.
        path: File to write; its folder is made.
        titles: One a column.
        caption: A line below.
    """
    rows, columns, _, height, width = panels.shape
    side = 1.9  # inches of a panel's width
    row_height = side * height / width
    figure = Figure(figsize=(columns * side, rows * row_height + 0.55), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, images in enumerate(panels):
        for column, image in enumerate(images):
            axis = axes[row, column]
            axis.imshow(_for_display(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(titles[column], fontsize=9)
    if caption:
        figure.supxlabel(caption, fontsize=7, color="0.35")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=max(110, min(300, width / side)))


def _for_display(image: Tensor) -> NDArray[np.float32]:
    image = image.detach().float().cpu().clamp(0, 1)
    image = image[:3] if image.shape[0] >= 3 else image[:1]
    return image.permute(1, 2, 0).squeeze(-1).numpy()


def draw_confusion(confusion: Tensor, classes: Sequence[str], path: Path, *, title: str) -> None:
    """Writes a PNG of what was taken for what.

    Args:
        confusion: (N, N) counts: the true classes in rows, what was said in columns.
        classes: Their N names.
        path: File to write; its folder is made.
        title: A line above.
    """
    count = len(classes)
    shares = (confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    side = min(12.0, max(4.0, 0.32 * count)) + 2.2  # inches
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    names = [_drawable(name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…") for name in classes]
    size = max(3.0, min(9.0, 260 / count))  # points
    axis.set_xticks(range(count), names, rotation=90, fontsize=size, parse_math=False)  # a $ is no formula
    axis.set_yticks(range(count), names, fontsize=size, parse_math=False)
    axis.set_xlabel("taken for")
    axis.set_ylabel("is")
    axis.set_title(title, fontsize=9)
    if count <= MOST_NUMBERED:
        for row, column in confusion.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = str(int(confusion[row, column]))
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _drawable(name: str) -> str:
    """A name of any bytes as letters; what is none becomes a question mark."""
    return name.encode("utf-8", "replace").decode("utf-8")
