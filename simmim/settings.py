"""What the settings of each command may be: their kinds and ranges, in one table.

What settings mean together is checked where they are used; so are words, as `masking.strategy`, by those who know
them. A new command is a line of `SETTINGS`, a new key a line of its section.
"""

import difflib
import json
import math
import os
from collections.abc import Callable, Collection, Iterator
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


NULL = Kind("null", lambda value: value is None)
ON = Kind("true", lambda value: value is True)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
WORD = Kind("one word", lambda value: not isinstance(value, list | dict))
TEXT = Kind("text, in quotes inside of quotes where it looks like a number", is_text)
NAME = Kind("a name as first or trials/first, without .. and empty parts", is_name)
POSITIVE = number(above=True)
SHARE = number(0, 1)
RATIO = Kind("a number", is_number)
EPOCHS = 10**6
PIXELS = count(2**13)
CHANNELS = several(whole(0, 999), 3) | several(whole(0, 999), 1)
IMAGE_SIZE = Kind("a number of pixels, or [height, width]", (PIXELS | several(PIXELS, 2)).accepts)
SEED = whole(0, 2**32 - 1)  # as NumPy's
RUN: Section = {"name": NAME, "output_dir": TEXT}

WINDOW = count(2**12)
MODEL: Section = {
    "name": WORD,
    "embed_dim": count(2**16) | NULL,
    "depths": several(count(1000)) | NULL,
    "num_heads": several(count(2**16)) | NULL,
    "extra_norm_every": whole() | NULL,
    "window_size": WINDOW,
    "pretrained_window_size": WINDOW | several(WINDOW | several(WINDOW, 2)) | NULL,
    "patch_size": PIXELS,
    "drop_path": number(),
    "attention": WORD,
    "position_bias": WORD | NULL,
    "norm": WORD | NULL,
    "attention_similarity": WORD | NULL,
    "table_resizing": WORD | NULL,
    "layer_scale": number(0, 1000) | NULL,
}

MAX_VALUE = number(1e-12, 1e12)
FILES: Section = {"root": TEXT, "val_root": TEXT | NULL, "val_fraction": number(), "cache": WORD}
SOURCES: dict[str, Section] = {
    "synthetic": {"train_images": count(), "val_images": count(2**20)},
    "folder": FILES,
    "shards": {**FILES, "labels": WORD},
    "zip": FILES,
    "hf": {**FILES, "image_column": TEXT | NULL, "label_column": TEXT | NULL},
    "list": FILES,
}
BATCHES: Section = {
    "source": WORD,
    "channels": count(1000),
    "max_value": MAX_VALUE,
    "image_size": IMAGE_SIZE,
    "batch_size": count(),
    "crop_scale": several(POSITIVE, 2),
    "crop_ratio": several(POSITIVE, 2),
}
MEAN = number(-1e12, 1e12) | several(number(-1e12, 1e12))  # beyond them and STD, single precision is left
STD = number(1e-12, 1e12) | several(number(1e-12, 1e12))
STATISTICS: Section = {
    "statistics": TEXT | NULL,
    "mean": MEAN,
    "std": STD,
    "on_error": WORD,
    "max_bad_fraction": SHARE,
}
WORKERS = whole(0, 256)
LOADING: Section = {"num_workers": WORKERS | NULL, "timeout": POSITIVE, "global_batch_size": count() | NULL}

DEVICES: Section = {"accelerator": WORD, "strategy": WORD, "precision": WORD}
COMPUTING: Section = {
    "compile": FLAG,
    "activation_checkpointing": Kind("none, all", is_text) | several(count()),
}
SEVERAL_DEVICES: Section = {
    "devices": Kind("auto", lambda value: value == "auto") | count(128),
    "num_nodes": count(),
}
STRATEGIES: dict[str, Section] = {
    "single": {"devices": SEVERAL_DEVICES["devices"]},
    "ddp": SEVERAL_DEVICES,
    "fsdp": {**SEVERAL_DEVICES, "reshard_after_forward": FLAG},
}

LENGTH: Section = {
    "max_epochs": number(0, EPOCHS, above=True),
    "max_steps": count() | NULL,
    "accumulate_grad_batches": count(),
}

MASKING: Section = {"strategy": WORD, "patch_size": PIXELS, "ratio": RATIO}


def section_of(choices: dict[str, Section], key: str, *shared: Section) -> Choice:
    """Settings that depend on a choice, and those shared by all choices."""
    everywhere = {name: kind for section in shared for name, kind in section.items()}
    return Choice(key, {choice: {**own, **everywhere} for choice, own in choices.items()})


