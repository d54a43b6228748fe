import os
import pickle

import numpy as np
import pytest
from PIL import Image

from simmim.data import folder
from simmim.data.decoding import UnreadableImage
from simmim.data.folder import FolderSource, split_by_hash


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    home = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "images"
    path.mkdir()
    return path


def add(path, level=0, kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (level, level, level)).save(path, kind)
    return path


def names(source):
    return [source.relative_name(index) for index in range(len(source))]


def age(root):
    """Make the folders look long untouched, all at one time: a fresh listing is not cached."""
    for place, _, _ in os.walk(root):
        os.utime(place, (1e9, 1e9))


def test_images_are_found_at_any_depth_sorted_and_by_content(root):
    for name in ("b.png", "a/z.JPG", "a/deep/er/y.tiff", "photo", "x.dat"):
        add(root / name)
    (root / "README.txt").write_text("not listed")
    (root / "labels.csv").write_text("b.png,3")
    (root / "broken.JPG").write_text("listed, and reported when it is loaded")
    add(root / ".hidden.png")
    add(root / ".trash/c.png")
    source = FolderSource(root)
    assert names(source) == ["a/deep/er/y.tiff", "a/z.JPG", "b.png", "broken.JPG", "photo", "x.dat"]
    assert source.name(2) == str(root / "b.png")
    with pytest.raises(UnreadableImage, match="not an image"):
        source.load(3)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_load_gives_channels_and_label(root, channels):
    add(root / "cat/1.png", 10)
    add(root / "dog/1.png", 20)
    source = FolderSource(root, channels=channels)
    image, label = source.load(1)
    assert image.shape == (channels, 4, 6)
    assert (label, source.classes, int(image[0, 0, 0])) == (1, ["cat", "dog"], 20)


def test_an_image_in_the_root_means_no_classes(root):
    add(root / "cat/1.png")
    add(root / "stray.png")
    source = FolderSource(root)
    assert source.classes == []
    assert source.load(0)[1] == -1


def test_numbered_classes_keep_their_number(root):
    for number in (0, 2, 10):
        add(root / f"{number}/1.png", number)
    source = FolderSource(root)
    assert source.classes == ["0", "2", "10"]
    found = [(int(image[0, 0, 0]), label) for image, label in map(source.load, range(3))]
    assert found == [(0, 0), (10, 2), (2, 1)]


def test_links_are_followed_once(root, tmp_path):
    add(root / "real/1.png")
    add(tmp_path / "elsewhere/2.png")
    (root / "alias").symlink_to(root / "real")
    (root / "loop").symlink_to(root)
    (root / "real/up").symlink_to(root)
    (root / "outside").symlink_to(tmp_path / "elsewhere")
    (root / "outside_again").symlink_to(tmp_path / "elsewhere")
    (root / "file.png").symlink_to(root / "real/1.png")
    assert names(FolderSource(root)) == ["file.png", "outside/2.png", "real/1.png"]


def test_a_broken_link_and_a_vanished_file_are_unreadable_images(root):
    (root / "broken.png").symlink_to(root / "nowhere")
    gone = add(root / "gone.png")
    source = FolderSource(root)
    gone.unlink()
    for index in range(2):
        with pytest.raises(UnreadableImage, match="No such file"):
            source.load(index)


def test_a_pipe_does_not_block(root):
    add(root / "1.png")
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "pipe")
    assert names(FolderSource(root)) == ["1.png"]


def test_a_folder_that_cannot_be_listed_is_left_out_and_reported(root, monkeypatch, caplog):
    add(root / "1.png")
    add(root / "lost+found/2.png")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert names(FolderSource(root)) == ["1.png"]
    assert "lost+found cannot be listed" in caplog.text


def test_names_of_any_bytes_survive(root):
    add(root / os.fsdecode("größe\udcff.png"))
    add(root / "日本.png")
    source = FolderSource(root)
    assert sorted(os.listdir(root)) == names(source)
    assert source.load(0)[0].shape == (3, 4, 6)


