from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))
PICTURES = {"reconstruction": ["panels", "masks", "checkpoints"], "transfer": ["bias", "resolution"]}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(source, tmp_path, monkeypatch):
    monkeypatch.setenv("SIMMIM_WORK", str(tmp_path))
    monkeypatch.setenv("SIMMIM_OVERRIDES", "experiment=debug checkpoint.every_n_steps=2 checkpoint.keep=null")
    notebook = jupytext.read(source)
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    drawn = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in str(output)]
    assert len(drawn) == len(PICTURES[source.stem])
    for name in PICTURES[source.stem]:
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 300
    if source.stem == "reconstruction":
        with Image.open(tmp_path / "checkpoints.png") as picture:
            assert picture.width > picture.height  # the original and four checkpoints


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_notebook_is_generated_from_its_source(source):
    generated = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    cells = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    assert [(cell.cell_type, cell.source) for cell in generated.cells] == cells, "run `make notebooks`"
