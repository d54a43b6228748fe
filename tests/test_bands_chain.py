"""Images of 1, 2, 4 and 13 bands through every command, at debug size, from their statistics to their features."""

import json
import re
import shutil

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image

from simmim.config import compose_config
from simmim.data.module import create_sources, fixed_batch
from simmim.embed import embed
from simmim.encoders.encoder_files import read_encoder_weights
from simmim.encoders.weights import load_encoder
from simmim.evaluate import evaluate
from simmim.finetune import finetune
from simmim.pictures import GREY, choose_channels, stretch
from simmim.pretrain import build, pretrain
from simmim.reconstruct import load_images, load_pretraining, reconstruct
from simmim.run_folder import list_checkpoints
from simmim.statistics import statistics

SMALL = ["data.num_workers=0", "data.batch_size=4", "trainer=cpu"]
MAX_VALUE = {"uint16": 10000, "float32": 1, "uint8": 255}


def scene(path, channels, kind, size=48):
    """A photograph as so many bands: its colours, and what is made of them, each in another range."""
    rgb = np.asarray(Image.open(path).convert("RGB").resize((size, size)), dtype=np.float64) / 255
    red, green, blue = np.moveaxis(rgb, -1, 0)
    derived = [red, green, blue, 0.2 * red + 0.1, (green - blue) / (green + blue + 0.1), red * green, np.sqrt(blue)]
    bands = np.stack([derived[n % len(derived)] * (1 + n) / 20 for n in range(channels)])
    if kind == "float32":
        return bands.astype(np.float32)
    high = {"uint16": 9000, "uint8": 255}[kind]
    return np.round(bands.clip(0, 1) * high).astype(kind)


@pytest.fixture(scope="module")
def scenes(shared_data, tmp_path_factory):
    """A function of channels and kind of number that gives a folder of two classes."""
    photographs = sorted((shared_data / "imagenet-samples").iterdir())[:12]

    def make(channels, kind):
        root = tmp_path_factory.mktemp(f"scenes{channels}")
        for number, path in enumerate(photographs):
            folder = root / ("land" if number % 2 else "sea")
            folder.mkdir(exist_ok=True)
            pixels = scene(path, channels, kind)
            if kind == "float32":
                np.save(folder / f"{number:02d}.npy", pixels)
            else:
                tifffile.imwrite(folder / f"{number:02d}.tif", pixels, photometric="minisblack", compression="zlib")
        return root

    return make


def config_of(command, out, *overrides):
    return compose_config(command, [*overrides], output_dir=out)


def measured(root, out, channels, kind):
    settings = (f"data.channels={channels}", f"data.max_value={MAX_VALUE[kind]}", "data.num_workers=0")
    return statistics(config_of("statistics", out, "data=folder", f"data.root={root}", *settings))


@pytest.fixture(scope="module")
def first_stage(scenes, tmp_path_factory):
    """A function of channels and kind: gives images, a run pretrained on them, and the statistics that it took up."""
    stages = {}

    def make(channels, kind):
        if (channels, kind) not in stages:
            root, folder = scenes(channels, kind), tmp_path_factory.mktemp("run")
            found = measured(root, folder / "measured", channels, kind)
            debug = ["experiment=debug", "data=folder", f"data.root={root}", "data.val_fraction=0.3", *SMALL]
            words = [f"data.statistics={folder / 'measured'}", "trainer.max_steps=1", "picture_channels=[0]"]
            pretrain(config_of("pretrain", folder, *debug, *words))
            stages[channels, kind] = root, folder, found
        return stages[channels, kind]

    return make


def facts_of(found):
    return {key: found[key] for key in ("mean", "std", "max_value")}


