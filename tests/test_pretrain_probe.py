"""The probe of a pretraining run: what it counts, when, and that the run is the same without it."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import started
import torch
from PIL import Image

from simmim.checkpoint_files import load
from simmim.config import compose_config
from simmim.data.synthetic import SyntheticSource
from simmim.encoders.weights import load_encoder
from simmim.pretrain import pretrain
from simmim.run_folder import list_checkpoints
from simmim.training import callbacks

RUNS = Path(__file__).parent / "sharded_runs.py"
SHORT = ["trainer.max_epochs=5", "pictures=1", "data.train_images=34", "data.val_images=15", "model.drop_path=0.3"]
PROBED = [*SHORT, "probe_every_n_epochs=2"]
TWO = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true", "data.batch_size=4"]


def run(folder, *overrides):
    return pretrain(compose_config("pretrain", ["experiment=debug", *overrides], output_dir=folder))


def rows(folder, *, without=()):
    """All metrics but the speed."""
    left_out = {"images_per_second", *without}
    with (folder / "metrics.csv").open() as file:
        return [{key: row[key] for key in row if key not in left_out} for row in csv.DictReader(file)]


def probes(folder):
    return {int(row["step"]): float(row["val_knn"]) for row in rows(folder) if row["val_knn"]}


def weights(folder):
    return load(list_checkpoints(folder)[-1])["state_dict"]


def embed(encoder, source):
    """Means of the final maps of whole images, one after the other, and their labels."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    images, labels = zip(*(source.load(index) for index in range(len(source))), strict=True)
    with torch.no_grad():
        maps = [encoder(((image.float() / 255 - mean) / std)[None]) for image in images]
    return torch.stack([m.mean((1, 2))[0] for m in maps]), torch.tensor(labels)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed") / "run"
    run(folder, *PROBED, "checkpoint.every_n_steps=1", "checkpoint.keep=null", "optimizer.base_lr=0.02")
    return folder


def test_every_second_epoch_and_the_end_are_probed(probed):
    assert list(probes(probed)) == [8, 16, 20]
    validated = [int(row["step"]) for row in rows(probed) if row["val_loss"]]
    assert validated == [4, 8, 12, 16, 20]


def test_the_features_are_those_of_the_encoder_on_whole_images(tmp_path, monkeypatch):
    seen, count = [], callbacks.knn_accuracy

    def watched(*arguments, **settings):
        seen.extend(arguments)
        return count(*arguments, **settings)

    monkeypatch.setattr(callbacks, "knn_accuracy", watched)
    run(tmp_path / "run", *PROBED, "trainer.max_steps=2", "optimizer.base_lr=0.02", "optimizer.ema_decay=0.5")
    encoder = load_encoder(tmp_path / "run" / "encoder.safetensors").eval()
    train, labels = embed(encoder, SyntheticSource(34, (32, 32), seed=0))
    test, wanted = embed(encoder, SyntheticSource(15, (32, 32), seed=1))
    for found, expected in zip(seen, (train, labels, test, wanted), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert train.std(dim=0).min() > 1e-3  # images differ
    accuracy = count(train, labels, test, wanted, k=20, temperature=0.07, classes=10)[20]
    assert probes(tmp_path / "run") == {2: pytest.approx(accuracy, abs=1e-5)}


def test_without_the_probe_the_run_is_the_same_to_the_last_bit(probed, tmp_path):
    run(tmp_path / "run", *SHORT, "optimizer.base_lr=0.02")
    assert rows(tmp_path / "run") == rows(probed, without=["val_knn"])
    ours, theirs = weights(tmp_path / "run"), weights(probed)
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_the_random_numbers_stay_where_they_are(tmp_path, monkeypatch):
    states, probe = [], callbacks.Probe.on_validation_epoch_end

    def watched(self, *arguments):
        states.append(torch.get_rng_state())
        probe(self, *arguments)
        states.append(torch.get_rng_state())

    monkeypatch.setattr(callbacks.Probe, "on_validation_epoch_end", watched)
    run(tmp_path / "run", *PROBED, "trainer.max_epochs=1")
    before, after = states
    assert torch.equal(before, after)


@pytest.mark.parametrize("step", [8, 10])
def test_a_resumed_run_is_probed_as_if_it_had_never_stopped(probed, tmp_path, step):
    """From the checkpoint before a probe's validation, and from between two epochs."""
    folder = Path(shutil.copytree(probed, tmp_path / "run"))
    for checkpoint in list_checkpoints(folder):
        if int(checkpoint.stem.removeprefix("step_")) > step:
            checkpoint.unlink()
    run(folder, *PROBED, "checkpoint.every_n_steps=1", "checkpoint.keep=null", "optimizer.base_lr=0.02", "resume=auto")
    assert rows(folder) == rows(probed)
    assert all(torch.equal(value, weights(probed)[key]) for key, value in weights(folder).items())


def test_many_images_are_thinned_out_evenly(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(callbacks, "PROBED", 30)
    asked = []
    take = callbacks.Probe._embed

    def watched(self, samples, *arguments):
        found = take(self, samples, *arguments)
        asked.append((len(found[0]), found[1].tolist() == [samples.source.label(i) for i in range(0, len(samples), 3)]))
        return found

    monkeypatch.setattr(callbacks.Probe, "_embed", watched)
    run(tmp_path / "run", *PROBED, "trainer.max_steps=1", "data.train_images=70", "data.val_images=61")
    assert asked == [(24, True), (21, True)]
    assert "of 21 validation images, by 20 neighbours of 24 training images" in caplog.text


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_count_as_one(together, strategy):
    folder, alone = together
    assert list(probes(folder / strategy)) == [8, 16, 20]
    for step, accuracy in probes(alone).items():
        assert probes(folder / strategy)[step] == pytest.approx(accuracy, abs=1e-5)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Uneven shares: 34 and 15 images for two processes, in batches of 4."""
    folder = tmp_path_factory.mktemp("together")
    exact = [*PROBED, "model.drop_path=0", "optimizer.eps=1e-6", "objective.loss=l2"]
    runs = {strategy: [f"trainer={strategy}", *TWO, *exact] for strategy in ("ddp", "fsdp")}
    started.run_together(RUNS, folder, json.dumps(runs))
    run(folder / "alone", *exact)
    return folder, folder / "alone"


def test_what_cannot_be_probed_is_one_line_before_anything_is_trained(tmp_path):
    for number in range(30):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (number * 8, 0, 90)).save(tmp_path / "photos" / f"{number}.png")
    folder = [*PROBED[:2], "data=folder", f"data.root={tmp_path}/photos", "probe_every_n_epochs=1"]
    with pytest.raises(
        ValueError, match=r"^probe_every_n_epochs=1 needs labels, or give null: data\.root: these images"
    ):
        run(tmp_path / "run", *folder)
    with pytest.raises(
        ValueError, match=r"^probe_every_n_epochs needs 20 training images, and there are 19: give null"
    ):
        run(tmp_path / "run", *PROBED, "data.train_images=19")
    assert not (tmp_path / "run").exists()
