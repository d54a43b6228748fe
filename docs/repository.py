"""Lets the documentation link to pages outside of its folder, as it does where the repository is read in place.

MkDocs knows one folder. The pages at the top of the repository and under benchmarks/ come into it here, and links
between the two lose or gain the `../` and the `docs/` that the other place needs.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[1]
NAMES = {"README.md": "overview.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""The pages at the top, and what they are called here, where a README would be taken for the index."""


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from outside, and the pictures that the benchmarks show."""
    tables = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "benchmarks").glob("*.md")}
    for path, name in {**NAMES, **{table: table for table in tables}}.items():
        files.append(File.generated(config, name, abs_src_path=str(REPOSITORY / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links across the border of the folder."""
    markdown = re.sub(r"(?<=\]\()(\.\./)?docs/", r"\1", markdown)
    if "/" not in page.file.src_uri:
        markdown = re.sub(r"(?<=\]\()\.\./", "", markdown)
    for name, here in NAMES.items():
        markdown = re.sub(rf"(?<=\]\(){name}\b", here, markdown)
    return markdown