@pytest.mark.parametrize(("channels", "kind"), [(13, "uint16"), (4, "float32"), (2, "uint8"), (1, "uint16")])
def test_statistics_are_kept_up_to_the_features(first_stage, tmp_path, channels, kind, caplog):
    root, run, found = first_stage(channels, kind)
    assert (found["channels"], found["max_value"]) == (channels, MAX_VALUE[kind])
    saved = yaml.safe_load((run / "config.yaml").read_text())["data"]
    assert {key: saved[key] for key in facts_of(found)} == facts_of(found)
    assert saved["channels"] == channels
    assert len(list((run / "reconstructions").iterdir())) == 1
    for path in (run, list_checkpoints(run)[-1]):
        _, metadata = read_encoder_weights(path)
        assert {key: metadata[key] for key in facts_of(found)} == facts_of(found)
        assert metadata["config"]["in_channels"] == channels
    out = embed(
        config_of(
            "embed",
            tmp_path,
            f"encoder={run}",
            f"images={root}",
            "data.test_crop=1",
            "data.interpolation=bilinear",
            "trainer=cpu",
        )
    )
    names, images = load_images(root, load_pretraining(run), 12)
    assert images.dtype == (torch.uint8 if kind == "uint8" else torch.float32)
    mean, std = (torch.tensor(found[key]).view(-1, 1, 1) for key in ("mean", "std"))
    expected = load_encoder(run).eval()((images.float() / MAX_VALUE[kind] - mean) / std).mean((1, 2))
    assert np.allclose(np.load(out)["features"], expected.detach().numpy()[np.argsort(names)], atol=1e-4)
    assert "cannot be read" not in caplog.text


