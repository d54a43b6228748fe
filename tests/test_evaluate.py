"""What a classifier recognises, at any size of image and on any folder of its classes."""

import csv
import json

import pytest
import torch
from PIL import Image

from simmim.config import compose_config
from simmim.data.decoding import decode
from simmim.data.transforms import centre_transform
from simmim.encoders.encoder_files import read_encoder_weights
from simmim.encoders.weights import load_encoder
from simmim.evaluate import evaluate
from simmim.finetune import finetune
from simmim.pretrain import pretrain
from simmim.run_folder import list_checkpoints

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230), "white": (240, 240, 240)}
NAMES = sorted(COLOURS)
LOADING = ("data.num_workers=0", "trainer=cpu")


def photos(root, names=None, count=6, seed=0):
    """Noise of one colour each, but for one astray; `names` gives the folders other names than those of the colours."""
    generator = torch.Generator().manual_seed(seed)
    for colour, name in (names or {colour: colour for colour in NAMES}).items():
        (root / str(name)).mkdir(parents=True)
        for number in range(count):
            noise = torch.randint(-30, 30, (40, 44, 3), generator=generator)
            shown = colour if number else NAMES[NAMES.index(colour) - 1]
            pixels = (torch.tensor(COLOURS[shown]) + noise).clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / str(name) / f"{number}.png")
    return root


def run(folder, encoder, root, *overrides):
    words = [f"encoder={encoder}", "data=folder", f"data.root={root}", *LOADING, *overrides]
    return evaluate(compose_config("evaluate", words, output_dir=folder))


