import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, REPOSITORY],
        check=True,
        capture_output=True,
    )
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_carries_every_config_and_nothing_else_of_the_repository(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    configs = {p.relative_to(REPOSITORY).as_posix() for p in (REPOSITORY / "conf").rglob("*.yaml")}
    assert {f"simmim/{name}" for name in configs} <= set(names)
    assert {name.split("/")[0] for name in names} == {"simmim", wheel.name.split("-py3")[0] + ".dist-info"}


def test_an_installed_wheel_runs_from_another_folder(wheel, tmp_path):
    """In a new environment that borrows the installed libraries, but not this checkout."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True, capture_output=True)
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    Path(purelib, "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    work = tmp_path / "work"
    work.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = subprocess.check_output(
        [python, "-c", "import simmim; print(simmim.__file__)"], cwd=work, env=environment, text=True
    )
    assert where.startswith(purelib)
    done = subprocess.run(
        [python, "-m", "simmim.pretrain", "experiment=debug", "name=installed", "trainer.max_steps=2"],
        cwd=work, env=environment, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (work / "outputs/pretrain/installed/encoder.safetensors").exists()
