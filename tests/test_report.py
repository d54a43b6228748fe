"""Sweeps as they are typed, at the size of the debug experiment, and what is reported of them."""

import csv
import json
import logging
import shlex
import shutil
import statistics
import sys
from concurrent.futures import BrokenExecutor

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from simmim.command import command
from simmim.config import compose_config, config_folder
from simmim.errors import explain
from simmim.finetune import finetune
from simmim.masking import Masking
from simmim.pretrain import pretrain
from simmim.report import _panels, report
from simmim.sweep_results import rank, read_results, swept_keys

SHORT = ("experiment=debug", "trainer.max_steps=1", "log_every_n_steps=1")
TUNING = ("trainer=cpu", "data.train_images=16", "data.val_images=40", "data.batch_size=8", "data.num_workers=0",
          "schedule.warmup_epochs=0", "trainer.max_steps=2")  # fmt: skip


def type_in(folder, function, *words):
    """What the command exits with, typed in a folder; without the seconds that a process of its own takes to start."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [function.__name__, *words])
        patch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
        try:
            command(function, objective="val_loss")()
        except SystemExit as ended:
            return ended.code
        finally:
            root.handlers, root.level = handlers, level
    return 0


def reported(folder, sweep, *words):
    """Rows, and the Markdown."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rows = report(compose_config("report", [f"folder={sweep}", *words], output_dir=folder / "out"))
        return rows, (folder / sweep / "report.md").read_text()


