"""What a person types and reads: errors, folders, sweeps. Real processes where the process is the claim."""

import os
import re
import signal
import sys
import time

import pytest
import started
import torch
from PIL import Image

from simmim.command import EXIT_STOPPED, command
from simmim.config import compose_config
from simmim.data.folder import FolderSource
from simmim.errors import explain
from simmim.pretrain import pretrain


def type_in(folder, *arguments, module="simmim.pretrain", **environment):
    return started.run("-m", module, *arguments, cwd=folder, env=environment)


def error_of(*overrides, folder):
    with pytest.raises(Exception) as caught:
        pretrain(compose_config("pretrain", ["experiment=debug", *overrides], output_dir=folder))
    return explain(caught.value, "pretrain")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.widow_size=7", ["model.widow_size is not a key", "did you mean model.window_size?"]),
        ("batch_size=7", ["batch_size is not a key", "data.batch_size"]),
        ("keep=3", ["keep is not a key", "did you mean checkpoint.keep?"]),
        ("model=swinv3_b", ["model=swinv3_b is unknown", "swinv2_b"]),
        ("experiment=best", ["experiment", "choose one of", "simmim_swinv2_b_800ep"]),
        ("data.root=photos", ["data.root belongs to data=folder"]),
        ("data=folder", ["data.root must be given"]),
        ("masking.ratio=-0.2", ["masking.ratio=-0.2", "between 0 and 1"]),
        ("data.image_size=100", ["data.image_size=100x100", "masking.patch_size=16", "96x96"]),
        ("model.window_size=3", ["image size 32x32 px does not fit", "model.window_size=3"]),
        ("data.batch_size=many", ["data.batch_size=many must be a whole number"]),
        ("data.crop_scale=[0.5,2]", ["data.crop_scale=[0.5, 2]", "at most 1"]),
        ("data.std=[0]", ["data.std=[0] must be a number, at least 1e-12"]),
        ("optimizer.clip_grad_norm=null", ["optimizer.clip_grad_norm=null must be a number"]),
        ("optimizer.base_lr=0", ["optimizer.base_lr=0 must be a number, positive"]),
        ("data.timeout=0", ["data.timeout=0 must be a number, positive"]),
        ("pictures=0", ["pictures=0 must be a whole number, positive"]),
        ("objective.target_downsampling=32", ["objective.target_downsampling=32"]),
        ("masking.patch_size=4 objective.target_downsampling=8", ["target_downsampling=8 must divide masking.patch"]),
        ("trainer.precision=16-mixed", ["trainer.precision=16-mixed", "bf16-mixed"]),
        ("trainer.devices=2", ["trainer.devices=2"]),
        ("data.batch_size=0", ["data.batch_size=0 must be a whole number, positive"]),
        ("data.batch_size=-1", ["data.batch_size=-1 must be a whole number, positive"]),
        ("optimizer.weight_decay=-1", ["optimizer.weight_decay=-1 must be a number, at least 0"]),
        ("data.mean=[0.5,0.5]", ["data.mean=[0.5, 0.5] has 2 values for data.channels=3"]),
        ("data.image_size=[32,32,32]", ["data.image_size=[32, 32, 32]", "[height, width]"]),
        ("data.on_error=ignore", ["data.on_error=ignore is unknown", "skip or raise"]),
        ("checkpoint.every_n_steps=0", ["checkpoint.every_n_steps=0 must be a whole number, positive"]),
        ("resume=elsewhere", ["resume=elsewhere does not exist", "outputs/pretrain/<name>"]),
        ("encoder=elsewhere", ["encoder=elsewhere does not exist"]),
        ("schedule.name=linear", ["schedule.name=linear is unknown"]),
        ("model.attention=flash", ["model.attention=flash is unknown"]),
        ("seed", ["seed: this is no key=value"]),
        ("data.root=~/photos", ["data.root=~/photos: this is no key=value", "$HOME"]),
        ("data.rot=photos", ["did you mean data.root?"]),
        ("+data.rooot=photos", ["data.rooot is not a key", "did you mean data.root?"]),
        ("+data.root=photos", ["data.root belongs to data=folder"]),
        ("data=folder data.root=photos data.train_images=9", ["data.train_images belongs to data=synthetic"]),
        ("data.source=folder", ["data.root is missing", "data=folder"]),
        ("optimizer=3", ["optimizer=3: optimizer is a section"]),
        ("checkpoint=[1]", ["checkpoint=[1]: this key holds something else"]),
        ("model=null", ["model=null is unknown: choose one of", "swinv2_t"]),
        ("trainer.max_epochs=inf", ["trainer.max_epochs=inf must be a number"]),
        ("optimizer.betas=[0.9,1]", ["optimizer.betas=[0.9, 1] must be a list of 2", "below 1"]),
        ("seed=99999999999", ["seed=99999999999 must be a whole number", "at most 4,294,967,295"]),
        ("logger.tensorboard=true", ["logger.tensorboard belongs to logger=tensorboard"]),
        ("logger.mode=online", ["logger.mode belongs to logger=wandb"]),
        ("logger=[csv,wanb]", ["logger=[csv,wanb] is unknown: choose one of csv, tensorboard, wandb"]),
        ("name=../mine", ["name=../mine must be a name"]),
        ("data.channels=true", ["data.channels=true must be a whole number"]),
        ("trainer=ddp trainer.num_nodes=2", ["trainer.num_nodes=2", "torchrun"]),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(tmp_path, override, words):
    line = error_of(*override.split(), folder=tmp_path / "run")
    assert "\n" not in line
    for word in words:
        assert word in line


