"""Tables on disk."""

from pathlib import Path

from simmim.measuring.tables import write_table


def test_what_a_person_wrote_below_a_table_stays(tmp_path: Path) -> None:
    page = tmp_path / "speed.md"
    write_table([{"speed": 1.0}], tmp_path / "speed", title="Speed", notes=["first"])
    page.write_text(page.read_text() + "\n## What it says\n\nSlow.\n")
    text = write_table([{"speed": 2.0}], tmp_path / "speed", title="Speed", notes=["second"])
    assert text == page.read_text()
    assert text == "# Speed\n\n| speed |\n|---:|\n| 2.00 |\n\n* second\n\n## What it says\n\nSlow.\n"
