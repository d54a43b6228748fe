"""What `config.json` says, in the forms that timm and transformers write and wrote."""

from typing import Any

import pytest
from timm.models import swin_transformer, swin_transformer_v2

from simmim.encoders.hub_config import facts_of_timm, facts_of_transformers

PUBLISHED = {name.split(".")[0]: swin_transformer_v2 for name in swin_transformer_v2.default_cfgs}
PUBLISHED |= {name: swin_transformer for name in swin_transformer.default_cfgs if "_s3_" not in name}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_names_of_timms_models_tell_their_windows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that are registered, against the arguments that their functions give."""
    given: dict[str, Any] = {}

    def create(variant: str, pretrained: bool = False, **arguments: Any) -> None:
        given.update(arguments)

    module = PUBLISHED[name]
    monkeypatch.setattr(module, f"_create_{module.__name__.rpartition('.')[2]}", create)
    getattr(module, name)()
    facts = facts_of_timm({"architecture": name}, stages=4)
    assert facts["window_sizes"] == [[given["window_size"]] * 2] * 4
    trained = given.get("pretrained_window_sizes", (0, 0, 0, 0))
    assert facts["pretrained_windows"] == [[side, side] if side else None for side in trained]
    assert facts["image_size"] == [int(name.split("_")[-1].split("to")[-1])] * 2


def test_timms_arguments_count_more_than_the_name() -> None:
    arguments = {"img_size": [512, 256], "window_size": [[21, 21], [20, 10]], "pretrained_window_sizes": [6, 0]}
    config = {"architecture": "swinv2_tiny_window8_256", "model_args": {**arguments, "depths": [1, 2]}}
    facts = facts_of_timm(config, stages=2)
    assert facts["window_sizes"] == [[21, 21], [20, 10]]
    assert facts["pretrained_windows"] == [[6, 6], None]
    assert (facts["image_size"], facts["depths"]) == ([512, 256], [1, 2])


def test_older_folders_of_timm_have_no_arguments() -> None:
    images = {
        "input_size": [3, 256, 256],
        "mean": [0.1] * 3,
        "std": [0.2] * 3,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
    }
    config = {"architecture": "swinv2_tiny_window16_256", "num_classes": 2, "pretrained_cfg": images}
    facts = facts_of_timm(config, stages=4)
    assert (facts["mean"], facts["test_crop"], facts["interpolation"]) == ([0.1] * 3, 0.9, "bicubic")
    assert facts["window_sizes"] == [[16, 16]] * 4
    assert "classes" not in facts


def test_a_name_of_ones_own_tells_nothing() -> None:
    assert facts_of_timm({"architecture": "swinv2_mine"}, stages=4) == {}
    assert facts_of_timm({}, stages=4) == {}


CONFIG = {"model_type": "swinv2", "window_size": 8, "image_size": 256, "pretrained_window_sizes": [0, 0, 0, 0]}


def test_transformers_windows_and_classes() -> None:
    facts = facts_of_transformers(CONFIG | {"id2label": {"1": "dog", "0": "cat"}}, {}, stages=4, model_type="swinv2")
    assert facts["window_sizes"] == [[8, 8]] * 4
    assert facts["pretrained_windows"] == [None] * 4
    assert (facts["image_size"], facts["classes"]) == ([256, 256], ["cat", "dog"])
    trained = facts_of_transformers(
        CONFIG | {"pretrained_window_sizes": [12, 12, 12, 6]}, {}, stages=4, model_type="swinv2"
    )
    assert trained["pretrained_windows"] == [[12, 12], [12, 12], [12, 12], [6, 6]]


def test_names_that_are_numbers_are_none() -> None:
    numbers = {str(number): f"LABEL_{number}" for number in range(3)}
    assert "classes" not in facts_of_transformers(CONFIG | {"id2label": numbers}, {}, stages=4, model_type="swinv2")


def test_how_images_were_made() -> None:
    processor = {"image_mean": [0.5], "image_std": [0.2], "resample": 2, "crop_pct": 0.9}
    facts = facts_of_transformers({}, processor, stages=4, model_type="swinv2")
    assert facts == {"mean": [0.5], "std": [0.2], "interpolation": "bilinear", "test_crop": 0.9}


def test_the_processor_of_our_exports_says_all() -> None:
    processor = {"do_center_crop": True, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    facts = facts_of_transformers({}, processor | {"rescale_factor": 1 / 65535}, stages=4, model_type="swinv2")
    assert facts == {"test_crop": 0.875, "max_value": 65535.0}
    whole = facts_of_transformers({}, processor | {"do_center_crop": False}, stages=4, model_type="swinv2")
    assert whole == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_type", "swin"), ("hidden_act", "relu"), ("layer_norm_eps", 1e-6), ("mlp_ratio", 2.0), ("qkv_bias", False)],
)
def test_what_the_encoder_has_not_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"its config.json has {key}={value}, and the encoder knows"):
        facts_of_transformers(CONFIG | {key: value}, {}, stages=4, model_type="swinv2")
