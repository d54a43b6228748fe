"""`logger=tensorboard`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from simmim.training.environment import environment
from simmim.training.tracker import Tracker


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


def _as_table(settings: dict[str, Any]) -> str:
    """Settings as a table of Markdown."""
    return "\n".join(["| key | value |", "|---|---|", *_rows(settings)])


def _rows(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{prefix}{key}.")
        else:
            yield f"| {prefix}{key} | {value} |"
