import re

import pytest
import torch

from simmim.encoders import create_encoder
from simmim.tasks.pretraining import MaskedImageModel
from simmim.training.optimizer import create_optimizer

# Typed from the released rule: matrices and convolutions decay; everything else does not.
DECAYED = re.compile(
    r"(encoder\.embed\.proj\.weight"
    r"|encoder\.stages\.\d\.\d\.attention\.(qkv|proj)\.weight"
    r"|encoder\.stages\.\d\.\d\.mlp\.[02]\.weight"
    r"|encoder\.merges\.\d\.reduction\.weight"
    r"|head\.weight)"
)


@pytest.fixture
def network(request):
    encoder = create_encoder(
        "swinv2", embed_dim=32, depths=[2, 2], num_heads=[1, 2], extra_norm_every=2, window_size=4,
        position_bias=getattr(request, "param", "log_cpb"),
    )  # fmt: skip
    return MaskedImageModel(
        encoder, head="linear", loss="l1", predict="hidden", target="raw", target_window=47, target_downsampling=1
    )


@pytest.mark.parametrize("network", ["log_cpb", "linear_cpb", "table"], indirect=True)
def test_exactly_the_matrices_decay(network):
    optimizer = create_optimizer(network, lr=1.0, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.05, layer_decay=1)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decay = {
        names[id(parameter)]: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
    }
    assert decay == {name: 0.05 if DECAYED.fullmatch(name) else 0.0 for name in names.values()}


def test_frozen_parameters_are_left_out(network):
    network.encoder.requires_grad_(False)
    optimizer = create_optimizer(network, lr=1.0, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.05, layer_decay=1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_a_step_equals_the_formula_of_adamw(network):
    lr, beta1, beta2, eps, decay = 1e-2, 0.8, 0.9, 1e-2, 0.1
    optimizer = create_optimizer(network, lr=lr, betas=[beta1, beta2], eps=eps, weight_decay=decay, layer_decay=1)
    weight = network.head.weight
    start = weight.detach().clone()
    expected, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for step in range(1, 4):
        weight.grad = torch.full_like(weight, 0.1 * step)
        optimizer.step()
        m = beta1 * m + (1 - beta1) * 0.1 * step
        v = beta2 * v + (1 - beta2) * (0.1 * step) ** 2
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        expected = expected * (1 - lr * decay) - lr * update
    assert torch.allclose(weight.double(), expected, atol=1e-6)


def test_lower_layers_learn_more_slowly(network):
    """Typed from the released rule, for depths 2 and 2: n = 6 layers."""
    optimizer = create_optimizer(network, lr=1.0, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.05, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {
        "encoder.mask_token": 0, "encoder.embed.proj.weight": 0, "encoder.stages.0.0.norm1.bias": 1,
        "encoder.stages.0.1.mlp.0.weight": 2, "encoder.merges.0.reduction.weight": 2,
        "encoder.stages.1.0.attention.logit_scale": 3, "encoder.stages.1.1.extra_norm.weight": 4,
        "encoder.norm.weight": 5, "head.weight": 5,
    }  # fmt: skip
    assert {name: rates[name] for name in expected} == {name: 0.5 ** (5 - layer) for name, layer in expected.items()}
    assert all(group["weight_decay"] in (0, 0.05) for group in optimizer.param_groups)
