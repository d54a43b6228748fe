"""What every task shares: the network and its running average, one step of its training, and what is logged of it."""

from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from simmim.data.decoding import EIGHT_BIT
from simmim.seeding import derive_seed
from simmim.training.guard import Guard
from simmim.training.optimizer import clip_gradients, create_optimizer, follow
from simmim.training.schedule import create_schedule
from simmim.training.sharding import ShardedStrategy, fill


class Task(LightningModule):
    """Trains a network whose `forward` returns the loss of a batch of images.

    A subclass says what the network is given (`loss`) and how it is validated. Its own arguments are plain numbers,
    strings, lists and dicts: a checkpoint rebuilds the task from itself.

    Args:
        create: Makes the network, a `simmim.training.sharding.Shardable`; called on the meta device.
        optimizer: Arguments of `create_optimizer`.
        schedule: Arguments of `create_schedule`.
        mean: Mean of each image channel, in units of `max_value`.
        std: Standard deviation of each image channel, likewise.
        max_value: The pixel value that counts as 1; checkpoints of old, which do not say, are of 8-bit images.
        ema_decay: How much of itself a running average of the weights keeps at each step; the average is what is
            validated, shown and published. None for none.
        seed: Seeds the initial values, and the random numbers of every step.

    Attributes:
        network: What is trained. Built on the meta device: `configure_model` gives it its values.
        average: The running average, or None.
        guard: Decides which optimizer steps are taken; it comes by itself when a run begins.
        step_skipped: Whether the last optimizer step was left out.
    """

    mean: Tensor
    std: Tensor
    guard: Guard
    step_loss: Tensor

    def __init__(
        self,
        create: Callable[[], nn.Module],
        *,
        mean: list[float],
        std: list[float],
        seed: int,
        optimizer: dict[str, Any],
        schedule: dict[str, Any],
        ema_decay: float | None,
        max_value: float = EIGHT_BIT,
    ) -> None:
        super().__init__()
        with torch.device("meta"):
            self.network: Any = create()
            self.average: Any = None if ema_decay is None else create()
        if self.average is not None:
            self.average.requires_grad_(False)
        self.ema_decay = ema_decay
        self.optimizer = optimizer
        self.schedule = schedule
        self.max_value = max_value
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.seed = seed
        self.micro_losses: list[Tensor] = []
        self.step_skipped = False

    @property
    def best(self) -> Any:
        """What is validated, shown and published: the running average where there is one."""
        return self.average or self.network

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The loss of one training batch."""
        raise NotImplementedError

    def look(self, batch: dict[str, Any]) -> None:
        """Lets the network see all tokens of a training batch, as they are trained: for those who watch the encoder."""
        raise NotImplementedError

    def describe(self, metrics: dict[str, Any]) -> str:
        """A validation in words, from what it logged."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Gives the network its initial values, the same for any number of processes, and shards it if need be."""
        strategy = self.trainer.strategy if self._trainer is not None else None
        for network in filter(None, (self.network, self.average)):
            fill(network, seed=self.seed, strategy=strategy if isinstance(strategy, ShardedStrategy) else None)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """The loss of one batch."""
        # Stochastic depth and mixing draw from the global generator: seeded a step, a resumed run draws the same.
        torch.manual_seed(derive_seed(self.seed, "step", batch_index, self.global_rank))
        loss = self.loss(batch)
        self.micro_losses.append(loss.detach())
        if (batch_index + 1) % self.trainer.accumulate_grad_batches == 0:
            self.step_loss = torch.stack(self.micro_losses).mean()  # of the whole batch, accumulated or not
            self.log("train_loss", self.step_loss, sync_dist=True)
            self.log("step", float(self.global_step + 1))  # the x axis of all loggers: optimizer steps done
            self.micro_losses.clear()
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW and its schedule, in optimizer steps."""
        optimizer: Optimizer = create_optimizer(self.network, **self.optimizer)
        schedule = create_schedule(optimizer, **self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the norm of all gradients together, and logs that norm and the learning rate of the step.

        Where the guard refuses the step the gradients are dropped, and so it changes nothing.
        """
        assert gradient_clip_val is not None
        self.log("lr", max(group["lr"] for group in optimizer.param_groups))
        norm = clip_gradients(self.network.parameters(), gradient_clip_val)
        self.log("grad_norm", norm)
        self.step_skipped = self.guard.refuses(self.trainer, loss=float(self.step_loss), norm=float(norm))
        if self.step_skipped:
            optimizer.zero_grad()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One step of the optimizer, and of the running average."""
        super().optimizer_step(*args, **kwargs)
        self.network.zero_grad()  # else the gradients would lie in memory through the next forward pass
        if self.average is not None and self.ema_decay is not None and not self.step_skipped:
            follow(self.average.parameters(), self.network.parameters(), decay=self.ema_decay, step=self.global_step)

    def normalize(self, images: Tensor) -> Tensor:
        """Images (B, c, H, W), uint8 or floats, to floats of zero mean and unit deviation, on their device."""
        return (images.float() / self.max_value - self.mean) / self.std
