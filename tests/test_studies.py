import json
import subprocess
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """The module of the studies in `benchmarks/`, at work in a folder of its own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)
    import runs

    return runs


def finished(run):
    run.folder.mkdir(parents=True)
    (run.folder / "command.txt").write_text(f"{run.line}\n")
    (run.folder / "metrics.csv").write_text("step,train_loss,val_top1\n5,0.3,\n10,,0.25\n20,,0.375\n")
    (run.folder / "encoder.safetensors").touch()


def test_what_is_finished_is_not_run_again(runs, monkeypatch):
    run = runs.Run("finetune", "study/a", ("trainer.max_epochs=2",))
    assert run.top1() is None
    finished(run)
    monkeypatch.setattr(subprocess, "Popen", lambda *_: pytest.fail("it was run again"))
    runs.run_all([run], after=lambda: None)
    assert run.top1() == 37.5
    assert run.curve() == [(10, 25.0), (20, 37.5)]


def test_a_run_of_other_settings_is_neither_shown_nor_continued(runs):
    finished(runs.Run("finetune", "study/a", ("trainer.max_epochs=2",)))
    longer = runs.Run("finetune", "study/a", ("trainer.max_epochs=9",))
    assert longer.top1() is None
    with pytest.raises(SystemExit, match="another command"):
        longer.start()


def test_a_command_that_fails_ends_the_study_and_can_be_repeated(runs):
    run = runs.Run("finetune", "study/a", ("no.such.key=1",))
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            run.start()
        assert ended.value.code == 1
    assert not run.finished


def test_an_evaluation_says_its_accuracy(runs):
    run = runs.Run("evaluate", "study/a", ())
    run.folder.mkdir(parents=True)
    (run.folder / "command.txt").write_text(run.line)
    (run.folder / "result.json").write_text(json.dumps({"top1": 0.5}))
    assert run.top1() == 50
    assert "resume" not in run.line  # it has no such key
