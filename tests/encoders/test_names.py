"""The names of weights elsewhere: there and back bit by bit, complete, and nothing that is unknown passes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from transformers import Swinv2Config, Swinv2Model

from simmim.encoders import SwinTransformerV2, create_encoder, swin
from simmim.encoders.names import (
    BUFFERS,
    from_official,
    from_timm,
    from_torchvision,
    from_transformers,
    to_official,
    to_timm,
    to_torchvision,
    to_transformers,
)

Rename = Callable[[dict[str, Tensor]], dict[str, Tensor]]

WITH_TOKEN = [(to_official, from_official), (to_transformers, from_transformers)]
WITHOUT_TOKEN = [(to_timm, from_timm), (to_torchvision, from_torchvision)]
EVERY_WAY = WITH_TOKEN + WITHOUT_TOKEN
SHAPE: dict[str, Any] = {"embed_dim": 16, "depths": [2, 1, 3], "num_heads": [2, 2, 4]}
VERSIONS: dict[str, dict[str, Any]] = {"v2": {}, "v1": swin.V1}


def encoder_of(**overrides: Any) -> SwinTransformerV2:
    settings: dict[str, Any] = {"window_size": 6, "extra_norm_every": 0, **SHAPE} | overrides
    encoder = create_encoder("swinv2", **settings)
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return encoder


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def tokenless(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != "mask_token"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("there", "back"), EVERY_WAY)
def test_renaming_and_back_changes_nothing(there: Rename, back: Rename, version: str) -> None:
    state = encoder_of(**VERSIONS[version]).state_dict()
    assert_equal(back(there(state)), state if (there, back) in WITH_TOKEN else tokenless(state))


def timm_network() -> nn.Module:
    return TimmSwinV2(img_size=96, window_size=6, num_classes=0, **SHAPE)


def transformers_network() -> nn.Module:
    config = Swinv2Config(image_size=96, window_size=6, **SHAPE)
    return Swinv2Model(config, add_pooling_layer=False, use_mask_token=True)


def torchvision_network(version: str = "v2") -> nn.Module:
    second, first = (SwinTransformerBlockV2, PatchMergingV2), (SwinTransformerBlock, PatchMerging)
    blocks = dict(zip(("block", "downsample_layer"), second if version == "v2" else first, strict=True))
    network = SwinTransformer(patch_size=[4, 4], window_size=[6, 6], **SHAPE, **blocks)
    network.head = nn.Identity()
    return network


def first_timm_network() -> nn.Module:
    return TimmSwin(img_size=96, window_size=6, num_classes=0, **SHAPE)


NETWORKS = [
    (timm_network, to_timm, from_timm, "v2"),
    (transformers_network, to_transformers, from_transformers, "v2"),
    (torchvision_network, to_torchvision, from_torchvision, "v2"),
    (first_timm_network, to_timm, from_timm, "v1"),
    (partial(torchvision_network, "v1"), to_torchvision, from_torchvision, "v1"),
]


@pytest.mark.parametrize(("make", "there", "back", "version"), NETWORKS)
def test_names_and_shapes_are_theirs(make: Callable[[], nn.Module], there: Rename, back: Rename, version: str) -> None:
    """All of their parameters and no others; and from them all of ours. transformers renames what it reads of V1."""
    theirs = dict(make().named_parameters())
    ours = there(encoder_of(**VERSIONS[version]).state_dict())
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    renamed = back({key: value.detach() for key, value in make().state_dict().items()})
    expected = encoder_of(**VERSIONS[version]).state_dict()
    assert expected.keys() - renamed.keys() <= {"mask_token"}
    assert all(value.shape == expected[key].shape for key, value in renamed.items())


def test_the_place_of_patch_merging() -> None:
    state = encoder_of().state_dict()
    reduction = state["merges.1.reduction.weight"]
    assert to_official(state)["layers.1.downsample.reduction.weight"] is reduction
    assert to_timm(state)["layers.2.downsample.reduction.weight"] is reduction
    assert to_transformers(state)["encoder.layers.1.downsample.reduction.weight"] is reduction
    assert to_torchvision(state)["features.4.reduction.weight"] is reduction


def test_official_names_are_timms_but_for_the_mergings() -> None:
    """timm moves each merging of the authors' files into the stage that it opens, and has no mask token."""
    state = encoder_of().state_dict()
    moved = {
        key.replace("layers.1.down", "layers.2.down").replace("layers.0.down", "layers.1.down"): value
        for key, value in to_official(state).items()
    }
    assert_equal(tokenless(moved), to_timm(state))
    assert to_official(state)["mask_token"].shape == (1, 1, 16)


