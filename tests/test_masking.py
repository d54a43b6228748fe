import math

import pytest
import torch

from simmim.masking import STRATEGIES, Masking, average_distance, expand_mask
from simmim.seeding import generator_from


def draw(strategy="random", size=192, patch_size=32, ratio=0.6, seed=0, model_patch_size=4):
    masking = Masking(
        (size, size), patch_size=patch_size, ratio=ratio, strategy=strategy, model_patch_size=model_patch_size
    )
    return masking(generator_from(seed))


@pytest.mark.parametrize(("size", "hidden", "cells"), [(192, 22, 36), (224, 30, 49)])
@pytest.mark.parametrize("strategy", ["random", "block"])
def test_the_released_number_of_cells_is_hidden(strategy, size, hidden, cells):
    for seed in range(50):
        mask = draw(strategy, size, seed=seed)
        assert mask.numel() == cells
        assert int(mask.sum()) == hidden


def test_random_cells_are_hidden_equally_often():
    share = torch.stack([draw(seed=seed) for seed in range(4000)]).float().mean(dim=0)
    expected = 22 / 36
    deviation = math.sqrt(expected * (1 - expected) / 4000)
    assert (share - expected).abs().max() < 4.5 * deviation


def test_a_square_is_one_rectangle_anywhere():
    places = set()
    for seed in range(200):
        mask = draw("square", seed=seed, patch_size=16)
        rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert int(mask.sum()) == len(rows) * len(columns) == 81  # the square nearest to 0.6 of 12 x 12
        places.add((int(rows[0]), int(columns[0])))
    assert places == {(row, column) for row in range(4) for column in range(4)}


def test_blocks_are_larger_than_random_cells():
    def neighbours(mask):
        return (mask[1:] == mask[:-1]).float().mean() + (mask[:, 1:] == mask[:, :-1]).float().mean()

    block = sum(neighbours(draw("block", patch_size=16, seed=s)) for s in range(100))
    random = sum(neighbours(draw("random", patch_size=16, seed=s)) for s in range(100))
    assert block > 1.4 * random


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_mask_follows_its_generator_alone(strategy):
    torch.manual_seed(1)
    first = draw(strategy, seed=5, patch_size=16)
    torch.manual_seed(2)
    assert torch.equal(first, draw(strategy, seed=5, patch_size=16))
    assert not torch.equal(first, draw(strategy, seed=6, patch_size=16))


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_mask_is_drawn_on_the_generators_device(strategy):
    masking = Masking((192, 192), patch_size=32, ratio=0.6, strategy=strategy, model_patch_size=4)
    assert masking(torch.Generator("cuda").manual_seed(0)).device.type == "cuda"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"patch_size": 30}, ["masking.patch_size=30", "model.patch_size=4", "take 32"]),
        ({"ratio": -0.1}, ["masking.ratio=-0.1", "between 0 and 1"]),
        ({"ratio": 1.0}, ["masking.ratio=1.0", "between 0 and 1"]),
        ({"ratio": 0.99}, ["masking.ratio=0.99", "36 cells"]),
        ({"size": 200}, ["data.image_size=200x200", "masking.patch_size=32", "192x192"]),
        ({"strategy": "stripes"}, ["masking.strategy=stripes", "random, square, block"]),
    ],
)
def test_bad_settings_are_refused_with_the_numbers(settings, words):
    with pytest.raises(ValueError) as error:
        draw(**settings)
    for word in words:
        assert word in str(error.value)


def test_expanding_covers_whole_cells():
    mask = torch.tensor([[[True, False], [False, True]]])
    expected = torch.block_diag(torch.ones(3, 2), torch.ones(3, 2)).bool()
    assert torch.equal(expand_mask(mask, 6, 4)[0], expected)
    with pytest.raises(ValueError, match="2x2 cells does not divide a map of 5x4"):
        expand_mask(mask, 5, 4)


@pytest.mark.parametrize(("patch_size", "ratio"), [(4, 0.8), (8, 0.6), (16, 0.6), (32, 0.4)])
def test_average_distance_equals_the_brute_force(patch_size, ratio):
    mask = draw(size=64, patch_size=patch_size, ratio=ratio)
    hidden = expand_mask(mask[None], 64, 64)[0]
    distances = torch.cdist(hidden.nonzero().double(), (~hidden).nonzero().double()).amin(dim=1)
    assert average_distance(mask, patch_size) == pytest.approx(float(distances.mean()), rel=1e-9)


def test_average_distance_at_its_ends():
    assert average_distance(torch.zeros(2, 2, dtype=torch.bool), 4) == 0
    assert average_distance(torch.ones(2, 2, dtype=torch.bool), 4) == math.inf
    one_row = torch.tensor([[True, False]])
    assert average_distance(one_row, 3) == pytest.approx((1 + 2 + 3) / 3)


def test_the_papers_masking_lies_in_its_good_band():
    mean = sum(average_distance(draw(seed=seed), 32) for seed in range(10)) / 10
    assert 10 < mean < 20
