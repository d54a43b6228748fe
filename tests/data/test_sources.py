"""All layouts of the same images give the same batches, and treat broken and hostile files alike."""

import os
import re
import shutil
import tarfile
import zipfile
from types import SimpleNamespace

import pytest
import torch
from hydra.errors import HydraException
from layouts import LAYOUTS, Layouts, rows, rows_of_paths, settings, tar, zipped

from simmim.config import compose_config
from simmim.data.decoding import UnreadableImage
from simmim.data.files import InMemory
from simmim.data.folder import FolderSource
from simmim.data.labels import check_labels
from simmim.data.module import ImageData, create_source, create_sources
from simmim.data.shards import ShardSource
from simmim.data.sources import open_files, open_shards
from simmim.data.tar import TarSource
from simmim.data.transforms import centre_transform, pretraining_transform
from simmim.errors import explain
from simmim.masking import Masking
from simmim.prepare import prepare
from simmim.training.callbacks import UnreadableImages

SIZE = (32, 32)


@pytest.fixture(scope="module")
def photos(shared_data, tmp_path_factory):
    """Upright JPEG photographs of three classes."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("hat", "dress", "pants"):
        (folder / name).mkdir()
        for path in sorted((shared_data / "clothing" / "test" / name).iterdir())[:5]:
            shutil.copy(path, folder / name)
    return folder


@pytest.fixture(scope="module")
def dirty(photos, shared_data, tmp_path_factory):
    """Some of them, and files that are none, truncated or empty, or of other formats than their names say."""
    folder = tmp_path_factory.mktemp("dirty") / "mixed"
    shutil.copytree(photos, folder)
    for path in (shared_data / "dirty").iterdir():
        shutil.copy(path, folder / "hat")
    return folder


def data_of(words, num_workers=0):
    """Batches as a run gets them, all images for training and for validation."""
    root = next(word for word in words if word.startswith("data.root")).replace("data.root", "data.val_root")
    crop = {"crop_scale": (0.3, 1.0), "crop_ratio": (0.75, 1.33)}
    data = ImageData(
        create_sources(settings([*words, root]), SIZE),
        transforms=(pretraining_transform(SIZE, **crop), centre_transform(SIZE)),
        masking=Masking(SIZE, model_patch_size=4, strategy="random", patch_size=8, ratio=0.6),
        batch_size=4,
        num_workers=num_workers,
        timeout=60,
        on_gpu=False,
        num_batches=7,
        seed=3,
    )
    data.trainer = SimpleNamespace(global_rank=0, world_size=1)
    return data


def batches_of(words, num_workers=0):
    data = data_of(words, num_workers)
    return [*data.loader_from(0), *data.val_dataloader()]


@pytest.fixture(scope="module")
def expected(photos):
    return batches_of(["data=folder", f"data.root={photos}"])


def test_the_batches_compared_are_images_in_random_order_with_labels(expected):
    assert expected[0]["image"].float().std() > 20
    assert {int(label) for batch in expected for label in batch["label"]} == {0, 1, 2}
    assert len({tuple(batch["label"].tolist()) for batch in expected}) > 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_batches(layout, photos, expected, tmp_path):
    words = getattr(Layouts(photos, tmp_path), layout)()
    found = batches_of(words, num_workers=2 if layout in ("zip_deflated", "hf") else 0)
    assert len(found) == len(expected) == 11
    for batch, other in zip(found, expected, strict=True):
        assert batch.keys() == other.keys()
        for key in ("image", "label", "mask", "counts"):
            assert torch.equal(batch[key], other[key]), key
    source = create_source(settings(words), SIZE)
    assert source.classes in (["dress", "hat", "pants"], ["0", "1", "2"])
    kept = create_source(settings([*words, "data.cache=ram"]), SIZE)
    assert isinstance(kept, InMemory) or source.in_memory
    assert all(torch.equal(kept.load(index)[0], source.load(index)[0]) for index in (0, 14))


@pytest.mark.parametrize("layout", ["zip", "zip_in_a_folder", "tar", "tgz", "hf", "list"])
def test_layouts_without_labels_give_the_same_images(layout, shared_data, tmp_path):
    names = sorted(os.listdir(shared_data / "imagenet-samples"))[::40]
    (tmp_path / "flat").mkdir()
    for name in names:
        shutil.copy(shared_data / "imagenet-samples" / name, tmp_path / "flat")
    members = [(name, (tmp_path / "flat" / name).read_bytes()) for name in names]
    root = tmp_path / "x"
    if layout.startswith("zip"):
        words = ["data=zip", zipped(root, [(f"a/b/{n}" if "folder" in layout else n, d) for n, d in members[::-1]])]
    elif layout == "hf":
        words = ["data=hf", rows(root, [data for _, data in members])]
    elif layout == "list":
        root.write_text("\n".join(f"flat/{name}" for name in names[::-1]))
        words = ["data=list", root]
    else:
        words = ["data=shards", tar(tmp_path / f"x.{layout.replace('tgz', 'tar.gz')}", members[::-1])]
    found = open_files(settings([words[0], f"data.root={words[1]}"]))
    folder = FolderSource(tmp_path / "flat")
    assert len(found) == len(folder) == 10
    for index in range(10):
        (image, label), (other, _) = found.load(index), folder.load(index)
        assert torch.equal(image, other) and label == -1
    assert found.classes == []
    with pytest.raises(ValueError, match=r"^data\.root: these images have no labels: \w"):
        check_labels(found, key="data.root")


REASONS = {"empty file", "truncated JPEG", "not an image (none of JPEG, PNG, WEBP, GIF, BMP, TIFF, NPY)"}


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "copy"])  # which leaves them out
def test_broken_files_are_replaced_and_listed_or_stop_the_run(layout, dirty, tmp_path):
    layouts = Layouts(dirty, tmp_path)
    data = data_of(getattr(layouts, layout)())
    batches = list(data.val_dataloader())
    listed = [entry for batch in batches for entry in batch["unreadable"]]
    assert {reason for _, reason in listed} == REASONS and len(listed) == 3
    assert sum(int(batch["counts"].sum()) for batch in batches) == len(layouts.names) - 3
    if not layout.startswith("hf"):
        assert {os.path.basename(name.rpartition(":")[2]) for name, _ in listed} == {
            "empty.jpg", "text.jpg", "truncated.jpg"
        }  # fmt: skip
    trainer = SimpleNamespace(world_size=1, strategy=None, training=True)
    skipping, raising = (
        UnreadableImages(tmp_path / f"{word}.txt", on_error=word, max_fraction=0.5) for word in ("skip", "raise")
    )
    bad = next(batch for batch in batches if batch["unreadable"])
    skipping._look_at(trainer, bad)
    assert (tmp_path / "skip.txt").read_text() == "".join(f"{name}\t{reason}\n" for name, reason in bad["unreadable"])
    with pytest.raises(ValueError, match=r"cannot be read: mend or remove it, or set data\.on_error=skip"):
        raising._look_at(trainer, bad)


HOSTILE = ["/etc/passwd.jpg", "../../outside.jpg", "a/../../up.jpg", "./here.jpg", "c:\\x.jpg", "-rf.jpg"]


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_names_that_lead_elsewhere_are_names_alone(kind, shared_data, tmp_path):
    """The image is the archive's, whatever lies where its name points to; nothing is written."""
    place = tmp_path / "deep" / "er"
    content = (shared_data / "imagenet-samples" / "n01440764_tench.JPEG").read_bytes()
    members = [(name, content + bytes([number])) for number, name in enumerate(HOSTILE)]
    pack = zipped if kind == "zip" else tar
    path = pack(place / f"x.{kind}", members)
    (tmp_path / "outside.jpg").write_bytes(b"another")
    before = sorted(tmp_path.rglob("*"))
    source = open_files(settings([f"data={'zip' if kind == 'zip' else 'shards'}", f"data.root={path}"]))
    inside = {source.relative_name(i).removeprefix(f"{path.name}:"): source.read(i) for i in range(len(source))}
    assert inside == dict(members)
    assert sorted(tmp_path.rglob("*")) == before


