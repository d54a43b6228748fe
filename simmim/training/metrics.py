"""Tables of a run that grow with its steps: whole after a crash, continued by a resumed run."""

import csv
import io
import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from simmim.run_folder import append, shown, whole_file

log = logging.getLogger(__name__)


class MetricsFile(Logger):
    """`metrics.csv`: one row a logged step, appended as it comes.

    Lightning's own logger would start the file anew when a run is resumed.
    Rows for which there is no room on the disk wait in memory.

    Args:
        path: The CSV file.
        until_step: Rows of an earlier part of the run are kept up to this step; what came after the checkpoint
            that the run continues from, a validation of this step included, is written again.
    """

    def __init__(self, path: Path, *, until_step: int) -> None:
        super().__init__()
        self.path = path
        self.columns = ["step"]
        self.rows: list[dict[str, Any]] = []
        self.written = -1  # rows; -1 where the whole file must be written, by the first process alone
        self.waiting = False
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or self.columns)
                self.rows = [row for row in reader if int(row["step"]) < until_step + (not row.get("val_loss"))]

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
            self.written = -1
        self._write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """The last chance of rows that wait."""
        if self.waiting:
            self._write()
        if self.waiting:
            log.error(
                f"{shown(self.path)} lacks the last {len(self.rows) - max(0, self.written)} rows: the disk is full"
            )

    def _write(self) -> None:
        try:
            if self.written < 0:
                self._rewrite()
            else:
                append(self.path, self._lines(self.rows[self.written :]))
                self.written = len(self.rows)
        except OSError as error:
            if not self.waiting:
                log.warning(f"{shown(self.path)} cannot be written ({error.strerror}): its rows wait in memory")
            self.waiting = True
        else:
            self.waiting = False

    @rank_zero_only
    def _rewrite(self) -> None:
        header = dict(zip(self.columns, self.columns, strict=True))
        with whole_file(self.path) as temporary:
            temporary.write_bytes(self._lines([header, *self.rows]).encode())
        self.written = len(self.rows)

    def _lines(self, rows: list[dict[str, Any]]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns).writerows(rows)
        return text.getvalue()


class StepTable:
    """A CSV file with some rows for some optimizer steps. Only the first process may write it.

    Rows for which there is no room on the disk wait in memory.

    Args:
        path: The file; there is none before the first row.
        columns: Of the table, besides `step`, which is the first.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = ["step", *columns]
        self.unwritten: list[dict[str, Any]] = []

    def begin(self, step: int) -> None:
        """Drops what an earlier part of the run has written of steps behind the one that it continues from."""
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            whole = file.read().rpartition("\n")[0]  # a process that was killed may have left half a line
        kept = [row for row in csv.DictReader(io.StringIO(whole)) if int(row["step"]) <= step]
        with whole_file(self.path) as temporary:
            temporary.write_text(self._lines(kept, header=True), newline="")

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Appends rows."""
        waiting = bool(self.unwritten)
        self.unwritten += rows
        try:
            append(self.path, self._lines(self.unwritten, header=not self.path.exists()))
            self.unwritten = []
        except OSError as error:
            if not waiting:
                log.warning(f"{shown(self.path)} cannot be written ({error.strerror}): its rows wait in memory")

    def _lines(self, rows: Sequence[dict[str, Any]], *, header: bool) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
