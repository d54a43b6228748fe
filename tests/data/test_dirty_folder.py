"""A run on a folder with real broken files among real photographs."""

import csv
import shutil

import pytest

from simmim.config import compose_config
from simmim.pretrain import pretrain
from simmim.training.callbacks import UnreadableImages

UNREADABLE = {"empty.jpg", "text.jpg", "truncated.jpg"}


@pytest.fixture
def mixed(shared_data, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(shared_data / "dirty", folder)
    for photograph in sorted((shared_data / "imagenet-samples").iterdir())[:30]:
        shutil.copy(photograph, folder)
    return folder


def run(folder, out, *overrides):
    settings = ["experiment=debug", "data=folder", f"data.root={folder}", "data.val_fraction=0.2"]
    return pretrain(compose_config("pretrain", [*settings, *overrides], output_dir=out))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_files_neither_stop_a_run_nor_go_unreported(mixed, tmp_path, num_workers):
    summary = run(mixed, tmp_path / "run", f"data.num_workers={num_workers}")
    assert summary["val_loss"] > 0
    lines = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in lines} == {str(mixed / name) for name in UNREADABLE}
    assert all(line.split("\t")[1] for line in lines)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert all(float(row["train_loss"]) > 0 for row in csv.DictReader(file) if row["train_loss"])


def test_on_request_the_first_bad_file_stops_the_run_by_name(mixed, tmp_path):
    with pytest.raises(ValueError, match=r"mixed/(empty|text|truncated)\.jpg cannot be read"):
        run(mixed, tmp_path / "run", "data.on_error=raise")


def test_more_bad_files_than_allowed_stop_the_run(mixed, tmp_path, monkeypatch):
    monkeypatch.setitem(UnreadableImages.__init__.__kwdefaults__, "check_after", 8)
    with pytest.raises(ValueError, match=r"data\.max_bad_fraction=0\.001"):
        run(mixed, tmp_path / "run", "data.max_bad_fraction=0.001")
