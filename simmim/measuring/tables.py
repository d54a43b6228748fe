"""Rows of measurements as CSV and Markdown, with all that a reader needs to make them again."""

import csv
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

BY_HAND = "\n## What it says\n"
"""Below this heading of a table's page a person writes, and it stays when the table is measured anew."""

LIBRARIES = ("torch", "torchvision", "timm", "transformers", "pillow", "simplejpeg")


def write_table(rows: Sequence[dict[str, Any]], path: Path, *, title: str, notes: Sequence[str]) -> str:
    """Writes `<path>.csv` and `<path>.md`. Returns the Markdown.

    Args:
        rows: One or more, all with the same columns.
        path: Without suffix.
        title: Heading of the Markdown.
        notes: Lines below the table: command, settings.
    """
    write_csv(rows, path)
    return write_markdown(rows, path, title=title, notes=notes)


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes `<path>.csv`. Arguments as `write_table`."""
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_markdown(rows: Sequence[dict[str, Any]], path: Path, *, title: str, notes: Sequence[str]) -> str:
    """Writes `<path>.md`, and returns it. Arguments as `write_table`; a reader may want fewer rows than the CSV has.

    What stands in it below the heading "What it says" is kept.
    """
    columns = list(rows[0])
    numeric = {key for key in columns if any(isinstance(row[key], int | float) for row in rows)}
    lines = [
        f"# {title}",
        "",
        "| " + " | ".join(key if "." in key else key.replace("_", " ") for key in columns) + " |",
        "|" + "|".join("---:" if key in numeric else "---" for key in columns) + "|",
        *("| " + " | ".join(_shown(row[key]) for key in columns) + " |" for row in rows),
        "",
        *(f"* {note}" for note in notes),
    ]
    page = path.with_suffix(".md")
    _, heading, said = page.read_text().partition(BY_HAND) if page.exists() else ("", "", "")
    text = "\n".join(lines) + f"\n{heading}{said}"
    page.write_text(text)
    return text


def environment_notes(*, gpu: bool) -> list[str]:
    """Versions, device and date."""
    threads = "" if gpu else f", {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if gpu else f"CPU {_processor()}"
    versions = ", ".join(f"{name} {found}" for name in LIBRARIES if (found := _version(name)))
    return [
        f"{versions}, Python {platform.python_version()}",
        f"device: {device}{threads}",
        f"date: {date.today().isoformat()}",
    ]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
