"""Kinds of settings: what a value must be, in words, and how to tell; and sections of which some are chosen."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What a value must be, in words, and how to tell."""

    words: str
    accepts: Callable[[Any], bool]

    def __or__(self, other: "Kind") -> "Kind":
        """Either of them."""
        return Kind(f"{self.words}, or {other.words}", lambda value: self.accepts(value) or other.accepts(value))


@dataclass(frozen=True)
class Choice:
    """A section whose settings depend on one of its own, as those of `data` on `data.source`.

    Args:
        key: The setting that decides: what `conf/<section>/<choice>.yaml` gives it.
        options: The whole section for each of its values.
    """

    key: str
    options: dict[str, "Section"]


@dataclass(frozen=True)
class Several:
    """A section of which several choices may be made, each with settings of its own; the word of each is a key too.

    Args:
        options: What comes with each: `conf/<section>/<choice>.yaml`.
    """

    options: dict[str, "Section"]


Section = dict[str, "Kind | Choice | Several | Section"]


def is_number(value: Any) -> bool:
    """Whether this is a number; neither true, false, nan nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def number(least: float = 0, most: float = math.inf, *, above: bool = False, below: bool = False) -> Kind:
    """Numbers between two, themselves included unless `above` the one or `below` the other."""
    words = "a number, " + (f"at least {least}" if not above else "positive" if least == 0 else f"above {least}")
    if most < math.inf:
        words += f", below {most}" if below else f", at most {most:,}"
    excluded = {least} if above else {most} if below else set()
    return Kind(words, lambda value: is_number(value) and least <= value <= most and value not in excluded)


def whole(least: int = 0, most: int = 10**9) -> Kind:
    """Whole numbers between two, both included. Without an end of its own, a number is at least not absurd."""
    words = f"a whole number, {'positive' if least == 1 else f'at least {least}'}, at most {most:,}"
    return Kind(words, lambda value: isinstance(value, int) and is_number(value) and least <= value <= most)


def count(most: int = 10**9) -> Kind:
    """Positive whole numbers."""
    return whole(1, most)


def several(kind: Kind, length: int | None = None) -> Kind:
    """Lists, of any length unless it is given, whose items are all of a kind."""

    def accepts(value: Any) -> bool:
        return isinstance(value, list) and length in (None, len(value)) and all(map(kind.accepts, value))

    return Kind(f"a list{f' of {length}' if length else ''}, each {kind.words}", accepts)


def is_text(value: Any) -> bool:
    """Whether this is a string that a path can be: no control characters, no part longer than file systems take."""
    if not isinstance(value, str) or any(character < " " for character in value):
        return False
    return all(len(os.fsencode(part)) < 256 for part in value.split("/"))


def is_name(value: Any) -> bool:
    """Whether a run folder can be called so: inside of the folder of all runs."""
    words = str(value).split("/")
    return type(value) in (str, int) and is_text(str(value)) and {"", ".", ".."}.isdisjoint(words)


def section_of(choices: dict[str, Section], key: str, *shared: Section) -> Choice:
    """Settings that depend on a choice, and those shared by all choices."""
    everywhere = {name: kind for section in shared for name, kind in section.items()}
    return Choice(key, {choice: {**own, **everywhere} for choice, own in choices.items()})


NULL = Kind("null", lambda value: value is None)
ON = Kind("true", lambda value: value is True)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
WORD = Kind("one word", lambda value: not isinstance(value, list | dict))
TEXT = Kind("text, in quotes inside of quotes where it looks like a number", is_text)
NAME = Kind("a name as first or trials/first, without .. and empty parts", is_name)
POSITIVE = number(above=True)
SHARE = number(0, 1)
RATIO = Kind("a number", is_number)
