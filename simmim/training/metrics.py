"""`metrics.csv`: one row a logged step, whole after a crash, continued by a resumed run."""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from simmim.run_folder import whole_file


class MetricsFile(Logger):
    """Appends each row as it comes, where Lightning's own logger starts the file anew when a run is resumed.

    Args:
        path: The CSV file.
        until_step: Rows of an earlier part of the run are kept up to this step; what came after the checkpoint
            that the run continues from is written again.
    """

    def __init__(self, path: Path, *, until_step: int) -> None:
        super().__init__()
        self.path = path
        self.columns = ["step"]
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or self.columns)
                self.rows = [row for row in reader if int(row["step"]) <= until_step]
        self._rewrite()

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def version(self) -> str:
        """A file has no versions."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder's `config.yaml` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends one row; a metric not seen before adds a column."""
        row = {"step": step, **{key: f"{value:.6g}" for key, value in metrics.items() if key != "epoch"}}
        self.rows.append(row)
        if new := [key for key in row if key not in self.columns]:
            self.columns += new
            self._rewrite()
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    def _rewrite(self) -> None:
        with whole_file(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
