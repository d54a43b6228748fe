"""What a person sees of a model: original, masked, reconstruction, and both together."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
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

RANGE = (0.02, 0.98)
"""Shares of the pixels of a channel that are darker than black and white in a stretched picture."""

MOST_TICKS = 8
"""Up to so many values have a tick of their own."""

PANELS = ("original", "masked", "reconstruction", "with visible part")


@dataclass(frozen=True)
class Point:
    """What one run has come to.

    Args:
        x: A number, or a word.
        y: A number.
        kind: Points of a kind have one colour, and are joined by their means where x is a number.
        label: Stands beside the point.
        whole: Whether the run has ended; else the point is hollow.
    """

    x: float | str
    y: float
    kind: str
    label: str = ""
    whole: bool = True


@dataclass(frozen=True)
class Panel:
    """Points over one axis.

    Args:
        points: At least one.
        xlabel: With its unit.
        ylabel: Likewise.
        logarithmic: Whether x is.
        logarithmic_y: Whether y is.
    """

    points: Sequence[Point]
    xlabel: str
    ylabel: str
    logarithmic: bool = False
    logarithmic_y: bool = False


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


def choose_channels(count: int, chosen: Sequence[int] | None) -> list[int]:
    """The channels that a picture shows: three as red, green and blue, or one as grey.

    Args:
        count: Channels that there are.
        chosen: Given as `picture_channels`; None for the first three, or of fewer the first.

    Raises:
        ValueError: If one is chosen that there is not.
    """
    if chosen is None:
        return [0, 1, 2] if count >= 3 else [0]
    if max(chosen) >= count:
        said = ",".join(map(str, chosen))
        raise ValueError(f"picture_channels=[{said}]: data.channels={count} are numbered from 0 to {count - 1}")
    return list(chosen)


def stretch(images: Tensor, originals: Tensor) -> Tensor:
    """Makes images readable: the 2nd percentile of a channel becomes black, the 98th white.

    Args:
        images: (B, C, H, W).
        originals: What the percentiles are taken of, each channel of each image alone: all panels of an image go by
            those of its original.

    Returns:
        (B, C, H, W), clipped to 0 to 1.
    """
    pixels = originals.flatten(2)
    low, high = (pixels.kthvalue(1 + round(share * (pixels.shape[2] - 1)))[0][..., None, None] for share in RANGE)
    width = torch.where(high > low, high - low, 1)  # a channel may be constant
    return ((images - low) / width).clamp(0, 1)


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


def draw_position_bias(
    tables: Sequence[Tensor], path: Path, *, titles: Sequence[str], trained_window: tuple[int, int], caption: str = ""
) -> None:
    """Writes a PNG of position biases over the plane of offsets, one row a head, one column a window.

    All share one scale of colours. A square marks the offsets that the trained window has: what lies outside of it
    was never trained.

    Args:
        tables: (n, 2h - 1, 2w - 1) each, row offset before column offset, for windows of (h, w) tokens.
        path: File to write; its folder is made.
        titles: One a column.
        trained_window: Height and width in tokens.
        caption: A line below.
    """
    heads, side = len(tables[0]), 2.1  # inches of a panel
    height, width = (2 * length - 1 for length in trained_window)  # offsets
    tables = [table.detach().float().cpu() for table in tables]
    low, high = min(float(table.min()) for table in tables), max(float(table.max()) for table in tables)
    figure = Figure(figsize=(len(tables) * side + 0.9, heads * side + 0.5), layout="constrained")
    axes = figure.subplots(heads, len(tables), squeeze=False)
    for column, (table, title) in enumerate(zip(tables, titles, strict=True)):
        rows, columns = (length // 2 for length in table.shape[1:])
        extent = (-columns - 0.5, columns + 0.5, rows + 0.5, -rows - 0.5)
        for head in range(heads):
            axis = axes[head, column]
            image = axis.imshow(table[head].numpy(), extent=extent, vmin=low, vmax=high, cmap="viridis")
            axis.add_patch(Rectangle((-width / 2, -height / 2), width, height, fill=False, edgecolor="w"))
            axis.set_xticks([-columns, 0, columns])
            axis.set_yticks([-rows, 0, rows])
            axis.tick_params(labelsize=7, length=2)
        axes[0, column].set_title(title, fontsize=9)
    for head in range(heads):
        axes[head, 0].set_ylabel(f"head {head + 1}", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 1.6 / heads), pad=0.01)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.set_label("bias added to the logit", fontsize=8)
    if caption:
        figure.supxlabel(caption, fontsize=8, color="0.35")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def draw_runs(
    panels: Sequence[Panel],
    path: Path,
    *,
    title: str,
    kinds: str = "",
    band: tuple[float, float, str] | None = None,
    caption: str = "",
) -> None:
    """Writes a PNG of what the runs of a sweep have come to.

    Args:
        panels: Side by side, with the same kinds of points.
        path: File to write; its folder is made.
        title: A line above.
        kinds: What the kinds are, above their names.
        band: Part of each x axis to shade: from, to, and what it is.
        caption: A line below.
    """
    names = list(dict.fromkeys(point.kind for panel in panels for point in panel.points))
    colours = {name: colormaps["viridis"](0.9 * index / max(1, len(names) - 1)) for index, name in enumerate(names)}
    figure = Figure(figsize=(1.2 + 4.4 * len(panels), 4.6), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if band is not None:
            axis.axvspan(band[0], band[1], color="tab:green", alpha=0.12, lw=0, label=band[2])
        for index, name in enumerate(names):
            points = [point for point in panel.points if point.kind == name]
            _draw_kind(axis, points, colours[name], name, below=index % 2 == 0)
        if panel.logarithmic:
            axis.set_xscale("log")
            _tick_values(axis, panel.points)
        if panel.logarithmic_y:
            axis.set_yscale("log")
        axis.margins(x=0.12, y=0.12)
        axis.set_xlabel(panel.xlabel)
        axis.set_ylabel(panel.ylabel)
        axis.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(names) > 1 or band is not None:
        figure.legend(handles, labels, title=kinds, loc="outside lower center", ncols=min(5, len(labels)), fontsize=8)
    figure.suptitle(title, fontsize=10)
    if caption:
        figure.supxlabel(caption, fontsize=8, color="0.35")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _draw_kind(axis: Any, points: Sequence[Point], colour: Any, name: str, *, below: bool) -> None:
    """Joined where x is a number; each with its label, right below or left above; unfinished ones are hollow."""
    means: dict[Any, list[float]] = {}  # where several runs differ by their seeds alone
    for point in points:
        means.setdefault(point.x, []).append(point.y)
    if not any(isinstance(x, str) for x in means):
        joined = sorted(means)
        axis.plot(joined, [statistics.mean(means[x]) for x in joined], color=colour, alpha=0.5, lw=1)
    axis.plot([], [], "o", color=colour, label=_drawable(name))
    for point in points:
        axis.plot([point.x], [point.y], "o", color=colour, mfc=colour if point.whole else "white")
        axis.annotate(
            _drawable(point.label),
            (point.x, point.y),
            xytext=(6, -4) if below else (-6, 4),
            textcoords="offset points",
            ha="left" if below else "right",
            va="top" if below else "bottom",
            fontsize=8,
            color="0.25",
            parse_math=False,
        )


def _tick_values(axis: Any, points: Sequence[Point]) -> None:
    """A tick for each value of x, where there is room."""
    values = sorted({point.x for point in points if not isinstance(point.x, str)})
    if len(values) <= MOST_TICKS:
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.set_xticks([], minor=True)


def _drawable(name: str) -> str:
    """A name of any bytes as letters; what is none becomes a question mark."""
    return name.encode("utf-8", "replace").decode("utf-8")
