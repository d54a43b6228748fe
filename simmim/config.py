"""Composing a command's config from the words that a person types, as plain values. Below it nobody knows Hydra."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from simmim.config_check import check_settings

Config = dict[str, Any]

STATISTICS = "statistics.yaml"
"""What `simmim.statistics` leaves in its run folder, for `data.statistics`."""

TAKEN_UP = ("mean", "std", "channels", "max_value")
"""Settings of `data` that it says."""


def config_folder() -> Path:
    """The folder of the configs: inside an installed package, else at the top of the repository."""
    package = Path(__file__).resolve().parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def compose_config(name: str, overrides: list[str], *, output_dir: Path) -> Config:
    """The config of a command as plain values, for notebooks and tests that call its function themselves.

    Args:
        name: Name of the command, as in `python -m simmim.<name>`.
        overrides: As on the command line: `["model=swinv2_t", "trainer.max_steps=10"]`.
        output_dir: The run folder.
    """
    check_choices(overrides, name)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose(name, overrides=overrides)
    config.output_dir = str(output_dir)
    return to_plain(config, name, overrides)


def to_plain(config: DictConfig, name: str, overrides: list[str]) -> Config:
    """The composed config of a command as dicts, lists, strings and numbers, each of its kind.

    Where `data.statistics` is given, it holds their numbers.

    Raises:
        ValueError: If a value is missing, or is not what `simmim.settings` says of it; if there are several roots.
    """
    for key in ("data.root", "data.val_root"):
        given = {word for word in overrides if word.startswith(f"{key}=")}
        if len(given) > 1 and OmegaConf.select(config, "data.source") == "shards":
            raise ValueError(
                f"{key} is given more than once, as a shell makes it of {{…}}: a pattern needs quotes inside quotes, "
                f"\"{key}='train-{{000..004}}.tar'\""
            )
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ValueError(f"{' and '.join(missing)} must be given: {missing[0]}=…")
    if empty := [key for key in _keys(config) if OmegaConf.select(config, key) == ""]:
        raise ValueError(f"{empty[0]} is empty: {empty[0]}=…")
    plain: Config = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    typed = {word.lstrip("+~").partition("=")[0] for word in overrides}
    check_settings(plain, name, typed=typed)
    if plain.get("data", {}).get("statistics") is not None:
        plain["data"] |= _read_statistics(plain["data"], typed)
        try:
            check_settings(plain, name, typed=())
        except ValueError as error:
            raise ValueError(f"data.statistics={plain['data']['statistics']}: {error}") from error
    return plain


def _read_statistics(data: Config, typed: set[str]) -> Config:
    """What `data.statistics` says of the images.

    Raises:
        ValueError: If nothing of `simmim.statistics` is there, or a person gave another number.
    """
    given = f"data.statistics={data['statistics']}"
    path = Path(data["statistics"]).expanduser()
    path = path / STATISTICS if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{given}: there is no {path}: python -m simmim.statistics makes it")
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        taken = {key: found[key] for key in TAKEN_UP}
    except Exception as error:  # no YAML, no mapping, or another one
        raise ValueError(f"{given} is not what python -m simmim.statistics wrote ({type(error).__name__})") from error
    for key in TAKEN_UP:
        if f"data.{key}" in typed and data[key] != taken[key]:
            raise ValueError(
                f"data.{key}={data[key]} contradicts {given}, which has {taken[key]}: leave one of them out"
            )
    return taken


def save_config(config: Config, path: Path) -> None:
    """Writes a config of plain values as YAML."""
    OmegaConf.save(OmegaConf.create(config), path)


def read_config(path: Path) -> Config:
    """A config that `save_config` has written."""
    config: Config = OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[assignment]
    return config


def planned_jobs(sweep: Path) -> int | None:
    """How many jobs a sweep over listed values has, begun or not; None where its folder does not say."""
    if not (path := sweep / "multirun.yaml").is_file():
        return None
    settings = OmegaConf.load(path).hydra
    words = [f"{key}={value}" for key, value in (settings.sweeper.params or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*words, *settings.overrides.task])
    lengths = {one.key_or_group: len([*one.sweep_iterator()]) if one.is_sweep_override() else 1 for one in parsed}
    return math.prod(lengths.values())


def check_choices(words: list[str], name: str) -> None:
    """Refuses another command's stages, and for a group what is no name, on which Hydra would fail in its own words."""
    pretraining = name in ("pretrain", "plan")
    for word in words:
        group, _, choice = word.partition("=")
        if group == "stage" and choice != "null" and choice.startswith("pretrain") != pretraining:
            raise ValueError(
                f"{word} is no stage of simmim.{name}: pretrain_192 is pretraining's, all others follow it"
            )
        if group == "experiment" and pretraining and _command_of(choice) == "finetune":
            raise ValueError(f"{word} fine-tunes, and simmim.{name} is for pretraining: choose a recipe of that")
        if group and group != word and (config_folder() / group).is_dir():
            override = OverridesParser.create().parse_override(word)
            value = override.value()
            named = isinstance(value, str) and re.search(r"\w", value) is not None
            if group == "logger" and isinstance(value, list):
                named = bool(value) and {str(item) for item in value} <= set(choices(group))
            if not named and not isinstance(value, dict) and not override.is_sweep_override():
                raise ValueError(f"{word} is unknown: choose one of {', '.join(choices(group))}")


def _command_of(experiment: str) -> str | None:
    """The command that the header of a recipe tells to type; None without such a line."""
    if experiment not in choices("experiment"):
        return None
    header = (
        (config_folder() / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8").partition("defaults:")[0]
    )
    found = re.search(rf"python -m simmim\.(\w+) (?:-m )?experiment={re.escape(experiment)}\b", header)
    return found[1] if found else None


def choices(group: str) -> list[str]:
    """What can be chosen of a config group."""
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, config):
        value = config._get_node(key)
        yield f"{prefix}{key}"
        if isinstance(value, DictConfig):
            yield from _keys(value, f"{prefix}{key}.")


def image_size_of(config: Config) -> tuple[int, int]:
    """Height and width in pixels that `data.image_size` means."""
    size = config["data"]["image_size"]
    sides = [size, size] if isinstance(size, int) else size
    return sides[0], sides[1]
