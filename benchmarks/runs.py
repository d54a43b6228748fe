"""The commands of a study, each run once: what an earlier sitting has finished is not run again."""

import csv
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

FINISHED = {
    "pretrain": "encoder.safetensors",
    "finetune": "encoder.safetensors",
    "evaluate": "result.json",
    "diagnose": "signal.png",
}
"""What each command writes last."""

TRAINING = ("pretrain", "finetune")


@dataclass(frozen=True)
class Run:
    """A command and its settings, with a run folder of its own below the working directory."""

    command: str
    name: str
    settings: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return Path("outputs", self.command, self.name)

    @property
    def words(self) -> list[str]:
        resume = ["resume=auto"] if self.command in TRAINING else []
        return ["-m", f"simmim.{self.command}", *self.settings, f"name={self.name}", *resume]

    @property
    def line(self) -> str:
        return shlex.join(["python", *self.words])

    @property
    def finished(self) -> bool:
        """Whether this very command has ended well: the same name with other epochs is another run."""
        return (self.folder / FINISHED[self.command]).is_file() and self._begun_as() == self.line

    def start(self) -> None:
        """Runs the command, which continues what an earlier sitting has begun.

        Raises:
            SystemExit: If it fails or is stopped, or if its folder is of other settings.
        """
        if self._begun_as() not in (None, self.line):
            sys.exit(f"{self.folder} is of another command, see its command.txt: give another --name, or remove it")
        if self.finished:
            print("    there already", flush=True)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "command.txt").write_text(f"{self.line}\n")
        with subprocess.Popen([sys.executable, *self.words]) as process:
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's, which saves and stops
            code = process.wait()
            signal.signal(signal.SIGINT, before)
        if code or not self.finished:
            print(f"{self.folder} ended with exit code {code}: start the study again, it goes on there", flush=True)
            sys.exit(code or 1)

    def _begun_as(self) -> str | None:
        kept = self.folder / "command.txt"
        return kept.read_text().rstrip("\n") if kept.is_file() else None

    def top1(self) -> float | None:
        """Accuracy in percent on all validation images at the end; None where the run has not finished."""
        if not self.finished:
            return None
        if self.command == "evaluate":
            return 100 * json.loads((self.folder / "result.json").read_text())["top1"]
        return self.curve()[-1][1]

    def curve(self) -> list[tuple[int, float]]:
        """Step and accuracy in percent of each validation so far."""
        metrics = self.folder / "metrics.csv"
        if not metrics.is_file():
            return []
        with metrics.open(newline="") as file:
            return [(int(row["step"]), 100 * float(row["val_top1"])) for row in csv.DictReader(file) if row["val_top1"]]


def run_all(runs: Sequence[Run], *, after: Callable[[], None]) -> None:
    """Runs what has not been run, one after the other, and calls `after` when each has ended."""
    for number, run in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {run.line}", flush=True)
        run.start()
        after()


def shards(folder: str) -> tuple[str, str]:
    """The settings that name the shards of a folder: `tin50-train-*.tar.gz` and `tin50-val-*.tar.gz`."""
    return f"data.root='{folder}/tin50-train-*.tar.gz'", f"data.val_root='{folder}/tin50-val-*.tar.gz'"


def command_line(script: str, folder: str) -> str:
    """What was typed, for the notes of a table, without the places of one machine."""
    words = ["<shards>" if word == folder else shlex.quote(below_outputs(word)) for word in sys.argv[1:]]
    return f"command: `python benchmarks/{script}.py {' '.join(words)}`"


def below_outputs(path: str | Path) -> str:
    """The path of a run as all see it who have made it."""
    before, found, after = str(path).rpartition("outputs/")
    return found + after if before.startswith("/") else str(path)
