"""Lists of paths, with classes and without, and lists that are none."""

import os

import pytest

from simmim.data.decoding import UnreadableImage
from simmim.data.list import ListSource


@pytest.fixture
def root(tmp_path):
    for name in ("a.jpg", "b/c d.png", "#1.jpg", "e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def listed(root, text):
    (root / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return ListSource(root / "list.txt")


def names(source):
    return [source.relative_name(index) for index in range(len(source))]


def test_paths_are_relative_to_the_list_and_sorted(root, monkeypatch):
    source = listed(root, f"\ufeffe\r\n{root}/a.jpg\n\n#1.jpg\nb/c d.png\nb/../a.jpg")
    assert names(source) == ["#1.jpg", f"{root}/a.jpg", "b/../a.jpg", "b/c d.png", "e"]
    assert [source.read(index) for index in range(5)] == [b"#1.jpg", b"a.jpg", b"a.jpg", b"b/c d.png", b"e"]
    assert [source.file_size(index) for index in range(5)] == [6, 5, 5, 9, 1]
    assert (source.name(3), source.classes, source.label(3)) == (f"{root}/b/c d.png", [], -1)
    monkeypatch.setenv("HOME", str(root))
    assert names(ListSource("~/list.txt")) == names(source)


def test_names_of_any_bytes(root):
    name = os.fsdecode(b"\xff\xe2\x80\xa8\x0b.jpg")  # with what else ends a line for Python
    (root / name).write_bytes(b"?")
    source = listed(root, os.fsencode(name) + b"\tcat\n")
    assert (names(source), source.read(0), source.classes) == ([name], b"?", ["cat"])


@pytest.mark.parametrize(
    ("words", "classes", "labels"),
    [
        (["dog", "cat", "dog"], ["cat", "dog"], [1, 0, 1]),
        (["2", "0", "2"], ["0", "1", "2"], [2, 0, 2]),
        (["10", "9", "x"], ["10", "9", "x"], [0, 1, 2]),
        (["a b ", "é", "-1"], ["-1", "a b", "é"], [1, 2, 0]),
    ],
)
def test_classes_by_name_or_number(root, words, classes, labels):
    source = listed(root, "".join(f"{name}\t{word}\n" for name, word in zip(("a.jpg", "b", "e"), words, strict=True)))
    assert (source.classes, [source.label(index) for index in range(3)]) == (classes, labels)


def test_a_file_that_is_not_there_is_unreadable(root):
    source = listed(root, "a.jpg\nnone.jpg\n")
    with pytest.raises(UnreadableImage, match=r"^No such file or directory$"):
        source.load(1)
    assert source.file_size(1) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"list\.txt is empty: write a path into each line$"),
        ("\n \n", r"list\.txt is empty"),
        ("x.jpg\ny.jpg\n", r"list\.txt: none of its 2 files exists, the first being .*/x\.jpg: paths are absolute, or"),
        ("a.jpg\ne\na.jpg\n", r"list\.txt names a\.jpg twice$"),
        ("a.jpg\tcat\ne\n", r"list\.txt: e has no class, as 1 of 2 lines: give all a class or none$"),
        ("a.jpg\t\n", r"the line 'a\.jpg\\t' is neither a path nor path, tab, class$"),
        ("\tcat\n", r"the line '\\tcat' is neither a path nor path, tab, class$"),
        ("a.jpg\t1000000\n", r"list\.txt: a\.jpg: the class number 1000000 must lie between 0 and 999,999$"),
        (b"\xff\xd8\xff\0", r"list\.txt is no text: give a text file with a path in each line$"),
    ],
)
def test_lists_that_are_none_are_one_line(root, text, words):
    with pytest.raises(ValueError, match=rf"^data\.root=.*{words}"):
        listed(root, text)


def test_a_list_that_is_no_file(root):
    with pytest.raises(ValueError, match=r"^data\.val_root=.*none\.txt does not exist: give a text file"):
        ListSource(root / "none.txt", key="data.val_root")
    with pytest.raises(ValueError, match=r"^data\.root=.* is not a file: give a text file"):
        ListSource(root)
