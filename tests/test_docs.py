"""The documentation: it builds without a broken link, its commands run, and its drawings say what the code computes."""

import importlib.util
import io
import re
import tarfile
import tomllib
import zipfile
from contextlib import redirect_stderr
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from documented import run_page
from PIL import Image

from simmim.config import config_folder
from simmim.config_check import keys_of
from simmim.encoders import create_encoder
from simmim.encoders.names import to_official
from simmim.settings import SETTINGS

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def photographs(folder, count):
    """Pictures that compress as photographs do not, of two shades each."""
    folder.mkdir(parents=True)
    for number in range(count):
        shade = (37 * number % 256, 91 * number % 256, (len(folder.name) * 53 + number) % 256)
        picture = Image.new("RGB", (64, 48), shade)
        picture.paste((255 - shade[0], shade[1], shade[2]), (10, 5, 40, 30))
        picture.save(folder / f"{number}.png")


@pytest.fixture
def reader(tmp_path):
    """A folder as the reader of any page has it: images without labels, and with."""
    photographs(tmp_path / "photos", 6)
    for part, count in (("train", 12), ("val", 2), ("test", 2)):
        for kind in ("cat", "dog"):
            photographs(tmp_path / part / kind, count)
    pictures = sorted((tmp_path / "photos").iterdir())
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for image in pictures:
            archive.write(image, image.name)
    (tmp_path / "scenes").mkdir()
    for number in range(4):
        scene = np.random.default_rng(number).integers(0, 10000, (48, 64, 13), dtype=np.uint16)
        np.save(tmp_path / "scenes" / f"{number}.npy", scene)
    (tmp_path / "images.txt").write_text("".join(f"photos/{image.name}\n" for image in pictures))
    for number in range(2):
        with tarfile.open(tmp_path / f"train-{number:03}.tar", "w") as archive:
            for image in pictures[number::2]:
                archive.add(image, image.name)
    return tmp_path


def save_to_disk(pictures, folder):
    """As a person makes a data set of a few files."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": [str(path) for path in pictures]}).cast_column(
        "image", datasets.Image()
    )
    with redirect_stderr(io.StringIO()):  # a bar
        rows.save_to_disk(folder)


def released_weights(folder):
    """A small encoder under the names of the authors' code, and a whole model as transformers writes it."""
    for name, file in (("swinv2_t", "released.pth"), ("swin_t", "swin-simmim.pth")):
        encoder = create_encoder(name, window_size=4, embed_dim=12, depths=(1, 1, 1, 1))
        torch.save({"model": to_official(encoder.state_dict())}, folder / file)
    transformers = pytest.importorskip("transformers")
    size = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
    config = transformers.Swinv2Config(image_size=64, window_size=4, encoder_stride=32, **size)
    transformers.Swinv2ForMaskedImageModeling(config).save_pretrained(folder / "swinv2-simmim")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, reader, capsys):
    if page.stem == "weights":
        released_weights(reader)
    if "data=hf" in page.read_text():
        pictures = sorted((reader / "photos").iterdir())
        save_to_disk(pictures, reader / "pets" / "train")
        save_to_disk(pictures[:2], reader / "pets" / "test")
    run_page(page, reader, capsys)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as `make docs` builds them: a link that leads nowhere ends it."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with mock.patch.dict("os.environ", {"NO_MKDOCS_2_WARNING": "1"}):
        config = load_config(str(REPOSITORY / "mkdocs.yml"), site_dir=str(folder))
        assert config.strict
        build(config)
    return folder


def test_the_site_holds_all_pages_and_asks_nothing_of_other_hosts(site):
    wanted = {f"{page.stem}.html" for page in PAGES} | {"overview.html", "changelog.html", "benchmarks/speed.html"}
    built = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    assert wanted <= set(built)
    for name, text in built.items():
        loaded = re.findall(r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=\"?(https?:[^\">\s]+)", text)
        assert loaded == [], name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?https?:", sheet.read_text()), sheet


def test_pages_of_the_repository_are_linked_as_they_lie_and_as_they_are_built(site):
    """The same sources are read on a code host: what a link says there, must exist."""
    for page in (*PAGES, REPOSITORY / "README.md"):
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"(\w+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert {page.name for page in PAGES} <= set(listed)


def drawings():
    spec = importlib.util.spec_from_file_location("drawings", DOCS / "drawings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words_of(svg):
    return re.findall(r"<text[^>]*>([^<]+)</text>", svg.read_text())


def test_the_committed_drawings_are_what_the_script_draws(tmp_path):
    module = drawings()
    for name, draw in module.DRAWINGS.items():
        draw(tmp_path / name)
        assert words_of(tmp_path / name) == words_of(DOCS / name) != [], "run `python docs/drawings.py`"


def test_the_drawings_say_what_the_code_computes():
    masking, encoder = drawings().geometry()
    hidden = int(masking(torch.Generator().manual_seed(0)).sum())
    assert (hidden, masking.grid, encoder.windows(192, 192)) == (22, (6, 6), [(12, 12)] * 3 + [(6, 6)])
    with torch.no_grad():
        maps = create_encoder("swinv2_t", window_size=12, embed_dim=12).pyramid(torch.zeros(1, 3, 192, 192))
    grids, stages, distances = (" ".join(words_of(DOCS / name)) for name in ("grids.svg", "stages.svg", "avgdist.svg"))
    for words in ("22 of 36 cells", "mask patch: 32 px", "model patch: 4 px", "12 tokens = 48 px", "8 x 8",
                  "6 tokens = 24 px"):  # fmt: skip
        assert words in grids
    for side, level in zip((48, 24, 12, 6), maps, strict=True):
        assert level.shape[2:] == (side, side)
        assert f"{side} x {side} tokens of {192 // side} px" in stages
    assert f"{drawings().distance_of('random', 32)[0]:.1f} px" in distances


def test_the_pages_say_what_there_is():
    """Recipes, stages, verbs and extras that the pages name exist, and none is left out."""
    recipes, transfer = ((DOCS / name).read_text() for name in ("recipes.md", "transfer.md"))
    for path in sorted((config_folder() / "experiment").glob("*.yaml")):
        assert f"`{path.stem}`" in recipes
    for path in sorted((config_folder() / "stage").glob("*.yaml")):
        assert f"`{path.stem}`" in transfer
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    makefile = (REPOSITORY / "Makefile").read_text()
    for page in (*PAGES, REPOSITORY / "README.md"):
        text = page.read_text()
        for names in re.findall(r"simmim\[([\w,]+)\]", text):
            assert set(names.split(",")) <= set(extras), page.name
        for verb in re.findall(r"(?:^|`)make ([a-z]+)", text, flags=re.MULTILINE):
            assert f"\n{verb}:" in makefile, page.name


def test_settings_that_the_pages_name_are_settings():
    """Words as `data.cache=ram` in the text: a key that is renamed must not live on in the pages."""
    known = {key for section in SETTINGS.values() for key, _ in keys_of(section)}
    for page in PAGES:
        for key in re.findall(r"`([a-z_]+\.[a-z_.]+)=[^`]*`", page.read_text()):
            assert key in known, f"{page.name}: {key}"
