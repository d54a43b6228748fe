"""Fine-tuning as its users run it, at the size of the debug experiment: alone, in a chain of stages, interrupted."""

import csv
import json
import math
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import started
import torch
import yaml
from PIL import Image
from safetensors import safe_open

import simmim
from simmim.config import compose_config
from simmim.encoders import create_encoder
from simmim.encoders.encoder_files import read_encoder_weights
from simmim.encoders.weights import load_encoder
from simmim.evaluate import evaluate
from simmim.finetune import build, finetune
from simmim.pretrain import pretrain
from simmim.run_folder import list_checkpoints
from simmim.stages import VALIDATED, fill_in
from simmim.tasks.classification import Classification
from simmim.training.checkpoint import Stopped

SIZES = ("data.train_images=32", "data.val_images=7", "data.batch_size=8", "data.num_workers=0", "trainer=cpu",
         "log_every_n_steps=1", "trainer.max_epochs=2", "schedule.warmup_epochs=0.5")  # fmt: skip
LARGER = ("data.image_size=64", "model.window_size=8")
PLAIN = ("augmentation.randaugment=null", "augmentation.color_jitter=0", "augmentation.erasing=0",
         "augmentation.mixup=0", "augmentation.cutmix=0", "label_smoothing=0")  # fmt: skip


def config_of(folder, *overrides):
    return compose_config("finetune", [*SIZES, *overrides], output_dir=folder)


def run(folder, *overrides):
    return finetune(config_of(folder, *overrides))


def scratch(folder, *overrides):
    """From no encoder at all."""
    settings = ["experiment=debug", "data.val_images=7", "log_every_n_steps=1", "schedule.warmup_epochs=0.5"]
    return finetune(compose_config("finetune", [*settings, *overrides], output_dir=folder))


def rows(folder):
    """All metrics but the speed, as they are written."""
    with (folder / "metrics.csv").open() as file:
        return [{key: row[key] for key in row if key != "images_per_second"} for row in csv.DictReader(file)]


def state(folder):
    return torch.load(list_checkpoints(folder)[-1], weights_only=True)["state_dict"]


