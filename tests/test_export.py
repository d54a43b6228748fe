"""The command: what it says, what it leaves, and that nothing half done or wrong is ever left."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from simmim import exporting
from simmim.config import compose_config
from simmim.encoders import create_encoder
from simmim.encoders.encoder_files import read_encoder_weights, save_encoder
from simmim.encoders.weights import load_encoder
from simmim.export import export
from simmim.finetune import finetune
from simmim.pretrain import pretrain
from simmim.run_folder import list_checkpoints


def run(encoder, form, out, *overrides):
    words = [f"encoder={encoder}", f"format={form}", f"out={out}", *overrides]
    return export(compose_config("export", words, output_dir=Path("unused")))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pretrain(compose_config("pretrain", ["experiment=debug", "trainer.max_steps=2"], output_dir=folder))
    return folder


@pytest.fixture
def encoder_file(tmp_path):
    encoder = create_encoder("swinv2", embed_dim=8, depths=[2, 1], num_heads=[1, 1], extra_norm_every=0, window_size=4)
    for parameter in encoder.parameters():
        parameter.data += 0.1
    save_encoder(encoder, tmp_path / "encoder.safetensors", image_size=(32, 32), mean=[0.5] * 3, std=[0.2] * 3)
    return tmp_path / "encoder.safetensors"


def test_a_run_is_exported_with_its_card(pretrained, tmp_path, caplog):
    caplog.set_level("INFO")
    out = run(pretrained, "timm", tmp_path / "a" / "b", "license=mit")
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "MODEL_CARD.md"}
    assert [path.name for path in out.parent.iterdir()] == ["b"]
    assert "4 built-in synthetic images" in caplog.text
    assert re.search(r"timm \(\S+\), on .*: differs in features by at most \S+, \S+ of the largest", caplog.text)
    assert caplog.messages[-1] == f"done: {out}"
    card = (out / "MODEL_CARD.md").read_text()
    last = (pretrained / "metrics.csv").read_text()
    for line in (
        "Licence of the weights: **mit**",
        "| data.source | synthetic |",
        "| masking.ratio | 0.6 |",
        "| trainer.max_steps | 2 |",
        "| a pixel of 1 | 255 in the file |",
        "| mean | [0.485, 0.456, 0.406] |",
        "| interpolation | bilinear, antialiased |",
        f"hf upload <user>/<name> {out}",
        "* timm (",
    ):
        assert line in card, line
    [value] = re.findall(r"\| val_loss \| (\S+) \|", card)
    assert value in last


def test_a_card_says_what_is_unknown_and_no_path_of_the_machine(encoder_file, tmp_path):
    out = run(encoder_file, "safetensors", tmp_path / "there" / "x.safetensors")
    assert {path.name for path in out.parent.iterdir()} == {"x.safetensors", "MODEL_CARD.md"}
    card = (out.parent / "MODEL_CARD.md").read_text()
    assert "**unknown: fill in**" in card
    assert card.count("Unknown: no config.yaml") == 2 and "Unknown: no metrics.csv" in card
    (tmp_path / "config.yaml").write_text("data: {root: /home/somebody/photos, source: folder}\nseed: 3\n")
    again = run(encoder_file, "safetensors", tmp_path / "again" / "x.safetensors")
    card = (again.parent / "MODEL_CARD.md").read_text()
    assert "| data.root | photos |" in card and "somebody" not in card
    shutil.copy(encoder_file, tmp_path / "other.safetensors")  # beside a run, and no part of it
    card = run(tmp_path / "other.safetensors", "safetensors", tmp_path / "third" / "x.safetensors")
    assert "| data.root |" not in (card.parent / "MODEL_CARD.md").read_text()


def test_a_fine_tuned_classifier_keeps_its_classes(pretrained, tmp_path):
    words = [
        f"encoder={pretrained}",
        "trainer=cpu",
        "trainer.max_epochs=1",
        "data.train_images=16",
        "data.val_images=8",
    ]
    words += ["data.batch_size=4", "data.num_workers=0"]
    finetune(compose_config("finetune", words, output_dir=tmp_path / "run"))
    weights, known = read_encoder_weights(tmp_path / "run")
    for form in ("hf", "timm"):
        again, about = read_encoder_weights(run(tmp_path / "run", form, tmp_path / form))
        assert about["classes"] == known["classes"]
        assert all(torch.equal(about["head"][key], value) for key, value in known["head"].items())
        del again["mask_token"]  # classifiers have no use for it there
        assert all(torch.equal(value, weights[key]) for key, value in again.items())


def test_a_checkpoint_and_the_file_of_a_run_must_hold_the_same(pretrained, tmp_path):
    [checkpoint] = list_checkpoints(pretrained)
    own = tmp_path / "run"
    (own / "checkpoints").mkdir(parents=True)
    (own / "checkpoints" / checkpoint.name).write_bytes(checkpoint.read_bytes())
    assert "decoder.0.weight" in keys_of(run(own, "official", tmp_path / "1" / "m.pth"))
    assert "decoder.0.weight" in keys_of(run(checkpoint, "official", tmp_path / "2" / "m.pth"))
    encoder = load_encoder(checkpoint)
    encoder.mask_token.data += 1
    save_encoder(encoder, own / "encoder.safetensors", image_size=(32, 32))
    with pytest.raises(ValueError, match=r"hold different weights, .*: give encoder=\S+\.ckpt, or encoder=\S+rs for"):
        run(own, "official", tmp_path / "3" / "m.pth")
    assert "decoder.0.weight" not in keys_of(run(own / "encoder.safetensors", "official", tmp_path / "4" / "m.pth"))
    run(own, "timm", tmp_path / "5")  # which has no decoder


def keys_of(file):
    return torch.load(file, weights_only=True)["model"].keys()


def test_a_decoder_that_only_we_have_is_refused(pretrained, tmp_path):
    [checkpoint] = list_checkpoints(pretrained)
    held = torch.load(checkpoint, weights_only=True)
    held["hyper_parameters"]["objective"]["head"] = "mlp"
    torch.save(held, tmp_path / "step_1.ckpt")
    with pytest.raises(ValueError, match=r"objective\.head=mlp .*which only simmim can: give encoder=<run>/encoder"):
        run(tmp_path / "step_1.ckpt", "hf", tmp_path / "hf")
    run(tmp_path / "step_1.ckpt", "timm", tmp_path / "timm")  # which has no decoder


def test_what_computes_something_else_is_removed(encoder_file, tmp_path, monkeypatch):
    rename = exporting.timm_folder.to_timm

    def swapped(weights):
        state = rename(weights)
        name = "layers.0.blocks.1.attn.proj.weight"
        return {**state, name: state[name].flip(0)}

    monkeypatch.setattr(exporting.timm_folder, "to_timm", swapped)
    with pytest.raises(ValueError, match=r"format=timm: what was written computes something else, more than 1e-04"):
        run(encoder_file, "timm", tmp_path / "there" / "timm")
    assert list((tmp_path / "there").iterdir()) == []


def test_weights_that_change_where_no_number_shows_it_are_refused(encoder_file, tmp_path, monkeypatch):
    rename = exporting.timm_folder.to_timm

    def rounded(weights):
        return {key: value * (1 + 1e-7) for key, value in rename(weights).items()}

    monkeypatch.setattr(exporting.timm_folder, "to_timm", rounded)
    with pytest.raises(ValueError, match=r"format=timm: embed\.proj\.\S+, .* changed on the way"):
        run(encoder_file, "timm", tmp_path / "there" / "timm")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize(
    ("form", "library", "extra", "name"),
    [("timm", "timm", "timm", "t"), ("hf", "transformers", "hf", "h"), ("official", "timm", "timm", "m.pth")],
)
def test_without_its_library_an_export_says_that_it_was_not_verified(
    form, library, extra, name, encoder_file, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    monkeypatch.setitem(sys.modules, library, None)
    out = run(encoder_file, form, tmp_path / "there" / name)
    line = f"not verified: {library} is not installed: pip install 'simmim[{extra}]' and export again"
    assert line in caplog.messages
    assert line in ((out if out.is_dir() else out.parent) / "MODEL_CARD.md").read_text()
    assert "read back by simmim" in caplog.text


def test_onnx_cannot_be_written_without_what_writes_it(encoder_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"needs onnxscript, which is not installed: pip install 'simmim\[onnx\]'"):
        run(encoder_file, "onnx", tmp_path / "there" / "m.onnx")
    monkeypatch.undo()
    monkeypatch.setattr(exporting.onnx_file, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"one file holds 2"):
        run(encoder_file, "onnx", tmp_path / "there" / "m.onnx")


@pytest.mark.parametrize(
    ("form", "out", "reason"),
    [
        ("keras", "x", "format=keras is unknown: choose one of timm, hf, torchvision, official, safetensors, onnx"),
        ("timm", "full", "out=.*full exists already: give another out="),
        ("timm", "x.safetensors", "has the ending of a file, and format=timm writes a folder"),
        ("onnx", "x.pth", r"format=onnx writes a file named \*\.onnx"),
        ("torchvision", "x", r"format=torchvision writes a file named \*\.pth"),
        ("onnx", "full/x.onnx", r"MODEL_CARD\.md is there already, of another model: .* as out=\S+full/x/x\.onnx"),
    ],
)
def test_nothing_is_overwritten(form, out, reason, encoder_file, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "MODEL_CARD.md").write_text("mine")
    with pytest.raises(ValueError, match=reason) as caught:
        run(encoder_file, form, tmp_path / out)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "full" / "MODEL_CARD.md").read_text() == "mine"


def test_images_may_be_one_file_and_what_cannot_be_read_is_named(encoder_file, tmp_path, caplog):
    caplog.set_level("INFO")
    Image.effect_noise((50, 40), 60).convert("RGB").save(tmp_path / "one.png")
    run(encoder_file, "timm", tmp_path / "timm", f"images={tmp_path / 'one.png'}")
    assert f"on {tmp_path / 'one.png'}: differs" in caplog.text
    (tmp_path / "none.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"images=\S+none\.png cannot be read"):
        run(encoder_file, "timm", tmp_path / "other", f"images={tmp_path / 'none.png'}")


def test_files_of_others_are_exported_too(encoder_file, tmp_path):
    """Through timm's folder and the authors' layout, and back to our own: the same weights but for the mask token."""
    timm = run(encoder_file, "timm", tmp_path / "timm")
    official = run(timm, "official", tmp_path / "official" / "m.pth")
    with pytest.raises(ValueError, match=r"bare\.pth does not say at which image size it was trained"):
        run(strip(official), "timm", tmp_path / "other")
    again, weights = read_encoder_weights(official)[0], read_encoder_weights(encoder_file)[0]
    assert all(torch.equal(value, again[key]) for key, value in weights.items() if key != "mask_token")


def strip(file):
    """Without the buffers that say at which image size it was trained."""
    state = torch.load(file, weights_only=True)["model"]
    bare = file.with_name("bare.pth")
    torch.save(
        {"model": {key: value for key, value in state.items() if "relative" not in key and "mask" not in key}}, bare
    )
    return bare
