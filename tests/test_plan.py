"""The plan command: its table, what it proposes, and its advice to a run that has run out of memory."""

import logging
import math
from pathlib import Path

import pytest
import started
import torch

from simmim import plan as module
from simmim.config import compose_config
from simmim.cost import cost_of
from simmim.encoders import create_encoder
from simmim.measuring.tables import write_table
from simmim.plan import Planner, advice, plan, run_of

TINY = [
    "model=swinv2",
    "model.embed_dim=24",
    "model.depths=[1,1,1,1]",
    "model.num_heads=[1,2,4,8]",
    "model.extra_norm_every=0",
    "model.window_size=2",
    "model.patch_size=4",
    "data.image_size=64",
    "data.batch_size=8",
]
TITLE = "swinv2_b, 192x192 px, window 12, batch 128 a device, bf16"
ON_GPU = [*TINY, "trainer.device_memory_gb=1"]
GIANT = ["model=swinv2_g", "data.image_size=1536", "model.window_size=32", "trainer=fsdp", "trainer.devices=8"]


def config_of(*overrides, command="plan"):
    return compose_config(command, [*overrides], output_dir=Path("unused"))


def said(config, caplog):
    with caplog.at_level(logging.INFO):
        plan(config)
    return [record.message for record in caplog.records]


def test_the_table_says_what_a_run_takes_and_that_it_fits(caplog, tmp_path):
    """And how long, of the built-in images: a device alone loses nothing to others."""
    lines = said(config_of(*ON_GPU, "throughput=40", f"save={tmp_path}/kept"), caplog)
    time = f"1,280 steps of 8, on 1 device at 40 images/s: {10 * 1024 / 40 / 60:.1f} minutes, 0.1 device hours;"
    assert lines[0] not in lines[1:] and f"10 epochs of 1,024 images, {time}" in " ".join(map(str.strip, lines))
    assert time in (tmp_path / "kept.md").read_text()
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 100
    for word in (
        "parameters",
        "gradients",
        "optimizer state",
        "communication",
        "stage 1",
        "stage 4",
        "counted as on a GPU",
    ):
        assert word in text
    assert "> sdpa       none" in text and text.count("  yes") == 6
    assert lines[-1].startswith("This run fits: ")
    assert (tmp_path / "kept.csv").read_text().count("\n") == 7
    assert "command: `python -m simmim.plan" in (tmp_path / "kept.md").read_text()


def test_what_does_not_fit_is_told_what_does(caplog):
    run = run_of(config_of(*ON_GPU))
    needed = Planner(0).memory(run.changed("", checkpointing="all"))["peak"] / module.PLANNED
    lines = said(config_of(*TINY, f"trainer.device_memory_gb={1.001 * needed / 1e9}"), caplog)
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "This run does not fit: " in text
    assert lines[-1] == "What fits: trainer.activation_checkpointing=all"


class Simple(Planner):
    """Memory by a formula, so that it can be foreseen what fits."""

    def memory(self, run):
        checkpointed, sequential = run.step.checkpointing == "all", run.step.model["attention"] == "sequential"
        images = run.step.batch_size * (0.4 if checkpointed else 1) * (0.5 if sequential else 1)
        return {"peak": 100 * images + 1600 / run.layout.devices}


FIRST, SECOND = "trainer.activation_checkpointing=all", "model.attention=sequential"


@pytest.mark.parametrize(
    ("limit", "tried"),
    [
        (1120, [(FIRST,)]),
        (1119, [(FIRST,), (SECOND,), ("trainer.devices=8",)]),
        (900, [(FIRST,), (SECOND,), ("trainer.devices=16",)]),
        (
            300,
            [
                *[(FIRST,), (SECOND,), ("trainer.devices=1024",), ("data.batch_size=1",)],
                *[(FIRST, SECOND), (FIRST, SECOND, "trainer.devices=16")],
            ],
        ),
    ],
)
def test_changes_are_tried_alone_in_their_order_and_then_together(limit, tried):
    run = run_of(config_of(*ON_GPU, "trainer=fsdp", "trainer.devices=2"))
    planner = Simple(limit)
    found = [*planner.tried(run)]
    assert [other.changes for other in found] == tried
    assert [planner.fits(other) for other in found] == [*[False] * (len(tried) - 1), True]