def photos(root, counts, size=40):
    """Folders of one colour each."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            colour = tuple((60 * label + 13 * number + 80 * channel) % 256 for channel in range(3))
            Image.new("RGB", (size, size), colour).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    pretrain(compose_config("pretrain", ["experiment=debug", "trainer.max_steps=2", "data.mean=[0.4, 0.5, 0.6]",
                                         "data.std=[0.2, 0.21, 0.22]"], output_dir=folder))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pretrained):
    folder = tmp_path_factory.mktemp("finetuned")
    return folder, run(folder, f"encoder={pretrained}", "optimizer.ema_decay=0.9", "optimizer.base_lr=1e-1")


def test_a_run_folder_holds_what_the_contract_says(finished):
    folder, summary = finished
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["image_size"] == [32, 32]  # as it was resolved
    assert config["model"]["embed_dim"] == 16
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints", "classes.csv", "config.yaml", "confusion.png", "encoder.safetensors", "metrics.csv"
    ]  # fmt: skip
    assert [path.name for path in list_checkpoints(folder)] == ["step_0000004.ckpt", "step_0000008.ckpt"]
    assert summary.keys() == {"step", "val_loss", "val_top1", "val_top5"}
    assert summary["step"] == 8
    trained = [row for row in rows(folder) if row["train_loss"]]
    assert [int(row["step"]) for row in trained] == list(range(1, 9))
    validated = [row for row in rows(folder) if row["val_loss"]]
    assert [int(row["step"]) for row in validated] == [4, 8]
    for key in ("val_loss", "val_top1", "val_top5"):
        assert float(validated[-1][key]) == pytest.approx(summary[key], rel=1e-4)


def test_the_report_of_the_classes_adds_up(finished):
    folder, summary = finished
    with (folder / "classes.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["class"] for row in table] == read_encoder_weights(folder)[1]["classes"]
    assert sum(int(row["images"]) for row in table) == 7
    hits = sum(int(row["images"]) * float(row["top1"]) for row in table if row["top1"])
    assert hits / 7 == pytest.approx(summary["val_top1"], abs=1e-3)
    assert all(bool(row["top1"]) == (row["images"] != "0") for row in table)
    assert Image.open(folder / "confusion.png").size > (300, 300)


def test_the_encoder_file_holds_the_average_its_head_and_how_to_see(finished, pretrained):
    folder, _ = finished
    with safe_open(folder / "encoder.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["mean"]) == [0.4, 0.5, 0.6]  # of the pretraining, and not ImageNet's
    assert json.loads(metadata["std"]) == [0.2, 0.21, 0.22]
    assert json.loads(metadata["image_size"]) == [32, 32]
    weights, known = read_encoder_weights(folder)
    assert len(known["classes"]) == 6
    trained = state(folder)
    for key, value in [*weights.items()]:
        assert torch.equal(value, trained[f"average.encoder.{key}"])
    for key, value in known["head"].items():
        assert torch.equal(value, trained[f"average.head.{key}"])
        assert not torch.equal(value, trained[f"network.head.{key}"])
    encoder = load_encoder(folder)
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 2, 2, 64)


def test_a_checkpoint_says_what_the_file_says(finished):
    """The average of encoder and classifier alike, and all that is known of them."""
    folder, _ = finished
    weights, known = read_encoder_weights(folder)
    others, also = read_encoder_weights(list_checkpoints(folder)[-1])
    assert all(torch.equal(weights[key], others[key]) for key in weights | others)
    heads = known.pop("head"), also.pop("head")
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in ("weight", "bias"))
    assert known == also


def test_evaluation_alone_gives_what_the_run_ended_with(finished, tmp_path):
    folder, summary = finished
    for name, source in (("file", folder), ("checkpoint", list_checkpoints(folder)[-1])):
        alone = run(tmp_path / name, f"encoder={source}", "trainer.max_epochs=0")
        assert alone.pop("step") == 0
        assert alone == pytest.approx({key: summary[key] for key in alone}, rel=1e-5)
        assert not list_checkpoints(tmp_path / name)
        assert read_encoder_weights(tmp_path / name)[1]["classes"]


def test_evaluation_alone_needs_a_classifier(pretrained, finished, tmp_path):
    with pytest.raises(ValueError, match=r"^trainer\.max_epochs=0 evaluates alone: give an encoder=… with a class"):
        run(tmp_path / "1", f"encoder={pretrained}", "trainer.max_epochs=0")
    with pytest.raises(ValueError, match=r"^trainer\.max_epochs=0 evaluates alone"):
        scratch(tmp_path / "2", "trainer.max_epochs=0")
    folder, _ = finished
    averaged = ("optimizer.ema_decay=0.9", "optimizer.base_lr=1e-1")
    with pytest.raises(ValueError, match=r"^trainer\.max_epochs=0 .*resume=.* continues a training: give resume=null"):
        run(tmp_path / "3", f"encoder={folder}", f"resume={folder}", "trainer.max_epochs=0", *averaged)
    with pytest.raises(ValueError, match=r"^trainer\.max_epochs=0 evaluates alone, and trainer\.max_steps=3 trains"):
        run(tmp_path / "4", f"encoder={folder}", "trainer.max_epochs=0", "trainer.max_steps=3")


def test_a_finetuned_encoder_can_be_pretrained_further(finished, tmp_path, caplog):
    folder, _ = finished
    caplog.set_level("INFO")
    overrides = ["experiment=debug", f"encoder={folder}", "trainer.max_steps=1"]
    summary = pretrain(compose_config("pretrain", overrides, output_dir=tmp_path))
    assert math.isfinite(summary["val_loss"])
    assert "Loaded all" in caplog.text
    assert read_encoder_weights(tmp_path)[1]["head"] is None


def test_from_pretraining_to_a_larger_image_and_window(finished, tmp_path, caplog):
    """Every stage takes its architecture, windows, statistics and classifier from the one before it."""
    folder, _ = finished
    caplog.set_level("INFO")
    run(tmp_path / "larger", f"encoder={folder}", *LARGER, "trainer.max_steps=2")
    assert "trained at 32x32 px with windows of 4x4, 4x4, 2x2 tokens" in caplog.text
    assert "The classifier of 6 classes was kept: they are the same." in caplog.text
    assert "images     64x64 px, windows of 8x8, 8x8, 4x4 tokens" in caplog.text
    run(tmp_path / "largest", f"encoder={tmp_path / 'larger'}", "data.image_size=128", "model.window_size=16",
        "trainer.max_steps=1")  # fmt: skip
    for name, window, size in (("larger", 8, 64), ("largest", 16, 128)):
        known = read_encoder_weights(tmp_path / name)[1]
        config = known["config"]
        assert (config["window_size"], config["pretrained_window_size"]) == (window, [4, 4, 2])  # the first stage's
        assert (config["embed_dim"], config["depths"], config["num_heads"]) == (16, [1, 2, 1], [1, 2, 2])
        assert (known["image_size"], known["mean"]) == ([size, size], [0.4, 0.5, 0.6])
    words = [f"encoder={tmp_path / 'largest'}", "data.val_images=7", "data.num_workers=0", "trainer=cpu"]
    result = evaluate(compose_config("evaluate", words, output_dir=tmp_path / "evaluated"))
    assert result["images"] == 7
    assert json.loads((tmp_path / "evaluated" / "result.json").read_text())["windows"] == [[16, 16], [16, 16], [8, 8]]


def test_the_classifier_is_handed_on_as_it_was(finished, tmp_path):
    """To the network and to its average, which go their own ways from there."""
    folder, _ = finished
    run(tmp_path, f"encoder={folder}", "optimizer.base_lr=1e-12", "optimizer.weight_decay=0", "trainer.max_steps=1",
        "optimizer.ema_decay=0.9")  # fmt: skip
    before, after = read_encoder_weights(folder), state(tmp_path)
    for name in ("network", "average"):
        assert all(torch.allclose(value, after[f"{name}.encoder.{key}"], atol=1e-6) for key, value in before[0].items())
        head = before[1]["head"].items()
        assert all(torch.allclose(value, after[f"{name}.head.{key}"], atol=1e-6) for key, value in head)


def test_an_average_of_a_kept_classifier_is_not_the_classifier(finished, tmp_path):
    folder, _ = finished
    run(tmp_path, f"encoder={folder}", "optimizer.base_lr=1e-1", "trainer.max_steps=2", "optimizer.ema_decay=0.9")
    after = state(tmp_path)
    assert not torch.equal(after["network.head.weight"], after["average.head.weight"])


def test_other_classes_start_a_new_classifier(finished, tmp_path, caplog):
    folder, _ = finished
    caplog.set_level("INFO")
    root = photos(tmp_path / "photos", {"red": 8, "green": 8, "blue": 8})
    data = ("data=folder", f"data.root={root}", "data.val_fraction=0.3", "data.train_images=9", "data.val_images=9")
    overrides = [word for word in SIZES if "_images" not in word]
    config = compose_config("finetune", [*overrides, *data[:3], f"encoder={folder}", "trainer.max_steps=2"],
                            output_dir=tmp_path / "run")  # fmt: skip
    finetune(config)
    assert "The classifier of 3 classes (blue, green, red) starts anew: the file's is of 6 others" in caplog.text
    assert read_encoder_weights(tmp_path / "run")[1]["classes"] == ["blue", "green", "red"]


EXACT = ("model.drop_path=0.3", "optimizer.ema_decay=0.9", "trainer.accumulate_grad_batches=2", "data.batch_size=4")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with all that draws random numbers, which nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    scratch(folder, *EXACT, "checkpoint.every_n_steps=3", "checkpoint.keep=null")
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_resumed_inside_an_epoch_is_bit_identical(tmp_path, whole, num_workers):
    settings = (*EXACT, "checkpoint.every_n_steps=3", "checkpoint.keep=null", f"data.num_workers={num_workers}")
    scratch(tmp_path, *settings)
    for late in list_checkpoints(tmp_path)[1:]:
        late.unlink()
    (tmp_path / "encoder.safetensors").unlink()
    scratch(tmp_path, *settings, "resume=auto")
    assert rows(tmp_path) == rows(whole)
    ours, theirs = state(tmp_path), state(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)


def test_a_run_that_is_asked_to_stop_goes_on_as_if_it_never_was(tmp_path, whole, monkeypatch):
    settings = (*EXACT, "checkpoint.every_n_steps=100", "checkpoint.keep=null")
    step = Classification.training_step

    def interrupted(task, batch, index):
        if index == 10:  # the first half of the sixth step
            os.kill(os.getpid(), signal.SIGTERM)
        return step(task, batch, index)

    monkeypatch.setattr(Classification, "training_step", interrupted)
    with pytest.raises(Stopped, match=r"^stopped at step 6 of 8, saved: the same command with .*resume=auto continues"):
        scratch(tmp_path, *settings)
    monkeypatch.undo()
    assert not (tmp_path / "encoder.safetensors").exists()
    scratch(tmp_path, *settings, "resume=auto")
    assert rows(tmp_path) == rows(whole)
    ours, theirs = state(tmp_path), state(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)


def test_a_run_that_is_killed_goes_on_as_if_it_never_was(tmp_path):
    """A real process."""
    settings = ("experiment=debug", "data.val_images=7", "schedule.warmup_epochs=0.5", *EXACT, "trainer.max_epochs=12",
                "checkpoint.every_n_steps=2", "name=mine")  # fmt: skip
    folder = tmp_path / "outputs" / "finetune" / "mine"
    process = started.start("-m", "simmim.finetune", *settings, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not ((folder / "metrics.csv").exists() and len(rows(folder)) > 6) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, output
    finetune(compose_config("finetune", [*settings, "resume=auto"], output_dir=folder))
    finetune(compose_config("finetune", [*settings], output_dir=tmp_path / "whole"))
    assert len(rows(folder)) == 48 + 12
    assert rows(folder) == rows(tmp_path / "whole")
    ours, theirs = state(folder), state(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)


def test_a_resumed_run_keeps_its_settings(finished, pretrained, tmp_path):
    folder, _ = finished
    same = (f"encoder={pretrained}", "optimizer.ema_decay=0.9", "optimizer.base_lr=1e-1", f"resume={folder}")
    for change, said in (("label_smoothing=0.2", "label_smoothing"), ("augmentation.mixup=0", "mixing.mixup"),
                         ("optimizer.layer_decay=0.5", "optimizer.layer_decay")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"was trained with {said}=.*encoder="):
            run(tmp_path, *same, change)


def test_what_the_config_says_goes_before_what_the_encoder_says(pretrained, tmp_path):
    known = read_encoder_weights(pretrained)[1]
    config = fill_in(
        config_of(
            tmp_path, f"encoder={pretrained}", "data.mean=[0.1,0.2,0.3]", "model.window_size=2", "model.drop_path=0.25"
        ),
        known,
    )
    assert config["data"]["mean"] == [0.1, 0.2, 0.3]
    assert config["data"]["std"] == [0.2, 0.21, 0.22]
    assert (config["model"]["window_size"], config["model"]["drop_path"]) == (2, 0.25)
    assert config["model"]["pretrained_window_size"] == [4, 4, 2]


def test_from_scratch_needs_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"^encoder=null trains from scratch, and then model=… says what: model=swin"):
        run(tmp_path)
    with pytest.raises(ValueError, match=r"^model\.window_size=null, and encoder=null has none: model=… says all"):
        run(tmp_path, "model.name=swinv2_t")
    config = fill_in(config_of(tmp_path, "model=swinv2_t"), None)
    assert (config["data"]["image_size"], config["data"]["channels"], config["model"]["window_size"]) == (192, 3, 12)
    assert config["data"]["mean"] == [0.485, 0.456, 0.406]


def test_a_model_of_the_published_name_is_not_one_of_the_files_size(pretrained, tmp_path):
    with pytest.raises(ValueError, match=r"does not fit the model: it holds embed_dim=16 \(model: 96\)"):
        run(tmp_path, f"encoder={pretrained}", "model=swinv2_t", "data.image_size=32", "model.window_size=4")


def test_a_window_that_does_not_divide_is_refused(pretrained, tmp_path):
    with pytest.raises(ValueError, match=r"(?=.*window_size)(?=.*data\.image_size)"):
        run(tmp_path, f"encoder={pretrained}", "data.image_size=64", "model.window_size=5")


def folders(tmp_path, **counts):
    overrides = [word for word in SIZES if "_images" not in word]
    root = photos(tmp_path / "train", counts)
    return [*overrides, "experiment=debug", "data=folder", f"data.root={root}", "trainer.max_steps=1"]


@pytest.mark.parametrize("case", ["labels missing", "one class", "empty folder", "unknown class", "no labels there"])
def test_images_that_no_classifier_can_learn_from(tmp_path, case):
    counts = {"labels missing": {"a": 3, "b": 3}, "one class": {"a": 4}, "empty folder": {"a": 2, "b": 2, "c": 0}}
    words = folders(tmp_path, **counts.get(case, {"a": 3, "b": 3}))
    if case == "labels missing":
        Image.new("RGB", (4, 4)).save(tmp_path / "train" / "astray.png")
    if case in ("unknown class", "no labels there"):
        val = photos(tmp_path / "val", {"a": 1, "wig": 1} if case == "unknown class" else {"": 2})
        words.append(f"data.val_root={val}")
    message = {
        "labels missing": r"^data\.root: these images have no labels",
        "one class": r"^data\.root: there is one class only \(a\)",
        "empty folder": r"^data\.root=.*: the class c has no image",
        "unknown class": r"^data\.val_root has the class wig, which is none of the 2 classes known",
        "no labels there": r"^data\.val_root: these images have no labels",
    }[case]
    with pytest.raises(ValueError, match=message) as error:
        finetune(compose_config("finetune", words, output_dir=tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


NAMES = ["$x_$", "100 %", "a,b", "naïve", os.fsdecode(b"caf\xe9"), 'quoted "name"', "x" * 60]


def test_classes_of_any_name(tmp_path):
    """Formulas, commas, and letters that are none."""
    words = folders(tmp_path, **dict.fromkeys(NAMES, 3))
    val = ["data.val_root=" + str(tmp_path / "train")]
    summary = finetune(compose_config("finetune", [*words, *val], output_dir=tmp_path / "run"))
    with (tmp_path / "run" / "classes.csv").open(errors="surrogateescape") as file:
        assert sorted(row["class"] for row in csv.DictReader(file)) == sorted(NAMES)
    assert (tmp_path / "run" / "confusion.png").exists()
    for source in (tmp_path / "run", list_checkpoints(tmp_path / "run")[-1]):
        assert sorted(read_encoder_weights(source)[1]["classes"]) == sorted(NAMES)
    again = finetune(
        compose_config(
            "finetune",
            [*words[:-1], *val, "trainer.max_epochs=0", f"encoder={tmp_path / 'run'}"],
            output_dir=tmp_path / "again",
        )
    )
    assert again["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-5)


def test_a_part_of_the_labels(tmp_path):
    config = compose_config("finetune", [*folders(tmp_path, a=20, b=40), "data.label_fraction=0.1",
                                         f"data.val_root={tmp_path / 'train'}"], output_dir=tmp_path)  # fmt: skip
    _, data, length = build(fill_in(config, None))
    source = data.train_samples.source
    assert Counter(source.label(index) for index in range(len(source))) == {0: 2, 1: 4}
    assert (len(data.val_samples), length.steps_per_epoch) == (60, 1)  # validation keeps all


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(tmp_path, channels):
    colours = () if channels == 1 else ("augmentation.randaugment=null", "augmentation.color_jitter=0")
    settings = (f"data.channels={channels}", "data.mean=0.5", "data.std=0.25", "trainer.max_steps=2", *colours)
    scratch(tmp_path / "1", *settings)
    known = read_encoder_weights(tmp_path / "1")[1]
    assert (known["config"]["in_channels"], known["mean"], known["std"]) == (
        channels,
        [0.5] * channels,
        [0.25] * channels,
    )
    summary = run(tmp_path / "2", f"encoder={tmp_path / '1'}", *colours, "trainer.max_steps=1")  # nothing said again
    assert math.isfinite(summary["val_loss"])
    assert read_encoder_weights(tmp_path / "2")[1]["mean"] == [0.5] * channels


def test_it_learns_real_photographs(tmp_path, shared_data):
    """Hats, shoes and shirts of the clothing set, at 64 px: better than guessing after some steps."""
    root = tmp_path / "train"
    for name in ("hat", "pants", "shoes"):
        (root / name).mkdir(parents=True)
        for path in sorted((shared_data / "clothing" / "train" / name).iterdir())[:24]:
            (root / name / path.name).symlink_to(path)
    words = ["experiment=debug", "data=folder", f"data.root={root}", f"data.val_root={root}", "data.batch_size=24",
             "data.image_size=64", "model.window_size=8", "model.embed_dim=32", "data.crop_scale=[0.7,1]",
             "trainer.max_epochs=12", "optimizer.base_lr=6e-2", "optimizer.layer_decay=1", *PLAIN]  # fmt: skip
    summary = finetune(compose_config("finetune", words, output_dir=tmp_path / "run"))
    assert summary["val_top1"] > 0.5  # a third by guessing
    assert summary["val_loss"] < 0.95  # ln 3 = 1.10


TWO = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true", "data.batch_size=4"]
# Mixing pairs the images of a process, and its numbers are drawn anew in each; rounding is amplified by a small eps.
STEADY = ["data.val_images=7", "schedule.warmup_epochs=0.5", "optimizer.eps=1e-6",
          "optimizer.ema_decay=0.9", *PLAIN[:-1], "model.drop_path=0"]  # fmt: skip


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steady")
    finetune(compose_config("finetune", ["experiment=debug", *STEADY], output_dir=folder))
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory, finished):
    """Runs of two processes."""
    folder = tmp_path_factory.mktemp("together")
    runs = {
        "fsdp": [*STEADY, "trainer=fsdp", *TWO],
        "ddp": [*STEADY, "trainer=ddp", *TWO],
        "kept": ["data.val_images=7", "trainer=fsdp", *TWO, f"encoder={finished[0]}",
                 "optimizer.base_lr=1e-12", "optimizer.weight_decay=0", "trainer.max_steps=1"],
    }  # fmt: skip
    started.run_together(Path(__file__).parent / "sharded_runs.py", folder, json.dumps(runs), "finetune")
    return folder


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_two_processes_train_as_one(together, steady, strategy):
    ours, theirs = rows(together / strategy), rows(steady)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        for key in ("train_loss", "val_loss", "val_top1", "val_top5"):
            assert bool(row[key]) == bool(other[key])
            if row[key]:
                assert float(row[key]) == pytest.approx(float(other[key]), abs=1e-5), (key, row["step"])
    (weights, known), (others, also) = read_encoder_weights(together / strategy), read_encoder_weights(steady)
    assert all(torch.allclose(weights[key], others[key], atol=5e-5) for key in weights | others)
    assert torch.allclose(known["head"]["weight"], also["head"]["weight"], atol=5e-5)
    assert known["classes"] == also["classes"]
    assert (together / strategy / "classes.csv").read_text() == (steady / "classes.csv").read_text()
    saved = read_encoder_weights(list_checkpoints(together / strategy)[-1])[1]
    assert torch.equal(saved["head"]["weight"], known["head"]["weight"])


def test_each_process_holds_about_half(together):
    shares = [json.loads((together / f"fsdp.{rank}.json").read_text())["parameters"] for rank in (0, 1)]
    assert shares == pytest.approx([0.5, 0.5], abs=0.03)


def test_a_classifier_is_kept_by_two_processes(together, finished):
    """A file of one process into a sharded network."""
    (weights, known), (others, also) = read_encoder_weights(together / "kept"), read_encoder_weights(finished[0])
    assert all(torch.allclose(weights[key], others[key], atol=1e-6) for key in weights | others)
    assert all(torch.allclose(known["head"][key], also["head"][key], atol=1e-6) for key in known["head"])


# Typed from the released configurations. lr at the batch that it is given for; size: image and window.
STAGES = {
    "finetune_192": {"lr": 5e-3, "batch": 2048, "epochs": 100, "warmup": 20, "decay": 0.05, "layers": 0.75, "drop": 0.1,
                     "size": (192, 12)},
    "finetune_224": {"lr": 5e-3, "batch": 2048, "epochs": 100, "warmup": 20, "decay": 0.05, "layers": 0.75, "drop": 0.1,
                     "size": (224, 14)},
    "finetune_256": {"lr": 5e-3, "batch": 2048, "epochs": 100, "warmup": 20, "decay": 0.05, "layers": 0.75, "drop": 0.1,
                     "size": (256, 16)},
    "supervised_192": {"epochs": 30, "decay": 0.1, "layers": 0.87, "drop": 0.3, "size": (192, 12), "clip": 100},
    "transfer_384": {"lr": 4e-5, "batch": 1024, "epochs": 30, "decay": 1e-8, "layers": 1.0, "drop": 0.2,
                     "size": (384, 24)},
    "transfer_512": {"lr": 4e-5, "batch": 1024, "epochs": 30, "decay": 1e-8, "layers": 1.0, "drop": 0.2,
                     "size": (512, 32)},
    "transfer_640": {"lr": 4e-5, "batch": 1024, "epochs": 30, "decay": 1e-8, "layers": 1.0, "drop": 0.2,
                     "size": (640, 40)},
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_stages_hold_the_published_numbers(stage):
    published = STAGES[stage]
    config = compose_config("finetune", [f"stage={stage}"], output_dir=Path("unused"))
    found = {
        "lr": config["optimizer"]["base_lr"] * published.get("batch", 0) / 512,
        "batch": published.get("batch"),
        "epochs": config["trainer"]["max_epochs"],
        "warmup": config["schedule"]["warmup_epochs"],
        "decay": config["optimizer"]["weight_decay"],
        "layers": config["optimizer"]["layer_decay"],
        "drop": config["model"]["drop_path"],
        "size": (config["data"]["image_size"], config["model"]["window_size"]),
        "clip": config["optimizer"]["clip_grad_norm"],
    }
    for key in published:
        assert found[key] == pytest.approx(published[key]), key
    assert config["optimizer"]["betas"] == [0.9, 0.999]
    assert (config["optimizer"]["eps"], config["schedule"]["name"]) == (1e-8, "cosine")
    assert config["augmentation"] == {
        "randaugment": 9, "color_jitter": 0.4, "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0, "switch": 0.5
    }  # fmt: skip
    assert (config["label_smoothing"], config["data"]["interpolation"] or VALIDATED["interpolation"]) == (
        0.1,
        "bicubic",
    )
    assert "clip" in published or config["optimizer"]["clip_grad_norm"] == 5


def test_every_stage_of_finetuning_is_in_the_table():
    stages = {path.stem for path in (Path(simmim.__file__).parents[1] / "conf" / "stage").glob("*.yaml")}
    assert stages - {"pretrain_192"} == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_follows_a_pretraining_at_192_pixels(stage, tmp_path, pretrained):
    """SwinV2-T on the meta device: the windows divide, and the bias counts in the windows of the pretraining."""
    with torch.device("meta"):
        encoder = create_encoder("swinv2_t", window_size=12)
    known = {"origin": "simmim", "architecture": "swinv2", "config": encoder.config, "image_size": [192, 192],
             "windows": encoder.windows(192, 192), "mean": None,
             "std": None, "head": None, "classes": None}  # fmt: skip
    words = [f"stage={stage}", "encoder=run", "data.train_images=64", "data.val_images=2", "trainer=cpu"]
    config = fill_in(compose_config("finetune", words, output_dir=tmp_path), known)
    task, _, _ = build(config)
    assert task.network.encoder.config["pretrained_window_size"] == [12, 12, 12, 6]
    side, window = STAGES[stage]["size"]
    expected = [min(window, side // stride) for stride in (4, 8, 16, 32)]
    assert task.network.encoder.windows(side, side) == [(side, side) for side in expected]
