"""Training over several processes, each with a part of every parameter (PyTorch FSDP2).

Two rules make the initial values, and what follows from them, the same for any number of processes: a network is
built on the meta device and filled module by module, each from a generator seeded by its own name; and every process
fills a module before the part that is not its own is dropped, so that no process ever holds the whole network.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from simmim.checkpoint_files import Tree, load_shards
from simmim.seeding import torch_random_from


class Shardable(Protocol):
    """A network that can be filled and sharded a part at a time."""

    parts: list[nn.Module]
    """The modules that are gathered one after the other; what is outside of them is gathered for the whole step."""
    entries: Sequence[str]
    """Methods besides `forward` that compute with the parameters."""

    def init_module(self, name: str, module: nn.Module) -> None:
        """Gives the parameters that a module itself holds their initial values, from the global generator."""
        ...


def fill(network: Any, *, seed: int, strategy: "ShardedStrategy | None") -> None:
    """Gives a network that was built on the meta device its initial values, and shards it under a strategy.

    What has values already, from a file, keeps them. May be called again.

    Args:
        network: See `Shardable`.
        seed: Of the initial values.
        strategy: None leaves the network whole.
    """
    names = {module: name for name, module in network.named_modules()}
    for part in (*network.parts, network):
        for module in part.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device="cpu", recurse=False)
                with torch_random_from(seed, "weights", names[module]):
                    network.init_module(names[module], module)
        if strategy is not None and not isinstance(part, FSDPModule):
            strategy.shard(part)
    if strategy is not None:
        for entry in network.entries:
            register_fsdp_forward_method(network, entry)
        whole = [name for name, parameter in network.named_parameters() if not isinstance(parameter, DTensor)]
        assert not whole, f"not sharded: {whole}"


def gather(module: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of a module, on the CPU of the first process; empty on the others. All of them call it."""
    whole = {}
    for name, value in module.state_dict().items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if not dist.is_initialized() or dist.get_rank() == 0:
            whole[name] = full.cpu()
    return whole


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with what it leaves to its user.

    Its own default neither shards nor synchronises; it would synchronise in the middle of accumulation; its
    checkpoints are overwritten in place.

    Args:
        reshard_after_forward: Whether a part's parameters are dropped after its forward pass and gathered again for the
            backward pass (ZeRO-3), or stay until then (more memory, less communication: ZeRO-2).
        bf16: Whether parameters are gathered in bfloat16. Gradients are summed in fp32, and the optimizer sees
            fp32 parameters, in any case.
    """

    def __init__(self, *, reshard_after_forward: bool, bf16: bool) -> None:
        super().__init__()
        self.reshard_after_forward = reshard_after_forward
        # Inputs are left to autocast: targets must stay in fp32.
        self.precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )

    def setup_environment(self) -> None:
        """Makes one group of all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def shard(self, module: nn.Module) -> None:
        """Leaves this process its part of the module's parameters that are not sharded yet, on its device."""
        fully_shard(
            module,
            mesh=self.device_mesh["data_parallel"],
            reshard_after_forward=self.reshard_after_forward,
            mp_policy=self.precision_policy,
        )

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Within it, gradients are added up where they arise: between two steps nothing is sent."""
        roots = [module for module in self._module.children() if isinstance(module, FSDPModule)]
        for root in roots:
            root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for root in roots:
                root.set_requires_gradient_sync(True)

    def setup(self, trainer: Trainer) -> None:
        """Lets nothing run that is not sharded."""
        super().setup(trainer)
        trained = [*self._module.parameters()]
        assert trained and all(isinstance(parameter, DTensor) for parameter in trained)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning's own way, which keeps the tensors that `load_checkpoint` fills."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The own parts: nothing is gathered."""
        return self._module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The own parts: nothing is gathered."""
        state: dict[str, Any] = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return state

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Hands the optimizer its state, which is sharded already."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def save_checkpoint(self, checkpoint: Tree, filepath: Any, storage_options: Any | None = None) -> None:
        """Every process writes its part."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Tree:
        """Every process reads its part, of whatever number of processes has written it."""
        own = self._module.state_dict()
        trained = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]

        def like(path: str) -> Any:
            _, section, rest = path.split("/", 2)
            if section == "state_dict":
                return own[rest]
            _, _, parameter, name = rest.split("/") if section == "optimizer_states" else ("", "", "", "step")
            return None if name == "step" else torch.empty_like(trained[int(parameter)].detach())

        return load_shards(checkpoint_path, like)

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module
