"""Who starts the processes of a run: the run itself, Slurm, torchrun, or a multirun for each of its jobs."""

import csv
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

import simmim.devices
from simmim.command import command
from simmim.config import compose_config
from simmim.devices import check_devices
from simmim.processes import cluster_environments, run_apart, started_outside

CLUSTER = Path(__file__).resolve().parent.parent / "cluster"
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
SECOND_OF_FOUR = {
    "SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "simmim", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NODELIST": "gpu[7-8]",
}  # fmt: skip


@pytest.fixture
def slurm(monkeypatch):
    for key in [key for key in os.environ if key.startswith(("SLURM", "MASTER", "TORCHELASTIC"))]:
        monkeypatch.delenv(key)
    for key, value in SECOND_OF_FOUR.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("MASTER_PORT", "1")  # set by what is tested: it goes back when the test ends
    monkeypatch.delenv("MASTER_PORT")
    return monkeypatch


def config_of(*overrides):
    return compose_config("pretrain", ["experiment=debug", *overrides], output_dir=Path("unused"))


def test_ranks_are_those_of_slurms_tasks(slurm):
    slurm.setenv("MASTER_ADDR", "")
    slurm.delenv("MASTER_ADDR")
    assert started_outside() == (2, 2)
    (environment,) = cluster_environments()
    assert isinstance(environment, SLURMEnvironment) and not environment.auto_requeue
    assert (environment.global_rank(), environment.local_rank(), environment.node_rank()) == (3, 1, 1)
    assert (environment.world_size(), environment.main_address, environment.main_port) == (4, "gpu7", 16234)
    environment.validate_settings(num_devices=2, num_nodes=2)
    check_devices(config_of(*TWO, "trainer.num_nodes=2"))


def test_one_task_of_slurm_starts_processes_of_its_own(slurm):
    for key, value in {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "0"}.items():
        slurm.setenv(key, value)
    assert started_outside() is None
    assert [type(environment) for environment in cluster_environments()] == [LightningEnvironment]
    check_devices(config_of(*TWO))


def test_torchrun_inside_of_slurm_counts(slurm):
    for key, value in {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}.items():
        slurm.setenv(key, value)
    assert started_outside() == (3, 2)
    assert cluster_environments() == []  # Lightning's own choice is torchrun's


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, r"2 processes, but 4 were started: give trainer\.devices=2 trainer\.num_nodes=2"),
        ({"SLURM_NTASKS_PER_NODE": "4"}, r"but 4 were started: give trainer\.devices=4 trainer\.num_nodes=1"),
        ({"SLURM_NTASKS_PER_NODE": None}, r"Slurm started 4 tasks by --ntasks: give --nodes and --ntasks-per-node"),
    ],
)
def test_other_numbers_than_were_started_are_one_line(slurm, variables, words):
    for key, value in variables.items():
        slurm.setenv(key, value) if value else slurm.delenv(key)
    with pytest.raises(ValueError, match=words):
        check_devices(config_of(*TWO))


def test_gpus_that_slurm_hides_are_told_of(slurm, monkeypatch):
    monkeypatch.setattr(simmim.devices, "on_gpu", lambda config: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"finds 1 GPUs here: .*--gpus-per-node, not --gpus-per-task"):
        check_devices(config_of(*TWO, "trainer.num_nodes=2"))


def test_a_name_is_asked_for_under_slurm(slurm):
    slurm.setattr(sys, "argv", ["pretrain", "experiment=debug"])

    def pretrain(config):
        raise AssertionError("it began")

    with pytest.raises(SystemExit, match=r"^name=… must be given under torchrun or Slurm"):
        command(pretrain)()


CHILD = """
import os, signal, subprocess, sys, time
other = subprocess.Popen(["sleep", "60"])
def stop(number, frame):
    other.wait()
    sys.exit(75 if {polite} else 1)
signal.signal(signal.SIGUSR1, stop) if {polite} else None
open("ready", "w").write(str(other.pid))
time.sleep(60)
"""