def val_losses(run):
    with (run / "metrics.csv").open() as file:
        return [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """Four jobs, the last of which is refused: at 32 px, 0.8 of four cells are all of them."""
    folder = tmp_path_factory.mktemp("masks")
    ended = type_in(
        folder, pretrain, "sweep=mask", *SHORT, "masking.patch_size=8,16", "masking.ratio=0.5,0.8", "name=m"
    )
    return folder, ended


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """Three trials of Optuna."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    folder = tmp_path_factory.mktemp("search")
    words = ("sweep=learning_rate_optuna", *SHORT, "hydra.sweeper.n_trials=3", "name=s")
    assert type_in(folder, pretrain, *words) == 0
    return folder


def test_a_sweep_needs_no_option_and_takes_values_from_the_command_line(masks):
    folder, _ = masks
    jobs = {n: yaml.safe_load((folder / f"multirun/m/{n}/config.yaml").read_text())["masking"] for n in "012"}
    assert {n: (masking["patch_size"], masking["ratio"]) for n, masking in jobs.items()} == {
        "0": (8, 0.5), "1": (8, 0.8), "2": (16, 0.5),
    }  # fmt: skip
    assert not (folder / "outputs").exists()


def test_a_job_that_fails_is_told_at_the_end_of_the_sweep(masks):
    folder, ended = masks
    assert ended.startswith("job 3 (masking.patch_size=16,masking.ratio=0.8,")
    assert "hides all 4 cells" in ended and "\n" not in ended
    states = [json.loads((folder / f"multirun/m/{n}/job.json").read_text())["state"] for n in "0123"]
    assert states == ["done"] * 3 + ["failed"]


def test_a_failure_in_another_process_is_told_as_well(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    ended = type_in(tmp_path, pretrain, "-m", *SHORT, "masking.ratio=0.5,0.8", "hydra/launcher=processes")
    assert ended.startswith("job 1 (") and "hides all 4 cells" in ended
    [sweep] = (tmp_path / "multirun").glob("*/*")  # one folder of one time, whoever asked for it
    assert (sweep / "0/encoder.safetensors").is_file()
    assert json.loads((sweep / "1/job.json").read_text())["state"] == "failed"


def test_a_search_learns_from_the_final_validation_loss(search):
    sweep = search / "multirun/s"
    found = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    losses = {n: val_losses(sweep / n)[-1] for n in "012"}
    assert found["best_value"] == pytest.approx(min(losses.values()), rel=1e-5)
    best = yaml.safe_load((sweep / min(losses, key=losses.get) / "config.yaml").read_text())
    assert found["best_params"]["optimizer.base_lr"] == pytest.approx(best["optimizer"]["base_lr"])


def test_what_is_not_installed_is_one_line_with_the_way_out():
    with (
        initialize_config_dir(str(config_folder()), version_base="1.3"),
        pytest.raises(Exception, match="hydra/launcher/nothing") as caught,
    ):
        compose("pretrain", overrides=["hydra/launcher=nothing"])
    words = str(caught.value).replace("nothing", "joblib")
    assert explain(type(caught.value)(words), "pretrain") == (
        "hydra/launcher=joblib is not installed: pip install 'simmim[sweep]'"
    )


def test_a_job_whose_process_was_killed_is_one_line():
    killed = pytest.importorskip("joblib.externals.loky.process_executor").TerminatedWorkerError("a\nb")
    assert isinstance(killed, BrokenExecutor)  # which the command catches
    assert "resume=auto goes on" in explain(killed, "pretrain")


def test_a_sweep_over_masks_is_reported_and_not_ranked_by_its_losses(masks):
    folder, _ = masks
    rows, text = reported(folder, "multirun/m")
    assert [row["state"] for row in rows] == ["done", "done", "done", "failed"]
    assert [(row["masking.patch_size"], row["masking.ratio"]) for row in rows[:2]] == [("8", "0.5"), ("8", "0.8")]
    for row in rows[:3]:
        assert row["val_loss"] == val_losses(folder / f"multirun/m/{row['job']}")[-1]
        assert row["share"] == pytest.approx(row["val_loss"] / row["trivial_loss"])
        assert row["place"] is None and row["images/s"] > 0 and row["minutes"] > 0
    assert "| masking.patch_size | masking.ratio | AvgDist px |" in text
    assert "* 3 of 4 jobs are done, 1 failed\n" in text
    assert "* job 3 failed: masking.ratio=0.8 hides all 4 cells" in text
    assert "losses and shares are not comparable" in text
    assert "python -m simmim.finetune -m experiment=low_label encoder=multirun/m/0,multirun/m/1,multirun/m/2" in text
    assert (folder / "multirun/m/report.png").is_file() and (folder / "multirun/m/report.csv").is_file()


def test_avgdist_is_that_of_the_masks(masks):
    """Against all distances between pixels."""
    folder, _ = masks
    rows, _ = reported(folder, "multirun/m")
    masking = Masking((32, 32), patch_size=8, ratio=0.8, strategy="random", model_patch_size=4)
    generator, means = torch.Generator().manual_seed(0), []
    for _ in range(16):
        hidden = masking(generator).repeat_interleave(8, 0).repeat_interleave(8, 1)
        means.append(float(torch.cdist(hidden.nonzero().double(), (~hidden).nonzero().double()).amin(1).mean()))
    assert rows[1]["AvgDist_px"] == pytest.approx(statistics.mean(means))


def test_a_sweep_that_still_runs_is_reported(masks, tmp_path):
    folder, _ = masks
    shutil.copytree(folder / "multirun/m", tmp_path / "multirun/m")
    running = tmp_path / "multirun/m/2"
    job = json.loads((running / "job.json").read_text())
    (running / "job.json").write_text(json.dumps({**job, "state": "running", "seconds": None}))
    shutil.rmtree(tmp_path / "multirun/m/3")
    rows, text = reported(tmp_path, "multirun/m")
    assert rows[2]["state"] == "unfinished" and rows[2]["minutes"] is None
    assert "* 2 of 4 jobs are done, 1 have not begun, job 2 is unfinished at step 1\n" in text


def test_accuracies_after_fine_tuning_rank_the_masks(masks):
    folder, _ = masks
    encoders = ",".join(f"multirun/m/{n}" for n in "012")
    assert type_in(folder, finetune, "-m", "experiment=low_label", *TUNING, f"encoder={encoders}", "name=tuned") == 0
    rows, text = reported(folder, "multirun/m", "finetuned=multirun/tuned")
    with_accuracy = {row["job"]: row["top1"] for row in rows[:3]}
    for n, accuracy in with_accuracy.items():
        log = (folder / f"multirun/tuned/{n}/run.log").read_text()
        assert f"top-1 {accuracy:.1%}" in log.splitlines()[-3]
    best = next(row for row in rows if row["place"] == 1)
    assert best["top1"] == max(with_accuracy.values())
    line, *_ = [line for line in text.splitlines() if line.startswith("* best: ")]  # two runs may be equally good
    python, option, module, *words = shlex.split(line.removeprefix("* best: ").strip("`"))
    assert (python, option, module, words[-1]) == ("python", "-m", "simmim.pretrain", "name=m_best")
    config = compose_config("pretrain", words, output_dir=folder)
    assert str(config["masking"]["patch_size"]) == best["masking.patch_size"]
    assert config["trainer"]["max_steps"] == 1
    # of another recipe, an accuracy is no comparison
    more = ("trainer.max_steps=1", "encoder=multirun/m/0", "name=other")
    assert type_in(folder, finetune, "experiment=low_label", *TUNING, *more) == 0
    rows, text = reported(folder, "multirun/m")
    assert all(row["top1"] is None for row in rows)
    assert "in different ways: their accuracies cannot be compared" in text


def test_learning_rates_are_ranked_on_a_logarithmic_axis(search):
    rows, text = reported(search, "multirun/s")
    assert [row["place"] for row in sorted(rows, key=lambda row: row["val_loss"])] == [1, 2, 3]
    best = min(rows, key=lambda row: row["val_loss"])
    assert f"* best: `python -m simmim.pretrain optimizer.base_lr={best['optimizer.base_lr']} experiment=debug" in text
    assert "AvgDist" not in text
    results = read_results(search / "multirun/s")
    for number, result in enumerate(results):
        result.job.overrides[0] = f"optimizer.base_lr={10.0**-number}"
    loss, share = _panels(results, swept_keys(results))
    assert loss.logarithmic and share.xlabel == "optimizer.base_lr"
    assert {point.x for point in loss.points} == {1.0, 0.1, 0.01}


def test_losses_of_another_kind_have_no_common_place(search):
    results = read_results(search / "multirun/s")
    assert rank(results)
    for result, loss in zip(results, ("l1", "l2", "smooth_l1"), strict=True):
        result.config["objective"]["loss"] = loss
    assert rank(results) == {}
    results[2].config["objective"]["loss"] = "l1"
    assert set(rank(results)) == {0, 2}


def test_seeds_share_a_place_by_their_mean(search):
    """The best single run is of the setting that is worse on the whole."""
    results = read_results(search / "multirun/s")
    for result, (rate, loss) in zip(results, [("1", 0.5), ("1", 0.9), ("2", 0.6)], strict=True):
        result.job.overrides[:] = [f"optimizer.base_lr={rate}", f"seed={loss}"]
        result.loss, result.trivial = loss, 1.0
    assert rank(results) == {0: 2, 1: 2, 2: 1}
    results[2].loss = 0.7
    assert set(rank(results).values()) == {1}  # as good as one another


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["folder=nowhere"], "folder=nowhere holds no job of a sweep"),
        (["folder=multirun/m", "finetuned=nowhere"], "finetuned=nowhere is no folder"),
        (["folder=multirun/m", "finetuned=multirun/m"], "holds no finished run that was fine-tuned"),
    ],
)
def test_what_is_no_sweep_is_one_line(masks, monkeypatch, words, said):
    monkeypatch.chdir(masks[0])
    with pytest.raises(ValueError, match=said):
        report(compose_config("report", words, output_dir=masks[0] / "out"))
