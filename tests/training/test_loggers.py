"""Runs that are logged elsewhere too: one curve however often they are resumed, and never stopped by a logger."""

import csv
import json
import logging
import os
import pty
import signal
import sys
from pathlib import Path

import pytest
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

import simmim.run
from simmim.config import compose_config
from simmim.pretrain import pretrain
from simmim.run_folder import list_checkpoints
from simmim.training.environment import commit
from simmim.training.tracker import Tracker
from simmim.training.weights_and_biases import WeightsAndBiases


def run(folder, *overrides):
    return pretrain(compose_config("pretrain", ["experiment=debug", *overrides], output_dir=folder))


def losses(folder):
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]}


@pytest.fixture(scope="module", autouse=True)
def nowhere(tmp_path_factory):
    """Neither account nor network."""
    wandb.teardown()  # of other tests: it keeps the environment that it found
    with pytest.MonkeyPatch.context() as patch:
        for key in [key for key in os.environ if key.startswith("WANDB")]:
            patch.delenv(key)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        for key in ("HTTP_PROXY", "HTTPS_PROXY"):
            patch.setenv(key, "http://127.0.0.1:9")  # nobody listens there
        yield
        wandb.teardown()


def records(part):
    """What a folder of wandb's holds: a log as LevelDB's, of blocks whose pieces are put together."""
    data, position, whole = next(part.glob("*.wandb")).read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def history(part):
    """Rows that were logged, as dicts."""
    for record in records(part):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def parts(folder):
    return sorted((folder / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run of four steps that was killed after its checkpoint of step 3, and continued to step 8."""
    folder = tmp_path_factory.mktemp("run")
    settings = ("logger=[tensorboard,wandb]", "logger.group=trials", "checkpoint.every_n_steps=3", "name=mine")
    run(folder, *settings, "trainer.max_steps=4", "trainer.max_epochs=1", "schedule.warmup_epochs=0")
    list_checkpoints(folder)[-1].unlink()
    run(folder, *settings, "schedule.warmup_epochs=0", "resume=auto")
    return folder


def test_tensorboard_shows_one_curve_of_a_resumed_run(resumed):
    events = EventAccumulator(str(resumed / "tensorboard")).Reload()
    curve = {event.step: event.value for event in events.Scalars("train_loss")}
    assert [event.step for event in events.Scalars("train_loss")] == list(range(1, 9))
    assert curve == pytest.approx(losses(resumed), rel=1e-5)
    assert [event.step for event in events.Scalars("val_loss")] == [4, 8]
    shown = events.Images("reconstructions")
    assert [event.step for event in shown] == [4, 8]
    with Image.open(resumed / "reconstructions" / "epoch_0002.png") as picture:
        assert (shown[-1].width, shown[-1].height) == picture.size
    assert {"config/text_summary", "environment/text_summary"} <= set(events.Tags()["tensors"])


def test_wandb_shows_one_run_with_one_curve(resumed):
    """Offline, what is synchronised last replaces what came before: it must hold everything."""
    first, last = parts(resumed)
    identity = (resumed / "wandb" / "id").read_text()
    assert all(part.name.endswith(f"-{identity}") for part in (first, last))
    rows = [row for row in history(last) if "train_loss" in row]
    assert [row["trainer/global_step"] for row in rows] == list(range(1, 9))
    curve = {row["trainer/global_step"]: row["train_loss"] for row in rows}
    assert curve == pytest.approx(losses(resumed), rel=1e-5)
    assert [row["trainer/global_step"] for row in history(last) if "val_loss" in row] == [4, 8]
    for part, steps in ((first, [4]), (last, [4, 8])):
        shown = [row["trainer/global_step"] for row in history(part) if any("reconstructions" in key for key in row)]
        assert shown == steps
        assert len(list(part.glob("files/media/images/reconstructions_*.png"))) == len(steps)


def test_wandb_knows_what_made_the_numbers(resumed):
    for part in parts(resumed):
        (begun,) = (record.run for record in records(part) if record.WhichOneof("record_type") == "run")
        assert (begun.display_name, begun.run_group, begun.job_type) == ("mine", "trials", "pretrain")
        config = {item.key: json.loads(item.value_json) for item in begun.config.update}
        assert config["data"]["image_size"] == 32
        assert config["environment"]["commit"] == commit()
        assert {"python", "torch", "lightning", "device"} <= set(config["environment"])


def test_a_run_that_begins_anew_is_another_one(tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "id").write_text("earlier")
    run(tmp_path, "logger=wandb", "trainer.max_steps=1", "pictures=1")
    assert (tmp_path / "wandb" / "id").read_text() != "earlier"


class Broken(Tracker):
    """Raises at one of its calls, and counts them."""

    def __init__(self, call):
        super().__init__(f"broken at {call}")
        self.call, self.calls = call, []

    def write_metrics(self, metrics, step):
        self._made("write_metrics")

    def write_picture(self, key, path, step):
        self._made("write_picture")

    def end(self, exit_code):
        self._made(f"end {exit_code}")

    def _made(self, call):
        self.calls.append(call)
        if call.startswith(self.call):
            raise RuntimeError("no more")


def test_no_failure_of_a_logger_stops_a_run(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    broken = [Broken(call) for call in ("write_metrics", "write_picture", "end", "nowhere")]
    create = simmim.run.create_loggers
    monkeypatch.setattr(simmim.run, "create_loggers", lambda *args, **kwargs: [*create(*args, **kwargs), *broken])
    assert run(tmp_path)["step"] == 8
    assert sorted(losses(tmp_path)) == list(range(1, 9))
    for tracker in broken[:3]:
        assert caplog.text.count(f"{tracker.title} failed (no more): the run goes on without it") == 1
    assert len(caplog.records) == 3
    assert broken[0].calls == ["write_metrics"]
    assert broken[1].calls[-1] == "write_picture" and broken[1].calls.count("write_picture") == 1
    whole = broken[3].calls
    assert whole.count("write_picture") == 2 and whole.count("write_metrics") == 10 and whole[-1] == "end 0"
    assert broken[2].calls == whole


def test_a_run_goes_on_when_wandbs_service_is_gone_and_the_next_one_has_its_own(tmp_path, monkeypatch, caplog):
    write = WeightsAndBiases.write_picture

    def bereft(logger, *args):
        for status in Path("/proc").glob("[0-9]*/status"):
            lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            if lines.get("PPid") == str(os.getpid()) and "wandb-core" in (status.parent / "cmdline").read_text():
                os.kill(int(status.parent.name), signal.SIGKILL)
        write(logger, *args)

    monkeypatch.setattr(WeightsAndBiases, "write_picture", bereft)
    assert run(tmp_path / "bereft", "logger=wandb")["step"] == 8
    assert caplog.text.count("Weights & Biases failed (") == 1
    monkeypatch.setattr(WeightsAndBiases, "write_picture", write)
    run(tmp_path / "next", "logger=wandb", "trainer.max_steps=1")
    assert caplog.text.count("Weights & Biases failed (") == 1
    assert sum("train_loss" in row for row in history(*parts(tmp_path / "next"))) == 1


def test_wandb_out_of_reach_is_one_line(tmp_path, monkeypatch):
    wandb.teardown()
    monkeypatch.setattr("simmim.training.weights_and_biases.PATIENCE", 1)
    monkeypatch.setattr("wandb.sdk.lib.identity._RESOLVE_TIMEOUT_SECONDS", 0.1, raising=False)  # asks who we are
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with pytest.raises(ValueError, match=r"(?s)^logger\.mode=online: [^\n]*refused[^\n]*: give logger\.mode=offline"):
        run(tmp_path, "logger=wandb", "logger.mode=online")
    wandb.teardown()


def test_wandb_without_a_key_never_asks(tmp_path, monkeypatch):
    """Even at a terminal, where it would."""
    parent, child = pty.openpty()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        monkeypatch.setattr(sys, name, os.fdopen(os.dup(child), mode))
    with pytest.raises(ValueError, match=r"^logger\.mode=online: .*no API key.*give logger\.mode=offline"):
        run(tmp_path, "logger=wandb", "logger.mode=online")
    os.close(child)
    os.close(parent)


def test_tensorboard_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ValueError, match=r"^logger=tensorboard needs TensorBoard: pip install 'simmim\[tensorboard\]'$"
    ):
        run(tmp_path, "logger=tensorboard")
