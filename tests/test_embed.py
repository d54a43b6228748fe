"""Features of folders of images: what they are, what the file holds, and that neither kills nor bad files lose any."""

import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import started
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from simmim import embed as module
from simmim import embedding
from simmim.config import compose_config
from simmim.data.folder import FolderSource
from simmim.data.transforms import centre_transform
from simmim.embed import embed
from simmim.encoders import create_encoder
from simmim.encoders.encoder_files import read_encoder_weights, save_encoder
from simmim.encoders.weights import load_encoder, load_encoder_weights
from simmim.feature_files import part_path, read_part, write_part
from simmim.stages import fill_in, open_encoder

MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]
CROP = {"share": 0.875, "interpolation": "bicubic"}
IMAGES = 24
WORDS = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "extra_norm_every": 0, "patch_size": 2}


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    """Random weights, norms and biases included: else the blocks of a new encoder are the identity."""
    encoder = create_encoder("swinv2", window_size=8, **WORDS)
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    file = tmp_path_factory.mktemp("run") / "encoder.safetensors"
    save_encoder(encoder, file, image_size=(16, 16), mean=MEAN, std=STD)
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for index in range(IMAGES):
        path = root / "ab"[index % 2] / f"{index:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((20 + index % 7, 24), 80).convert("RGB").save(path)
    return root


@pytest.fixture
def dirty(photos, tmp_path):
    """The same images, and two that are none: one at a batch's beginning, one alone in the last part."""
    root = tmp_path / "dirty"
    for path in photos.rglob("*.png"):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        os.link(path, root / path.parent.name / path.name)
    (root / "a" / "000.jpg").write_bytes(b"no image")
    (root / "b" / "zz.jpg").write_bytes(b"")
    return root


def run(encoder, images, out, *overrides):
    overrides = [
        f"encoder={encoder}",
        f"images={images}",
        f"out={out}",
        "trainer=cpu",
        "data.num_workers=0",
        *overrides,
    ]
    return embed(compose_config("embed", overrides, output_dir=out.parent / "run"))


def embedder_of(encoder, *overrides):
    config = compose_config("embed", [f"encoder={encoder}", "images=unused", *overrides], output_dir=Path("unused"))
    config = fill_in(config, read_encoder_weights(encoder)[1])
    return embedding.create_embedder(config, open_encoder(config), pooled=True)


def content(out):
    with np.load(out, allow_pickle=False) as arrays:
        return dict(arrays)


def expected(encoder_file, photos, size=(16, 16)):
    """Map and mean of each image, one by one, by the encoder alone."""
    encoder, source = load_encoder(encoder_file).eval(), FolderSource(photos)
    maps = []
    for index in range(len(source)):
        image = centre_transform(size, **CROP)(source.load(index)[0]).double() / 255
        mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
        with torch.no_grad():
            maps.append(encoder(((image - mean) / std).float()[None])[0])
    return torch.stack(maps).numpy()


def test_features_are_those_of_the_encoder_alone(encoder_file, photos, tmp_path):
    maps = expected(encoder_file, photos)
    pooled = content(run(encoder_file, photos, tmp_path / "p.npz", "data.batch_size=5"))
    patches = content(run(encoder_file.parent, photos, tmp_path / "m.npz", "features=patches", "data.batch_size=7"))
    assert pooled["features"].dtype == patches["features"].dtype == np.float32
    assert patches["features"].shape == (IMAGES, 4, 4, 32)
    np.testing.assert_allclose(patches["features"], maps, atol=2e-5)
    np.testing.assert_allclose(pooled["features"], maps.mean((1, 2)), atol=2e-5)
    assert pooled["features"].std(axis=0).min() > 1e-3  # images differ


def test_the_file_says_what_it_holds(encoder_file, photos, tmp_path, caplog):
    caplog.set_level("INFO")
    out = run(encoder_file, photos, tmp_path / "features.npz")
    found, source = content(out), FolderSource(photos)
    assert found["paths"].tolist() == [source.relative_name(index) for index in range(IMAGES)]
    assert found["classes"].tolist() == ["a", "b"]
    assert [path[0] for path in found["paths"]] == found["classes"][found["labels"]].tolist()
    assert (found["encoder"], found["image_size"].tolist()) == (str(encoder_file), [16, 16])
    np.testing.assert_allclose(found["mean"], MEAN)
    np.testing.assert_allclose(found["std"], STD)
    assert [file.name for file in tmp_path.iterdir()] == ["features.npz"]
    assert caplog.messages[-1].endswith("features.npz, features 24 x 32, float32")


