"""What `config.json` says of weights that timm or transformers wrote: geometry, pixel statistics, names of classes.

Both write it beside the weights; the image size and the windows, which no tensor tells, stand in it alone.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

INTERPOLATION = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which transformers writes."""

FIXED = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "use_absolute_embeddings": False,
}
"""What our encoder has no choice of, and the configuration of transformers has."""

Facts = dict[str, Any]


def facts_of_transformers(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], *, stages: int, model_type: str
) -> Facts:
    """What transformers' `config.json` and `preprocessor_config.json` say.

    Args:
        config: The one; it may be empty.
        preprocessor: The other; it may be empty.
        stages: Number of stages.
        model_type: What the weights are by their own names, "swinv2" or "swin".

    Returns:
        What is known of `embed_dim`, `depths`, `num_heads`, `patch_size`, `in_channels`; `window_sizes` of each stage
        in tokens, before one shrinks to its map, and `pretrained_windows`, None for a stage that counts in its own,
        [height, width] each; `image_size` in pixels likewise; `mean`, `std`, `max_value`, `interpolation`, `test_crop`;
        `classes`.

    Raises:
        ValueError: If it has what our encoder has not.
    """
    for key, value in (FIXED | {"model_type": model_type}).items():
        if config.get(key, value) != value:
            raise ValueError(f"its config.json has {key}={config[key]}, and the encoder knows {value} alone")
    facts = {
        **{key: config.get(key) for key in ("embed_dim", "depths", "num_heads")},
        "patch_size": config.get("patch_size"),
        "in_channels": config.get("num_channels"),
        "mean": preprocessor.get("image_mean"),
        "std": preprocessor.get("image_std"),
        "interpolation": INTERPOLATION.get(preprocessor.get("resample", 0)),
        "test_crop": preprocessor.get("crop_pct") or _share_of(preprocessor),
        "max_value": round(1 / scale, 6) if (scale := preprocessor.get("rescale_factor")) else None,
        "classes": _names(config.get("id2label")),
    }
    if "window_size" in config:
        facts["window_sizes"] = _pairs(config["window_size"], stages)
        facts["pretrained_windows"] = _pairs(config.get("pretrained_window_sizes") or 0, stages)
    if "image_size" in config:
        facts["image_size"] = _pair(config["image_size"])
    return _known(facts)


def _share_of(preprocessor: Mapping[str, Any]) -> float | None:
    """What is cut out of the short side, as a share of it; None where nothing is, or it does not say."""
    resized, cut = ((preprocessor.get(key) or {}) for key in ("size", "crop_size"))
    if not preprocessor.get("do_center_crop") or "shortest_edge" not in resized or "height" not in cut:
        return None
    return min(1.0, float(cut["height"] / resized["shortest_edge"]))


def facts_of_timm(config: Mapping[str, Any], *, stages: int) -> Facts:
    """What timm's `config.json` says, see `facts_of_transformers`.

    Where it holds no such arguments of the model, the name of the architecture tells the windows:
    `swinv2_base_window12to16_192to256` was trained with windows of 12 tokens at 192 px, then with 16 at 256 px,
    `swin_base_patch4_window7_224` with windows of 7 at 224 px.
    """
    arguments, images = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    named = _facts_of_name(str(config.get("architecture")), stages)
    facts = {
        **{key: arguments.get(key) for key in ("embed_dim", "depths", "num_heads", "patch_size")},
        "in_channels": arguments.get("in_chans"),
        **{key: images.get(key) for key in ("mean", "std", "interpolation")},
        "test_crop": images.get("crop_pct"),
        "classes": _names(config.get("label_names") or images.get("label_names")),
    }
    if size := arguments.get("img_size") or list(images.get("input_size") or ())[1:]:
        facts["image_size"] = _pair(size)
    if "window_size" in arguments:
        facts["window_sizes"] = _pairs(arguments["window_size"], stages)
    if "pretrained_window_sizes" in arguments or "window_size" in arguments:
        trained = arguments.get("pretrained_window_sizes")
        facts["pretrained_windows"] = named.get("pretrained_windows") if trained is None else _pairs(trained, stages)
    return named | _known(facts)


def _facts_of_name(architecture: str, stages: int) -> Facts:
    found = re.fullmatch(r"swin(?:v2)?_\w+?_window(\d+)(?:to(\d+))?_(\d+)(?:to(\d+))?", architecture)
    if found is None:
        return {}
    window, later, size, larger = (int(number) if number else None for number in found.groups())
    assert window is not None and size is not None
    facts = {"window_sizes": _pairs(later or window, stages), "image_size": _pair(larger or size)}
    first = [min(window, size // (4 * 2**stage)) for stage in range(stages)]  # published sizes have patches of 4 px
    return facts | {"pretrained_windows": _pairs(first if later else 0, stages)}


def _names(given: Any) -> list[str] | None:
    """Names of the classes by their numbers; None where they have only numbers."""
    numbered = {
        int(key): str(name) for key, name in (given.items() if isinstance(given, dict) else enumerate(given or ()))
    }
    names = [numbered.get(number, str(number)) for number in range(max(numbered, default=-1) + 1)]
    if all(re.fullmatch(rf"(LABEL_)?{number}", name) for number, name in enumerate(names)):
        return None
    twice = {name for name in names if names.count(name) > 1}  # ImageNet has two cranes
    return [f"{name} ({number})" if name in twice else name for number, name in enumerate(names)]


def _pairs(given: Any, stages: int) -> list[list[int] | None]:
    """A window for all stages, or one each, as [height, width]; None for 0."""
    windows = list(given) if isinstance(given, Iterable) else [given] * stages
    pairs = [_pair(window) for window in windows[:stages]]
    return [pair if min(pair) > 0 else None for pair in pairs]


def _pair(given: Any) -> list[int]:
    return [given, given] if isinstance(given, int) else [int(side) for side in given]


def _known(facts: Facts) -> Facts:
    return {key: value for key, value in facts.items() if value is not None}
