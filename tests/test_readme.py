"""The chain of the README, command by command, at a size that takes seconds."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

README = Path(__file__).parents[1] / "README.md"
SMALLER = {
    "pretrain": ["experiment=debug"],
    "finetune": ["trainer=cpu", "data.train_images=8", "data.val_images=4", "data.batch_size=4", "data.num_workers=0"],
    "evaluate": ["trainer=cpu", "data.val_images=4", "data.num_workers=0"],
    "embed": ["trainer=cpu", "data.num_workers=0"],
}


def commands():
    section = README.read_text().split("## Fine-tune, transfer, evaluate, embed")[1]
    [block] = re.findall(r"```bash\n(.+?)```", section, flags=re.DOTALL)[:1]
    return [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]


def test_the_chain_runs_as_it_stands(tmp_path):
    """Pretraining, fine-tuning, transfer to 384 px, evaluation and features, each from what the one before has left."""
    names = []
    for python, option, module, *overrides in commands():
        names.append(module.removeprefix("simmim."))
        assert (python, option) == ("python", "-m")
        done = subprocess.run(
            [sys.executable, "-m", module, *overrides, *SMALLER[names[-1]]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
    assert names == ["pretrain", "finetune", "evaluate", "evaluate", "finetune", "embed"]
    assert "windows of 24x24" in (tmp_path / "outputs/finetune/large/run.log").read_text()
    pictures = list((tmp_path / "outputs/pretrain/demo/reconstructions").glob("*.png"))
    assert np.load(tmp_path / "features.npz")["features"].shape == (len(pictures), 64)
