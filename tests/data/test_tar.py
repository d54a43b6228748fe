"""Archives as WebDataset writes them, against what `tarfile` reads, and archives that are none."""

import gzip
import io
import json
import os
import pickle
import random
import re
import subprocess
import tarfile
from collections import Counter
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import started
import torch
from layouts import tar
from PIL import Image
from torch.utils.data import DataLoader

from simmim.config import compose_config
from simmim.config_check import check_settings
from simmim.data import patterns
from simmim.data.decoding import UnreadableImage
from simmim.data.files import InMemory
from simmim.data.folder import split_by_hash
from simmim.data.module import create_sources
from simmim.data.tar import TarSource


def picture(number, kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (20 + number, 10), (number % 256, 0, 90)).save(file, kind)
    return file.getvalue()


def labelled(numbers):
    return [pair for n in numbers for pair in ((f"{n:04d}.jpg", picture(n)), (f"{n:04d}.cls", b"%d" % (n % 3)))]


def names(source):
    return [source.relative_name(index) for index in range(len(source))]


def refusal(root, **options):
    with pytest.raises(ValueError, match=r"^data\.root") as caught:
        TarSource(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=[".tar", ".tar.gz"])
def ending(request):
    return request.param


def test_images_and_labels_are_those_of_the_archive(tmp_path, ending):
    members = [*labelled(range(4)), ("a/b.c/5.PNG", picture(5, "PNG")), ("a/b.c/5.cls", b" 11\n")]
    path = tar(tmp_path / f"train-0{ending}", members)
    source = TarSource(path)
    assert names(source) == [f"{path.name}:{name}" for name in [f"000{n}.jpg" for n in range(4)] + ["a/b.c/5.PNG"]]
    assert source.classes == [str(number) for number in range(12)]
    contents = dict(members)
    for index, label in enumerate([0, 1, 2, 0, 11]):
        data = contents[source.relative_name(index).partition(":")[2]]
        assert (source.read(index), source.file_size(index)) == (data, len(data))
        assert source.load(index)[1] == label
    assert source.load(4)[0].shape == (3, 10, 25)
    assert TarSource(path, channels=1).load(0)[0].shape == (1, 10, 20)
    assert source.name(4) == f"{path}:a/b.c/5.PNG"
    part = source.subset([4, 1])
    assert [part.read(0), part.read(1)] == [contents["a/b.c/5.PNG"], contents["0001.jpg"]]


def test_only_images_of_their_own_count(tmp_path, ending):
    """WebDataset splits a name at its first dot: KEY.mask.png is another part of the sample."""
    others = ["2.mask.png", "._2.jpg", ".jpg", "2.txt", "__meta__", "d/._2.jpg", ".d/2.jpg"]
    tar(tmp_path / f"a{ending}", [("2.jpg", picture(2)), *[(name, picture(9)) for name in others]])
    source = TarSource(tmp_path)
    assert names(source) == [f"a{ending}:2.jpg"]
    assert (source.classes, source.load(0)[1]) == ([], -1)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.BLKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_not_followed(tmp_path, ending, kind):
    path = tar(tmp_path / f"a{ending}", [("1.jpg", picture(1))], [("2.jpg", kind), ("../3.jpg", kind), ("1.cls", kind)])
    source = TarSource(path)
    assert (names(source), source.classes) == ([f"a{ending}:1.jpg"], [])
    assert sorted(tmp_path.iterdir()) == [path]


