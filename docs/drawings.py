"""Draws the pictures of concepts.md: `python docs/drawings.py [folder]` writes them beside the page.

Nothing in them is typed: cells come from `Masking`, maps and windows from the encoder, distances from
`average_distance`. The image is one of the synthetic ones.
"""

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from simmim.data.synthetic import SyntheticSource
from simmim.encoders import SwinTransformerV2, create_encoder
from simmim.encoders.windows import Windows
from simmim.masking import Masking, average_distance, expand_mask
from simmim.pictures import GREY

SIDE, SEED = 192, 5
HIDDEN, WINDOW, SHIFTED, TEXT = "#ffffff", "#0d9488", "#facc15", "#1f2937"
STYLE = {
    "svg.fonttype": "none",  # words stay words: they can be found, and tested
    "svg.hashsalt": "simmim",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 8,
    "text.color": TEXT,
}


def geometry() -> tuple[Masking, SwinTransformerV2]:
    """Masking and encoder of the published sizes at 192 px: what the drawings show."""
    with torch.device("meta"):  # its geometry needs no values
        encoder = create_encoder("swinv2_t", window_size=12)
    masking = Masking((SIDE, SIDE), patch_size=32, ratio=0.6, strategy="random", model_patch_size=encoder.patch_size)
    return masking, encoder


def photograph() -> torch.Tensor:
    """A synthetic image (H, W, 3) between 0 and 1."""
    small = SyntheticSource(19, (SIDE // 2, SIDE // 2)).load(18)[0].permute(1, 2, 0) / 255  # a quarter of the bytes
    return small.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)


def draw_grids(path: Path) -> None:
    """What is hidden, what a token is, and what attends to what: three views of the same image."""
    masking, encoder = geometry()
    mask = masking(torch.Generator().manual_seed(SEED))
    hidden, cells = int(mask.sum()), mask.numel()
    token, window = encoder.patch_size, encoder.window_size
    map_side, cell = SIDE // token, masking.patch_size
    figure = Figure(figsize=(7.2, 3.3), layout="constrained", facecolor="white")
    cells_axis, tokens_axis, windows_axis = figure.subplots(1, 3)

    masked = photograph().masked_fill(expand_mask(mask[None], SIDE, SIDE)[0][..., None], GREY)
    _show(cells_axis, masked, f"mask patch: {cell} px\nmasking.patch_size={cell}")
    _lines(cells_axis, cell, colour="white", width=0.8)
    cells_axis.set_xlabel(
        f"{hidden} of {cells} cells are hidden:\nceil({masking.ratio} x {cells}),\nmasking.ratio={masking.ratio}"
    )

    row, column = (int(at) * cell for at in mask.nonzero()[hidden // 2])
    _show(tokens_axis, masked, f"model patch: {token} px\nmodel.patch_size={token}")
    _lines(tokens_axis, token, colour="white", width=0.25)
    tokens_axis.add_patch(Rectangle((column, row), cell, cell, fill=False, edgecolor=HIDDEN, linewidth=2))
    side = cell // token
    tokens_axis.set_xlabel(
        f"{map_side} x {map_side} tokens.\nA hidden cell is {side} x {side} of them,\nand each becomes the mask token"
    )

    _show(windows_axis, masked, f"window: {window} tokens = {window * token} px\nmodel.window_size={window}")
    _windows(windows_axis, Windows.fit((map_side, map_side), window), token, WINDOW, "-")
    shifted = Windows.fit((map_side, map_side), window, shifted=True)
    _windows(windows_axis, shifted, token, SHIFTED, "--")
    windows_axis.set_xlabel(
        f"Tokens attend within a window.\nIn every second block windows\nare shifted by {shifted.shift[0]} tokens "
        f"= {shifted.shift[0] * token} px"
    )
    _save(figure, path)


def draw_stages(path: Path) -> None:
    """The maps of the stages: fewer tokens, each of more pixels, until one stands for a hidden cell."""
    masking, encoder = geometry()
    figure = Figure(figsize=(7.2, 2.5), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(encoder.channels))
    image = photograph()
    for stage, (axis, (window, _)) in enumerate(zip(axes, encoder.windows(SIDE, SIDE), strict=True)):
        pixels = encoder.patch_size * 2**stage
        tokens = SIDE // pixels
        _show(axis, image, f"stage {stage + 1}\n{tokens} x {tokens} tokens of {pixels} px")
        _lines(axis, pixels, colour="white", width=min(1.0, pixels / 16))
        _windows(axis, Windows.fit((tokens, tokens), encoder.window_size), pixels, WINDOW, "-")
        shrunk = " (the map)" if window < encoder.window_size else ""
        axis.set_xlabel(f"window {window}{shrunk} = {window * pixels} px")
    axes[-1].set_xlabel(f"{axes[-1].get_xlabel()}\nstride {encoder.stride} px, mask patch {masking.patch_size} px")
    _save(figure, path)


def draw_distances(path: Path) -> None:
    """The same share hidden in other pieces, and how far a hidden pixel then is from the nearest visible one."""
    choices = [("random", 8), ("random", 16), ("random", 32), ("random", 64), ("square", 16), ("block", 16)]
    figure = Figure(figsize=(7.2, 1.65), layout="constrained", facecolor="white")
    for axis, (strategy, patch_size) in zip(figure.subplots(1, len(choices)), choices, strict=True):
        distance, mask = distance_of(strategy, patch_size)
        masked = photograph().masked_fill(expand_mask(mask[None], SIDE, SIDE)[0][..., None], GREY)
        _show(axis, masked, f"{strategy}\n{patch_size} px")
        axis.set_xlabel(f"{distance:.1f} px")
    _save(figure, path)


def distance_of(strategy: str, patch_size: int, *, masks: int = 20) -> tuple[float, torch.Tensor]:
    """AvgDist of masks at a ratio of 0.6, their mean, and the first of them."""
    _, encoder = geometry()
    masking = Masking(
        (SIDE, SIDE), patch_size=patch_size, ratio=0.6, strategy=strategy, model_patch_size=encoder.patch_size
    )
    drawn = [masking(torch.Generator().manual_seed(seed)) for seed in range(masks)]
    return sum(average_distance(mask, patch_size) for mask in drawn) / masks, drawn[0]


DRAWINGS = {"grids.svg": draw_grids, "stages.svg": draw_stages, "avgdist.svg": draw_distances}


def _show(axis: Axes, image: torch.Tensor, title: str) -> None:
    axis.imshow(image.numpy(), extent=(0, SIDE, SIDE, 0), interpolation="nearest")
    axis.set_title(title, fontsize=8.5)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _lines(axis: Axes, pixels: int, *, colour: str, width: float) -> None:
    for at in range(pixels, SIDE, pixels):
        axis.axhline(at, color=colour, linewidth=width)
        axis.axvline(at, color=colour, linewidth=width)


def _windows(axis: Axes, windows: Windows, pixels: int, colour: str, line: str) -> None:
    """Borders of the windows; a shift rolls the map up and left, so they lie that much further down and right."""
    for length, shift, size, draw in zip(
        windows.window, windows.shift, windows.size, (axis.axhline, axis.axvline), strict=True
    ):
        for at in range(shift, size + 1, length):
            draw(at * pixels, color=colour, linewidth=1.6, linestyle=line)


def _save(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    with matplotlib.rc_context(STYLE):
        for name, draw in DRAWINGS.items():
            draw(folder / name)
