"""The command that makes a prepared copy, and training from the copy."""

import contextlib
import re
import signal
import time
from pathlib import Path

import pytest
import started
from PIL import Image

from simmim.config import compose_config
from simmim.data.folder import FolderSource
from simmim.data.shards import ShardSource, write_shard
from simmim.prepare import prepare
from simmim.pretrain import pretrain

IMAGES = 150


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Noise, which JPEG hardly compresses: a dozen images a MiB."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(IMAGES):
        path = root / "ab"[index % 2] / f"{index:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((320 + index % 7, 280), 80).convert("RGB").save(path, quality=90)
    (root / "a" / "005x.jpg").write_bytes(b"no image")
    (root / "b" / "empty.png").write_bytes(b"")
    return root


def run(root, out, *overrides):
    overrides = [f"data.root={root}", f"out={out}", "shard_mb=1", "workers=0", *overrides]
    return prepare(compose_config("prepare", overrides, output_dir=out))


def content(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    return run(photos, tmp_path_factory.mktemp("whole") / "copy")


def test_the_copy_holds_every_readable_image_and_lists_the_others(photos, whole):
    folder, copy = FolderSource(photos), ShardSource(whole)
    names = [folder.relative_name(index) for index in range(len(folder))]
    assert [copy.relative_name(index) for index in range(len(copy))] == [
        name for name in names if name not in ("a/005x.jpg", "b/empty.png")
    ]
    assert len(copy) == IMAGES
    assert copy.classes == folder.classes == ["a", "b"]
    for index in (0, 70, 149):
        image, label = copy.load(index)
        assert min(image.shape[-2:]) == 256
        assert copy.classes[label] == copy.relative_name(index)[0]
    lines = (whole / "unreadable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["a/005x.jpg", "b/empty.png"]
    assert lines[1].split("\t")[1] == "empty file"
    assert len(list(whole.glob("*.tar"))) > 4


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="lists processes as Linux does")
def test_killed_and_run_again_it_is_the_same_to_the_last_byte(photos, whole, tmp_path):
    out = tmp_path / "copy"
    command = ["-m", "simmim.prepare", f"data.root={photos}", f"out={out}", "shard_mb=1", "workers=1"]
    process = started.start(*command, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (out / "shard-00001.json").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    workers = children_of(process.pid)
    assert workers
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "index.json").exists()
    kept = {name: (out / name).stat().st_mtime_ns for name in ("shard-00000.tar", "shard-00001.tar")}
    done = started.run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ of 152 images are there already", done.stdout + done.stderr)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert content(out) == content(whole)
    assert not set(workers) & set(living()), "the workers of the killed process are left"


def living():
    """Processes that are no zombies: number, and that of the parent."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(status.parent.name)] = int(parent)
    return found


def children_of(parent):
    return [process for process, its_parent in living().items() if its_parent == parent]


def test_ctrl_c_is_one_line_and_loses_no_whole_shard(photos, whole, tmp_path, monkeypatch):
    def pressed(*arguments):
        if "shard-00002" in str(arguments[0]):
            raise KeyboardInterrupt
        return write_shard(*arguments)

    monkeypatch.setattr("simmim.prepare.write_shard", pressed)
    with pytest.raises(ValueError, match=r"^stopped after 2 whole shards: the same command goes on behind them$"):
        run(photos, tmp_path / "copy")
    monkeypatch.undo()
    assert content(run(photos, tmp_path / "copy")) == content(whole)


def test_a_whole_copy_is_left_as_it_is(photos, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.glob("*.tar")}
    run(photos, whole)
    assert {path: path.stat().st_mtime_ns for path in whole.glob("*.tar")} == before


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_a_run_trains_from_the_copy_as_from_the_folder(whole, tmp_path, cache):
    settings = ["experiment=debug", "data=shards", f"data.root={whole}", "data.val_fraction=0.2", f"data.cache={cache}"]
    summary = pretrain(compose_config("pretrain", settings, output_dir=tmp_path / "run"))
    assert summary["val_loss"] > 0
    assert not (tmp_path / "run" / "bad_images.txt").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("short_side=128", r"^out=.* was prepared with short_side=256, now 128: give another out"),
        ("quality=80", r"^out=.* was prepared with quality=90, now 80"),
        ("quality=101", r"^quality=101 must be a whole number, positive, at most 100"),
        ("shard_mb=0", r"^shard_mb=0 must be a whole number, positive"),
        ("workers=-1", r"^workers=-1 must be a whole number, at least 0"),
        ("data.root=nowhere", r"^data\.root=nowhere does not exist"),
    ],
)
def test_what_does_not_fit_is_one_line(photos, whole, override, words):
    with pytest.raises(ValueError, match=words):
        run(photos, whole, override)


def test_the_place_of_something_else_is_refused(photos, whole, tmp_path):
    with pytest.raises(ValueError, match=r"^out=.* was prepared with root=.*photos.*, now "):
        run(photos / "a", whole)
    with pytest.raises(ValueError, match=r"holds other files: give a new folder"):
        run(photos, photos)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"is not a folder"):
        run(photos, tmp_path / "file")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("")
    with pytest.raises(ValueError, match=r"holds no image that can be read"):
        run(tmp_path / "bad", tmp_path / "out")


def test_real_broken_files_are_left_out(shared_data, tmp_path):
    out = run(shared_data / "dirty", tmp_path / "copy")
    unreadable = {line.split("\t")[0] for line in (out / "unreadable.txt").read_text().splitlines()}
    assert unreadable == {"empty.jpg", "text.jpg", "truncated.jpg"}
    source = ShardSource(out)
    assert all(source.load(index)[0].shape[0] == 3 for index in range(len(source)))
    assert source.classes == []
