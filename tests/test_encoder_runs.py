"""Every encoder goes the same way: pretrained, resumed, fine-tuned on larger images, judged, and exported."""

import pytest
import torch

from simmim.config import compose_config
from simmim.encoders.encoder_files import read_encoder_weights
from simmim.encoders.weights import load_encoder
from simmim.evaluate import evaluate
from simmim.export import export
from simmim.exporting import FORMATS
from simmim.finetune import finetune
from simmim.pretrain import pretrain

V1 = ["model.norm=pre", "model.attention_similarity=dot", "model.position_bias=table", "model.table_resizing=geometric"]
VIT = ["model=vit_s", "model.depths=[2]", "model.embed_dim=24", "model.num_heads=[3]", "model.patch_size=8",
       "model.window_size=4", "masking.patch_size=16"]  # fmt: skip
ENCODERS = {
    "swinv2": ([], ["data.image_size=64", "model.window_size=8"]),
    "swin": (V1, ["data.image_size=64", "model.window_size=8"]),
    "vit": (VIT, ["data.image_size=48", "model.window_size=6", "model.position_bias=table"]),
}
"""What it is pretrained as, and what its fine-tuning changes."""

SHORT = ["experiment=debug", "trainer.max_steps=4", "pictures=1", "checkpoint.every_n_steps=2", "checkpoint.keep=null",
         "model.drop_path=0.3"]  # fmt: skip
FEW = ["trainer=cpu", "data.train_images=16", "data.val_images=12", "data.batch_size=4", "data.num_workers=0"]


@pytest.fixture(scope="module", params=ENCODERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pretrained(name, tmp_path_factory):
    folder = tmp_path_factory.mktemp(name) / "run"
    pretrain(compose_config("pretrain", [*SHORT, *ENCODERS[name][0]], output_dir=folder))
    return folder


@pytest.fixture(scope="module")
def tuned(name, pretrained, tmp_path_factory):
    """The run, and its summary."""
    folder = tmp_path_factory.mktemp(name) / "tuned"
    words = [*FEW, *ENCODERS[name][1], f"encoder={pretrained}", "trainer.max_steps=2"]
    return folder, finetune(compose_config("finetune", words, output_dir=folder))


def test_its_file_rebuilds_it(pretrained):
    file, checkpoint = pretrained, pretrained / "checkpoints" / "step_0000004.ckpt"
    assert read_encoder_weights(file)[1] == read_encoder_weights(checkpoint)[1]
    images = torch.randn(2, 3, 32, 32)
    ours, theirs = (load_encoder(path).eval()(images) for path in (file, checkpoint))
    assert torch.equal(ours, theirs) and ours.std() > 0.1


def test_a_resumed_run_is_the_run_that_never_stopped(name, pretrained, tmp_path):
    half = f"resume={pretrained}/checkpoints/step_0000002.ckpt"
    pretrain(compose_config("pretrain", [*SHORT, *ENCODERS[name][0], half], output_dir=tmp_path))
    ours, theirs = (load_encoder(folder).state_dict() for folder in (tmp_path, pretrained))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_it_is_judged_as_it_was_fine_tuned(name, tuned, tmp_path):
    folder, summary = tuned
    words = [*FEW, *ENCODERS[name][1], f"encoder={folder}", "trainer.max_epochs=0"]
    again = finetune(compose_config("finetune", words, output_dir=tmp_path / "again"))
    assert again["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    result = evaluate(compose_config("evaluate", [f"encoder={folder}", *FEW], output_dir=tmp_path / "judged"))
    assert result["top1"] == pytest.approx(summary["val_top1"])


@pytest.mark.parametrize("form", ["official", "safetensors"])
@pytest.mark.parametrize("stage", ["pretrained", "tuned"])
def test_it_is_exported_and_read_back(pretrained, tuned, tmp_path, caplog, form, stage):
    """The command itself compares features, and logits, and the weights bit by bit."""
    encoder = {"pretrained": pretrained, "tuned": tuned[0]}[stage]
    out = tmp_path / f"there{FORMATS[form].ending}"
    with caplog.at_level("INFO"):
        export(compose_config("export", [f"encoder={encoder}", f"format={form}", f"out={out}"], output_dir=tmp_path))
    assert "differs in features" in caplog.text and "the same bit by bit" in caplog.text
    assert ("logits" in caplog.text) == (stage == "tuned")
    assert (tmp_path / "MODEL_CARD.md").exists()
