"""AdamW, which parameters it does not decay, clipping, and the running average of the weights.

Parameters may be sharded over processes (DTensor).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies, as in the authors' code.

    Not to vectors (norms, biases, the mask token), the logit scale (whose three dimensions an ndim rule would miss),
    nor the network of the position bias.
    """
    return parameter.ndim > 1 and not name.endswith("logit_scale") and "position_bias" not in name


def create_optimizer(
    network: Any, *, lr: float, betas: Sequence[float], eps: float, weight_decay: float, layer_decay: float
) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained, in groups of one weight decay and one learning rate.

    Args:
        network: What is trained: an `nn.Module`, and with layer decay one that has a `layer_of(name)`.
        lr: Learning rate at the top of the schedule, for the global batch of the run.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay of the decayed group.
        layer_decay: What the learning rate is multiplied with for each layer below the highest; 1 for none.
    """
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    layers = {name: 0 if layer_decay == 1 else network.layer_of(name) for name, _ in named}
    groups: dict[tuple[int, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        groups.setdefault((layers[name], is_decayed(name, parameter)), []).append((name, parameter))
    top = max(layers.values())
    settings: list[dict[str, Any]] = [
        {"params": members, "lr": lr * layer_decay ** (top - layer), "weight_decay": weight_decay if decayed else 0.0}
        for (layer, decayed), members in sorted(groups.items())
    ]
    # The fused kernel: one pass over the state instead of one a formula, on the CPU as on a GPU.
    return torch.optim.AdamW(settings, betas=(betas[0], betas[1]), eps=eps, fused=True)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients so that their norm, over all parameters and processes together, is at most max_norm.

    Returns:
        The norm before.
    """
    return _whole(nn.utils.clip_grad_norm_(parameters, max_norm))


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """Their norm, over all of them and all processes together: a scalar."""
    return _whole(nn.utils.get_total_norm(gradients))


@torch.no_grad()
def follow(average: Iterable[nn.Parameter], weights: Iterable[nn.Parameter], *, decay: float, step: int) -> None:
    """Moves a running average towards the weights.

    Args:
        average: What is moved.
        weights: Where to, in the same order, and sharded alike.
        decay: The share of itself that the average keeps; less at first, (1 + step) / (10 + step).
        step: Optimizer steps done.
    """
    ours, theirs = ([p.to_local() if isinstance(p, DTensor) else p.detach() for p in ps] for ps in (average, weights))
    torch._foreach_lerp_(ours, theirs, 1 - min(decay, (1 + step) / (10 + step)))


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
