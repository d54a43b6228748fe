"""The networks that are compared, and the work that each one does: a training step, or the forward pass alone."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simmim.encoders import create_encoder
from simmim.measuring.peers import create_peer
from simmim.tasks.pretraining import MaskedImageModel
from simmim.training.optimizer import create_optimizer

OURS = "simmim"

OBJECTIVE: dict[str, Any] = {
    "head": "linear",
    "loss": "l1",
    "predict": "hidden",
    "target": "raw",
    "target_window": 47,
    "target_downsampling": 1,
}
"""What is measured is trained with: arguments of `MaskedImageModel`."""


@dataclass(frozen=True)
class Work:
    """What is measured.

    Args:
        model: Arguments of `create_encoder`.
        image_size: Height and width in pixels.
        batch_size: Images a step.
        bf16: Whether in bfloat16 by autocast, else in fp32.
        compiled: Whether compiled: ours a block at a time, peers as a whole.
        training: Whether a training step (forward, backward, fused AdamW), else the forward pass alone.
        activation_checkpointing: Of our blocks: see `Encoder.checkpoint_activations`.
        gpu: Whether on a GPU.
    """

    model: dict[str, Any]
    image_size: tuple[int, int]
    batch_size: int
    bf16: bool = False
    compiled: bool = False
    training: bool = True
    activation_checkpointing: str | Sequence[int] = "none"
    gpu: bool = False

    def changed(self, **changes: Any) -> "Work":
        """The same with other values."""
        return Work(**{**asdict(self), **changes})


class Runner:
    """One network with its optimizer and one batch, ready to do its work again and again.

    All networks of a work begin with the same weights (norms at one, not at the zeros of a new encoder, so that
    nothing is multiplied by zero), and see the same images and masks: their losses agree.
    """

    def __init__(self, name: str, work: Work) -> None:
        torch.manual_seed(0)
        torch.set_flush_denormal(True)  # the -100 of the shifted windows makes denormals, which a CPU is slow with
        encoder = create_encoder(**work.model)
        for key, parameter in encoder.named_parameters():
            if "norm" in key and key.endswith("weight"):
                nn.init.ones_(parameter)
        ours = MaskedImageModel(encoder, **OBJECTIVE)
        self.work = work
        self.device = torch.device("cuda" if work.gpu else "cpu")
        self.network = (ours if name == OURS else create_peer(name, ours, work.image_size)).to(self.device)
        if name == OURS:
            encoder.checkpoint_activations(work.activation_checkpointing)
        if work.compiled and name == OURS:
            encoder.compile_blocks()
        elif work.compiled:
            self.network.compile()
        self.optimizer = create_optimizer(
            self.network, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, layer_decay=1
        )
        self.images, self.mask = (x.to(self.device) for x in batch_of(work))

    def __call__(self) -> float:
        """Does the work once, to the end. Returns the loss."""
        if not self.work.training:
            with torch.no_grad(), self.precision():
                return float(self.network(self.images, self.mask))
        with self.precision():
            loss = self.network(self.images, self.mask)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.work.gpu:
            torch.cuda.synchronize()
        return float(loss.detach())

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast, if the work is in bfloat16."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.work.bf16)


def batch_of(work: Work) -> tuple[Tensor, Tensor]:
    """Noise, and masks of SimMIM's strategy: 60 % of the cells of 32 px."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(work.batch_size, work.model["in_channels"], *work.image_size, generator=generator)
    rows, columns = work.image_size[0] // 32, work.image_size[1] // 32
    order = torch.rand(work.batch_size, rows * columns, generator=generator).argsort(1)
    return images, (order < math.ceil(0.6 * rows * columns)).view(-1, rows, columns)
