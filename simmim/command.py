"""The entry point of a command: its process, its errors of one line, and the jobs of a multirun."""

import csv
import functools
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from simmim.config import Config, check_choices, config_folder, to_plain
from simmim.devices import world_size
from simmim.errors import USER_ERRORS, explain, one_line
from simmim.processes import run_apart, started_outside
from simmim.run_folder import shown
from simmim.sweep_folder import Job, read_jobs, write_job
from simmim.training.checkpoint import Stopped

log = logging.getLogger(__name__)

CLOCKS = 60.0
"""Seconds by which the clocks of a cluster's machines may differ."""

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and saved its state: the same command continues it (EX_TEMPFAIL)."""

TRAINING = ("pretrain", "finetune")
"""Commands that start processes of their own for several devices."""


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
            failures.append(f"{job}{one_line(error)}")
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
            check_choices(sys.argv[1:], name)
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
        write_job(job.ended("failed", now=time.time(), error=one_line(error)), folder)
        raise
    write_job(job.ended("done", now=time.time()), folder)


def _failed_jobs(*, since: float) -> list[str]:
    """A line for each job of the multirun that has just ended, if it failed and had begun after a time."""
    jobs = [] if SweepFolder.path is None else read_jobs(SweepFolder.path).values()
    return [job.failure for job in jobs if job.state == "failed" and job.started >= since]


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


def quieten_libraries() -> None:
    """Hides what Lightning says about its own workings; warnings of other kinds stay."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
