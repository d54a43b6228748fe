"""Files that others wrote, read by their content: features and logits are theirs, and nothing is guessed.

timm, transformers and torchvision write the files themselves, with random weights. The authors' layout is made of
timm's network, whose function is the same: mergings one stage lower, and the buffers that the authors' code stores.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_image
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.transforms.v2.functional import resize
from transformers import (
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    Swinv2Config,
    Swinv2ForImageClassification,
    Swinv2ForMaskedImageModeling,
    Swinv2Model,
)

from simmim.encoders import swin
from simmim.encoders.encoder_files import read_encoder_weights
from simmim.encoders.names import to_official, to_timm, to_torchvision, to_transformers
from simmim.encoders.table_resizing import middle_of
from simmim.encoders.weights import load_encoder, unsaid

SHAPE: dict[str, Any] = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (2, 2, 4, 8)}
PRETRAINED = (12, 12, 12, 6)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def photos(shared_data: Path) -> Tensor:
    files = sorted((shared_data / "imagenet-samples").glob("*.JPEG"))[:2]
    images = [resize(decode_image(str(file), ImageReadMode.RGB), [256, 256]) for file in files]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.stack(images) / 255 - mean[:, None, None]) / std[:, None, None]


def randomized(network: nn.Module) -> nn.Module:
    """Nothing zero or one, so that every weight shows in the features."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "logit_scale" in name:
            noise = math.log(10) + 0.5 * noise
        elif parameter.ndim >= 2 and parameter.shape[-1] != 2:
            noise = noise * (3 if parameter.shape[-1] == 512 else 1) / math.sqrt(parameter[0].numel())
        elif "norm" in name and name.endswith("weight"):
            noise = 0.6 + 0.2 * noise
        else:
            noise = 0.2 * noise
        parameter.data.copy_(noise)
    return network.eval()


def timm_network(size: int = 256, window: int = 16, trained: Any = PRETRAINED, classes: int = 7) -> TimmSwinV2:
    settings = {"window_size": window, "pretrained_window_sizes": trained or (0, 0, 0, 0), "num_classes": classes}
    network = randomized(TimmSwinV2(img_size=size, **settings, **SHAPE))
    assert isinstance(network, TimmSwinV2)
    return network


def first_timm_network(size: int, window: int, classes: int = 7) -> TimmSwin:
    network = randomized(TimmSwin(img_size=size, window_size=window, num_classes=classes, **SHAPE))
    assert isinstance(network, TimmSwin)
    return network


def official(
    network: TimmSwin | TimmSwinV2, *, simmim: bool = False, old: bool = False, buffers: bool = True
) -> dict[str, Tensor]:
    """A state dict in the authors' layout; SimMIM's has a prefix, a mask token and a decoder, older ones rpe_mlp."""
    state = {key: value.clone() for key, value in network.state_dict().items()}
    for stage in range(1, 4):
        for leaf in ("reduction.weight", "norm.weight", "norm.bias"):
            state[f"layers.{stage - 1}.downsample.{leaf} "] = state.pop(f"layers.{stage}.downsample.{leaf}")
    state = {key.strip().replace("head.fc.", "head."): value for key, value in state.items()}
    for stage, layer in enumerate(network.layers if buffers else ()):
        for number, block in enumerate(layer.blocks):
            place = f"layers.{stage}.blocks.{number}."
            for name, buffer in block.attn.named_buffers():
                if name != "k_bias":
                    state[f"{place}attn.{name}"] = buffer.clone()
            if block.attn_mask is not None:
                state[f"{place}attn_mask"] = block.attn_mask.clone()
    if old:
        state = {key.replace("cpb_mlp", "rpe_mlp"): value for key, value in state.items()}
    if simmim:
        state = {f"encoder.{key}": value for key, value in state.items() if not key.startswith("head.")}
        state["encoder.mask_token"] = torch.randn(1, 1, 16)
        state |= {"decoder.0.weight": torch.randn(3072, 128, 1, 1), "decoder.0.bias": torch.randn(3072)}
    return state


def features_of(path: Path, images: Tensor, **settings: Any) -> Tensor:
    with torch.no_grad():
        return load_encoder(path, **settings).eval()(images)  # type: ignore[no-any-return]


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


OFFICIAL_FILES = {
    "classifier": lambda state: {"model": state},
    "bare": lambda state: state,
    "training": lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 299, "max_accuracy": 81.8},
    "parallel": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
}