@pytest.mark.parametrize("polite", [True, False])
def test_a_signal_reaches_every_process_of_a_command_that_runs_apart(tmp_path, monkeypatch, polite):
    monkeypatch.chdir(tmp_path)

    def ask():
        while not (tmp_path / "ready").exists() or not (tmp_path / "ready").read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=ask)
    thread.start()
    code, asked = run_apart([sys.executable, "-S", "-c", CHILD.format(polite=polite)], dict(os.environ))
    thread.join()
    assert asked
    assert code == (75 if polite else -signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == before
    stat, deadline = Path("/proc") / (tmp_path / "ready").read_text() / "stat", time.monotonic() + 20
    while (alive := stat.exists() and ") Z " not in stat.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


@pytest.mark.parametrize("script", sorted(path.name for path in CLUSTER.iterdir()))
def test_the_scripts_are_bash(script):
    subprocess.run(["bash", "-n", CLUSTER / script], check=True)


def test_torchrun_is_started_with_the_same_numbers_as_the_run(tmp_path):
    (tmp_path / "torchrun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "MACHINES": "2",
        "FIRST": "n1",
        "GPUS": "8",
    }
    words = ["bash", CLUSTER / "torchrun.sh", "pretrain", "data.root='my photos'", "name=giant"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "--nnodes", "2", "--nproc-per-node", "8", "--rdzv-backend", "c10d", "--rdzv-endpoint", "n1:29500",
        "-m", "simmim.pretrain", "data.root='my photos'", "name=giant", "trainer.devices=8", "trainer.num_nodes=2",
        "resume=auto",
    ]  # fmt: skip


SRUN = f"""#!{sys.executable} -S
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: None)  # srun hands it on
words = [word for word in sys.argv[1:] if not word.startswith("--")]
each = int(os.environ["SLURM_NTASKS_PER_NODE"])
def start(rank):
    ranks = {{"SLURM_PROCID": rank, "SLURM_LOCALID": rank % each, "SLURM_NODEID": rank // each}}
    return subprocess.Popen(words, env={{**os.environ, **{{key: str(value) for key, value in ranks.items()}}}})
tasks = [start(rank) for rank in range(int(os.environ["SLURM_NTASKS"]))]
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = '#!/bin/bash\necho "$@" >> scontrol\n'


class Slurm:
    """Stands in for Slurm: runs a batch script as its `#SBATCH` lines say, and again as long as it asks for it."""

    def __init__(self, folder, python=f'exec {sys.executable} "$@"'):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": f"#!/bin/bash\n{python}\n"}.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        self.codes = []

    def sbatch(self, *words, meanwhile=lambda job, attempt: None):
        options = [word for word in words if str(word).startswith("--")]
        script, *arguments = [word for word in words if word not in options]
        lines = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
        asked = dict(option.removeprefix("--").partition("=")[::2] for option in (*lines, *options))
        requeued = self.folder / "scontrol"
        requeued.touch()
        while len(requeued.read_text().splitlines()) == len(self.codes):
            job = subprocess.Popen(
                ["bash", script, *arguments], cwd=self.folder, env=self.environment(asked), start_new_session=True
            )
            meanwhile(job, attempt=len(self.codes))
            self.codes.append(job.wait(timeout=250))
        return asked

    def environment(self, asked):
        tasks = int(asked["nodes"]) * int(asked["ntasks-per-node"])
        return {
            **os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "SLURM_JOB_NAME": asked["job-name"],
            "SLURM_NTASKS_PER_NODE": asked["ntasks-per-node"], "SLURM_NTASKS": str(tasks), "SLURM_PROCID": "0",
            "SLURM_NNODES": asked["nodes"], "SLURM_NODELIST": "localhost", "SLURM_JOB_ID": str(free_port() - 15000),
        }  # fmt: skip


def free_port():
    """One of those that Lightning derives from a job's number."""
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port := random.randint(16000, 24999)))
            except OSError:
                continue
            return port


def test_the_batch_script_starts_a_task_for_each_gpu_and_ends_as_the_run_ends(tmp_path):
    told = 'echo "$SLURM_NODEID.$SLURM_LOCALID $*" >> "$SLURM_PROCID"'
    slurm = Slurm(tmp_path, python=f"{told}; exit 3")
    words = ("--nodes=2", "--ntasks-per-node=2", CLUSTER / "slurm_srun.sbatch", "pretrain", "trainer=fsdp", "name=a b")
    asked = slurm.sbatch(*words)
    assert slurm.codes == [3]  # an error: it does not queue again
    for rank in range(4):
        assert (tmp_path / str(rank)).read_text() == (
            f"{rank // 2}.{rank % 2} -m simmim.pretrain trainer=fsdp name=a b trainer.devices=2 trainer.num_nodes=2 "
            "resume=auto\n"
        )
    assert {"requeue", "open-mode", "gpus-per-node"} < set(asked) and asked["signal"].startswith("USR1@")


def test_a_preempted_job_saves_queues_again_and_comes_to_its_end(tmp_path):
    """SIGTERM comes to every process of the job, its shell and its loader included."""
    slurm, run = Slurm(tmp_path), tmp_path / "outputs" / "pretrain" / "mine"

    def steps():
        with (run / "metrics.csv").open() as file:
            return [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]

    def preempt(job, attempt):
        while attempt == 0 and job.poll() is None and not ((run / "metrics.csv").exists() and len(steps()) > 2):
            time.sleep(0.02)
        if attempt == 0 and job.poll() is None:
            os.killpg(job.pid, signal.SIGTERM)

    slurm.sbatch(
        "--ntasks-per-node=1", CLUSTER / "slurm_srun.sbatch", "pretrain", "experiment=debug", "name=mine",
        "trainer.max_steps=60", "data.train_images=480", "data.num_workers=1", "data.val_images=2", "pictures=1",
        meanwhile=preempt,
    )  # fmt: skip
    assert slurm.codes == [75, 0]
    (line,) = (tmp_path / "scontrol").read_text().splitlines()
    assert line.startswith("requeue ")
    assert steps() == list(range(1, 61))
    assert (run / "encoder.safetensors").exists()
    log = (run / "run.log").read_text()
    assert log.count("saved: the same command with name=mine and resume=auto continues") == 1
    assert log.count(", continued from step_") == 1
