"""Turns, and operations counted against the formula."""

import pytest

from simmim.measuring.speed import interleaved, matmul_rate, model_flops
from tests.measuring.test_networks import MODEL, WORK


def test_works_take_turns() -> None:
    order: list[str] = []
    seconds = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_operations_are_those_of_the_formula() -> None:
    """Two a multiplication, three times: forward, and the gradients of both factors."""
    side, channels = 128 // 8, 24
    products = 2 / 3 * side**2 * 3 * 8**2 * channels  # the embedding, whose images need no gradient
    for stage, heads in enumerate(MODEL["num_heads"]):
        tokens, window = side**2, min(side, 4) ** 2
        offsets = (2 * min(side, 4) - 1) ** 2
        layers, attention, bias = 12 * tokens * channels**2, 2 * tokens * window * channels, offsets * 512 * (2 + heads)
        products += 2 * (layers + attention + bias)  # two blocks
        if stage < 2:
            products += tokens // 4 * 4 * channels * 2 * channels  # merging
            side, channels = side // 2, channels * 2
    hidden = 10  # of 16 cells, each one token
    products += hidden * channels * 3 * 32**2
    unread = (16 - hidden) * 9 * channels**2  # of the last block: what the loss does not read
    assert model_flops(WORK) / WORK.batch_size == pytest.approx(2 * 3 * (products - unread), rel=0.01)


def test_matrix_rate_is_a_rate() -> None:
    assert 1e9 < matmul_rate(WORK) < 1e15


def test_batch_and_size_multiply_the_operations() -> None:
    twice = WORK.changed(batch_size=4)
    assert model_flops(twice) == 2 * model_flops(WORK)
    assert model_flops(WORK.changed(image_size=(256, 128))) > 1.8 * model_flops(WORK)
