"""A run that is watched is the run that is not, and what is seen of it is true."""

import csv
import shutil

import pytest
import torch

from simmim.config import compose_config
from simmim.finetune import finetune
from simmim.pretrain import pretrain
from simmim.run_folder import list_checkpoints

SETTINGS = ("trainer.accumulate_grad_batches=2", "data.batch_size=4", "data.train_images=64", "data.val_images=2",
            "trainer.max_steps=8", "model.drop_path=0.3", "checkpoint.every_n_steps=4", "pictures=1")  # fmt: skip


def run(folder, *overrides):
    pretrain(compose_config("pretrain", ["experiment=debug", *SETTINGS, *overrides], output_dir=folder))


def rows(path):
    with path.open() as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def numbers(path, key):
    """Of each step that has it, one or several."""
    found = {}
    for row in rows(path):
        if row[key]:
            found.setdefault(int(row["step"]), []).append(float(row[key]))
    return found


@pytest.fixture(scope="module")
def watched_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    run(folder, "diagnostics.every_n_steps=2")
    return folder


def test_a_run_is_the_same_with_diagnostics_and_without_also_if_resumed(tmp_path, watched_run):
    run(tmp_path / "plain")
    new = ("variance_ratio", "highest_attention")
    watched = [{k: v for k, v in row.items() if k not in new} for row in rows(watched_run / "metrics.csv")]
    assert [row for row in watched if row["train_loss"] or row["val_loss"]] == rows(tmp_path / "plain" / "metrics.csv")
    ours, theirs = (torch.load(list_checkpoints(folder)[-1], weights_only=True)["state_dict"]
                    for folder in (watched_run, tmp_path / "plain"))  # fmt: skip
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not (tmp_path / "plain" / "signal.csv").exists()

    shutil.copytree(watched_run, tmp_path / "resumed")
    list_checkpoints(tmp_path / "resumed")[-1].unlink()  # as if killed behind that of step 4
    run(tmp_path / "resumed", "diagnostics.every_n_steps=2", "resume=auto")
    for name in ("signal.csv", "metrics.csv"):
        assert rows(tmp_path / "resumed" / name) == rows(watched_run / name)


def test_what_is_logged_is_what_the_table_and_the_clipping_say(watched_run):
    variance, attention, gradients = (
        numbers(watched_run / "signal.csv", key) for key in ("variance", "attention_max", "gradient_norm")
    )
    assert [*variance] == [*gradients] == [2, 4, 6, 8] and len(variance[2]) == 4
    metrics = watched_run / "metrics.csv"
    for step in variance:
        (norm,), (ratio,), (highest,) = (
            numbers(metrics, key)[step] for key in ("grad_norm", "variance_ratio", "highest_attention")
        )
        assert sum(value**2 for value in gradients[step]) ** 0.5 == pytest.approx(
            norm, rel=1e-5
        )  # unclipped, of both batches
        assert max(variance[step]) / min(variance[step]) == pytest.approx(ratio, rel=1e-5)
        assert max(attention[step]) == pytest.approx(highest, rel=1e-5)


def test_fine_tuning_is_watched_too(tmp_path):
    words = ["experiment=debug", "trainer.max_steps=2", "data.val_images=2", "diagnostics.every_n_steps=1"]
    finetune(compose_config("finetune", words, output_dir=tmp_path))
    assert [*numbers(tmp_path / "signal.csv", "variance")] == [1, 2]