@pytest.mark.parametrize(("channels", "kind"), [(13, "uint16"), (2, "uint8")])
def test_fine_tuning_and_evaluation_inherit(first_stage, tmp_path, channels, kind):
    root, run, found = first_stage(channels, kind)
    labelled = ["data=folder", f"data.root={root}", "data.num_workers=0", "trainer=cpu"]
    words = [f"data.val_root={root}", "augmentation.randaugment=null", "augmentation.color_jitter=0",
             "augmentation.erasing=1", "trainer.max_steps=1", "data.batch_size=12"]  # fmt: skip
    summary = finetune(config_of("finetune", tmp_path / "t", f"encoder={run}", *labelled, *words))
    metadata = read_encoder_weights(tmp_path / "t")[1]
    assert {key: metadata[key] for key in facts_of(found)} == facts_of(found)
    again = evaluate(config_of("evaluate", tmp_path / "e", f"encoder={tmp_path / 't'}", *labelled))
    assert again["loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    probe = [f"data.val_root={root}", "probe=knn", "knn.k=[2]"]
    assert evaluate(config_of("evaluate", tmp_path / "p", f"encoder={run}", *labelled, *probe))["images"] == 12


def test_a_resumed_run_of_bands_is_bit_identical(scenes, tmp_path):
    root = scenes(5, "float32")
    measured(root, tmp_path / "measured", 5, "float32")
    settings = ["experiment=debug", "data=folder", f"data.root={root}", *SMALL, "checkpoint.every_n_steps=2",
                f"data.statistics={tmp_path}/measured/statistics.yaml", "trainer.max_steps=4"]  # fmt: skip

    def losses(folder):
        lines = (folder / "metrics.csv").read_text().splitlines()
        column = lines[0].split(",").index("train_loss")
        return [line.split(",")[column] for line in lines[1:] if line.split(",")[column]]

    pretrain(config_of("pretrain", tmp_path / "whole", *settings, "checkpoint.keep=null"))
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    assert [path.stem for path in list_checkpoints(tmp_path / "broken")] == ["step_0000002", "step_0000004"]
    list_checkpoints(tmp_path / "broken")[-1].unlink()  # as if killed after step 2
    pretrain(config_of("pretrain", tmp_path / "broken", *settings, "checkpoint.keep=null", "resume=auto"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert len(losses(tmp_path / "whole")) == 4
    text = (tmp_path / "measured" / "statistics.yaml").read_text()
    (tmp_path / "measured" / "statistics.yaml").write_text(text.replace("max_value: 1\n", "max_value: 2\n"))
    with pytest.raises(ValueError, match=r"was trained with max_value=1, now 2"):
        pretrain(config_of("pretrain", tmp_path / "broken", *settings, "checkpoint.keep=null", "resume=auto"))


def test_precision_reaches_the_network(scenes, tmp_path):
    """Two images that 8 bits could not tell apart differ where the encoder sees them, by what they differ."""
    for name, low in (("a", 1000), ("b", 1001)):
        np.save(tmp_path / f"{name}.npy", np.full((2, 40, 40), low, np.uint16))
    overrides = ["experiment=debug", "data=folder", f"data.root={tmp_path}", "data.val_fraction=0.5", *SMALL,
                 "data.channels=2", "data.max_value=65535", "data.mean=0", "data.std=1"]  # fmt: skip
    task, data, _ = build(config_of("pretrain", tmp_path / "run", *overrides))
    batches = [fixed_batch(samples, 1)["image"] for samples in (data.train_samples, data.val_samples)]
    seen = sorted(float(task.normalize(images).mean()) for images in batches)
    assert [value * 65535 for value in seen] == pytest.approx([1000, 1001], abs=1e-3)


def test_statistics_and_what_a_person_says_may_not_differ(scenes, tmp_path):
    root = scenes(4, "float32")
    found = measured(root, tmp_path / "measured", 4, "float32")
    given = ["data=folder", f"data.root={root}", f"data.statistics={tmp_path / 'measured'}"]
    data = config_of("pretrain", tmp_path, *given, "data.channels=4")["data"]
    assert (data["mean"], data["std"]) == (found["mean"], found["std"])
    for override, words in (
        ("data.channels=3", r"^data\.channels=3 contradicts data\.statistics=.*measured, which has 4"),
        ("data.max_value=255", r"^data\.max_value=255 contradicts"),
        ("data.mean=0.5", r"^data\.mean=0\.5 contradicts"),
    ):
        with pytest.raises(ValueError, match=words):
            config_of("pretrain", tmp_path, *given, override)
    zero = "{mean: 1, std: 0.0, channels: 3, max_value: 255}"
    bad = {
        "": "KeyError",
        "- 1": "TypeError",
        "mean: [1]": "KeyError",
        "a: [": "ParserError",
        zero: "data.std=0.0 must",
    }
    for content, words in bad.items():
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ValueError, match=rf"^data\.statistics={tmp_path}/bad\.yaml.*{words}"):
            config_of("pretrain", tmp_path, *given[:2], f"data.statistics={tmp_path}/bad.yaml")
    with pytest.raises(
        ValueError, match=r"^data\.statistics=nowhere: there is no nowhere: python -m simmim\.statistics"
    ):
        config_of("pretrain", tmp_path, *given[:2], "data.statistics=nowhere")


def test_what_suits_8_bit_colours_alone_is_refused_for_others(scenes, tmp_path):
    root = scenes(1, "uint16")
    words = ["data=folder", f"data.root={root}", "data.max_value=10000", "data.channels=1", "data.mean=0", "data.std=1"]
    scratch = [*words, "encoder=null", "model=swinv2_mini", "data.image_size=32", "model.window_size=4", *SMALL]
    with pytest.raises(
        ValueError, match=r"^data\.max_value=10000: colours .* give augmentation\.randaugment=null augm"
    ):
        finetune(config_of("finetune", tmp_path, *scratch))
    with pytest.raises(ValueError, match=r"^data\.max_value=10000: synthetic images have 8 bits"):
        create_sources(
            {"source": "synthetic", "channels": 3, "max_value": 10000, "train_images": 1, "val_images": 1}, (8, 8)
        )
    with pytest.raises(ValueError, match=r"^picture_channels=\[1\]: data\.channels=1 are numbered from 0 to 0"):
        build(config_of("pretrain", tmp_path, "experiment=debug", *words, *SMALL, "picture_channels=[1]"))
    with pytest.raises(ValueError, match=r"in a row cannot be read, .*1 band, and data\.channels=3"):
        pretrain(config_of("pretrain", tmp_path, "experiment=debug", *words, *SMALL, "data.channels=3"))


def test_a_stretch_goes_by_the_percentiles_of_the_original():
    torch.manual_seed(0)
    images, others = torch.randn(2, 3, 40, 50) * 300, torch.randn(2, 3, 40, 50) * 300
    low, high = (
        np.percentile(images.numpy(), share, axis=(2, 3), method="nearest", keepdims=True) for share in (2, 98)
    )
    expected = np.clip((others.numpy() - low) / (high - low), 0, 1)
    assert np.allclose(stretch(others, images).numpy(), expected, atol=1e-6)
    assert torch.equal(stretch(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4)), torch.zeros(1, 1, 4, 4))
    assert [choose_channels(count, None) for count in (1, 2, 3, 13)] == [[0], [0], [0, 1, 2], [0, 1, 2]]


def test_pictures_show_chosen_channels_stretched(first_stage, tmp_path, monkeypatch):
    root, run, _ = first_stage(13, "uint16")
    drawn = {}
    monkeypatch.setattr("simmim.reconstruct.draw_panels", lambda panels, *_, caption: drawn.update({caption: panels}))
    for channels in ("null", "[9,4,0]", "[12]"):
        words = [f"encoder={run}", f"images={root}", "count=3", f"picture_channels={channels}"]
        reconstruct(config_of("reconstruct", tmp_path, *words))
    task = load_pretraining(run)
    _, images = load_images(root, task, 3)
    for (caption, panels), shown in zip(drawn.items(), ([0, 1, 2], [9, 4, 0], [12]), strict=True):
        said = ", ".join(map(str, shown))
        assert f"channels {said}, each from percentile 2 to 98 of the original" in caption
        assert panels.shape == (3, 4, len(shown), 32, 32)
        assert torch.allclose(panels[:, 0], stretch(images[:, shown], images[:, shown]), atol=1e-5)
        spread = panels[:, 0].flatten(2)
        assert (spread.amax(2) == 1).all() and (spread.amin(2) == 0).all()
        hidden = panels[:, 1] == GREY
        assert torch.equal(panels[:, 3][~hidden], panels[:, 0][~hidden])  # the same stretch in all panels
        assert torch.equal(panels[:, 3][hidden], panels[:, 2][hidden])
    with pytest.raises(ValueError, match=r"^picture_channels=\[13\]: data\.channels=13 are numbered from 0 to 12"):
        reconstruct(config_of("reconstruct", tmp_path, f"encoder={run}", f"images={root}", "picture_channels=[13]"))


def test_an_older_checkpoint_is_of_8_bit_images(first_stage, tmp_path):
    _, run, _ = first_stage(13, "uint16")
    checkpoint = torch.load(list_checkpoints(run)[-1], weights_only=True)
    del checkpoint["hyper_parameters"]["max_value"]
    torch.save(checkpoint, tmp_path / "step_0000001.ckpt")
    assert load_pretraining(tmp_path / "step_0000001.ckpt").max_value == 255


def test_the_result_file_is_what_was_returned_and_its_words_can_be_copied(scenes, tmp_path, caplog):
    caplog.set_level("INFO")
    root = scenes(4, "float32")
    (root / "sea" / "broken.npy").write_bytes(b"no array")
    found = measured(root, tmp_path, 4, "float32")
    assert yaml.safe_load((tmp_path / "statistics.yaml").read_text()) == found
    assert (found["images"], found["unreadable"], found["pixels"]) == (12, 1, 12 * 48 * 48)
    assert "broken.npy\tnot an image" in (tmp_path / "bad_images.txt").read_text()
    words = re.search(r"data\.mean=\[.*\] data\.std=\[.*\]", caplog.text)[0].split(" ")
    data = config_of("pretrain", tmp_path, *words, "data.channels=4")["data"]
    assert data["mean"] == pytest.approx(found["mean"], rel=1e-5)
    assert data["std"] == pytest.approx(found["std"], rel=1e-5)
    assert json.dumps(found)