def test_machines_that_do_not_help_are_not_bought():
    run = run_of(config_of(*ON_GPU, "trainer=fsdp", "trainer.devices=16"))
    found = [other.changes for other in Simple(150).tried(run)]
    assert found[-2:] == [(FIRST, SECOND, "trainer.devices=1024"), (FIRST, SECOND, "data.batch_size=2")]
    nothing = [other.changes for other in Simple(0).tried(run)]
    assert nothing[-1] == (FIRST, SECOND, "data.batch_size=1", "trainer.devices=1024")
    alone = [other.changes for other in Simple(0).tried(run_of(config_of(*ON_GPU)))]
    assert ("trainer=fsdp trainer.devices=1024",) in alone


def test_a_recipe_is_planned_without_its_data():
    config = config_of(
        "experiment=simmim_swinv2_g",
        "trainer=fsdp",
        "trainer.devices=8",
        "trainer.num_nodes=8",
        "trainer.device_memory_gb=80",
    )
    run = run_of(config)
    assert (run.layout.strategy, run.layout.devices, run.layout.accumulates) == ("fsdp", 64, True)
    assert (run.step.model["name"], run.step.model["attention"], run.step.batch_size) == ("swinv2_g", "sdpa", 8)
    assert run.step.gpu and run.step.bf16 and run.step.bf16_weights
    assert int(run.step.mask.sum()) == 22  # of 36
    assert module._more_devices(run)[0].changes == ("trainer.devices=16",)


def test_the_largest_model_at_1536_px_does_not_fit_eight_devices_of_40_gb():
    config = config_of(*GIANT, "trainer.device_memory_gb=40", "data.batch_size=1")
    run, planner = run_of(config), Planner(0.9 * 40e9)
    memory = planner.memory(run)
    with torch.device("meta"):
        encoder = create_encoder("swinv2_g", window_size=12)
    encoder_values = sum(parameter.numel() for parameter in encoder.parameters())
    assert round(encoder_values / 1e5) == 29_978
    values = sum(math.prod(shape) for shape in planner.footprint(run).parameters)
    assert values == encoder_values + (4096 + 1) * 3 * 32**2  # and the head
    assert memory["parameters"] == pytest.approx(4 * values / 8, rel=0.01)
    assert memory["optimizer"] == pytest.approx(8 * values / 8, rel=0.01)
    assert not planner.fits(run)
    planner.limit = 0.9 * 141e9
    assert planner.fits(run)
    heading = "\n".join(module._heading(config, run, planner.footprint(run), 40e9))
    assert "3,010.4 M parameters on 8 devices" in heading
    assert "pretraining refuses this size" in heading and "1024 or 2048" in heading.replace("\n  ", " ")


BASE = ["experiment=simmim_swinv2_b_800ep", "trainer.accelerator=gpu"]
EIGHT = [*BASE, "trainer=ddp", "trainer.accelerator=gpu", "trainer.devices=8", "images_per_epoch=1281167"]


def test_time_and_price_follow_from_what_a_device_does_in_a_second(caplog, monkeypatch):
    """Without knowing the memory of the device, which then is not counted."""
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    lines = said(config_of(*EIGHT, "throughput=550", "price_per_hour=2.5"), caplog)
    assert max(map(len, lines)) <= 100
    text = " ".join(line.strip() for line in lines)
    device_hours = 800 * 626 * 2048 / 550 / 0.9 / 3600
    assert text.startswith("swinv2_b, 192x192 px, window 12, batch 128 a device, bf16 800 epochs of 1,281,167 images,")
    assert "500,800 steps of 2,048, on 8 devices at 550 images/s each, of which 90% are assumed to remain" in text
    hours = f"{device_hours / 8:.1f} hours ({device_hours / 192:.1f} days), {device_hours:.1f} device hours"
    assert f": {hours}, {2.5 * device_hours:,.2f} at 2.5 an hour; training steps alone: validation" in text
    assert lines[-1].startswith("Memory is not counted: give trainer.device_memory_gb")


def test_a_shorter_run_is_told_by_its_own_steps():
    cost = cost_of(config_of(*ON_GPU, "throughput=40", "trainer.max_steps=640"), TITLE)
    assert cost.startswith("5 epochs of 1,024 images, 640 steps of 8, on 1 device at 40 images/s: 2.1 minutes, 0.0 dev")


