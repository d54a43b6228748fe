"""Probes against formulas written out, one feature after the other."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from simmim import probes
from simmim.probes import Heads, feature_diagnostics, knn_accuracy, linear_probe


def clusters(count, *, classes=5, channels=16, spread=0.8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, channels, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + spread * torch.randn(count, channels, generator=generator), labels


def brute_force(train, train_labels, test, test_labels, *, k, temperature, classes):
    """Wu et al.: every test feature alone, with plain loops, in double precision."""
    train, test = train.double().numpy(), test.double().numpy()
    hits = 0
    for feature, label in zip(test, test_labels.tolist(), strict=True):
        found = []
        for other, its_label in zip(train, train_labels.tolist(), strict=True):
            cosine = sum(feature * other) / math.sqrt(sum(feature**2)) / math.sqrt(sum(other**2))
            found.append((cosine, its_label))
        votes = [0.0] * classes
        for cosine, its_label in sorted(found, reverse=True)[:k]:
            votes[its_label] += math.exp(cosine / temperature)
        hits += votes.index(max(votes)) == label
    return hits / len(test)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_nearest_neighbours_are_those_of_plain_loops(temperature, monkeypatch):
    monkeypatch.setattr(probes, "SIMILARITIES", 300)  # two test features at once
    train, test = clusters(120, spread=1.6), clusters(41, spread=1.6, seed=1)
    # Lengths must not matter, and here they would: labels of short and of long features differ.
    train = (train[0] * torch.linspace(0.1, 10, 120)[:, None], train[1])
    found = knn_accuracy(*train, *test, k=[1, 20, 100], temperature=temperature, classes=5)
    for k in (1, 20, 100):
        alone = brute_force(*train, *test, k=k, temperature=temperature, classes=5)
        assert found[k] == pytest.approx(alone)
        assert knn_accuracy(*train, *test, k=k, temperature=temperature, classes=5) == {k: found[k]}
    assert len(set(found.values())) > 1


def test_near_neighbours_outvote_many_far_ones():
    train = torch.tensor([[1.0, 0.0], [0.3, 1.0], [0.3, 1.0], [0.3, 1.0]])
    labels, test = torch.tensor([1, 0, 0, 0]), torch.tensor([[1.0, 0.1]])
    assert knn_accuracy(train, labels, test, torch.tensor([1]), k=4, temperature=0.07, classes=2) == {4: 1.0}
    assert knn_accuracy(train, labels, test, torch.tensor([1]), k=4, temperature=10, classes=2) == {4: 0.0}


@pytest.mark.parametrize("k", [0, 5, [2, 5], []])
def test_neighbours_that_do_not_exist_are_refused(k):
    train, labels = clusters(4)
    with pytest.raises(ValueError, match=r"^k=.* must lie between 1 and the 4 training features"):
        knn_accuracy(train, labels, train, labels, k=k, temperature=1.0, classes=5)


SWEEP = {"classes": 5, "epochs": 5, "batch_size": 32, "seed": 0, "optimizers": ["adamw", "sgd"]}


def test_a_linear_probe_separates_what_is_separable():
    """By a plane for each class, off the origin, and hidden beside channels of a far larger scale."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (900,), generator=generator)
    features = 100 * torch.randn(900, 8, generator=generator) + 50
    features[:, 0] = 7 + 0.01 * labels + 0.003 * (torch.rand(900, generator=generator) - 0.5)
    features[:, 1] = 0.01 * (labels == 1) + 0.003 * torch.rand(900, generator=generator)
    settings = {"classes": 3, "epochs": 20, "batch_size": 64, "seed": 0, "lrs": [1e-7, 0.1]}
    settings["optimizers"] = SWEEP["optimizers"]
    probe = linear_probe(features[:700], labels[:700], features[700:], labels[700:], **settings)
    assert probe.accuracy == 1
    assert probe.held_out[probe.best] == 1
    assert min(probe.accuracies.values()) < 1


