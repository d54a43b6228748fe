"""Probes of frozen encoders: what is learnt from, what is told, and that every number can be had another way."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.config import compose_config
from simmim.data.folder import FolderSource
from simmim.data.labels import take_fraction
from simmim.data.transforms import centre_transform
from simmim.encoders import create_encoder
from simmim.encoders.encoder_files import read_encoder_weights, save_encoder
from simmim.encoders.weights import load_encoder
from simmim.evaluate import evaluate
from simmim.finetune import finetune
from simmim.probes import linear_probe

MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]
COLOURS = {"amber": (200, 150, 40), "blue": (40, 60, 200), "crimson": (200, 30, 60)}


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    """Random weights, norms and biases included."""
    encoder = create_encoder(
        "swinv2", window_size=8, embed_dim=16, depths=[1, 1], num_heads=[2, 4], extra_norm_every=0, patch_size=2
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    file = tmp_path_factory.mktemp("run") / "encoder.safetensors"
    save_encoder(encoder, file, image_size=(16, 16), mean=MEAN, std=STD)
    return file


def paint(root, classes, each, *, seed, noise):
    """Images of one colour a class and noise of its own."""
    random = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(each):
            pixels = np.array(COLOURS[name]) + noise * random.standard_normal((20 + index % 5, 24, 3))
            pixels = pixels + 2 * noise * random.standard_normal(3)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{index:03d}.png")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Training and test images, of colours that run into one another; the test has no amber."""
    root = tmp_path_factory.mktemp("photos")
    train = paint(root / "train", COLOURS, 20, seed=0, noise=60)
    return train, paint(root / "val", ["blue", "crimson"], 15, seed=1, noise=60)


def run(encoder, photos, folder, *overrides):
    roots = [f"data.{key}={root}" for key, root in zip(("root", "val_root"), photos, strict=True) if root]
    config = [f"encoder={encoder}", "data=folder", *roots, "trainer=cpu", "data.num_workers=0", *overrides]
    found = evaluate(compose_config("evaluate", config, output_dir=folder))
    written = json.loads((folder / "result.json").read_text())
    assert json.loads(json.dumps(found)).items() <= written.items()
    return written


def features(encoder_file, source, *, share=0.875):
    """Means of the final maps, image by image, by the encoder alone."""
    encoder = load_encoder(encoder_file).eval()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    crop = centre_transform((16, 16), share=share, interpolation="bicubic")
    found = []
    for index in range(len(source)):
        with torch.no_grad():
            found.append(encoder(((crop(source.load(index)[0]).float() / 255 - mean) / std)[None]).mean((1, 2))[0])
    return torch.stack(found).double().numpy()


def neighbours(train, labels, test, wanted, *, k, temperature):
    """Votes of the nearest by cosine, as a loop."""
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    hits = 0
    for feature, label in zip(test, wanted, strict=True):
        similarity = train @ feature
        votes = np.zeros(3)
        for index in np.argsort(-similarity)[:k]:
            votes[labels[index]] += math.exp(similarity[index] / temperature)
        hits += int(votes.argmax() == label)
    return hits / len(test)


def test_nearest_neighbours_are_those_of_the_encoder_alone(encoder_file, photos, tmp_path, caplog):
    caplog.set_level("INFO")
    settings = ["probe=knn", "knn.k=[1,9,60]", "knn.temperature=0.1", "data.batch_size=7", "data.test_crop=0.7"]
    result = run(encoder_file, photos, tmp_path, *settings)
    train, test = map(FolderSource, photos)
    x, y = features(encoder_file, train, share=0.7), [train.label(index) for index in range(60)]
    names = [test.classes[test.label(index)] for index in range(30)]
    wanted = [train.classes.index(name) for name in names]
    assert set(wanted) == {1, 2}  # by name, where the test's own numbers are 0 and 1
    tests = features(encoder_file, test, share=0.7)
    expected = {str(k): neighbours(x, y, tests, wanted, k=k, temperature=0.1) for k in (1, 9, 60)}
    assert result["knn"] == pytest.approx(expected)
    assert 1 / 3 < expected["9"] < 1
    assert (result["train_images"], result["images"], result["classes"]) == (60, 30, 3)
    assert (result["encoder"], result["image_size"], result["windows"]) == (
        str(encoder_file),
        [16, 16],
        [[8, 8], [4, 4]],
    )
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    shares = np.linalg.svd(x, compute_uv=False) / np.linalg.svd(x, compute_uv=False).sum()
    assert result["features"] == pytest.approx(
        {"channels": 32, "std": unit.std(axis=0).mean(), "even_std": 1 / math.sqrt(32),
         "effective_rank": math.exp(-(shares * np.log(shares)).sum())}, rel=1e-3
    )  # fmt: skip
    assert f"kNN        top-1 {expected['9']:.2%} by 9 neighbours" in caplog.messages
    assert "2 of the 3 classes, matched by name" in caplog.text
    assert f"effective rank {result['features']['effective_rank']:.1f} of 32" in caplog.text
    assert caplog.messages[-1].startswith("done: ") and caplog.messages[-1].endswith("/result.json")


