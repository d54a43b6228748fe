"""What archives hold is listed once, until they change."""

import io
import os
import shutil
import time
import zipfile

import numpy as np
import pytest
from layouts import tar, zipped

from simmim.data import tar as tar_module
from simmim.data import zip as zip_module
from simmim.data.listings import Listing
from simmim.data.tar import TarSource
from simmim.data.zip import ZipSource


def age(*paths):
    """Make archives look long untouched: a fresh listing is not kept."""
    for path in paths:
        os.utime(path, (1e9, 1e9))


def members(*names):
    return [(name, name.encode()) for name in names]


@pytest.fixture
def scans(monkeypatch):
    """The archives that were gone through."""
    scanned = []
    list_archive, list_zip = tar_module._list_archive, zip_module._list_zip
    monkeypatch.setattr(
        tar_module, "_list_archive", lambda path, *a, **k: scanned.append(path.name) or list_archive(path, *a, **k)
    )
    monkeypatch.setattr(zip_module, "_list_zip", lambda path, *a: scanned.append(path.name) or list_zip(path, *a))
    return scanned


def entries(source):
    return {source.relative_name(index): (source.read(index), source.label(index)) for index in range(len(source))}


def test_an_archive_is_gone_through_once_until_its_size_or_time_changes(tmp_path, scans):
    labels = [("a.cls", b"1"), ("b.cls", b"0")]
    paths = [tar(tmp_path / f"{n}.tar", [*members("b.jpg", f"{n}.jpg", "a.jpg"), *labels, (f"{n}.cls", b"0")])
             for n in range(3)]  # fmt: skip
    age(*paths)
    first = entries(TarSource(tmp_path))
    assert scans == ["0.tar", "1.tar", "2.tar"] and first["1.tar:a.jpg"] == (b"a.jpg", 1)
    scans.clear()
    assert entries(TarSource(tmp_path)) == first
    assert entries(TarSource(tmp_path / "{0,2}.tar")) == {name: v for name, v in first.items() if name[0] != "1"}
    assert scans == []
    os.utime(paths[1], (1e9, 1e9 + 1))
    assert entries(TarSource(tmp_path)) == first
    tar(paths[0], [*members("c.jpg"), ("c.cls", b"2"), ("filler.txt", bytes(20_000))])
    age(paths[0])  # of another size, and the same time
    found = entries(TarSource(tmp_path))
    assert scans == ["1.tar", "0.tar"]
    assert found["0.tar:c.jpg"] == (b"c.jpg", 2) and "0.tar:a.jpg" not in found
    shutil.copy(paths[1], tmp_path / "3.tar")
    paths[2].unlink()
    age(tmp_path / "3.tar")
    scans.clear()
    assert "3.tar:1.jpg" in entries(TarSource(tmp_path)) and scans == ["3.tar"]


def test_a_zip_and_its_map(tmp_path, scans):
    path = zipped(tmp_path / "x.zip", members("b.jpg", "a.jpg"), zipfile.ZIP_DEFLATED)
    age(path)
    first = entries(ZipSource(path))
    assert first == {"a.jpg": (b"a.jpg", -1), "b.jpg": (b"b.jpg", -1)}
    (tmp_path / "x_map.txt").write_text("a.jpg\t1\nb.jpg\t0\n")  # is read each time
    assert entries(ZipSource(path)) == {"a.jpg": (b"a.jpg", 1), "b.jpg": (b"b.jpg", 0)}
    assert scans == ["x.zip"]


def test_what_is_young_or_compressed_is_not_kept(tmp_path, scans):
    tar(tmp_path / "young.tar", members("a.jpg"))
    age(tar(tmp_path / "z.tar.gz", members("a.jpg")))
    for _ in range(2):
        assert [value for value, _ in entries(TarSource(tmp_path)).values()] == [b"a.jpg", b"a.jpg"]
    assert scans == ["young.tar", "z.tar.gz"] * 2


def test_other_ways_of_reading_do_not_share_listings(tmp_path):
    age(tar(tmp_path / "x.tar", members("a.b.jpg", "c.jpg")))
    for _ in range(2):
        assert list(entries(TarSource(tmp_path))) == ["x.tar:c.jpg"]
        assert list(entries(TarSource(tmp_path, labels="archive"))) == ["x.tar:a.b.jpg", "x.tar:c.jpg"]


def test_what_was_listed_is_kept_where_a_later_archive_is_refused(tmp_path, scans):
    age(tar(tmp_path / "0.tar", members("a.jpg")))
    (tmp_path / "1.tar").write_bytes(b"no archive")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1\.tar cannot be read to its end"):
            TarSource(tmp_path)
    assert scans == ["0.tar", "1.tar", "1.tar"]


def test_a_damaged_or_unwritable_cache_is_no_error(tmp_path, monkeypatch, scans):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    age(tar(tmp_path / "w" / "0.tar", members("a.jpg")))
    first = entries(TarSource(tmp_path / "w"))
    (file,) = (tmp_path / "cache" / "simmim").iterdir()
    whole = file.read_bytes()
    stored = dict(np.load(io.BytesIO(whole)))
    short = io.BytesIO()
    np.savez(short, **{**stored, "offsets": stored["offsets"][:0]})
    for damaged in (b"", b"garbage", whole[: len(whole) // 2], short.getvalue()):
        file.write_bytes(damaged)
        scans.clear()
        assert entries(TarSource(tmp_path / "w")) == first and scans == ["0.tar"]
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert entries(TarSource(tmp_path / "w")) == first


def test_a_thousand_archives_open_fast_the_second_time(tmp_path, scans):
    whole = tar(tmp_path / "w" / "0000.tar", members(*(f"{n:03d}.jpg" for n in range(10))))
    for number in range(1, 1000):
        os.link(whole, tmp_path / "w" / f"{number:04d}.tar")
    age(whole)
    TarSource(tmp_path / "w")
    assert len(scans) == 1000
    started = time.process_time()
    source = TarSource(tmp_path / "w")
    assert time.process_time() - started < 1  # s
    assert len(source) == 10_000 and len(scans) == 1000
    assert source.relative_name(9_999) == "0999.tar:009.jpg" and source.read(9_999) == b"009.jpg"


def test_listings_join_and_part_again():
    parts = [
        Listing.sorted(names, {"x": list(range(len(names)))}) for names in (["b", "aü"], [], ["\udcff", "", "z" * 9])
    ]
    joined = Listing.joined(parts)
    assert list(joined.names) == ["aü", "b", "", "z" * 9, "\udcff"] and joined.columns["x"].tolist() == [1, 0, 1, 2, 0]
    for part, (start, stop) in zip(parts, ((0, 2), (2, 2), (2, 5)), strict=True):
        again = joined.part(start, stop)
        assert list(again.names) == list(part.names) and again.columns["x"].tolist() == part.columns["x"].tolist()
    with pytest.raises(ValueError, match=r"^holds a twice: pack it anew$"):
        Listing.sorted(["a", "b", "a"], {})