def test_each_head_of_a_sweep_is_the_same_head_trained_alone():
    train, test = clusters(300, spread=2.0), clusters(400, spread=2.0, seed=1)
    train, test = (train[0].double(), train[1]), (test[0].double(), test[1])
    together = linear_probe(*train, *test, **SWEEP, lrs=[1e-4, 1e-2, 1.0])
    assert len(together.accuracies) == 6
    assert len(set(together.accuracies.values())) > 3
    for name, lr in together.accuracies:
        alone = linear_probe(*train, *test, **{**SWEEP, "lrs": [lr], "optimizers": [name]})
        assert alone.accuracies == {(name, lr): together.accuracies[name, lr]}
        assert alone.held_out == {(name, lr): together.held_out[name, lr]}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_head_is_plain_pytorch_training(name):
    """The loop written out: BatchNorm without affine, one head, half a cosine over all steps."""
    features, labels = clusters(70)
    choices = [("sgd", 3.0), (name, 0.05), ("adamw", 1.0)]
    heads = Heads(16, 5, choices)
    probes._train(heads, features, labels, epochs=3, batch_size=32, generator=torch.Generator().manual_seed(5))

    norm, head = nn.BatchNorm1d(16, affine=False, eps=1e-6), nn.Linear(16, 5)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if name == "sgd":
        optimizer = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(head.parameters(), lr=0.05, weight_decay=0)
    generator, step = torch.Generator().manual_seed(5), 0
    for _ in range(3):
        order = torch.randperm(70, generator=generator)
        for batch in (order[:32], order[32:64]):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 6)) / 2
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(norm(features[batch])), labels[batch]).backward()
            optimizer.step()
            step += 1
    torch.testing.assert_close(heads.weights[1], head.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(heads.biases[1], head.bias, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(heads.weights[0], heads.weights[1])


def test_the_test_features_choose_nothing():
    train, test = clusters(200, spread=3.0), clusters(50, spread=3.0, seed=1)
    settings = {**SWEEP, "lrs": [1e-4, 1e-2, 1.0]}
    honest, shuffled = (
        linear_probe(*train, *test, **settings),
        linear_probe(*train, test[0], test[1].flip(0), **settings),
    )
    assert honest.best == shuffled.best and honest.held_out == shuffled.held_out
    assert honest.accuracy == honest.accuracies[honest.best] != shuffled.accuracy
    assert honest.held_out[honest.best] == max(honest.held_out.values())
    held_out = [share * 20 for share in honest.held_out.values()]  # a tenth of 200
    assert held_out == pytest.approx(np.round(held_out), abs=1e-4)


def test_the_seed_decides_and_half_precision_will_do():
    train, test = clusters(200, spread=3.0), clusters(300, spread=3.0, seed=1)
    settings = {**SWEEP, "lrs": [0.1]}
    first = linear_probe(*train, *test, **settings)
    assert linear_probe(*train, *test, **settings) == first
    assert linear_probe(*train, *test, **{**settings, "seed": 1}).accuracies != first.accuracies
    half = linear_probe(train[0].bfloat16(), train[1], test[0].bfloat16(), test[1], **settings)
    assert half.accuracy == pytest.approx(first.accuracy, abs=0.05)


def test_what_cannot_be_probed_is_refused():
    train, labels = clusters(40)
    with pytest.raises(ValueError, match=r"^optimizer lars is unknown: choose of adamw, sgd"):
        linear_probe(train, labels, train, labels, **{**SWEEP, "lrs": [0.1], "optimizers": ["lars"]})
    with pytest.raises(ValueError, match=r"^a linear probe needs 3 training features and a learning rate: 40, 0"):
        linear_probe(train, labels, train, labels, **SWEEP, lrs=[])
    with pytest.raises(ValueError, match=r": 2, 2$"):
        linear_probe(train[:2], labels[:2], train, labels, **SWEEP, lrs=[0.1])


def test_collapsed_features_show():
    one = torch.randn(1, 32)
    found = feature_diagnostics(one.expand(100, 32) * torch.linspace(0.5, 2, 100)[:, None])  # lengths differ
    assert found.std == pytest.approx(0, abs=1e-6)
    assert found.effective_rank == pytest.approx(1, abs=1e-3)
    assert feature_diagnostics(torch.zeros(10, 4)) == probes.Diagnostics(std=0.0, effective_rank=0.0)


def test_isotropic_features_show():
    features = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    found = feature_diagnostics(features)
    assert found.std == pytest.approx(1 / math.sqrt(64), rel=0.01)
    assert found.effective_rank == pytest.approx(64, rel=0.01)
    assert feature_diagnostics(torch.eye(12)).effective_rank == pytest.approx(12)


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_the_rank_is_that_of_the_matrix(rank):
    left, _ = torch.linalg.qr(torch.randn(200, rank, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(40, rank, dtype=torch.float64))
    assert feature_diagnostics(left @ right.t()).effective_rank == pytest.approx(rank, rel=1e-4)


def test_diagnostics_are_the_formulas_on_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(probes, "SIMILARITIES", 24 * 7)
    features = torch.randn(50, 24) * torch.linspace(0.01, 3, 24) + 0.5
    found = feature_diagnostics(features)
    unit = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    assert found.std == pytest.approx(unit.std(axis=0).mean(), rel=1e-5)
    shares = np.linalg.svd(features.numpy(), compute_uv=False)
    shares = shares / shares.sum()
    assert found.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
