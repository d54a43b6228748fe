"""A Vision Transformer in the authors' layout: made of timm's BEiT, whose names are the same, with what SimMIM adds."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.beit import Beit
from torch import Tensor

from simmim.encoders.encoder_files import read_encoder_weights
from simmim.encoders.released_vit import to_simmim
from simmim.encoders.weights import load_encoder, load_encoder_weights
from simmim.reconstruct import load_pretraining

SHAPE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3,
                         "use_abs_pos_emb": False}  # fmt: skip


def beit(**settings: Any) -> Beit:
    network = Beit(**{**SHAPE, "num_classes": 0, "global_pool": "", "init_values": 0.1, **settings})
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.3 * noise + 0.2)
    return network.eval()


def released(network: Beit) -> dict[str, Tensor]:
    """What SimMIM's pretraining writes."""
    state = {f"encoder.{key}": value.clone() for key, value in network.state_dict().items()}
    index = {"encoder.rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.long)}
    token = {"encoder.mask_token": torch.randn(1, 1, 24)}
    return state | index | token | {"decoder.0.weight": torch.randn(192, 24, 1, 1), "decoder.0.bias": torch.randn(192)}


@pytest.fixture
def pretrained(tmp_path: Path) -> tuple[Beit, Path]:
    network = beit(use_shared_rel_pos_bias=True)
    torch.save({"model": released(network), "epoch": 799}, tmp_path / "vit.pth")
    return network, tmp_path / "vit.pth"


def test_what_simmim_pretrained(pretrained: tuple[Beit, Path]) -> None:
    network, file = pretrained
    weights, known = read_encoder_weights(file)
    assert (known["architecture"], known["image_size"], known["windows"]) == ("vit", [32, 32], [[4, 4]])
    assert known["config"] == {
        "embed_dim": 24, "depths": [2], "num_heads": [3], "window_size": 4, "patch_size": 8, "in_channels": 3,
        "drop_path": 0.0, "attention": "auto", "position_bias": "shared_table", "layer_scale": 0.1,
        "table_resizing": "geometric",
    }  # fmt: skip
    assert [note.split()[1] for note in known["notes"]] == ["buffers", "decoder"]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = load_encoder(file).eval()(images).flatten(1, 2)
        torch.testing.assert_close(features, network.forward_features(images)[:, 1:], atol=1e-5, rtol=0)
    theirs = torch.load(file, weights_only=True)["model"]
    back = to_simmim(weights)
    assert back.keys() == {key.removeprefix("encoder.") for key in theirs if key.startswith("encoder.")} - {
        "rel_pos_bias.relative_position_index"
    }
    assert all(torch.equal(value, theirs[f"encoder.{key}"]) for key, value in back.items())


def test_its_decoder_predicts_what_it_did(pretrained: tuple[Beit, Path]) -> None:
    task = load_pretraining(pretrained[1], target="raw")
    state = torch.load(pretrained[1], weights_only=True)["model"]
    assert torch.equal(task.network.head.weight, state["decoder.0.weight"].flatten(1))
    assert task.network.side == 8


def test_what_was_fine_tuned(tmp_path: Path) -> None:
    """Each block has its table; the norm stands behind the mean, and there is no mask token."""
    network = beit(use_rel_pos_bias=True, num_classes=5, global_pool="avg")
    torch.save({"model": network.state_dict()}, tmp_path / "tuned.pth")
    known = read_encoder_weights(tmp_path / "tuned.pth")[1]
    assert known["config"]["position_bias"] == "table" and known["classes"] == list("01234")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled = load_encoder(tmp_path / "tuned.pth").eval().pooled(images)
        logits = torch.nn.functional.linear(pooled, known["head"]["weight"], known["head"]["bias"])
        torch.testing.assert_close(logits, network(images), atol=1e-5, rtol=0)


def test_a_classifier_of_the_class_token_is_left_out(tmp_path: Path) -> None:
    """Ours looks at the mean of the patches, and would recognise nothing with it."""
    torch.save(beit(use_rel_pos_bias=True, num_classes=5, global_pool="token").state_dict(), tmp_path / "token.pth")
    known = read_encoder_weights(tmp_path / "token.pth")[1]
    assert (known["head"], known["classes"]) == (None, None)
    assert any("classifier was left out: it looks at the class token" in note for note in known["notes"])


def test_a_folder_says_how_its_images_were_made(tmp_path: Path) -> None:
    """As timm writes it; what BEiT predicts visual words with is no part of the encoder."""
    network = beit(use_rel_pos_bias=True, num_classes=2, global_pool="avg")
    save_file(network.state_dict() | {"lm_head.weight": torch.zeros(9, 24)}, tmp_path / "model.safetensors")
    images = {"mean": [0.5] * 3, "std": [0.4] * 3, "interpolation": "bicubic", "crop_pct": 0.9}
    config = {"architecture": "beit", "label_names": ["cat", "dog"], "pretrained_cfg": images}
    (tmp_path / "config.json").write_text(json.dumps(config))
    known = read_encoder_weights(tmp_path)[1]
    assert (known["classes"], known["mean"], known["test_crop"]) == (["cat", "dog"], [0.5] * 3, 0.9)


def test_all_parameters_can_be_sharded(pretrained: tuple[Beit, Path]) -> None:
    """FSDP2 takes no views whose numbers lie apart, as a table's that was turned."""
    encoder = load_encoder(pretrained[1])
    assert not all(parameter.is_contiguous() for parameter in read_encoder_weights(pretrained[1])[0].values())
    load_encoder_weights(encoder, pretrained[1], image_size=(32, 32))
    assert all(parameter.is_contiguous() for parameter in encoder.parameters())


def test_a_pretrained_one_begins_a_fine_tuning(pretrained: tuple[Beit, Path]) -> None:
    encoder = load_encoder(pretrained[1])
    tuned = type(encoder)(**encoder.config | {"position_bias": "table", "window_size": 6})
    report = load_encoder_weights(tuned, pretrained[1], image_size=(48, 48))
    assert "named as the authors' code does, trained at 32x32 px with windows of 4x4 tokens" in report


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"encoder.blocks.1.norm1.weight": None}, "1 of its tensors are not those of a Vision Transformer"),
        ({"encoder.blocks.0.attn.k_norm.weight": torch.zeros(8)}, "blocks.0.attn.k_norm.weight is nothing that SimMIM"),
        ({"encoder.rel_pos_bias.relative_position_bias_table": torch.zeros(38, 3)}, "of 38 rows is for maps"),
        ({"encoder.pos_embed": torch.zeros(1, 17, 24)}, "it holds a Vision Transformer"),
    ],
)  # fmt: skip
def test_others_are_refused_in_one_line(
    pretrained: tuple[Beit, Path], tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    state = torch.load(pretrained[1], weights_only=True)["model"] | change
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=line) as caught:
        read_encoder_weights(tmp_path / "other.pth")
    assert "\n" not in str(caught.value)