TRAINING: Section = {
    **RUN,
    "seed": SEED,
    "encoder": TEXT | NULL,
    "resume": TEXT | NULL,
    "data": section_of(SOURCES, "source", BATCHES, STATISTICS, LOADING),
    "model": MODEL,
    "optimizer": {
        "base_lr": number(0, 1000, above=True),
        "betas": several(number(0, 1, below=True), 2),
        "eps": POSITIVE,
        "weight_decay": number(),
        "clip_grad_norm": POSITIVE,
        "layer_decay": number(0, 1, above=True),
        "ema_decay": number(0, 1, below=True) | NULL,
    },
    "schedule": {
        "name": WORD,
        "warmup_epochs": number(0, EPOCHS),
        "warmup_steps": whole() | NULL,
        "final_ratio": SHARE,
        "milestone_epochs": several(number(0, EPOCHS)),
    },
    "trainer": section_of(STRATEGIES, "strategy", DEVICES, COMPUTING, LENGTH),
    "logger": Several(
        {
            "csv": {"csv": ON},
            "tensorboard": {"tensorboard": ON},
            "wandb": {"wandb": ON, "project": TEXT, "mode": WORD, "group": TEXT | NULL},
        }
    ),
    "checkpoint": {"every_n_steps": count(), "keep": whole(2) | NULL, "on_error": WORD},
    "guard": {
        "max_norm_ratio": number(1, above=True) | NULL,
        "window": count(10**6),
        "warmup_steps": count(10**6),
        "max_in_a_row": whole(),
    },
    "diagnostics": {"every_n_steps": whole() | NULL},
    "log_every_n_steps": count(),
}

PRETRAIN: Section = {
    **TRAINING,
    "masking": MASKING,
    "objective": {
        "head": WORD,
        "loss": WORD,
        "predict": WORD,
        "target": WORD,
        "target_window": count(2**16),
        "target_downsampling": PIXELS,
    },
    "pictures": count(1000),
    "picture_channels": CHANNELS | NULL,
    "probe_every_n_epochs": count(EPOCHS) | NULL,
}

OPTIONAL_MODEL: Section = {key: kind | NULL for key, kind in MODEL.items() if isinstance(kind, Kind)}
INHERITED: Section = {
    "channels": count(1000) | NULL,
    "max_value": MAX_VALUE | NULL,
    "image_size": IMAGE_SIZE | NULL,
    "mean": MEAN | NULL,
    "std": STD | NULL,
    "interpolation": WORD,
    "test_crop": number(0, 1, above=True) | NULL,
}

LABELS: Section = {"label_fraction": number(0, 1, above=True)}

FINETUNE: Section = {
    **TRAINING,
    "data": section_of(
        SOURCES,
        "source",
        BATCHES,
        STATISTICS,
        LOADING,
        INHERITED,
        LABELS,
    ),
    "model": OPTIONAL_MODEL,
    "augmentation": {
        "randaugment": whole(0, 10) | NULL,
        "color_jitter": SHARE,
        "erasing": SHARE,
        "mixup": number(0, 1000),
        "cutmix": number(0, 1000),
        "switch": SHARE,
    },
    "label_smoothing": SHARE,
    "trainer": section_of(STRATEGIES, "strategy", DEVICES, COMPUTING, LENGTH, {"max_epochs": number(0, EPOCHS)}),
}

EVALUATE: Section = {
    **RUN,
    "seed": SEED,
    "encoder": TEXT,
    "probe": WORD,
    "data": section_of(
        SOURCES,
        "source",
        {"source": WORD, "batch_size": count(), "num_workers": WORKERS | NULL, "timeout": POSITIVE},
        STATISTICS,
        INHERITED,
        LABELS,
    ),
    "model": OPTIONAL_MODEL,
    "knn": {"k": several(count()), "temperature": POSITIVE},
    "linear": {
        "lrs": several(POSITIVE),
        "optimizers": several(WORD),
        "epochs": count(EPOCHS),
        "batch_size": count(),
    },
    "trainer": section_of({"single": {"devices": count(1)}}, "strategy", DEVICES),
}

PLAN: Section = {
    **PRETRAIN,
    "data": section_of(SOURCES, "source", BATCHES, STATISTICS, LOADING, {"root": TEXT | NULL}),
    "trainer": section_of(STRATEGIES, "strategy", DEVICES, COMPUTING, LENGTH, {"device_memory_gb": POSITIVE | NULL}),
    "throughput": POSITIVE | TEXT | NULL,
    "images_per_epoch": count() | NULL,
    "scaling_efficiency": number(0, 1, above=True),
    "price_per_hour": number() | NULL,
    "save": TEXT | NULL,
}

RECONSTRUCT: Section = {
    **RUN,
    "encoder": TEXT,
    "target": WORD,
    "images": TEXT,
    "count": count(1000),
    "picture_channels": CHANNELS | NULL,
    "seed": SEED,
    "masking": {"strategy": WORD, "patch_size": PIXELS | NULL, "ratio": RATIO | NULL},
}

