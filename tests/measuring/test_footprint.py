"""What is counted of a step, against the real thing."""

import dataclasses
import math

import pytest
import torch

from simmim.encoders.windows import Windows, _exchange, places, regions
from simmim.measuring.footprint import REST, Layout, Step, count_step
from simmim.measuring.memory import peak_memory
from simmim.measuring.networks import OBJECTIVE, OURS, Runner, Work, batch_of

MODEL = {
    "name": "swinv2",
    "embed_dim": 48,
    "depths": [2, 2, 1],
    "num_heads": [2, 4, 8],
    "extra_norm_every": 0,
    "window_size": 8,
    "patch_size": 8,
    "in_channels": 3,
    "attention": "sequential",
}
WORK = Work(MODEL, (256, 256), 4)
ALONE = Layout("single", 1, accumulates=False, reshards=True, average=False)


def step_of(work=WORK, **changes):
    model = {**work.model, "attention": changes.pop("attention", work.model["attention"])}
    step = Step(
        model,
        OBJECTIVE,
        work.image_size,
        work.batch_size,
        batch_of(work)[1][0],
        bf16=work.bf16,
        bf16_weights=False,
        checkpointing=work.activation_checkpointing,
        gpu=False,
    )
    return dataclasses.replace(step, **changes)


def saved_bytes(work):
    """The images and what autograd really saves, without the weights."""
    runner = Runner(OURS, work)
    weights = {parameter.untyped_storage().data_ptr() for parameter in runner.network.parameters()}
    saved = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (runner.images, runner.mask)}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), runner.precision():
        loss = runner.network(runner.images, runner.mask)
    total = sum(saved.values())
    loss.backward()
    return total


@pytest.mark.parametrize("bias", ["linear_cpb", "table"])
def test_every_position_bias_is_counted(bias):
    work = WORK.changed(model={**MODEL, "position_bias": bias, "window_size": 32})  # wider than the last map
    footprint = count_step(step_of(work))
    assert sum(footprint.activations.values()) == pytest.approx(saved_bytes(work), rel=0.03)
    assert sorted(footprint.arrivals) == sorted(footprint.parameters)


@pytest.mark.parametrize(
    ("attention", "bf16"), [("reference", False), ("sdpa", False), ("sequential", False), ("sequential", True)]
)
def test_activations_are_what_autograd_really_saves(attention, bf16):
    work = WORK.changed(model={**MODEL, "attention": attention}, bf16=bf16)
    counted = sum(count_step(step_of(work)).activations.values())
    assert counted == pytest.approx(saved_bytes(work), rel=0.03)


def test_the_peak_is_what_a_process_really_takes():
    work = WORK.changed(batch_size=16)
    assert count_step(step_of(work)).memory(ALONE)["step"] / 1e6 == pytest.approx(
        peak_memory(OURS, work)["step"], rel=0.1
    )


def test_checkpointing_and_the_implementation_matter_as_they_should():
    counts = {
        (name, stages): count_step(step_of(attention=name, checkpointing=stages))
        for name in ("reference", "sdpa", "sequential")
        for stages in ("none", "all")
    }
    first = count_step(step_of(checkpointing=[1])).activations
    none, every = (counts["sequential", stages].activations for stages in ("none", "all"))
    assert first["stage 1"] == pytest.approx(every["stage 1"], rel=0.01) and first["stage 1"] < 0.5 * none["stage 1"]
    assert first["stage 2"] == pytest.approx(none["stage 2"], rel=0.01) and every["stage 2"] < 0.5 * none["stage 2"]
    assert first[REST] == every[REST] == none[REST]
    peaks = {key: footprint.memory(ALONE)["peak"] for key, footprint in counts.items()}
    assert all(peaks[name, "all"] < peaks[name, "none"] for name in ("reference", "sdpa", "sequential"))
    assert peaks["reference", "none"] > peaks["sdpa", "none"] > peaks["sequential", "none"]


