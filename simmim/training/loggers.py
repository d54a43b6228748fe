"""Where a run's numbers and pictures go besides `metrics.csv`. None of these places can stop a run."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from simmim.run_folder import whole_file
from simmim.training.environment import environment
from simmim.training.metrics import MetricsFile

log = logging.getLogger(__name__)

WANDB_PATIENCE = 15.0
"""Seconds that Weights & Biases may take to answer when a run begins; it asks twice."""

WANDB_FINISH = 30.0
"""Seconds that it may go on uploading when a run ends: less than clusters wait before they kill."""


class Tracker(Logger):
    """A logger that may fail: what it raises is told once, and the run goes on without it.

    Args:
        title: What it is called in messages.
    """

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title
        self.failed = False

    @property
    def name(self) -> str:
        """What it is called."""
        return self.title

    @property
    def version(self) -> str:
        """Nothing: the run folder is the version."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the config was written when the run began."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Writes numbers of an optimizer step."""
        numbers = {key: value for key, value in metrics.items() if key != "epoch"}  # Lightning's, always 0
        self._attempt(lambda: self.write_metrics(numbers, int(step or 0)))

    @rank_zero_only
    def log_picture(self, key: str, path: Path, *, step: int) -> None:
        """Writes a picture that a file holds."""
        self._attempt(lambda: self.write_picture(key, path, step))

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """Ends the run there, which can be continued.

        Args:
            exit_code: 0 if the run came to its end.
        """
        self._attempt(lambda: self.end(exit_code))

    @abstractmethod
    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Writes numbers of an optimizer step."""

    @abstractmethod
    def write_picture(self, key: str, path: Path, step: int) -> None:
        """Writes a picture that a file holds."""

    @abstractmethod
    def end(self, exit_code: int) -> None:
        """Ends the run there."""

    def give_up(self) -> None:
        """Lets go of what a failure has left."""

    def _attempt(self, write: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            write()
        except Exception as error:
            self.failed = True
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning(f"{self.title} failed ({reason}): the run goes on without it, metrics.csv has every number")
            with suppress(Exception):
                self.give_up()


class TensorBoard(Tracker):
    """Event files in `<run folder>/tensorboard`.

    A resumed run begins a new file there, which hides what older ones hold of steps behind its checkpoint: there is one
    curve.

    Args:
        config: The run's, with `output_dir`.
        resumed_step: Step of the checkpoint that the run continues from; 0: from the beginning.

    Raises:
        ValueError: If TensorBoard is not installed.
    """

    def __init__(self, config: dict[str, Any], *, resumed_step: int) -> None:
        super().__init__("TensorBoard")
        self.folder = Path(config["output_dir"]) / "tensorboard"
        self.resumed_step = resumed_step
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("logger=tensorboard needs TensorBoard: pip install 'simmim[tensorboard]'") from error
        self._begin(config, SummaryWriter)

    @rank_zero_only
    def _begin(self, config: dict[str, Any], writer: Any) -> None:
        self.writer = writer(str(self.folder), purge_step=self.resumed_step + 1)
        self.writer.add_text("config", _as_table(config), self.resumed_step)
        self.writer.add_text("environment", _as_table(environment()), self.resumed_step)

    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Adds a point to each curve."""
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def write_picture(self, key: str, path: Path, step: int) -> None:
        """Adds a picture, and hands all to the disk."""
        with Image.open(path) as image:
            self.writer.add_image(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def end(self, exit_code: int) -> None:
        """Closes the file."""
        self.writer.close()


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases, whose files lie in `<run folder>/wandb`.

    A resumed run goes on in the run that it began, whose id the run folder keeps. Offline, each part has a folder of
    its own, and `wandb sync` of one replaces what another has uploaded: so each begins with all numbers before it.

    Args:
        config: The run's, with `name`, `output_dir` and `logger`.
        resumed_step: Step of the checkpoint that the run continues from; 0: from the beginning.
        earlier: Rows of `metrics.csv` up to there.
        job_type: The command.

    Raises:
        ValueError: If the run cannot begin, with the way out.
    """

    def __init__(
        self, config: dict[str, Any], *, resumed_step: int, earlier: list[dict[str, Any]], job_type: str
    ) -> None:
        super().__init__("Weights & Biases")
        self.identity = Path(config["output_dir"]) / "wandb" / "id"
        self.offline = config["logger"]["mode"] == "offline"
        known = self.identity.read_text().strip() if resumed_step and self.identity.is_file() else None
        try:
            self._begin(config, known, job_type)
        except wandb.Error as error:
            raise ValueError(
                f"logger.mode={config['logger']['mode']}: Weights & Biases cannot be reached "
                f"({' '.join(str(error).split())}): give logger.mode=offline, and upload later with `wandb sync`"
            ) from error
        if known is not None and self.offline:
            for row in earlier:
                numbers = {key: float(value) for key, value in row.items() if value and key != "step"}
                self.log_metrics(numbers, int(row["step"]))

    @rank_zero_only
    def _begin(self, config: dict[str, Any], known: str | None, job_type: str) -> None:
        if not (self.offline or wandb.login(prompt=False, verify=False)):
            raise wandb.Error("there is no API key: `wandb login` asks for it once")
        self.run = wandb.init(
            project=config["logger"]["project"],
            name=str(config["name"]),
            id=known,
            resume=None if self.offline else "allow",
            dir=config["output_dir"],
            mode="offline" if self.offline else "online",
            group=config["logger"]["group"],
            job_type=job_type,
            config={**config, "environment": environment()},
            reinit="create_new",  # a notebook's own run stays what it is
            settings=wandb.Settings(init_timeout=WANDB_PATIENCE, finish_timeout=WANDB_FINISH),
        )
        self.run.define_metric("trainer/global_step")
        self.run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        if known is None:
            with whole_file(self.identity) as temporary:
                temporary.write_text(self.run.id)

    def write_metrics(self, metrics: dict[str, Any], step: int) -> None:
        """Adds a point to each curve."""
        self.run.log({**metrics, "trainer/global_step": step})

    def write_picture(self, key: str, path: Path, step: int) -> None:
        """Adds a picture."""
        self.write_metrics({key: wandb.Image(str(path))}, step)

    def end(self, exit_code: int) -> None:
        """Waits for the upload, but not for long: what is left stays on the disk."""
        self.run.finish(exit_code=exit_code)

    def give_up(self) -> None:
        """Ends the service, whose process may be gone: the next job of a sweep begins one of its own."""
        wandb.teardown()


def create_loggers(config: dict[str, Any], *, resumed_step: int, job_type: str) -> list[Logger]:
    """`metrics.csv`, and what `logger` names besides.

    Args:
        config: The run's.
        resumed_step: Step of the checkpoint that the run continues from; 0: from the beginning.
        job_type: The command.

    Raises:
        ValueError: If one of them cannot begin, with the way out.
    """
    table = MetricsFile(Path(config["output_dir"]) / "metrics.csv", until_step=resumed_step)
    loggers: list[Logger] = [table]
    if "tensorboard" in config["logger"]:
        loggers.append(TensorBoard(config, resumed_step=resumed_step))
    if "wandb" in config["logger"]:
        if (mode := config["logger"]["mode"]) not in ("offline", "online"):
            raise ValueError(f"logger.mode={mode} is unknown: choose offline or online")
        earlier = list(table.rows)
        loggers.append(WeightsAndBiases(config, resumed_step=resumed_step, earlier=earlier, job_type=job_type))
    return loggers


@contextmanager
def closing(loggers: Sequence[Logger]) -> Iterator[None]:
    """Closes loggers behind a run, however it ends."""
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        for logger in loggers:
            if isinstance(logger, Tracker):
                logger.close(exit_code)


def _as_table(settings: dict[str, Any]) -> str:
    """Settings as a table of Markdown."""
    return "\n".join(["| key | value |", "|---|---|", *_rows(settings)])


def _rows(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{prefix}{key}.")
        else:
            yield f"| {prefix}{key} | {value} |"
