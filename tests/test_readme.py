"""The README: the chain of its commands runs at a size that takes seconds, and every other command composes."""

from pathlib import Path

import numpy as np
from documented import blocks, composed, simmim_words, smaller, type_in

from simmim.config import save_config

README = Path(__file__).parents[1] / "README.md"


def commands(block):
    """Those of simmim, each as its name and what it is given."""
    return [simmim_words(words) for words in block.commands if any(word.startswith("simmim.") for word in words)]


def test_the_chain_runs_as_it_stands(tmp_path, capsys):
    """Pretraining, fine-tuning, transfer to 384 px, evaluation and features, each from what the one before has left."""
    text = README.read_text()
    first = text.count("\n", 0, text.index("## Fine-tune, transfer, evaluate, embed"))
    chain = next(block for block in blocks(README) if block.line > first and block.kind == "bash")
    for name, words in commands(chain):
        code, said = type_in(name, [*words, *smaller(name, words)], tmp_path, capsys)
        assert code == 0, said
    assert [name for name, _ in commands(chain)] == [
        "pretrain",
        "finetune",
        "evaluate",
        "evaluate",
        "finetune",
        "embed",
    ]
    assert "windows of 24x24" in (tmp_path / "outputs/finetune/large/run.log").read_text()
    pictures = list((tmp_path / "outputs/pretrain/demo/reconstructions").glob("*.png"))
    features = np.load(tmp_path / "features.npz")["features"]
    assert len(features) == len(pictures) > 0 and features.ndim == 2


def test_every_command_composes(tmp_path, monkeypatch):
    """With its keys, choices and kinds of values: what a renamed setting would leave behind."""
    monkeypatch.chdir(tmp_path)
    measured = tmp_path / "outputs/statistics/scenes/statistics.yaml"  # of the command before
    measured.parent.mkdir(parents=True)
    save_config({"channels": 13, "max_value": 10000, "mean": [0.2] * 13, "std": [0.1] * 13}, measured)
    seen = [name for block in blocks(README) if block.kind == "bash" for name, words in commands(block)
            if composed(name, words)]  # fmt: skip
    assert len(seen) > 20
