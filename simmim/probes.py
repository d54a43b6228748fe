"""What frozen features are worth: nearest neighbours, linear classifiers, and whether they have collapsed.

Shape letters: N features of C channels; T test features; k neighbours; K classes; H heads trained side by side.
Everything is computed on the device of the features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

SIMILARITIES = 1 << 25
"""So many similarities, or normalised numbers, are in memory at once."""

HELD_OUT = 0.1
"""Share of the training features that chooses among the heads of a linear probe."""

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": partial(AdamW, weight_decay=0.0),
    "sgd": partial(SGD, momentum=0.9),
}

Choice = tuple[str, float]
"""Optimizer and learning rate."""


@torch.no_grad()
def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int | Sequence[int],
    temperature: float,
    classes: int,
) -> dict[int, float]:
    """Accuracy of weighted nearest neighbours (Wu et al., CVPR 2018, section 3.4; as DINO evaluates).

    The k training features of the highest cosine similarity s vote for their class, each with exp(s / temperature).

    Args:
        train: (N, C), as all features of any float type.
        train_labels: Integers (N,) below `classes`.
        test: (T, C).
        test_labels: Integers (T,).
        k: Neighbours, one number or several: all are answered from one pass over the similarities.
        temperature: How quickly votes fade with the distance.
        classes: Number of classes.

    Returns:
        For each k the share of test features whose class wins.

    Raises:
        ValueError: If k is no number of training features.
    """
    numbers = [k] if isinstance(k, int) else list(k)
    if not numbers or not 1 <= min(numbers) <= max(numbers) <= len(train):
        raise ValueError(f"k={k} must lie between 1 and the {len(train)} training features")
    train = F.normalize(train.float(), dim=1)
    correct = dict.fromkeys(numbers, 0)
    chunk = max(1, SIMILARITIES // len(train))
    for some, labels in zip(torch.split(test, chunk), torch.split(test_labels, chunk), strict=True):
        similarity = F.normalize(some.float(), dim=1) @ train.t()  # (t, N)
        nearest, index = similarity.topk(max(numbers), dim=1)  # (t, k), the nearest first
        weights, neighbours = (nearest / temperature).exp(), train_labels[index]
        for number in numbers:
            votes = weights.new_zeros(len(some), classes)
            votes.scatter_add_(1, neighbours[:, :number], weights[:, :number])
            correct[number] += int((votes.argmax(dim=1) == labels).sum())
    return {number: hits / len(test) for number, hits in correct.items()}


@dataclass(frozen=True)
class LinearProbe:
    """What the heads of a linear probe reach.

    Args:
        accuracies: Of each optimizer and learning rate, on the test features.
        held_out: The same on the training features that were held out.
        best: The head that is best on those: chosen without a look at the test features.
        accuracy: Of the best head, on the test features: the number to report.
    """

    accuracies: dict[Choice, float]
    held_out: dict[Choice, float]
    best: Choice
    accuracy: float


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    lrs: Sequence[float],
    optimizers: Sequence[str],
    epochs: int,
    batch_size: int,
    seed: int,
) -> LinearProbe:
    """Trains a linear classifier for each optimizer and learning rate, all of them on the same batches, side by side.

    As in MAE's linear probing (arXiv 2111.06377, appendix A.1) the features pass a BatchNorm without affine
    parameters, weights do not decay, and the learning rates fall by half a cosine. Unlike there, the optimizers are
    SGD with momentum and AdamW instead of LARS, heads begin at zero, and the statistics for the test are the mean over
    all batches, not a moving one.

    A tenth of the training features is held out of the training, and chooses the best head. The test features
    choose nothing.

    Args:
        train: (N, C), at least two.
        train_labels: Integers (N,) below `classes`.
        test: (T, C).
        test_labels: Integers (T,).
        classes: Number of classes.
        lrs: Learning rates at the start, as they are: not scaled by the batch.
        optimizers: "adamw", "sgd".
        epochs: Passes over the training features.
        batch_size: Features a step. What remains at the end of an epoch, less than that, is left out of it.
        seed: Decides what is held out, and the order.

    Returns:
        The accuracies, and which head to report.

    Raises:
        ValueError: If an optimizer is unknown, or there is nothing to train, to choose with, or to choose from.
    """
    if unknown := [name for name in optimizers if name not in OPTIMIZERS]:
        raise ValueError(f"optimizer {unknown[0]} is unknown: choose of {', '.join(OPTIMIZERS)}")
    choices = [(name, lr) for name in optimizers for lr in lrs]
    if len(train) < 3 or not choices:
        raise ValueError(f"a linear probe needs 3 training features and a learning rate: {len(train)}, {len(choices)}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train), generator=generator).to(train.device)
    aside, rest = order.tensor_split([max(1, round(HELD_OUT * len(train)))])
    heads = Heads(train.shape[1], classes, choices).to(train.device, torch.promote_types(train.dtype, torch.float32))
    _train(heads, train[rest], train_labels[rest], epochs=epochs, batch_size=batch_size, generator=generator)
    held_out = heads.accuracies(train[aside], train_labels[aside], batch_size)
    accuracies = heads.accuracies(test, test_labels, batch_size)
    best = max(choices, key=held_out.__getitem__)  # of equals the first
    return LinearProbe(accuracies, held_out, best, accuracies[best])


class Heads(nn.Module):
    """Linear classifiers over the same normalised features.

    Args:
        channels: C.
        classes: K.
        choices: Optimizer and learning rate of each head.
    """

    def __init__(self, channels: int, classes: int, choices: Sequence[Choice]) -> None:
        super().__init__()
        self.choices = choices
        self.norm = nn.BatchNorm1d(channels, affine=False, eps=1e-6, momentum=None)  # None: the mean over all batches
        self.weights = nn.ParameterList(torch.zeros(classes, channels) for _ in choices)
        self.biases = nn.ParameterList(torch.zeros(classes) for _ in choices)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) -> logits (B, H, K), by one product."""
        weight, bias = torch.cat(list(self.weights)), torch.cat(list(self.biases))
        logits = F.linear(self.norm(features.to(weight.dtype)), weight, bias)
        return logits.view(len(features), len(self.choices), -1)

    def optimizers(self) -> list[Optimizer]:
        """One of each kind, in which every head has its own learning rate."""
        names = dict.fromkeys(name for name, _ in self.choices)
        return [OPTIMIZERS[name](self._groups(name)) for name in names]

    @torch.no_grad()
    def accuracies(self, features: Tensor, labels: Tensor, batch_size: int) -> dict[Choice, float]:
        """Share of features that each head classifies correctly."""
        self.eval()
        batches = zip(torch.split(features, batch_size), torch.split(labels, batch_size), strict=True)
        hits = sum((self(x).argmax(dim=2) == y[:, None]).sum(dim=0) for x, y in batches)  # (H,)
        assert isinstance(hits, Tensor)
        return dict(zip(self.choices, (hits / len(features)).tolist(), strict=True))

    def _groups(self, optimizer: str) -> list[dict[str, Any]]:
        heads = zip(self.choices, self.weights, self.biases, strict=True)
        return [{"params": [weight, bias], "lr": lr} for (name, lr), weight, bias in heads if name == optimizer]