def test_names_of_any_length_and_bytes(tmp_path, ending):
    long = ["x" * 90 + "/" + "y" * 150 + "/ü.jpg", "\udcff.jpg"]
    tar(tmp_path / f"a{ending}", [(name, picture(n)) for n, name in enumerate(long)])
    source = TarSource(tmp_path)
    assert names(source) == [f"a{ending}:{name}" for name in long]
    assert source.read(1) == picture(1)


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("", [0, 1, 2, 10]),
        ("t-001.tar", [1]),
        ("t-*.t*", [0, 1, 2, 10]),
        ("t-00[12].*", [1, 2]),
        ("t-{000..002}.{tar,tgz}", None),
        ("t-{000..001}.tar", [0, 1]),
        ("t-{001,000}.tar", [0, 1]),
        ("t-0{00..01}.tar", [0, 1]),
        ("t-0{1..1}0.tar.gz", [10]),
        ("{t-000,t-002}.t*", [0, 2]),
        ("../{w,w}/t-{000..001}.tar", [0, 1]),
    ],
)
def test_a_folder_an_archive_a_glob_and_braces(tmp_path, monkeypatch, pattern, numbers):
    folder = tmp_path / "w"
    for number, suffix in ((0, ".tar"), (1, ".tar"), (2, ".tgz"), (10, ".tar.gz")):
        tar(folder / f"t-{number:03d}{suffix}", [(f"{number}.jpg", picture(number))])
    (folder / "t-000.txt").write_text("no archive")
    (folder / ".t-9.tar").write_text("hidden")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    for root in (pattern or ".", f"{folder}/{pattern}", f"~/{pattern}"):
        if numbers is None:
            assert "lacks" in refusal(root) or ": " in refusal(root)
            continue
        source = TarSource(root)
        assert [
            int(re.fullmatch(r"(?:.*/)?(\d+)\.jpg", name.partition(":")[2])[1]) for name in names(source)
        ] == numbers
        assert [source.read(i) for i in range(len(source))] == [picture(number) for number in numbers]
        if not pattern.startswith(".."):
            assert names(source)[0].startswith("t-")  # the same images have the same names, however they are given


def test_ranges_are_those_of_a_shell():
    for pattern in ("a{0..3}", "a{08..11}b", "{000..002}-{x,y}", "{1..1}", "{9..010}"):
        shell = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True).stdout
        assert list(patterns._expanded(pattern, "data.root")) == shell.removesuffix("\n").split(" "), pattern


def test_roots_without_archives_are_one_line(tmp_path):
    tar(tmp_path / "t-0.tar", labelled([1]))
    assert "does not exist" in refusal(tmp_path / "t-1.tar")
    line = refusal(tmp_path / "t-{0..1}.tar")
    assert f"{{0..1}}.tar: {tmp_path}/t-1.tar does not exist" in line
    assert "\"data.root='train-{000..004}.tar'\"" in line
    assert "x-*.tar matches no archive" in refusal(tmp_path / "x-*.tar")
    assert "{1..0} is neither a range" in refusal(tmp_path / "t-{1..0}.tar")
    assert "{x} is neither a range" in refusal(tmp_path / "t-{x}.tar")
    assert "more than 100,000 archives" in refusal(tmp_path / "t-{0..999999999}-{0..999999999}.tar")
    (tmp_path / "empty").mkdir()
    assert "holds neither archives (.tar, .tar.gz, .tgz) nor a prepared copy: data=folder" in refusal(
        tmp_path / "empty"
    )
    with pytest.raises(ValueError, match=r"^data\.val_root=.*none\.tar does not exist"):
        TarSource(tmp_path / "none.tar", key="data.val_root")


def test_json_labels(tmp_path, ending):
    records = [{"label": 2}, {"cls": 0, "caption": "ü"}, {"label": "cat", "cls": 1}]
    members = [
        pair for n, r in enumerate(records) for pair in ((f"{n}.json", json.dumps(r).encode()), (f"{n}.jpg", b"?"))
    ]
    tar(tmp_path / f"a{ending}", [*members, ("3.jpg", b"?"), ("3.json", b'{"label": 9}'), ("3.cls", b"0")])
    source = TarSource(tmp_path)
    assert [source.label(index) for index in range(4)] == [2, 0, 1, 0]
    assert source.classes == ["0", "1", "2"]


