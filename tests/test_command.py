"""What a person types and reads: errors, folders, sweeps. Real processes where the process is the claim."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from simmim.command import compose_config, explain
from simmim.pretrain import pretrain


def type_in(folder, *arguments, module="simmim.pretrain", **environment):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=250,
    )


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
        ("data.std=[0]", ["data.std=[0] must be positive"]),
        ("optimizer.clip_grad_norm=null", ["optimizer.clip_grad_norm=None must be a number"]),
        ("optimizer.base_lr=0", ["optimizer.base_lr=0 must be a number, positive"]),
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
    typo = type_in(tmp_path, "modell=swinv2_t")
    assert typo.returncode == 1
    assert len((typo.stdout + typo.stderr).splitlines()) == 1
    assert "did you mean model?" in typo.stderr


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
    process = subprocess.Popen(
        [sys.executable, "-m", "simmim.pretrain", *arguments],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    metrics = tmp_path / "outputs/pretrain/mine/metrics.csv"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 6) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    last = output.splitlines()[-1]
    step = int(re.match(r"stopped at step (\d+) of 100000, saved: .*name=mine and resume=auto continues", last)[1])
    done = type_in(tmp_path, *arguments[:2], f"trainer.max_steps={step + 2}", *arguments[3:], "resume=auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"continued from step_{step:07d}.ckpt" in done.stdout


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
