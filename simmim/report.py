"""`python -m simmim.report <sweep>`: what a sweep has found, as a table, a picture, and the command of the best run.

It reads the run folders alone, and can be asked while the sweep runs.
"""

import logging
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from simmim.command import command
from simmim.config import Config, planned_jobs
from simmim.measuring.tables import write_csv, write_markdown
from simmim.pictures import Panel, Point, draw_runs
from simmim.run_folder import shown
from simmim.sweep_results import Result, find_finetuned, given_to, rank, read_results, swept_keys

log = logging.getLogger(__name__)

GOOD = (10.0, 20.0, "10 to 20 px: good in SimMIM's paper, at 192 px")
"""AvgDist (section 4.1.2)."""

DECADES = 10.0
"""A key whose largest value is so many times its smallest has a logarithmic axis."""

Row = dict[str, Any]


def report(config: Config) -> list[Row]:
    """Writes table and picture of a sweep, and says what was best.

    Args:
        config: The composed `conf/report.yaml`.

    Returns:
        A row a job.

    Raises:
        ValueError: If the folder is none of a sweep's.
    """
    sweep = Path(config["folder"])
    results, planned = read_results(sweep), planned_jobs(sweep)
    keys, doubt = swept_keys(results), _add_finetuned(results, config)
    places = rank(results)
    rows = [_row(result, keys, places) for result in results]
    out = sweep / "report" if config["out"] is None else Path(config["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    notes = [*_progress(results, planned), *filter(None, [doubt]), *_comparison(results, keys, places)]
    notes += [f"job {result.job.number} failed: {result.job.error}" for result in results if result.job.error]
    notes += _advice(results, sweep, places)
    write_csv(rows, out)
    text = write_markdown(_readable(rows), out, title=f"Sweep {sweep.name}", notes=notes)
    for line in text.splitlines()[2:]:
        log.info(line)
    files = [f"{out}.md", f"{out}.csv"]
    if panels := _panels(results, keys):
        picture = out.with_name(f"{out.name}.png")
        draw_runs(panels, picture, title=_title(results, sweep), **_legend(results, keys))
        files.append(str(picture))
    log.info(f"done: {', '.join(str(shown(Path(file))) for file in files)}")
    return rows


def _add_finetuned(results: Sequence[Result], config: Config) -> str | None:
    folders = [Path("outputs/finetune"), Path("multirun")]
    if config["finetuned"] is not None:
        folders = [Path(config["finetuned"])]
        if not folders[0].is_dir():
            raise ValueError(f"finetuned={folders[0]} is no folder: give that of the fine-tuned runs, or null")
    doubt = find_finetuned([*results], folders)
    if config["finetuned"] is not None and doubt is None and not any(result.tuned for result in results):
        raise ValueError(f"finetuned={folders[0]} holds no finished run that was fine-tuned from one of this sweep")
    return doubt


def _row(result: Result, keys: Sequence[str], places: dict[int, int]) -> Row:
    given = given_to(result)
    seconds = result.job.seconds if result.job.seconds is not None else time.time() - result.job.started
    return {
        "job": result.job.number,
        **{key: given.get(key, "-") for key in keys},
        "AvgDist_px": result.distance if _masks(keys) else None,
        "state": result.state,
        "step": result.step,
        "val_loss": result.loss,
        "best_val_loss": result.best_loss,
        "trivial_loss": result.trivial,
        "share": result.share,
        "top1": result.accuracy,
        "place": places.get(result.job.number),
        "images/s": result.images_per_second,
        "minutes": seconds / 60 if result.job.state in ("done", "stopped") else None,
    }


def _readable(rows: Sequence[Row]) -> list[Row]:
    """Rounded, and without columns that say nothing."""
    digits = {"AvgDist_px": 1, "val_loss": 4, "best_val_loss": 4, "trivial_loss": 4, "share": 3, "minutes": 1}
    formats = {key: f".{count}f" for key, count in digits.items()} | {"top1": ".1%", "images/s": ".3g"}
    columns = [key for key in rows[0] if any(row[key] is not None for row in rows)]
    return [
        {
            key: "-" if row[key] is None else format(row[key], formats[key]) if key in formats else row[key]
            for key in columns
        }
        for row in rows
    ]


def _progress(results: Sequence[Result], planned: int | None) -> list[str]:
    """How far the sweep has come."""
    done, failed = (sum(result.job.state == state for result in results) for state in ("done", "failed"))
    open_jobs = [result for result in results if result.job.state in ("running", "stopped")]
    waiting = max(0, (planned or len(results)) - len(results))
    counts = [f"{done} of {len(results) + waiting} jobs are done"]
    counts += [f"{failed} failed"] if failed else []
    counts += [f"{waiting} have not begun"] if waiting else []
    counts += [f"job {result.job.number} is {result.state} at step {result.step}" for result in open_jobs]
    return [", ".join(counts)]


def _comparison(results: Sequence[Result], keys: Sequence[str], places: dict[int, int]) -> list[str]:
    """What the numbers mean, and which of them can be compared."""
    notes = ["share: validation loss over that of the mean of the visible pixels; 1 has learnt nothing"]
    if any(result.tuned for result in results):
        notes.append(
            "top1: of the runs fine-tuned from each, on the validation images, their mean where there are several"
        )
    kinds = {result.task for result in results if result.config is not None}
    if len(kinds) > 1:
        differing = [key for key in keys if key.startswith(("masking.", "objective.")) and key != "objective.head"]
        notes.append(
            f"{' and '.join(differing) or 'masking or objective'} make it another task, of another difficulty or unit: "
            "losses and shares are not comparable between such runs"
        )
    if not places:
        alone = len([result for result in results if result.done]) < 2
        notes.append("no place: too few runs are done" if alone else "no place: accuracy after fine-tuning would tell")
    elif all(result.accuracy is not None for result in results if result.done):
        notes.append("place: by top-1 accuracy")
        if "seed" not in keys and all(len(result.tuned) < 2 for result in results):
            notes.append("one run each: chance moves accuracies too, and several seeds (seed=0,1,2) show by how much")
    else:
        notes.append(f"place: by share{', among runs of the same task' if len(kinds) > 1 else ''}")
    if "seed" in keys and places:
        notes.append("runs that differ by their seeds alone share a place, by their mean")
    return notes


def _advice(results: Sequence[Result], sweep: Path, places: dict[int, int]) -> list[str]:
    """Commands to type next."""
    best = [result for result in results if places.get(result.job.number) == 1]
    if best:
        return [f"best: `{command_of(result, name=f'{sweep.name}_best')}`" for result in best]
    done = [str(shown(result.folder)) for result in results if result.done]
    if len(done) < 2 or results[0].job.command != "pretrain":
        return []
    words = ["experiment=low_label", f"encoder={','.join(done)}", f"name={sweep.name}_tuned"]
    return [f"to tell which is best: `python -m simmim.finetune -m {' '.join(words)}`, with data=… that have labels"]


def command_of(result: Result, *, name: str) -> str:
    """The command line of one job, outside of the sweep."""
    given = {key: value for key, value in given_to(result).items() if key not in ("sweep", "name", "resume")}
    words = [f"{key}={value}" for key, value in {**given, "name": name}.items()]
    return f"python -m simmim.{result.job.command} {' '.join(map(shlex.quote, words))}"


def _title(results: Sequence[Result], sweep: Path) -> str:
    done = sum(result.done for result in results)
    return f"{sweep.name}: {done} of {len(results)} runs done" + (", the others hollow" if done < len(results) else "")


def _legend(results: Sequence[Result], keys: Sequence[str]) -> dict[str, Any]:
    """What belongs to the whole picture."""
    if _masks(keys):
        return {"kinds": "hidden cells; beside each point: ratio", "band": GOOD}
    return {"kinds": _axes(results, keys)[1] or ""}


def _masks(keys: Sequence[str]) -> bool:
    """Whether the sweep is about what is hidden."""
    return any(key.startswith("masking.") for key in keys)


def _axes(results: Sequence[Result], keys: Sequence[str]) -> tuple[str, str | None]:
    """The key of the x axis, numbers first, and that of the colours; the seed is neither."""
    names = [key for key in keys if key != "seed"] or [*keys] or ["job"]
    names.sort(key=lambda key: not all(_is_number(given_to(result).get(key, "")) for result in results))
    return names[0], names[1] if len(names) > 1 else None


def _panels(results: Sequence[Result], keys: Sequence[str]) -> list[Panel]:
    """Validation loss, its share, and accuracy where there is any, over AvgDist or over what was swept."""
    measures: dict[str, Callable[[Result], float | None]] = {
        "validation loss": lambda result: result.loss,
        "share of the visible mean's loss": lambda result: result.share,
        "top-1 accuracy (%)": lambda result: None if result.accuracy is None else 100 * result.accuracy,
    }
    panels = []
    for words, measure in measures.items():
        known = [(result, measure(result)) for result in results]
        points = [_point(result, keys, results, y) for result, y in known if y is not None]
        if points:
            panels.append(Panel(points, *_x_axis(results, keys, points, words)))
    return panels


def _point(result: Result, keys: Sequence[str], results: Sequence[Result], y: float) -> Point:
    given = given_to(result)
    if _masks(keys):
        assert result.config is not None and result.distance is not None
        masking, others = result.config["masking"], [key for key in keys if not key.startswith("masking.")]
        strategy = f", {masking['strategy']}" if "masking.strategy" in keys else ""
        label = " ".join([f"{masking['ratio']:g}", *(given.get(key, "-") for key in others)])
        return Point(result.distance, y, f"{masking['patch_size']} px{strategy}", label, result.done)
    x, colour = _axes(results, keys)
    value = given.get(x, str(result.job.number) if x == "job" else "-")
    label = " ".join(given.get(key, "-") for key in keys if key not in (x, colour, "seed"))
    number = all(_is_number(given_to(other).get(x, "")) for other in results)
    return Point(float(value) if number else value, y, given.get(colour, "-") if colour else "", label, result.done)


def _x_axis(
    results: Sequence[Result], keys: Sequence[str], points: Sequence[Point], ylabel: str
) -> tuple[str, str, bool]:
    """Labels of both axes, and whether x is logarithmic."""
    if _masks(keys):
        return "AvgDist: hidden pixels to the nearest visible one (px)", ylabel, False
    numbers = [point.x for point in points if not isinstance(point.x, str)]
    wide = bool(numbers) and min(numbers) > 0 and max(numbers) >= DECADES * min(numbers)
    return _axes(results, keys)[0], ylabel, wide


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    command(report, positional="folder")()