def test_activations_grow_with_the_batch_and_the_state_does_not():
    small, large = (count_step(step_of(batch_size=batch)) for batch in (2, 4))
    assert small.parameters == large.parameters and small.state == large.state
    for stage in ("stage 1", "stage 2"):
        assert large.activations[stage] == pytest.approx(2 * small.activations[stage], rel=0.1)


def test_the_state_is_two_moments_in_fp32_and_a_step():
    footprint = count_step(step_of())
    true = [tuple(parameter.shape) for parameter in Runner(OURS, WORK).network.parameters()]
    assert footprint.parameters == true and sorted(footprint.arrivals) == sorted(true)
    memory = footprint.memory(ALONE)
    values = sum(math.prod(shape) for shape in true)
    assert memory["parameters"] == memory["gradients"] == 4 * values
    assert memory["optimizer"] == 2 * 4 * values + 4 * len(true)
    assert memory["peak"] == memory["parameters"] + memory["optimizer"] + memory["step"]
    assert sum(footprint.parts) == values


def test_devices_share_what_they_share():
    footprint = count_step(step_of())
    alone = footprint.memory(ALONE)
    ddp, fsdp, kept, more, added, average = (
        footprint.memory(dataclasses.replace(ALONE, **changes))
        for changes in (
            {"strategy": "ddp", "devices": 2},
            {"strategy": "fsdp", "devices": 2},
            {"strategy": "fsdp", "devices": 2, "reshards": False},
            {"strategy": "fsdp", "devices": 8},
            {"strategy": "fsdp", "devices": 2, "accumulates": True},
            {"average": True},
        )
    )
    assert ddp["optimizer"] == alone["optimizer"] and ddp["step"] > alone["step"]  # the buckets live all the time
    for key in ("parameters", "gradients", "optimizer"):
        assert fsdp[key] == pytest.approx(alone[key] / 2, rel=0.02)
        assert more[key] == pytest.approx(alone[key] / 8, rel=0.05)
    assert added["gradients"] == alone["gradients"] and added["step"] > fsdp["step"]
    assert kept["communication"] > fsdp["communication"] == more["communication"] > 0 == alone["communication"]
    assert average["peak"] - alone["peak"] == alone["parameters"]


def test_a_dimension_that_devices_do_not_divide_is_rounded_up():
    footprint = dataclasses.replace(count_step(step_of()), parameters=[(5, 3), (1, 7), ()])
    layout = dataclasses.replace(ALONE, strategy="fsdp", devices=2)
    assert footprint.memory(layout)["parameters"] == 4 * (3 * 3 + 7 + 1)


def test_gathered_weights_in_bf16_leave_no_copies_for_the_backward_pass():
    ours, gathered = (count_step(step_of(bf16=True, bf16_weights=weights)) for weights in (False, True))
    assert sum(gathered.activations.values()) < sum(ours.activations.values())
    assert (ours.weight_bytes, gathered.weight_bytes) == (4, 2)
    assert ours.state == gathered.state


def test_a_gpu_takes_norms_to_fp32_and_saves_no_probabilities():
    cpu, gpu = (sum(count_step(step_of(bf16=True, gpu=gpu)).activations.values()) for gpu in (False, True))
    assert gpu > 1.1 * cpu
    cpu, gpu = (sum(count_step(step_of(attention="sdpa", gpu=gpu)).activations.values()) for gpu in (False, True))
    assert gpu < 0.95 * cpu


def test_counting_leaves_nothing_behind_that_has_no_values():
    for cached in (places, regions, _exchange):
        cached.cache_clear()
    count_step(step_of())
    shifted = Windows.fit((32, 32), 8, shifted=True)
    assert type(regions(shifted, torch.device("cpu"))) is torch.Tensor
    assert math.isfinite(Runner(OURS, WORK)())


def test_a_recomputed_block_is_a_gpu_s_too():
    count_step(step_of(bf16=True, bf16_weights=True, checkpointing="all", gpu=True))  # else shapes would not agree


def test_an_implementation_that_is_not_counted_says_so():
    with pytest.raises(ValueError, match=r"model\.attention=flex is compiled"):
        count_step(step_of(attention="flex"))