def test_a_missing_or_empty_folder_is_one_line(tmp_path):
    assert "data.root" in error_of("data=folder", f"data.root={tmp_path}/none", folder=tmp_path / "run")
    assert error_of("data=folder", "data.root=", folder=tmp_path / "run") == "data.root is empty: data.root=…"
    (tmp_path / "empty").mkdir()
    assert "holds no image" in error_of("data=folder", f"data.root={tmp_path}/empty", folder=tmp_path / "run")


def test_a_gpu_that_is_not_there_is_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "give trainer=cpu" in error_of("trainer=gpu", folder=tmp_path)


def test_the_error_of_a_worker_is_one_line(tmp_path):
    (tmp_path / "photos").mkdir()
    for index in range(4):
        (tmp_path / "photos" / f"{index}.jpg").write_bytes(b"no image")
    (tmp_path / "good").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "good" / "a.png")  # the first pictures are read without a worker
    settings = ["data=folder", f"data.root={tmp_path}/photos", f"data.val_root={tmp_path}/good", "data.num_workers=1"]
    with pytest.raises(ValueError) as caught:
        pretrain(compose_config("pretrain", ["experiment=debug", *settings], output_dir=tmp_path / "run"))
    assert re.match(
        r"\d images in a row cannot be read, the first being .*\.jpg: not an image", explain(caught.value, "")
    )


def test_the_process_prints_one_line_and_exits_with_1(tmp_path):
    done = type_in(tmp_path, "experiment=debug", "masking.ratio=2", "name=wrong")
    assert done.returncode == 1
    lines = (done.stdout + done.stderr).splitlines()
    assert lines == ["masking.ratio=2 must lie between 0 and 1, both excluded: the paper uses 0.6"]
    assert lines[0] in (tmp_path / "outputs/pretrain/wrong/run.log").read_text()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("modell=swinv2_t", "did you mean model?"),
        ("+optimizer.base_lrr=1", "did you mean optimizer.base_lr?"),
        ("~optimizer.eps", "optimizer.eps is missing"),
        ("logger=[1,2]", "choose one of csv, tensorboard, wandb"),
    ],
)
def test_a_key_that_nobody_reads_or_misses_is_one_line(tmp_path, override, words):
    done = type_in(tmp_path, "experiment=debug", override)
    assert done.returncode == 1
    assert len((done.stdout + done.stderr).splitlines()) == 1
    assert words in done.stdout + done.stderr


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "outputs").write_text("a file")
    done = type_in(tmp_path, "experiment=debug", "name=mine")
    assert done.returncode == 1
    [line] = (done.stdout + done.stderr).splitlines()
    assert re.match(
        r"the run folder outputs/pretrain/mine cannot be written \(Not a directory\): .*hydra\.run\.dir=", line
    )


def test_a_disk_that_fills_up_costs_the_log_and_not_the_run(tmp_path):
    """Nothing but the few bytes of the tables, and no traceback for each line that run.log lacks."""
    code = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import simmim.pretrain
