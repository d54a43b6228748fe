"""What `simmim.inspect` says of files is true, in words of one line each."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2

from simmim.config import compose_config
from simmim.encoders import create_encoder
from simmim.encoders.encoder_files import save_encoder
from simmim.encoders.names import to_official
from simmim.inspect import command, inspect
from simmim.pretrain import pretrain

SMALL: dict[str, Any] = {"embed_dim": 16, "depths": [1, 2, 1, 1], "num_heads": [2, 2, 4, 8], "extra_norm_every": 0}


def said_of(path: Path) -> dict[str, Any]:
    return inspect(compose_config("inspect", [f"encoder={path}"], output_dir=Path("unused")))


def test_an_encoder_file_of_ours(tmp_path: Path) -> None:
    encoder = create_encoder("swinv2", **SMALL, window_size=12, pretrained_window_size=6, in_channels=4)
    head, statistics = torch.nn.Linear(128, 4).state_dict(), {"mean": [0.5] * 4, "std": [0.25] * 4}
    save_encoder(
        encoder, tmp_path / "e", image_size=(192, 384), head=head, classes=["a", "b", "c", "d"], test_crop=0.875,
        interpolation="bicubic", **statistics,
    )  # fmt: skip
    said = said_of(tmp_path / "e")
    assert said["file"][0].endswith(", safetensors, named as simmim does")
    assert said["encoder"][0].startswith("a Swin Transformer of no published size, ")
    assert said["encoder"][1].endswith("heads 2, 2, 4, 8, patches of 4 px, 4 channels")
    assert said["trained"][0] == "at 192x384 px, windows of 12x12, 12x12, 12x12, 6x12 tokens"
    assert said["trained"][1].endswith("log_cpb, which counts in windows of 6x6, 6x6, 6x6, 6x6 tokens")
    assert said["images"] == [
        "mean 0.5, 0.5, 0.5, 0.5, std 0.25, 0.25, 0.25, 0.25, validated on the middle 87.5%, resized bicubic"
    ]
    assert said["classifier"] == ["4 classes: a, b, c, …"]
    assert said["missing"] == said["notes"] == said["run"] == []


@pytest.mark.parametrize(("name", "parameters"), [("swinv2_t", "27.6"), ("swinv2_b", "86.9")])
def test_published_sizes_have_their_names(name: str, parameters: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        state = create_encoder(name, window_size=8).state_dict()
    empty = {key: torch.empty(1, dtype=torch.float16).expand(value.shape) for key, value in state.items()}
    torch.save({"model": {key: value for key, value in to_official(empty).items()}}, tmp_path / "released.pth")
    said = said_of(tmp_path / "released.pth")
    assert said["encoder"][0] == f"{name}, {parameters} M parameters, float16"
    assert said["file"][0].endswith("a PyTorch file, named as the authors' code does")


def test_what_is_missing_is_asked_for_by_its_key(tmp_path: Path) -> None:
    network = TimmSwinV2(img_size=64, window_size=8, num_classes=5, **{k: SMALL[k] for k in list(SMALL)[:3]})
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    said = said_of(tmp_path / "timm.pth")
    assert [line.split("=")[0] for line in said["missing"]] == [
        "give model.window_size", "give model.pretrained_window_size", "give data.image_size",
    ]  # fmt: skip
    assert said["trained"][0] == "at an unknown image size, with unknown windows"
    assert said["classifier"] == ["5 classes: 0, 1, 2, …"]
    assert any("mask token starts anew" in note for note in said["notes"])


def test_a_run_folder_and_its_checkpoint(tmp_path: Path) -> None:
    words = ["experiment=debug", "trainer.max_steps=2", "trainer.max_epochs=1", "data.num_workers=0", "pictures=1"]
    pretrain(compose_config("pretrain", words, output_dir=tmp_path))
    said = said_of(tmp_path)
    assert said["run"][0].endswith("with checkpoints of the steps 2")
    assert said["decoder"] == ["none"]
    of_checkpoint = said_of(tmp_path / "checkpoints" / "step_0000002.ckpt")
    assert of_checkpoint["decoder"] == ["a linear head that predicts raw pixels"]
    assert of_checkpoint["file"][0].endswith("a PyTorch file, named as simmim does")
    for word in ("encoder", "trained", "images", "classifier"):
        assert of_checkpoint[word] == said[word]


def test_the_command_takes_a_path_and_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"cls_token": torch.zeros(1)}, tmp_path / "vit.pth")
    monkeypatch.setattr(sys, "argv", ["inspect", "vit.pth"])
    with pytest.raises(SystemExit) as caught:
        command(inspect, positional="encoder")()
    assert caught.value.code == 1
    out = capsys.readouterr()
    assert "encoder=vit.pth: it holds a Vision Transformer (ViT)" in out.out + out.err
