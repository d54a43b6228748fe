"""What the jobs of a sweep have come to, read from their run folders: also while they run."""

import csv
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from simmim.config import Config, image_size_of, read_config
from simmim.masking import Masking, average_distance
from simmim.run_folder import ENCODER
from simmim.sweep_folder import Job, read_jobs

MASKS = 16
"""So many masks are drawn for the mean of AvgDist."""

FREE = ("encoder", "model", "name", "output_dir", "resume", "seed")
"""What may differ between fine-tunings whose accuracies are compared: what is judged, and chance."""


@dataclass
class Result:
    """One job of a sweep, as far as it has come.

    Args:
        job: What it was given, and how it ended.
        folder: Its run folder.
        config: Its settings; None where they were refused.
        step: Last step that was logged.
        loss: The last validation loss.
        best_loss: The lowest.
        trivial: The last validation loss of the trivial predictor: of pretraining alone.
        top1: The last validation accuracy: of fine-tuning alone.
        images_per_second: The median of its training.
        distance: AvgDist of its masks in pixels: of pretraining alone.
        tuned: Top-1 accuracies of the runs that were fine-tuned from it.
    """

    job: Job
    folder: Path
    config: Config | None = None
    step: int = 0
    loss: float | None = None
    best_loss: float | None = None
    trivial: float | None = None
    top1: float | None = None
    images_per_second: float | None = None
    distance: float | None = None
    tuned: list[float] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether the run has come to its end, so that its last validation is the final one."""
        return self.job.state == "done" and self.loss is not None

    @property
    def share(self) -> float | None:
        """The validation loss as a share of the trivial predictor's: 1 has learnt nothing."""
        return None if self.loss is None or not self.trivial else self.loss / self.trivial

    @property
    def accuracy(self) -> float | None:
        """Top-1: of the run itself, or the mean of those fine-tuned from it."""
        return statistics.mean(self.tuned) if self.tuned else self.top1

    @property
    def state(self) -> str:
        """In a word or two."""
        return {"running": "unfinished"}.get(self.job.state, self.job.state)

    @property
    def task(self) -> str:
        """What the loss measures: runs that differ in it have losses of different kinds."""
        if self.config is None or "objective" not in self.config:
            return ""
        objective = {key: value for key, value in self.config["objective"].items() if key != "head"}
        return json.dumps([self.config["masking"], objective], sort_keys=True)


def read_results(sweep: Path) -> list[Result]:
    """All jobs of a sweep that have begun, in the order of their numbers.

    Raises:
        ValueError: If the folder is none of a sweep's of `simmim.pretrain` or `simmim.finetune`.
    """
    jobs = read_jobs(sweep)
    if not jobs:
        raise ValueError(
            f"folder={sweep} holds no job of a sweep: give the folder that `python -m simmim.pretrain -m …` has "
            "written, multirun/<name>"
        )
    if other := {job.command for job in jobs.values()} - {"pretrain", "finetune"}:
        raise ValueError(f"folder={sweep} is a sweep of simmim.{min(other)}: only training runs are reported")
    distances: dict[str, float] = {}
    return [_read(job, folder, distances) for folder, job in jobs.items()]


def _read(job: Job, folder: Path, distances: dict[str, float]) -> Result:
    result = Result(job, folder)
    if (path := folder / "config.yaml").is_file():
        result.config = read_config(path)
    rows = read_metrics(folder)
    validated = [row for row in rows if row.get("val_loss")]
    result.step = max((int(row["step"]) for row in rows), default=0)
    if speeds := [float(row["images_per_second"]) for row in rows if row.get("images_per_second")]:
        result.images_per_second = statistics.median(speeds)
    if validated:
        last = validated[-1]
        result.loss, result.best_loss = float(last["val_loss"]), min(float(row["val_loss"]) for row in validated)
        result.trivial = float(last["val_loss_visible_mean"]) if last.get("val_loss_visible_mean") else None
        result.top1 = float(last["val_top1"]) if last.get("val_top1") else None
    if result.config is not None and "masking" in result.config:
        key = json.dumps([image_size_of(result.config), result.config["masking"]])
        if key not in distances:
            distances[key] = masking_distance(result.config)
        result.distance = distances[key]
    return result


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's `metrics.csv`; none where it has not come so far."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if (row["step"] or "").isdigit()]


