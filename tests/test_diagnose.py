"""The command on real runs and on models as they begin; what it measures: tests/training/test_propagation.py."""

import csv

import pytest
import torch
from PIL import Image

from simmim.config import compose_config
from simmim.data.module import collate
from simmim.diagnose import diagnose
from simmim.finetune import finetune
from simmim.pretrain import build, pretrain
from simmim.training.propagation import measure_blocks

SMALL = ["data.image_size=64", "model.window_size=4", "data.batch_size=2"]
DEBUG = ["experiment=debug", "trainer.max_steps=2", "data.val_images=4", "pictures=1"]


def of(folder, *words):
    small = ["diagnosis=signal", "trainer=cpu", "data.batch_size=4", "data.val_images=4"]
    return diagnose(compose_config("diagnose", [*small, *words], output_dir=folder))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, norm in (("first", "res_post"), ("second", "pre")):
        pretrain(compose_config("pretrain", [*DEBUG, f"model.norm={norm}"], output_dir=folder / name))
    return folder


def test_runs_are_compared_as_they_are_and_as_they_began(tmp_path, runs):
    rows = of(tmp_path, f"encoder=[{runs}/first,{runs}/second]", "initial=true")
    names = ["first, initial", "first", "second, initial", "second"]
    assert list(dict.fromkeys(row["model"] for row in rows)) == names
    with (tmp_path / "signal.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["model"], row["part"]) for row in table] == [(row["model"], row["part"]) for row in rows]
    with Image.open(tmp_path / "signal.png") as picture:
        assert picture.width > 1000
    task, data, _ = build(compose_config("pretrain", DEBUG, output_dir=tmp_path))  # what the first one began with
    task.configure_model()
    batch = collate([data.val_samples[(0, number)] for number in range(4)])
    expected = measure_blocks(task.network.encoder, lambda: task.look(batch)).variance
    found = [row["variance"] for row in rows if row["model"] == "first, initial" and row["variance"] is not None]
    assert found == pytest.approx(expected.tolist(), rel=1e-6)
    task.loss(batch).backward()
    assert sum(row["gradient_norm"] ** 2 for row in rows if row["model"] == "first, initial") == pytest.approx(
        sum(float(p.grad.square().sum()) for p in task.network.parameters() if p.grad is not None), rel=1e-4
    )


def test_models_as_they_begin_have_the_norms_of_their_version(tmp_path):
    rows = of(tmp_path, "models=[swin_t,swinv2_t]", *SMALL, f"out={tmp_path}/there")
    assert (tmp_path / "there.csv").exists() and (tmp_path / "there.png").exists()
    first, second = (
        torch.tensor([r["variance"] for r in rows if r["model"] == name and r["part"].startswith("stage 3")])
        for name in ("swin_t", "swinv2_t")
    )
    assert len(first) == len(second) == 6
    assert first.diff().min() > 0.01  # norms in front: each block adds to the features
    assert second.diff().abs().max() < 1e-5  # behind, at zero: none does


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["diagnosis=noise"], r"diagnosis=noise is unknown: choose one of signal"),
        (["models=[swin_x]"], r"model\.name=swin_x is unknown: choose one of swinv2_t"),
        (["encoder={runs}/first/encoder.safetensors"], r"holds an encoder without its prediction head"),
        (["encoder={runs}/tuned"], r"tuned.* was not pretrained"),
        (["data.image_size=100", "masking.patch_size=20"], r"image size 100x100 px does not fit"),
    ],
)
def test_what_cannot_be_diagnosed_is_one_line(tmp_path, runs, words, said):
    if "tuned" in words[0] and not (runs / "tuned").exists():
        words_of_run = ["experiment=debug", "trainer.max_steps=1", "data.val_images=2"]
        finetune(compose_config("finetune", words_of_run, output_dir=runs / "tuned"))
    with pytest.raises(ValueError, match=said) as error:
        of(tmp_path, *(word.format(runs=runs) for word in words))
    assert "\n" not in str(error.value)
