"""The extras: what they bring can be imported, is imported late, and its absence is one line."""

import ast
import re
import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path

import pytest

import simmim
from simmim.data.bands import open_tiff
from simmim.data.hf import HFSource
from simmim.feature_files import check_out
from simmim.measuring.peers import create_peer

PACKAGE = Path(simmim.__file__).parent
PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
OPTIONAL = {extra: wanted for extra, wanted in PROJECT["optional-dependencies"].items() if extra != "dev"}
"""`dev` is for work on this package, and holds all others."""


def distributions(requirements):
    return [re.match(r"[\w.-]+", requirement)[0] for requirement in requirements]


def modules_of(distribution):
    """The top-level modules that a distribution brings; below a folder that several share, its own."""
    found = set()
    for file in metadata.files(distribution) or ():
        head, *rest = file.parts
        if head.endswith(".py") and head.removesuffix(".py").isidentifier():
            found.add(head.removesuffix(".py"))
        elif rest and head.isidentifier() and head != "hydra_plugins":
            if rest == ["__init__.py"]:
                found.add(head)
        elif rest[1:] == ["__init__.py"] and head == "hydra_plugins":
            found.add(f"{head}.{rest[0]}")
    return found


def provided(requirements):
    return {module for name in distributions(requirements) for module in modules_of(name)}


def imports():
    """Each import of simmim/: file, top-level module, and whether it waits inside a function."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        late = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
                for node in ast.walk(function)}  # fmt: skip
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                yield path.relative_to(PACKAGE), name.split(".")[0], id(node) in late


@pytest.mark.parametrize("extra", OPTIONAL)
def test_what_an_extra_brings_can_be_imported(extra):
    modules = provided(OPTIONAL[extra])
    assert modules, extra
    for module in sorted(modules):
        import_module(module)


def test_dev_holds_all_other_extras():
    [everything] = [word for word in PROJECT["optional-dependencies"]["dev"] if word.startswith("simmim[")]
    assert set(everything.removeprefix("simmim[").removesuffix("]").split(",")) == set(OPTIONAL)


def test_optional_libraries_are_imported_late_and_belong_to_one_extra():
    """And what is neither optional, nor required, nor Python's own is imported nowhere."""
    extras = {extra: provided(wanted) for extra, wanted in OPTIONAL.items()}
    required = provided(PROJECT["dependencies"]) | {"simmim"} | set(sys.stdlib_module_names)
    for path, module, late in imports():
        owners = [extra for extra, modules in extras.items() if module in modules]
        if module not in required:
            assert late, f"{path} imports {module} at its top, and not everybody has it"
            assert len(owners) == 1, f"{path} imports {module}, which the extras {owners} bring"


def data_set(folder):
    """What is there before the library that reads it is missed."""
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text('{"_data_files": [{"filename": "rows.arrow"}]}')
    (folder / "rows.arrow").touch()
    return folder


ABSENT = {
    "pyarrow": ("parquet", lambda folder: check_out(folder / "features.parquet")),
    "datasets": ("hf", lambda folder: HFSource(data_set(folder))),
    "tifffile": ("tiff", lambda folder: open_tiff(b"", 3).__enter__()),
    "timm": ("timm", lambda folder: create_peer("timm", None, (32, 32))),
    "transformers": ("hf", lambda folder: create_peer("transformers", None, (32, 32))),
}
"""For each optional library the extra that brings it, and what needs it."""


@pytest.mark.parametrize("library", ABSENT)
def test_a_library_that_is_absent_is_one_line_with_its_extra(library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    extra, use = ABSENT[library]
    assert library in provided(OPTIONAL[extra])
    with pytest.raises(ValueError, match=rf"pip install 'simmim\[{extra}\]'") as caught:
        use(tmp_path)
    assert "\n" not in str(caught.value)


def test_every_optional_library_has_been_seen_absent():
    optional = {module for wanted in OPTIONAL.values() for module in provided(wanted)}
    used = {module for _, module, _ in imports() if module in optional}
    used.remove("onnxruntime")  # without it an export is written, and says that it was not verified: test_export.py
    assert used == set(ABSENT), "a line of ABSENT for each library that simmim/ imports"
