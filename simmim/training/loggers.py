"""Where a run's numbers and pictures go besides `metrics.csv`. None of these places can stop a run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from simmim.training.metrics import MetricsFile
from simmim.training.tracker import Tracker


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
        from simmim.training.tensorboard import TensorBoard

        loggers.append(TensorBoard(config, resumed_step=resumed_step))
    if "wandb" in config["logger"]:
        if (mode := config["logger"]["mode"]) not in ("offline", "online"):
            raise ValueError(f"logger.mode={mode} is unknown: choose offline or online")
        from simmim.training.weights_and_biases import WeightsAndBiases

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
