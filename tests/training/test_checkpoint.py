import pytest
import torch

from simmim.checkpoint_files import save_file
from simmim.run_folder import list_checkpoints
from simmim.training.checkpoint import find_checkpoint, refuse_changed_settings


def make_run(folder, *steps):
    (folder / "checkpoints").mkdir(parents=True)
    for step in steps:
        save_file({"step": step, "weight": torch.ones(100)}, folder / "checkpoints" / f"step_{step}.ckpt")
    return folder


def test_steps_are_ordered_as_numbers(tmp_path):
    run = make_run(tmp_path / "run", 9, 10, 100)
    assert [path.stem for path in list_checkpoints(run)] == ["step_9", "step_10", "step_100"]


def test_what_a_run_continues_from(tmp_path):
    run, fresh = make_run(tmp_path / "run", 5, 20), tmp_path / "fresh"
    newest = run / "checkpoints" / "step_20.ckpt"
    assert find_checkpoint(None, fresh) is None
    assert find_checkpoint("auto", fresh) is None
    assert find_checkpoint("auto", run) == newest
    assert find_checkpoint(str(run), fresh) == newest
    assert find_checkpoint(str(run), run) == find_checkpoint(str(newest), run) == newest
    assert find_checkpoint(str(run / "checkpoints" / "step_5.ckpt"), fresh) == run / "checkpoints" / "step_5.ckpt"


def test_two_runs_are_never_mixed_in_one_folder(tmp_path):
    run, other = make_run(tmp_path / "run", 5, 20), make_run(tmp_path / "other", 30)
    for resume in (run / "checkpoints" / "step_5.ckpt", other):
        with pytest.raises(ValueError, match=r"run already holds checkpoints up to step 20"):
            find_checkpoint(str(resume), run)


def test_a_run_is_never_overwritten(tmp_path):
    with pytest.raises(ValueError, match=r"step 20.*resume=auto continues it, another name="):
        find_checkpoint(None, make_run(tmp_path / "run", 20))


def test_a_place_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist: give a run folder"):
        find_checkpoint(str(tmp_path / "nothing"), tmp_path)


def test_a_checkpoint_older_than_the_position_biases_goes_on_with_its_own(tmp_path):
    path, model = tmp_path / "step_1.ckpt", {"window_size": 4}
    save_file({"hyper_parameters": {"model": model, "seed": 0}}, path)
    refuse_changed_settings(path, {"model": {**model, "position_bias": "log_cpb"}, "seed": 0})
    with pytest.raises(ValueError, match=r"trained with model\.position_bias=log_cpb, now table: keep it"):
        refuse_changed_settings(path, {"model": {**model, "position_bias": "table"}, "seed": 0})
