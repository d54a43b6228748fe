"""What is Swin V1's own in the commands; what all encoders share is in test_encoder_runs.py."""

import pytest
import torch

from simmim.config import compose_config
from simmim.encoders import SwinTransformerV2
from simmim.encoders.encoder_files import read_encoder_weights
from simmim.encoders.table_resizing import move_table
from simmim.encoders.weights import load_encoder, load_encoder_weights
from simmim.export import export
from simmim.finetune import finetune
from simmim.inspect import inspect
from simmim.pretrain import pretrain

V1 = ["experiment=debug", "model.norm=pre", "model.attention_similarity=dot", "model.position_bias=table",
      "model.table_resizing=geometric"]  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swin") / "run"
    pretrain(compose_config("pretrain", [*V1, "trainer.max_steps=4", "pictures=1"], output_dir=folder))
    return folder


def test_its_file_rebuilds_it(pretrained):
    encoder = load_encoder(pretrained)
    assert (encoder.config["norm"], encoder.config["attention_similarity"]) == ("pre", "dot")
    assert encoder.blocks[0][0].attention.logit_scale is None
    assert read_encoder_weights(pretrained)[1]["config"]["position_bias"] == "table"


def test_fine_tuning_moves_its_table_to_a_larger_window(pretrained, tmp_path, caplog):
    """In the way that its file says, unless it is told another one."""
    words = [f"encoder={pretrained}", "data.image_size=64", "model.window_size=8", "trainer.max_steps=2", "trainer=cpu",
             "data.train_images=16", "data.val_images=4", "data.batch_size=4", "data.num_workers=0",
             "optimizer.base_lr=1e-12"]  # fmt: skip
    key = "stages.0.0.attention.position_bias.table"
    before = load_encoder(pretrained).state_dict()[key]
    for resizing, override in (("geometric", []), ("bicubic", ["model.table_resizing=bicubic"])):
        caplog.clear()
        with caplog.at_level("INFO"):
            finetune(compose_config("finetune", [*words, *override], output_dir=tmp_path / resizing))
        assert f"4 position tables were moved, {resizing}." in caplog.text
        tuned = load_encoder(tmp_path / resizing)
        assert (tuned.config["norm"], tuned.config["table_resizing"]) == ("pre", resizing)
        expected = move_table(before, (4, 4), (8, 8), window_size=8, resizing=resizing)
        torch.testing.assert_close(tuned.state_dict()[key], expected, atol=1e-6, rtol=0)


def test_weights_of_one_version_are_no_weights_of_the_other(pretrained, tmp_path):
    words = ["experiment=debug", f"encoder={pretrained}"]
    with pytest.raises(ValueError, match=r"was trained with model\.position_bias=table, and the model has log_cpb"):
        pretrain(compose_config("pretrain", words, output_dir=tmp_path))


def test_it_is_shown_for_what_it_is(pretrained, tmp_path, caplog):
    with caplog.at_level("INFO"):
        inspect(compose_config("inspect", [f"encoder={pretrained}"], output_dir=tmp_path))
    assert "norm pre, attention_similarity dot" in caplog.text


def test_it_goes_to_others_and_comes_back(pretrained, tmp_path, caplog):
    """Its key has no bias: theirs is zero, and reading leaves it out. Of tables only what no window reaches is lost."""
    words = [f"encoder={pretrained}", "format=official", f"out={tmp_path}/there/swin.pth"]
    out = export(compose_config("export", words, output_dir=tmp_path / "run"))
    assert "a Swin Transformer V1 pretrained with SimMIM" in (out.parent / "MODEL_CARD.md").read_text()
    with caplog.at_level("INFO"):
        inspect(compose_config("inspect", [f"encoder={out}"], output_dir=tmp_path))
    assert "bias of keys was left out" in caplog.text and "norm pre, attention_similarity dot" in caplog.text
    ours, theirs = (load_encoder(path).eval() for path in (pretrained, out))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(images), theirs(images))
    moved = []
    for path in (pretrained, out):
        larger = SwinTransformerV2(**ours.config | {"window_size": 8})
        load_encoder_weights(larger, path, image_size=(64, 64))
        moved.append(larger.state_dict())
    assert all(torch.equal(value, moved[1][key]) for key, value in moved[0].items())