def test_json_without_a_label_labels_nothing(tmp_path):
    contents = [b'{"label": true}', b'{"label": 1.5}', b"{}", b"[1]", b'"label"', b"3"]
    tar(tmp_path / "a.tar", [p for n, c in enumerate(contents) for p in ((f"{n}.jpg", b"?"), (f"{n}.json", c))])
    assert TarSource(tmp_path).classes == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("1.cls", b"3 4", "a.tar:1.cls holds '3 4' instead of a class number alone"),
        ("1.cls", b"cat\n", "a.tar:1.cls holds 'cat' instead"),
        ("1.cls", b"", "a.tar:1.cls holds '' instead"),
        ("1.cls", "٣".encode(), "a.tar:1.cls holds"),
        ("1.cls", b"-1", "a.tar:1.cls: the class number -1 must lie between 0 and 999,999"),
        ("1.cls", b"1000000", "a.tar:1.cls: the class number 1000000 must"),
        ("1.cls", bytes(2**24 + 1), "a.tar:1.cls has 16,777,217 bytes"),
        ("1.json", b'{"label": -7}', "a.tar:1.json: the class number -7"),
        ("1.json", b'{"label": ' + b"9" * 5000 + b"}", "a.tar:1.json is no JSON"),
        ("1.json", b"{", "a.tar:1.json is no JSON"),
        ("1.json", b"[" * 100_000, "a.tar:1.json is no JSON"),
    ],
)
def test_labels_that_are_none_are_named(tmp_path, name, content, words):
    tar(tmp_path / "a.tar", [("1.jpg", picture(1)), (name, content)])
    assert words in refusal(tmp_path)


def test_all_images_have_a_label_or_none(tmp_path, ending):
    tar(tmp_path / f"a{ending}", labelled([1, 2]))
    tar(tmp_path / f"b{ending}", [*labelled([3]), ("9.jpg", picture(9)), ("8.cls", b"8")])
    line = refusal(tmp_path)
    assert f"b{ending}:9.jpg has no label" in line and f"a{ending}:0001.jpg has one; 1 of 4 images" in line


def test_archives_without_images_and_with_one_twice(tmp_path, ending):
    tar(tmp_path / f"a{ending}", labelled([1]))
    path = tar(tmp_path / f"b{ending}", [("1.cls", b"1"), ("img.0001.jpg", picture(1))])
    assert f"data.root: {path} holds no image: WebDataset calls them KEY.jpg" in refusal(tmp_path)
    tar(path, [])
    assert f"data.root: {path} holds no image" in refusal(tmp_path)
    tar(path, labelled([1, 2, 1]))
    assert f"{path} holds 0001.jpg twice" in refusal(tmp_path)


