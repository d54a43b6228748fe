"""A logger besides `metrics.csv`: whatever happens to it, it cannot stop a run."""

import logging
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)


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