def _train(
    heads: Heads, features: Tensor, labels: Tensor, *, epochs: int, batch_size: int, generator: torch.Generator
) -> None:
    batch_size = min(batch_size, len(features))
    steps = len(features) // batch_size
    optimizers = heads.optimizers()
    schedules = [CosineAnnealingLR(optimizer, epochs * steps) for optimizer in optimizers]
    heads.train()
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for batch in order[: steps * batch_size].view(steps, batch_size):
            logits = heads(features[batch]).flatten(0, 1)  # (B * H, K)
            targets = labels[batch].repeat_interleave(len(heads.choices))
            loss = F.cross_entropy(logits, targets, reduction="sum") / batch_size  # of each head its mean, added up
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()


@dataclass(frozen=True)
class Diagnostics:
    """Whether features have collapsed.

    Args:
        std: Standard deviation of the L2-normalised features, mean over the channels: 1/sqrt(C) where they point
            everywhere alike, 0 where all are one (Chen and He, CVPR 2021, section 4.1).
        effective_rank: exp of the entropy of the singular values as shares of their sum (Roy and Vetterli, 2007; as
            RankMe, arXiv 2210.02885): between 1 and C. 0 if all features are zero.
    """

    std: float
    effective_rank: float


@torch.no_grad()
def feature_diagnostics(features: Tensor) -> Diagnostics:
    """Standard deviation and effective rank of features (N, C), which are neither centred nor, for the rank, scaled.

    Sums are made in float64; the singular values come from the (C, C) products of the channels.
    """
    channels = features.shape[1]
    products = features.new_zeros(channels, channels, dtype=torch.float64)
    total, squares = torch.zeros_like(products[0]), torch.zeros_like(products[0])
    for some in torch.split(features, max(1, SIMILARITIES // channels)):
        x = some.double()
        products += x.t() @ x
        unit = F.normalize(x, dim=1)
        total += unit.sum(dim=0)
        squares += unit.square().sum(dim=0)
    variance = squares / len(features) - (total / len(features)).square()
    singular = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    rank = 0.0
    if singular.sum() > 0:
        shares = singular / singular.sum()
        rank = float(torch.special.entr(shares).sum().exp())
    return Diagnostics(std=float(variance.clamp(min=0).sqrt().mean()), effective_rank=rank)