fit = simmim.run.Trainer.fit
def full(*args, **options):
    resource.setrlimit(resource.RLIMIT_FSIZE, (90, -1))  # bytes a file
    try:
        fit(*args, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
simmim.run.Trainer.fit = full
simmim.pretrain.command(simmim.pretrain.pretrain)()
"""
    overrides = ["experiment=debug", "name=full", "checkpoint.on_error=continue"]
    done = started.run("-c", code, *overrides, cwd=tmp_path)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "Traceback" not in output and "Logging error" not in output
    for name in ("metrics.csv", "epoch_0001.png", "epoch_0002.png"):
        assert len(re.findall(rf"{name} cannot be written \(File too large\)", output)) == 1
    assert (tmp_path / "outputs/pretrain/full/encoder.safetensors").is_file()


def test_the_full_error_is_there_for_those_who_ask(tmp_path):
    done = type_in(tmp_path, "experiment=debug", "masking.ratio=2", HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stdout


def test_a_named_run_continues_and_is_never_overwritten(tmp_path):
    arguments = ("experiment=debug", "name=mine", "trainer.max_epochs=1")
    first = type_in(tmp_path, *arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == (
        "done: outputs/pretrain/mine; next: python -m simmim.reconstruct encoder=outputs/pretrain/mine "
        "images=<file or folder>"
    )
    before = (tmp_path / "outputs/pretrain/mine/config.yaml").read_text()
    again = type_in(tmp_path, *arguments)
    assert again.returncode == 1
    assert "resume=auto continues it" in again.stdout
    assert (tmp_path / "outputs/pretrain/mine/config.yaml").read_text() == before
    assert type_in(tmp_path, *arguments, "resume=auto").returncode == 0


def test_ctrl_c_saves_and_the_run_continues(tmp_path):
    arguments = [
        "experiment=debug",
        "name=mine",
        "trainer.max_steps=100000",
        "data.num_workers=1",
        "log_every_n_steps=1",
    ]
    process = started.start("-m", "simmim.pretrain", *arguments, cwd=tmp_path)
    metrics = tmp_path / "outputs/pretrain/mine/metrics.csv"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 6) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED
    last = output.splitlines()[-1]
    step = int(re.match(r"stopped at step (\d+) of 100000, saved: .*name=mine and resume=auto continues", last)[1])
    done = type_in(tmp_path, *arguments[:2], f"trainer.max_steps={step + 2}", *arguments[3:], "resume=auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"continued from step_{step:07d}.ckpt" in done.stdout


def test_a_disk_that_hangs_ends_the_process_with_one_line(tmp_path):
    for name in ("disk", "photos", "good"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "good" / "a.png")
    for index in range(4):
        Image.new("RGB", (40, 40)).save(tmp_path / "disk" / f"{index}.png")
        (tmp_path / "photos" / f"{index}.png").symlink_to(tmp_path / "disk" / f"{index}.png")
    os.utime(tmp_path / "photos", (0, 0))
    FolderSource(tmp_path / "photos")  # keeps the listing, so that the run does not touch the disk
    for path in (tmp_path / "disk").iterdir():
        path.unlink()
        os.mkfifo(path)  # whoever opens it waits for ever
    settings = ["data=folder", "data.root=photos", "data.val_root=good", "data.num_workers=2", "data.timeout=2"]
    started = time.monotonic()
    done = type_in(tmp_path, "experiment=debug", *settings, "name=hung")
    assert time.monotonic() - started < 60
    assert done.returncode == 1
    assert re.fullmatch(
        r"no batch came for data\.timeout=2 s: photos/\d\.png was being read for \d s: see that .*",
        (done.stdout + done.stderr).splitlines()[-1],
    )
    assert "Traceback" not in done.stdout + done.stderr


def test_a_sweep_has_a_folder_a_job_and_reports_the_one_that_failed(tmp_path):
    done = type_in(tmp_path, "-m", "experiment=debug", "name=sweep", "trainer.max_steps=1", "masking.ratio=0.5,1.5,0.7")
    assert done.returncode == 1
    jobs = tmp_path / "multirun/sweep"
    assert sorted(p.name for p in jobs.iterdir()) == ["0", "1", "2", "multirun.yaml"]
    assert [(jobs / n / "encoder.safetensors").exists() for n in "012"] == [True, False, True]
    last = done.stderr.splitlines()[-1]
    assert last.startswith("job 1 (")
    assert "masking.ratio=1.5" in last
    assert not (tmp_path / "outputs").exists()


def test_a_run_out_of_memory_ends_with_what_would_fit(tmp_path):
    """1.2 GB of parameters where half a GB more may be taken."""
    code = """
import resource, runpy, sys
held = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1])
resource.setrlimit(resource.RLIMIT_DATA, (held + 5 * 10**8,) * 2)
runpy.run_module("simmim.pretrain", run_name="__main__")
"""
    arguments = ["experiment=debug", "model.embed_dim=1024", "model.num_heads=[8,16,32]", "data.batch_size=1"]
    # a thread that finds no room for itself fails in other words
    done = started.run("-c", code, *arguments, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    last = (done.stdout + done.stderr).splitlines()[-1]
    assert done.returncode == 1
    assert re.match(
        r"out of memory: a step takes about [\d.]+ of [\d.]+ GB.*\(python -m simmim\.plan says more\)", last
    )
    assert "Traceback" not in done.stdout + done.stderr


def test_a_command_called_in_a_process_leaves_its_environment_as_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for said in (None, "0"):
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        if said is not None:
            monkeypatch.setenv("HYDRA_FULL_ERROR", said)
        monkeypatch.setattr(sys, "argv", ["simmim.pretrain", "experiment=debug", "masking.ratio=2"])
        with pytest.raises(SystemExit):
            command(pretrain)()
        assert os.environ.get("HYDRA_FULL_ERROR") == said
