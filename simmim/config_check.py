"""Refuses a config whose values are not what `simmim.settings` says of them, and keys that it does not know."""

import difflib
import json
from collections.abc import Collection, Iterator
from typing import Any

from simmim.kinds import Choice, Kind, Section, Several
from simmim.settings import SETTINGS


def check_settings(config: dict[str, Any], command: str, *, typed: Collection[str]) -> None:
    """Refuses a config whose values are not of their kind, or with keys too many or too few.

    Args:
        config: As composed.
        command: Name of the command.
        typed: The keys that a person gave: each must be read. A file may bring along what others have no use for, as
            an experiment the `data.train_images` that `data=folder` does not have.

    Raises:
        ValueError: With the key, the value, and what it must be.
    """
    brought = {key for section in SETTINGS.values() for key, _ in keys_of(section)}.difference(typed)
    for key, value, kind in _leaves(config, SETTINGS[command]):
        if kind is None and key not in brought:
            raise ValueError(unknown_key(key, command))
        if kind is not None and not kind.accepts(value):
            raise ValueError(f"{key}={_shown(value)} must be {kind.words}")


def unknown_key(key: str, command: str) -> str:
    """What to say of a key that a config does not hold: where it belongs, or what was probably meant."""
    known = list(keys_of(SETTINGS[command]))
    if owners := list(dict.fromkeys(owner for name, owner in known if name == key and owner)):
        return f"{key} belongs to {' or '.join(owners)}: give that too"
    names = [name for name, _ in known]
    if key in names:  # of every choice that this command has
        return f"{key} is no key beside the other choices given: simmim.{command} may not know one of them"
    close = difflib.get_close_matches(key.lower(), names, n=1) or [name for name in names if name.endswith(f".{key}")]
    meant = f"did you mean {close[0]}?" if close else "see all keys with --cfg job"
    return f"{key} is not a key of simmim.{command}: {meant}"


def _leaves(config: dict[str, Any], section: Section, prefix: str = "") -> Iterator[tuple[str, Any, Kind | None]]:
    """Each key that is no section, its value, and the kind it should have: None where the section has no such key."""
    if missing := [key for key in section if key not in config]:
        raise ValueError(f"{prefix}{missing[0]} is missing: it cannot be left out")
    for key, value in config.items():
        path, kind = f"{prefix}{key}", section.get(key)
        if isinstance(kind, Choice | Several | dict) and not isinstance(value, dict):
            raise ValueError(f"{path}={_shown(value)}: {path} is a section, whose keys are given as {path}.<key>=…")
        if isinstance(kind, Choice):
            kind = _chosen(path, value, kind)
        if isinstance(kind, Several):
            chosen = [own for word, own in kind.options.items() if word in value]
            if not chosen:
                raise ValueError(f"{path} is empty: choose one of {', '.join(kind.options)}, or a list of them")
            kind = {name: each for own in chosen for name, each in own.items()}
        if isinstance(kind, dict) or (kind is None and isinstance(value, dict)):
            yield from _leaves(value, kind or {}, f"{path}.")
        else:
            yield path, value, kind


def _chosen(path: str, value: dict[str, Any], choice: Choice) -> Section:
    """What is chosen; refuses where only the word was changed, without what comes with it."""
    word = value.get(choice.key)
    section = choice.options.get(word) if isinstance(word, str) else None
    if section is None:
        words = ", ".join(choice.options)
        raise ValueError(f"{path}.{choice.key}={_shown(word)} is unknown: choose one of {words}")
    if missing := [key for key in section if key not in value]:
        raise ValueError(f"{path}.{missing[0]} is missing: {path}.{choice.key}={word} comes with {path}={word}")
    return section


def keys_of(section: Section, prefix: str = "") -> Iterator[tuple[str, str]]:
    """All keys; where only some choices of a section hold one, with each of these choices."""
    for key, kind in section.items():
        yield f"{prefix}{key}", ""
        if isinstance(kind, Choice | Several):
            options = kind.options
            for choice, own in options.items():
                for name, _ in keys_of(own):
                    everywhere = all(name in other for other in options.values())
                    yield f"{prefix}{key}.{name}", "" if everywhere else f"{key}={choice}"
        elif isinstance(kind, dict):
            yield from keys_of(kind, f"{prefix}{key}.")


def _shown(value: Any) -> str:
    """As one would type it."""
    typed = value if isinstance(value, str) else json.dumps(value, default=str)
    return typed.replace("NaN", "nan").replace("Infinity", "inf")
