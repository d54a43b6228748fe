"""Encoder files: what goes in comes out, bit by bit, and everything else is refused in one clear line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from simmim.encoders import SwinTransformerV2, create_encoder, encoder_files
from simmim.encoders.encoder_files import read_encoder_weights, save_encoder, trained_windows
from simmim.encoders.table_resizing import move_table
from simmim.encoders.weights import load_encoder, load_encoder_weights, load_head

MODEL: dict[str, Any] = {
    "name": "swinv2",
    "window_size": 6,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "extra_norm_every": 0,
    "patch_size": 2,
    "in_channels": 4,
    "drop_path": 0.25,
}
SIZE = (24, 48)


def encoder_of(seed: int = 0, **overrides: Any) -> SwinTransformerV2:
    encoder = create_encoder(**(MODEL | overrides))
    generator = torch.Generator().manual_seed(seed)
    for parameter in encoder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return encoder


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def save_checkpoint(path: Path, encoder: SwinTransformerV2, **changes: Any) -> None:
    state = {f"network.encoder.{key}": value for key, value in encoder.state_dict().items()}
    state["network.head.weight"] = torch.zeros(3)
    hyper_parameters = {"model": MODEL, "image_size": list(SIZE), "seed": 0}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "hyper_parameters": hyper_parameters, "epoch": 3} | changes, path)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"extra_norm_every": 1, "pretrained_window_size": [4, 3]},
        {"position_bias": "linear_cpb"},
        {"position_bias": "table"},
    ],
)
def test_a_file_rebuilds_its_encoder(overrides: dict[str, Any], tmp_path: Path) -> None:
    encoder = encoder_of(**overrides)
    save_encoder(encoder, tmp_path / "encoder.safetensors", image_size=SIZE)
    loaded = load_encoder(tmp_path / "encoder.safetensors")
    trained = overrides.get("pretrained_window_size", None if "table" in overrides.values() else [6, 6])
    assert loaded.config == encoder.config | {"pretrained_window_size": trained}
    assert_equal(loaded.state_dict(), encoder.state_dict())
    images = torch.randn(1, 4, *SIZE)
    assert torch.equal(loaded.eval()(images), encoder.eval()(images))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_offsets_are_counted_in_the_trained_windows_at_any_image_size(tmp_path: Path) -> None:
    """The windows of the last stage had shrunk to its map, and grow with larger images."""
    encoder = encoder_of()
    save_encoder(encoder, tmp_path / "encoder.safetensors", image_size=(16, 16))
    explicit = encoder_of(pretrained_window_size=[6, 4])
    explicit.load_state_dict(encoder.state_dict())
    loaded, images = load_encoder(tmp_path / "encoder.safetensors"), torch.randn(1, 4, 48, 48)
    for found, expected in zip(loaded.eval().pyramid(images), explicit.eval().pyramid(images), strict=True):
        assert torch.equal(found, expected)
    assert not torch.allclose(loaded(images), encoder.eval()(images), atol=1e-3)


def test_metadata_say_how_it_was_trained(tmp_path: Path) -> None:
    encoder = encoder_of()
    save_encoder(encoder, tmp_path / "encoder.safetensors", image_size=SIZE)
    with safe_open(tmp_path / "encoder.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["architecture"]) == ("simmim", "swinv2")
    assert json.loads(metadata["config"]) == encoder.config
    assert json.loads(metadata["image_size"]) == [24, 48]
    assert json.loads(metadata["windows"]) == [[6, 6], [6, 6]]  # maps of 12 x 24 and 6 x 12 tokens


def test_a_checkpoint_says_the_same_as_the_file(tmp_path: Path) -> None:
    encoder = encoder_of()
    save_encoder(encoder, tmp_path / "encoder.safetensors", image_size=SIZE, mean=[0.5, 0.4, 0.3, 0.2], std=[0.25] * 4)
    statistics = {"mean": [0.5, 0.4, 0.3, 0.2], "std": [0.25] * 4}
    hyper_parameters = {"model": MODEL, "image_size": list(SIZE), **statistics}
    save_checkpoint(tmp_path / "step_00000007.ckpt", encoder, hyper_parameters=hyper_parameters)
    of_file, of_checkpoint = (
        read_encoder_weights(tmp_path / name) for name in ("encoder.safetensors", "step_00000007.ckpt")
    )
    assert_equal(of_checkpoint[0], of_file[0])
    assert of_checkpoint[1] == of_file[1]
    assert {key: of_file[1][key] for key in statistics} == statistics
    assert_equal(load_encoder(tmp_path / "step_00000007.ckpt").state_dict(), encoder.state_dict())


def test_older_files_do_not_say_how_images_are_normalised(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(encoder_of(), path, image_size=SIZE)
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key not in ("mean", "std")}
    save_file(encoder_of().state_dict(), path, metadata)
    save_checkpoint(tmp_path / "old.ckpt", encoder_of())
    for old in (path, tmp_path / "old.ckpt"):
        weights, metadata = read_encoder_weights(old)
        assert (metadata["mean"], metadata["std"]) == (None, None)
        assert_equal(weights, encoder_of().state_dict())
        assert_equal(load_encoder(old).state_dict(), encoder_of().state_dict())


def test_a_run_folder_offers_its_newest_weights(tmp_path: Path) -> None:
    for step in (9, 10, 100):  # 9 comes last by name
        save_checkpoint(tmp_path / "checkpoints" / f"step_{step}.ckpt", encoder_of(step))
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert_equal(read_encoder_weights(tmp_path)[0], encoder_of(100).state_dict())
    save_encoder(encoder_of(1), tmp_path / "encoder.safetensors", image_size=SIZE)
    assert_equal(read_encoder_weights(tmp_path)[0], encoder_of(1).state_dict())


def test_loading_reports_what_was_loaded(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(encoder_of(), path, image_size=SIZE)
    other = encoder_of(1, window_size=3, pretrained_window_size=6, drop_path=0.0)
    count = len(other.state_dict())
    report = load_encoder_weights(other, tmp_path, image_size=SIZE)
    assert_equal(other.state_dict(), encoder_of().state_dict())
    assert other.config["window_size"] == 3
    assert report.startswith(f"Loaded all {count} tensors of the encoder (0.0 M parameters) from {path}")
    assert report.endswith("trained at 24x48 px with windows of 6x6, 6x6 tokens.")
    save_checkpoint(path.with_name("old.ckpt"), encoder_of(), hyper_parameters={"model": MODEL})
    assert load_encoder_weights(other, path.with_name("old.ckpt"), image_size=SIZE).endswith(
        "at an unknown image size."
    )


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(encoder_of(), path, image_size=SIZE)
    with pytest.raises(ValueError, match=r"embed_dim=16 \(model: 32\)") as caught:
        load_encoder_weights(encoder_of(embed_dim=32), path, image_size=SIZE)
    line = str(caught.value)
    assert line.startswith(f"encoder={path} does not fit") and "\n" not in line
    assert "mask_token (16,) (model: (32,))" in line
    deeper = encoder_of(1, depths=[2, 4])
    before = {key: value.clone() for key, value in deeper.state_dict().items()}
    with pytest.raises(ValueError, match=r"34 tensors differ.*q_bias missing \(model"):
        load_encoder_weights(deeper, path, image_size=SIZE)
    assert_equal(deeper.state_dict(), before)  # nothing was half loaded


def test_other_windows_need_the_trained_ones(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(encoder_of(), path, image_size=SIZE)
    other = encoder_of(1, window_size=3)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"windows of 6x6, 6x6 tokens.*3x3, 3x3: give .*pretrained_window_size=\[6,6\]"
    ):
        load_encoder_weights(other, path, image_size=SIZE)
    assert_equal(other.state_dict(), before)


def test_sides_of_windows_that_differ_are_kept_apart(tmp_path: Path) -> None:
    """The last map, of 3 x 6 tokens, is smaller than the window: so is what its offsets are counted in."""
    path = tmp_path / "encoder.safetensors"
    encoder = encoder_of(window_size=6)
    size = (encoder.stride * 3, encoder.stride * 6)
    save_encoder(encoder, path, image_size=size)
    windows = trained_windows(read_encoder_weights(path)[1])
    assert windows == [6, [3, 6]]
    larger = encoder_of(1, window_size=12, pretrained_window_size=windows)
    load_encoder_weights(larger, path, image_size=(encoder.stride * 6, encoder.stride * 12))
    images = torch.randn(1, larger.config["in_channels"], *size)
    narrow = encoder_of(2, window_size=6, pretrained_window_size=windows)
    load_encoder_weights(narrow, path, image_size=size)
    assert torch.equal(narrow.eval()(images), encoder.eval()(images))


def save_without_position_bias(path: Path, encoder: SwinTransformerV2) -> None:
    """As before there was a choice."""
    save_encoder(encoder, path, image_size=SIZE)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    assert config.pop("position_bias") == "log_cpb"
    save_file(encoder.state_dict(), path, metadata | {"config": json.dumps(config)})


def test_files_from_before_there_was_a_choice_still_load(tmp_path: Path) -> None:
    """Checkpoints too: those that this module saves do not name the position bias."""
    assert "position_bias" not in MODEL
    save_without_position_bias(tmp_path / "old.safetensors", encoder_of())
    save_checkpoint(tmp_path / "old.ckpt", encoder_of())
    for path in (tmp_path / "old.safetensors", tmp_path / "old.ckpt"):
        loaded = load_encoder(path)
        assert loaded.config["position_bias"] == "log_cpb"
        assert_equal(loaded.state_dict(), encoder_of().state_dict())
        other = encoder_of(1)
        load_encoder_weights(other, path, image_size=SIZE)
        assert_equal(other.state_dict(), encoder_of().state_dict())
        with pytest.raises(
            ValueError, match=r"trained with model\.position_bias=log_cpb, and the model has linear_cpb"
        ):
            load_encoder_weights(encoder_of(position_bias="linear_cpb"), path, image_size=SIZE)


@pytest.mark.parametrize("theirs", ["log_cpb", "linear_cpb", "table"])
@pytest.mark.parametrize("ours", ["log_cpb", "linear_cpb", "table"])
def test_another_position_bias_is_refused(theirs: str, ours: str, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(encoder_of(position_bias=theirs), path, image_size=SIZE)
    model = encoder_of(1, position_bias=ours)
    if theirs == ours:
        load_encoder_weights(model, path, image_size=SIZE)
        return
    with pytest.raises(ValueError, match=f"give model.position_bias={theirs}$") as caught:
        load_encoder_weights(model, path, image_size=SIZE)
    assert str(caught.value).startswith(f"encoder={path} was trained with model.position_bias={theirs}, and the model")
    assert_equal(model.state_dict(), encoder_of(1, position_bias=ours).state_dict())
    with pytest.raises(RuntimeError, match="position_bias"):
        model.load_state_dict(encoder_of(position_bias=theirs).state_dict())  # nor by another way


@pytest.mark.parametrize("resizing", ["bicubic", "geometric"])
def test_tables_move_to_the_windows_of_the_model(resizing: str, tmp_path: Path) -> None:
    """From 24 x 48 px, where a window of 8 shrinks to 6 x 8 tokens in the last stage, to 36 x 48 px and 9 x 12."""
    path = tmp_path / "encoder.safetensors"
    before = encoder_of(position_bias="table", window_size=8)
    save_encoder(before, path, image_size=SIZE)
    after = encoder_of(1, position_bias="table", window_size=12, table_resizing=resizing)
    report = load_encoder_weights(after, path, image_size=(36, 48))
    assert f"trained at 24x48 px with windows of 8x8, 6x8 tokens. 4 position tables were moved, {resizing}." in report
    source, moved = before.state_dict(), after.state_dict()
    for key, value in source.items():
        if not key.endswith("table"):
            assert torch.equal(moved[key], value)
            continue
        trained, window = {"0": ((8, 8), (12, 12)), "1": ((6, 8), (9, 12))}[key.split(".")[1]]
        assert torch.equal(moved[key], move_table(value, trained, window, window_size=12, resizing=resizing))
        assert not torch.equal(moved[key], encoder_of(1, position_bias="table", window_size=12).state_dict()[key])
    save_encoder(after, path, image_size=(36, 48))  # a stage later it is what was trained
    assert_equal(load_encoder(path).state_dict(), moved)


def test_tables_of_the_same_windows_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(encoder_of(position_bias="table", window_size=12), path, image_size=SIZE)
    same = encoder_of(1, position_bias="table", window_size=12)
    load_encoder_weights(same, path, image_size=SIZE)
    assert_equal(same.state_dict(), encoder_of(position_bias="table", window_size=12).state_dict())


def test_tables_of_another_size_of_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(encoder_of(position_bias="table"), path, image_size=SIZE)
    for other in (
        {"num_heads": [4, 8]},
        {"depths": [2], "num_heads": [2]},
        {"depths": [2, 2, 2], "num_heads": [2] * 3},
    ):
        with pytest.raises(ValueError, match=r"does not fit the model: it holds .*num_heads=\[2, 4\]"):
            load_encoder_weights(encoder_of(position_bias="table", window_size=3, **other), path, image_size=SIZE)


def test_a_classifier_of_the_same_classes_is_put_in_their_order() -> None:
    weight, bias = torch.randn(3, 5), torch.randn(3)
    metadata = {"head": {"weight": weight, "bias": bias}, "classes": ["cat", "dog", "eel"]}
    head = torch.nn.Linear(5, 3)
    assert load_head(head, metadata, ["eel", "cat", "dog"]).endswith("was kept: they are the same, in another order.")
    assert torch.equal(head.weight, weight[[2, 0, 1]]) and torch.equal(head.bias, bias[[2, 0, 1]])


def test_a_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save_encoder(encoder_of(), tmp_path / "encoder.safetensors", image_size=SIZE)
    assert (tmp_path / "encoder.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(encoder_of(), path, image_size=SIZE)

    def fill_the_disk(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(encoder_files, "save_file", fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        save_encoder(encoder_of(1), path, image_size=SIZE)
    assert_equal(load_encoder(path).state_dict(), encoder_of().state_dict())
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.safetensors"]


def nothing(path: Path) -> Path:
    return path / "absent"


def empty_folder(path: Path) -> Path:
    return path


def other_ending(path: Path) -> Path:
    (path / "encoder.bin").touch()
    return path / "encoder.bin"


def foreign_safetensors(path: Path) -> Path:
    save_file({"norm.weight": torch.zeros(2)}, path / "foreign.safetensors")
    return path / "foreign.safetensors"


def cut_safetensors(path: Path) -> Path:
    save_encoder(encoder_of(), path / "cut.safetensors", image_size=SIZE)
    (path / "cut.safetensors").write_bytes((path / "cut.safetensors").read_bytes()[:-100])
    return path / "cut.safetensors"


def empty_safetensors(path: Path) -> Path:
    (path / "empty.safetensors").touch()
    return path / "empty.safetensors"


def foreign_checkpoint(path: Path) -> Path:
    torch.save({"state_dict": {"backbone.weight": torch.zeros(2)}}, path / "foreign.ckpt")
    return path / "foreign.ckpt"


def checkpoint_without_settings(path: Path) -> Path:
    save_checkpoint(path / "bare.ckpt", encoder_of(), hyper_parameters={})
    return path / "bare.ckpt"


def cut_checkpoint(path: Path) -> Path:
    save_checkpoint(path / "cut.ckpt", encoder_of())
    (path / "cut.ckpt").write_bytes((path / "cut.ckpt").read_bytes()[:-100])
    return path / "cut.ckpt"


def empty_checkpoint(path: Path) -> Path:
    (path / "empty.ckpt").touch()
    return path / "empty.ckpt"


def checkpoint_with_code(path: Path) -> Path:
    save_checkpoint(path / "code.ckpt", encoder_of(), callback=Path.cwd)
    return path / "code.ckpt"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (nothing, "does not exist"),
        (empty_folder, "neither encoder.safetensors nor"),
        (other_ending, "cannot be read"),
        (foreign_safetensors, "no Swin Transformer that is known: its first name is norm.weight"),
        (cut_safetensors, "cannot be read"),
        (empty_safetensors, "cannot be read"),
        (foreign_checkpoint, "no Swin Transformer that is known"),
        (checkpoint_without_settings, "no checkpoint of simmim"),
        (cut_checkpoint, "cannot be read"),
        (empty_checkpoint, "cannot be read"),
        (checkpoint_with_code, r"needs (builtins\.)?getattr to be unpickled"),
    ],
)
def test_what_holds_no_encoder_is_refused(make: Callable[[Path], Path], reason: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(ValueError, match=reason) as caught:
        read_encoder_weights(path)
    assert str(caught.value).startswith(f"encoder={path}")
    assert "\n" not in str(caught.value)
