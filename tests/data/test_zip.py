"""Zips as Python and `zip` write them, damaged, locked and dishonest ones, and maps."""

import random
import shutil
import subprocess
import zipfile

import pytest
from layouts import zipped

from simmim.data import zip as zip_module
from simmim.data.decoding import UnreadableImage
from simmim.data.zip import ZipSource


def refusal(path):
    with pytest.raises(ValueError, match=rf"^data\.root={path}") as caught:
        ZipSource(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def reasons(path):
    source, found = ZipSource(path), {}
    for index in range(len(source)):
        try:
            source.read(index)
        except UnreadableImage as error:
            found[source.relative_name(index)] = str(error)
    return found


MEMBERS = [(f"{n}.jpg", bytes([n]) * 3000) for n in range(4)]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_what_zipfile_reads(tmp_path, method):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in MEMBERS[::-1]:
            with archive.open(name, "w", force_zip64=name == "1.jpg") as file:  # with a longer local header
                file.write(data)
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())  # as of one that unpacks itself
    source = ZipSource(path)
    assert [(source.relative_name(i), source.read(i), source.file_size(i)) for i in range(4)] == [
        (name, data, 3000) for name, data in MEMBERS
    ]
    assert source.name(2) == f"{path}:2.jpg"
    part = source.subset([3, 1])
    assert [part.read(0), part.read(1)] == [MEMBERS[3][1], MEMBERS[1][1]]


