"""What a person reads where something went wrong: one line, with the way out."""

import re
from concurrent.futures import BrokenExecutor

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from simmim.config import choices
from simmim.config_check import unknown_key

USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException)
"""What a user can mend: told in one line. Anything else is a defect of ours and keeps its traceback."""

RENAMED = {"data=webdataset": "data=shards reads WebDataset archives, and prepared copies too"}
"""What was once the name of a choice, and what to type now."""

PLUGINS = {"joblib": "sweep", "optuna": "sweep", "submitit_local": "slurm", "submitit_slurm": "slurm"}
"""What comes with an extra of the package: Hydra's launchers and sweepers."""


def explain(error: Exception, name: str) -> str:
    """One line for an error of composition, with the way out: what exists, and what was probably meant."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: this is no key=value that Hydra can read: spaces, commas, braces and parentheses need "
            """quotes inside quotes, "data.root='my photos (1)'", and ~ is not expanded: write $HOME"""
        )
    if unknown := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, choice = unknown.groups()
        if group.startswith("hydra/") and choice in PLUGINS:
            return f"{group}={choice} is not installed: pip install 'simmim[{PLUGINS[choice]}]'"
        advice = RENAMED.get(f"{group}={choice}") or f"choose one of {', '.join(choices(group))}"
        return f"{group}={choice} is unknown: {advice}"
    if merging := re.match(r"Error merging override (.+)", text):
        return f"{merging[1]}: this key holds something else than such a value: see its default with --cfg job"
    if isinstance(error, BrokenExecutor):
        return (
            "the process of a job was killed, for want of memory perhaps, and the sweep ended with it: fewer jobs at a "
            "time (hydra.launcher.n_jobs=…), and the same command with resume=auto goes on"
        )
    if isinstance(error, OSError) and error.filename:
        return (
            f"the run folder {error.filename} cannot be written ({error.strerror}): start where you may write, or give "
            "hydra.run.dir=… (hydra.sweep.dir=… for a multirun)"
        )
    if (override := re.match(r"Could not override '(.+?)'", text)) is None:
        return one_line(error)
    return unknown_key(override.group(1), name)


def one_line(error: Exception) -> str:
    """What an error says, or its kind; of one from a process that loads images, without that one's traceback."""
    text = str(error)
    if text.startswith("Caught ") and "in DataLoader worker" in text:  # the worker's whole traceback
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__
