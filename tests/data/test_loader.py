"""Loader processes that really die and hang, over real files."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from simmim.data.files import InMemory
from simmim.data.folder import FolderSource
from simmim.data.module import ImageData
from simmim.data.synthetic import SyntheticSource
from simmim.data.transforms import centre_transform, pretraining_transform
from simmim.masking import Masking


@pytest.fixture(autouse=True)
def no_handler_of_others():
    """A loader that nobody watches, of another test in this process, leaves PyTorch's handler behind."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def data_from(source, *, workers=2, timeout=60, num_batches=40, on_gpu=False):
    data = ImageData(
        (source, source),
        masking=Masking((32, 32), patch_size=8, ratio=0.5, strategy="random", model_patch_size=2),
        transforms=(
            pretraining_transform((32, 32), crop_scale=[0.67, 1.0], crop_ratio=[0.75, 1.33]),
            centre_transform((32, 32)),
        ),
        batch_size=2,
        num_workers=workers,
        timeout=timeout,
        on_gpu=on_gpu,
        num_batches=num_batches,
        seed=0,
    )
    data.trainer = type("Alone", (), {"global_rank": 0, "world_size": 1})()
    return data


def photos(root, count=12):
    root.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(root / f"{index}.png")
    return FolderSource(root)


def make_hang(path):
    """Whoever opens a pipe waits for somebody at its other end, for ever."""
    path.unlink()
    os.mkfifo(path)


def ends_at(index, end, source):
    """The source, except that whoever loads an image ends."""

    class Deadly:
        classes = ()
        name = source.name

        def __len__(self):
            return len(source)

        def load(self, at):
            return end() if at == index else source.load(at)

    return Deadly()


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by signal 9"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "killed by signal 11"),
        (lambda: os._exit(3), "exit code 3"),
        (lambda: os._exit(0), "exit code 0"),
    ],
)
def test_a_process_that_dies_names_the_image_that_it_held(tmp_path, end, cause, capfd):
    source = photos(tmp_path / "photos")
    loader = data_from(ends_at(7, end, source)).loader_from(0)
    started = time.monotonic()
    with pytest.raises(ValueError) as caught:
        list(loader)
    assert str(caught.value) == (
        f"a loader process died ({cause}) while it read {source.name(7)}: fewer data.num_workers if memory ran out, "
        "else remove the image"
    )
    assert time.monotonic() - started < 4  # PyTorch by itself looks every five seconds
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["synthetic", "ram", "validation", "replacement"])
def test_every_source_and_both_loaders_are_watched(tmp_path, kind):
    source = SyntheticSource(12, (40, 40)) if kind == "synthetic" else photos(tmp_path / "photos")
    if kind == "ram":
        source = InMemory(source)
    if kind == "replacement":
        Path(source.name(4)).write_bytes(b"")  # the next one, which is read in its place, kills
    position = 5
    data = data_from(ends_at(position, lambda: os._exit(3), source), workers=1)
    with pytest.raises(ValueError) as caught:
        list(data.val_dataloader() if kind == "validation" else data.loader_from(0))
    assert f"while it read {source.name(position)}: " in str(caught.value)


def test_a_death_is_told_where_the_next_batch_is_taken_and_nowhere_else(tmp_path):
    data = data_from(SyntheticSource(12, (40, 40)), workers=1)
    loader = data.loader_from(0)
    batches = iter(loader)
    next(batches)
    handler = signal.getsignal(signal.SIGCHLD)
    [worker] = loader._iterator._workers
    worker.kill()
    worker.join()
    time.sleep(0.2)  # the training goes on, whatever it does: nothing is raised here
    with pytest.raises(ValueError, match=r"^a loader process died \(killed by signal 9\) (between two|while it) "):
        list(batches)
    assert signal.getsignal(signal.SIGCHLD) == handler == signal.SIG_DFL


def test_a_process_that_hangs_is_told_with_its_image_and_ends(tmp_path):
    source = photos(tmp_path / "photos")
    make_hang(tmp_path / "photos" / "7.png")
    loader = data_from(source, timeout=2).loader_from(0)
    started = time.monotonic()
    with pytest.raises(ValueError) as caught:
        list(loader)
    assert 2 <= time.monotonic() - started < 5
    assert re.sub(r"\d s: see", "2 s: see", str(caught.value)) == (
        f"no batch came for data.timeout=2 s: {tmp_path}/photos/7.png was being read for 2 s: see that its disk "
        "answers, remove the image, or give a longer data.timeout"
    )
    for process in loader._iterator._workers:
        process.join(timeout=5)
        assert process.exitcode == -signal.SIGKILL


def test_without_processes_there_is_no_limit():
    assert (
        len(list(data_from(SyntheticSource(4, (40, 40)), workers=0, timeout=0.001, num_batches=3).loader_from(0))) == 3
    )