def test_a_linear_probe_learns_what_colours_tell(encoder_file, tmp_path):
    photos = [paint(tmp_path / part, COLOURS, 15, seed=seed, noise=5) for seed, part in enumerate(("train", "val"))]
    result = run(encoder_file, photos, tmp_path / "run", "probe=linear", "linear.batch_size=16")
    assert result["top1"] == 1
    assert len(result["heads"]) == 10


def test_a_linear_probe_reports_the_head_that_the_held_out_images_choose(encoder_file, photos, tmp_path, caplog):
    caplog.set_level("INFO")
    settings = ["probe=linear", "linear.lrs=[1e-6,0.01,100]", "linear.epochs=20", "linear.batch_size=16", "seed=3"]
    result = run(encoder_file, photos, tmp_path, *settings)
    chosen = max(result["heads"], key=lambda head: head["held_out_top1"])  # of equals the first
    assert result["best"] == {key: chosen[key] for key in ("optimizer", "lr")}
    assert result["top1"] == chosen["top1"]
    assert len({head["top1"] for head in result["heads"]}) > 2
    train, test = map(FolderSource, photos)
    x, tests = (torch.from_numpy(features(encoder_file, source)) for source in (train, test))
    y = torch.tensor([train.label(index) for index in range(60)])
    wanted = torch.tensor([train.classes.index(test.classes[test.label(index)]) for index in range(30)])
    settings = {"classes": 3, "lrs": [1e-6, 0.01, 100], "optimizers": ["adamw", "sgd"], "epochs": 20, "batch_size": 16}
    again = linear_probe(x, y, tests, wanted, **settings, seed=3).accuracies
    for head in result["heads"]:
        assert head["top1"] == pytest.approx(again[head["optimizer"], head["lr"]], abs=0.07)  # two images: float64
        words = f"top-1 {head['top1']:.2%} by {head['optimizer']} with lr {head['lr']:g}"
        assert any(words in line for line in caplog.messages)
    assert f"linear     top-1 {result['top1']:.2%} by {chosen['optimizer']}" in caplog.text


def test_only_a_share_of_the_labels_may_be_learnt_from(encoder_file, photos, tmp_path):
    result = run(encoder_file, photos, tmp_path, "probe=knn", "knn.k=[3]", "data.label_fraction=0.2")
    train, test = map(FolderSource, photos)
    few = take_fraction(train, 0.2)
    x, y = features(encoder_file, few), [few.label(index) for index in range(len(few))]
    wanted = [train.classes.index(test.classes[test.label(index)]) for index in range(len(test))]
    assert result["train_images"] == len(few) == 12
    assert result["knn"]["3"] == neighbours(x, y, features(encoder_file, test), wanted, k=3, temperature=0.07)


def test_without_test_images_a_part_is_set_aside(encoder_file, photos, tmp_path):
    result = run(encoder_file, (photos[0], None), tmp_path, "probe=knn", "knn.k=[1]", "data.val_fraction=0.25")
    assert result["train_images"] + result["images"] == 60
    assert 5 < result["images"] < 25


