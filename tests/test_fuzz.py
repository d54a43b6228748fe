"""Whatever a person writes for a setting: it is taken as it stands, or refused in one line that names the key."""

import functools
import math
import shutil
from collections import defaultdict
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, Features
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import simmim.evaluate
import simmim.finetune
from simmim.benchmark import work_of
from simmim.config import compose_config, image_size_of
from simmim.data.synthetic import SyntheticSource
from simmim.encoders import create_encoder
from simmim.encoders.encoder_files import read_encoder_weights, save_encoder
from simmim.errors import USER_ERRORS, explain
from simmim.pretrain import build
from simmim.run import create_trainer
from simmim.stages import fill_in, load_classifier

VARIANTS = {
    "debug": ("pretrain", ["experiment=debug"]),
    "vit": ("pretrain", ["experiment=debug", "model=vit_s", "model.depths=[1]", "model.embed_dim=8",
                         "model.num_heads=[1]", "model.patch_size=8", "model.window_size=4", "masking.patch_size=16"]),
    "ddp": ("pretrain", ["experiment=debug", "trainer=ddp"]),
    "fsdp": ("pretrain", ["experiment=debug", "trainer=fsdp", "logger=[tensorboard,wandb]"]),
    "folder": ("pretrain", ["data=folder", "data.root={photos}", "data.num_workers=0", "trainer=cpu"]),
    "shards": ("pretrain", ["data=shards", "data.root={archive}", "data.num_workers=0", "trainer=cpu"]),
    "zip": ("pretrain", ["data=zip", "data.root={zipped}", "data.num_workers=0", "trainer=cpu"]),
    "hf": ("pretrain", ["data=hf", "data.root={rows}", "data.num_workers=0", "trainer=cpu"]),
    "list": ("finetune", ["encoder={encoder}", "data=list", "data.root={listed}", "data.num_workers=0", "trainer=cpu"]),
    "reconstruct": ("reconstruct", ["encoder=nowhere", "images=nowhere"]),
    "embed": ("embed", ["encoder=nowhere", "images=nowhere", "trainer=cpu"]),
    "finetune": ("finetune", ["encoder={encoder}", "data.num_workers=0", "trainer=cpu"]),
    "scratch": ("finetune", ["experiment=debug"]),
    "evaluate": ("evaluate", ["encoder={encoder}", "data.num_workers=0", "trainer=cpu"]),
    "inspect": ("inspect", ["encoder=nowhere"]),
    "statistics": ("statistics", ["data=folder", "data.root={photos}"]),
    "prepare": ("prepare", ["data.root={photos}", "out=copy"]),
    "export": ("export", ["encoder=nowhere", "format=timm", "out=there"]),
    "benchmark": ("benchmark", ["model=swinv2_t", "trainer=cpu"]),
}  # fmt: skip
EXAMPLES = {
    "debug": 50, "vit": 15, "ddp": 12, "fsdp": 15, "folder": 15, "reconstruct": 10, "embed": 10, "finetune": 40,
    "scratch": 20, "evaluate": 20, "inspect": 10, "prepare": 10, "benchmark": 15, "statistics": 10, "shards": 6,
    "zip": 5, "hf": 6, "list": 6, "export": 10,
}  # fmt: skip

