"""Swin V1 against timm: features, the loss of masked images, and every gradient."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from torch import Tensor, nn

from simmim.encoders import SIZES, SwinTransformerV2, create_encoder, swin
from simmim.masking import expand_mask

SMALL: dict[str, Any] = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (3, 3, 6, 12)}
GEOMETRIES = {
    "192/6": ((192, 192), 6),
    "224/7": ((224, 224), 7),
    "192/12": ((192, 192), 12),  # the window shrinks in the last stage
    "192x384/12": ((192, 384), 12),
}


def our_encoder(window: int, **overrides: Any) -> SwinTransformerV2:
    return create_encoder("swin_t", **{**SMALL, "window_size": window, **overrides})


def theirs_of(ours: SwinTransformerV2, size: tuple[int, int]) -> TimmSwin:
    """timm's, with our weights, renamed by the shapes and places that its modules document."""
    theirs = TimmSwin(
        img_size=size, num_classes=0, window_size=ours.window_size, drop_path_rate=0, embed_layer=_Masked, **SMALL
    )
    state = {}
    for key, value in renamed(ours.state_dict()).items():
        if key.endswith("relative_position_bias_table"):
            stage = int(key.split(".")[1])
            value = middle(value, ours.windows(*size)[stage])
        state[key] = value
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("relative_position_index" in key or "attn_mask" in key for key in missing)
    return theirs


