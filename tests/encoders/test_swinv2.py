"""The encoder against timm and transformers (features and gradients), and the properties of the method.

Two independent implementations stand in for the authors' code. All weights are random, post-norms and biases
included, because a new encoder's zeros would hide everything behind them.
"""

import math
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import Swinv2Config, Swinv2Model
from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer

from simmim.encoders import SIZES, SwinTransformerV2, create_encoder, position_bias, windows
from simmim.encoders.names import from_timm, from_transformers, to_timm, to_transformers
from simmim.encoders.position_bias import LogSpacedPositionBias, bias_of_pairs, log_spaced_offsets
from simmim.encoders.similarity import MAX_LOG_SCALE
from simmim.encoders.windows import Geometry, Windows
from simmim.masking import expand_mask

SMALL: dict[str, Any] = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (3, 3, 6, 12)}
PRETRAINED = (12, 12, 12, 6)
CPU = torch.device("cpu")

GEOMETRIES = {  # size in pixels, window and patch, windows of an earlier stage, channels
    "192/12": {"size": (192, 192), "window": 12},
    "256/8": {"size": (256, 256), "window": 8},
    "256/16": {"size": (256, 256), "window": 16},
    "224/14 after 192/12": {"size": (224, 224), "window": 14, "pretrained": PRETRAINED},
    "64/8, patch 2": {"size": (64, 64), "window": 8, "patch": 2},
    "64/8, 1 channel": {"size": (64, 64), "window": 8, "channels": 1},
    "64/8, 4 channels": {"size": (64, 64), "window": 8, "channels": 4},
}
WIDE = {  # the window shrinks along one axis alone, and shifts along the other alone
    "192x384/12": {"size": (192, 384), "window": 12},
    "384x192/12 after 192/12": {"size": (384, 192), "window": 12, "pretrained": PRETRAINED},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are faster without threads that wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_encoder(window: int = 8, patch: int = 4, **overrides: Any) -> SwinTransformerV2:
    settings = {"extra_norm_every": 0, **SMALL, "window_size": window, "patch_size": patch, **overrides}
    return create_encoder("swinv2", **settings)


def our_encoder(
    size: tuple[int, int],
    window: int,
    patch: int = 4,
    pretrained: Any = None,
    channels: int = 3,
    **overrides: Any,
) -> SwinTransformerV2:
    return small_encoder(window, patch, pretrained_window_size=pretrained, in_channels=channels, **overrides)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """No zero, no one, a head's scale beyond the clamp; mild enough that fp32 holds 1e-3 in the gradients."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "logit_scale" in name:
            noise = math.log(10) + 0.5 * noise
            noise[0] = MAX_LOG_SCALE + 1
        elif parameter.shape[-1] == 512:  # position bias, last layer
            noise = 3 * noise / math.sqrt(512)
        elif parameter.shape[-1] == 2:  # its first layer
            pass
        elif parameter.ndim >= 2:
            noise = noise / math.sqrt(parameter[0].numel())
        elif "norm" in name and name.endswith("weight"):
            noise = 0.6 + 0.2 * noise
        else:
            noise = 0.2 * noise
        parameter.data.copy_(noise)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = 1e-3) -> None:
    assert ours.keys() == theirs.keys()
    errors = {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-6)) for name in ours}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < tolerance, f"{worst}: relative error {errors[worst]:.1e}"


def backward(features: Tensor) -> None:
    """A loss whose gradient differs in every feature; (B, H, W, C)."""
    (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(7))).sum().backward()


def images_of(size: tuple[int, int], channels: int = 3) -> Tensor:
    batch = 2 if max(size) < 192 else 1  # large images cost time, and hold many windows as it is
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("geometry", (GEOMETRIES | WIDE).values(), ids=(GEOMETRIES | WIDE).keys())
def test_equals_timm(geometry: dict[str, Any]) -> None:
    ours = our_encoder(**geometry)
    channels, size = geometry.get("channels", 3), geometry["size"]
    theirs = TimmSwinV2(
        img_size=size,
        patch_size=geometry.get("patch", 4),
        in_chans=channels,
        num_classes=0,
        window_size=geometry["window"],
        drop_path_rate=0,
        pretrained_window_sizes=geometry.get("pretrained", (0, 0, 0, 0)),
        **SMALL,
    )
    randomize(theirs)
    ours.load_state_dict(from_timm(theirs.state_dict()) | {"mask_token": ours.mask_token})
    there_and_back = to_timm(ours.state_dict())
    assert all(torch.equal(value, there_and_back[key]) for key, value in theirs.state_dict().items())
    features, expected = ours(images_of(size, channels)), theirs.forward_features(images_of(size, channels))
    rounding = 2 if size[0] != size[1] else 1  # wide: both are within 6e-5 of float64, to different sides of it
    torch.testing.assert_close(features, expected, atol=rounding * 1e-4, rtol=0)
    backward(features)
    backward(expected)
    assert_same_gradients(gradients(ours), from_timm(gradients(theirs)), tolerance=rounding * 1e-3)


def once_masked(layer: Swinv2Layer, *args: Any, **kwargs: Any) -> Tensor | None:
    mask = original_mask(layer, *args, **kwargs)
    return None if mask is None else mask / 2


original_mask = Swinv2Layer.get_attn_mask


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_equals_transformers(geometry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers adds its mask of -100 twice, where the authors add it once: halved, the two agree.
    monkeypatch.setattr(Swinv2Layer, "get_attn_mask", once_masked)
    ours = our_encoder(**geometry)
    channels, size, patch = geometry.get("channels", 3), geometry["size"], geometry.get("patch", 4)
    config = Swinv2Config(
        image_size=size[0],
        patch_size=patch,
        num_channels=channels,
        window_size=geometry["window"],
        pretrained_window_sizes=geometry.get("pretrained", (0, 0, 0, 0)),
        drop_path_rate=0.0,
        **{key: value if isinstance(value, int) else list(value) for key, value in SMALL.items()},
    )
    theirs = Swinv2Model(config, add_pooling_layer=False, use_mask_token=True)
    randomize(theirs)
    ours.load_state_dict(from_transformers(theirs.state_dict()))
    there_and_back = to_transformers(ours.state_dict())
    assert all(torch.equal(value, there_and_back[key]) for key, value in theirs.state_dict().items())
    images = images_of(size, channels)
    mask = torch.rand(len(images), *(side // 32 for side in size), generator=torch.Generator().manual_seed(1)) < 0.6
    patches = expand_mask(mask, size[0] // patch, size[1] // patch).flatten(1)
    features = ours(images, mask)
    expected = theirs(images, bool_masked_pos=patches).last_hidden_state.view_as(features)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)
    backward(features)
    backward(expected)
    assert_same_gradients(gradients(ours), from_transformers(gradients(theirs)))


def test_weights_of_the_parity_tests_reach_every_part() -> None:
    """The parity above would prove little if scale, bias and shift mask did not matter to the features."""
    encoder = small_encoder()
    randomize(encoder)
    images = images_of((64, 64))
    features = encoder(images).detach()
    for part in (
        "logit_scale",
        "position_bias.mlp.0.weight",
        "position_bias.mlp.2.weight",
        "q_bias",
        "v_bias",
    ):
        changed = small_encoder()
        changed.load_state_dict(encoder.state_dict())
        for name, parameter in changed.named_parameters():
            if name.endswith(part):
                parameter.data.mul_(0.9)
        assert (changed(images) - features).abs().max() > 1e-2, part
    bias = encoder.stages[0][0].attention.position_bias(log_spaced_offsets((8, 8), (8, 8), CPU))
    assert bias.std() > 2  # of 0 to 16


def test_a_scale_beyond_the_clamp_stands_still() -> None:
    encoder = small_encoder()
    randomize(encoder)
    backward(encoder(images_of((64, 64))))
    scales = [value for name, value in gradients(encoder).items() if name.endswith("logit_scale")]
    assert all(value[0] == 0 and value[1] != 0 for value in scales)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_features_at_some_places_are_those_of_the_whole(drop_path: float) -> None:
    """Leaving out what nobody reads of the last block changes no number, stochastic depth included."""
    encoder, whole = (small_encoder(4, drop_path=drop_path) for _ in range(2))
    randomize(encoder)
    randomize(whole)
    images = torch.randn(4, 3, 256, 128)  # the last map is 8 x 4 tokens: two windows
    mask = torch.rand(4, 8, 4) < 0.6
    image, row, column = mask.nonzero(as_tuple=True)
    results = []
    for model in (encoder, whole):
        torch.manual_seed(5)
        at = (image, row, column)
        features = model.features_at(images, mask, at) if model is encoder else model(images, mask)[at]
        backward(features)
        results.append((features, gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)
    assert_same_gradients(results[0][1], results[1][1])


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, which PyTorch compiles with on a CPU")
@pytest.mark.parametrize("bias", ["log_cpb", "linear_cpb", "table"])
def test_compiled_blocks_change_no_number(bias: str) -> None:
    """Names stay, too: a checkpoint of a compiled model loads into another one."""
    size: dict[str, Any] = {"depths": (2, 1), "num_heads": (3, 3), "embed_dim": 12, "position_bias": bias}
    encoder, compiled = (small_encoder(4, 8, **size) for _ in range(2))
    randomize(encoder)
    compiled.load_state_dict(encoder.state_dict())
    compiled.compile_blocks()
    assert compiled.state_dict().keys() == encoder.state_dict().keys()
    graphs = counters["stats"]["unique_graphs"]
    for model in (encoder, compiled):
        backward(model(images_of((64, 64))))
    assert counters["stats"]["unique_graphs"] > graphs and not counters["graph_break"]
    torch.testing.assert_close(compiled(images_of((64, 64))), encoder(images_of((64, 64))), atol=1e-5, rtol=0)
    assert_same_gradients(gradients(compiled), gradients(encoder))


def test_published_sizes() -> None:
    published = {  # millions of parameters without and with a head of 1,000 classes
        "swinv2_t": (27.6, 28.3),
        "swinv2_s": (49.0, 49.7),
        "swinv2_b": (86.9, 87.9),
        "swinv2_l": (195.2, 196.7),
        "swinv2_h": (655.2, 658.0),
        "swinv2_g": (2997.8, 3001.9),
    }
    assert published.keys() == {name for name in SIZES if name.startswith("swinv2")}
    for name, (backbone, classifier) in published.items():
        encoder = meta_encoder(name)
        count = sum(parameter.numel() for parameter in encoder.parameters())
        head = 1000 * (encoder.channels[-1] + 1)
        assert round(count / 1e6, 1) == backbone, name
        assert round((count + head) / 1e6, 1) == classifier, name


def test_giant_with_the_depths_of_an_article() -> None:
    encoder = meta_encoder("swinv2_g", depths=(2, 2, 42, 2))
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count / 1e6 == pytest.approx(2594.9, abs=0.1)


@pytest.mark.parametrize(("name", "expected"), [("swinv2_l", 0), ("swinv2_h", 3), ("swinv2_g", 7)])
def test_extra_norms_stand_in_stage_3(name: str, expected: int) -> None:
    norms = [key for key in meta_encoder(name).state_dict() if key.endswith("extra_norm.weight")]
    assert len(norms) == expected
    assert norms == [f"stages.2.{6 * norm + 5}.extra_norm.weight" for norm in range(expected)]


def meta_encoder(name: str, **overrides: Any) -> SwinTransformerV2:
    with torch.device("meta"):
        return create_encoder(name, window_size=12, **overrides)


def test_extra_norm_is_on_the_main_branch() -> None:
    encoder = small_encoder(extra_norm_every=2)
    randomize(encoder)
    first, second = encoder.stages[0]
    assert isinstance(first.extra_norm, nn.Identity)
    norm, x, geometry = second.extra_norm, torch.randn(1, 4, 64, 24), geometry_of(Windows((16, 16), (8, 8), (4, 4)))
    with_norm = second(x, geometry)
    second.extra_norm = nn.Identity()
    torch.testing.assert_close(with_norm, norm(second(x, geometry)))


def geometry_of(shape: Windows) -> Geometry:
    offsets = log_spaced_offsets(shape.window, shape.window, CPU)
    return Geometry(shape.window, offsets, windows.regions(shape, CPU))


def test_blocks_of_a_new_encoder_are_the_identity() -> None:
    encoder = small_encoder()
    images = images_of((64, 64))
    x = encoder.embed(images)
    for merge in encoder.merges:
        neighbours = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        x = merge.norm(merge.reduction(torch.cat(neighbours, dim=-1)))
    torch.testing.assert_close(encoder(images), encoder.norm(x))


def test_same_seed_same_encoder() -> None:
    first, second = (seeded(5).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not torch.equal(first["mask_token"], seeded(6).state_dict()["mask_token"])


def seeded(seed: int) -> SwinTransformerV2:
    torch.manual_seed(seed)
    return small_encoder()


def test_initial_values() -> None:
    encoder = create_encoder("swinv2_t", window_size=8)
    attention = encoder.stages[2][3].attention
    assert torch.allclose(attention.logit_scale, torch.tensor(math.log(10)))
    for weight in (attention.qkv.weight, encoder.merges[1].reduction.weight, encoder.mask_token):
        assert 0.016 < weight.std() < 0.024
    assert encoder.embed.norm.weight.eq(1).all() and encoder.norm.weight.eq(1).all()


def test_nothing_geometric_is_stored() -> None:
    encoder = small_encoder()
    encoder(images_of((64, 64)))
    assert not list(encoder.buffers())
    assert encoder.state_dict().keys() == dict(encoder.named_parameters()).keys()


def test_windows_shrink_to_the_map() -> None:
    encoder = meta_encoder("swinv2_b")
    assert encoder.windows(192, 192) == [(12, 12), (12, 12), (12, 12), (6, 6)]
    assert encoder.windows(192, 384) == [(12, 12), (12, 12), (12, 12), (6, 12)]


def test_log_spaced_offsets_extrapolate_less() -> None:
    """From a window of 8 to 16 tokens 0.33 times in log space (article's check)."""
    unscaled = (9, 9)  # a trained window of 9 scales offsets by 8 / (9 - 1): equation 4 as it stands
    reach = [float(log_spaced_offsets((size, size), unscaled, CPU).max()) for size in (8, 16)]
    assert reach == pytest.approx([1.0, 4 / 3])  # log2(8) / log2(8), log2(16) / log2(8)
    assert reach[1] / reach[0] - 1 == pytest.approx(0.33, abs=0.01)


def test_offsets_of_the_trained_window_span_the_same_range() -> None:
    for size in (6, 8, 24):
        offsets = log_spaced_offsets((size, size), (size, size), CPU)
        assert offsets.max() == -offsets.min() == pytest.approx(math.log2(9) / 3)
    assert log_spaced_offsets((1, 1), (1, 1), CPU).tolist() == [[[0, 0]]]


def test_position_bias_depends_on_the_offset_alone() -> None:
    bias = LogSpacedPositionBias(2)
    randomize(bias)
    height, width = 3, 5
    offsets = log_spaced_offsets((3, 5), (3, 5), CPU)
    pairs = bias_of_pairs(bias(offsets), (3, 5)).view(2, height, width, height, width)
    whole = 16 * bias.mlp(offsets).sigmoid()  # (5, 9, 2)
    for row, column, to_row, to_column in [(0, 0, 2, 4), (2, 1, 0, 3), (1, 2, 1, 2)]:
        expected = whole[row - to_row + height - 1, column - to_column + width - 1]
        torch.testing.assert_close(pairs[:, row, column, to_row, to_column], expected)


@pytest.mark.parametrize(("height", "width", "window"), [(200, 192, 12), (250, 10, 8), (100, 1000, 7)])
def test_image_size_error_names_sizes_that_fit(height: int, width: int, window: int) -> None:
    encoder = small_encoder(window)
    with pytest.raises(ValueError, match=f"{height}x{width} px does not fit") as caught:
        encoder(torch.zeros(1, 3, height, width))
    ways = re.findall(r"(\d+) -> (\d+)(?: or (\d+))?", str(caught.value))
    assert ways and "\n" not in str(caught.value)
    for bad, *near in ways:
        assert int(bad) in (height, width)
        for size in filter(None, near):
            encoder.check_image_size(int(size), int(size))


def test_hidden_pixels_do_not_reach_the_output() -> None:
    encoder = small_encoder()
    randomize(encoder)
    images = images_of((128, 128)).requires_grad_()
    mask = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    backward(encoder(images, mask))
    hidden = expand_mask(mask, 128, 128)[:, None].expand_as(images)
    assert images.grad is not None
    assert images.grad[hidden].eq(0).all()
    assert images.grad[~hidden].ne(0).float().mean() > 0.99
    assert encoder.mask_token.grad is not None and encoder.mask_token.grad.ne(0).all()


def test_features_keep_the_mask_apart_from_the_position() -> None:
    """The mask's cells lie where the pixels lie: swapping rows and columns of both swaps nothing else."""
    encoder = small_encoder()
    images, mask = images_of((64, 128)), torch.zeros(2, 2, 4, dtype=torch.bool)
    mask[:, 0, 3] = True
    difference = (encoder(images, mask) - encoder(images)).abs().sum(-1) > 0  # identity blocks: all stays local
    assert torch.equal(difference, mask)


@pytest.mark.parametrize("size", [(75, 101), (33, 150)])
def test_pyramid_of_an_odd_size(size: tuple[int, int]) -> None:
    encoder = small_encoder()
    randomize(encoder)
    maps = encoder.pyramid(images_of(size))
    for x, channels, stride in zip(maps, encoder.channels, (4, 8, 16, 32), strict=True):
        assert x.shape == (2, channels, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        assert x.isfinite().all()
    sum(x.square().mean() for x in maps).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(encoder).values())


def test_pyramid_ends_in_the_features() -> None:
    encoder = small_encoder()
    randomize(encoder)
    images = images_of((64, 128))
    assert torch.equal(encoder.pyramid(images)[-1].permute(0, 2, 3, 1), encoder(images))


@pytest.mark.parametrize("shift", [(0, 0), (2, 2)], ids=["regular", "shifted"])
@pytest.mark.parametrize("attention", ["reference", "sdpa", "sequential"])
def test_padding_of_a_map_changes_nothing(shift: tuple[int, int], attention: str) -> None:
    """Whatever stands in the padding: nothing of it reaches a real token, nor a gradient."""
    encoder = small_encoder(4, attention=attention)
    randomize(encoder)
    shape = Windows((10, 13), (4, 4), shift)
    padding = windows.places(shape, CPU).view(1, *shape.shape, 1) >= 10 * 13
    assert padding.sum() == 12 * 16 - 10 * 13
    x = torch.randn(2, *shape.shape, 24)
    results = []
    for noise in (0, 50):
        encoder.zero_grad()
        out = encoder.stages[0][0](torch.where(padding, noise * torch.randn_like(x), x), geometry_of(shape))
        backward(torch.where(padding, 0, out))
        results.append((torch.where(padding, 0, out), gradients(encoder)))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=0)
    assert_same_gradients(results[0][1], results[1][1], tolerance=1e-4)


def test_window_at_the_border_of_a_padded_map() -> None:
    """A window cut by the border is attention among its real tokens, with their offsets' biases."""
    encoder = small_encoder(4)
    randomize(encoder)
    attention, shape, x = encoder.stages[0][0].attention, Windows((10, 13), (4, 4)), torch.randn(2, 10, 13, 24)
    dealt = windows.reorder(x.flatten(1, 2).unsqueeze(1), Windows.whole((10, 13)), shape)
    dealt = attention(dealt, geometry_of(shape))
    corner = windows.reorder(dealt, shape, Windows.whole((10, 13))).view(2, 10, 13, 24)[:, 8:, 12:]
    real = [0, 4]  # rows 0 and 1 of column 0: 2 x 1 tokens of a window of 4 x 4
    bias = attention.position_bias(log_spaced_offsets((4, 4), (4, 4), CPU))
    bias = bias_of_pairs(bias, (4, 4))[:, real][:, :, real]
    qkv_bias = torch.cat([attention.q_bias, torch.zeros(24), attention.v_bias])
    tokens = x[:, 8:, 12:].flatten(1, 2)
    query, key, value = (tokens @ attention.qkv.weight.t() + qkv_bias).view(2, 2, 3, 3, 8).permute(2, 0, 3, 1, 4)
    cosine = nn.functional.cosine_similarity(query[..., :, None, :], key[..., None, :, :], dim=-1)
    logits = cosine * attention.logit_scale.clamp(max=MAX_LOG_SCALE).exp() + bias
    expected = attention.proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2)).view(2, 2, 1, 24)
    torch.testing.assert_close(corner, expected, atol=1e-5, rtol=0)


