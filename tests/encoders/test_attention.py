"""Every implementation of the attention against the reference: output and gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from simmim.encoders import attention, sequential_attention
from simmim.encoders.attention import (
    IMPLEMENTATIONS,
    highest_weights,
    resolve_implementation,
    window_attention,
)
from simmim.encoders.similarity import MAX_LOG_SCALE
from simmim.encoders.windows import Geometry, Windows, regions

CPU = torch.device("cpu")
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
SHAPES = {
    "one window": Windows((6, 6), (6, 6)),
    "square": Windows((12, 12), (6, 6)),
    "shifted": Windows((12, 12), (6, 6), (3, 3)),
    "shifted along one axis": Windows((4, 16), (4, 8), (0, 4)),
    "not square": Windows((8, 18), (4, 6), (2, 3)),
    "padded": Windows((10, 13), (4, 4), (2, 2)),
}
HEADS, CHANNELS, IMAGES = 3, 16, 2


def inputs(
    shape: Windows, dtype: torch.dtype = torch.float32, device: str = "cpu", *, cosine: bool = True
) -> dict[str, Tensor]:
    """Heads of a low, a usual and a clamped scale; biases over their whole range. Or dot products, without a scale."""
    generator = torch.Generator().manual_seed(0)
    h, w = shape.window
    windows, tokens = IMAGES * shape.shape[0], shape.shape[1]
    values = {
        "qkv": torch.randn(3, HEADS, CHANNELS, windows, tokens, generator=generator),
        "log_scale": torch.tensor([0.5, math.log(10), MAX_LOG_SCALE + 1]).view(HEADS, 1, 1),
        "table": 16 * torch.rand(HEADS, 2 * h - 1, 2 * w - 1, generator=generator),
    }
    values["qkv"] = values["qkv"].to(dtype)
    if not cosine:
        del values["log_scale"]
    return {key: value.to(device).requires_grad_() for key, value in values.items()}


def results(name: str, shape: Windows, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients. The gradient that arrives is zero in padding, as in the encoder."""
    device = values["qkv"].device
    geometry = Geometry(shape.window, torch.empty(0), regions(shape, device))
    out = window_attention(**{"log_scale": None, **values}, geometry=geometry, implementation=name)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    if geometry.regions is not None:
        weight *= geometry.regions.ge(0).repeat(IMAGES, 1)
    real = (weight != 0).float()
    gradients = torch.autograd.grad((out * weight).sum(), list(values.values()))
    return {"out": out.detach() * real, **dict(zip(values, gradients, strict=True))}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, out: float, gradients: float) -> None:
    torch.testing.assert_close(found["out"], expected["out"], atol=out * float(expected["out"].abs().max()), rtol=0)
    for key in expected.keys() - {"out"}:
        error = (found[key].float() - expected[key].float()).norm() / expected[key].norm()
        assert error < gradients, f"{key}: relative error {float(error):.1e}"
    if "log_scale" in expected:
        assert expected["log_scale"][2] == 0 == found["log_scale"][2]  # beyond ln 100 the scale stands still


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", ["sdpa", "sequential"])
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
def test_equals_reference(name: str, shape: Windows, device: str, cosine: bool) -> None:
    values = inputs(shape, device=device, cosine=cosine)
    assert_same(results(name, shape, values), results("reference", shape, values), out=1e-5, gradients=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_flex_equals_reference_on_a_gpu(shape: Windows) -> None:
    """With gradients, which FlexAttention has on GPUs alone."""
    values = inputs(shape, device="cuda")
    assert_same(results("flex", shape, values), results("reference", shape, values), out=1e-4, gradients=1e-3)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
def test_forward_of_flex_equals_reference(shape: Windows, cosine: bool) -> None:
    geometry = Geometry(shape.window, torch.empty(0), regions(shape, CPU))
    values: dict[str, Any] = {key: value.detach() for key, value in inputs(shape, cosine=cosine).items()}
    values = {"log_scale": None, **values}
    flex, expected = (window_attention(**values, geometry=geometry, implementation=n) for n in ("flex", "reference"))
    real = 1 if geometry.regions is None else geometry.regions.ge(0).repeat(IMAGES, 1)
    assert (flex * real - expected * real).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
def test_the_highest_weights_by_hand(shape: Windows, cosine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pair by pair, padding left out, whatever is looked at at a time."""
    monkeypatch.setattr(attention, "LOGITS_AT_A_TIME", shape.shape[0] * shape.shape[1] ** 2)
    values: dict[str, Any] = {key: value.detach() for key, value in inputs(shape, cosine=cosine).items()}
    (_, width), (windows, tokens), where = shape.window, shape.shape, regions(shape, CPU)
    query, key = values["qkv"][0], values["qkv"][1]  # (n, d, W, T)
    scale = [CHANNELS**-0.5] * HEADS
    if cosine:
        query, key = query / query.norm(dim=1, keepdim=True), key / key.norm(dim=1, keepdim=True)
        scale = values["log_scale"].flatten().clamp(max=math.log(100)).exp().tolist()
    at = torch.arange(tokens)
    rows, columns = (at[:, None] // width - at // width), (at[:, None] % width - at % width)
    expected = []
    for head in range(HEADS):
        table, highest = values["table"][head], []
        bias = table[rows + shape.window[0] - 1, columns + width - 1]  # (T, T)
        for window in range(IMAGES * windows):
            logits = scale[head] * query[head, :, window].t() @ key[head, :, window] + bias
            kind = torch.zeros(tokens) if where is None else where[window % windows]
            logits = torch.where(kind[:, None] == kind, logits, logits - 100)
            logits = logits.masked_fill(kind.lt(0), -torch.inf)[kind.ge(0)]
            highest += logits.softmax(1).amax(1).tolist()
        expected.append(sum(highest) / len(highest))
    geometry = Geometry(shape.window, torch.empty(0), where)
    found = highest_weights(**{"log_scale": None, **values}, geometry=geometry)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)


def test_flex_refuses_to_train_on_a_cpu() -> None:
    shape = SHAPES["square"]
    with pytest.raises(ValueError, match=r"model\.attention=flex trains on a GPU only: give model\.attention=auto"):
        results("flex", shape, inputs(shape))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", ["reference", "sdpa", "sequential"])
def test_bfloat16_stays_near_fp32(name: str, shape: Windows) -> None:
    values = inputs(shape, torch.bfloat16)
    if name == "sdpa":  # its kernels take queries in bfloat16: the rounding of a cosine, times 100, is no small logit
        values["log_scale"] = values["log_scale"].detach().clamp(max=math.log(10)).requires_grad_()
    exact = {key: value.detach().float().requires_grad_() for key, value in values.items()}
    expected = results("reference", shape, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(name, shape, values)
    assert found["out"].dtype == torch.float32 and found["qkv"].dtype == torch.bfloat16
    for key in ("out", "qkv"):
        error = float((found[key].float() - expected[key]).norm() / expected[key].norm())
        assert error < 2e-2, f"{key}: relative error {error:.1e}"


@pytest.mark.parametrize("logits", [1, 36 * 7, 36 * 36, 5 * 36 * 36, 20 * 36 * 36])
def test_turns_of_any_length_give_the_same(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query at a time, a part of a window, a window, several windows of a head, several heads."""
    shape = SHAPES["shifted"]
    expected = results("reference", shape, inputs(shape))
    monkeypatch.setattr(sequential_attention, "LOGITS_AT_A_TIME", logits)
    assert_same(results("sequential", shape, inputs(shape)), expected, out=1e-5, gradients=1e-3)


@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
def test_sequential_is_a_whole_operator(cosine: bool) -> None:
    """Schema, shapes without data, and autograd registration: what compilation and sharding rely on."""
    shape = SHAPES["shifted"]
    values = inputs(shape, torch.float64)
    arguments = (values["qkv"], values["log_scale"].detach().flatten().exp().double(), values["table"].double())
    torch.library.opcheck(
        sequential_attention._sequential, (*arguments, regions(shape, CPU), list(shape.window), cosine)
    )


@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
def test_sequential_keeps_float64(cosine: bool) -> None:
    """Numbers of a higher precision are not rounded on the way: the gradients pass a numerical check."""
    shape = Windows((2, 4), (2, 2), (0, 1))
    generator = torch.Generator().manual_seed(2)
    size = {"qkv": (3, 2, 3, 2, 4), "log_scale": (2, 1, 1), "table": (2, 3, 3)}
    values = {k: torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for k, s in size.items()}
    if not cosine:
        del values["log_scale"]
    geometry = Geometry(shape.window, torch.empty(0), regions(shape, CPU))

    def attend(*tensors: Tensor) -> Tensor:
        given = {"log_scale": None, **dict(zip(values, tensors, strict=True))}
        return window_attention(**given, geometry=geometry, implementation="sequential")

    assert torch.autograd.gradcheck(attend, tuple(values.values()))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_region_is_seen_through_a_little() -> None:
    """-100, not minus infinity: with the highest scale and biases, another region gets its share."""
    shape = Windows((2, 4), (2, 2), (0, 1))
    qkv = torch.zeros(3, 1, 2, 2, 4)
    qkv[0, 0, 0], qkv[1, 0, 0] = 1.0, torch.tensor([-1.0, 1.0, -1.0, 1.0])  # the other column alone is alike
    qkv[2, 0, 1] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    geometry = Geometry(shape.window, torch.empty(0), regions(shape, CPU))
    scale, table = torch.full((1, 1, 1), MAX_LOG_SCALE), torch.zeros(1, 3, 3)
    for name in IMPLEMENTATIONS:
        out = window_attention(qkv, log_scale=scale, table=table, geometry=geometry, implementation=name)
        assert out[0, 1, 1, 0] == pytest.approx(1, abs=1e-4), name  # 100 - 100 against -100


def test_auto_and_unknown_names() -> None:
    assert resolve_implementation("auto", CPU) == "sequential"
    assert resolve_implementation("flex", CPU) == "flex"
    with pytest.raises(ValueError, match=r"model\.attention=slow is unknown: choose one of auto, reference, sdpa, seq"):
        resolve_implementation("slow", CPU)
