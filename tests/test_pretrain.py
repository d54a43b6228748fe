"""The command as its users run it, at the size of the debug experiment."""

import csv
import json
import math

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from simmim.config import compose_config
from simmim.encoders.encoder_files import read_encoder_weights
from simmim.encoders.table_resizing import move_table
from simmim.encoders.weights import load_encoder
from simmim.length import run_length
from simmim.pretrain import build, pretrain
from simmim.run_folder import list_checkpoints
from simmim.tasks.pretraining import MaskedImageModel


def run(folder, *overrides):
    return pretrain(compose_config("pretrain", ["experiment=debug", *overrides], output_dir=folder))


def metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def losses(folder):
    return {int(row["step"]): row["train_loss"] for row in metrics(folder) if row["train_loss"]}


def weights(folder):
    checkpoint = torch.load(list_checkpoints(folder)[-1], weights_only=True)
    return checkpoint["state_dict"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(folder, "checkpoint.every_n_steps=3", "checkpoint.keep=null")


def test_a_run_folder_holds_what_the_contract_says(finished):
    folder, summary = finished
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["image_size"] == 32
    assert "${" not in (folder / "config.yaml").read_text()
    assert [p.name for p in list_checkpoints(folder)] == [f"step_{n:07d}.ckpt" for n in (3, 6, 8)]
    assert [p.name for p in sorted((folder / "reconstructions").iterdir())] == ["epoch_0001.png", "epoch_0002.png"]
    assert summary["step"] == 8
    assert summary["ratio"] == pytest.approx(summary["val_loss"] / summary["val_loss_visible_mean"])


def test_metrics_hold_every_step_and_each_validation(finished):
    folder, summary = finished
    rows = metrics(folder)
    assert sorted(losses(folder)) == list(range(1, 9))
    validated = [row for row in rows if row["val_loss"]]
    assert [int(row["step"]) for row in validated] == [4, 8]
    assert float(validated[-1]["val_loss"]) == pytest.approx(summary["val_loss"], rel=1e-4)
    assert all(float(row["lr"]) > 0 and float(row["grad_norm"]) > 0 for row in rows if row["train_loss"])


def test_the_encoder_file_rebuilds_the_encoder_with_nothing_else(finished):
    folder, _ = finished
    encoder = load_encoder(folder / "encoder.safetensors")
    trained = weights(folder)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, trained[f"network.encoder.{name}"])
    with safe_open(folder / "encoder.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["image_size"]) == [32, 32]
        assert json.loads(file.metadata()["mean"]) == [0.485, 0.456, 0.406]
    assert read_encoder_weights(folder)[1] == read_encoder_weights(list_checkpoints(folder)[-1])[1]
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 2, 2, 64)


def test_a_checkpoint_opens_without_unpickling_and_has_plain_settings(finished):
    folder, _ = finished
    checkpoint = torch.load(list_checkpoints(folder)[-1], weights_only=True)
    assert checkpoint["hyper_parameters"]["masking"] == {"strategy": "random", "patch_size": 16, "ratio": 0.6}


def test_the_picture_has_four_panels_a_row(finished):
    folder, _ = finished
    image = Image.open(folder / "reconstructions" / "epoch_0002.png")
    assert image.width / 4 * 0.8 < (image.height - 60) / 4 < image.width / 4 * 1.2


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, tmp_path):
    folder, _ = finished
    run(tmp_path / "again", "checkpoint.every_n_steps=100")
    run(tmp_path / "other", "seed=1")
    assert losses(tmp_path / "again") == losses(folder)
    assert losses(tmp_path / "other") != losses(folder)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_resumed_inside_an_epoch_is_bit_identical(tmp_path, num_workers):
    """The loader, the masks, the crops, stochastic depth, the schedule and AdamW all go on where they stood."""
    settings = (f"data.num_workers={num_workers}", "model.drop_path=0.3", "trainer.accumulate_grad_batches=2",
                "data.batch_size=4", "checkpoint.every_n_steps=3")  # fmt: skip
    run(tmp_path / "whole", *settings)
    run(tmp_path / "broken", *settings, "checkpoint.keep=null")
    for late in list_checkpoints(tmp_path / "broken")[1:]:
        late.unlink()  # as if killed after step 3, in the middle of the first epoch
    (tmp_path / "broken" / "encoder.safetensors").unlink()
    run(tmp_path / "broken", *settings, "resume=auto")
    steps = [int(row["step"]) for row in metrics(tmp_path / "broken") if row["train_loss"]]
    assert steps == list(range(1, 9))  # each once: it went on, and did not begin again
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path, "trainer.max_steps=5", "checkpoint.every_n_steps=2", "checkpoint.keep=2")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_0000004.ckpt", "step_0000005.ckpt"]


