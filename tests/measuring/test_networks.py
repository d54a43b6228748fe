"""The networks that the benchmark compares do the same work: the same weights give the same loss and gradients."""

from typing import Any

import pytest
import torch
from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer

from simmim.measuring.networks import OURS, Runner, Work

MODEL: dict[str, Any] = {
    "name": "swinv2",
    "embed_dim": 24,
    "depths": [2, 2, 2],
    "num_heads": [3, 3, 6],
    "extra_norm_every": 0,
    "window_size": 4,
    "patch_size": 8,
    "in_channels": 3,
}
WORK = Work(MODEL, (128, 128), batch_size=2)


@pytest.mark.parametrize("name", ["timm", "transformers", "torchvision"])
def test_peers_have_our_loss_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers adds its mask of -100 twice: halved, it is the function of the others.
    mask_of = Swinv2Layer.get_attn_mask
    halved = lambda *a, **k: None if (mask := mask_of(*a, **k)) is None else mask / 2  # noqa: E731
    monkeypatch.setattr(Swinv2Layer, "get_attn_mask", halved)
    ours, peer = Runner(OURS, WORK), Runner(name, WORK)
    losses = [runner.network(runner.images, runner.mask) for runner in (ours, peer)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    norms = [
        sum(float(p.grad.square().sum()) for p in runner.network.parameters() if p.grad is not None)
        for runner in (ours, peer)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert ours.network.encoder.mask_token.grad.abs().sum() > 0


def test_a_training_step_lowers_the_loss_and_a_forward_pass_does_not() -> None:
    for training in (True, False):
        runner = Runner(OURS, WORK.changed(training=training))
        losses = [runner() for _ in range(4)]
        assert (losses[-1] < losses[0]) == training
        assert len(set(losses)) == (4 if training else 1)


def test_ways_that_change_no_number() -> None:
    exact = Runner(OURS, WORK)()
    assert Runner(OURS, WORK.changed(activation_checkpointing="all"))() == pytest.approx(exact, abs=1e-6)
    assert Runner(OURS, WORK.changed(bf16=True))() == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("torchvision", {"window_size": 8}, "peers=torchvision pads every map to whole windows"),
        ("timm", {"extra_norm_every": 2}, r"swinv2_h and swinv2_g are ours alone, give peers=\[\]"),
        ("timm", {"position_bias": "table"}, r"peers are Swin V2, without model\.position_bias=table"),
        ("lightly", {}, "peers=lightly is unknown: choose from timm, transformers, torchvision"),
    ],
)
def test_a_peer_that_cannot_is_refused(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Runner(name, WORK.changed(model={**MODEL, **changes}))
