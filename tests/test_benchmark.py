"""The benchmark command: every part writes its table."""

import csv
from pathlib import Path

import pytest
import started

from simmim.benchmark import PARTS, benchmark
from simmim.config import compose_config

TINY = [
    "model=swinv2",
    "model.embed_dim=24",
    "model.depths=[1,1,1]",
    "model.num_heads=[1,2,4]",
    "model.extra_norm_every=0",
    "model.window_size=4",
    "model.patch_size=8",
    "data.image_size=64",
    "data.batch_size=2",
    "rounds=2",
    "warmup=1",
    "seconds=1",
    "image_sizes=[64]",
    "windows=[2,4]",
    "loader_workers=[0,1]",
    "trainer=cpu",
]
ROWS = {"memory": 1, "attention": 6, "data": 3, "optimizer": 3}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("part", sorted(PARTS.keys() - {"step"}))
def test_every_part_leaves_its_table(part: str, tmp_path: Path) -> None:
    config = compose_config("benchmark", [f"benchmark={part}", "peers=[timm]", *TINY], output_dir=tmp_path / "run")
    rows = benchmark(config)
    assert len(rows) == len(rows_of(tmp_path / "run" / "benchmark.csv")) == ROWS[part]
    assert_page((tmp_path / "run" / "benchmark.md").read_text(), rows=ROWS[part])


def assert_page(page: str, *, rows: int) -> None:
    assert page.count("\n|") == rows + 2
    for word in ("command: `python -m simmim.benchmark", "torch ", "device: CPU", "date: 20"):
        assert word in page


def test_step_compares_with_the_best_peer(tmp_path: Path) -> None:
    overrides = ["peers=[timm,transformers]", f"save={tmp_path}/kept", *TINY, "data.batch_size=16"]
    ours, *peers = benchmark(compose_config("benchmark", overrides, output_dir=tmp_path / "run"))
    assert [ours["network"], *(peer["network"] for peer in peers)] == ["simmim", "timm", "transformers"]
    best = max(peer["images_per_s"] for peer in peers)
    assert ours["speed_to_best_peer"] == pytest.approx(ours["images_per_s"] / best)
    assert ours["slowest"] <= ours["images_per_s"] <= ours["fastest"]
    assert ours["memory_to_best_peer"] == pytest.approx(ours["step_MB"] / min(peer["step_MB"] for peer in peers))
    assert 0 < ours["share_of_matrix_rate"] < 1
    kept = rows_of(tmp_path / "kept.csv")
    assert [float(row["images_per_s"]) for row in kept] == [row["images_per_s"] for row in (ours, *peers)]
    page = (tmp_path / "kept.md").read_text()
    assert_page(page, rows=3)
    assert "batch 16, fp32, eager, training step" in page


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("benchmark=all", "benchmark=all is unknown: choose one of step, memory, attention, data, optimizer"),
        ("work=training,forward", None),
        ("peers=[lightly]", "peers=lightly is unknown: choose from timm, transformers, torchvision"),
        ("rounds=0", "rounds=0 must be a whole number, positive"),
    ],
)
def test_a_sweep_and_errors_of_one_line(override: str, words: str | None, tmp_path: Path) -> None:
    sweep = ["--multirun"] if words is None else []
    command = ["-m", "simmim.benchmark", *sweep, "benchmark=optimizer", *TINY]
    command += [override] if not override.startswith("peers") else ["benchmark=step", override]
    done = started.run(*command, cwd=tmp_path)
    if words is None:
        assert done.returncode == 0, done.stderr
        assert len(list(tmp_path.glob("multirun/*/*/*/benchmark.csv"))) == 2
    else:
        assert done.returncode == 1
        assert words in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr
