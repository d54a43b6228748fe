"""Steps that would do harm are left out, told, and can be made again; everything else is as if they had not been."""

import csv
import itertools
import math
import shutil
import statistics
from types import SimpleNamespace

import pytest
import torch

from simmim.config import compose_config
from simmim.data.module import collate
from simmim.finetune import finetune
from simmim.pretrain import build, pretrain
from simmim.run_folder import list_checkpoints
from simmim.tasks.classification import Classification
from simmim.tasks.pretraining import Pretraining
from simmim.training.guard import Guard

KEPT = ("checkpoint.every_n_steps=1", "checkpoint.keep=null")
SETTINGS = {"seed": 0, "max_norm_ratio": 3.0, "window": 4, "warmup_steps": 3, "max_in_a_row": 10}


def config_of(folder, *overrides, command="pretrain"):
    small = ["experiment=debug", "trainer.max_steps=8", "data.train_images=64", "data.val_images=2"]
    return compose_config(command, [*small, *overrides], output_dir=folder)


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def trained(folder):
    """The metrics of each step, but for its speed."""
    return [{k: v for k, v in row.items() if k != "images_per_second"}
            for row in rows(folder / "metrics.csv") if row["train_loss"]]  # fmt: skip


def spoil(monkeypatch, factor, *steps, task=Pretraining):
    """Multiplies the loss of these optimizer steps, counted from 1. Returns the batches of all steps."""
    loss, seen = task.loss, {}

    def spoiled(self, batch):
        step = self.trainer.global_step + 1
        seen.setdefault(step, []).append({key: batch[key].clone() for key in ("image", "mask") if key in batch})
        return loss(self, batch) * (factor if step in steps else 1)

    monkeypatch.setattr(task, "loss", spoiled)
    return seen


def states(folder):
    """After each step: the weights with their average, and all that the optimizer knows of its parameters."""
    for path in list_checkpoints(folder):
        checkpoint = torch.load(path, weights_only=True)
        moments = checkpoint["optimizer_states"][0]["state"]
        yield checkpoint["state_dict"] | {
            f"{at} {key}": value for at, own in moments.items() for key, value in own.items()
        }


def test_a_step_that_is_not_finite_changes_nothing_and_the_schedule_goes_on(tmp_path, monkeypatch, caplog):
    config = config_of(tmp_path, *KEPT, "optimizer.ema_decay=0.9", "trainer.accumulate_grad_batches=2",
                       "data.batch_size=4", "guard.max_in_a_row=2", "pictures=1")  # fmt: skip
    seen = spoil(monkeypatch, math.inf, 3, 4, 6)
    pretrain(config)
    pairs = itertools.pairwise(states(tmp_path))
    unchanged = [all(torch.equal(before[key], after[key]) for key in after) for before, after in pairs]
    assert unchanged == [False, True, True, False, True, False, False]
    assert [int(row["skipped_steps"]) for row in trained(tmp_path)] == [0, 0, 1, 2, 2, 3, 3, 3]
    for at, row in enumerate(trained(tmp_path)):
        assert float(row["lr"]) == pytest.approx(1.5e-3 * factor(at, 8), rel=1e-5)
    listed = rows(tmp_path / "skipped.csv")
    assert [(row["step"], row["reason"], row["loss"]) for row in listed] == [
        (step, "the loss is inf", "inf") for step in "346"
    ]
    assert [f"step {step} is left out: the loss is inf" in caplog.text for step in range(1, 9)].count(True) == 3
    _, data, length = build(config)  # and from the file alone, each batch can be made again
    for row in listed:
        keys = [tuple(map(int, key.split(":"))) for key in row["samples"].split()]
        assert keys == data.keys_of_step(int(row["step"]), length.images_per_step)
        batch = collate([data.train_samples[key] for key in keys])
        for name in ("image", "mask"):
            assert torch.equal(batch[name], torch.cat([part[name] for part in seen[int(row["step"])]]))