def test_the_listing_is_cached_until_a_folder_changes(root, cache_home, monkeypatch):
    add(root / "a/1.png")
    add(root / "b/1.png")
    age(root)
    first = names(FolderSource(root))
    assert [path.suffix for path in (cache_home / "simmim").iterdir()] == [".npz"]

    walked = []
    walk = folder._walk
    monkeypatch.setattr(folder, "_walk", lambda path: walked.append(path) or walk(path))
    assert names(FolderSource(root)) == first
    assert walked == []
    add(root / "b/2.png")
    assert names(FolderSource(root)) == [*first, "b/2.png"]
    assert len(walked) == 1


def test_a_listing_younger_than_the_clocks_tick_is_not_cached(root, cache_home):
    add(root / "1.png")
    FolderSource(root)
    assert not cache_home.exists()


def test_a_damaged_cache_is_no_error(root, cache_home):
    add(root / "1.png")
    age(root)
    FolderSource(root)
    (file,) = (cache_home / "simmim").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", b"garbage", whole[: len(whole) // 2], pickle.dumps([1])):
        file.write_bytes(damaged)
        assert names(FolderSource(root)) == ["1.png"]


def test_a_cache_that_cannot_be_written_is_no_error(root, cache_home):
    add(root / "1.png")
    age(root)
    cache_home.write_text("a file where the folder should be")
    assert names(FolderSource(root)) == ["1.png"]


def test_two_roots_do_not_share_a_cache(root, tmp_path):
    add(root / "1.png")
    add(tmp_path / "others/2.png")
    age(tmp_path)
    assert names(FolderSource(root)) == ["1.png"]
    assert names(FolderSource(tmp_path / "others")) == ["2.png"]


def test_the_split_depends_on_the_relative_path_alone(root, tmp_path):
    for place in (root, tmp_path / "copy"):
        for index in range(200):
            add(place / f"{index}.png")
    add(tmp_path / "copy/another.png")
    train, val = split_by_hash(FolderSource(root), 0.2)
    _, val_of_copy = split_by_hash(FolderSource(tmp_path / "copy"), 0.2)
    assert sorted(names(train) + names(val)) == sorted(names(FolderSource(root)))
    assert 20 < len(val) < 60
    assert set(names(val)) == set(names(val_of_copy)) - {"another.png"}
    # Fixed: another rule would mix the training images of older runs with validation images.
    assert names(val)[:3] == ["0.png", "103.png", "116.png"]


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_no_side_of_a_split_is_empty(root, fraction):
    add(root / "1.png")
    add(root / "2.png")
    assert [len(side) for side in split_by_hash(FolderSource(root), fraction)] == [1, 1]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 5])
def test_a_split_needs_a_fraction(root, fraction):
    add(root / "1.png")
    with pytest.raises(ValueError, match=str(fraction)):
        split_by_hash(FolderSource(root), fraction)


def test_a_subset_of_a_subset_keeps_classes_and_labels(root):
    for name in "abcd":
        add(root / name / "1.png", ord(name))
    source = FolderSource(root).subset([3, 2, 0]).subset(np.array([1, 2]))
    assert names(source) == ["c/1.png", "a/1.png"]
    assert source.classes == ["a", "b", "c", "d"]
    assert [(int(image[0, 0, 0]), label) for image, label in map(source.load, range(2))] == [(99, 2), (97, 0)]


def test_a_source_travels_to_another_process(root):
    add(root / "a/1.png")
    source = pickle.loads(pickle.dumps(FolderSource(root)))
    assert source.load(0)[1] == 0


def test_roots_without_images_are_refused_in_one_line(root):
    with pytest.raises(ValueError, match=f"^data.root={root}/x does not exist"):
        FolderSource(root / "x")
    with pytest.raises(ValueError, match=f"^data.root={root} holds no image .*webp"):
        FolderSource(root)
    file = add(root / "1.png")
    with pytest.raises(ValueError, match=f"^data.root={file} is not a folder"):
        FolderSource(file)


def test_a_real_dirty_folder(shared_data):
    source = FolderSource(shared_data / "dirty")
    bad = []
    for index in range(len(source)):
        try:
            source.load(index)
        except UnreadableImage:
            bad.append(source.relative_name(index))
    assert len(source) == 14
    assert bad == ["empty.jpg", "text.jpg", "truncated.jpg"]
