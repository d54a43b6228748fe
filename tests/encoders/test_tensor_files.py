"""Files are told apart by their content, and whatever could run code or is damaged is refused in one line."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from simmim.encoders.tensor_files import is_safetensors, read_json, read_pytorch, read_safetensors

STATE = {"a.weight": torch.arange(12.0).view(3, 4), "a.bias": torch.ones(2000)}


@pytest.mark.parametrize("name", ["weights.pth", "weights.bin", "weights.safetensors", "weights"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files_of_any_name_and_age(name: str, zipped: bool, tmp_path: Path) -> None:
    torch.save({"model": STATE, "epoch": 3}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert not is_safetensors(tmp_path / name)
    tree = read_pytorch(tmp_path / name)
    assert tree["epoch"] == 3
    assert all(torch.equal(tree["model"][key], value) for key, value in STATE.items())


@pytest.mark.parametrize("name", ["weights.pth", "weights"])
def test_safetensors_of_any_name(name: str, tmp_path: Path) -> None:
    save_file(STATE, tmp_path / name, {"by": "us"})
    assert is_safetensors(tmp_path / name)
    state, metadata = read_safetensors(tmp_path / name)
    assert metadata == {"by": "us"}
    assert all(torch.equal(state[key], value) for key, value in STATE.items())


class Planted:
    """Unpickling it would leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def planted(path: Path) -> None:
    torch.save({"model": STATE, "config": Planted(path.with_name("ran"))}, path)


def planted_long_ago(path: Path) -> None:
    tree = {"model": STATE, "config": Planted(path.with_name("ran"))}
    torch.save(tree, path, _use_new_zipfile_serialization=False)


def cut(path: Path) -> None:
    torch.save({"model": STATE}, path)
    path.write_bytes(path.read_bytes()[:-500])


def cut_long_ago(path: Path) -> None:
    torch.save({"model": STATE}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-500])


def cut_early(path: Path) -> None:
    torch.save({"model": STATE}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:100])


def a_page(path: Path) -> None:
    path.write_text("<html>not found</html>")


def empty(path: Path) -> None:
    path.touch()


class Program(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def a_program(path: Path) -> None:
    torch.jit.script(Program()).save(str(path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (planted, "needs posix.mkdir to be unpickled, which could run any code.*weights_only=False"),
        (planted_long_ago, "needs posix.mkdir to be unpickled, which could run any code"),
        (cut, "it was cut short"),
        (cut_long_ago, "it was cut short"),
        (cut_early, "it was cut short"),
        (a_page, "is no file of weights"),
        (empty, "is no file of weights"),
        (a_program, "is no file of weights"),
    ],
)
def test_what_cannot_be_read_safely_is_refused(make: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    make(path)
    with pytest.raises(ValueError, match=reason) as caught:
        read_pytorch(path)
    assert str(caught.value).startswith(f"encoder={path}") and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_the_way_out_of_a_refusal_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that it names writes a file that can be read."""
    planted(tmp_path / "weights_of_others.pth")
    with pytest.raises(ValueError, match="python -c") as caught:
        read_pytorch(tmp_path / "weights_of_others.pth")
    code = str(caught.value).split('python -c "')[1].split('"')[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "ran").exists()  # so it does run
    assert read_pytorch(tmp_path / "weights.pth").keys() == STATE.keys()


def test_cut_safetensors_are_refused(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "weights")
    (tmp_path / "weights").write_bytes((tmp_path / "weights").read_bytes()[:-500])
    with pytest.raises(ValueError, match="perhaps it was cut short"):
        read_safetensors(tmp_path / "weights")


def test_json_that_is_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "config.json") == {}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        read_json(tmp_path / "config.json")
