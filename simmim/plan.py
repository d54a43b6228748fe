"""`python -m simmim.plan`: the memory that a pretraining run takes on each device, what makes it fit, and its time.

Nothing is trained and no memory taken: see `simmim.measuring.footprint` and `simmim.cost`. `conf/plan.yaml` lists the
keys.
"""

import logging
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from simmim.command import command
from simmim.config import Config, image_size_of
from simmim.cost import cost_of
from simmim.data.files import free_memory
from simmim.devices import accumulation, precision_of, world_size
from simmim.encoders import ENCODERS, architecture_of, create_encoder
from simmim.encoders.attention import resolve_implementation
from simmim.masking import Masking
from simmim.measuring.footprint import Footprint, Layout, Step, count_step
from simmim.measuring.tables import write_table

log = logging.getLogger(__name__)

PLANNED = 0.9
"""Share of a device's memory that a plan may fill: the rest is for what is not counted."""

MOST_DEVICES = 1024
"""More are not suggested."""

COUNTED = ("reference", "sdpa", "sequential")
"""Implementations of the attention whose memory can be counted."""

Memory = dict[str, int]


@dataclass(frozen=True)
class Run:
    """What is planned: a step, how devices of so many machines share it, and words for what was changed."""

    step: Step
    layout: Layout
    nodes: int
    changes: tuple[str, ...] = ()

    def changed(self, word: str, *, devices: int | None = None, **step: Any) -> "Run":
        """The same with other values of the step, or so many devices with a part of everything each."""
        layout = self.layout
        if devices is not None:
            layout = replace(layout, strategy="fsdp", devices=devices)
            step["bf16_weights"] = self.step.bf16
        return Run(replace(self.step, **step), layout, self.nodes, (*self.changes, word))

    def attending(self, name: str) -> "Run":
        """The same with another implementation of the attention."""
        return self.changed(f"model.attention={name}", model={**self.step.model, "attention": name})


class Planner:
    """Finds the memory of runs, each step counted once.

    Args:
        limit: Bytes that a run may take on each device.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.counted: dict[str, Footprint] = {}

    def footprint(self, run: Run) -> Footprint:
        """What is counted of a run's step."""
        key = str(run.step)
        if key not in self.counted:
            self.counted[key] = count_step(run.step)
        return self.counted[key]

    def memory(self, run: Run) -> Memory:
        """Bytes on each device."""
        return self.footprint(run).memory(run.layout)

    def fits(self, run: Run) -> bool:
        """Whether the run stays within the limit."""
        return self.memory(run)["peak"] <= self.limit

    def first(self, runs: Iterable[Run]) -> Run | None:
        """The first of several that fits, each of which takes less than the one before; None if none does."""
        candidates = [*runs]
        low, high = 0, len(candidates)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(candidates[middle]) else (middle + 1, high)
        return candidates[low] if low < len(candidates) else None

    def tried(self, run: Run) -> Iterator[Run]:
        """Ways to make a run smaller: each alone, the cheapest first, then one after the other, until one fits."""
        for change in CHANGES:
            if options := change(run):
                yield (alone := self.first(options) or options[-1])
                if self.fits(alone):
                    return
        for change in (*CHANGES, _more_devices):
            if options := change(run):
                found = self.first(options)
                tried = found or options[-1]
                if len(tried.changes) > 1:
                    yield tried
                if found:
                    return
                # Machines that do not help are not bought: a smaller batch is tried without them first.
                run = run if change is _more_devices else tried


def _checkpointed(run: Run) -> list[Run]:
    key = "trainer.activation_checkpointing=all"
    return [run.changed(key, checkpointing="all")] if run.step.checkpointing != "all" else []


def _sequential(run: Run) -> list[Run]:
    able = "sequential" in _implementations(run.step.model) and run.step.model["attention"] != "sequential"
    return [run.attending("sequential")] if able else []


def _more_devices(run: Run) -> list[Run]:
    if not run.step.gpu:  # processes of one machine would share its memory
        return []
    word = "" if run.layout.strategy == "fsdp" else "trainer=fsdp "
    counts = [2**n * run.layout.devices for n in range(1, 11) if 2**n * run.layout.devices <= MOST_DEVICES]
    return [run.changed(f"{word}trainer.devices={count // run.nodes}", devices=count) for count in counts]


def _smaller_batch(run: Run) -> list[Run]:
    counts = [run.step.batch_size >> n for n in range(1, run.step.batch_size.bit_length())]
    return [run.changed(f"data.batch_size={count}", batch_size=count) for count in counts]


CHANGES: tuple[Callable[[Run], list[Run]], ...] = (_checkpointed, _sequential, _more_devices, _smaller_batch)
"""By what they cost: a third more time, some time, more machines, another batch."""