@pytest.mark.parametrize(
    ("there", "back", "version"), [(to_torchvision, from_torchvision, "v2"), (to_timm, from_timm, "v1")]
)
def test_the_bias_of_keys_counts_as_zero(there: Rename, back: Rename, version: str) -> None:
    ours = tokenless(encoder_of(**VERSIONS[version]).state_dict())
    state = there(ours)
    biases = [key for key in state if key.endswith("qkv.bias")]
    assert len(biases) == 6
    assert all(state[key].chunk(3)[1].eq(0).all() and state[key].chunk(3)[2].ne(0).any() for key in biases)
    for key in biases:
        state[key] = state[key].clone()
        state[key].chunk(3)[1].fill_(7)
    assert_equal(back(state), ours)


def test_heads_and_buffers_are_left_out() -> None:
    state, extra = encoder_of().state_dict(), torch.zeros(1)
    timm = to_timm(state) | {"head.fc.weight": extra, "layers.0.blocks.1.attn_mask": extra}
    timm |= {f"layers.0.blocks.0.attn.{name}": extra for name in BUFFERS}
    assert_equal(from_timm(timm), tokenless(state))
    transformers = {f"swinv2.{key}": value for key, value in to_transformers(state).items()}
    transformers |= {"classifier.weight": extra, "decoder.0.bias": extra}
    transformers |= {f"swinv2.encoder.layers.0.blocks.0.attention.self.{name}": extra for name in BUFFERS}
    assert_equal(from_transformers(transformers), state)
    vision = to_torchvision(state) | {"head.weight": extra, "features.1.0.attn.relative_coords_table": extra}
    assert_equal(from_torchvision(vision), tokenless(state))


def test_what_the_authors_files_hold_besides() -> None:
    """SimMIM's prefix and decoder, and the names of older files."""
    state, extra = encoder_of().state_dict(), torch.zeros(1)
    old = {f"encoder.{key.replace('cpb_mlp', 'rpe_mlp')}": value for key, value in to_official(state).items()}
    assert any("rpe_mlp" in key for key in old)
    old |= {"decoder.0.weight": extra, "encoder.layers.0.blocks.1.attn_mask": extra}
    assert_equal(from_official(old), state)
    deep = encoder_of(extra_norm_every=2).state_dict()
    theirs = to_official({key: value for key, value in deep.items() if ".extra_norm." not in key})
    theirs |= {
        key.replace("stages.0.1", "layers.0.blocks.1")
        .replace("stages.2.1", "layers.2.blocks.1")
        .replace("extra_norm", "enorm"): value
        for key, value in deep.items()
        if ".extra_norm." in key
    }
    assert_equal(from_official(theirs), deep)


@pytest.mark.parametrize("key", ["layers.0.downsample.norm.weight", "layers.0.blocks.0.attn.qkv.scale", "absolute"])
def test_unknown_keys_of_timm_are_listed(key: str) -> None:
    with pytest.raises(ValueError, match=f"of timm: unknown keys: {key}$"):
        from_timm(to_timm(encoder_of().state_dict()) | {key: torch.zeros(1)})


@pytest.mark.parametrize("key", ["features.2.0.norm1.weight", "features.3.norm.weight", "features.0.1.weight"])
def test_unknown_keys_of_torchvision_are_listed(key: str) -> None:
    with pytest.raises(ValueError, match=f"of torchvision: unknown keys: {key}$"):
        from_torchvision(to_torchvision(encoder_of().state_dict()) | {key: torch.zeros(1)})


def test_unknown_keys_of_transformers_are_listed() -> None:
    state = to_transformers(encoder_of().state_dict())
    state |= {f"encoder.layers.9.{number}": torch.zeros(1) for number in range(5)}
    with pytest.raises(ValueError, match=r"encoder\.layers\.9\.2 and 2 more"):
        from_transformers(state)


@pytest.mark.parametrize("rename", [there for there, _ in EVERY_WAY])
def test_extra_norms_have_no_place_elsewhere(rename: Rename) -> None:
    with pytest.raises(ValueError, match=r"lacks the extra norms of H and G: stages\.0\.1\.extra_norm\.weight"):
        rename(encoder_of(extra_norm_every=2).state_dict())


@pytest.mark.parametrize("bias", ["linear_cpb", "table"])
@pytest.mark.parametrize("rename", [there for there, _ in EVERY_WAY])
def test_other_position_biases_have_no_place_elsewhere(rename: Rename, bias: str) -> None:
    with pytest.raises(
        ValueError, match=r"knows model\.position_bias=log_cpb alone for such attention, and .* stages\.0"
    ):
        rename(encoder_of(position_bias=bias).state_dict())


def test_the_first_version_has_a_table_of_a_square_window() -> None:
    mixed = encoder_of(**swin.V1 | {"position_bias": "log_cpb"}).state_dict()
    with pytest.raises(ValueError, match=r"knows model\.position_bias=table alone for such attention"):
        to_timm(mixed)
    state = to_timm(encoder_of(**swin.V1).state_dict())
    key = "layers.0.blocks.0.attn.relative_position_bias_table"
    for count in (8, 16, 120):
        with pytest.raises(ValueError, match=f"are tables of {count} offsets, and no square window has so many"):
            from_timm(state | {key: torch.zeros(count, 2)})
