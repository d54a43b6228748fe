"""AdamW, and which parameters it does not decay."""

from collections.abc import Sequence

import torch
from torch import nn


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies, as in the authors' code.

    Not to vectors (norms, biases, the mask token), the logit scale (whose three dimensions an ndim rule would miss),
    nor the network of the position bias.
    """
    return parameter.ndim > 1 and not name.endswith("logit_scale") and "position_bias" not in name


def create_optimizer(
    network: nn.Module, *, lr: float, betas: Sequence[float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained, in a group with and one without weight decay.

    Args:
        network: What is trained.
        lr: Learning rate at the top of the schedule, for the global batch of the run.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay of the decayed group.
    """
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for n, p in named if is_decayed(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in named if not is_decayed(n, p)], "weight_decay": 0.0},
    ]
    # The fused kernel: one pass over the state instead of one a formula, on the CPU as on a GPU.
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)