def classes_of(folder):
    with (folder / "classes.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("val"), seed=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, images):
    """A classifier of colours, and what it ended with on `images`."""
    folder = tmp_path_factory.mktemp("colours")
    root = photos(folder / "train")
    words = ["experiment=debug", "data=folder", f"data.root={root}", f"data.val_root={images}", "trainer.max_epochs=5",
             "optimizer.base_lr=2e-1", "optimizer.layer_decay=1", "optimizer.ema_decay=0.9", "data.mean=[0.4,0.5,0.6]",
             "augmentation.randaugment=null", "augmentation.color_jitter=0", "augmentation.mixup=0",
             "augmentation.cutmix=0"]  # fmt: skip
    summary = finetune(compose_config("finetune", words, output_dir=folder / "run"))
    return folder / "run", summary


def test_it_gives_what_the_run_ended_with(finished, images, tmp_path):
    folder, summary = finished
    assert 0.3 < summary["val_top1"] < 1
    for name, encoder in (("run", folder), ("checkpoint", list_checkpoints(folder)[-1])):
        result = run(tmp_path / name, encoder, images)
        assert result["images"] == 24
        assert {f"val_{key}": result[key] for key in ("loss", "top1", "top5")} == pytest.approx(
            {key: value for key, value in summary.items() if key != "step"}, rel=1e-5
        )
    assert classes_of(tmp_path / "run") == classes_of(folder)


def test_it_does_not_depend_on_the_batch_size(finished, images, tmp_path):
    results = [run(tmp_path / str(size), finished[0], images, f"data.batch_size={size}") for size in (5, 24)]
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_the_result_and_the_classes_add_up(finished, images, tmp_path):
    result = run(tmp_path, finished[0], images, "data.image_size=64", "model.window_size=8")
    written = json.loads((tmp_path / "result.json").read_text())
    assert written == {
        "encoder": str(finished[0]), "image_size": [64, 64], "windows": [[8, 8], [8, 8], [4, 4]], **result
    }  # fmt: skip
    table = classes_of(tmp_path)
    assert [row["class"] for row in table] == NAMES
    assert sum(int(row["images"]) for row in table) == result["images"] == 24
    hits = sum(int(row["images"]) * float(row["top1"]) for row in table)
    assert hits / 24 == pytest.approx(result["top1"], abs=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.csv", "confusion.png", "result.json"]


@pytest.mark.parametrize(("size", "overrides"), [(32, ()), (64, ("data.image_size=64", "model.window_size=8"))])
def test_it_counts_what_the_encoder_file_says_by_itself(finished, images, tmp_path, size, overrides):
    """Put together from the file alone: the encoder at its own windows, the head, and the pixel statistics."""
    result = run(tmp_path, finished[0], images, *overrides)
    weights, known = read_encoder_weights(finished[0])
    if size == 32:
        encoder = load_encoder(finished[0])
    else:
        encoder = type(load_encoder(finished[0]))(
            **{**known["config"], "window_size": 8, "pretrained_window_size": [4, 4, 2]}
        )
        encoder.load_state_dict(weights)
    mean, std = (torch.tensor(known[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert known["mean"] == [0.4, 0.5, 0.6]
    transform = centre_transform((size, size), share=0.875, interpolation="bicubic")
    losses, hits = [], []
    for label, name in enumerate(known["classes"]):
        for path in sorted((images / name).iterdir()):
            image = (transform(decode(path.read_bytes(), 3)).float() / 255 - mean) / std
            with torch.no_grad():
                features = encoder.eval()(image[None]).mean(dim=(1, 2))
            logits = features @ known["head"]["weight"].T + known["head"]["bias"]
            losses.append(-logits.log_softmax(1)[0, label].item())
            hits.append(int(logits.argmax()) == label)
    assert result["loss"] == pytest.approx(sum(losses) / 24, rel=1e-4)
    assert result["top1"] == pytest.approx(sum(hits) / 24)


def test_numbered_folders_stand_for_the_classes_in_their_order(finished, images, tmp_path, caplog):
    """As ImageNet-V2's; and some of the classes are enough."""
    caplog.set_level("INFO")
    numbers = {colour: NAMES.index(colour) for colour in ("white", "green", "blue")}
    numbered = run(tmp_path / "1", finished[0], photos(tmp_path / "numbers", numbers, seed=2))
    assert "3 numbered folders, taken as the numbers of the 4 classes" in caplog.text
    named = run(tmp_path / "2", finished[0], photos(tmp_path / "names", {colour: colour for colour in numbers}, seed=2))
    assert "3 of the 4 classes, matched by name" in caplog.text
    assert numbered == pytest.approx(named)
    assert [(row["class"], row["images"]) for row in classes_of(tmp_path / "1")] == [
        ("blue", "6"), ("green", "6"), ("red", "0"), ("white", "6")
    ]  # fmt: skip
    assert classes_of(tmp_path / "1")[2]["top1"] == ""


def test_images_that_cannot_be_read_are_named(finished, tmp_path):
    root = photos(tmp_path / "photos")
    (root / "red" / "0.png").write_bytes(b"no image")
    result = run(tmp_path / "run", finished[0], root, "data.max_bad_fraction=0.1")
    assert result["images"] == 23
    assert "red/0.png" in (tmp_path / "run" / "bad_images.txt").read_text()
    with pytest.raises(ValueError, match=r"red/0\.png cannot be read.*data\.on_error=skip"):
        run(tmp_path / "strict", finished[0], root, "data.on_error=raise")
    with pytest.raises(ValueError, match=r"^1 of 24 images could not be read, more than data\.max_bad_fraction=0\.01"):
        run(tmp_path / "too many", finished[0], root)


def test_a_stage_gives_its_size(finished, images, tmp_path):
    """Its optimizer and length mean nothing here, and are no error."""
    overrides = ["stage=transfer_384", "data.image_size=64", "model.window_size=8"]
    assert run(tmp_path, finished[0], images, *overrides)["images"] == 24


def test_what_cannot_be_evaluated_is_one_line(finished, images, tmp_path):
    pretrained = tmp_path / "pretrained"
    pretrain(compose_config("pretrain", ["experiment=debug", "trainer.max_steps=1"], output_dir=pretrained))
    other = photos(tmp_path / "other", {"red": "red", "blue": "violet"})
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (8, 8)).save(flat / "0.png")
    cases = [
        (pretrained, images, [], r"^encoder=.* holds no classifier: fine-tune it first"),
        (finished[0], other, [], r"^data\.root has the class violet, which is none of the 4 classes known"),
        (finished[0], flat, [], r"^data\.root: these images have no labels"),
        (finished[0], images, ["data.image_size=48"], r"data\.image_size"),
        (finished[0], images, ["data.interpolation=area"], r"^data\.interpolation=area is unknown"),
        (finished[0], images, ["trainer=ddp"], r"^trainer\.strategy=ddp is unknown: choose one of single"),
        (finished[0], images, ["trainer.devices=2"], r"^trainer\.devices=2 must be"),
        (finished[0], images, ["model=swinv2_t"], r"does not fit the model"),
        (tmp_path / "nowhere", images, [], r"^encoder=.*nowhere does not exist"),
    ]  # fmt: skip
    for encoder, root, overrides, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            run(tmp_path / "never", encoder, root, *overrides)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "never").exists()


def test_the_clothing_set(tmp_path, shared_data):
    """Real photographs, of which a classifier that has learnt nothing recognises about as many as by guessing."""
    root = shared_data / "clothing"
    part = tmp_path / "part"
    for folder in (root / "validation").iterdir():
        (part / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:4]:
            (part / folder.name / path.name).symlink_to(path)
    words = ["experiment=debug", "data=folder", f"data.root={part}", f"data.val_root={part}", "trainer.max_steps=1"]
    summary = finetune(compose_config("finetune", words, output_dir=tmp_path / "run"))
    result = run(tmp_path / "evaluated", tmp_path / "run", part)
    assert result["images"] == 40
    assert result["loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    assert result["loss"] == pytest.approx(2.303, abs=0.2)  # ln 10
    assert [row["class"] for row in classes_of(tmp_path / "evaluated")] == sorted(p.name for p in part.iterdir())


def test_images_are_made_as_the_run_validated_them(tmp_path):
    """`data.test_crop` and `data.interpolation` come with the classifier, like its pixel statistics."""
    overrides = ["experiment=debug", "trainer.max_steps=2", "data.test_crop=0.5", "data.interpolation=bilinear"]
    told = finetune(compose_config("finetune", overrides, output_dir=tmp_path / "run"))
    settings = [f"encoder={tmp_path / 'run'}", "data.val_images=8", "data.num_workers=0", "trainer=cpu"]
    result = evaluate(compose_config("evaluate", settings, output_dir=tmp_path / "as"))
    other = evaluate(compose_config("evaluate", [*settings, "data.test_crop=1"], output_dir=tmp_path / "other"))
    assert result["loss"] == pytest.approx(told["val_loss"], rel=1e-5)
    assert abs(other["loss"] - told["val_loss"]) > 1e-4


def test_what_only_a_probe_reads_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match=r"^data\.val_root and data\.label_fraction are for probes"):
        run(tmp_path / "1", finished[0], photos(tmp_path / "photos"), "data.val_root=photos")


def test_a_stage_of_pretraining_is_no_stage_of_this(finished, tmp_path):
    with pytest.raises(ValueError, match=r"^stage=pretrain_192 is no stage of simmim\.evaluate"):
        run(tmp_path / "1", finished[0], photos(tmp_path / "photos"), "stage=pretrain_192")
