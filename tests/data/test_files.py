"""What all sources of files share, and the copy in memory."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from simmim.data import files
from simmim.data.decoding import UnreadableImage
from simmim.data.files import InMemory, free_memory
from simmim.data.folder import FolderSource
from simmim.data.module import create_sources


@pytest.fixture
def root(tmp_path):
    for index in range(6):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20 + index, 10), 90).convert("RGB").save(path)
    (tmp_path / "images" / "a" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "images" / "a" / "empty.jpg").write_bytes(b"")
    return tmp_path / "images"


def loaded(source):
    for index in range(len(source)):
        try:
            yield source.name(index), *source.load(index)
        except UnreadableImage as error:
            yield source.name(index), str(error), -1


def test_a_copy_in_memory_gives_what_the_files_give_also_when_they_are_gone(root):
    source = FolderSource(root).subset([5, 0, 1, 2, 3])
    before = list(loaded(source))
    kept = InMemory(source)
    assert (len(kept), kept.classes) == (5, ["a", "b"])
    for path in root.rglob("*.png"):
        path.unlink()
    for (name, image, label), (kept_name, kept_image, kept_label) in zip(before, loaded(kept), strict=True):
        assert (name, label) == (kept_name, kept_label)
        assert torch.equal(image, kept_image) if isinstance(image, torch.Tensor) else image == kept_image


def test_files_that_cannot_be_read_keep_their_reasons(root):
    source = FolderSource(root)
    (root / "a" / "0.png").unlink()  # behind the listing's back
    assert [entry for entry in loaded(InMemory(source)) if isinstance(entry[1], str)] == [
        (str(root / "a/0.png"), "No such file or directory", -1),
        (str(root / "a/broken.jpg"), "not an image (none of JPEG, PNG, WEBP, GIF, BMP, TIFF, NPY)", -1),
        (str(root / "a/empty.jpg"), "empty file", -1),
    ]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_processes_share_it(root, context):
    kept = InMemory(FolderSource(root).subset([0, 1, 5]))
    loader = DataLoader(Sizes(kept), batch_size=None, num_workers=1, multiprocessing_context=context)
    assert [tuple(size.tolist()) for size in loader] == [(3, 10, 20), (3, 10, 22), (3, 10, 21)]
    if context == "spawn":
        assert len(pickle.dumps(kept.source)) < 20_000


class Sizes(torch.utils.data.Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return torch.tensor(self.source.load(index)[0].shape)


def settings(root, **changes):
    return {
        "source": "folder",
        "channels": 3,
        "root": str(root),
        "val_root": None,
        "val_fraction": 0.3,
        "cache": "ram",
        **changes,
    }


def test_the_config_chooses_and_the_log_says_the_size(root, caplog):
    caplog.set_level("INFO")
    train, validation = create_sources(settings(root), (32, 32))
    assert isinstance(train, InMemory) and isinstance(validation, InMemory)
    assert len(train) + len(validation) == 8
    assert caplog.text.count("MiB (data.cache=ram)") == 2
    train, _ = create_sources(settings(root, cache="none"), (32, 32))
    assert isinstance(train, FolderSource)
    with pytest.raises(ValueError, match=r"^data\.cache=disk is unknown: choose none or ram$"):
        create_sources(settings(root, cache="disk"), (32, 32))


def test_what_does_not_fit_is_refused_with_the_numbers(root, monkeypatch):
    monkeypatch.setattr(files, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"^data\.cache=ram needs 0\.00 GiB .*0\.00 GiB are free: data\.cache=none"):
        create_sources(settings(root), (32, 32))


def test_free_memory_heeds_the_limit_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MEMORY_FACTS", tmp_path / "meminfo")
    monkeypatch.setattr(files, "_GROUP_FACTS", tmp_path)
    monkeypatch.setattr(files.sys, "platform", "linux")
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:  500 kB\n")
    assert free_memory() == 500 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("250000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert free_memory() == 500 * 1024
    (tmp_path / "memory.max").write_text("300000\n")
    assert free_memory() == 100_000
    monkeypatch.setattr(files.sys, "platform", "darwin")
    assert free_memory() is None


def test_names_of_any_bytes_pack():
    strings = ["", "a/b", "ü/\udcff.png", "", "z"]
    packed = files.PackedStrings.pack(strings)
    assert list(packed) == strings
    assert packed.ends.dtype == np.int64


@pytest.mark.parametrize("unmounted", [False, True])
def test_a_folder_that_goes_is_named_itself(root, unmounted):
    source = FolderSource(root, key="data.val_root")
    shutil.rmtree(root)
    if unmounted:
        root.mkdir()  # where a disk was
    with pytest.raises(ValueError, match=rf"^data\.val_root={root} is no longer there: mount or restore it"):
        source.load(0)
