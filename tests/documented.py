"""The commands and the code of a Markdown page, run in the order in which a reader would type them.

Each line of a block of `bash` is run as it stands, but made small, and each block of `python` in the namespace of its
page; all in one folder, and in this process: to import PyTorch anew takes longer than most commands. A comment on the
line before a block says what else becomes of it:

    <!-- composed: why -->  its commands are composed, and nothing is run: they need GPUs, several machines, a network
    <!-- refused -->        its command is refused, with the line that the block of `text` behind it holds
    <!-- typed: why -->     nothing of simmim's: what a shell or another program does
"""

import contextlib
import itertools
import logging
import re
import runpy
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from simmim.config import compose_config
from simmim.encoders import SIZES

BLOCK = re.compile(r"(?:^ *<!-- (?P<mark>[a-z]+)(?P<why>:[^>]+)? -->\n+)?^(?P<indent> *)```(?P<kind>\w+)[^\n]*\n"
                   r"(?P<text>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)  # fmt: skip
MARKS = {"": False, "refused": False, "composed": True, "typed": True}
"""And whether each must say why."""

POSITIONAL = {"consolidate": "checkpoint", "diagnose": "diagnosis", "inspect": "encoder", "report": "folder"}
"""What a command may be given without its key, as the first word."""

STEPS = {"trainer.max_steps": 1, "log_every_n_steps": 1}
SMALL = {
    "pretrain": {**STEPS, "pictures": 2},
    "finetune": STEPS,
    "evaluate": {"knn.k": [3], "linear.epochs": 2},
    "reconstruct": {"count": 2},
    "prepare": {"workers": 1},
}
"""What makes a command take a second, besides what `smaller` finds in its config."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: the language it says, the mark before it, and the page's line that it begins on."""

    kind: str
    mark: str
    text: str
    line: int

    @property
    def commands(self):
        """Each command of a block of `bash`, in words."""
        joined = self.text.replace("\\\n", " ")
        return [words for words in (shlex.split(line, comments=True) for line in joined.splitlines()) if words]


def blocks(page):
    """All fenced blocks of a page."""
    found = []
    text = page.read_text()
    for match in BLOCK.finditer(text):
        mark = match["mark"] or ""
        assert mark in MARKS, f"{page}: {mark}"
        assert MARKS[mark] == bool(match["why"]), f"{page}: {mark} must say why, or not at all"
        line = text.count("\n", 0, match.start("kind")) + 1
        found.append(Block(match["kind"], mark, re.sub(rf"(?m)^{match['indent']}", "", match["text"]), line))
    return found


def simmim_words(words):
    """The command of simmim and what it is given, whatever starts it: torchrun, srun, python."""
    at = next((at for at, word in enumerate(words) if word.startswith("simmim.")), None)
    assert at is not None and words[at - 1] == "-m", f"no command of simmim: {shlex.join(words)}"
    end = next((i for i, word in enumerate(words) if word in ("||", "&&", "|", "&", ";")), len(words))
    return words[at].removeprefix("simmim."), words[at + 1 : end]


def jobs(overrides):
    """The overrides of each job of a multirun; else themselves."""
    if not {"-m", "--multirun"} & set(overrides):
        return [overrides]
    words = OverridesParser.create().parse_overrides([word for word in overrides if "=" in word])
    choices = [[f"{w.key_or_group}={value}" for value in w.sweep_string_iterator()] if w.is_sweep_override()
               else [w.input_line] for w in words]  # fmt: skip
    return [list(job) for job in itertools.product(*choices)]


def composed(name, overrides):
    """The configs of a command's jobs."""
    keyed = [f"{POSITIONAL[name]}={overrides[0]}", *overrides[1:]] if name in POSITIONAL else overrides
    return [compose_config(name, [word for word in job if "=" in word], output_dir=Path("unused"))
            for job in jobs(keyed)]  # fmt: skip


def smaller(name, overrides):
    """What to add to a command: few steps on few images, a thin and shallow encoder, one device, the CPU."""
    config = composed(name, overrides)[0]
    values: dict[str, object] = {}
    data, model = config.get("data", {}), config.get("model", {})
    values |= {f"data.{key}": small for key, small in (("batch_size", 2), ("num_workers", 0)) if key in data}
    if data.get("global_batch_size"):
        values["data.global_batch_size"] = "null"
    if model.get("name"):
        stages = len(model["num_heads"] or SIZES[model["name"]]["num_heads"])
        values |= {"model.depths": [1] * stages, "model.embed_dim": 12}
    if "trainer" in config:
        values["trainer"] = "cpu"
    given = {word.partition("=")[0] for word in overrides}
    values = {key: value for key, value in values.items() if key not in given} | SMALL.get(name, {})
    if data.get("source") == "synthetic":
        sizes = {"train_images": 16, "val_images": 8}  # 16: of each class one at least
        values |= {f"data.{key}": size for key, size in sizes.items() if key in data}
    return [f"{key}={value}".replace(" ", "") for key, value in values.items()]


def type_in(name, words, folder, capsys):
    """`python -m simmim.<name> <words>` in a folder, in this process: its exit code, and all that it said."""
    code: object = 0
    capsys.readouterr()
    with _as_a_process(folder, [f"simmim.{name}", *words]):
        try:
            runpy.run_module(f"simmim.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
    said = "".join(capsys.readouterr())
    return (code, said) if isinstance(code, int) else (1, f"{said}{code}\n")


@contextlib.contextmanager
def _as_a_process(folder, argv):
    """What a command changes of its process is put back: words, folder, environment, loggers."""
    root, raising = logging.getLogger(), logging.raiseExceptions
    handlers, level = list(root.handlers), root.level
    with (contextlib.chdir(folder), mock.patch.object(sys, "argv", argv), mock.patch.dict("os.environ"),
          warnings.catch_warnings()):  # fmt: skip
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's: the module is known already
        GlobalHydra.instance().clear()
        try:
            yield
        finally:
            root.handlers[:], logging.raiseExceptions = handlers, raising
            root.setLevel(level)


def run_page(page, folder, capsys):
    """Runs a page from top to bottom in a folder that holds what its commands read."""
    namespace, refusal = {}, None
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        if refusal is not None:
            assert block.kind == "text", f"{where}: the refusal is missing"
            assert " ".join(block.text.split()) in " ".join(refusal.split()), f"{where}: {refusal}"
            refusal = None
        elif block.kind == "python":
            with contextlib.chdir(folder):
                exec(compile(block.text, where, "exec"), namespace)
        elif block.kind == "bash" and block.mark != "typed":
            for words in block.commands:
                name, overrides = simmim_words(words)
                with contextlib.chdir(folder):
                    added = [] if block.mark in ("refused", "composed") else smaller(name, overrides)
                if block.mark == "composed":
                    composed(name, overrides)
                    continue
                assert words[:2] == ["python", "-m"], where
                code, said = type_in(name, [*overrides, *added], folder, capsys)
                assert (code != 0) == (block.mark == "refused"), f"{where}: {shlex.join(words)}\n{said}"
                refusal = said if block.mark == "refused" else None
    assert refusal is None, f"{page.name} ends with a refusal that it does not show"
