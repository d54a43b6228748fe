"""The rules of the house: imports point one way, and importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import simmim
from simmim.settings import SETTINGS

PACKAGE = Path(simmim.__file__).parent
MODULES = {
    ".".join(("simmim", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
COMMANDS = {f"simmim.{name}" for name in SETTINGS}
LEVELS = [
    {"simmim.seeding", "simmim.masking", "simmim.probes", "simmim.processes", "simmim.run_folder", "simmim.targets"},
    {"simmim.checkpoint_files", "simmim.feature_files", "simmim.sweep_folder"},
    {"simmim.pictures", "simmim.encoders"},
    {"simmim.data", "simmim.training"},
    {"simmim.tasks"},
    {"simmim.measuring", "simmim.kinds", "simmim.exporting"},
    {"simmim.settings"},
    {"simmim.config_check"},
    {"simmim.config"},
    {"simmim.errors", "simmim.devices"},
    {"simmim.command"},
    {"simmim.length"},
    {"simmim.cost"},
    {"simmim.plan"},  # a command, which another one may ask for advice
    {"simmim.run", "simmim.stages", "simmim.embedding", "simmim.sweep_results"},
    {"simmim.reconstruct"},  # likewise: it opens a pretraining run
    COMMANDS - {"simmim.plan", "simmim.reconstruct"},
]
HYDRA = {"hydra", "omegaconf"}
KNOW_HYDRA = {"simmim.command", "simmim.config", "simmim.errors"}


def imports_of(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level_of(module):
    for level, names in enumerate(LEVELS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return level
    return None


def test_every_module_has_a_level():
    assert [name for name in MODULES if name != "simmim" and level_of(name) is None] == []


@pytest.mark.parametrize("module", [name for name in MODULES if name != "simmim"])
def test_imports_point_one_way(module):
    own = next(name for name in LEVELS[level_of(module)] if module == name or module.startswith(f"{name}."))
    for imported in imports_of(MODULES[module]):
        if imported.startswith("simmim."):
            same_folder = imported == own or imported.startswith(f"{own}.")
            assert same_folder or level_of(imported) < level_of(module), f"{module} imports {imported}"


@pytest.mark.parametrize("module", [name for name in MODULES if name not in KNOW_HYDRA])
def test_hydra_stops_at_the_commands(module):
    assert HYDRA.isdisjoint(name.split(".")[0] for name in imports_of(MODULES[module]))


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("simmim.encoders")])
def test_encoders_know_nothing_of_lightning(module):
    assert "lightning" not in {name.split(".")[0] for name in imports_of(MODULES[module])}


def test_importing_has_no_effect(tmp_path):
    """Nothing printed, written, seeded, or read from the environment by our modules."""
    code = f"""
import os, torch
import torch.distributed.fsdp, torch.distributed.checkpoint.state_dict_saver
import lightning.pytorch.strategies
import hydra, lightning, matplotlib.figure, torchvision, wandb, tqdm.contrib.logging, lightning.pytorch.loggers
from safetensors.torch import save_file
torch.manual_seed(7)
before = (torch.get_rng_state(), dict(os.environ), torch.get_num_threads())
import importlib
reads, get = [], os._Environ.__getitem__
os._Environ.__getitem__ = lambda self, key: (reads.append(key), get(self, key))[1]
for name in {sorted(MODULES)!r}:
    importlib.import_module(name)
assert not reads, reads
os._Environ.__getitem__ = get
assert torch.equal(before[0], torch.get_rng_state())
assert before[1] == dict(os.environ) and before[2] == torch.get_num_threads()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_no_module_is_called_after_nothing():
    for name in MODULES:
        assert name.split(".")[-1] not in {"utils", "util", "common", "helpers", "base", "misc"}
