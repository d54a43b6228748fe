import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    # Files that start processes take longest: begun first, they do not keep one worker busy while the other has ended.
    items.sort(key=lambda item: not {"started", "subprocess"} & vars(item.module).keys())
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and there is none"))


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    """No test reads or writes the caches of the person who runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def shared_data():
    """Folder of real images; `SIMMIM_TEST_DATA` names another place."""
    folder = Path(os.environ.get("SIMMIM_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}: set SIMMIM_TEST_DATA")
    return folder
