"""A run that is killed and resumed is the run that was never killed, to the last bit."""

import csv
import shutil
from pathlib import Path

import pytest
import started
import torch

from simmim.checkpoint_files import load
from simmim.config import compose_config
from simmim.pretrain import pretrain
from simmim.run_folder import list_checkpoints

RUNS = Path(__file__).parent / "killed_runs.py"
SETTINGS = (
    "trainer.max_epochs=12", "trainer.accumulate_grad_batches=2", "data.batch_size=4",
    "checkpoint.every_n_steps=2", "pictures=1", "data.val_images=2", "model.drop_path=0.3", "optimizer.ema_decay=0.9",
)  # fmt: skip
SHORT = "trainer.max_steps=12"
SHARDED = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true",
           "data.batch_size=2")  # fmt: skip


def train(folder, *overrides, processes=1, kills=0, seed=0):
    """The moments at which the run was killed."""
    done = started.run(RUNS, folder, processes, kills, seed, *SETTINGS, *overrides)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [line.removeprefix("killed: ") for line in done.stdout.splitlines() if line.startswith("killed: ")]


def rows(folder):
    """All metrics but the speed."""
    with (folder / "metrics.csv").open() as file:
        return [{key: row[key] for key in row if key != "images_per_second"} for row in csv.DictReader(file)]


def tensors(tree, path=""):
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return {key: value for name, item in items for key, value in tensors(item, f"{path}/{name}").items()}


def assert_same_run(folder, other):
    assert rows(folder) == rows(other)
    ours, theirs = (tensors(load(list_checkpoints(run)[-1])) for run in (folder, other))
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize(
    ("processes", "overrides", "kills"),  # of each kind one at least
    [
        (1, ("trainer.max_steps=48", "data.num_workers=0"), 20),
        (1, ("trainer.max_steps=30", "data.num_workers=2"), 8),
        (2, ("trainer.max_steps=30", *SHARDED), 8),
    ],
    ids=["no workers", "two workers", "two processes"],
)
def test_a_run_killed_many_times_ends_as_if_it_never_was(tmp_path, processes, overrides, kills):
    assert train(tmp_path / "whole", *overrides, processes=processes) == []
    moments = train(tmp_path / "killed", *overrides, processes=processes, kills=kills, seed=5)
    assert len(moments) == kills
    assert {"training", "validation", "checkpoint half written", "checkpoint about to be whole"} < set(moments)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("change", ["cut", "flip"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, finished_runs, kind, change):
    run, other = finished_runs(kind, tmp_path / "run"), finished_runs(kind, tmp_path / "other")
    newest = list_checkpoints(run)[-1]
    file = newest if kind == "file" else newest / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content[: len(content) // 2] if change == "cut" else content)
    overrides = ["experiment=debug", *SETTINGS, SHORT, "resume=auto"]
    pretrain(compose_config("pretrain", overrides, output_dir=run))
    assert f"{newest.name} is" in caplog.text and "passed over" in caplog.text
    assert (run / "checkpoints" / f"{newest.name}.damaged").exists()
    if kind == "file":
        assert_same_run(run, other)
    assert [row["step"] for row in rows(run) if row["train_loss"]] == [str(step) for step in range(1, 13)]


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory):
    """Copies of a run that a file, or a folder of two processes, was saved of."""
    made = {}

    def copy(kind, to):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "run"
            train(made[kind], SHORT, *(SHARDED if kind == "folder" else ()), processes=1 + (kind == "folder"))
        return Path(shutil.copytree(made[kind], to))

    return copy


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(tmp_path, finished_runs):
    run = finished_runs("file", tmp_path / "run")
    for checkpoint in list_checkpoints(run):
        checkpoint.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no checkpoint there is whole"):
        pretrain(compose_config("pretrain", ["experiment=debug", *SETTINGS, SHORT, "resume=auto"], output_dir=run))