def test_without_classes_there_are_no_labels_and_one_image_will_do(encoder_file, photos, tmp_path):
    found = content(run(encoder_file, photos / "a", tmp_path / "a.npz"))
    assert not {"labels", "classes"} & set(found)
    alone = content(run(encoder_file, photos / "a" / "002.png", tmp_path / "1.npz"))
    assert alone["paths"].tolist() == ["002.png"]
    row = found["paths"].tolist().index("002.png")
    np.testing.assert_allclose(alone["features"][0], found["features"][row], atol=1e-5)


def test_what_cannot_be_read_is_left_out_and_listed(encoder_file, photos, dirty, tmp_path, caplog):
    settings = ["data.batch_size=1", "features=patches"]
    clean = content(run(encoder_file, photos, tmp_path / "clean.npz", *settings))
    found = content(run(encoder_file, dirty, tmp_path / "dirty.npz", *settings))
    for key in ("paths", "features", "labels"):
        np.testing.assert_array_equal(found[key], clean[key])
    lines = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    reasons = ["not an image (none of JPEG, PNG, WEBP, GIF, BMP, TIFF, NPY)", "empty file"]
    names = [f"{dirty}/a/000.jpg", f"{dirty}/b/zz.jpg"]
    assert lines == [f"{name}\t{reason}" for name, reason in zip(names, reasons, strict=True)]
    assert all(
        f"{name} cannot be read ({reason})" in caplog.text for name, reason in map(lambda x: x.split("\t"), lines)
    )
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^images=.*none holds no image that can be read$"):
        run(encoder_file, tmp_path / "none", tmp_path / "none.npz")
    assert not list(tmp_path.glob("none.npz*"))