def test_what_cannot_be_read_is_left_out_and_listed(encoder_file, photos, tmp_path):
    roots = [tmp_path / root.name for root in photos]
    for root, copy in zip(photos, roots, strict=True):
        for path in root.rglob("*.png"):
            (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
            (copy / path.parent.name / path.name).hardlink_to(path)
        (copy / "blue" / "000.jpg").write_bytes(b"")
    settings = ["probe=knn", "knn.k=[5]"]
    result = run(encoder_file, roots, tmp_path / "run", *settings, "data.max_bad_fraction=0.1")
    whole = run(encoder_file, photos, tmp_path / "whole", *settings)
    assert {**result, "encoder": ""} == {**whole, "encoder": ""}
    lines = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert lines == [f"{root}/blue/000.jpg\tempty file" for root in roots]
    assert not (tmp_path / "whole" / "bad_images.txt").exists()
    with pytest.raises(ValueError, match=r"train/blue/000\.jpg cannot be read \(empty file\).*data\.on_error=skip"):
        run(encoder_file, roots, tmp_path / "strict", *settings, "data.on_error=raise")
    with pytest.raises(ValueError, match=r"^1 of 61 images could not be read, more than data\.max_bad_fraction=0\.01"):
        run(encoder_file, roots, tmp_path / "limit", *settings)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("probe=svm", r"^probe=svm is unknown: choose knn or linear$"),
        ("probe=finetune", r"^probe=finetune is a run of its own.*: python -m simmim\.finetune experiment=low_label "),
        ("knn.k=[20,61]", r"^knn\.k=61 neighbours of 60 training images: give fewer, or more images$"),
        ("knn.k=[]", r"^knn\.k=\[\] must hold something$"),
        ("knn.k=[0]", r"^knn\.k=\[0\] must be a list"),
        ("linear.optimizers=[lars]", r"^linear\.optimizers=lars is unknown: choose adamw or sgd$"),
        ("linear.lrs=[]", r"^linear\.lrs=\[\] must hold something$"),
        ("data.on_error=ignore", r"^data\.on_error=ignore is unknown: choose skip or raise$"),
        ("data.image_size=30", r"^image size 30x30 px does not fit .*data\.image_size that do are 30 -> 16 or 32"),
        ("data.mean=[0.5,0.5]", r"^data\.mean=\[0\.5, 0\.5\] has 2 values for data\.channels=3"),
        ("data.root={train}/blue", r"^data\.root: these images have no labels"),
        ("data.val_root={train}/blue", r"^data\.val_root: these images have no labels"),
        ("data.root={val}", r"^data\.val_root has the class amber, which is none of the 2 classes"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(encoder_file, photos, tmp_path, override, words):
    train, val = photos
    key, _, value = override.format(train=train, val=val).partition("=")
    roots = (train, train) if "{val}" in override else photos
    roots = [value if key == f"data.{name}" else root for name, root in zip(("root", "val_root"), roots, strict=True)]
    given = [] if key in ("data.root", "data.val_root") else [f"{key}={value}"]
    with pytest.raises(ValueError, match=words) as caught:
        run(encoder_file, roots, tmp_path / "run", "probe=knn" if "knn" in key else "probe=linear", *given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_fine_tuned_model_is_probed_on_synthetic_images(tmp_path, caplog):
    """Its file says how images were normalised, so that nothing has to be taken as usual."""
    short = ["experiment=debug", "trainer.max_steps=1", "data.mean=0.4", "model=swinv2_mini", "model.window_size=4"]
    finetune(compose_config("finetune", short, output_dir=tmp_path / "tuned"))
    assert read_encoder_weights(tmp_path / "tuned")[1]["mean"] == pytest.approx([0.4] * 3)
    settings = [
        "probe=knn",
        "knn.k=[5]",
        "data.train_images=40",
        "data.val_images=20",
        "data.num_workers=0",
        "trainer=cpu",
    ]
    overrides = [f"encoder={tmp_path}/tuned", *settings]
    result = evaluate(compose_config("evaluate", overrides, output_dir=tmp_path / "run"))
    assert (result["train_images"], result["images"], result["classes"]) == (40, 20, 6)
    assert "usual" not in caplog.text
