import io
import json
import subprocess
import tarfile
import tracemalloc
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.data.decoding import UnreadableImage, decode
from simmim.data.files import InMemory
from simmim.data.folder import FolderSource, split_by_hash
from simmim.data.module import create_sources
from simmim.data.shards import (
    PreparedImage,
    ShardSource,
    finished_shards,
    shard_path,
    shrink,
    write_index,
    write_shard,
)
from simmim.reconstruct import load_images


def jpeg(size=(60, 40), mode="RGB", kind="JPEG", **options):
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    pixels = np.stack([x * 255 // size[0], y * 255 // size[1], (x + y) % 256], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


NAMES = ["cat/1.jpg", "cat/2.jpg", f"dog/{'long' * 40}.png", "dog/\udcff ü.jpg"]


def copy_of(out, names=NAMES, limit=2000):
    """Small images under these names, two shards or more."""
    images = [PreparedImage(name, i // 2, jpeg((40 + i, 30))) for i, name in enumerate(names)]
    images.insert(1, PreparedImage("cat/bad.jpg", 0, None, "empty file"))
    rest, records = iter(images), []
    while sum(record["taken"] for record in records) < len(images):
        records.append(write_shard(shard_path(out, len(records)), rest, limit))
    write_index(out, records, ["cat", "dog"], listed=len(images), short_side=256)
    return records


def names(source):
    return [source.relative_name(index) for index in range(len(source))]


def test_what_was_packed_is_read_again(tmp_path):
    records = copy_of(tmp_path)
    assert len(records) >= 2
    source = ShardSource(tmp_path)
    assert names(source) == NAMES
    assert source.classes == ["cat", "dog"]
    for index in range(len(source)):
        assert source.read(index) == jpeg((40 + index, 30))
        assert source.file_size(index) == len(source.read(index))
        image, label = source.load(index)
        assert (tuple(image.shape), label) == ((3, 30, 40 + index), index // 2)
    assert source.name(0) == f"{tmp_path}/shard-00000.tar:cat/1.jpg"
    assert (tmp_path / "unreadable.txt").read_text() == "cat/bad.jpg\tempty file\n"
    assert ShardSource(tmp_path, channels=1).load(0)[0].shape == (1, 30, 40)
    part = source.subset([3, 1])
    assert (names(part), part.load(0)[1], part.classes) == ([NAMES[3], NAMES[1]], 1, ["cat", "dog"])


def test_other_programs_read_the_shards(tmp_path):
    copy_of(tmp_path / "copy", names=NAMES[:3], limit=10**6)
    shard = tmp_path / "copy" / "shard-00000.tar"
    listed = subprocess.run(["tar", "tf", shard], capture_output=True, text=True, check=True).stdout
    assert listed.split() == NAMES[:3]
    with tarfile.open(shard) as archive:
        assert archive.extractfile(NAMES[2]).read() == jpeg((42, 30))
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert names(FolderSource(tmp_path / "unpacked")) == NAMES[:3]
    assert FolderSource(tmp_path / "unpacked").classes == ["cat", "dog"]


def test_a_shard_is_a_function_of_its_images(tmp_path):
    for place in ("1", "2"):
        copy_of(tmp_path / place)
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


def test_the_validation_images_are_those_of_the_folder(tmp_path):
    for index in range(80):
        path = tmp_path / "photos" / f"{index % 3}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg())
    folder = FolderSource(tmp_path / "photos")
    copy_of(tmp_path / "copy", names(folder))
    for ours, theirs in zip(
        split_by_hash(ShardSource(tmp_path / "copy"), 0.2), split_by_hash(folder, 0.2), strict=True
    ):
        assert names(ours) == names(theirs)


@pytest.mark.parametrize(
    ("size", "expected"), [((600, 300), (512, 256)), ((300, 900), (256, 768)), ((256, 400), (256, 400))]
)
def test_the_short_side_is_limited(size, expected):
    small = decode(shrink(jpeg(size), 256, 90), 3)
    assert (small.shape[2], small.shape[1]) == expected


def test_shrinking_is_antialiased_and_close_to_pil():
    data = jpeg((640, 480), quality=95)
    with Image.open(io.BytesIO(data)) as image:
        expected = torch.from_numpy(np.array(image.resize((341, 256), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    error = (decode(shrink(data, 256, 95), 3).float() - expected.float()).square().mean()
    assert 10 * torch.log10(255**2 / error) > 30  # dB; without antialiasing the third channel's edges take it below


@pytest.mark.parametrize("size", [(60, 40), (700, 600)])
def test_what_is_small_and_upright_stays_as_it_is(size):
    data = jpeg(size)
    assert (shrink(data, 256, 50) == data) == (size == (60, 40))
    assert Image.open(io.BytesIO(shrink(jpeg(size, kind="PNG"), 256, 90))).format == "JPEG"


def test_exif_is_applied_and_gone():
    exif = Image.Exif()
    exif[0x0112] = 6
    for size, expected in (((60, 40), (3, 60, 40)), ((600, 300), (3, 512, 256))):
        small = shrink(jpeg(size, exif=exif), 256, 90)
        assert decode(small, 3).shape == expected
        assert Image.open(io.BytesIO(small)).getexif() == {}


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_stays_grey(kind):
    assert Image.open(io.BytesIO(shrink(jpeg((600, 300), "L", kind), 256, 90))).mode == "L"
    assert Image.open(io.BytesIO(shrink(jpeg((600, 300), "RGB", kind), 256, 90))).mode == "RGB"


def test_what_cannot_be_read_is_told():
    with pytest.raises(UnreadableImage, match="truncated JPEG"):
        shrink(jpeg()[:500], 256, 90)


def test_photographs_keep_their_look(shared_data):
    for path in sorted((shared_data / "imagenet-samples").iterdir())[::80]:
        data = path.read_bytes()
        small = decode(shrink(data, 256, 90), 3)
        assert min(small.shape[-2:]) <= 256
        with Image.open(io.BytesIO(data)) as image:
            size = (small.shape[2], small.shape[1])
            pixels = np.array(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
        error = (small.float() - torch.from_numpy(pixels).permute(2, 0, 1).float()).square().mean()
        assert 10 * torch.log10(255**2 / error) > 28, path.name  # dB


def test_copies_that_are_none_or_not_whole_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^data\.root=.* does not exist"):
        ShardSource(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^data\.val_root=.* is no prepared copy: data=folder .*simmim\.prepare"):
        ShardSource(tmp_path, key="data.val_root")
    (tmp_path / "images.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^data\.root=.* is an unfinished copy"):
        ShardSource(tmp_path)
    copy_of(tmp_path)
    with (tmp_path / "shard-00001.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"shard-00001\.tar has [\d,]+ bytes instead of [\d,]+"):
        ShardSource(tmp_path)
    (tmp_path / "shard-00001.tar").unlink()
    with pytest.raises(ValueError, match=r"lacks shard-00001\.tar: copy or prepare it anew"):
        ShardSource(tmp_path)
    assert len(list(finished_shards(tmp_path))) == 1


def test_a_copy_too_small_for_the_images_asked_for_is_told(tmp_path, caplog):
    copy_of(tmp_path)
    config = {
        "source": "shards",
        "labels": "own",
        "channels": 3,
        "root": str(tmp_path),
        "val_root": None,
        "val_fraction": 0.3,
        "cache": "none",
    }
    create_sources(config, (256, 512))
    assert caplog.text == ""
    create_sources(config, (384, 384))
    assert "384 px out of a copy whose images have 256 px at most" in caplog.text


def test_a_shard_that_goes_while_training_is_an_unreadable_image(tmp_path):
    copy_of(tmp_path)
    source = ShardSource(tmp_path)
    (tmp_path / "shard-00000.tar").unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        source.load(0)


def test_counts_that_do_not_add_up_are_no_copy(tmp_path):
    records = copy_of(tmp_path)
    with pytest.raises(ValueError, match=r"4 images and 1 were unreadable, of 7 listed"):
        write_index(tmp_path, records, [], listed=7, short_side=256)


def test_the_index_is_plain_json(tmp_path):
    copy_of(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    record = json.loads((tmp_path / "shard-00000.json").read_text())
    assert index["images"] == 4
    start, length = record["offsets"][0], record["lengths"][0]
    assert (tmp_path / index["shards"][0]).read_bytes()[start : start + length] == jpeg((40, 30))


def test_a_copy_that_goes_is_named_itself(tmp_path):
    copy_of(tmp_path / "copy")
    source = ShardSource(tmp_path / "copy")
    (tmp_path / "copy").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"^data\.root={tmp_path}/copy is no longer there: mount or restore it"):
        source.load(0)


@pytest.mark.parametrize("name", ["../secret/shard-00000.tar", "/etc/x.tar", "..", "", "shard-00000.tar/../x", 7])
def test_an_index_never_leads_out_of_its_folder(tmp_path, name):
    copy_of(tmp_path / "secret")
    copy_of(tmp_path / "copy")
    index = json.loads((tmp_path / "copy" / "index.json").read_text())
    (tmp_path / "copy" / "index.json").write_text(json.dumps({**index, "shards": [name]}))
    with pytest.raises(ValueError, match=r"^data\.root=[^\n]*: index\.json names .*, which is no shard of a copy"):
        ShardSource(tmp_path / "copy")


def huge(kind):
    """A small image whose header says 100,000 x 100,000 px (a JPEG cannot: 65,000 x 65,000)."""
    data = bytearray(jpeg(kind=kind))
    if kind == "PNG":
        data[16:24] = (100_000).to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    else:
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = (65_000).to_bytes(2, "big") * 2
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_bombs_are_refused_by_size_wherever_images_come_from(tmp_path, kind):
    name = "a.png" if kind == "PNG" else "a.jpg"
    (tmp_path / name).write_bytes(huge(kind))
    record = write_shard(shard_path(tmp_path / "copy", 0), iter([PreparedImage(name, -1, huge(kind))]), 2000)
    write_index(tmp_path / "copy", [record], [], listed=1, short_side=256)
    folder, shards = FolderSource(tmp_path).subset([0]), ShardSource(tmp_path / "copy")
    tracemalloc.start()
    for load in (folder.load, shards.load, InMemory(folder).load, lambda _: shrink(huge(kind), 256, 90)):
        with pytest.raises(UnreadableImage, match=r"refused as a decompression bomb"):
            load(0)
    task = SimpleNamespace(network=SimpleNamespace(in_channels=3), max_value=255, hparams={"image_size": (32, 32)})
    with pytest.raises(ValueError, match=r"^images=.*refused as a decompression bomb"):
        load_images(tmp_path / name, task, 1)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