def test_killed_and_run_again_it_is_the_same_to_the_last_byte(encoder_file, dirty, tmp_path, monkeypatch):
    """A real process, killed once it has written two parts of thirteen."""
    monkeypatch.setattr(module, "PART_BATCHES", 1)
    whole = run(encoder_file, dirty, tmp_path / "whole" / "features.npz", "data.batch_size=2", "features=patches")
    out = tmp_path / "killed" / "features.npz"
    slow = (  # parts of one batch, and time to be killed in
        "import time, simmim.embed as m; m.PART_BATCHES = 1; write = m.write_part;"
        "m.write_part = lambda *a: (time.sleep(0.05), write(*a));"
        "m.command(m.embed)()"
    )
    arguments = [f"encoder={encoder_file}", f"images={dirty}", f"out={out}", "data.batch_size=2", "features=patches"]
    process = started.start("-c", slow, *arguments, "trainer=cpu", "data.num_workers=1", cwd=tmp_path)
    parts, deadline = out.with_name("features.npz.partial"), time.monotonic() + 100
    while not (parts / "part-00001.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("part-*.npz")}
    assert 2 <= len(kept) < 13
    written = []
    monkeypatch.setattr(module, "write_part", lambda *part: (written.append(part[1]), write_part(*part)))
    run(encoder_file, dirty, out, "features=patches")  # the batch size is that of the parts
    assert written == list(range(len(kept), 13))
    assert out.read_bytes() == whole.read_bytes()
    assert not parts.exists()
    assert len((tmp_path / "killed" / "run" / "bad_images.txt").read_text().splitlines()) == 2


def test_ctrl_c_is_one_line_and_loses_no_whole_part(encoder_file, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_BATCHES", 2)
    out, settings = tmp_path / "features.npz", ["data.batch_size=4"]

    def pressed(out, number, part):
        if number == 2:
            raise KeyboardInterrupt
        write_part(out, number, part)

    monkeypatch.setattr(module, "write_part", pressed)
    with pytest.raises(ValueError, match=r"^stopped after 2 whole parts: the same command with out=.* goes on behind"):
        run(encoder_file, photos, out, *settings)
    assert len(read_part(out, 1).positions) == 8
    monkeypatch.setattr(module, "write_part", write_part)
    again = run(encoder_file, photos, out, *settings)
    assert again.read_bytes() == run(encoder_file, photos, tmp_path / "whole.npz", *settings).read_bytes()


@pytest.mark.parametrize("left", [0, 1, 3])
def test_killed_between_joining_and_clearing_up_it_ends_alike(encoder_file, photos, tmp_path, monkeypatch, left):
    """The whole file is there, and of its three parts so many are left."""
    monkeypatch.setattr(module, "PART_BATCHES", 2)
    out = tmp_path / "features.npz"
    with monkeypatch.context() as killed:
        killed.setattr("simmim.feature_files.discard", lambda out: None)
        before = run(encoder_file, photos, out, "data.batch_size=4").read_bytes()
    for number in range(left, 3):
        part_path(out, number).unlink()
    assert run(encoder_file, photos, out, "data.batch_size=4").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["features.npz"]


def test_parts_of_another_length_are_not_gone_on_with(encoder_file, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("simmim.feature_files.discard", lambda out: None)
    run(encoder_file, photos, tmp_path / "features.npz", "data.batch_size=4")
    monkeypatch.setattr(module, "PART_BATCHES", 2)
    with pytest.raises(ValueError, match=r"was begun with batches_a_part=16, now 2"):
        run(encoder_file, photos, tmp_path / "features.npz", "data.batch_size=4")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "features=patches",
            r"^out=.* was begun with features=pooled, now patches: give another out, or delete .*partial",
        ),
        ("data.batch_size=8", r"was begun with data\.batch_size=4, now 8"),
        ("data.image_size=32", r"was begun with data\.image_size=\[16, 16\], now \[32, 32\]"),
        ("data.mean=0.5", r"was begun with data\.mean=\[0\.5, 0\.4, 0\.3\], now \[0\.5, 0\.5, 0\.5\]"),
        ("images", r"was begun with names_sha256=[0-9a-f]{64}, now "),
        ("weights", r"was begun with encoder_sha256=[0-9a-f]{64}, now "),
    ],
)
def test_parts_of_something_else_are_not_gone_on_with(encoder_file, dirty, tmp_path, monkeypatch, override, words):
    out, copy = tmp_path / "features.npz", tmp_path / "encoder.safetensors"
    copy.write_bytes(encoder_file.read_bytes())

    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_part", pressed)
    with pytest.raises(ValueError, match=r"^stopped after 0 whole parts"):
        run(copy, dirty, out, "data.batch_size=4")
    if override == "images":
        (dirty / "a" / "000.jpg").unlink()
    elif override == "weights":
        encoder = load_encoder(copy)
        encoder.norm.bias.data[0] += 1
        save_encoder(encoder, copy, image_size=(16, 16), mean=MEAN, std=STD)
    given = [override] if "=" in override else []
    with pytest.raises(ValueError, match=words):
        run(copy, dirty, out, *(given if "data.batch_size" in override else ["data.batch_size=4", *given]))