class _Masked(nn.Module):
    """timm's patch embedding, and the mask token in the place of what is hidden."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        from timm.layers import PatchEmbed

        self.inner = PatchEmbed(**settings)
        self.proj, self.norm, self.grid_size = self.inner.proj, self.inner.norm, self.inner.grid_size
        self.mask_token = nn.Parameter(torch.zeros(settings["embed_dim"]))
        self.mask: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        x = self.inner(images)
        return x if self.mask is None else torch.where(self.mask[..., None], self.mask_token, x)


PARTS = {"attention.proj": "attn.proj", "norm1": "norm1", "norm2": "norm2", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names as timm's; also of gradients."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        kind, *rest = key.split(".")
        if kind == "embed":
            out[f"patch_embed.{'.'.join(rest)}"] = value
            out[f"patch_embed.inner.{'.'.join(rest)}"] = value
        elif kind == "mask_token":
            out["patch_embed.mask_token"] = value
        elif kind == "merges":
            out[f"layers.{int(rest[0]) + 1}.downsample.{'.'.join(rest[1:])}"] = value
        elif kind == "norm":
            out[key] = value
        else:
            stage, block, *inside = rest
            place, name = f"layers.{stage}.blocks.{block}.", ".".join(inside)
            if name == "attention.qkv.weight":
                out[f"{place}attn.qkv.weight"] = value
            elif name == "attention.q_bias":
                v_bias = state[key.replace("q_bias", "v_bias")]
                out[f"{place}attn.qkv.bias"] = torch.cat([value, torch.zeros_like(value), v_bias])
            elif name == "attention.position_bias.table":
                out[f"{place}attn.relative_position_bias_table"] = value
            elif name != "attention.v_bias":
                part, leaf = name.rsplit(".", 1)
                out[f"{place}{PARTS[part]}.{leaf}"] = value
    return out


def middle(table: Tensor, window: tuple[int, int]) -> Tensor:
    """(n, 2s - 1, 2s - 1) -> (offsets of the window, n), as timm keeps it."""
    rows, columns = (2 * side - 1 for side in window)
    top, left = (table.shape[1] - rows) // 2, (table.shape[2] - columns) // 2
    return table[:, top : top + rows, left : left + columns].flatten(1).t().contiguous()


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        wide = parameter.ndim >= 2
        parameter.data.copy_(noise / math.sqrt(parameter[0].numel()) if wide else 0.3 * noise + 0.2)


@pytest.mark.parametrize(("size", "window"), GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_equals_timm(size: tuple[int, int], window: int) -> None:
    ours = our_encoder(window)
    randomize(ours)
    theirs = theirs_of(ours, size)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(1, size[0] // 32, size[1] // 32, generator=torch.Generator().manual_seed(2)) < 0.6
    theirs.patch_embed.mask = expand_mask(mask, size[0] // 4, size[1] // 4)
    features, expected = ours(images, mask), theirs.forward_features(images)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)
    target = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    for out in (features, expected):  # as L1 on hidden cells: here a cell is a token of the last map
        ((out - target).abs() * mask[..., None]).sum().backward()
    found = renamed({name: parameter.grad for name, parameter in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        gradient = found[name]
        if name.endswith("table"):
            gradient = middle(gradient, ours.windows(*size)[int(name.split(".")[1])])
        wanted = parameter.grad
        if name.endswith("qkv.bias"):  # a key's bias changes nothing
            channels = len(wanted) // 3
            assert wanted[channels : 2 * channels].abs().max() < 1e-3 * wanted.abs().max()
            wanted = torch.cat([wanted[:channels], torch.zeros(channels), wanted[2 * channels :]])
        assert (gradient - wanted).norm() < 1e-3 * wanted.norm(), name


@pytest.mark.parametrize("attention", ["sdpa", "sequential"])
def test_attention_implementations_agree(attention: str) -> None:
    ours, other = our_encoder(6, attention="reference"), our_encoder(6, attention=attention)
    ours.load_state_dict({key: value.double() for key, value in ours.state_dict().items()}, assign=True)
    other.load_state_dict(ours.state_dict(), assign=True)
    images = torch.randn(1, 3, 192, 192, dtype=torch.float64)
    torch.testing.assert_close(other(images), ours(images), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("name", "millions"), {"swin_t": 27.5, "swin_s": 48.8, "swin_b": 86.7, "swin_l": 195.0}.items()
)
def test_published_sizes(name: str, millions: float) -> None:
    """timm's, without classifier, agree on the number of parameters but for the key's bias and our mask token."""
    with torch.device("meta"):
        ours = create_encoder(name, window_size=7)
        size = {key: SIZES[name][key] for key in ("embed_dim", "depths", "num_heads")}
        theirs = TimmSwin(num_classes=0, **size)
    count = sum(parameter.numel() for parameter in ours.parameters())
    keys = sum(depth * size["embed_dim"] * 2**stage for stage, depth in enumerate(size["depths"]))
    assert count == sum(p.numel() for p in theirs.parameters()) - keys + size["embed_dim"]
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


def test_a_block_starts_as_no_identity() -> None:
    """V2 begins with the norms of its branches at zero; V1's stand in front of them, at one."""
    encoder = our_encoder(6)
    block = encoder.blocks[0][0]
    assert block.norm1.weight.eq(1).all() and block.norm2.weight.eq(1).all()
    assert block.attention.logit_scale is None
    assert [
        create_encoder(name, window_size=2, **SMALL).config["table_resizing"] for name in ("swin_t", "swinv2_t")
    ] == [
        "geometric",
        "bicubic",
    ]


def test_words_that_are_unknown() -> None:
    with pytest.raises(ValueError, match=r"^model\.norm=post is unknown: choose res_post or pre$"):
        our_encoder(6, norm="post")
    with pytest.raises(ValueError, match=r"^model\.attention_similarity=l2 is unknown: choose cosine or dot$"):
        our_encoder(6, attention_similarity="l2")
    with pytest.raises(ValueError, match=r"^model\.table_resizing=linear is unknown: choose geometric or bicubic$"):
        our_encoder(6, table_resizing="linear")


def test_each_setting_can_be_changed_alone() -> None:
    """For studies of what V2 has changed."""
    for key, value in {"norm": "res_post", "attention_similarity": "cosine", "position_bias": "log_cpb"}.items():
        encoder = our_encoder(6, **{key: value})
        assert {k for k in swin.V1 if encoder.config[k] != swin.V1[k]} == {key}
        assert encoder(torch.randn(1, 3, 192, 192)).isfinite().all()