def test_trains_after_inference_mode() -> None:
    """What the first forward caches must serve both: a validation run may come before the first step."""
    for cached in (windows.places, windows.regions, windows._exchange, *position_bias.OFFSETS.values()):
        cached.cache_clear()
    encoder = small_encoder(5)
    with torch.inference_mode():
        encoder.pyramid(images_of((70, 70)))
    backward(encoder.pyramid(images_of((70, 70)))[-1])


def test_stochastic_depth_grows_with_the_block() -> None:
    encoder = small_encoder(drop_path=0.7)
    rates = [block.drop_path.p for stage in encoder.stages for block in stage]
    assert rates == pytest.approx([0.1 * block for block in range(8)])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"num_heads": (3, 5, 6, 12)}, "stage 2 has 48 channels, which 5 heads"),
        ({"depths": (2, 2)}, "depths"),
        ({"pretrained_window_size": (12, 12)}, "pretrained_window_size"),
        ({"attention": "slow"}, "attention=slow"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
    ],
)
def test_contradictions_are_named(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        small_encoder(**overrides)


def test_unknown_and_incomplete_sizes() -> None:
    with pytest.raises(ValueError, match=r"model\.name=swinv2_x is unknown"):
        create_encoder("swinv2_x", window_size=8)
    with pytest.raises(ValueError, match=r"give model\.depths, model\.num_heads, model\.extra_norm_every"):
        create_encoder("swinv2", window_size=8, embed_dim=16)
