import pytest
import torch

from simmim.run_folder import list_checkpoints
from simmim.training.checkpoint import AtomicCheckpointIO, find_checkpoint


class Planted:
    def __reduce__(self):
        return (print, ("executed",))


def make_run(folder, *steps):
    (folder / "checkpoints").mkdir(parents=True)
    for step in steps:
        (folder / "checkpoints" / f"step_{step}.ckpt").touch()
    return folder


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "step_1.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"weight": torch.ones(2)}, path)

    def half_written(checkpoint, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"weight": torch.zeros(2)}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_1.ckpt"]
    assert torch.equal(io.load_checkpoint(path)["weight"], torch.ones(2))


def test_a_checkpoint_never_runs_code(tmp_path, capsys):
    torch.save({"weight": Planted()}, tmp_path / "bad.ckpt")
    with pytest.raises(Exception, match="weights_only"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "bad.ckpt")
    assert "executed" not in capsys.readouterr().out


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
