"""What is measured of features, attention and gradients, against numpy, autograd and the encoder's own maps."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2
from torch import Tensor
from torch._dynamo.utils import counters

from simmim.encoders import attention, create_encoder
from simmim.encoders.names import from_timm
from simmim.masking import Masking
from simmim.measuring.networks import OBJECTIVE
from simmim.seeding import generator_from
from simmim.tasks.pretraining import MaskedImageModel
from simmim.training.propagation import Blocks, feature_variance, measure_blocks, rows_of


def network_of(**overrides: Any) -> MaskedImageModel:
    """With all its weights random: post-norms at their zeros would hide what is behind them."""
    settings: dict[str, Any] = {
        "embed_dim": 16, "depths": [2, 3], "num_heads": [2, 4], "window_size": 4, "extra_norm_every": 2,
    }  # fmt: skip
    encoder = create_encoder("swinv2", **{**settings, **overrides})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return MaskedImageModel(encoder, **OBJECTIVE)


def batch() -> tuple[Tensor, Tensor]:
    masking = Masking((64, 64), patch_size=16, ratio=0.6, strategy="random", model_patch_size=4)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return images, torch.stack([masking(generator_from(number)) for number in range(3)])


def measured(network: MaskedImageModel) -> Blocks:
    images, mask = batch()
    return measure_blocks(network.encoder, lambda: network.reconstruct(images, mask))


def test_highest_weights_are_timms_in_every_block_and_head() -> None:
    """Of shifted windows too, and of more images than are looked at at a time."""
    theirs = TimmSwinV2(img_size=64, num_classes=0, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 3))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if parameter.ndim >= 2 and "logit_scale" not in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    ours = create_encoder("swinv2", embed_dim=24, depths=[2, 2], num_heads=[2, 3], extra_norm_every=0, window_size=4)
    ours.load_state_dict(from_timm(theirs.state_dict()) | {"mask_token": ours.mask_token})
    expected: list[Tensor] = []
    for name, module in theirs.named_modules():
        if name.endswith("attn.softmax"):
            module.register_forward_hook(lambda _, __, out: expected.append(out.amax(-1).mean((0, 2))))
    images, _ = batch()
    with mock.patch.object(attention, "LOGITS_AT_A_TIME", 2 * 16 * 16**2):
        found = measure_blocks(ours, lambda: ours(images))
    theirs(images)
    assert len(found.attention) == len(expected) == 4
    for own, other in zip(found.attention, expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)
        assert own.std() > 1e-3  # a test of heads that differ
    assert found.highest_attention == float(torch.cat(found.attention).max())


def test_the_variance_is_that_of_numpy_whatever_the_mean() -> None:
    tokens = np.random.default_rng(0).normal(5, 3, (2, 4, 9, 16))
    expected = np.mean([np.mean((token - token.mean()) ** 2) for token in tokens.reshape(-1, 16)])
    assert float(feature_variance(torch.tensor(tokens))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("norm", ["pre", "res_post"])
def test_the_last_block_of_each_stage_is_what_the_pyramid_shows(norm: str) -> None:
    encoder = network_of(norm=norm, depths=[1, 2, 1], num_heads=[2, 4, 4]).encoder
    images, _ = batch()
    found = measure_blocks(encoder, lambda: encoder(images))
    with torch.no_grad():
        maps = encoder.pyramid(images)  # the last one normalised
    for block, features in ((0, maps[0]), (2, maps[1])):
        assert float(found.variance[block]) == pytest.approx(features.numpy().var(axis=1).mean(), rel=1e-5)
    assert len(found.variance) == 4 and [len(heads) for heads in found.attention] == [2, 4, 4, 4]
    assert found.variance_ratio == pytest.approx(float(found.variance.max() / found.variance.min()))


def test_gradients_are_those_of_autograd_and_add_up_to_the_whole() -> None:
    network, (images, mask) = network_of(), batch()
    network(images, mask).backward()
    rows = rows_of(network, measured(network))
    parameters = dict(network.named_parameters())
    gradients = dict(
        zip(parameters, torch.autograd.grad(network(images, mask), list(parameters.values())), strict=True)
    )

    def norm(*prefixes: str) -> float:
        own = [gradients[key].flatten() for key in gradients if key.startswith(prefixes)]
        return float(torch.cat(own).norm())

    expected = {
        (0, "patches"): norm("encoder.embed", "encoder.mask_token"),
        (1, "stage 1, block 1"): norm("encoder.stages.0.0."),
        (2, "stage 1, block 2"): norm("encoder.stages.0.1."),
        (2, "merging"): norm("encoder.merges.0."),
        (3, "stage 2, block 1"): norm("encoder.stages.1.0."),
        (4, "stage 2, block 2"): norm("encoder.stages.1.1."),
        (5, "stage 2, block 3"): norm("encoder.stages.1.2."),
        (6, "top"): norm("encoder.norm.", "head."),
    }
    assert [(row["layer"], row["part"]) for row in rows] == list(expected)
    assert [row["gradient_norm"] for row in rows] == pytest.approx(list(expected.values()), rel=1e-5)
    total = sum(row["gradient_norm"] ** 2 for row in rows) ** 0.5
    assert total == pytest.approx(norm(""), rel=1e-5)
    blocks = [row for row in rows if row["part"].startswith("stage")]
    assert all(row["variance"] > 0 and 1 / 16 <= row["attention_mean"] <= row["attention_max"] <= 1 for row in blocks)
    assert all(row["variance"] is row["attention_max"] is None for row in rows if row not in blocks)


def test_new_blocks_with_their_norms_behind_are_the_identity() -> None:
    """So between two extra norms or mergings the variance stands still; with norms in front it does not."""
    settings: dict[str, Any] = {"depths": [4], "num_heads": [2], "extra_norm_every": 0}
    torch.manual_seed(0)
    post, pre = (create_encoder("swinv2", embed_dim=16, window_size=4, norm=norm, **settings)
                 for norm in ("res_post", "pre"))  # fmt: skip
    images, _ = batch()
    still, moving = (measure_blocks(encoder, lambda e=encoder: e(images)).variance for encoder in (post, pre))
    assert still.tolist() == pytest.approx([float(still[0])] * 4, rel=1e-6)
    assert moving.diff().abs().min() > 1e-5


def test_compiled_blocks_are_measured_as_written_and_not_compiled_anew() -> None:
    network, (images, mask) = network_of(depths=[1], num_heads=[2]), batch()
    expected = measured(network)
    for stage in network.encoder.blocks:
        for block in stage:
            block.compile(backend="eager")
    loss = network(images, mask)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    found = measured(network)
    assert torch.equal(network(images, mask), loss)
    assert counters["stats"]["unique_graphs"] == graphs
    assert torch.equal(found.variance, expected.variance)
    assert all(map(torch.equal, found.attention, expected.attention))
