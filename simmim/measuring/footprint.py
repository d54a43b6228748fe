"""How much memory a training step takes, counted without any: the real network runs on tensors without values.

Every operation of a forward and a backward pass is seen as PyTorch dispatches it, and every storage is followed
from where it arises to where it is freed. What several devices share, and what they send one another, is reckoned
from the sizes of the real parameters: see `Layout`.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from simmim.encoders import create_encoder
from simmim.encoders.attention import resolve_implementation
from simmim.encoders.sequential_attention import IN_TURNS
from simmim.encoders.windows import penalties
from simmim.tasks.pretraining import MaskedImageModel
from simmim.training.optimizer import create_optimizer

REST = "rest"
"""The activations outside of the stages: images, head, target and loss."""

SETTLED = 1000
"""Operations without a new peak, after which turns that are all alike are taken to have shown theirs."""


@dataclass(frozen=True)
class Step:
    """A training step of one device.

    Args:
        model: Arguments of `create_encoder`; `model["attention"]` is what is counted.
        objective: Arguments of `MaskedImageModel`.
        image_size: Height and width in pixels.
        batch_size: Images.
        mask: One image's mask: boolean (rows, columns).
        bf16: Whether in bfloat16 by autocast, else in fp32.
        bf16_weights: Whether the weights come in bfloat16, as sharded training gathers them.
        checkpointing: See `Encoder.checkpoint_activations`.
        gpu: Whether PyTorch runs it as it does on a GPU.
    """

    model: dict[str, Any]
    objective: dict[str, Any]
    image_size: tuple[int, int]
    batch_size: int
    mask: Tensor
    bf16: bool
    bf16_weights: bool
    checkpointing: str | Sequence[int]
    gpu: bool


@dataclass(frozen=True)
class Layout:
    """How devices share the work.

    Args:
        strategy: "single", "ddp" or "fsdp".
        devices: How many.
        accumulates: Whether gradients are added up over several batches.
        reshards: Whether gathered parameters are dropped after the forward pass (of "fsdp").
        average: Whether a running average of the weights is kept.
    """

    strategy: str
    devices: int
    accumulates: bool
    reshards: bool
    average: bool


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Footprint:
    """What was counted of a step.

    Attributes:
        parameters: Shape of each.
        state: Shape and bytes a value of each tensor that the optimizer holds.
        parts: Values of each of the network's parts, in the order in which they are used; of the rest last.
        weight_bytes: Of a value as the step reads it.
        activations: Bytes by stage that wait for the backward pass when it begins.
        arrivals: Shape of each gradient, in the order in which they are finished.
        peaks: Most bytes of activations and temporary tensors, before the first and after each of them.
    """

    parameters: list[Shape]
    state: list[tuple[Shape, int]]
    parts: list[int]
    weight_bytes: int
    activations: dict[str, int]
    arrivals: list[Shape]
    peaks: list[int]

    def memory(self, layout: Layout) -> dict[str, int]:
        """Bytes on one device: each kind, and `peak`, the most that lives at a time.

        Returns:
            `parameters`, `gradients` (when all are there), `optimizer`, `average`, `communication` (buffers), `step`
            (activations and temporary tensors, and the gradients so far, at their highest) and `peak`.
        """
        share = layout.devices if layout.strategy == "fsdp" else 1
        parameters = sum(4 * _shard(shape, share) for shape in self.parameters)
        # Buckets of DDP and accumulated gradients live through the forward pass; accumulated ones are not sharded.
        held = layout.accumulates or layout.strategy == "ddp"
        finished = [4 * _shard(shape, 1 if layout.accumulates else share) for shape in self.arrivals]
        so_far = [sum(finished)] * len(self.peaks) if held else [sum(finished[:n]) for n in range(len(self.peaks))]
        bytes_of = {
            "parameters": parameters,
            "gradients": sum(finished),
            "optimizer": sum(size * _shard(shape, share) for shape, size in self.state),
            "average": parameters if layout.average else 0,
            "communication": self._communication(layout) if layout.strategy == "fsdp" else 0,
            "step": max(peak + gradients for peak, gradients in zip(self.peaks, so_far, strict=True)),
        }
        return {**bytes_of, "peak": sum(bytes_of.values()) - bytes_of["gradients"]}

    def _communication(self, layout: Layout) -> int:
        """Of FSDP: a gathered part and the next one, its whole gradient, and that again in fp32 to be summed."""
        *parts, root = self.parts
        gathered = max(map(sum, pairwise(parts))) if layout.reshards else sum(parts)
        return self.weight_bytes * (root + gathered + max(parts)) + 4 * max(parts)


class _Settled(Exception):
    """Ends an operation in turns."""


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of all storages that arise within, and what they were at their highest.

    Args:
        chosen: How many values `nonzero` finds, which only real tensors tell.

    Attributes:
        place: Name under which new storages are counted.
        live: Bytes by place.
        peak: The highest sum of them; may be set back.
    """

    turns: dict[Any, int] = {}  # noqa: RUF012  # temporary bytes of each operation in turns, counted once

    def __init__(self, chosen: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.chosen = chosen
        self.place = ""
        self.live: Counter[str] = Counter()
        self.peak = 0
        self.until_settled = -1
        self.known: set[int] = set()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leaves out tensors that were there before."""
        self.known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and takes note of what it returns, and of real tensors that it was given."""
        if self.until_settled == 0:
            raise _Settled
        self.until_settled -= 1
        for given in args:
            for tensor in given if isinstance(given, list) else [given]:
                if type(tensor) is Tensor:  # a kept table, not one without values
                    self._note(tensor)
        if func is torch.ops.aten.nonzero.default:
            out = args[0].new_empty((self.chosen, args[0].ndim), dtype=torch.long)
        elif func in IN_TURNS:
            self._take_turns(func, args)
            out = func(*args)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return out

    def _take_turns(self, func: Any, args: Any) -> None:
        """Looks into an operation that PyTorch takes as a whole: what it needs for a while counts too."""
        shape = [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else str(x) for x in args]
        key = (func, str(shape))
        before, peak = self.live.total(), self.peak
        if key not in self.turns:
            self.peak, self.until_settled = before, SETTLED
            with suppress(_Settled), self:
                IN_TURNS[func](*args)
            self.turns[key], self.until_settled = self.peak - before, -1
        self.peak = max(peak, before + self.turns[key])

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size, place = storage._cdata, storage.nbytes(), self.place
        if key not in self.known:
            self.known.add(key)
            self.live[place] += size
            if (live := self.live.total()) > self.peak:
                self.peak = live
                self.until_settled = SETTLED if self.until_settled >= 0 else -1
            weakref.finalize(storage, self._forget, key, size, place)

    def _forget(self, key: int, size: int, place: str) -> None:
        self.known.discard(key)
        self.live[place] -= size


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Within it, a CPU's tensors go the ways of a GPU where these differ in memory.

    PyTorch lets no tensor without values go backward on a GPU that is not there, and drops a mode for functions in the
    backward pass, in which blocks are computed again: hence these replacements.
    """
    norm, attention = F.layer_norm, torch.ops.aten._scaled_dot_product_efficient_attention

    def layer_norm(x: Tensor, *others: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):  # a GPU's autocast takes norms to fp32, a CPU's does not
            x, others = tree_map_only(Tensor, Tensor.float, (x, others))
        return norm(x, *others)

    def fused(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor, scale: float) -> Tensor:
        """The only fused kernel of a GPU that gives a bias its gradient; rows of the bias begin at 16 values each."""
        tokens = attn_mask.shape[-1]
        bias = F.pad(attn_mask, (0, -tokens % 16))[..., :tokens].expand(len(query), -1, -1, -1)
        x: Tensor = attention(query, key, value, bias, compute_log_sumexp=True, scale=scale)[0]
        return x

    with patch.object(F, "layer_norm", layer_norm), patch.object(F, "scaled_dot_product_attention", fused):
        yield


def count_step(step: Step) -> Footprint:
    """Counts the memory of a step.

    Raises:
        ValueError: If the settings contradict each other, or the attention cannot be counted.
    """
    cpu = torch.device("cpu")
    if resolve_implementation(step.model["attention"], cpu) == "flex":
        raise ValueError("model.attention=flex is compiled to one kernel, which is not counted: give another one")
    penalties(cpu)  # kept: must have values
    with torch.device("meta"):
        network = MaskedImageModel(create_encoder(**step.model), **step.objective)
    network.encoder.checkpoint_activations(step.checkpointing)
    if not network.encoder.fills_maps or any(size % network.encoder.stride for size in step.image_size):
        network.encoder.check_image_size(*step.image_size)
    # Maps that no whole windows tile are filled up, as everywhere but in training, which refuses them.
    network.encoder.check_image_size = lambda height, width: None  # type: ignore[method-assign]
    counted = network.counted_pixels(step.mask[None], torch.empty(1, 1, *step.image_size, device="meta"))
    chosen = step.batch_size * int(network.to_tokens(counted).any(-1).sum())
    parameters = [tuple(parameter.shape) for parameter in network.parameters()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device=cpu)
        state = _optimizer_state(network)
        if step.bf16_weights:
            for module in network.modules():
                for name, weight in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(weight.to(torch.bfloat16)))
        return Footprint(parameters, state, **_run(network, step, chosen=chosen))


def _run(network: MaskedImageModel, step: Step, *, chosen: int) -> dict[str, Any]:
    """One forward and backward pass."""
    storages = Storages(chosen)
    storages.ignore(network.parameters())
    arrivals: list[Shape] = []
    peaks: list[int] = []
    used: list[nn.Module] = []

    def arrive(parameter: Tensor) -> None:
        parameter.grad = None
        peaks.append(storages.peak)
        arrivals.append(tuple(parameter.shape))
        storages.peak = storages.live.total()

    def use(part: nn.Module, args: Any) -> None:
        used.extend([part] if part not in used else [])

    def enter(module: nn.Module, place: str) -> None:
        module.register_forward_pre_hook(lambda *_: setattr(storages, "place", place))

    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(arrive)  # type: ignore[no-untyped-call]
    for part in network.parts:
        part.register_forward_pre_hook(use)
    for number, opening in enumerate(network.encoder.openings, 1):
        enter(opening, f"stage {number}")
    enter(network.encoder.norm, REST)
    storages.place = REST
    with storages, as_on_gpu() if step.gpu else nullcontext():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.bf16):
            channels = network.in_channels
            images = torch.empty(step.batch_size, channels, *step.image_size, dtype=torch.uint8).float()
            mask = step.mask.expand(step.batch_size, -1, -1).contiguous()
            loss = network(images, mask)
        activations = {place: storages.live[place] for place in (*sorted({*storages.live} - {REST}), REST)}
        storages.place = "backward"
        loss.backward()
    peaks.append(storages.peak)
    sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in used]
    root = sum(parameter.numel() for parameter in network.parameters()) - sum(sizes)
    return {
        "parts": [*sizes, root],
        "weight_bytes": 2 if step.bf16_weights else 4,
        "activations": activations,
        "arrivals": arrivals,
        "peaks": peaks,
    }


def _optimizer_state(network: nn.Module) -> list[tuple[Shape, int]]:
    """Shape and bytes a value of what AdamW holds after a step."""
    optimizer = create_optimizer(network, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, layer_decay=1)
    for parameter in network.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    network.zero_grad()
    return [(tuple(x.shape), x.element_size()) for held in optimizer.state.values() for x in held.values()]


def _shard(shape: Shape, devices: int) -> int:
    """Values of a tensor on the device that has most: FSDP2 deals out the first dimension."""
    first, *others = shape or (1,)
    return ceil(first / devices) * torch.Size(others).numel()