def test_gradients_are_clipped_behind_the_logged_norm(finished, tmp_path):
    folder, _ = finished
    run(tmp_path, "optimizer.clip_grad_norm=0.01")
    assert metrics(tmp_path)[0]["grad_norm"] == metrics(folder)[0]["grad_norm"]
    assert losses(tmp_path)[8] != losses(folder)[8]


def test_each_batch_has_its_own_seed_and_each_step_logs_its_own_batches(tmp_path, monkeypatch):
    seeds, values, forward = [], [], MaskedImageModel.forward

    def watched(network, *inputs):
        loss = forward(network, *inputs)
        if network.training:
            seeds.append(torch.initial_seed())
            values.append(loss.item())
        return loss

    monkeypatch.setattr(MaskedImageModel, "forward", watched)
    run(tmp_path, "trainer.max_steps=3", "trainer.accumulate_grad_batches=2")
    assert len(seeds) == len(set(seeds)) == 6
    expected = [(first + second) / 2 for first, second in zip(values[::2], values[1::2], strict=True)]
    assert [float(losses(tmp_path)[step]) for step in (1, 2, 3)] == pytest.approx(expected, rel=1e-5)


def test_a_finished_run_resumed_stays_as_it_is(finished):
    folder, summary = finished
    before = weights(folder)
    again = run(folder, "checkpoint.every_n_steps=3", "checkpoint.keep=null", "resume=auto")
    assert again == pytest.approx(summary, rel=1e-5)
    assert all(torch.equal(before[name], value) for name, value in weights(folder).items())


def test_a_refused_continuation_leaves_the_runs_config(finished):
    folder, _ = finished
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"trainer\.precision=16-mixed"):
        run(folder, "resume=auto", "trainer.precision=16-mixed")
    assert (folder / "config.yaml").read_text() == before


def test_a_run_with_checkpoints_is_never_overwritten(finished):
    folder, _ = finished
    with pytest.raises(ValueError, match=r"step 8.*resume=auto"):
        run(folder)


def test_accumulation_equals_the_larger_batch(tmp_path):
    exact = ("optimizer.eps=1e-6", "objective.loss=l2")  # the gradient of L1 jumps where prediction and pixel meet
    run(tmp_path / "large", "data.batch_size=8", *exact)
    run(tmp_path / "small", "data.batch_size=2", "data.global_batch_size=8", *exact)
    for row, other in zip(metrics(tmp_path / "large"), metrics(tmp_path / "small"), strict=True):
        assert row["step"] == other["step"]
        for key in ("train_loss", "grad_norm", "lr", "val_loss"):
            if row[key]:
                assert float(row[key]) == pytest.approx(float(other[key]), rel=2e-5), key
    large, small = weights(tmp_path / "large"), weights(tmp_path / "small")
    # Where gradients are as small as eps, AdamW makes their rounding errors (1e-9) a thousandth of a step of 1.5e-3.
    assert all(torch.allclose(large[name], small[name], atol=1e-5) for name in large)


