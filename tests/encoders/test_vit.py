"""The Vision Transformer against timm's BEiT: features, SimMIM's loss and every gradient; and what is its own."""

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from timm.models.beit import Beit
from torch import Tensor, nn
from torch.nn import functional as F

from simmim.encoders import SIZES, Encoder, create_encoder, swinv2
from simmim.encoders.vit import spread_table
from simmim.masking import expand_mask
from simmim.tasks.classification import ImageClassifier
from simmim.tasks.pretraining import MaskedImageModel
from simmim.training.optimizer import create_optimizer, is_decayed
from simmim.training.propagation import measure_blocks

SMALL: dict[str, Any] = {"embed_dim": 24, "depths": (3,), "num_heads": (3,), "patch_size": 8}
BIASES = {"shared_table": {"use_shared_rel_pos_bias": True}, "table": {"use_rel_pos_bias": True}}


def small_encoder(**overrides: Any) -> Encoder:
    return create_encoder("vit", **{**SMALL, "window_size": 6, **overrides})


def objective(encoder: Encoder) -> MaskedImageModel:
    settings: dict[str, Any] = {"head": "linear", "loss": "l1", "predict": "hidden", "target": "raw"}
    return MaskedImageModel(encoder, **settings, target_window=47, target_downsampling=1)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """No zero and no one: tables, biases, scales and norms must all count."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        wide = parameter.ndim >= 2 and "position_bias" not in name
        parameter.data.copy_(noise / math.sqrt(parameter[0].numel()) if wide else 0.5 * noise + 0.2)


class Masked(nn.Module):
    """timm's patch embedding, and the mask token in the place of what is hidden."""

    def __init__(self, inner: nn.Module, token: Tensor, mask: Tensor | None) -> None:
        super().__init__()
        self.inner, self.mask = inner, mask
        self.mask_token = nn.Parameter(token.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        x = self.inner(images)
        return x if self.mask is None else torch.where(self.mask.flatten(1)[..., None], self.mask_token, x)


PARTS = {"norm1": "norm1", "norm2": "norm2", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2", "attention.proj": "attn.proj",
         "attention.qkv": "attn.qkv"}  # fmt: skip


def renamed(state: Mapping[str, Tensor], window: tuple[int, int]) -> dict[str, Tensor]:
    """Our names as timm's, for maps of this size; also of gradients. Typed from the names of timm's modules."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if found := re.fullmatch(r"embed\.(.*)", key):
            out[f"patch_embed.proj.{found[1]}"] = value
        elif key == "class_token":
            out["cls_token"] = value.view(1, 1, -1)
        elif found := re.fullmatch(r"(stages\.0\.(\d+)\.attention\.)?position_bias\.table", key):
            place = "rel_pos_bias" if found[1] is None else f"blocks.{found[2]}.attn"
            pairs = state[key.replace("bias.table", "bias.class_token")]
            table = torch.cat([middle(value, window), pairs.t()])
            out[f"{place}.relative_position_bias_table"] = table
        elif found := re.fullmatch(r"stages\.0\.(\d+)\.(?:attention\.([qv]_bias)|gamma(\d))", key):
            out[f"blocks.{found[1]}.{f'attn.{found[2]}' if found[2] else f'gamma_{found[3]}'}"] = value
        elif found := re.fullmatch(r"stages\.0\.(\d+)\.(.*)\.(weight|bias)", key):
            out[f"blocks.{found[1]}.{PARTS[found[2]]}.{found[3]}"] = value
        elif not key.endswith(("mask_token", "bias.class_token")):
            out[key] = value
    return out


def middle(table: Tensor, window: tuple[int, int]) -> Tensor:
    """(n, 2s - 1, 2s - 1) -> (offsets of the window, n), as timm keeps it."""
    rows, columns = (2 * side - 1 for side in window)
    top, left = (table.shape[1] - rows) // 2, (table.shape[2] - columns) // 2
    return table[:, top : top + rows, left : left + columns].flatten(1).t()


def theirs_of(ours: Encoder, size: tuple[int, int], **settings: Any) -> Beit:
    kind = BIASES[ours.config["position_bias"]]
    theirs = Beit(img_size=size, patch_size=8, num_classes=0, embed_dim=24, depth=3, num_heads=3, init_values=0.1,
                  use_abs_pos_emb=False, **{"global_pool": "", **kind, **settings})  # fmt: skip
    state = renamed(ours.state_dict(), ours.windows(*size)[0])
    if isinstance(theirs.norm, nn.Identity):
        state = {key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: state[key] for key in state}
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("size", [(48, 48), (32, 48)], ids=["whole table", "its middle"])
def test_equals_timm(bias: str, size: tuple[int, int]) -> None:
    """Features, and SimMIM's loss by its formula with its gradients: a head of one pixel of convolution, shuffled."""
    network = objective(small_encoder(position_bias=bias))
    ours = network.encoder
    randomize(network)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *size, generator=generator)
    mask = torch.rand(2, size[0] // 16, size[1] // 16, generator=generator) < 0.6  # cells of two patches a side
    theirs = theirs_of(ours, size)
    torch.testing.assert_close(ours(images).flatten(1, 2), theirs.forward_features(images)[:, 1:], atol=1e-5, rtol=0)
    theirs.patch_embed = Masked(theirs.patch_embed, ours.mask_token, expand_mask(mask, size[0] // 8, size[1] // 8))
    features = theirs.forward_features(images)[:, 1:]
    decoded = F.linear(features, network.head.weight.detach(), network.head.bias.detach())
    predicted = F.pixel_shuffle(decoded.transpose(1, 2).unflatten(2, (size[0] // 8, size[1] // 8)), 8)
    pixels = expand_mask(mask, *size)[:, None]
    expected = ((images - predicted).abs() * pixels).sum() / (pixels.sum() + 1e-5) / 3
    loss = network(images, mask)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    found = renamed(gradients, ours.windows(*size)[0])
    found["patch_embed.mask_token"] = gradients["mask_token"]
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        wanted, name = parameter.grad, name.replace("patch_embed.inner.", "patch_embed.")
        assert (found.pop(name) - wanted).norm() <= 1e-3 * wanted.norm(), name
    assert not found


def test_a_classifier_sees_what_that_of_beit_does() -> None:
    """The mean of the patches, without the class token, and then the norm."""
    ours = small_encoder(position_bias="table")
    randomize(ours)
    theirs = theirs_of(ours, (48, 48), global_pool="avg")
    images = torch.randn(2, 3, 48, 48)
    expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    torch.testing.assert_close(ours.pooled(images), expected, atol=1e-5, rtol=0)
    classifier = ImageClassifier(ours, classes=4, label_smoothing=0)
    torch.testing.assert_close(classifier.logits(images), classifier.head(expected), atol=1e-5, rtol=0)


def test_attention_implementations_agree() -> None:
    results = []
    for attention in ("reference", "sdpa", "auto"):
        ours = small_encoder(attention=attention).double()
        randomize(ours)
        images = torch.randn(2, 3, 48, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        features = ours(images)
        features.square().sum().backward()
        results.append((features, *(parameter.grad for parameter in ours.parameters() if parameter.grad is not None)))
    for found in results[1:]:
        for value, expected in zip(found, results[0], strict=True):
            torch.testing.assert_close(value, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_features_at_some_places_are_those_of_the_whole(checkpointed: bool) -> None:
    """Stochastic depth included, and whether or not the blocks are computed again."""
    encoder, whole = (small_encoder(drop_path=0.5) for _ in range(2))
    encoder.checkpoint_activations("all" if checkpointed else "none")
    images, mask = torch.randn(4, 3, 48, 32), torch.rand(4, 3, 2) < 0.6
    at = expand_mask(mask, 6, 4).nonzero(as_tuple=True)
    results = []
    for model in (encoder, whole):
        randomize(model)
        torch.manual_seed(5)
        features = model.features_at(images, mask, at) if model is encoder else model(images, mask)[at]
        (features * torch.arange(24)).sum().backward()
        results.append((features, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)
    for found, expected in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_hidden_pixels_do_not_reach_the_output() -> None:
    encoder = small_encoder()
    randomize(encoder)
    images, mask = torch.randn(1, 3, 48, 48, requires_grad=True), torch.rand(1, 3, 3) < 0.5
    encoder(images, mask).square().sum().backward()
    hidden = expand_mask(mask, 48, 48)[:, None].expand_as(images)
    assert images.grad is not None
    assert images.grad[hidden].eq(0).all() and images.grad[~hidden].ne(0).all()


LAYERS = {
    "embed.weight": 0, "embed.bias": 0, "class_token": 0, "mask_token": 0, "stages.0.0.norm1.weight": 1,
    "stages.0.0.gamma1": 1, "stages.0.1.attention.qkv.weight": 2, "stages.0.2.mlp.2.bias": 3, "norm.weight": 4,
    "head.weight": 4,
}  # fmt: skip
"""Typed from the authors' rule for their ViT, of which the shared table is on top and others in their blocks."""


@pytest.mark.parametrize(
    ("bias", "tables"),
    [
        ("shared_table", {"position_bias.table": 4, "position_bias.class_token": 4}),
        ("table", {f"stages.0.{block}.attention.position_bias.table": block + 1 for block in range(3)}),
    ],
)
def test_layers_and_what_decays(bias: str, tables: dict[str, int]) -> None:
    network = objective(small_encoder(position_bias=bias))
    optimizer = create_optimizer(network, lr=1.0, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.05, layer_decay=0.5)
    names = {id(parameter): name.removeprefix("encoder.") for name, parameter in network.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: rates[name] for name in LAYERS | tables} == {
        name: 0.5 ** (4 - layer) for name, layer in (LAYERS | tables).items()
    }
    decayed = {re.sub(r"\d", "#", name) for name, p in network.encoder.named_parameters() if is_decayed(name, p)}
    block = ("attention.qkv", "attention.proj", "mlp.#", "mlp.#")
    assert decayed == {"embed.weight", *(f"stages.#.#.{part}.weight" for part in block)}


@pytest.mark.parametrize(("name", "millions"), {"vit_s": 21.6, "vit_b": 85.7, "vit_l": 303.1}.items())
def test_published_sizes(name: str, millions: float) -> None:
    """BEiT of that size, without classifier, has as many parameters; the mask token is ours."""
    size = SIZES[name]
    with torch.device("meta"):
        ours = create_encoder(name, window_size=14)
        theirs = Beit(num_classes=0, embed_dim=size["embed_dim"], depth=size["depths"][0], init_values=0.1,
                      num_heads=size["num_heads"][0], use_abs_pos_emb=False, use_shared_rel_pos_bias=True)  # fmt: skip
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.parameters()) + size["embed_dim"]
    assert count / 1e6 == pytest.approx(millions, abs=0.06)
    assert (ours.stride, ours.windows(224, 224)) == (16, [(14, 14)])


def test_initial_values() -> None:
    """Within one deviation; the last layers of the branches by 1 / sqrt(2 l); a table of zeros."""
    encoder = create_encoder("vit", embed_dim=96, depths=[4], num_heads=[3], window_size=14)
    first, last = encoder.blocks[0][0], encoder.blocks[0][3]
    even = first.attention.qkv.weight.std()
    assert first.attention.qkv.weight.abs().max() <= 0.02 and 0.009 < even < 0.0125
    for level, block in ((1, first), (4, last)):
        for layer in (block.attention.proj, block.mlp[-1]):
            assert float((layer.weight.std() / even).detach()) == pytest.approx((2 * level) ** -0.5, rel=0.05)
    assert last.gamma1 is not None and last.gamma1.eq(0.1).all() and last.gamma2.eq(0.1).all()
    assert encoder.position_bias.table.eq(0).all() and encoder.position_bias.class_token.eq(0).all()
    assert encoder.norm.eps == 1e-6
    assert small_encoder(layer_scale=0).blocks[0][0].gamma1 is None


def test_a_shared_table_that_is_spread_changes_nothing() -> None:
    shared, own = small_encoder(), small_encoder(position_bias="table")
    randomize(shared)
    own.load_state_dict(spread_table(shared.state_dict(), 3))
    images = torch.randn(1, 3, 48, 48)
    assert torch.equal(own(images), shared(images))


def test_pyramid_is_the_map_of_the_padded_image() -> None:
    encoder = small_encoder()
    randomize(encoder)
    images = torch.randn(2, 3, 43, 30)
    (features,) = encoder.pyramid(images)
    assert features.shape == (2, 24, 6, 4)
    assert torch.equal(features.permute(0, 2, 3, 1), encoder(F.pad(images, (0, 2, 0, 5))))
    with pytest.raises(ValueError, match=r"^image size 56x32 px does not fit"):
        encoder.pyramid(torch.zeros(1, 3, 50, 32))


@pytest.mark.parametrize(("size", "ways"), [((48, 20), "20 -> 16 or 24"), ((64, 48), "64 -> 48"), ((48, 4), "4 -> 8")])
def test_image_size_error_names_sizes_that_fit(size: tuple[int, int], ways: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.window_size=6: the nearest data\.image_size that do are {ways}, or"):
        small_encoder()(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"depths": (2, 1), "num_heads": (3, 3)}, "model.depths=[2, 1]: a Vision Transformer has one stage"),
        ({"attention": "sequential"}, "model.attention=sequential is for attention within windows: choose one of auto"),
        ({"attention": "slow"}, "model.attention=slow is unknown: choose one of auto, reference, sdpa"),
        ({"position_bias": "log_cpb"}, "model.position_bias=log_cpb is none of a Vision Transformer"),
        ({"layer_scale": -0.1}, "model.layer_scale=-0.1 must not be negative"),
        ({"norm": "pre"}, "model.norm=pre is nothing that model.name=vit has: give model.norm=null"),
        ({"extra_norm_every": 0}, "model.extra_norm_every=0 is nothing that model.name=vit has"),
        ({"pretrained_window_size": 12}, "model.pretrained_window_size=12 is nothing that"),
        ({"num_heads": (5,)}, "model.num_heads=[5]: stage 1 has 24 channels, which 5 heads do not divide"),
    ],
)
def test_settings_that_it_does_not_have(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(line)}"):
        small_encoder(**settings)


def test_swin_has_no_layer_scale() -> None:
    name = next(iter(swinv2.SIZES))
    with pytest.raises(ValueError, match=r"^model\.layer_scale=0\.1 is nothing that model\.name=swinv2_t has"):
        create_encoder(name, window_size=4, layer_scale=0.1)


@pytest.mark.parametrize("bias", BIASES)
def test_the_highest_attention_is_timms(bias: str) -> None:
    ours = small_encoder(position_bias=bias)
    randomize(ours)
    theirs, images = theirs_of(ours, (48, 48)), torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    expected: list[Tensor] = []
    for block in theirs.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, out: expected.append(out.amax(-1).mean((0, 2))))
    theirs.forward_features(images)
    found = measure_blocks(ours, lambda: ours(images)).attention
    assert len(found) == len(expected) == 3
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)
        assert own.std() > 1e-4
