"""Commands take over what others released: what a file says by itself, and what one must give."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2
from transformers import Swinv2Config, Swinv2ForImageClassification

from simmim.config import compose_config, image_size_of
from simmim.data.decoding import decode
from simmim.data.transforms import centre_transform
from simmim.embed import embed
from simmim.encoders.encoder_files import read_encoder_weights
from simmim.encoders.weights import load_encoder
from simmim.evaluate import evaluate
from simmim.finetune import build
from simmim.pretrain import pretrain
from simmim.stages import USUAL, fill_in, load_classifier

SHAPE: dict[str, Any] = {"embed_dim": 8, "depths": (1, 2, 1), "num_heads": (1, 1, 2)}
WNIDS = ["n01440764", "n01443537", "n01484850"]
QUIET = ["data.num_workers=0", "trainer=cpu"]


def config_of(command: str, out: Path, *words: str) -> dict[str, Any]:
    return compose_config(command, [*QUIET, *words], output_dir=out)


@pytest.fixture(scope="module")
def network() -> TimmSwinV2:
    torch.manual_seed(0)
    network = TimmSwinV2(img_size=64, window_size=8, num_classes=3, **SHAPE)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    return network.eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for label, name in enumerate(WNIDS):
        (folder / name).mkdir()
        for number in range(5):
            noise = np.random.default_rng(10 * label + number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((72, 72)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def of_timm(network: TimmSwinV2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare state dict: neither windows nor image size."""
    path = tmp_path_factory.mktemp("timm") / "weights"
    save_file(network.state_dict(), path)
    return path


GEOMETRY = ("model.window_size=8", "model.pretrained_window_size=[8,8,4]", "data.image_size=64")


def normalized(folder: Path) -> tuple[torch.Tensor, list[int]]:
    """All images as validation crops them, and their labels in the order of the folders."""
    files = sorted(folder.rglob("*.png"))
    transform = centre_transform((64, 64), share=0.875, interpolation="bicubic")
    pixels = torch.stack([transform(decode(file.read_bytes(), 3)) for file in files]).float() / 255
    mean, std = (torch.tensor(USUAL[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std, [WNIDS.index(file.parent.name) for file in files]


@torch.no_grad()
def test_a_released_classifier_is_evaluated(
    network: TimmSwinV2, of_timm: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What has numbers for its classes takes as many folders in their order."""
    caplog.set_level("INFO")
    words = (f"encoder={of_timm}", "data=folder", f"data.root={images}", *GEOMETRY)
    result = evaluate(config_of("evaluate", tmp_path, *words))
    pixels, labels = normalized(images)
    logits = network(pixels)
    hits = (logits.argmax(dim=1) == torch.tensor(labels)).float().mean()
    assert result["top1"] == pytest.approx(float(hits))
    assert result["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels))), rel=1e-4
    )
    assert "3 folders in their order, taken as the classes of the model" in caplog.text
    assert "named as timm does" in caplog.text and "The mask token starts anew: it has none." in caplog.text


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ((), "give model.window_size=<tokens> model.pretrained_window_size=<tokens, one"),
        (GEOMETRY[:1], "give model.pretrained_window_size=<tokens, one"),
        (GEOMETRY[:2], "give data.image_size=<px>"),
    ],
)
@pytest.mark.parametrize("command", ["embed", "evaluate", "finetune"])
def test_what_a_file_does_not_say_is_asked_for(
    command: str, given: tuple[str, ...], asked: str, of_timm: Path, tmp_path: Path
) -> None:
    words = (f"encoder={of_timm}", *(("images=nowhere",) if command == "embed" else ()), *given)
    config = config_of(command, tmp_path, *words)
    with pytest.raises(ValueError, match=f"^encoder={of_timm}, named as timm does, does not say") as caught:
        fill_in(config, read_encoder_weights(of_timm)[1])
    assert asked in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).count("=<") == 3 - len(given)


@torch.no_grad()
def test_features_are_embedded(network: TimmSwinV2, of_timm: Path, images: Path, tmp_path: Path) -> None:
    words = (f"encoder={of_timm}", f"images={images}", *GEOMETRY)
    features = np.load(embed(config_of("embed", tmp_path, *words)))["features"]
    transform = centre_transform((64, 64), share=0.875, interpolation="bicubic")
    files = sorted(images.rglob("*.png"))
    pixels = torch.stack([transform(decode(file.read_bytes(), 3)) for file in files]).float() / 255
    mean, std = (torch.tensor(USUAL[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = network.forward_features((pixels - mean) / std).mean(dim=(1, 2))
    torch.testing.assert_close(torch.from_numpy(features), expected, atol=1e-4, rtol=1e-4)


def test_pretraining_goes_on_from_them(network: TimmSwinV2, of_timm: Path, tmp_path: Path) -> None:
    model = ["model=swinv2", "model.embed_dim=8", "model.depths=[1,2,1]", "model.num_heads=[1,1,2]"]
    words = [*model, "model.extra_norm_every=0", "model.window_size=8", "data.image_size=64", "data.batch_size=2"]
    words += [f"encoder={of_timm}", "masking.patch_size=16", "data.train_images=4", "data.val_images=2", "pictures=1"]
    words += ["trainer.max_steps=1", "trainer.max_epochs=1", "optimizer.base_lr=1e-30", "schedule.warmup_epochs=0"]
    with pytest.raises(ValueError, match=r"does not say how it was trained: give model\.pretrained_window_size="):
        pretrain(config_of("pretrain", tmp_path / "1", *words))
    pretrain(config_of("pretrain", tmp_path / "2", *words, "model.pretrained_window_size=[8,8,4]"))
    loaded = load_encoder(tmp_path / "2").state_dict()
    torch.testing.assert_close(loaded["merges.0.reduction.weight"], network.layers[1].downsample.reduction.weight)


def test_fine_tuning_takes_what_a_folder_of_transformers_says(images: Path, tmp_path: Path) -> None:
    config = Swinv2Config(image_size=64, window_size=4, pretrained_window_sizes=[2, 2, 2], num_labels=3, **SHAPE)
    theirs = Swinv2ForImageClassification(config)
    theirs.save_pretrained(tmp_path / "theirs")
    known = read_encoder_weights(tmp_path / "theirs")[1]
    words = (f"encoder={tmp_path / 'theirs'}", "data=folder", f"data.root={images}", "data.val_fraction=0.4")
    filled = fill_in(config_of("finetune", tmp_path, *words, "data.image_size=128", "model.window_size=8"), known)
    assert filled["model"]["pretrained_window_size"] == [2, 2, 2]
    task, _, _ = build(filled)
    reports = load_classifier(task, tmp_path / "theirs", known, image_size=image_size_of(filled))
    assert "trained at 64x64 px with windows of 4x4, 4x4, 4x4 tokens" in reports[0]
    assert "starts anew" in reports[1]  # 0, 1, 2 are not the names of these folders
    weight = theirs.swinv2.encoder.layers[0].downsample.reduction.weight
    assert torch.equal(task.network.encoder.merges[0].reduction.weight, weight)