def test_a_table_of_the_benchmark_tells_the_throughput(tmp_path):
    rows = [{"network": "timm", "images_per_s": 1.0}, {"network": "simmim", "images_per_s": 200.0}]
    title = "swinv2_b, 192x192 px, window 12, batch 16, bf16, eager, training step"
    write_table(rows, tmp_path / "benchmark", title=title, notes=[])
    words = [*BASE, "images_per_epoch=1281167", "trainer.max_steps=1000"]
    for given in (tmp_path, tmp_path / "benchmark.csv"):
        cost = cost_of(config_of(*words, f"throughput={given}"), TITLE)
        assert "on 1 device at 200 images/s: 2.8 hours, 2.8 device hours;" in cost
    for wrong in ("swinv2_b, 192x192 px, window 24", "swinv2_t, 192x192 px, window 12"):
        with pytest.raises(ValueError, match=f"was measured of {title}, and the run is {wrong}"):
            cost_of(config_of(*words, f"throughput={tmp_path}"), f"{wrong}, batch 64 a device, bf16")
    with pytest.raises(ValueError, match=r"the run is .*fp32: measure that"):
        cost_of(config_of(*words, f"throughput={tmp_path}"), TITLE.replace("bf16", "fp32"))
    write_table(rows, tmp_path / "benchmark", title=title.replace("training step", "forward pass"), notes=[])
    with pytest.raises(ValueError, match=r"was measured of .*forward pass"):
        cost_of(config_of(*words, f"throughput={tmp_path}"), TITLE)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["throughput=fast"], "throughput=fast is neither a number nor a table of python -m simmim.benchmark"),
        (["throughput=5", "data=folder"], "images_per_epoch must be given, or data.root"),
        (["price_per_hour=2"], "price_per_hour=2 needs throughput="),
        (["images_per_epoch=9"], "images_per_epoch=9 needs throughput="),
        (["throughput=0"], "throughput=0 must be "),
        (["throughput=5", "scaling_efficiency=1.2"], "scaling_efficiency=1.2 must be "),
    ],
)
def test_what_a_price_cannot_be_told_of(words, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        cost_of(config_of(*TINY, *words), TITLE)


@pytest.mark.parametrize("command", ["plan", "pretrain"])
@pytest.mark.parametrize("recipe", ["finetune_swin_b_800ep", "low_label", "position_bias_transfer"])
def test_recipes_of_fine_tuning_are_refused(recipe, command):
    with pytest.raises(ValueError, match=f"^experiment={recipe} fine-tunes, and simmim.{command} is for pretraining"):
        config_of(f"experiment={recipe}", command=command)


def test_advice_for_a_run_that_has_run_out_of_memory(monkeypatch):
    config = config_of(*TINY, "trainer=cpu", "data.batch_size=64", command="pretrain")
    run = run_of(config)
    assert not run.step.gpu and run.step.model["attention"] == "sequential"
    monkeypatch.setattr(module, "free_memory", lambda: 10**12)  # it did not fit, whatever is counted
    line = advice(config)
    assert line.startswith("a step takes about ") and "1,000 GB" in line and "\n" not in line
    assert "with trainer.activation_checkpointing=all about" in line
    monkeypatch.setattr(module, "free_memory", lambda: 10**5)
    assert "no change that is planned makes it fit" in advice(config)
    assert "trainer.devices" not in " ".join(word for run in Planner(0).tried(run) for word in run.changes)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.device_memory_gb=0", "trainer.device_memory_gb=0 must be a number, positive"),
        ("data.batch_size=0", "data.batch_size=0 must be a whole number, positive"),
        ("trainer.accelerator=tpu", "trainer.accelerator=tpu is unknown: choose auto, cpu or gpu"),
        ("trainer.strategy=zero", "trainer.strategy=zero is unknown"),
        ("model.attention=flex", "model.attention=flex is compiled to one kernel, which is not counted"),
        ("data.image_size=72", "data.image_size=72x72 is not a multiple of masking.patch_size=32"),
    ],
)
def test_what_cannot_be_planned_says_why(override, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        plan(config_of(*ON_GPU, override))


def test_a_size_that_patches_and_merges_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="image size 72x72 px does not fit"):
        plan(config_of(*ON_GPU, "data.image_size=72", "masking.patch_size=8"))


def test_the_memory_of_a_gpu_that_is_not_here_must_be_given(monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"trainer\.device_memory_gb must be given"):
        plan(config_of(*TINY, "trainer=gpu"))


def test_the_command_answers_where_nothing_fits_too(tmp_path):
    smallest = ["model.attention=sequential", "trainer.activation_checkpointing=all", "data.batch_size=1"]
    done = started.run("-m", "simmim.plan", *TINY, *smallest, "trainer.device_memory_gb=1e-6", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "This run does not fit" in done.stdout and "Nothing fits" in done.stdout
    assert done.stderr == ""
