"""What every command shares: composing its config, and errors of one line. Below it nobody knows Hydra."""

import csv
import functools
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import hydra
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from simmim.processes import run_apart, started_outside
from simmim.run_folder import shown
from simmim.settings import check_settings, unknown_key
from simmim.sweep_folder import Job, read_jobs, write_job
from simmim.training.checkpoint import Stopped

log = logging.getLogger(__name__)

Config = dict[str, Any]

STATISTICS = "statistics.yaml"
"""What `simmim.statistics` leaves in its run folder, for `data.statistics`."""

TAKEN_UP = ("mean", "std", "channels", "max_value")
"""Settings of `data` that it says."""

USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException)
"""What a user can mend: told in one line. Anything else is a defect of ours and keeps its traceback."""

RENAMED = {"data=webdataset": "data=shards reads WebDataset archives, and prepared copies too"}
"""What was once the name of a choice, and what to type now."""

PLUGINS = {"joblib": "sweep", "optuna": "sweep", "submitit_local": "slurm", "submitit_slurm": "slurm"}
"""What comes with an extra of the package: Hydra's launchers and sweepers."""

CLOCKS = 60.0
"""Seconds by which the clocks of a cluster's machines may differ."""

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and saved its state: the same command continues it (EX_TEMPFAIL)."""

TRAINING = ("pretrain", "finetune")
"""Commands that start processes of their own for several devices."""


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


def command(
    function: Callable[[Config], Any], *, positional: str | None = None, objective: str | None = None
) -> Callable[[], None]:
    """The entry point of a command, made from the function that takes its config as plain values.

    The config is `conf/<name of the function>.yaml`. A user's error is one line, on the screen and in `run.log`,
    and exit code 1; `HYDRA_FULL_ERROR=1` shows the traceback. In a multirun every job runs, in whatever process, and
    leaves `job.json`; a line for each one that failed comes last. A run that was asked to stop ends with
    `EXIT_STOPPED`, and the multirun with it. Of several processes the first one speaks; the others only say what went
    wrong.

    Args:
        function: What the command does.
        positional: Key of an argument that may be given without it.
        objective: What of the function's results a sweeper learns from, which searches for the least.
    """
    name = function.__name__
    traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    failures: list[str] = []

    @hydra.main(config_path=str(config_folder()), config_name=name, version_base="1.3")
    def run(config: DictConfig) -> float | None:
        settings = HydraConfig.get()
        sweep = settings.mode == RunMode.MULTIRUN
        first = getattr(rank_zero_only, "rank", 0) == 0
        if not first:
            logging.getLogger().setLevel(logging.ERROR)
        try:
            with _recorded(settings, name, first=first):
                plain = to_plain(config, name, list(settings.overrides.task))
                if sweep and "group" in plain.get("logger", {}):
                    plain["logger"]["group"] = plain["logger"]["group"] or str(plain["name"])
                if sweep and name in TRAINING and world_size(plain) > 1 and started_outside() is None:
                    result = _run_job_apart(plain, name, {**os.environ, "HYDRA_FULL_ERROR": str(int(traceback))})
                else:
                    result = function(plain)
        except Stopped as stopped:
            log.warning(stopped)
            # A process that Lightning started must not fail, or it would kill the first one.
            sys.exit(EXIT_STOPPED if first or started_outside() is not None else 0)
        except Exception as error:
            job = f"job {settings.job.num} failed: " if sweep else ""
            failures.append(f"{job}{_one_line(error)}")
            log.error(failures[-1], exc_info=traceback or not isinstance(error, USER_ERRORS))
            return None
        return float(result[objective]) if objective is not None else None

    @functools.wraps(function)
    def main() -> None:
        if positional is not None and len(sys.argv) > 1 and "=" not in sys.argv[1] and not sys.argv[1].startswith("-"):
            sys.argv[1] = f"{positional}={_quoted(sys.argv[1])}"
        logging.raiseExceptions = False  # a run.log for which there is no room ends no run, and prints no traceback
        # Beside the other overrides, which must stand together: --multirun may be the last word, or the first.
        places = [at for at, word in enumerate(sys.argv) if at and "=" in word and word[0] != "-"]
        noted = f"++hydra.callbacks.sweep._target_={SweepFolder.__module__}.{SweepFolder.__name__}"
        sys.argv.insert(min(places, default=len(sys.argv)), noted)
        SweepFolder.path, started, ended = None, time.time(), ""
        failures.clear()
        try:
            if started_outside() not in (None, (1, 1)) and not any(word.startswith("name=") for word in sys.argv):
                raise ValueError(
                    "name=… must be given under torchrun or Slurm: else each process would make a run folder of its own"
                )
            _check_choices(sys.argv[1:], name)
            with _raising():
                run()
        except (*USER_ERRORS, BrokenExecutor) as error:  # the config does not compose, or a sweep could not go on
            if traceback:
                raise
            ended = explain(error, name)
        told = [*_failed_jobs(since=started - CLOCKS), *filter(None, [ended])]
        if told or failures:
            sys.exit("\n".join(told) or 1)

    return main


@contextmanager
def _raising() -> Iterator[None]:
    """Hydra raises its errors here, instead of printing them its own way; what the environment said is put back."""
    said = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        if said is not None:
            os.environ["HYDRA_FULL_ERROR"] = said


class SweepFolder(Callback):
    """Notes where the jobs of a multirun write; with some launchers, only other processes would know."""

    path: ClassVar[Path | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra calls it before the first job."""
        SweepFolder.path = Path(config.hydra.sweep.dir)


