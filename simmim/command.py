"""What every command shares: composing its config, and errors of one line. Below it nobody knows Hydra."""

import difflib
import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

log = logging.getLogger(__name__)

Config = dict[str, Any]

USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException)
"""What a user can mend: told in one line. Anything else is a defect of ours and keeps its traceback."""


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
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose(name, overrides=overrides)
    config.output_dir = str(output_dir)
    return to_plain(config)


def to_plain(config: DictConfig) -> Config:
    """A composed config as dicts, lists, strings and numbers.

    Raises:
        ValueError: If a value that must be given is missing.
    """
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ValueError(f"{' and '.join(missing)} must be given: {missing[0]}=…")
    if empty := [key for key in _keys(config) if OmegaConf.select(config, key) == ""]:
        raise ValueError(f"{empty[0]} is empty: {empty[0]}=…")
    plain: Config = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    return plain


def command(function: Callable[[Config], Any]) -> Callable[[], None]:
    """The entry point of a command, made from the function that takes its config as plain values.

    The config is `conf/<name of the function>.yaml`. A user's error is one line, on the screen and in `run.log`,
    and exit code 1; `HYDRA_FULL_ERROR=1` shows the traceback. In a multirun every job runs, and a line for each
    one that failed comes last.
    """
    name = function.__name__
    traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    failures: list[str] = []

    @hydra.main(config_path=str(config_folder()), config_name=name, version_base="1.3")
    def run(config: DictConfig) -> None:
        try:
            function(to_plain(config))
        except Exception as error:
            settings = HydraConfig.get()
            sweep = settings.mode == RunMode.MULTIRUN
            job = f"job {settings.job.num} ({settings.job.override_dirname}) failed: " if sweep else ""
            failures.append(f"{job}{_one_line(error)}")
            log.error(failures[-1], exc_info=traceback or not isinstance(error, USER_ERRORS))

    @functools.wraps(function)
    def main() -> None:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them its own way
        try:
            run()
        except USER_ERRORS as error:  # before a job began: the config does not compose
            if traceback:
                raise
            sys.exit(explain(error, name))
        if sweep_failed := [line for line in failures if line.startswith("job ")]:
            print(*sweep_failed, sep="\n", file=sys.stderr)
        if failures:
            sys.exit(1)

    return main


def explain(error: Exception, name: str) -> str:
    """One line for an error of composition, with the way out: what exists, and what was probably meant."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: this is no key=value that Hydra can read: spaces, commas and parentheses need quotes "
            """inside quotes, "data.root='my photos (1)'", and ~ is not expanded: write $HOME"""
        )
    if unknown := re.match(r"(?s).*Could not find '(.+)/(.+?)'", text):
        group, choice = unknown.groups()
        return f"{group}={choice} is unknown: choose one of {', '.join(_choices(group))}"
    if (override := re.match(r"Could not override '(.+?)'", text)) is None:
        return _one_line(error)
    key = override.group(1)
    owners = [f"{owner.parent.name}={owner.stem}" for owner in _owners(key)]
    if owners:
        return f"{key} belongs to {' or '.join(owners)}: give that too"
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        known = list(_keys(compose(name)))
    group = key.split(".")[0]
    for file in (config_folder() / group).glob("*.yaml"):
        known += [f"{group}.{other}" for other in map(str, OmegaConf.load(file))]
    close = difflib.get_close_matches(key, known, n=1) or [k for k in known if k.endswith(f".{key}")]
    meant = f"did you mean {close[0]}?" if close else "see all keys with --cfg job"
    return f"{key} is not a key of simmim.{name}: {meant}"


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def _owners(key: str) -> list[Path]:
    """The files of a config group that hold a key, as `data/folder.yaml` holds `data.root`."""
    group, _, rest = key.partition(".")
    files = sorted((config_folder() / group).glob("*.yaml"))
    return [path for path in files if rest in list(OmegaConf.load(path))]


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, config):
        value = config._get_node(key)
        yield f"{prefix}{key}"
        if isinstance(value, DictConfig):
            yield from _keys(value, f"{prefix}{key}.")


def _one_line(error: Exception) -> str:
    text = str(error)
    if text.startswith("Caught ") and "in DataLoader worker" in text:  # the worker's whole traceback
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


def check_number(key: str, value: Any, *, whole: bool = False, positive: bool = False, signed: bool = False) -> None:
    """Refuses what is no number, no whole one, negative unless signed, or zero where it must be positive.

    Raises:
        ValueError: With the key, the value and what it must be.
    """
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"{key}={value} must be {kind}")
    if (value < 0 and not signed) or (positive and value == 0):
        raise ValueError(f"{key}={value} must be {kind}, {'positive' if positive else 'at least 0'}")


def on_gpu(config: Config) -> bool:
    """Whether `trainer.accelerator` means a GPU, here.

    Raises:
        ValueError: If it is unknown, or a GPU that PyTorch does not find.
    """
    accelerator = config["trainer"]["accelerator"]
    if accelerator not in ("auto", "cpu", "gpu"):
        raise ValueError(f"trainer.accelerator={accelerator} is unknown: choose auto, cpu or gpu")
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator=gpu, but PyTorch finds no GPU here: give trainer=cpu, or mend its driver")
    return accelerator != "cpu" and torch.cuda.is_available()


def precision_of(config: Config) -> Any:
    """What `trainer.precision` means here: 32-true or bf16-mixed.

    Raises:
        ValueError: If it is unknown.
    """
    precision = config["trainer"]["precision"]
    if precision == "auto":
        return "bf16-mixed" if on_gpu(config) else "32-true"
    if precision not in ("32-true", "bf16-mixed"):
        raise ValueError(
            f"trainer.precision={precision} is unknown: choose auto, 32-true or bf16-mixed (fp16 overflows)"
        )
    return precision


def image_size_of(config: Config) -> tuple[int, int]:
    """Height and width in pixels that `data.image_size` means.

    Raises:
        ValueError: If it is neither a number nor two of them.
    """
    size = config["data"]["image_size"]
    sides = [size, size] if isinstance(size, int) else size
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"data.image_size={size} must be a number of pixels or [height, width]")
    return sides[0], sides[1]


def quieten_libraries() -> None:
    """Hides what Lightning says about its own workings; warnings of other kinds stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