def test_validation_does_not_depend_on_the_batch_size(finished, tmp_path):
    folder, _ = finished
    values = set()
    for batch_size, accumulate in ((8, 1), (4, 2), (2, 4)):  # seven images: the last batches differ in size
        sizes = (f"data.batch_size={batch_size}", f"trainer.accumulate_grad_batches={accumulate}", "data.val_images=7")
        summary = run(tmp_path / str(batch_size), *sizes, f"resume={folder}")
        values.add((round(summary["val_loss"], 5), round(summary["val_loss_visible_mean"], 5)))
    assert len(values) == 1


def test_a_finished_run_can_be_made_longer(finished, tmp_path):
    folder, _ = finished
    summary = run(tmp_path / "longer", f"resume={folder}", "trainer.max_epochs=4", "checkpoint.every_n_steps=100")
    assert summary["step"] == 16
    assert sorted(losses(tmp_path / "longer")) == list(range(9, 17))


@pytest.mark.parametrize(
    "overrides", [("data.global_batch_size=12",), ("data.global_batch_size=32", "trainer.accumulate_grad_batches=2")]
)
def test_a_global_batch_is_made_of_whole_batches(tmp_path, overrides):
    with pytest.raises(ValueError, match=r"data\.global_batch_size=.* is not data\.batch_size=8 x 1 devices"):
        run(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ("optimizer.base_lr=1e-9", "optimizer.lr"),
        ("optimizer.weight_decay=0.5", "optimizer.weight_decay"),
        ("data.batch_size=16", "optimizer.lr"),
        ("masking.ratio=0.3", "masking.ratio"),
        ("model.drop_path=0.5", "model.drop_path"),
        ("seed=3", "seed"),
    ],
)
def test_a_resumed_run_keeps_its_settings(finished, tmp_path, change, setting):
    folder, _ = finished
    with pytest.raises(ValueError, match=rf"was trained with {setting}=.*encoder="):
        run(tmp_path, f"resume={folder}", change)


def test_windows_of_an_earlier_stage_are_read_from_its_file_and_handed_on(finished, tmp_path):
    """The position bias goes on counting in the first stage's windows, however many stages follow."""
    folder, _ = finished
    larger = ("data.image_size=64", "model.window_size=8", "trainer.max_steps=1")
    with pytest.raises(ValueError, match=r"windows of 4x4, 4x4, 2x2 tokens.*8x8.*give model\.pretrained_window_size="):
        run(tmp_path / "1", *larger, f"encoder={folder}", "model.pretrained_window_size=8")
    run(tmp_path / "2", *larger, f"encoder={folder}")
    run(tmp_path / "3", *larger, f"encoder={tmp_path / '2'}")
    for stage in "23":
        config = load_encoder(tmp_path / stage).config
        assert (config["window_size"], config["pretrained_window_size"]) == (8, [4, 4, 2])


def test_a_table_of_offsets_moves_with_the_windows(tmp_path):
    run(tmp_path / "1", "model.position_bias=table", "trainer.max_steps=1")
    larger = ("data.image_size=64", "model.window_size=8", "trainer.max_steps=1", "optimizer.base_lr=1e-12")
    run(tmp_path / "2", *larger, "model.position_bias=table", f"encoder={tmp_path}/1")
    key = "stages.2.0.attention.position_bias.table"  # 2 x 2 tokens of the first run, 4 x 4 of the second
    before, after = (load_encoder(tmp_path / name).state_dict()[key] for name in "12")
    expected = move_table(before, (2, 2), (4, 4), window_size=8, resizing="bicubic")
    assert torch.allclose(after, expected, atol=1e-6) and not torch.allclose(after, torch.zeros(()), atol=1e-3)
    with pytest.raises(ValueError, match=r"give model\.position_bias=table$"):
        run(tmp_path / "3", *larger, f"encoder={tmp_path}/1")


