"""`python -m simmim.consolidate <run>`: one file out of a sharded checkpoint, for sharing or for a single device."""

import logging
from pathlib import Path

from simmim.checkpoint_files import load, save_file
from simmim.command import command
from simmim.config import Config
from simmim.run_folder import CHECKPOINTS, shown
from simmim.training.checkpoint import newest_checkpoint

log = logging.getLogger(__name__)


def consolidate(config: Config) -> Path:
    """Writes a checkpoint as one file, which everything that takes a checkpoint reads.

    Args:
        config: The composed `conf/consolidate.yaml`.

    Returns:
        The file.

    Raises:
        ValueError: If there is no whole checkpoint, or the file exists.
    """
    checkpoint = newest_checkpoint(Path(config["checkpoint"]), key="checkpoint")
    folder = checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else Path(config["output_dir"])
    out = folder / checkpoint.name if config["out"] is None else Path(config["out"])
    if out.exists():
        raise ValueError(f"out={out} exists already: give another out=…")
    save_file(load(checkpoint), out)
    log.info(f"file       {shown(out)}, {out.stat().st_size / 1e6:,.1f} MB, with the optimizer's state")
    log.info(f"next: python -m simmim.reconstruct encoder={shown(out)} images=<file or folder>, or resume={shown(out)}")
    return out


if __name__ == "__main__":
    command(consolidate, positional="checkpoint")()