def test_what_is_cut_or_damaged_is_one_line(tmp_path, ending):
    """Wherever it is cut: tarfile itself takes a cut between two members, or a damaged header, for the end."""
    path = tar(tmp_path / f"a{ending}", labelled(range(6)))
    whole = path.read_bytes()
    unpacked = gzip.decompress(whole) if ending == ".tar.gz" else whole
    end = len(unpacked.rstrip(b"\0"))
    for at in [0, 1, 10, 511, 512, 700, *range(1024, end, 512), end - 1]:
        path.write_bytes(gzip.compress(unpacked[:at]) if ending == ".tar.gz" else whole[:at])
        assert f"data.root: {path} cannot be read to its end (" in refusal(tmp_path)
    headers = [at for at in range(512, end, 512) if unpacked[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == 11
    for at in headers:
        damaged = bytearray(unpacked)
        damaged[at + 2] ^= 1
        path.write_bytes(gzip.compress(damaged) if ending == ".tar.gz" else damaged)
        assert "damaged header" in refusal(tmp_path)
    path.write_bytes(b"PK no tar at all" * 100)
    assert "cannot be read to its end" in refusal(tmp_path)


def test_a_damaged_gz_is_one_line_wherever_the_damage_is(tmp_path):
    path = tar(tmp_path / "a.tar.gz", labelled(range(6)))
    whole = path.read_bytes()
    for at in [*range(20, len(whole) - 8, 7), len(whole) - 8, len(whole) - 5]:  # the last are the checksum
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        refusal(tmp_path)
        path.write_bytes(whole[:at])
        assert "cannot be read to its end" in refusal(tmp_path)


def test_damage_far_from_a_header_is_one_line(tmp_path):
    noise = np.random.default_rng(0).bytes(2**20)
    path = tar(tmp_path / "a.tar.gz", [("1.jpg", bytes(2**22) + noise)])
    whole = path.read_bytes()
    for at in range(len(whole) - 2**20, len(whole), 2**17):
        path.write_bytes(whole[:at] + b"\xff" * 2000 + whole[at + 2000 :])
        assert f"data.root: {path} cannot be read to its end (" in refusal(tmp_path)


def test_sparse_files_and_sizes_below_zero_are_refused(tmp_path):
    """The one lies in pieces; the other leads back to its own header, for ever."""
    tar(tmp_path / "a.tar", labelled([1]), [("2.jpg", tarfile.GNUTYPE_SPARSE)])
    assert "2.jpg is stored as a sparse file" in refusal(tmp_path)
    member = tarfile.TarInfo("2.jpg")
    member.size = -512
    whole = tar(tmp_path / "a.tar", labelled([1])).read_bytes().rstrip(b"\0")
    padded = whole + bytes(-len(whole) % 512)
    (tmp_path / "a.tar").write_bytes(padded + member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert "damaged header" in refusal(tmp_path)


def test_random_damage_raises_nothing_else(tmp_path):
    drawn = random.Random(0)
    whole = tar(
        tmp_path / "a.tar", [("x" * 200 + ".jpg", picture(1)), ("x" * 200 + ".cls", b"1"), *labelled(range(2))]
    ).read_bytes()
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(drawn.choice([1, 3, 20])):
            at = drawn.choice(headers)
            damaged[at + drawn.randrange(512)] = drawn.randrange(256)
            fields = damaged[at : at + 148] + b" " * 8 + damaged[at + 156 : at + 512]
            damaged[at + 148 : at + 156] = b"%06o\0 " % sum(fields)  # a checksum that hides the damage
        (tmp_path / "a.tar").write_bytes(damaged)
        try:
            TarSource(tmp_path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith("data.root") and "\n" not in str(error)
    assert 100 < refused < 400


def test_a_compressed_archive_that_does_not_fit_is_refused_while_reading(tmp_path, monkeypatch):
    tar(tmp_path / "a.tar.gz", labelled(range(6)))
    monkeypatch.setattr("simmim.data.tar.free_memory", lambda: 3 * len(picture(1)))
    line = refusal(tmp_path)
    assert "a.tar.gz:0003.jpg: compressed archives are held in memory" in line and "gunzip the archives" in line
    subprocess.run(["gunzip", tmp_path / "a.tar.gz"], check=True)
    assert len(TarSource(tmp_path)) == 6
    monkeypatch.setattr("simmim.data.tar.free_memory", lambda: None)
    tar(tmp_path / "b.tar.gz", labelled(range(6)))
    assert len(TarSource(tmp_path)) == 12


def test_bytes_tell_what_is_compressed(tmp_path):
    packed = tar(tmp_path / "a.tar.gz", labelled([1])).rename(tmp_path / "a.tar")
    assert TarSource(packed).in_memory
    plain = tar(tmp_path / "b.tar", labelled([2])).rename(tmp_path / "b.tar.gz")
    assert not TarSource(plain).in_memory
    assert [TarSource(tmp_path).read(index) for index in range(2)] == [picture(1), picture(2)]


class Images(torch.utils.data.Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image, label = self.source.load(index)
        return index, tuple(image.shape), label, os.getpid()


def test_loader_processes_read_in_parallel(tmp_path):
    tar(tmp_path / "a.tar", labelled(range(20)))
    tar(tmp_path / "b.tar.gz", labelled(range(20, 40)))
    source = TarSource(tmp_path)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    loader = DataLoader(Images(source), batch_size=None, sampler=order, num_workers=2)
    read = list(loader)
    assert [index for index, *_ in read] == order
    assert all((tuple(shape), label) == ((3, 10, 20 + index), index % 3) for index, shape, label, _ in read)
    assert len({process for *_, process in read} - {os.getpid()}) == 2


def test_the_images_in_memory_are_shared_and_not_sent(tmp_path):
    noise = np.random.default_rng(0).bytes(2**21)
    tar(tmp_path / "a.tar.gz", [("1.jpg", noise)])
    source = TarSource(tmp_path)
    buffer = io.BytesIO()
    ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL).dump(source)
    assert len(buffer.getvalue()) < 20_000
    assert source.read(0) == noise


def test_the_validation_part_stays_however_the_archives_are_given(tmp_path):
    for shard in range(3):
        tar(tmp_path / f"t-{shard}.tar", labelled(range(40 * shard, 40 * shard + 40)))
    whole = [set(names(side)) for side in split_by_hash(TarSource(tmp_path), 0.2)]
    part = [set(names(side)) for side in split_by_hash(TarSource(tmp_path / "t-{0..1}.tar"), 0.2)]
    assert 10 < len(whole[1]) < 40 and not whole[0] & whole[1]
    assert part[0] < whole[0] and part[1] < whole[1]


def settings(root, **changes):
    given = [f"data.{key}={value}" for key, value in changes.items()]
    config = compose_config("pretrain", ["data=shards", f"data.root='{root}'", *given], output_dir=root)
    check_settings(config, "pretrain", typed=["data.root"])
    return config["data"]


def test_the_config_chooses_it_and_memory_is_not_taken_twice(tmp_path):
    tar(tmp_path / "a.tar.gz", labelled(range(20)))
    tar(tmp_path / "b.tar", labelled(range(20)))
    train, validation = create_sources(settings(f"{tmp_path}/{{a.tar.gz,b.tar}}", val_fraction=0.3), (32, 32))
    assert isinstance(train, TarSource) and len(train) + len(validation) == 40
    train, validation = create_sources(
        settings(tmp_path / "a.tar.gz", val_root=f"{tmp_path}/b.tar", cache="ram"), (32, 32)
    )
    assert isinstance(train, TarSource) and isinstance(validation, InMemory)
    assert validation.load(3)[1] == 0
    with pytest.raises(ValueError, match=r"^data\.cache=disk is unknown"):
        create_sources(settings(tmp_path, cache="disk"), (32, 32))


def test_an_archive_that_goes_while_training(tmp_path):
    tar(tmp_path / "w" / "a.tar", [("1.jpg", picture(1)), ("2.jpg", b"no image")])
    tar(tmp_path / "w" / "b.tar.gz", [("3.jpg", b"no image")])
    plain, packed = TarSource(tmp_path / "w" / "a.tar"), TarSource(tmp_path / "w" / "b.tar.gz")
    with pytest.raises(UnreadableImage, match="not an image"):
        plain.load(1)
    (tmp_path / "w" / "a.tar").unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        plain.load(0)
    (tmp_path / "w" / "b.tar.gz").unlink()
    with pytest.raises(ValueError, match=rf"^data\.root={tmp_path}/w is no longer there"):
        plain.load(0)
    with pytest.raises(UnreadableImage, match="not an image"):
        packed.load(0)


def test_braces_that_the_shell_took_are_told(tmp_path):
    words = [f"data.root={tmp_path}/t-{number}.tar" for number in range(3)]
    with pytest.raises(ValueError, match=r"^data\.root is given more than once, .*\"data\.root='train-\{000\.\.004\}"):
        compose_config("pretrain", ["data=shards", *words], output_dir=tmp_path)


def test_tiny_imagenet_is_what_tarfile_reads(shared_data):
    folder = shared_data / "tiny-imagenet-50"
    source = TarSource(folder / "tin50-train-{000..004}.tar.gz")
    assert len(source) == len(set(names(source))) == 25_000
    assert source.classes == [str(number) for number in range(50)]
    assert Counter(source.label(index) for index in range(25_000)) == dict.fromkeys(range(50), 500)
    index = 0
    for path in sorted(folder.glob("tin50-train-*.tar.gz")):
        with tarfile.open(path) as archive:
            contents = {member.name: archive.extractfile(member).read() for member in archive}
        for name in sorted(name for name in contents if name.endswith(".jpg")):
            assert source.relative_name(index) == f"{path.name}:{name}"
            assert source.read(index) == contents[name]
            assert source.label(index) == int(contents[name.replace(".jpg", ".cls")])
            index += 1
    assert source.load(123)[0].shape == (3, 64, 64)
    assert len(TarSource(folder / "tin50-val-*.tar.gz")) == 2_500


def test_a_run_as_one_types_it(tmp_path):
    for shard in range(2):
        tar(tmp_path / f"t-{shard:03d}.tar{'.gz' * shard}", labelled(range(20 * shard, 20 * shard + 20)))
    tar(tmp_path / "val.tar", labelled(range(8)))
    done = started.run(
        "-m", "simmim.pretrain", "experiment=debug", "data=shards", "name=mine",
        "data.root='t-{000.tar,001.tar.gz}'", "data.val_root=val.tar", "data.num_workers=2", "trainer.max_steps=3",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "pretrain" / "mine" / "checkpoints" / "step_0000003.ckpt").is_file()
    assert "outputs" in os.listdir(tmp_path) and len(os.listdir(tmp_path)) == 4  # nothing was unpacked