@pytest.mark.skipif(shutil.which("zip") is None, reason="the program zip is not installed")
@pytest.mark.parametrize("how", ["-0r", "-9r"])
def test_the_zip_of_another_program(tmp_path, how):
    for name in ("photos/cat/1.jpg", "photos/dog/2.jpg", "photos/readme.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 50)
    (tmp_path / "photos/cat/link.jpg").symlink_to("/etc/passwd")
    subprocess.run(["zip", "-q", "-y", how, "x.zip", "photos"], cwd=tmp_path, check=True)
    source = ZipSource(tmp_path / "x.zip")
    assert [source.relative_name(index) for index in range(len(source))] == ["photos/cat/1.jpg", "photos/dog/2.jpg"]
    assert source.read(1) == b"photos/dog/2.jpg" * 50
    assert source.classes == ["cat", "dog"]


def test_hidden_files_and_folders_are_left_out_as_those_of_a_folder(tmp_path):
    hidden = ["a/.git/1.jpg", "a/._1.jpg", ".jpg", "__MACOSX/a/._1.jpg", "./.x/1.jpg"]
    source = ZipSource(zipped(tmp_path / "x.zip", [(name, b"?") for name in ("a/1.jpg", "./b/1.jpg", *hidden)]))
    assert [source.relative_name(index) for index in range(len(source))] == ["./b/1.jpg", "a/1.jpg"]


@pytest.mark.parametrize(
    ("names", "classes", "labels"),
    [
        (["cat/1.jpg", "dog/1.jpg"], ["cat", "dog"], [0, 1]),
        (["a/b/10/1.jpg", "a/b/9/x/1.jpg"], ["9", "10"], [1, 0]),
        (["a/cat/1.jpg", "ab/1.jpg"], ["a", "ab"], [0, 1]),
        (["a/1.jpg", "a/cat/1.jpg"], [], [-1, -1]),
        (["a/1.jpg", "a/2.jpg"], [], [-1, -1]),
        (["1.jpg"], [], [-1]),
    ],
)
def test_folders_are_classes_but_for_those_that_all_share(tmp_path, names, classes, labels):
    source = ZipSource(zipped(tmp_path / "x.zip", [(name, b"?") for name in names]))
    assert (source.classes, [source.label(index) for index in range(len(names))]) == (classes, labels)


def test_a_map_gives_class_numbers(tmp_path):
    path = zipped(tmp_path / "val.zip", [(name, b"?") for name in ("b/1.jpg", "a/1.jpg", "c d.jpg", "x.txt")])
    (tmp_path / "val_map.txt").write_bytes("\ufeffb/1.jpg\t2\r\na/1.jpg\t0\r\n\r\nc d.jpg\t 1".encode())
    source = ZipSource(path)
    assert (source.classes, [source.label(i) for i in range(3)]) == (["0", "1", "2"], [0, 2, 1])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1.jpg\t0\n", r"val_map\.txt has no line for 2\.jpg, nor for 1 others of 3 images: label all or none$"),
        ("1.jpg\t0\n2.jpg\t0\n3.jpg\t0\n4.jpg\t1\n", r"val_map\.txt names 4\.jpg, which the zip does not hold; 1 of 4"),
        ("1.jpg 0\n", r"line 1 of val_map\.txt is '1\.jpg 0', and no name, tab, class number$"),
        ("1.jpg\t0\n1.jpg\t1\n", r"line 2 of val_map\.txt names 1\.jpg a second time$"),
        ("1.jpg\tcat\n", r"line 1 of val_map\.txt holds 'cat' instead of a class number alone$"),
        ("1.jpg\t-1\n", r"line 1 of val_map\.txt: the class number -1 must lie between 0 and 999,999$"),
        ("", r"val_map\.txt has no line for 1\.jpg"),
    ],
)
def test_maps_that_do_not_fit_are_one_line(tmp_path, text, words):
    path = zipped(tmp_path / "val.zip", [(f"{n}.jpg", b"?") for n in (1, 2, 3)])
    (tmp_path / "val_map.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        ZipSource(path)


def test_what_is_no_zip_is_one_line(tmp_path):
    assert "does not exist: give a .zip" in refusal(tmp_path / "none.zip")
    path = zipped(tmp_path / "x" / "train.zip", MEMBERS)
    assert f"is a folder: it holds train.zip: data.root={path}" in refusal(tmp_path / "x")
    assert "data=folder reads it" in refusal(tmp_path)
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "is damaged, cut, or no zip (" in refusal(path)
    assert "holds no image (jpg, jpeg" in refusal(zipped(path, [("a.txt", b"?")]))
    with pytest.warns(UserWarning, match="Duplicate name"):
        zipped(path, [("a.jpg", b"?"), ("a.jpg", b"!")])
    assert "holds a.jpg twice: pack it anew" in refusal(path)
    assert "0.jpg is compressed by method 12" in refusal(zipped(path, MEMBERS, zipfile.ZIP_BZIP2))
    locked = bytearray(zipped(path, MEMBERS[:1]).read_bytes())
    locked[locked.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(locked)
    assert "0.jpg is encrypted: pack the images anew, without a password" in refusal(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damage_hits_one_image_alone(tmp_path, method):
    path = zipped(tmp_path / "x.zip", MEMBERS, method)
    whole = path.read_bytes()
    starts = [zipfile.ZipFile(path).getinfo(name).header_offset for name, _ in MEMBERS]
    for at in (starts[2], starts[2] + 36, starts[3] - 2):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        assert list(reasons(path)) == ["2.jpg"], at
        assert "damaged" in reasons(path)["2.jpg"]
    path.write_bytes(whole)
    source = ZipSource(path)
    path.write_bytes(b"")  # behind the listing's back
    with pytest.raises(UnreadableImage, match="its place in the zip is damaged"):
        source.read(0)


def test_a_bomb_is_not_inflated(tmp_path, monkeypatch):
    monkeypatch.setattr(zip_module, "_MAX_BYTES", 2**20)
    path = zipped(tmp_path / "x.zip", [("a.jpg", bytes(2**21)), ("b.jpg", bytes(2**20))], zipfile.ZIP_DEFLATED)
    assert list(reasons(path)) == ["a.jpg"]
    assert reasons(path)["a.jpg"] == "2,097,152 bytes are too many for an image: refused as a decompression bomb"
    lying = bytearray(path.read_bytes())
    at = lying.index(b"PK\1\2") + 24
    lying[at : at + 4] = (10).to_bytes(4, "little")  # bytes, as it says
    path.write_bytes(lying)
    assert reasons(path) == {"a.jpg": "damaged in the zip: its checksum is another one"}
    assert len(zip_module._inflate(lying[35:2000], 10)) == 11


def test_random_damage_raises_nothing_else(tmp_path):
    drawn, refused = random.Random(0), 0
    path = zipped(tmp_path / "x.zip", MEMBERS, zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(drawn.choice([1, 3, 20])):
            damaged[drawn.randrange(len(damaged))] = drawn.randrange(256)
        path.write_bytes(damaged)
        try:
            reasons(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"data.root={path}") and "\n" not in str(error)
    assert 30 < refused < 300