@pytest.mark.parametrize("kind", OFFICIAL_FILES)
@pytest.mark.parametrize("name", ["released.pth", "released.bin", "renamed.safetensors"])
def test_the_authors_classifiers(kind: str, name: str, tmp_path: Path, photos: Tensor) -> None:
    network = timm_network()
    torch.save(OFFICIAL_FILES[kind](official(network)), tmp_path / name)
    known = read_encoder_weights(tmp_path / name)[1]
    assert known["origin"] == "the authors' code"
    assert (known["image_size"], known["windows"]) == ([256, 256], [[16, 16], [16, 16], [16, 16], [8, 8]])
    assert known["config"]["pretrained_window_size"] == list(PRETRAINED)
    assert known["classes"] == [str(number) for number in range(7)]
    assert torch.equal(known["head"]["weight"], network.head.fc.weight)
    assert unsaid(known) == {}
    if kind == "classifier":
        with torch.no_grad():
            assert_near(features_of(tmp_path / name, photos), network.forward_features(photos))


@pytest.mark.parametrize("old", [False, True])
def test_the_authors_pretrained_encoders(old: bool, tmp_path: Path, photos: Tensor) -> None:
    """SimMIM's, at 192 px with windows of 12: those of the last stage shrink to 6."""
    network, images = timm_network(192, 12, None), photos[..., :192, :192]
    state = official(network, simmim=True, old=old)
    torch.save({"model": state, "epoch": 799}, tmp_path / "simmim_pretrain.pth")
    weights, known = read_encoder_weights(tmp_path / "simmim_pretrain.pth")
    assert (known["image_size"], known["windows"]) == ([192, 192], [[12, 12], [12, 12], [12, 12], [6, 6]])
    assert known["config"]["pretrained_window_size"] is None
    assert torch.equal(weights["mask_token"], state["encoder.mask_token"].flatten())
    assert (known["head"], known["classes"]) == (None, None)
    assert "decoder" in " ".join(known["notes"]) and "mask token" not in " ".join(known["notes"])
    with torch.no_grad():
        assert_near(features_of(tmp_path / "simmim_pretrain.pth", images), network.forward_features(images))


def without_key_biases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {key: value.clone() for key, value in state.items()}
    for key, value in state.items():
        if key.endswith("qkv.bias"):
            value.chunk(3)[1].zero_()
        elif key.endswith("key.bias"):
            value.zero_()
    return state


def cut_to_windows(weights: dict[str, Tensor], windows: list[list[int]]) -> dict[str, Tensor]:
    """Tables as large as the windows that they were trained with."""
    return {
        key: middle_of(value, (windows[int(key.split(".")[1])][0],) * 2) if key.endswith("table") else value
        for key, value in weights.items()
    }


