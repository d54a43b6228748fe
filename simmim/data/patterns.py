"""The archives that a folder, a path, a glob or braces mean."""

import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

ARCHIVES = (".tar", ".tar.gz", ".tgz")

_MAX_ARCHIVES = 10**5
_MAGIC = re.compile(r"[*?\[{]")
_BRACES = re.compile(r"\{([^{}]*)\}")


def find_archives(root: str | os.PathLike[str], key: str) -> tuple[Path, list[Path]]:
    """The archives that a folder, a path or a pattern means.

    Args:
        root: A folder of archives; one archive; a glob (`train-*.tar`); or a brace pattern, with a range or a list
            (`train-{000..004}.tar`, `{train,extra}.tar`). `~` is expanded.
        key: What it is called in messages.

    Returns:
        The folder that the pattern begins with, and the archives below it, sorted, each once.

    Raises:
        ValueError: If there is none, or none for one of the names that the braces stand for.
    """
    path = Path(root).expanduser()
    if path.is_dir():
        if archives := sorted(entry for entry in path.iterdir() if _is_archive(entry)):
            return path, archives
        raise ValueError(
            f"{key}={path} holds neither archives ({', '.join(ARCHIVES)}) nor a prepared copy: data=folder reads "
            f"images that lie in a folder, and python -m simmim.prepare data.root={path} out=… makes a copy"
        )
    if path.is_file():
        return path.parent, [path]
    fixed = itertools.takewhile(lambda part: not _MAGIC.search(part), path.parent.parts)
    names = list(itertools.islice(_expanded(str(path), f"{key}={path}"), _MAX_ARCHIVES + 1))
    if len(names) > _MAX_ARCHIVES:
        raise ValueError(f"{key}={path} stands for more than {_MAX_ARCHIVES:,} archives: give a smaller range")
    found = {name: _matching(name) for name in names}
    if lacking := [name for name in names if not found[name]]:
        which = "" if lacking[0] == str(path) else f": {lacking[0]}"
        problem = "matches no archive" if _MAGIC.search(lacking[0]) else "does not exist"
        raise ValueError(
            f"{key}={path}{which} {problem}: give a folder of {', '.join(ARCHIVES)}, one of them, or a pattern, which "
            """needs quotes inside quotes, "data.root='train-{000..004}.tar'\""""
        )
    return Path(*fixed), sorted({archive for archives in found.values() for archive in archives})


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVES) and not path.name.startswith(".") and path.is_file()


def _matching(name: str) -> list[Path]:
    if Path(name).is_file():
        return [Path(name)]
    return [path for path in map(Path, glob.glob(name)) if _is_archive(path)]


def _expanded(pattern: str, given: str) -> Iterator[str]:
    """The names that a pattern's braces stand for, as a shell would write them out."""
    if not (braces := _BRACES.search(pattern)):
        yield pattern
        return
    ends = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", braces[1], re.ASCII)
    if ends and int(ends[1]) <= int(ends[2]):
        padded = any(end.startswith("0") and len(end) > 1 for end in ends.groups())
        width = max(map(len, ends.groups())) if padded else 0
        words: Iterator[str] = (f"{number:0{width}d}" for number in range(int(ends[1]), int(ends[2]) + 1))
    elif "," in braces[1]:
        words = iter(braces[1].split(","))
    else:
        raise ValueError(f"{given}: {braces[0]} is neither a range, as {{000..004}}, nor a list, as {{a,b}}")
    for word in words:
        yield from _expanded(f"{pattern[: braces.start()]}{word}{pattern[braces.end() :]}", given)
