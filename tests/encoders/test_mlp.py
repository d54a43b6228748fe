"""The MLP against the same layers in a row: numbers, and what it keeps for the backward pass."""

import pytest
import torch
from torch import Tensor, nn

from simmim.encoders.mlp import MLP


def run(module: nn.Module, x: Tensor, *, bf16: bool) -> tuple[Tensor, list[Tensor]]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        out = module(x)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    return out, list(torch.autograd.grad((out * weight).sum(), [x, *module.parameters()]))


@pytest.mark.parametrize("bf16", [False, True])
def test_equals_its_layers_in_a_row(bf16: bool) -> None:
    torch.manual_seed(0)
    mlp, x = MLP(8), torch.randn(2, 3, 5, 8, requires_grad=True)
    (out, gradients), (expected, wanted) = (run(m, x, bf16=bf16) for m in (mlp, nn.Sequential(*mlp)))
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected)
    for found, gradient in zip(gradients, wanted, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, gradient, rtol=2e-2 if bf16 else 1e-5, atol=1e-2 if bf16 else 1e-6)


def test_keeps_one_wide_tensor() -> None:
    kept: list[int] = []
    mlp, x = MLP(8), torch.randn(100, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        mlp(x)
    assert kept.count(100 * 32) == 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        nn.Sequential(*mlp)(x)
    assert kept.count(100 * 32) == 3  # in a row: what the activation gets, and what it gives