EMBED: Section = {
    **RUN,
    "encoder": TEXT,
    "images": TEXT,
    "out": TEXT | NULL,
    "features": WORD,
    "data": {
        "image_size": IMAGE_SIZE | NULL,
        "max_value": MAX_VALUE | NULL,
        "mean": MEAN | NULL,
        "std": STD | NULL,
        "batch_size": count(2**16) | NULL,
        "num_workers": WORKERS | NULL,
        "timeout": POSITIVE,
    },
    "model": OPTIONAL_MODEL,
    "trainer": section_of({"single": {"devices": count(1)}}, "strategy", DEVICES),
}

UNREAD = ("val_root", "val_fraction", "cache")
STORED: dict[str, Section] = {
    source: {"source": WORD, **{key: kind for key, kind in own.items() if key not in UNREAD}}
    for source, own in SOURCES.items()
    if source != "synthetic"
}

MEASURE: Section = {
    **RUN,
    "data": section_of(
        SOURCES,
        "source",
        {"source": WORD, "channels": count(1000), "max_value": MAX_VALUE, "image_size": IMAGE_SIZE},
        {"num_workers": WORKERS | NULL, "timeout": POSITIVE},
    ),
}

PREPARE: Section = {
    **RUN,
    "data": section_of(STORED, "source"),
    "out": TEXT,
    "short_side": PIXELS,
    "quality": count(100),
    "shard_mb": count(2**20),
    "workers": WORKERS | NULL,
}

BENCHMARK: Section = {
    **RUN,
    "benchmark": WORD,
    "peers": several(WORD),
    "work": WORD,
    "rounds": count(),
    "warmup": count(),
    "save": TEXT | NULL,
    "image_sizes": several(PIXELS),
    "windows": several(count(2**12)),
    "loader_workers": several(WORKERS),
    "seconds": POSITIVE,
    "data": section_of(SOURCES, "source", BATCHES, {"num_workers": WORKERS, "timeout": POSITIVE}),
    "model": MODEL,
    "trainer": section_of(STRATEGIES, "strategy", DEVICES, COMPUTING),
    "masking": MASKING,
    "seed": SEED,
}

DIAGNOSE: Section = {
    **RUN,
    "diagnosis": WORD,
    "encoder": TEXT | several(TEXT) | NULL,
    "initial": FLAG,
    "models": several(WORD) | NULL,
    "out": TEXT | NULL,
    "seed": SEED,
    "data": section_of(
        SOURCES,
        "source",
        {"source": WORD, "channels": count(1000), "max_value": MAX_VALUE, "image_size": IMAGE_SIZE},
        {"batch_size": count(2**16), "mean": MEAN, "std": STD},
    ),
    "model": MODEL,
    "masking": MASKING,
    "trainer": section_of({"single": {"devices": count(1)}}, "strategy", DEVICES),
}

CONSOLIDATE: Section = {**RUN, "checkpoint": TEXT, "out": TEXT | NULL}

EXPORT: Section = {
    **RUN,
    "encoder": TEXT,
    "format": WORD,
    "out": TEXT,
    "images": TEXT | NULL,
    "license": TEXT,
}

INSPECT: Section = {**RUN, "encoder": TEXT}
REPORT: Section = {**RUN, "folder": TEXT, "finetuned": TEXT | NULL, "out": TEXT | NULL}

SETTINGS: dict[str, Section] = {
    "consolidate": CONSOLIDATE,
    "diagnose": DIAGNOSE,
    "embed": EMBED,
    "evaluate": EVALUATE,
    "export": EXPORT,
    "finetune": FINETUNE,
    "inspect": INSPECT,
    "plan": PLAN,
    "pretrain": PRETRAIN,
    "reconstruct": RECONSTRUCT,
    "prepare": PREPARE,
    "statistics": MEASURE,
    "benchmark": BENCHMARK,
    "report": REPORT,
}


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
    brought = {key for section in SETTINGS.values() for key, _ in _keys(section)}.difference(typed)
    for key, value, kind in _leaves(config, SETTINGS[command]):
        if kind is None and key not in brought:
            raise ValueError(unknown_key(key, command))
        if kind is not None and not kind.accepts(value):
            raise ValueError(f"{key}={_shown(value)} must be {kind.words}")


def unknown_key(key: str, command: str) -> str:
    """What to say of a key that a config does not hold: where it belongs, or what was probably meant."""
    known = list(_keys(SETTINGS[command]))
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


def _keys(section: Section, prefix: str = "") -> Iterator[tuple[str, str]]:
    """All keys; where only some choices of a section hold one, with each of these choices."""
    for key, kind in section.items():
        yield f"{prefix}{key}", ""
        if isinstance(kind, Choice | Several):
            options = kind.options
            for choice, own in options.items():
                for name, _ in _keys(own):
                    everywhere = all(name in other for other in options.values())
                    yield f"{prefix}{key}.{name}", "" if everywhere else f"{key}={choice}"
        elif isinstance(kind, dict):
            yield from _keys(kind, f"{prefix}{key}.")


def _shown(value: Any) -> str:
    """As one would type it."""
    typed = value if isinstance(value, str) else json.dumps(value, default=str)
    return typed.replace("NaN", "nan").replace("Infinity", "inf")
