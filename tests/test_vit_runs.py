"""What is a Vision Transformer's own in the commands; what all encoders share is in test_encoder_runs.py."""

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.config import compose_config
from simmim.embed import embed
from simmim.encoders.encoder_files import read_encoder_weights
from simmim.encoders.table_resizing import move_table
from simmim.encoders.weights import load_encoder, load_encoder_weights
from simmim.evaluate import evaluate
from simmim.export import export
from simmim.finetune import finetune
from simmim.inspect import inspect
from simmim.plan import plan
from simmim.pretrain import pretrain
from simmim.reconstruct import reconstruct

VIT = ["experiment=debug", "model=vit_s", "model.depths=[2]", "model.embed_dim=24", "model.num_heads=[3]",
       "model.patch_size=8", "model.window_size=4", "masking.patch_size=16"]  # fmt: skip
SHORT = [*VIT, "trainer.max_steps=4", "pictures=1", "checkpoint.every_n_steps=2", "checkpoint.keep=null",
         "model.drop_path=0.3"]  # fmt: skip
LARGER = ["data.image_size=48", "model.window_size=6", "trainer=cpu", "data.train_images=16", "data.val_images=12",
          "data.batch_size=4", "data.num_workers=0"]  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit") / "run"
    pretrain(compose_config("pretrain", SHORT, output_dir=folder))
    return folder


@pytest.fixture(scope="module")
def tuned(pretrained, tmp_path_factory):
    """As the recipe does it: on larger images, each block with its own table."""
    folder = tmp_path_factory.mktemp("vit") / "tuned"
    words = [*LARGER, f"encoder={pretrained}", "model.position_bias=table", "trainer.max_steps=2"]
    finetune(compose_config("finetune", words, output_dir=folder))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_its_file_rebuilds_it(pretrained):
    encoder = load_encoder(pretrained)
    assert (encoder.architecture, encoder.config["layer_scale"]) == ("vit", 0.1)
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 4, 24)
    assert read_encoder_weights(pretrained)[1]["windows"] == [[4, 4]]


def test_fine_tuning_gives_each_block_the_table_moved_to_the_larger_map(pretrained, tuned):
    before, encoder = load_encoder(pretrained).state_dict(), load_encoder(tuned)
    state = {key: torch.zeros_like(value) for key, value in encoder.state_dict().items()}
    encoder.load_state_dict(state)
    report = load_encoder_weights(encoder, pretrained, image_size=(48, 48))
    assert "The position bias that all blocks shared was given to each of them" in report
    tables = [block.attention.position_bias.table for block in encoder.blocks[0]]
    expected = move_table(before["position_bias.table"], (4, 4), (6, 6), window_size=6, resizing="geometric")
    assert all(torch.equal(table, expected) for table in tables) and expected.shape[1:] == (11, 11)
    pairs = [block.attention.position_bias.class_token for block in encoder.blocks[0]]
    assert all(torch.equal(pair, before["position_bias.class_token"]) for pair in pairs)
    assert len({value.data_ptr() for value in (*tables, *pairs)}) == 4  # to go each its own way


def test_frozen_features_are_judged(tuned, tmp_path):
    words = [f"encoder={tuned}", "data.train_images=16", "data.val_images=12", "data.num_workers=0", "trainer=cpu"]
    result = evaluate(compose_config("evaluate", [*words, "probe=linear", "linear.epochs=2"], output_dir=tmp_path))
    assert result["features"]["channels"] == 24


@pytest.mark.parametrize("features", ["pooled", "patches"])
def test_embedded_features_are_those_of_the_encoder_alone(tuned, photos, tmp_path, features):
    words = [f"encoder={tuned}", f"images={photos}", f"features={features}", f"out={tmp_path}/f.npz",
             "data.test_crop=1", "data.num_workers=0", "trainer=cpu"]  # fmt: skip
    embed(compose_config("embed", words, output_dir=tmp_path))
    found = torch.from_numpy(np.load(tmp_path / "f.npz")["features"])
    encoder, metadata = load_encoder(tuned).eval(), read_encoder_weights(tuned)[1]
    mean, std = (torch.tensor(metadata[key]).view(-1, 1, 1) for key in ("mean", "std"))
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted(photos.iterdir())])
    with torch.no_grad():
        inputs = (images.permute(0, 3, 1, 2) / 255 - mean) / std
        expected = encoder.pooled(inputs) if features == "pooled" else encoder(inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_it_is_drawn_told_and_planned(pretrained, photos, tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert reconstruct(
            compose_config("reconstruct", [f"encoder={pretrained}", f"images={photos}"], output_dir=tmp_path)
        ).exists()
        inspect(compose_config("inspect", [f"encoder={pretrained}"], output_dir=tmp_path))
        rows = plan(compose_config("plan", [*VIT, "trainer.device_memory_gb=1"], output_dir=tmp_path))
    assert "a Vision Transformer of no published size" in caplog.text
    assert "position bias shared_table" in caplog.text
    assert {row["attention"] for row in rows} == {"reference", "sdpa"} and all(row["stage 1"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("command", "words", "line"),
    [
        ("pretrain", ["experiment=debug"], "holds a Vision Transformer, and the model is a Swin"),
        ("finetune", ["model=swinv2_t"], "holds a Vision Transformer, and the model is a Swin Transformer"),
        ("finetune", ["data.image_size=48"], "does not fit model.patch_size=8 and model.window_size=4: the nearest"),
        ("pretrain", [*VIT, "model.position_bias=table", "model.layer_scale=0"], r"layer_scale=0.1 \(model: 0\); 4"),
        ("pretrain", [*VIT, "model.pretrained_window_size=4"], "model.pretrained_window_size=4 is nothing that"),
        ("plan", [*VIT, "data.image_size=64", "trainer.device_memory_gb=1"], "image size 64x64 px does not fit"),
        ("export", ["format=timm", "out={folder}/timm"], "format=timm is not written of a Vision Transformer: give"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(pretrained, tmp_path, command, words, line):
    run = {"pretrain": pretrain, "finetune": finetune, "plan": plan, "export": export}[command]
    words = [*words, f"encoder={pretrained}"]
    with pytest.raises(ValueError, match=line) as caught:
        run(compose_config(command, [word.format(folder=tmp_path) for word in words], output_dir=tmp_path / "run"))
    assert "\n" not in str(caught.value)
