"""Two real processes on the CPU train what one process trains."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import started
import torch
import yaml
from torch.distributed.tensor import DTensor

from simmim.checkpoint_files import load
from simmim.command import EXIT_STOPPED
from simmim.config import compose_config
from simmim.encoders.encoder_files import read_encoder_weights
from simmim.encoders.weights import load_encoder
from simmim.pretrain import build, pretrain
from simmim.reconstruct import load_pretraining
from simmim.run_folder import list_checkpoints
from simmim.tasks.pretraining import Pretraining
from simmim.training.sharding import fill

RUNS = Path(__file__).parents[1] / "sharded_runs.py"
STEPS = 12
LENGTH = [f"trainer.max_steps={STEPS}", "trainer.max_epochs=3", "pictures=1", "data.val_images=7"]
# With AdamW's usual eps of 1e-8 rounding errors of tiny gradients would grow. The gradient of L1 jumps where prediction
# and pixel meet, so that one rounding error could change it: that of L2 does not.
EXACT = [*LENGTH, "optimizer.eps=1e-6", "objective.loss=l2"]
TWO = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true", "data.batch_size=4"]
SHARDED = ["trainer=fsdp", *TWO]
WATCHED = ["diagnostics.every_n_steps=5"]
GUARDED = ["guard.max_norm_ratio=1.05", "guard.window=5", "guard.warmup_steps=3", "guard.max_in_a_row=20",
           "trainer.max_steps=20", "trainer.max_epochs=5"]  # fmt: skip
G = [
    "model=swinv2_g", "model.depths=[2,2,13,4]", "model.embed_dim=8", "model.num_heads=[1,1,2,2]",
    "model.window_size=2", "data.image_size=64", "masking.patch_size=32", "optimizer.clip_grad_norm=100",
    "trainer.max_steps=1",
]  # fmt: skip
VIT = [
    "model=vit_s", "model.depths=[2]", "model.embed_dim=24", "model.num_heads=[3]", "model.patch_size=8",
    "model.window_size=4", "masking.patch_size=16", "optimizer.layer_decay=0.7",
]  # fmt: skip


def one(folder, *overrides):
    return pretrain(compose_config("pretrain", ["experiment=debug", *overrides], output_dir=folder))


def torchrun(*arguments, cwd=None):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=cwd)


def rows(folder, table="metrics.csv"):
    with (folder / table).open() as file:
        return list(csv.DictReader(file))


def assert_equal_metrics(folder, other, *, atol=1e-6, keys=("train_loss", "val_loss", "val_loss_visible_mean")):
    ours, theirs = rows(folder), rows(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for ours_at, theirs_at in zip(ours, theirs, strict=True):
        for key in keys:
            assert bool(ours_at[key]) == bool(theirs_at[key])
            if ours_at[key]:
                # one unit more: metrics.csv holds six digits
                unit = 10 ** (math.floor(math.log10(max(0.1, abs(float(theirs_at[key]))))) - 5)
                assert float(ours_at[key]) == pytest.approx(float(theirs_at[key]), abs=atol + unit), ours_at["step"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    one(folder / "l1", *LENGTH, "optimizer.eps=1e-6")
    one(folder / "plain", *EXACT, *WATCHED, "checkpoint.every_n_steps=3", "checkpoint.keep=null")
    one(folder / "guarded", *EXACT, *GUARDED)
    one(
        folder / "averaged", *EXACT, "optimizer.ema_decay=0.9", "trainer.accumulate_grad_batches=2", "data.batch_size=4"
    )
    one(folder / "layered", *EXACT, "optimizer.layer_decay=0.7")
    one(folder / "table", *EXACT, "model.position_bias=table")
    one(folder / "vit", *EXACT, *VIT)
    one(folder / "bf16", *EXACT, "trainer.precision=bf16-mixed")
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory, alone):
    """Runs of two processes."""
    folder = tmp_path_factory.mktemp("together")
    half = ["data.batch_size=2", "trainer.accumulate_grad_batches=2"]
    runs = {
        "plain": [*SHARDED, *EXACT, *WATCHED, "checkpoint.every_n_steps=3", "checkpoint.keep=null"],
        "guarded": [*SHARDED, *EXACT, *GUARDED],
        "averaged": [*SHARDED, *EXACT, *half, "optimizer.ema_decay=0.9"],
        "gathered": [*SHARDED, *EXACT, *WATCHED, "trainer.reshard_after_forward=false",
                     "trainer.activation_checkpointing=[1,3]"],
        "layered": [*SHARDED, *EXACT, "optimizer.layer_decay=0.7"],
        "table": [*SHARDED, *EXACT, "model.position_bias=table"],
        "vit": [*SHARDED, *EXACT, *VIT, "trainer.activation_checkpointing=all"],
        "compiled": [*SHARDED, *EXACT, *WATCHED, "trainer.compile=true", "trainer.activation_checkpointing=all"],
        "bf16": [*SHARDED, *EXACT, "trainer.precision=bf16-mixed"],
        "ddp": ["trainer=ddp", *TWO, *EXACT, *WATCHED, *half],
        "from_file": [*SHARDED, *EXACT, f"resume={alone}/plain/checkpoints/step_0000009.ckpt"],
        "from_encoder": [*SHARDED, *EXACT, f"encoder={alone}/plain", "optimizer.base_lr=1e-12",
                         "optimizer.weight_decay=0", "trainer.max_steps=1"],
        "giant": [*SHARDED, *G],
    }  # fmt: skip
    started.run_together(RUNS, folder, json.dumps(runs))
    return folder


def facts(folder, name):
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["plain", "gathered", "compiled", "ddp"])
def test_two_processes_train_as_one(alone, together, name):
    assert_equal_metrics(together / name, alone / "plain")
    assert_equal_metrics(together / name, alone / "plain", atol=1e-5, keys=("grad_norm",))


@pytest.mark.parametrize("name", ["plain", "gathered", "compiled", "ddp"])
def test_what_is_measured_of_an_encoder_is_that_of_all_processes(alone, together, name):
    ours, theirs = (rows(folder, "signal.csv") for folder in (together / name, alone / "plain"))
    assert [(row["step"], row["part"]) for row in ours] == [(row["step"], row["part"]) for row in theirs] != []
    keys = ["gradient_norm"]  # with accumulation, features are those of the first batch alone
    keys += [] if name == "ddp" else ["variance", "attention_mean", "attention_max"]
    for key in keys:
        found, expected = ([float(row[key]) for row in table if row[key]] for table in (ours, theirs))
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6), key


def test_processes_leave_out_the_same_steps(alone, together):
    ours, theirs = (rows(folder / "guarded", "skipped.csv") for folder in (together, alone))
    steps = [row["step"] for row in theirs]
    assert 1 < len(steps) < 15
    assert [(row["step"], row["samples"]) for row in ours] == [(row["step"], row["samples"]) for row in theirs]
    assert_equal_metrics(together / "guarded", alone / "guarded")
    assert_equal_metrics(together / "guarded", alone / "guarded", keys=("skipped_steps",))


def test_layers_have_their_own_learning_rates(alone, together):
    assert_equal_metrics(together / "layered", alone / "layered")
    assert rows(alone / "layered")[-1]["val_loss"] != rows(alone / "plain")[-1]["val_loss"]


def test_a_vision_transformer_is_sharded_alike(alone, together):
    """With what stands outside of its blocks: the position bias that all of them share, and the tokens."""
    assert_equal_metrics(together / "vit", alone / "vit")


def test_tables_of_offsets_are_sharded_like_everything_else(alone, together):
    assert_equal_metrics(together / "table", alone / "table")
    ours, theirs = (load(list_checkpoints(run / "table")[-1])["state_dict"] for run in (together, alone))
    task = build(compose_config("pretrain", ["experiment=debug", "model.position_bias=table"], output_dir=alone))[0]
    task.configure_model()
    tables = {key: value for key, value in task.state_dict().items() if key.endswith("position_bias.table")}
    assert tables
    for key, initial in tables.items():
        assert (ours[key] - theirs[key]).norm() < 1e-2 * (theirs[key] - initial).norm(), key


def test_an_average_follows_sharded_weights(alone, together):
    assert_equal_metrics(together / "averaged", alone / "averaged")
    ours, theirs = (load(list_checkpoints(run / "averaged")[-1])["state_dict"] for run in (together, alone))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], theirs[key], atol=2e-5) for key in ours)
    published = load_encoder(together / "averaged").state_dict()
    assert all(torch.equal(value, ours[f"average.encoder.{key}"]) for key, value in published.items())
    assert not all(torch.equal(value, ours[f"network.encoder.{key}"]) for key, value in published.items())
    assert read_encoder_weights(list_checkpoints(together / "averaged")[-1])[0].keys() == published.keys()


def test_bf16_stays_close(alone, together):
    assert_equal_metrics(together / "bf16", alone / "bf16", atol=2e-3)


def test_each_process_holds_about_half(together):
    for rank in facts(together, "plain"):
        assert rank["parameters"] == pytest.approx(0.5, abs=0.02)
        assert rank["optimizer"] == pytest.approx(0.5, abs=0.02)
    assert [rank["parameters"] for rank in facts(together, "ddp")] == [1, 1]


def test_gradients_are_sent_once_a_step_not_once_a_batch(together):
    plain, accumulated = facts(together, "plain")[0], facts(together, "averaged")[0]
    assert plain["reductions"] == accumulated["reductions"] > 0


def test_the_initial_values_do_not_depend_on_the_processes(alone, together):
    """Of the structure of SwinV2-G, with its norms between blocks, at a small width and depth."""
    run = together / "giant"
    assert math.isfinite(float(rows(run)[0]["train_loss"]))
    config = compose_config("pretrain", ["experiment=debug", *G], output_dir=run)
    task = build(config)[0]
    task.configure_model()
    trained = load(list_checkpoints(run)[-1])["state_dict"]
    # an AdamW step of the warm-up moves every weight by less than the learning rate
    lr = task.optimizer["lr"]
    for key, value in task.state_dict().items():
        assert (value - trained[key]).abs().max() <= 1.1 * lr, key
    assert any("extra_norm" in key for key in trained)


def test_a_plain_encoder_file_is_loaded_into_a_sharded_model(alone, together):
    before, after = (load_encoder(run).state_dict() for run in (alone / "plain", together / "from_encoder"))
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)


def test_two_processes_continue_the_run_of_one(alone, together):
    continued = [row for row in rows(together / "from_file") if row["train_loss"]]
    assert [row["step"] for row in continued] == [str(step) for step in range(10, STEPS + 1)]
    whole = {row["step"]: row for row in rows(alone / "plain") if row["train_loss"]}
    for row in continued:
        assert float(row["train_loss"]) == pytest.approx(float(whole[row["step"]]["train_loss"]), abs=2e-6)


def test_one_process_continues_the_run_of_two(tmp_path, alone, together):
    folder = together / "plain" / "checkpoints" / "step_0000009.ckpt"
    assert sorted(p.name for p in folder.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp", "rest.pt"]
    one(tmp_path, *EXACT, f"resume={folder}")
    whole = {row["step"]: row for row in rows(together / "plain") if row["train_loss"]}
    continued = [row for row in rows(tmp_path) if row["train_loss"]]
    assert len(continued) == STEPS - 9
    for row in continued:
        assert float(row["train_loss"]) == pytest.approx(float(whole[row["step"]]["train_loss"]), abs=2e-6)


def test_a_sharded_checkpoint_becomes_one_file(tmp_path, together):
    run = together / "averaged"
    made = started.run("-m", "simmim.consolidate", run, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    file, folder = run / f"step_{STEPS:07}.ckpt", list_checkpoints(run)[-1]
    assert file.is_file() and folder.is_dir() and f"file       {file}" in made.stdout
    ours, theirs = torch.load(file, weights_only=True), load(folder)
    assert all(torch.equal(ours["state_dict"][key], value) for key, value in theirs["state_dict"].items())
    states = (tree["optimizer_states"][0]["state"] for tree in (ours, theirs))
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(*(s.values() for s in states), strict=True))
    assert isinstance(load_pretraining(file), Pretraining)
    again = started.run("-m", "simmim.consolidate", run, cwd=tmp_path)
    assert again.returncode == 1
    assert f"out={file} exists already: give another out=…" in again.stdout


def test_a_parameter_left_out_is_noticed(tmp_path, monkeypatch):
    task = Pretraining(**dict(load(_checkpoint(tmp_path))["hyper_parameters"]))

    class Forgetful:
        def shard(self, module):
            pass

    with pytest.raises(AssertionError, match="not sharded"):
        fill(task.network, seed=0, strategy=Forgetful())
    assert not any(isinstance(parameter, DTensor) for parameter in task.parameters())


def _checkpoint(folder):
    one(folder / "short", "trainer.max_steps=1", "pictures=1")
    return list_checkpoints(folder / "short")[-1]


def as_a_user(folder, *arguments):
    return started.start("-m", "simmim.pretrain", "experiment=debug", *arguments, cwd=folder)


def test_a_multirun_starts_the_processes_of_each_of_its_jobs(tmp_path, alone):
    """Each job once and in its folder, although each of its processes runs the command again."""
    process = as_a_user(
        tmp_path, *TWO, *LENGTH, "optimizer.eps=1e-6", "name=two", "logger=wandb", "trainer=fsdp,ddp", "--multirun"
    )
    output, _ = process.communicate(timeout=290)
    assert process.returncode == 0, output
    sweep = tmp_path / "multirun" / "two"
    assert [p for p in tmp_path.rglob("*") if p.is_dir() and sweep not in p.parents[1:]] == [
        tmp_path / "multirun", sweep, sweep / "0", sweep / "1"
    ]  # fmt: skip
    lines = [line for line in output.splitlines() if line.startswith(("encoder", "run folder", "done"))]
    assert len(lines) == 6  # once, not once a process
    for job, strategy in ((sweep / "0", "fsdp"), (sweep / "1", "ddp")):
        assert_equal_metrics(job, alone / "l1")
        config = yaml.safe_load((job / "config.yaml").read_text())
        assert (config["name"], config["logger"]["group"], config["trainer"]["strategy"]) == ("two", "two", strategy)
        assert len(list((job / "wandb").glob("offline-run-*"))) == 1
        assert load_encoder(job)(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_torchrun_needs_a_name_and_leaves_nothing_astray(tmp_path):
    arguments = ("-m", "simmim.pretrain", "experiment=debug", "trainer=ddp", *TWO, "trainer.max_steps=2")
    unnamed = torchrun(*arguments, cwd=tmp_path)
    assert unnamed.returncode != 0
    assert "name=… must be given under torchrun or Slurm" in unnamed.stderr
    assert list(tmp_path.iterdir()) == []
    named = torchrun(*arguments, "masking.ratio=0.5,0.7", "name=sweep", "--multirun", cwd=tmp_path)
    assert named.returncode == 0, named.stderr[-3000:]
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*/*")) == [
        "multirun/sweep/0", "multirun/sweep/1", "multirun/sweep/multirun.yaml"
    ]  # fmt: skip
    assert all((tmp_path / f"multirun/sweep/{job}/encoder.safetensors").exists() for job in (0, 1))


def test_several_devices_need_a_strategy(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.devices=2: several devices need trainer=ddp or trainer=fsdp"):
        one(tmp_path, "trainer.devices=2")


@pytest.mark.parametrize("case", ["one of them", "both"])
def test_a_signal_stops_all_processes_with_their_state_saved(tmp_path, case):
    arguments = (*SHARDED, "trainer.max_steps=100000", "name=long", "checkpoint.every_n_steps=100000")
    process = as_a_user(tmp_path, *arguments)
    run = tmp_path / "outputs" / "pretrain" / "long"
    deadline = time.monotonic() + 120
    while not ((run / "metrics.csv").exists() and len(rows(run)) > 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    (child,) = (int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    if case == "both":
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.05)
    os.kill(child, signal.SIGUSR1 if case == "both" else signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED == 75, output
    assert "saved: the same command with name=long and resume=auto continues" in output.splitlines()[-1]
    assert "Traceback" not in output
    checkpoint = list_checkpoints(run)[-1]
    step = int(re.findall(r"\d+", checkpoint.name)[0])
    assert [row["step"] for row in rows(run) if row["train_loss"]] == [str(s) for s in range(1, step + 1)]


@pytest.mark.gpu
def test_gpus_train_sharded_with_nccl(tmp_path):
    process = as_a_user(tmp_path, "trainer=fsdp", *LENGTH, "name=gpus", "trainer.compile=true")
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    run = tmp_path / "outputs" / "pretrain" / "gpus"
    assert all(math.isfinite(float(row["train_loss"])) for row in rows(run) if row["train_loss"])
    assert load_encoder(run)(torch.zeros(1, 3, 32, 32)).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_gpu_trains_as_the_cpu(tmp_path, alone, precision):
    one(tmp_path, *EXACT, "trainer.accelerator=gpu", f"trainer.precision={precision}")
    exact = precision == "32-true"
    assert_equal_metrics(tmp_path, alone / ("plain" if exact else "bf16"), atol=1e-4 if exact else 5e-3)
