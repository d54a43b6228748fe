"""Each implementation of the attention alone, by window: what the choice of `attention=auto` rests on."""

import statistics
from typing import Any

import torch

from simmim.encoders.attention import window_attention
from simmim.encoders.position_bias import log_spaced_offsets
from simmim.encoders.windows import Geometry, Windows, regions
from simmim.measuring.networks import Work
from simmim.measuring.speed import interleaved

CHANNELS, HEADS = 32, 3  # of the first stage of the small sizes


class AttentionRunner:
    """Forward and backward of one implementation, in shifted windows over a map of at least 48 x 48 tokens."""

    def __init__(self, name: str, window: int, work: Work) -> None:
        torch.set_flush_denormal(True)  # the -100 of the shifted windows makes denormals, which a CPU is slow with
        device = torch.device("cuda" if work.gpu else "cpu")
        side = window * max(2, 48 // window)
        shape = Windows.fit((side, side), window, shifted=True)
        windows, tokens = shape.shape
        dtype = torch.bfloat16 if work.bf16 else torch.float32
        size = (3, HEADS, CHANNELS, work.batch_size * windows, tokens)
        self.qkv = torch.randn(size, device=device, dtype=dtype, requires_grad=True)
        self.scale = torch.full((HEADS, 1, 1), 2.3, device=device, requires_grad=True)
        self.table = torch.randn(HEADS, 2 * window - 1, 2 * window - 1, device=device, requires_grad=True)
        offsets = log_spaced_offsets(shape.window, shape.window, device)
        self.geometry = Geometry(shape.window, offsets, regions(shape, device))
        self.gradient = torch.randn_like(self.qkv[0])
        self.name, self.gpu = name, work.gpu

    def __call__(self) -> None:
        """Once, to the end."""
        out = window_attention(
            self.qkv, log_scale=self.scale, table=self.table, geometry=self.geometry, implementation=self.name
        )
        torch.autograd.grad(out, (self.qkv, self.scale, self.table), self.gradient)
        if self.gpu:
            torch.cuda.synchronize()


def attention_table(work: Work, windows: list[int], *, rounds: int, warmup: int) -> list[dict[str, Any]]:
    """A row a window and implementation: `window`, `attention`, `ms` (median) and `ratio` of speed to the reference."""
    names = ["reference", "sdpa", "sequential", *(["flex"] if work.gpu else [])]
    rows = []
    for window in windows:
        seconds = interleaved(
            {name: AttentionRunner(name, window, work) for name in names}, rounds=rounds, warmup=warmup
        )
        for name in names:
            ratios = [ours / other for ours, other in zip(seconds["reference"], seconds[name], strict=True)]
            rows.append(
                {
                    "window": window,
                    "attention": name,
                    "ms": 1e3 * statistics.median(seconds[name]),
                    "ratio": statistics.median(ratios),
                }
            )
    return rows