def test_another_size_keeps_the_windows_that_the_bias_was_trained_with(encoder_file, photos, tmp_path):
    """At 16 px the maps are 8 and 4 tokens wide, and so are the windows; at 32 px the second would be 8."""
    found = content(run(encoder_file, photos, tmp_path / "32.npz", "data.image_size=32", "features=patches"))
    encoder = create_encoder("swinv2", window_size=8, pretrained_window_size=[8, 4], **WORDS).eval()
    load_encoder_weights(encoder, encoder_file, image_size=(32, 32))
    source, image = FolderSource(photos), None
    image = centre_transform((32, 32), **CROP)(source.load(3)[0]).float() / 255
    image = (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        np.testing.assert_allclose(found["features"][3], encoder(image[None])[0], atol=2e-5)
    wide = content(run(encoder_file, photos, tmp_path / "w.npz", "data.image_size=[16,32]", "features=patches"))
    assert wide["features"].shape == (IMAGES, 4, 8, 32)


def test_older_files_are_taken_as_usual_and_that_is_said_once(encoder_file, photos, tmp_path, caplog):
    old = tmp_path / "old.safetensors"
    with safe_open(encoder_file, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key not in ("mean", "std")}
        save_file({key: file.get_tensor(key) for key in file.keys()}, old, metadata)  # noqa: SIM118
    run(encoder_file, photos, tmp_path / "new.npz")
    run(old, photos, tmp_path / "given.npz", f"data.mean={MEAN}", f"data.std={STD}")
    assert "usual" not in caplog.text
    own, given = content(tmp_path / "new.npz"), content(tmp_path / "given.npz")
    np.testing.assert_array_equal(given["features"], own["features"])
    usual = content(run(old, photos, tmp_path / "old.npz"))
    [line] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert line.endswith("usual is taken, data.mean=[0.485,0.456,0.406] data.std=[0.229,0.224,0.225]")
    np.testing.assert_allclose(usual["mean"], [0.485, 0.456, 0.406])


def test_the_keys_of_all_commands_reach_the_encoder(encoder_file, photos, tmp_path):
    """Other windows change what is seen; another implementation of the attention does not."""
    own, narrow, reference = (
        content(run(encoder_file, photos, tmp_path / f"{number}.npz", *given))["features"]
        for number, given in enumerate(([], ["model.window_size=4"], ["model.attention=reference"]))
    )
    np.testing.assert_allclose(reference, own, atol=2e-5)
    assert np.abs(narrow - own).max() > 1e-3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("features=tokens", r"^features=tokens is unknown: choose pooled or patches"),
        ("out=features.csv", r"^out=features\.csv must end in \.npz or \.parquet"),
        ("data.image_size=30", r"^image size 30x30 px does not fit model\.patch_size=2 and model\.window_size=8: "
         r"the nearest data\.image_size that do are 30 -> 16 or 32"),
        ("data.mean=[0.5,0.5]", r"^data\.mean=\[0\.5, 0\.5\] has 2 values for data\.channels=3"),
        ("encoder=nowhere", r"^encoder=nowhere does not exist"),
        ("images=nowhere", r"^images=nowhere does not exist"),
        ("data.batch_size=0", r"^data\.batch_size=0 must be a whole number, positive"),
        ("trainer=ddp", r"^trainer\.strategy=ddp is unknown: choose one of single"),
        ("trainer.devices=2", r"^trainer\.devices=2 must be a whole number, positive, at most 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(encoder_file, photos, tmp_path, override, words):
    with pytest.raises(ValueError, match=words) as caught:
        run(encoder_file, photos, tmp_path / "features.npz", override)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_whole_is_never_overwritten(encoder_file, photos, tmp_path):
    out = run(encoder_file, photos, tmp_path / "features.npz")
    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"^out=.*features\.npz exists already: give another out, or delete that one"):
        run(encoder_file, photos, out)
    assert out.read_bytes() == before
    (tmp_path / "x.npz.partial").mkdir()
    (tmp_path / "x.npz.partial" / "mine").touch()
    with pytest.raises(ValueError, match=r"x\.npz\.partial holds other files: give another out"):
        run(encoder_file, photos, tmp_path / "x.npz")


def test_a_part_is_whole_batches_and_bounded(encoder_file, photos, tmp_path, monkeypatch):
    """Which bounds the memory: neither the making nor the joining holds more than a part."""
    sizes = []
    monkeypatch.setattr(module, "write_part", lambda *part: (sizes.append(part[2].features.nbytes), write_part(*part)))
    monkeypatch.setattr(module, "PART_BYTES", 4 * 4 * 4 * 32 * 9)  # nine images
    run(encoder_file, photos, tmp_path / "f.npz", "features=patches", "data.batch_size=4")
    assert sizes == [4 * 4 * 4 * 32 * 8] * 3


def test_memory_that_runs_out_halves_the_batch(encoder_file, photos, tmp_path, monkeypatch, caplog):
    compute, seen = embedding.Embedder._compute, []

    def small(self, images):
        seen.append(len(images))
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, images)

    monkeypatch.setattr(embedding.Embedder, "_compute", small)
    found = content(run(encoder_file, photos, tmp_path / "f.npz", "data.batch_size=13", "data.num_workers=1"))
    assert seen == [13, 8, *[4] * 3, 1, *[4] * 2, 3]  # 13 and 11 images
    assert re.findall(r"out of memory: (\d+) images at once", caplog.text) == ["8", "4"]
    np.testing.assert_allclose(found["features"], expected(encoder_file, photos).mean((1, 2)), atol=2e-5)

    def none(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(embedding.Embedder, "_compute", none)
    with pytest.raises(ValueError, match=r"^out of memory with one image of 16x16 px: give a smaller data\.image_size"):
        run(encoder_file, photos, tmp_path / "g.npz", "data.batch_size=2")


@pytest.mark.parametrize(("free", "size"), [(None, 16), (1 << 40, 16), (2 * 96 * 64 * 16 * 5, 4), (1, 1)])
def test_the_batch_on_a_cpu_fits_the_memory(encoder_file, monkeypatch, free, size):
    """An image of 64 tokens of 16 channels is reckoned with 96 bytes each, and half of the memory may be taken."""
    monkeypatch.setattr(embedding, "free_memory", lambda: free)
    assert embedding.fitting_batch(embedder_of(encoder_file, "trainer=cpu")) == size


@pytest.mark.gpu
def test_on_a_gpu_features_agree_with_the_cpu_and_the_batch_is_found(encoder_file, photos, tmp_path, monkeypatch):
    cpu = content(run(encoder_file, photos, tmp_path / "cpu.npz"))["features"]
    for precision, tolerance in (("32-true", 1e-3), ("bf16-mixed", 0.1)):
        out, settings = tmp_path / f"{precision}.npz", ["trainer=gpu", f"trainer.precision={precision}"]
        gpu = content(run(encoder_file, photos, out, *settings))["features"]
        assert gpu.dtype == np.float32
        np.testing.assert_allclose(gpu, cpu, atol=tolerance)
    compute = embedding.Embedder._compute

    torch.cuda.empty_cache()
    twelfth = torch.cuda.mem_get_info()[0] // 12

    def limited(self, images):
        torch.empty(len(images) * twelfth, dtype=torch.uint8, device="cuda")  # memory really runs out
        return compute(self, images)

    monkeypatch.setattr(embedding.Embedder, "_compute", limited)
    assert embedding.fitting_batch(embedder_of(encoder_file, "trainer=gpu")) == 8


def test_parquet_has_a_row_an_image(encoder_file, photos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow, the extra [parquet]")
    for features, shape in (("pooled", [32]), ("patches", [4, 4, 32])):
        settings = ["data.batch_size=2", f"features={features}"]
        table = parquet.read_table(run(encoder_file, photos, tmp_path / f"{features}.parquet", *settings))
        whole = content(run(encoder_file, photos, tmp_path / f"{features}.npz", *settings))
        facts = {key.decode(): json.loads(value) for key, value in table.schema.metadata.items()}
        assert facts == {"encoder": str(encoder_file), "image_size": [16, 16], "mean": MEAN, "std": STD,
                         "test_crop": 0.875, "interpolation": "bicubic", "max_value": 255,
                         "shape": shape, "classes": ["a", "b"]}  # fmt: skip
        assert table["path"].to_pylist() == whole["paths"].tolist()
        assert table["label"].to_pylist() == whole["labels"].tolist()
        vectors = np.array(table["vector"].to_pylist(), dtype=np.float32)
        np.testing.assert_array_equal(vectors.reshape(-1, *shape), whole["features"])
        assert str(table.schema.field("vector").type) == "list<element: float>"


def test_parquet_without_its_library_is_one_line(encoder_file, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("simmim.feature_files.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^out=.*f\.parquet needs pyarrow: pip install 'simmim\[parquet\]', or give"):
        run(encoder_file, photos, tmp_path / "f.parquet")


def test_real_photographs_and_broken_files(encoder_file, shared_data, tmp_path):
    found = content(run(encoder_file, shared_data / "dirty", tmp_path / "f.npz"))
    bad = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert {line.split("\t")[0].rpartition("/")[2] for line in bad} == {"empty.jpg", "text.jpg", "truncated.jpg"}
    assert len(found["features"]) == len(FolderSource(shared_data / "dirty")) - 3
    assert np.isfinite(found["features"]).all()
