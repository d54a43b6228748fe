"""Which cells of an image are hidden (SimMIM, arXiv 2111.09886, section 3.2).

A mask is a boolean (h, w) grid over the image, one element a cell of `patch_size` pixels a side:
True is hidden, False is visible. It is always drawn from an explicit generator, on that generator's device.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def random_mask(height: int, width: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Hides ceil(ratio * cells) cells chosen at random: SimMIM's own strategy.

    Returns:
        Boolean (height, width), True is hidden.
    """
    order = torch.randperm(height * width, generator=generator, device=generator.device)
    return (order < math.ceil(ratio * height * width)).view(height, width)


def square_mask(height: int, width: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Hides one rectangle of the grid's own aspect, at a random place (SimMIM figure 3, "square").

    The number of hidden cells is the nearest that whole rows and columns allow.

    Returns:
        Boolean (height, width), True is hidden.
    """
    rows, columns = (max(1, min(n - 1, round(n * math.sqrt(ratio)))) if n > 1 else 1 for n in (height, width))
    top = _randint(0, height - rows, generator)
    left = _randint(0, width - columns, generator)
    mask = torch.zeros(height, width, dtype=torch.bool, device=generator.device)
    mask[top : top + rows, left : left + columns] = True
    return mask


def block_mask(height: int, width: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Hides overlapping random blocks until exactly ceil(ratio * cells) are hidden (BEiT, algorithm 1).

    A block's area is at least 16/196 of the grid (BEiT's 16 patches of 14 x 14) and its aspect ratio lies
    between 0.3 and 1/0.3. The last block gives back what it hides too much, so that every image of a batch
    hides the same number of cells.

    Returns:
        Boolean (height, width), True is hidden.
    """
    cells = height * width
    wanted = math.ceil(ratio * cells)
    mask = torch.zeros(height, width, dtype=torch.bool, device=generator.device)
    while (missing := wanted - int(mask.sum())) > 0:
        smallest = max(1.0, cells * 16 / 196)
        area = _uniform(smallest, max(smallest, missing), generator)
        aspect = math.exp(_uniform(math.log(0.3), -math.log(0.3), generator))
        rows = max(1, min(height, round(math.sqrt(area * aspect))))
        columns = max(1, min(width, round(math.sqrt(area / aspect))))
        top, left = _randint(0, height - rows, generator), _randint(0, width - columns, generator)
        block = torch.zeros_like(mask)
        block[top : top + rows, left : left + columns] = True
        new = (block & ~mask).flatten().nonzero()[:missing]
        mask.view(-1)[new] = True
    return mask


STRATEGIES: dict[str, Callable[[int, int, float, torch.Generator], Tensor]] = {
    "random": random_mask,
    "square": square_mask,
    "block": block_mask,
}


class Masking:
    """Draws the mask of one image; all settings are checked once, here.

    Args:
        image_size: Height and width of the images in pixels.
        patch_size: Side of a masked cell in pixels.
        ratio: Share of the cells to hide, between 0 and 1.
        strategy: "random" (SimMIM), "square" or "block" (the comparison of the paper).
        model_patch_size: Side of the encoder's own patches in pixels: a cell covers whole patches.

    Raises:
        ValueError: If the settings contradict each other.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        *,
        patch_size: int,
        ratio: float,
        strategy: str,
        model_patch_size: int,
    ) -> None:
        height, width = image_size
        if strategy not in STRATEGIES:
            raise ValueError(f"masking.strategy={strategy} is unknown: choose one of {', '.join(STRATEGIES)}")
        if not 0 < ratio < 1:
            raise ValueError(f"masking.ratio={ratio} must lie between 0 and 1, both excluded: the paper uses 0.6")
        if patch_size < 1 or patch_size % model_patch_size:
            nearest_cell = max(1, round(patch_size / model_patch_size)) * model_patch_size
            raise ValueError(
                f"masking.patch_size={patch_size} must be a multiple of model.patch_size={model_patch_size}, since a "
                f"hidden cell covers whole patches: take {nearest_cell}"
            )
        if height % patch_size or width % patch_size:
            nearest = [max(1, round(size / patch_size)) * patch_size for size in (height, width)]
            raise ValueError(
                f"data.image_size={height}x{width} is not a multiple of masking.patch_size={patch_size}: "
                f"take {nearest[0]}x{nearest[1]}, or another masking.patch_size"
            )
        self.grid = (height // patch_size, width // patch_size)
        self.patch_size = patch_size
        self.ratio = ratio
        self.strategy = strategy
        if math.ceil(ratio * math.prod(self.grid)) >= math.prod(self.grid):
            raise ValueError(
                f"masking.ratio={ratio} hides all {math.prod(self.grid)} cells of masking.patch_size={patch_size}: "
                "take a lower ratio or smaller cells"
            )

    def __call__(self, generator: torch.Generator) -> Tensor:
        """Draws a boolean (h, w) mask on the generator's device, True is hidden."""
        return STRATEGIES[self.strategy](*self.grid, self.ratio, generator)


def expand_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Repeats each cell of a (B, h, w) mask so that it covers a (B, height, width) map.

    Raises:
        ValueError: If h and w do not divide height and width.
    """
    rows, columns = mask.shape[-2:]
    if height % rows or width % columns:
        raise ValueError(f"a mask of {rows}x{columns} cells does not divide a map of {height}x{width}")
    return mask.repeat_interleave(height // rows, dim=-2).repeat_interleave(width // columns, dim=-1)


def average_distance(mask: Tensor, patch_size: int) -> float:
    """AvgDist: mean Euclidean distance from a hidden pixel to the nearest visible one (SimMIM section 4.1.2).

    The paper finds 10 to 20 pixels good, over strategies, cell sizes and ratios.

    Args:
        mask: Boolean (h, w) cells, True is hidden.
        patch_size: Side of a cell in pixels.

    Returns:
        The distance in pixels; 0 if nothing is hidden, infinity if everything is.
    """
    hidden = expand_mask(mask[None].cpu(), mask.shape[0] * patch_size, mask.shape[1] * patch_size)[0]  # (H, W)
    if not hidden.any():
        return 0.0
    height, width = hidden.shape
    y, x = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
    # Exact distance transform, one axis after the other: first within a row, then over the rows.
    visible_cost = torch.where(hidden, torch.inf, 0.0).double()  # (H, W)
    in_row = torch.stack([(visible_cost + (x - at) ** 2).amin(dim=1) for at in x], dim=1)  # (H, W), squared
    squared = torch.stack([(in_row + (y - at)[:, None] ** 2).amin(dim=0) for at in y])  # (H, W)
    return float(squared.sqrt()[hidden].mean())


def _randint(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator, device=generator.device))


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, device=generator.device))
