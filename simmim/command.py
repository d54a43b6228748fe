"""What every command shares: composing its config, and errors of one line. Below it nobody knows Hydra."""

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
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from simmim.settings import check_settings, unknown_key
from simmim.training.checkpoint import Stopped

log = logging.getLogger(__name__)

Config = dict[str, Any]

USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException)
"""What a user can mend: told in one line. Anything else is a defect of ours and keeps its traceback."""

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and saved its state: the same command continues it (EX_TEMPFAIL)."""


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
    _check_choices(overrides, name)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose(name, overrides=overrides)
    config.output_dir = str(output_dir)
    return to_plain(config, name, overrides)


def to_plain(config: DictConfig, name: str, overrides: list[str]) -> Config:
    """The composed config of a command as dicts, lists, strings and numbers, each of its kind.

    Raises:
        ValueError: If a value is missing, or is not what `simmim.settings` says of it; if there are several roots.
    """
    for key in ("data.root", "data.val_root"):
        given = {word for word in overrides if word.startswith(f"{key}=")}
        if len(given) > 1 and OmegaConf.select(config, "data.source") == "webdataset":
            raise ValueError(
                f"{key} is given more than once, as a shell makes it of {{…}}: a pattern needs quotes inside quotes, "
                f"\"{key}='train-{{000..004}}.tar'\""
            )
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ValueError(f"{' and '.join(missing)} must be given: {missing[0]}=…")
    if empty := [key for key in _keys(config) if OmegaConf.select(config, key) == ""]:
        raise ValueError(f"{empty[0]} is empty: {empty[0]}=…")
    plain: Config = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    check_settings(plain, name, typed={word.lstrip("+~").partition("=")[0] for word in overrides})
    return plain


def save_config(config: Config, path: Path) -> None:
    """Writes a config of plain values as YAML."""
    OmegaConf.save(OmegaConf.create(config), path)


def load_config(path: Path) -> Config:
    """The config that a run has saved, as plain values."""
    plain: Config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)  # type: ignore[assignment]
    return plain


def command(function: Callable[[Config], Any], *, positional: str | None = None) -> Callable[[], None]:
    """The entry point of a command, made from the function that takes its config as plain values.

    The config is `conf/<name of the function>.yaml`. A user's error is one line, on the screen and in `run.log`,
    and exit code 1; `HYDRA_FULL_ERROR=1` shows the traceback. In a multirun every job runs, and a line for each
    one that failed comes last. A run that was asked to stop ends with `EXIT_STOPPED`, and the multirun with it. Of
    several processes the first one speaks; the others only say what went wrong.

    Args:
        function: What the command does.
        positional: Key of an argument that may be given without it.
    """
    name = function.__name__
    traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    failures: list[str] = []

    @hydra.main(config_path=str(config_folder()), config_name=name, version_base="1.3")
    def run(config: DictConfig) -> None:
        settings = HydraConfig.get()
        sweep = settings.mode == RunMode.MULTIRUN
        first = getattr(rank_zero_only, "rank", 0) == 0
        if not first:
            logging.getLogger().setLevel(logging.ERROR)
        try:
            plain = to_plain(config, name, list(settings.overrides.task))
            if sweep:
                _refuse_launching(plain)
            function(plain)
        except Stopped as stopped:
            log.warning(stopped)
            # A process that Lightning started must not fail, or it would kill the first one.
            sys.exit(EXIT_STOPPED if first or _started_from_outside() else 0)
        except Exception as error:
            job = f"job {settings.job.num} ({settings.job.override_dirname}) failed: " if sweep else ""
            failures.append(f"{job}{_one_line(error)}")
            log.error(failures[-1], exc_info=traceback or not isinstance(error, USER_ERRORS))

    @functools.wraps(function)
    def main() -> None:
        if _started_from_outside() and not any(word.startswith("name=") for word in sys.argv):
            sys.exit(
                "name=… must be given under torchrun or Slurm: else each process would make a run folder of its own"
            )
        if positional is not None and len(sys.argv) > 1 and "=" not in sys.argv[1] and not sys.argv[1].startswith("-"):
            quoted = sys.argv[1].replace("'", r"\'")
            sys.argv[1] = f"{positional}='{quoted}'"
        logging.raiseExceptions = False  # a run.log for which there is no room ends no run, and prints no traceback
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them its own way
        try:
            _check_choices(sys.argv[1:], name)
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


def _check_choices(words: list[str], name: str) -> None:
    """Refuses another command's stages, and for a group what is no name, on which Hydra would fail in its own words."""
    pretraining = name in ("pretrain", "plan")
    for word in words:
        group, _, choice = word.partition("=")
        if group == "stage" and choice != "null" and choice.startswith("pretrain") != pretraining:
            raise ValueError(
                f"{word} is no stage of simmim.{name}: pretrain_192 is pretraining's, all others follow it"
            )
        if group and group != word and (config_folder() / group).is_dir():
            override = OverridesParser.create().parse_override(word)
            value = override.value()
            named = isinstance(value, str) and re.search(r"\w", value) is not None
            if not named and not isinstance(value, dict) and not override.is_sweep_override():
                raise ValueError(f"{word} is unknown: choose one of {', '.join(_choices(group))}")