@contextmanager
def _recorded(settings: Any, name: str, *, first: bool) -> Iterator[None]:
    """Keeps in `job.json` how a job of a multirun ends: its process may be another one than the multirun's."""
    if settings.mode != RunMode.MULTIRUN or not first:
        yield
        return
    folder = Path(settings.runtime.output_dir)
    job = Job(int(settings.job.num), name, list(settings.overrides.task), started=time.time())
    write_job(job, folder)
    try:
        yield
    except Stopped:
        write_job(job.ended("stopped", now=time.time()), folder)
        raise
    except Exception as error:
        write_job(job.ended("failed", now=time.time(), error=_one_line(error)), folder)
        raise
    write_job(job.ended("done", now=time.time()), folder)


def _failed_jobs(*, since: float) -> list[str]:
    """A line for each job of the multirun that has just ended, if it failed and had begun after a time."""
    jobs = [] if SweepFolder.path is None else read_jobs(SweepFolder.path).values()
    return [job.failure for job in jobs if job.state == "failed" and job.started >= since]


def _check_choices(words: list[str], name: str) -> None:
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
                named = bool(value) and {str(item) for item in value} <= set(_choices(group))
            if not named and not isinstance(value, dict) and not override.is_sweep_override():
                raise ValueError(f"{word} is unknown: choose one of {', '.join(_choices(group))}")


def _command_of(experiment: str) -> str | None:
    """The command that the header of a recipe tells to type; None without such a line."""
    if experiment not in _choices("experiment"):
        return None
    header = (
        (config_folder() / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8").partition("defaults:")[0]
    )
    found = re.search(rf"python -m simmim\.(\w+) (?:-m )?experiment={re.escape(experiment)}\b", header)
    return found[1] if found else None


def _run_job_apart(config: Config, name: str, environment: dict[str, str]) -> dict[str, float]:
    """Runs a job of a multirun as a command of its own: each process that it started would run the whole multirun.

    Returns:
        The last value of each of its metrics.

    Raises:
        Stopped: If it was asked to stop.
        ValueError: If it failed, which its own lines explain.
    """
    settings = HydraConfig.get()
    folders = [source.path for source in settings.runtime.config_sources if source.provider == "command-line"]
    # What was typed for Hydra itself, as a launcher, stays out: this is one run, in the folder that it was given.
    words = [
        *(f"--config-dir={folder}" for folder in folders),
        f"name={_quoted(config['name'])}",
        *settings.overrides.task,
        "hydra.mode=RUN",
        f"hydra.run.dir={_quoted(config['output_dir'])}",
    ]
    if "group" in config["logger"]:
        words.append(f"logger.group={_quoted(config['logger']['group'])}")
    code, asked = run_apart([sys.executable, "-m", f"simmim.{name}", *words], environment)
    if asked or code == EXIT_STOPPED:
        raise Stopped("the multirun stops here: the same command with resume=auto goes on with its jobs")
    if code:
        raise ValueError(f"exit code {code}, {shown(Path(config['output_dir']))}/run.log says why")
    with (Path(config["output_dir"]) / "metrics.csv").open(newline="") as file:
        return {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}


def _quoted(value: Any) -> str:
    """A value as one types it for Hydra."""
    escaped = str(value).replace("'", r"\'")
    return f"'{escaped}'"


def explain(error: Exception, name: str) -> str:
    """One line for an error of composition, with the way out: what exists, and what was probably meant."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: this is no key=value that Hydra can read: spaces, commas, braces and parentheses need "
            """quotes inside quotes, "data.root='my photos (1)'", and ~ is not expanded: write $HOME"""
        )
    if unknown := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, choice = unknown.groups()
        if group.startswith("hydra/") and choice in PLUGINS:
            return f"{group}={choice} is not installed: pip install 'simmim[{PLUGINS[choice]}]'"
        advice = RENAMED.get(f"{group}={choice}") or f"choose one of {', '.join(_choices(group))}"
        return f"{group}={choice} is unknown: {advice}"
    if merging := re.match(r"Error merging override (.+)", text):
        return f"{merging[1]}: this key holds something else than such a value: see its default with --cfg job"
    if isinstance(error, BrokenExecutor):
        return (
            "the process of a job was killed, for want of memory perhaps, and the sweep ended with it: fewer jobs at a "
            "time (hydra.launcher.n_jobs=…), and the same command with resume=auto goes on"
        )
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
    started = started_outside()
    if started is not None and started != (processes // nodes, nodes):
        raise ValueError(
            f"trainer.devices={trainer['devices']} x trainer.num_nodes={nodes} is {processes} processes, but "
            f"{started[0] * started[1]} were started: give trainer.devices={started[0]} trainer.num_nodes={started[1]}"
        )
    if on_gpu(config) and processes // nodes > found:
        bound = ", or let each task of Slurm see all of them (--gpus-per-node, not --gpus-per-task)" if started else ""
        raise ValueError(
            f"trainer.devices={trainer['devices']}, but PyTorch finds {found} GPUs here: give auto, or fewer{bound}"
        )
    if nodes > 1 and started is None and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"trainer.num_nodes={nodes}: nobody started the processes of the other machines: use torchrun or Slurm"
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
