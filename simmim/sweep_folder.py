"""What lies where in the folder of a sweep: a run folder for each job, whose `job.json` says how it ended."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from simmim.run_folder import whole_file

JOB = "job.json"


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Args:
        number: Its number in the sweep, and the name of its folder.
        command: As in `python -m simmim.<command>`.
        overrides: What it was given, as on the command line.
        started: When it began, in seconds since 1970.
        state: "running" (or killed), "done", "stopped" (asked to, and saved) or "failed".
        error: Why it failed, in one line.
        seconds: How long it took, once it has ended.
    """

    number: int
    command: str
    overrides: list[str]
    started: float
    state: str = "running"
    error: str | None = None
    seconds: float | None = None

    def ended(self, state: str, *, now: float, error: str | None = None) -> "Job":
        """The same job, at its end."""
        return replace(self, state=state, error=error, seconds=round(now - self.started, 1))

    @property
    def failure(self) -> str:
        """What to say of a job that failed, in one line."""
        return f"job {self.number} ({','.join(self.overrides)}) failed: {self.error}"


def write_job(job: Job, folder: Path) -> None:
    """Writes what is known of a job into its run folder."""
    with whole_file(folder / JOB) as temporary:
        temporary.write_text(json.dumps(asdict(job), indent=1) + "\n")


def read_jobs(sweep: Path) -> dict[Path, Job]:
    """The jobs in the folder of a sweep, by their run folders, in the order of their numbers.

    Raises:
        ValueError: If a file is damaged.
    """
    jobs = {}
    for path in sweep.glob(f"*/{JOB}"):
        try:
            jobs[path.parent] = Job(**json.loads(path.read_text()))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, or run that job again") from error
    return dict(sorted(jobs.items(), key=lambda item: item[1].number))
