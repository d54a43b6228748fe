"""Checkpoints on disk: whole or absent, checked, and read without running code."""

import errno
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from simmim.checkpoint_files import METADATA, REST, damage, load, load_rest, load_shards, save_file, save_folder


class Planted:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "step_1.ckpt"
    save_file({"weight": torch.ones(2)}, path)

    def half_written(checkpoint, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="No space left"):
        save_file({"weight": torch.zeros(2)}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_1.ckpt"]
    assert torch.equal(load(path)["weight"], torch.ones(2))


def test_a_file_never_runs_code(tmp_path, capsys):
    torch.save({"weight": Planted()}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="holds more than tensors and plain values"):
        load(tmp_path / "bad.ckpt")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("change", ["cut", "flip", "empty"])
def test_damage_is_found(tmp_path, change):
    path = tmp_path / "step_1.ckpt"
    save_file({"weight": torch.randn(10_000)}, path)
    assert damage(path) == ""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[: len(content) // 2], "flip": content, "empty": b""}[change])
    assert damage(path)


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def tree(mesh):
    weight = torch.arange(12.0).view(4, 3)
    return {
        "state_dict": {"network.weight": distribute_tensor(weight, mesh, [Shard(0)])},
        "optimizer_states": [
            {"state": {0: {"step": torch.tensor(5.0), "exp_avg": distribute_tensor(weight / 2, mesh)}}}
        ],
        "global_step": 5,
        "betas": (0.9, 0.999),
    }


def test_a_folder_gives_back_the_tree(tmp_path, tree):
    path = tmp_path / "step_5.ckpt"
    save_folder(tree, path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_5.ckpt"]
    whole = load(path)
    assert torch.equal(whole["state_dict"]["network.weight"], torch.arange(12.0).view(4, 3))
    state = whole["optimizer_states"][0]["state"][0]
    assert torch.equal(state["exp_avg"], torch.arange(12.0).view(4, 3) / 2) and state["step"] == 5
    assert (whole["global_step"], whole["betas"]) == (5, [0.9, 0.999])
    assert load_rest(path)["state_dict"] == {"network.weight": None}
    assert load(path, keep="/optimizer")["state_dict"] == {"network.weight": None}


@pytest.mark.parametrize("sharded", [True, False])
def test_sharded_tensors_are_overwritten_in_place(tmp_path, tree, mesh, sharded):
    path = tmp_path / "step_5.ckpt"
    save_folder(tree, path) if sharded else save_file(
        {"state_dict": {"network.weight": torch.arange(12.0).view(4, 3)}}, path
    )
    own = distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)])
    read = load_shards(path, lambda key: own if key == "/state_dict/network.weight" else torch.empty_like(own))
    assert read["state_dict"]["network.weight"] is own
    assert torch.equal(own.full_tensor(), torch.arange(12.0).view(4, 3))


@pytest.mark.parametrize("file", [METADATA, REST, "__0_0.distcp"])
def test_damage_of_any_file_of_a_folder_is_found(tmp_path, tree, file):
    path = tmp_path / "step_5.ckpt"
    save_folder(tree, path)
    assert damage(path) == ""
    content = bytearray((path / file).read_bytes())
    content[content.index(b"network.weight") if file == REST else len(content) // 2] ^= 1  # its padding is not checked
    (path / file).write_bytes(content)
    assert damage(path)
    (path / file).unlink()
    assert damage(path)


@pytest.mark.parametrize("file", [METADATA, REST])
def test_a_folder_never_runs_code(tmp_path, tree, capsys, file):
    path = tmp_path / "step_5.ckpt"
    save_folder(tree, path)
    (path / file).write_bytes(pickle.dumps(Planted()))
    like = tree["state_dict"]["network.weight"]
    for read in (load, load_rest, lambda path: load_shards(path, lambda key: torch.empty_like(like))):
        with pytest.raises(ValueError, match="holds more than tensors and plain values"):
            read(path)
    assert damage(path)
    assert "executed" not in capsys.readouterr().out


def test_an_object_among_the_tensors_never_runs_code(tmp_path, tree, capsys):
    """torch.distributed.checkpoint unpickles whatever is no tensor."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    path = tmp_path / "step_5.ckpt"
    save_folder(tree, path)
    rest = (path / REST).read_bytes()
    save({"/global_step": Planted()}, storage_writer=FileSystemWriter(path))
    (path / REST).write_bytes(rest)
    with pytest.raises(ValueError, match="an object among the tensors"):
        load_shards(path, lambda key: torch.zeros(1))
    load(path)  # takes tensors alone
    assert "executed" not in capsys.readouterr().out


def test_a_folder_does_not_point_outside(tmp_path, tree):
    path = tmp_path / "step_5.ckpt"
    save_folder(tree, path)
    planted = (path / METADATA).read_bytes().replace(b"__0_0.distcp", b"../../secret")
    (path / METADATA).write_bytes(planted)
    with pytest.raises(ValueError, match="points outside of the folder"):
        load(path)