def _started_from_outside() -> bool:
    """Whether torchrun or Slurm started this process as one of several."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment().world_size() > 1
    return SLURMEnvironment.detect() and SLURMEnvironment(auto_requeue=False).world_size() > 1


def _refuse_launching(config: Config) -> None:
    """Each process that a job of a multirun started would run the whole multirun again."""
    if "strategy" in config.get("trainer", {}) and world_size(config) > 1 and not _started_from_outside():
        raise ValueError(
            "trainer.devices: several devices in a multirun need torchrun: torchrun --nproc-per-node=<devices> "
            "-m simmim.<command> --multirun … name=…"
        )


def explain(error: Exception, name: str) -> str:
    """One line for an error of composition, with the way out: what exists, and what was probably meant."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: this is no key=value that Hydra can read: spaces, commas, braces and parentheses need "
            """quotes inside quotes, "data.root='my photos (1)'", and ~ is not expanded: write $HOME"""
        )
    if unknown := re.match(r"(?s).*Could not find '(.+)/(.+?)'", text):
        group, choice = unknown.groups()
        return f"{group}={choice} is unknown: choose one of {', '.join(_choices(group))}"
    if merging := re.match(r"Error merging override (.+)", text):
        return f"{merging[1]}: this key holds something else than such a value: see its default with --cfg job"
    if isinstance(error, OSError) and error.filename:
        return (
            f"the run folder {error.filename} cannot be written ({error.strerror}): start where you may write, or give "
            "hydra.run.dir=… (hydra.sweep.dir=… for a multirun)"
        )
    if (override := re.match(r"Could not override '(.+?)'", text)) is None:
        return _one_line(error)
    return unknown_key(override.group(1), name)


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


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


def world_size(config: Config) -> int:
    """Processes that train together.

    Raises:
        ValueError: If there are several and `trainer` is not made for that.
    """
    trainer = config["trainer"]
    devices = trainer["devices"]
    if devices == "auto":
        devices = max(1, torch.cuda.device_count()) if trainer["accelerator"] != "cpu" else 1
    if devices > 1 and trainer["strategy"] == "single":
        raise ValueError(f"trainer.devices={devices}: several devices need trainer=ddp or trainer=fsdp")
    return int(devices * trainer.get("num_nodes", 1))


def check_devices(config: Config) -> None:
    """Refuses devices that are not here, and other numbers of processes than were started.

    Raises:
        ValueError: With the key, and the way out.
    """
    trainer, processes, found = config["trainer"], world_size(config), torch.cuda.device_count()
    nodes = trainer.get("num_nodes", 1)
    if on_gpu(config) and processes // nodes > found:
        raise ValueError(
            f"trainer.devices={trainer['devices']}, but PyTorch finds {found} GPUs here: give auto, or fewer"
        )
    if nodes > 1 and "WORLD_SIZE" not in os.environ and not SLURMEnvironment.detect():
        raise ValueError(
            f"trainer.num_nodes={nodes}: nobody started the processes of the other machines: use torchrun or Slurm"
        )
    started = int(os.environ.get("WORLD_SIZE", processes))
    if started != processes:
        raise ValueError(
            f"trainer.devices={trainer['devices']} x trainer.num_nodes={nodes} is {processes} processes, but "
            f"{started} were started: give the numbers that torchrun got"
        )


def accumulation(config: Config) -> int:
    """Batches of a device that make up an optimizer step.

    Raises:
        ValueError: If no whole number of them makes up `data.global_batch_size`.
    """
    given: int = config["trainer"]["accumulate_grad_batches"]
    images, wanted = config["data"]["batch_size"] * world_size(config), config["data"]["global_batch_size"]
    if wanted is None:
        return given
    if wanted % images or given not in (1, wanted // images):
        raise ValueError(
            f"data.global_batch_size={wanted} is not data.batch_size={config['data']['batch_size']} x "
            f"{world_size(config)} devices x a whole number"
            + (f", or not x trainer.accumulate_grad_batches={given}" if given > 1 else "")
        )
    return wanted // images  # type: ignore[no-any-return]


def image_size_of(config: Config) -> tuple[int, int]:
    """Height and width in pixels that `data.image_size` means."""
    size = config["data"]["image_size"]
    sides = [size, size] if isinstance(size, int) else size
    return sides[0], sides[1]


def quieten_libraries() -> None:
    """Hides what Lightning says about its own workings; warnings of other kinds stay."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