def plan(config: Config) -> list[dict[str, Any]]:
    """Prints the memory of a run, by kind, stage and implementation, and the cheapest change that makes it fit.

    Where a throughput is given, it begins with time and price; these need no knowledge of the device's memory.

    Args:
        config: The composed `conf/plan.yaml`.

    Returns:
        The rows of the table: a row an implementation of the attention, with and without checkpointing.

    Raises:
        ValueError: If the config contradicts itself, or the memory of the device is not known.
    """
    run = run_of(config)
    cost = cost_of(config, _title(run))
    for line in [_title(run), *([] if cost is None else _wrapped(cost, indent=2))]:
        log.info(line)
    if cost is not None and _memory_known(config) is None:
        log.info("Memory is not counted: give trainer.device_memory_gb, that of the device is not known here.")
        return []
    available = device_memory(config)
    planner = Planner(PLANNED * available)
    footprint, memory = planner.footprint(run), planner.memory(run)
    rows = [_row(planner, other) for other in _alternatives(run)]
    for line in (*_heading(config, run, footprint, available), *_held(run, memory), *_table(rows, run)):
        log.info(line)
    for line in _verdict(planner, run, available):
        log.info(line)
    if config["save"]:
        notes = [f"command: `{shlex.join(['python', '-m', 'simmim.plan', *sys.argv[1:]])}`", "GB of 10^9 bytes"]
        notes += [] if cost is None else [cost]
        write_table(rows, Path(config["save"]), title=_title(run), notes=[*notes, *NOTES])
    return rows


def advice(config: Config) -> str:
    """One line for a run that has run out of memory: what it takes, and the cheapest change that makes it fit.

    Args:
        config: The composed `conf/pretrain.yaml`, or a plan's.

    Raises:
        ValueError: If the run cannot be planned.
    """
    run, available = run_of(config), device_memory(config)
    taken = Planner(0).memory(run)["peak"]
    planner = Planner(PLANNED * min(available, taken))  # it did not fit, whatever is counted
    changed = next((other for other in planner.tried(run) if planner.fits(other)), None)
    need = f"a step takes about {_gb(taken)} of {_gb(available)} GB"
    if changed is None:
        return f"{need}, and no change that is planned makes it fit: take a smaller model or image"
    return f"{need}; with {' '.join(changed.changes)} about {_gb(planner.memory(changed)['peak'])} GB"


def run_of(config: Config) -> Run:
    """The run that a config of `pretrain` or `plan` means.

    Raises:
        ValueError: If its numbers cannot be.
    """
    model, data, trainer, size = config["model"], config["data"], config["trainer"], image_size_of(config)
    strategy, gpu = trainer["strategy"], _plans_for_gpu(config)
    bf16 = gpu if trainer["precision"] == "auto" else precision_of(config) == "bf16-mixed"
    device = torch.device("cuda" if gpu else "cpu")
    attention = resolve_implementation(
        model["attention"], device, ENCODERS[architecture_of(model["name"])].implementations
    )
    step = Step(
        model={**model, "in_channels": data["channels"], "attention": attention},
        objective=config["objective"],
        image_size=size,
        batch_size=data["batch_size"],
        mask=Masking(size, model_patch_size=model["patch_size"], **config["masking"])(torch.Generator().manual_seed(0)),
        bf16=bf16,
        bf16_weights=bf16 and strategy == "fsdp",
        checkpointing=trainer["activation_checkpointing"],
        gpu=gpu,
    )
    layout = Layout(
        strategy,
        devices=world_size(config),
        accumulates=accumulation(config) > 1,
        reshards=trainer.get("reshard_after_forward", True),
        average=config["optimizer"]["ema_decay"] is not None,
    )
    return Run(step, layout, trainer.get("num_nodes", 1))


def device_memory(config: Config) -> float:
    """Bytes of each device: `trainer.device_memory_gb`, or what this machine has.

    Raises:
        ValueError: If it is not given and not known.
    """
    if (known := _memory_known(config)) is None:
        raise ValueError("trainer.device_memory_gb must be given: the memory of the device is not known here")
    return known


def _memory_known(config: Config) -> float | None:
    given = config["trainer"].get("device_memory_gb")
    if given is not None:
        return float(given) * 1e9
    if _plans_for_gpu(config) and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    free = None if _plans_for_gpu(config) else free_memory()
    return None if free is None else free / world_size(config) * int(config["trainer"].get("num_nodes", 1))


def _plans_for_gpu(config: Config) -> bool:
    """Whether for a GPU: one of this machine, or one whose memory is given."""
    accelerator = config["trainer"]["accelerator"]
    if accelerator not in ("auto", "cpu", "gpu"):
        raise ValueError(f"trainer.accelerator={accelerator} is unknown: choose auto, cpu or gpu")
    known = torch.cuda.is_available() or config["trainer"].get("device_memory_gb") is not None
    return accelerator == "gpu" or (accelerator == "auto" and known)


def _alternatives(run: Run) -> Iterator[Run]:
    """The run with each implementation, without checkpointing, as it is, and with."""
    for name in _implementations(run.step.model):
        for stages in ("none", "all"):
            yield run.attending(name).changed("", checkpointing=stages)
        if name == run.step.model["attention"] and run.step.checkpointing not in ("none", "all"):
            yield run