def test_a_stage_starts_from_another_runs_encoder(finished, tmp_path):
    folder, _ = finished
    run(
        tmp_path / "next",
        f"encoder={folder}",
        "trainer.max_steps=1",
        "optimizer.base_lr=1e-12",
        "optimizer.weight_decay=0",
    )
    before, after = weights(folder), weights(tmp_path / "next")
    for name in (n for n in before if n.startswith("network.encoder.")):
        assert torch.allclose(before[name], after[name], atol=1e-6), name


def test_the_learning_rate_scales_with_the_global_batch(tmp_path):
    config = compose_config(
        "pretrain",
        ["experiment=debug", "optimizer.base_lr=1e-4", "data.batch_size=16", "trainer.accumulate_grad_batches=128"],
        output_dir=tmp_path,
    )
    task, _, _ = build(config)
    assert task.optimizer["lr"] == pytest.approx(4e-4)


@pytest.mark.parametrize(
    ("overrides", "steps", "warmup"),
    [
        (["trainer.max_epochs=10"], 40, 4),
        (["trainer.max_steps=20"], 20, 10),  # two epochs stretched over 20 steps: the first is the warm-up
        (["trainer.max_epochs=10", "schedule.warmup_steps=7"], 40, 7),
        (["trainer.max_epochs=10", "trainer.accumulate_grad_batches=2"], 20, 2),
    ],
)
def test_the_length_of_a_run_and_of_its_warm_up(tmp_path, overrides, steps, warmup):
    config = compose_config("pretrain", ["experiment=debug", *overrides], output_dir=tmp_path)
    task, _, length = build(config)
    assert length.total_steps == steps
    assert task.schedule["warmup_steps"] == warmup


def test_an_epoch_is_the_images_over_the_global_batch(tmp_path):
    config = compose_config("pretrain", ["experiment=debug"], output_dir=tmp_path)
    assert [run_length(config, images=n).steps_per_epoch for n in (1000, 1003, 1005)] == [125, 125, 126]
    assert run_length(config, images=3).steps_per_epoch == 1


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels_train_and_draw(tmp_path, channels):
    summary = run(tmp_path, f"data.channels={channels}", "data.mean=[0.5]", "data.std=[0.25]", "trainer.max_steps=2")
    assert math.isfinite(summary["val_loss"])
    metadata = read_encoder_weights(tmp_path)[1]
    assert metadata["config"]["in_channels"] == channels
    assert (metadata["mean"], metadata["std"]) == ([0.5] * channels, [0.25] * channels)


def test_images_that_are_not_square(tmp_path):
    config = compose_config("pretrain", ["experiment=debug", "data.image_size=[32,64]"], output_dir=tmp_path)
    _, data, _ = build(config)
    assert data.train_samples[(0, 0)]["image"].shape == data.val_samples[(0, 0)]["image"].shape == (3, 32, 64)
    summary = run(tmp_path, "data.image_size=[32,64]", "trainer.max_steps=2")
    assert math.isfinite(summary["val_loss"])
    with safe_open(tmp_path / "encoder.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["image_size"]) == [32, 64]


@pytest.mark.parametrize(
    "option",
    ["objective.target=normalized", "objective.loss=l2", "objective.loss=smooth_l1", "objective.predict=all",
     "objective.head=mlp", "objective.target_downsampling=4", "masking.strategy=square", "masking.strategy=block",
     "schedule.name=multistep", "model.attention=sdpa", "trainer.precision=bf16-mixed"],
)  # fmt: skip
def test_each_option_of_the_paper_trains(finished, tmp_path, option):
    folder, _ = finished
    summary = run(tmp_path, option, "trainer.max_steps=2")
    assert math.isfinite(summary["val_loss"])
    key, value = option.split("=")
    section, name = key.split(".")
    settings = torch.load(list_checkpoints(tmp_path)[-1], weights_only=True)["hyper_parameters"]
    assert section == "trainer" or str(settings[section][name]) == value
    if section not in ("model", "schedule"):  # these leave the first loss as it is
        assert losses(tmp_path)[1] != losses(folder)[1]