def test_links_and_devices_in_a_zip_are_not_followed(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.jpg", b"?")
        for name, mode in (("link.jpg", 0o120777), ("pipe.jpg", 0o010644), ("disk.jpg", 0o060644)):
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            archive.writestr(member, "/etc/passwd")
        archive.writestr("folder.jpg/", b"")
        archive.writestr("__MACOSX/._1.jpg", b"?")
    source = open_files(settings(["data=zip", f"data.root={path}"]))
    assert [source.relative_name(index) for index in range(len(source))] == ["1.jpg"]


@pytest.mark.parametrize("kind", ["hf", "list"])
def test_pipes_devices_and_folders_named_as_files_are_unreadable(kind, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    expected = {
        str(tmp_path / "pipe.jpg"): "not a regular file",
        "/dev/zero": "not a regular file",
        str(tmp_path / "folder.jpg"): "not a regular file",
        str(tmp_path / "none.jpg"): "No such file or directory",
    }
    if kind == "list":
        (tmp_path / "list.txt").write_text("\n".join(expected))
        words = ["data=list", f"data.root={tmp_path}/list.txt"]
    else:
        expected["../up.jpg"] = "../up.jpg leads out of the data set"
        expected["https://a/x.jpg"] = "at https://a/x.jpg: only files on the disk are read"
        words = ["data=hf", f"data.root={rows_of_paths(tmp_path / 'x', expected, [0] * 6, ['a'])}"]
    source = open_files(settings(words))
    found = {}
    for index in range(len(source)):
        with pytest.raises(UnreadableImage) as caught:
            source.load(index)
        found[re.sub(r".*:row \d+ \((.*)\)", r"\1", source.name(index))] = str(caught.value)
    assert found == expected


def prepared(words, out, **changes):
    given = [f"{key}={value}" for key, value in changes.items()]
    return prepare(compose_config("prepare", [*words, f"out={out}", "workers=0", *given], output_dir=out.parent))


def test_a_copy_of_hostile_names_unpacks_into_its_folder(shared_data, tmp_path):
    content = (shared_data / "imagenet-samples" / "n01440764_tench.JPEG").read_bytes()
    path = zipped(tmp_path / "in" / "x.zip", [(name, content) for name in HOSTILE])
    copy = open_shards(prepared(["data=zip", f"data.root={path}"], tmp_path / "copy"))
    assert [copy.relative_name(index) for index in range(len(copy))] == sorted(HOSTILE)
    with tarfile.open(tmp_path / "copy" / "shard-00000.tar") as archive:
        assert archive.getnames() == [
            "-rf.jpg", "_/_/outside.jpg", "_/here.jpg", "etc/passwd.jpg", "a/_/_/up.jpg", "c:\\x.jpg"
        ]  # fmt: skip


@pytest.mark.parametrize("layout", ["archive_a_class", "zip_with_map", "hf", "list_of_names", "webdataset_gz", "copy"])
def test_a_copy_is_made_of_every_layout(layout, photos, tmp_path):
    words = getattr(Layouts(photos, tmp_path), layout)()
    source, copy = open_files(settings(words)), open_shards(prepared(words, tmp_path / "made", short_side=64))
    assert copy.classes == source.classes
    for index in range(len(source)):
        assert copy.relative_name(index) == source.relative_name(index)
        assert copy.label(index) == source.label(index)
    assert [sorted(image.shape)[1] for image, _ in map(copy.load, (0, 7, 14))] == [64] * 3


def test_other_labels_are_another_copy(photos, tmp_path):
    """The names of the images are the same."""
    words = Layouts(photos, tmp_path).archive_a_class()
    prepared(words, tmp_path / "made", short_side=64)
    with pytest.raises(ValueError, match=r"^out=.* was prepared with labels_sha256="):
        prepared([*words, "data.labels=own"], tmp_path / "made", short_side=64)


def test_what_lies_there_tells_a_copy_from_archives(photos, tmp_path):
    layouts = Layouts(photos, tmp_path)
    copy, archives = (words[-1].partition("=")[2] for words in (layouts.copy(), layouts.archive_a_class()))
    assert (type(open_shards(copy)), type(open_shards(archives))) == (ShardSource, TarSource)
    (tmp_path / "classes" / "index.json").write_text('{"shardlist": []}')  # as other libraries have
    assert type(open_shards(archives)) is TarSource
    with pytest.raises(
        ValueError, match=rf"shard-\*\.tar is a part of a prepared copy: give its folder, data.root={copy}$"
    ):
        open_shards(f"{copy}/shard-*.tar")
    with pytest.raises(
        ValueError, match=r"^data\.labels=archive: data\.root=.*copy is a prepared copy, whose images have labels"
    ):
        open_shards(copy, labels="archive")
    with pytest.raises(ValueError, match=r"^data\.labels=guess is unknown: choose own or archive$"):
        open_shards(archives, labels="guess")


def test_an_archive_a_class_is_never_taken_for_unlabelled_or_labelled_shards(photos, tmp_path):
    layouts = Layouts(photos, tmp_path)
    *_, root = layouts.archive_a_class()
    unlabelled = open_files(settings(["data=shards", root]))
    assert unlabelled.classes == []
    with pytest.raises(ValueError, match=r"named after it, give data\.labels=archive$"):
        check_labels(unlabelled, key="data.root")
    labelled = [*layouts.webdataset(), "data.labels=archive"]
    with pytest.raises(ValueError, match=r"\.cls is a label: data\.labels=own reads archives with labels of their own"):
        open_files(settings(labelled))
    tar(tmp_path / "classes" / "10.tar", [("a.b.jpg", b"?"), ("readme.txt", b"?")])
    archives = open_shards(tmp_path / "classes", labels="archive")
    assert archives.classes == ["10", "dress", "hat", "pants"] and archives.relative_name(0) == "10.tar:a.b.jpg"
    numbered = [tar(tmp_path / "n" / f"{number}.tar.gz", [("1.jpg", b"?")]) for number in (10, 9)]
    archives = open_shards(numbered[0].parent, labels="archive")
    assert (archives.classes, [archives.label(index) for index in (0, 1)]) == (["9", "10"], [1, 0])
    with pytest.raises(ValueError, match=r"holds no image: their names end in jpg"):
        open_shards(tar(tmp_path / "e.tar", [("readme.txt", b"?")]), labels="archive")


def test_the_former_name_of_archives_says_the_new_one():
    with pytest.raises(HydraException) as caught:
        settings(["data=webdataset", "data.root=x"])
    assert explain(caught.value, "pretrain") == (
        "data=webdataset is unknown: data=shards reads WebDataset archives, and prepared copies too"
    )
