"""In which order samples come: a function of (seed, epoch), and of nothing else."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from simmim.seeding import generator_from

SampleKey = tuple[int, int]
"""Epoch and index within the source: the identity of one draw, which seeds everything random about it."""


class SampleStream(Sampler[list[SampleKey]]):
    """Batches cut from one endless stream: a new permutation of the source each epoch, one behind the other.

    No sample is dropped: a batch may begin in one epoch and end in the next. Batch b of rank r takes what stands
    behind the batches before it and the ranks below it, so the samples of a global batch do not depend on how
    many devices share it.

    Args:
        size: Images in the source.
        batch_size: Images a batch of this rank.
        num_batches: Batches of the whole run.
        start: Batches to leave out at the front, because an interrupted run has seen them.
        seed: Seed of the order.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        num_batches: int,
        start: int = 0,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.start = start
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Batches of the whole run, those left out included: progress counts from the run's beginning."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Yields each remaining batch as a list of (epoch, index)."""
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for batch in range(self.start, self.num_batches):
            first = (batch * self.world_size + self.rank) * self.batch_size
            keys = []
            for position in range(first, first + self.batch_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = torch.randperm(self.size, generator=generator_from(self.seed, "order", epoch))
                keys.append((epoch, int(order[position % self.size])))
            yield keys