def masking_distance(config: Config) -> float:
    """AvgDist of a run's masks in pixels (SimMIM section 4.1.2), the mean over some of them."""
    masking = Masking(image_size_of(config), model_patch_size=config["model"]["patch_size"], **config["masking"])
    generator = torch.Generator().manual_seed(0)
    return statistics.mean(average_distance(masking(generator), masking.patch_size) for _ in range(MASKS))


def swept_keys(results: Iterable[Result]) -> list[str]:
    """The keys whose values differ between the jobs, in the order in which they were typed."""
    values: dict[str, set[str | None]] = defaultdict(set)
    given = [given_to(result) for result in results]
    for overrides in given:
        for key in overrides:
            values[key] |= {other.get(key) for other in given}
    return [key for key, found in values.items() if len(found) > 1]


def given_to(result: Result) -> dict[str, str]:
    """The words of a job's command line, by key."""
    pairs = (word.lstrip("+").partition("=") for word in result.job.overrides)
    return {key: value for key, _, value in pairs}


def find_finetuned(results: list[Result], folders: Iterable[Path]) -> str | None:
    """Fills in the accuracies of the finished runs below some folders that were fine-tuned from those of the sweep.

    Returns:
        Why there are none although such runs were found, or None.
    """
    own = {result.folder.resolve(): result for result in results}
    found: list[tuple[Result, Config, float]] = []
    for path in sorted({path for folder in folders for path in folder.rglob("config.yaml")}):
        if not re.search(r"^label_smoothing:", path.read_text(), re.MULTILINE) or not (path.parent / ENCODER).exists():
            continue
        config = read_config(path)
        start = Path(str(config["encoder"])).resolve()
        accuracies = [float(row["val_top1"]) for row in read_metrics(path.parent) if row.get("val_top1")]
        source = next((own[folder] for folder in (start, *start.parents) if folder in own), None)
        if source is not None and accuracies:
            found.append((source, config, accuracies[-1]))
    if len({json.dumps(_recipe(config), sort_keys=True) for _, config, _ in found}) > 1:
        return (
            f"{len(found)} runs were fine-tuned from these, in different ways: their accuracies cannot be compared; "
            "finetuned=<folder> chooses those of one way"
        )
    for source, _, accuracy in found:
        source.tuned.append(accuracy)
    return None


def _recipe(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in FREE}


def rank(results: list[Result]) -> dict[int, int]:
    """Places among those that can be compared, 1 is best, by the number of the job.

    Accuracy counts where every finished run has one. Else it is the share of the trivial predictor's loss, among runs
    that hide and predict the same: a loss of another kind, target or masking measures something else. Runs that differ
    by their seeds alone share a place, by their mean. What is alone of its kind has none.
    """
    done = [result for result in results if result.done]
    judged = bool(done) and all(result.accuracy is not None for result in done)
    kinds: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in done:
        settings = {key: value for key, value in given_to(result).items() if key != "seed"}
        kinds["" if judged else result.task][json.dumps(settings)].append(result)
    places = {}
    for kind in kinds.values():
        scores = [statistics.mean(_score(one, judged) for one in seeds) for seeds in kind.values()]
        for seeds, score in zip(kind.values(), scores, strict=True):
            if len(scores) > 1:
                place = 1 + sum(other < score for other in scores)
                places.update({result.job.number: place for result in seeds})
    return places


def _score(result: Result, judged: bool) -> float:
    """The less the better."""
    if judged:
        assert result.accuracy is not None
        return -result.accuracy
    return float("inf") if result.share is None else result.share