def factor(step, total, warmup=4, last=0.05):
    if step < warmup:
        return (step + 1) / warmup
    return last + (1 - last) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def test_a_gradient_far_above_the_median_is_left_out_also_by_a_run_that_was_resumed(tmp_path, monkeypatch):
    """At the first step behind the checkpoint: without the norms before it, that one could not be judged."""
    guard = ("guard.max_norm_ratio=20", "guard.window=4", "guard.warmup_steps=4", "checkpoint.every_n_steps=5",
             "pictures=1")  # fmt: skip
    spoil(monkeypatch, 1e3, 3, 6, 8)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pretrain(config_of(whole, *guard))
    listed = rows(whole / "skipped.csv")
    assert [row["step"] for row in listed] == ["6", "8"]  # the third came before the median was known
    norms = [float(row["grad_norm"]) for row in trained(whole)]
    taken = [norms[at] for at in range(7) if at != 5]
    for row, before in zip(listed, (taken[1:5], taken[2:6]), strict=True):
        assert float(row["median"]) == pytest.approx(statistics.median(before), rel=1e-5)
        assert float(row["grad_norm"]) == pytest.approx(norms[int(row["step"]) - 1], rel=1e-5)
        assert "guard.max_norm_ratio=20 times the median" in row["reason"]
    shutil.copytree(whole, broken)
    list_checkpoints(broken)[-1].unlink()  # as if killed behind that of step 5
    (broken / "skipped.csv").write_text((whole / "skipped.csv").read_text() + "99,behind the checkpoint,,,,,\n")
    pretrain(config_of(broken, *guard, "resume=auto"))
    assert trained(broken) == trained(whole)
    assert rows(broken / "skipped.csv") == listed
    ours, theirs = (list(states(folder))[-1] for folder in (broken, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_too_many_in_a_row_stop_the_run_in_one_line(tmp_path, monkeypatch):
    spoil(monkeypatch, math.nan, 2, 4, 5, 6)
    words = r"^3 steps in a row were left out, more than guard\.max_in_a_row=2: see .*skipped\.csv .*base_lr[^\n]*$"
    with pytest.raises(ValueError, match=words):
        pretrain(config_of(tmp_path, "checkpoint.every_n_steps=4", "guard.max_in_a_row=2", "pictures=1"))
    assert [row["step"] for row in rows(tmp_path / "skipped.csv")] == ["2", "4", "5", "6"]
    assert all(value.isfinite().all() for value in list(states(tmp_path))[-1].values())


def test_fine_tuning_is_guarded_too(tmp_path, monkeypatch):
    seen = spoil(monkeypatch, math.nan, 2, task=Classification)
    config = config_of(tmp_path, *KEPT, "trainer.max_steps=3", "augmentation.mixup=0", "augmentation.cutmix=0",
                       command="finetune")  # fmt: skip
    finetune(config)
    first, second, third = states(tmp_path)
    assert all(torch.equal(first[key], second[key]) for key in first if key.startswith("network"))
    assert not all(torch.equal(second[key], third[key]) for key in first if key.startswith("network"))
    assert [row["step"] for row in rows(tmp_path / "skipped.csv")] == ["2"]
    assert len(seen) == 3


def trainer_of_two(*, others_loss):
    """Of the first of two processes, where the other one has such a loss."""

    def reduce(own, reduce_op):
        assert reduce_op == "sum"
        return own + torch.tensor([not math.isfinite(others_loss), others_loss], dtype=own.dtype)

    data = SimpleNamespace(batch_size=2, keys_of_step=lambda step, images: [(step, number) for number in range(images)])
    return SimpleNamespace(strategy=SimpleNamespace(reduce=reduce, root_device="cpu"), world_size=2, global_step=6,
                           datamodule=data, accumulate_grad_batches=1, is_global_zero=True)  # fmt: skip


def test_processes_decide_alike(tmp_path):
    guard = Guard(tmp_path / "skipped.csv", **SETTINGS)
    assert not guard.refuses(trainer_of_two(others_loss=2.0), loss=1.0, norm=1.0)
    assert guard.refuses(trainer_of_two(others_loss=math.inf), loss=1.0, norm=1.0)
    assert list(guard.norms) == [1.0] and guard.skipped == 1
    (row,) = rows(tmp_path / "skipped.csv")
    assert (row["reason"], row["loss"], row["samples"]) == (
        "the loss of another process is not finite", "inf", "7:0 7:1 7:2 7:3",
    )  # fmt: skip


def test_the_median_is_of_the_last_steps_taken(tmp_path):
    guard, trainer = Guard(tmp_path / "skipped.csv", **SETTINGS), trainer_of_two(others_loss=1.0)
    norms = [9.0, 1.0, 2.0, 20.0, 8.0, 6.1, 6.0, 40.0]
    refused, taken = [], []
    for norm in norms:
        expected = len(taken) >= 3 and norm > 3 * statistics.median(taken[-4:])
        refused.append(guard.refuses(trainer, loss=1.0, norm=norm))
        assert refused[-1] == expected
        if not expected:
            taken.append(norm)
    assert refused == [False, False, False, True, True, True, False, True]


def test_a_median_that_would_never_be_known_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"guard\.warmup_steps=5 must be at most guard\.window=4"):
        Guard(tmp_path / "skipped.csv", **{**SETTINGS, "warmup_steps": 5})