@pytest.mark.parametrize(("size", "window", "simmim"), [(224, 7, False), (192, 6, True), (192, 12, True)])
def test_the_authors_first_version(size: int, window: int, simmim: bool, tmp_path: Path, photos: Tensor) -> None:
    """Supervised, and as SimMIM pretrained Swin-B and Swin-L, whose last window shrinks: key biases change nothing."""
    network, images = first_timm_network(size, window), photos[..., :size, :size]
    state = official(network, simmim=simmim)
    torch.save({"model": state}, tmp_path / "swin.pth")
    weights, known = read_encoder_weights(tmp_path / "swin.pth")
    windows = [[min(window, size // stride)] * 2 for stride in (4, 8, 16, 32)]
    assert (known["origin"], known["image_size"], known["windows"]) == ("the authors' code", [size, size], windows)
    assert swin.V1.items() <= known["config"].items() and unsaid(known) == {}
    assert (known["config"]["window_size"], known["config"]["table_resizing"]) == (window, "geometric")
    assert "bias of keys was left out" in " ".join(known["notes"])
    assert ("mask token" in " ".join(known["notes"]), known["decoder"] is None) == (not simmim, not simmim)
    with torch.no_grad():
        assert_near(features_of(tmp_path / "swin.pth", images), network.forward_features(images))
    theirs = {key.removeprefix("encoder."): value for key, value in without_key_biases(state).items()}
    ours = to_official(cut_to_windows(weights, windows))
    lost = set() if simmim else {"mask_token"}
    assert ours.keys() - theirs.keys() == lost
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() - lost)
    assert {
        key.rpartition(".")[2] for key in theirs if key not in ours and not key.startswith(("head", "decoder"))
    } == {
        "relative_position_index",
        "attn_mask",
    }


def test_a_file_without_buffers_asks_for_what_it_does_not_say(tmp_path: Path, photos: Tensor) -> None:
    network = timm_network()
    torch.save({"model": official(network, buffers=False)}, tmp_path / "bare.pth")
    known = read_encoder_weights(tmp_path / "bare.pth")[1]
    keys = ["model.window_size", "model.pretrained_window_size", "data.image_size"]
    assert list(unsaid(known)) == keys
    with pytest.raises(ValueError, match=r"how it was trained: give model\.window_size=<tokens> model\.pretrained_win"):
        load_encoder(tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"give model\.pretrained_window_size="):
        load_encoder(tmp_path / "bare.pth", window_size=16)
    given = {"window_size": 16, "pretrained_window_size": PRETRAINED}
    with torch.no_grad():
        assert_near(features_of(tmp_path / "bare.pth", photos, **given), network.forward_features(photos))


def test_windows_alone_do_not_pass_for_those_that_offsets_count_in(tmp_path: Path) -> None:
    state = {key: value for key, value in official(timm_network()).items() if "coords_table" not in key}
    torch.save(state, tmp_path / "part.pth")
    known = read_encoder_weights(tmp_path / "part.pth")[1]
    assert known["image_size"] == [256, 256]
    assert (known["config"]["window_size"], known["config"]["pretrained_window_size"]) == (16, None)
    assert list(unsaid(known)) == ["model.pretrained_window_size"]


def test_timms_state_dicts(tmp_path: Path, photos: Tensor) -> None:
    network = timm_network(256, 8, None)
    torch.save(network.state_dict(), tmp_path / "network.pth")
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    for name in ("network.pth", "network.safetensors"):
        weights, known = read_encoder_weights(tmp_path / name)
        assert known["origin"] == "timm" and len(unsaid(known)) == 3
        assert torch.equal(known["head"]["bias"], network.head.fc.bias)
        assert "mask token starts anew" in " ".join(known["notes"])
        theirs = {key: value for key, value in network.state_dict().items() if not key.startswith("head.")}
        assert_equal(to_timm(weights), theirs)
    with torch.no_grad():
        given = {"window_size": 8, "pretrained_window_size": 8}
        assert_near(features_of(tmp_path / "network.pth", photos, **given), network.forward_features(photos))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


TIMM_MODELS = {  # what its registered function gives besides the sizes: image size, windows, trained windows
    "swinv2_tiny_window8_256": (256, [[8, 8]] * 4, None),
    "swinv2_base_window12_192": (192, [[12, 12]] * 3 + [[6, 6]], None),
    "swinv2_base_window12to16_192to256": (256, [[16, 16]] * 3 + [[8, 8]], list(PRETRAINED)),
    "swinv2_large_window12to24_192to384": (384, [[24, 24]] * 3 + [[12, 12]], list(PRETRAINED)),
    "swin_tiny_patch4_window7_224": (224, [[7, 7]] * 4, None),
    "swin_base_patch4_window12_384": (384, [[12, 12]] * 4, None),
}


@pytest.mark.parametrize("name", TIMM_MODELS)
@pytest.mark.parametrize("safe", [True, False])
def test_timms_folders(name: str, safe: bool, tmp_path: Path, photos: Tensor) -> None:
    network = randomized(timm.create_model(name, **SHAPE, num_classes=3))
    labels = {"label_names": ["apple", "crane", "crane"]}
    save_for_hf(network, str(tmp_path), model_config=labels, safe_serialization=safe)
    known = read_encoder_weights(tmp_path)[1]
    size, windows, trained = TIMM_MODELS[name]
    assert (known["image_size"], known["windows"]) == ([size, size], windows)
    assert known["config"]["pretrained_window_size"] == trained
    assert known["classes"] == ["apple", "crane (1)", "crane (2)"]
    config = network.pretrained_cfg
    assert (tuple(known["mean"]), tuple(known["std"])) == (config["mean"], config["std"])
    assert (known["test_crop"], known["interpolation"]) == (config["crop_pct"], "bicubic")
    if size in (224, 256) and safe:
        with torch.no_grad():
            images = photos[..., :size, :size]
            assert_near(features_of(tmp_path, images), network.forward_features(images))


def test_the_arguments_in_timms_folders_count_more_than_the_name(tmp_path: Path, photos: Tensor) -> None:
    arguments = {"img_size": 192, "window_size": 6, "pretrained_window_sizes": (4, 4, 4, 4)}
    network = randomized(timm.create_model("swinv2_tiny_window8_256", **SHAPE, **arguments))
    save_for_hf(network, str(tmp_path), safe_serialization=True)
    images = photos[..., :192, :192]
    with torch.no_grad():
        assert_near(features_of(tmp_path, images), network.forward_features(images))


def transformers_config(**changes: Any) -> Swinv2Config:
    settings = {"image_size": 256, "window_size": 16, "pretrained_window_sizes": list(PRETRAINED)} | changes
    return Swinv2Config(**SHAPE, **settings)


def first_transformers_config(**changes: Any) -> SwinConfig:
    return SwinConfig(**SHAPE, **{"image_size": 256, "window_size": 8} | changes)


TRANSFORMERS_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: Swinv2Model(transformers_config()),
    "classifier": lambda: Swinv2ForImageClassification(
        transformers_config(id2label={0: "tench", 1: "crane", 2: "crane"}, label2id={"tench": 0, "crane": 1})
    ),
    "numbers": lambda: Swinv2ForImageClassification(transformers_config(num_labels=3)),
    "masked images": lambda: Swinv2ForMaskedImageModeling(
        transformers_config(image_size=192, window_size=12, pretrained_window_sizes=[0] * 4)
    ),
    "first classifier": lambda: SwinForImageClassification(first_transformers_config(num_labels=3)),
    "first masked images": lambda: SwinForMaskedImageModeling(first_transformers_config(image_size=192, window_size=6)),
}


@pytest.mark.parametrize("kind", TRANSFORMERS_NETWORKS)
def test_transformers_folders(kind: str, tmp_path: Path, photos: Tensor) -> None:
    network = randomized(TRANSFORMERS_NETWORKS[kind]())
    network.save_pretrained(tmp_path)  # type: ignore[operator]
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    weights, known = read_encoder_weights(tmp_path)
    first, masked = kind.startswith("first"), kind.endswith("masked images")
    size = 192 if masked else 256
    assert (known["origin"], known["image_size"]) == ("transformers", [size, size])
    assert (known["mean"], known["std"], known["interpolation"]) == ([0.5] * 3, [0.25] * 3, "bicubic")
    names = {
        "classifier": ["tench", "crane (1)", "crane (2)"],
        "numbers": ["0", "1", "2"],
        "first classifier": ["0", "1", "2"],
    }
    assert known["classes"] == names.get(kind)
    trained = None if masked or first else list(PRETRAINED)
    assert (known["config"]["pretrained_window_size"], unsaid(known)) == (trained, {})
    encoder, images = getattr(network, "swin" if first else "swinv2", network), photos[..., :size, :size]
    with torch.no_grad():
        expected = encoder(images).last_hidden_state
        assert_near(features_of(tmp_path, images).flatten(1, 2), expected)
    held = without_key_biases(load_file(tmp_path / "model.safetensors"))
    theirs = {key.removeprefix("swinv2.").removeprefix("swin."): value for key, value in held.items()}
    ours = to_transformers(weights)
    if not masked:
        del ours["embeddings.mask_token"]
    kept = {key: value for key, value in theirs.items() if not key.startswith(("classifier.", "decoder."))}
    assert_equal(ours, kept)


def torchvision_network(version: str) -> nn.Module:
    second, first = (SwinTransformerBlockV2, PatchMergingV2), (SwinTransformerBlock, PatchMerging)
    blocks = dict(zip(("block", "downsample_layer"), second if version == "v2" else first, strict=True))
    return randomized(SwinTransformer([4, 4], window_size=[8, 8], num_classes=5, **SHAPE, **blocks))


@pytest.mark.parametrize("version", ["v2", "v1"])
def test_torchvisions_state_dicts(version: str, tmp_path: Path, photos: Tensor) -> None:
    network = torchvision_network(version)
    network.eval()
    torch.save(network.state_dict(), tmp_path / "swin_v2.pth")
    weights, known = read_encoder_weights(tmp_path / "swin_v2.pth")
    assert (known["origin"], known["windows"], known["image_size"]) == ("torchvision", [[8, 8]] * 4, None)
    assert list(unsaid(known)) == ["data.image_size"]
    with torch.no_grad():  # at 256 px every map is a whole number of windows
        expected = network.norm(network.features(photos))  # type: ignore[operator]
        assert_near(features_of(tmp_path / "swin_v2.pth", photos), expected)
        features = load_encoder(tmp_path / "swin_v2.pth").eval()(photos).mean(dim=(1, 2))
        assert_near(nn.functional.linear(features, **known["head"]), network(photos))
    held = without_key_biases(network.state_dict())
    theirs = {key: value for key, value in held.items() if key in to_torchvision(weights)}
    assert_equal(to_torchvision(weights), theirs)
    assert len(theirs) == len(list(network.parameters())) - 2


def test_half_precision_tells_the_same(tmp_path: Path) -> None:
    state = official(timm_network())
    torch.save(
        {key: value.half() if value.is_floating_point() else value for key, value in state.items()}, tmp_path / "h"
    )
    torch.save(state, tmp_path / "f")
    half, full = (read_encoder_weights(tmp_path / name)[1] for name in "hf")
    assert [half[key] for key in ("config", "image_size", "windows")] == [
        full[key] for key in ("config", "image_size", "windows")
    ]
    assert {value.dtype for value in load_encoder(tmp_path / "h").state_dict().values()} == {torch.float32}


def first_version_in_part(path: Path) -> Path:
    table = {"encoder.layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(121, 4)}
    torch.save({"model": {"encoder.patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)} | table}, path / "swin.pth")
    return path / "swin.pth"


def first_version_of_several_windows(path: Path) -> Path:
    network = timm.create_model("swin_s3_tiny_224", **SHAPE)
    save_for_hf(network, str(path), safe_serialization=True)
    return path


def vit(path: Path) -> Path:
    network = VisionTransformer(32, 16, 1, 2, 16, 32)
    torch.save(network.state_dict(), path / "vit.pth")
    return path / "vit.pth"


def vit_of_timm(path: Path) -> Path:
    network = timm.create_model("vit_tiny_patch16_224", embed_dim=16, depth=1, num_heads=2)
    save_file(network.state_dict(), path / "model.safetensors")
    return path


def incomplete(path: Path) -> Path:
    state = official(timm_network())
    del state["layers.1.blocks.1.mlp.fc1.bias"]
    torch.save(state, path / "part.pth")
    return path / "part.pth"


def narrower(path: Path) -> Path:
    torch.save(TimmSwinV2(img_size=64, window_size=8, mlp_ratio=2, **SHAPE).state_dict(), path / "narrow.pth")
    return path / "narrow.pth"


def linearly_spaced(path: Path) -> Path:
    state = official(timm_network())
    for key in state:
        if key.endswith("relative_coords_table"):
            state[key] = state[key].sign() * (2 ** (3 * state[key].abs()) - 1) / 8
    torch.save(state, path / "linear.pth")
    return path / "linear.pth"


def contradicting(path: Path) -> Path:
    Swinv2Model(transformers_config()).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"depths": [2, 2, 2, 2]}))
    return path


def another_activation(path: Path) -> Path:
    Swinv2Model(transformers_config(hidden_act="relu")).save_pretrained(path)
    return path


def other_windows_in_each_stage(path: Path) -> Path:
    network = timm.create_model("swinv2_tiny_window8_256", **SHAPE, window_size=(16, 8, 8, 8))
    save_for_hf(network, str(path), safe_serialization=True)
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (first_version_in_part, r"of its tensors are not those of a Swin Transformer, the first embed.proj.bias"),
        (first_version_of_several_windows, "are not those of one window"),
        (vit, r"a Vision Transformer \(ViT\)"),
        (vit_of_timm, r"a Vision Transformer \(ViT\)"),
        (incomplete, r"1 of its tensors are not .*stages\.1\.1\.mlp\.0\.bias missing"),
        (narrower, r"not those of a Swin Transformer, the first stages\.0\.0\.mlp\.0\.weight \(32, 16\)"),
        (linearly_spaced, "not spaced as in log_cpb"),
        (contradicting, r"its config.json has depths=\[2, 2, 2, 2\], and its tensors \[1, 2, 1, 1\]"),
        (another_activation, "its config.json has hidden_act=relu, and the encoder knows gelu alone"),
        (other_windows_in_each_stage, "are not those of one window"),
    ],
)
def test_what_the_encoder_is_not_is_refused(make: Callable[[Path], Path], reason: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(ValueError, match=reason) as caught:
        read_encoder_weights(path)
    assert str(caught.value).startswith(f"encoder={path}") and "\n" not in str(caught.value)