def _implementations(model: dict[str, Any]) -> list[str]:
    """Those of the attention of a model that can be counted."""
    return [name for name in COUNTED if name in ENCODERS[architecture_of(model["name"])].implementations]


def _row(planner: Planner, run: Run) -> dict[str, Any]:
    activations, memory = planner.footprint(run).activations, planner.memory(run)
    return {
        "attention": run.step.model["attention"],
        "checkpointed": _stages(run),
        **{place: size / 1e9 for place, size in activations.items()},
        "sum": sum(activations.values()) / 1e9,
        "step": memory["step"] / 1e9,
        "device": memory["peak"] / 1e9,
        "fits": "yes" if planner.fits(run) else "no",
    }


def _stages(run: Run) -> str:
    stages = run.step.checkpointing
    return stages if isinstance(stages, str) else ",".join(map(str, stages))


def _title(run: Run) -> str:
    step, (height, width) = run.step, run.step.image_size
    return (
        f"{step.model['name']}, {height}x{width} px, window {step.model['window_size']}, batch {step.batch_size} "
        f"a device, {'bf16' if step.bf16 else 'fp32'}"
    )


def _heading(config: Config, run: Run, footprint: Footprint, available: float) -> Iterator[str]:
    values = sum(torch.Size(shape).numel() for shape in footprint.parameters)
    devices, where = run.layout.devices, "a GPU" if run.step.gpu else "a CPU"
    shared = {"single": "", "ddp": ", each with all parameters", "fsdp": ", each with a part of every parameter"}
    yield (
        f"{values / 1e6:,.1f} M parameters on {devices} device{'s' * (devices > 1)}{shared[run.layout.strategy]}; "
        f"{_gb(available)} GB each"
    )
    with torch.device("meta"):
        encoder = create_encoder(**run.step.model)
    try:
        encoder.check_image_size(*run.step.image_size)
    except ValueError as error:
        yield "pretraining refuses this size; counted with maps filled up to whole windows:"
        yield from _wrapped(f"  {error}", indent=2)
    yield ""
    yield f"GB of 10^9 bytes, counted as on {where}; what libraries hold for themselves is not counted"


def _held(run: Run, memory: Memory) -> Iterator[str]:
    held = " (whole: they are added up over batches)" if run.layout.accumulates and run.layout.devices > 1 else ""
    names = {
        "parameters": "parameters",
        "gradients": f"gradients{held}",
        "optimizer": "optimizer state",
        "average": "running average",
        "communication": "communication buffers",
    }
    for key, name in names.items():
        if memory[key] or key != "average":
            yield f"  {name:<64}{_gb(memory[key]):>10}"


def _table(rows: list[dict[str, Any]], run: Run) -> Iterator[str]:
    places = [key for key in rows[0] if key not in ("attention", "checkpointed", "fits")]
    yield ""
    yield "activations by stage when the backward pass begins, and what a step and a device hold at their peak"
    yield f"  {'attention':<11}{'checkpointed':<13}" + "".join(f"{place:>8}" for place in places) + "  fits"
    for row in rows:
        this = (row["attention"], row["checkpointed"]) == (run.step.model["attention"], _stages(run))
        values = "".join(f"{_gb(1e9 * row[place]):>8}" for place in places)
        yield f"{'>' if this else ' '} {row['attention']:<11}{row['checkpointed']:<13}{values}  {row['fits']}"


def _verdict(planner: Planner, run: Run, available: float) -> Iterator[str]:
    peak = planner.memory(run)["peak"]
    yield ""
    share = f"{_gb(peak)} of {_gb(available)} GB ({peak / available:.0%})"
    if planner.fits(run):
        yield f"This run fits: {share}."
        return
    yield from _wrapped(
        f"This run does not fit: {share}, where a plan may fill {PLANNED:.0%}. Cheapest changes first:", indent=2
    )
    last = run
    for other in planner.tried(run):
        verdict = "fits" if planner.fits(other) else "no"
        yield from _wrapped(
            f"{_gb(planner.memory(other)['peak']):>8}  {verdict:<4}  {' '.join(other.changes)}", indent=16
        )
        last = other
    fitting = f"What fits: {' '.join(last.changes)}"
    yield from _wrapped(fitting if planner.fits(last) else "Nothing fits: take a smaller model or image.", indent=2)


def _wrapped(text: str, *, indent: int) -> list[str]:
    """Lines that fit a terminal, all but the first indented."""
    return textwrap.wrap(text, 96, subsequent_indent=" " * indent, drop_whitespace=True, break_long_words=False)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size < 1e11 else f"{size / 1e9:,.0f}"


NOTES = [
    "by stage, and their sum: activations that wait for the backward pass when it begins; step: the most that "
    "activations, gradients and temporary tensors take; device: that, parameters, optimizer state, and buffers",
    "counted, not measured; benchmarks/plan.md compares such counts with what processes took",
]

if __name__ == "__main__":
    command(plan)()