VALUES = [
    None, True, False, 0, 1, 2, 3, 4, 7, 8, 16, 32, 64, -1, 2**31, 2**63, 10**30, -(10**30), 0.0, 0.5, 1.0, 1.5, 8.0,
    -0.5, 1e-30, 1e-320, 1e30, 1e308, math.nan, math.inf, -math.inf, "auto", "none", "all", "random", "gpu", "words",
    "ü-ä", "a b", "./nowhere/..", "x" * 300, "8x", [], [1], [0], [-1], [1, 2], [2, 1], [0.5, 0.5], [1, 1, 1],
    [0.5, 0.4, 0.3], [1, 2, 2], [16, 16, 16], [32, 64], [10**9, 1], [1, 2, 3, 4, 5], [True, True], [None], ["words"],
    ["a", 1], [[1, 2]], [[]], [math.nan, math.inf], {}, {"a": 1}, {"a": {"b": []}}, [{"a": 1}],
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(8):
        Image.new("RGB", (40, 40), (number * 30, 0, 90)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def places(photos, tmp_path_factory):
    """What the variants name: photographs in every layout, and the file of a classifier of the synthetic classes."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    encoder = create_encoder(
        "swinv2", embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 2], extra_norm_every=0, window_size=4
    )
    head = torch.nn.Linear(32, 6).state_dict()
    classes = SyntheticSource(1, (8, 8)).classes
    statistics = {"mean": [0.5] * 3, "std": [0.2] * 3}
    save_encoder(encoder, path, image_size=(32, 32), head=head, classes=classes, **statistics)
    return {"photos": photos, "encoder": path, **packed(photos, tmp_path_factory.mktemp("packed"))}


def packed(photos, folder):
    files = sorted(photos.iterdir())
    shutil.make_archive(folder / "archive", "tar", photos)
    shutil.make_archive(folder / "zipped", "zip", photos)
    rows = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files]}
    Dataset.from_dict(rows, features=Features({"image": datasets.Image()})).save_to_disk(folder / "rows")
    (folder / "list.txt").write_text("".join(f"{file}\t{number % 2}\n" for number, file in enumerate(files)))
    places = {"archive": "archive.tar", "zipped": "zipped.zip", "rows": "rows", "listed": "list.txt"}
    return {word: folder / name for word, name in places.items()}


def typed(value):
    """A value as one types it for Hydra."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, list):
        return f"[{','.join(map(typed, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{typed(item)}' for key, item in value.items())}}}"
    return repr(value)


def flat(config, prefix=""):
    for key, value in config.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")


def same(value, given_value):
    if isinstance(given_value, list):
        return isinstance(value, list) and len(value) == len(given_value) and all(map(same, value, given_value))
    if isinstance(given_value, dict):  # Hydra merges it into what is there
        return isinstance(value, dict) and all(same(value.get(key), item) for key, item in given_value.items())
    return type(value) is type(given_value) and (value == given_value or value != value)


@functools.cache
def keys_of(variant):
    name, overrides = VARIANTS[variant]
    words = [word.format_map(defaultdict(lambda: "somewhere")) for word in overrides]
    config = compose_config(name, words, output_dir=Path("unused"))
    return sorted(key for key, _ in flat(config) if key != "output_dir")


def misspelt(key, how):
    """The key with one letter too many, too few or another, or in the wrong section."""
    section, _, word = key.rpartition(".")
    changed = {0: word + word[-1], 1: word[:-1], 2: word.upper(), 3: f"{word}.{word}", 4: f"x{word}"}[how]
    return f"{section}.{changed}" if section else changed


def overrides_of(variant):
    keys = st.sampled_from(keys_of(variant))
    values = st.sampled_from(VALUES)
    given_value = st.tuples(st.just(""), keys, values)
    typo = st.tuples(st.sampled_from(["", "+", "++"]), st.builds(misspelt, keys, st.integers(0, 4)), values)
    deleted = st.tuples(st.just("~"), keys, st.none())
    one = st.one_of(given_value, given_value, given_value, given_value, given_value, typo, deleted)
    return st.lists(one, min_size=1, max_size=3, unique_by=lambda override: override[1])


def word_of(sign, key, value):
    return f"~{key}" if sign == "~" else f"{sign}{key}={typed(value)}"


def start(variant, words, folder):
    """All that a command does before it works; returns its config."""
    name = VARIANTS[variant][0]
    config = compose_config(name, words, output_dir=folder / "never")
    if name == "pretrain":
        task, _, length = build(config)
        task.configure_optimizers()
        create_trainer(config, length, callbacks=[], loggers=[])
    elif name in ("finetune", "evaluate"):
        start_classifier(name, config)
    elif name == "benchmark":
        work_of(config)
    return config


def start_classifier(name, config):
    encoder = config["encoder"] and Path(config["encoder"])
    known = encoder and read_encoder_weights(encoder)[1]
    filled = fill_in(config, known)
    if name == "evaluate":
        task, data, _ = simmim.evaluate.build(filled, known["classes"])
    else:
        task, data, length = simmim.finetune.build(filled)
        task.configure_optimizers()
        create_trainer(filled, length, callbacks=[], loggers=[])
    if known:
        load_classifier(task, encoder, known, image_size=image_size_of(filled))
    if max(image_size_of(filled)) <= 64:
        samples = [samples[(0, 0)] for samples in (data.train_samples, data.val_samples)]
        assert task.normalize(samples[0]["image"]).isfinite().all()
        assert task.mix is None or task.mix(samples[0]["image"][None].float(), torch.zeros(1, dtype=torch.int64))


@pytest.fixture(autouse=True)
def _flags():
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_setting_is_taken_as_given_or_refused_in_one_line(variant, places, tmp_path):
    name, base = VARIANTS[variant]
    base = [word.format(**places) for word in base]
    known = set(keys_of(variant))

    @settings(max_examples=EXAMPLES[variant], deadline=None, derandomize=True, database=None)
    @given(overrides_of(variant))
    def check(overrides):
        words = [word_of(*override) for override in overrides]
        try:
            config = start(variant, [*base, *words], tmp_path)
        except USER_ERRORS as error:
            line = explain(error, name)
            assert "\n" not in line
            names = [part for _, key, _ in overrides for part in (key, key.rpartition(".")[2], key.partition(".")[0])]
            assert any(part.lower() in line.lower() for part in names), (words, line)
            return
        taken = dict(flat(config))
        for sign, key, value in overrides:
            assert sign != "~" and key in known, f"{words} was accepted"
            if not isinstance(taken[key], dict):  # a group was given the name of a choice
                assert same(taken[key], value), f"{words}: {key} became {taken[key]}"

    check()
