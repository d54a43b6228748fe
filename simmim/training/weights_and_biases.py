"""`logger=wandb`. Only who asks for it waits for the import of wandb, a tenth of a command's start."""

from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.utilities import rank_zero_only

from simmim.run_folder import whole_file
from simmim.training.environment import environment
from simmim.training.tracker import Tracker

PATIENCE = 15.0
"""Seconds that Weights & Biases may take to answer when a run begins; it asks twice."""

FINISH = 30.0
"""Seconds that it may go on uploading when a run ends: less than clusters wait before they kill."""


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
            settings=wandb.Settings(init_timeout=PATIENCE, finish_timeout=FINISH),
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
