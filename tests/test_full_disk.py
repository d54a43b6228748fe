"""A disk that is really full: a small file system of its own, in memory."""

import csv
import subprocess
import sys

import pytest

from simmim.checkpoint_files import damage
from simmim.run_folder import list_checkpoints

# Three checkpoints of 2.5 MB do not fit: the third is written before the first is removed.
DISK = "mount -t tmpfs -o size=6m none outputs && {command}; code=$?; cp -a outputs kept; exit $code"
SPACES = ["unshare", "--map-root-user", "--mount"]

try:
    ALLOWED = subprocess.run([*SPACES, "true"], capture_output=True).returncode == 0
except OSError:
    ALLOWED = False
pytestmark = pytest.mark.skipif(not ALLOWED, reason="this system does not let users mount a file system of their own")


def run(folder, *arguments):
    """Trains with a full disk; what is on the disk in the end lies in `kept`."""
    (folder / "outputs").mkdir()
    overrides = ("name=full", "trainer.max_epochs=10", "trainer.max_steps=12", "pictures=1", "optimizer.ema_decay=0.9")
    words = (sys.executable, "-m simmim.pretrain experiment=debug checkpoint.every_n_steps=2", *overrides, *arguments)
    command = " ".join(words)
    script = DISK.format(command=command)
    done = subprocess.run([*SPACES, "sh", "-c", script], cwd=folder, capture_output=True, text=True, timeout=100)
    return done, folder / "kept" / "pretrain" / "full"


def test_the_run_stops_with_the_old_checkpoints(tmp_path):
    done, kept = run(tmp_path, "checkpoint.on_error=stop")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() + done.stdout.splitlines() if "could not be written" in line]
    assert len(lines) == 1
    assert "step_0000006.ckpt could not be written (No space left on device); the newest is that of step 4" in lines[0]
    assert "make room and continue with resume=auto" in lines[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert [p.name for p in (kept / "checkpoints").iterdir()] and [damage(p) for p in list_checkpoints(kept)] == [
        "",
        "",
    ]
    assert not [p for p in (kept / "checkpoints").iterdir() if p.name.startswith(".")]


def test_the_run_goes_on_if_told_so(tmp_path):
    done, kept = run(tmp_path, "checkpoint.on_error=continue")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "and the run goes on (checkpoint.on_error=continue)" in done.stdout
    assert [p.name for p in list_checkpoints(kept)] == ["step_0000002.ckpt", "step_0000004.ckpt"]
    with (kept / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]] == list(range(1, 13))
