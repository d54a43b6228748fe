"""How long a training run takes, and what it costs: counted from the images that a device trains on in a second.

That number is measured, by `python -m simmim.benchmark` on such a device; what several devices lose is assumed.
"""

import csv
from pathlib import Path

from simmim.config import Config, image_size_of
from simmim.data.module import create_sources
from simmim.devices import world_size
from simmim.length import run_length
from simmim.measuring.networks import OURS

NEEDED_BY = ("images_per_epoch", "price_per_hour")
"""Keys that mean nothing without `throughput`."""

NOT_COUNTED = "training steps alone: validation, checkpoints, and devices that wait for images, are not counted"


def cost_of(config: Config, title: str) -> str | None:
    """One sentence: epochs, images, steps, devices, hours, device hours and the price.

    Args:
        config: The composed `conf/plan.yaml`.
        title: What is planned, as `model, image size, window, …`: a measurement must be of the first three.

    Returns:
        None where `throughput` is not given.

    Raises:
        ValueError: If something is missing, or was measured of another model.
    """
    if config["throughput"] is None:
        if given := [key for key in NEEDED_BY if config[key] is not None]:
            raise ValueError(f"{given[0]}={config[given[0]]} needs throughput=<images/s a device, or a benchmark.csv>")
        return None
    rate, devices, images = read_throughput(config["throughput"], title), world_size(config), images_of(config)
    length, kept = run_length(config, images), config["scaling_efficiency"] if devices > 1 else 1.0
    seconds = length.total_steps * length.images_per_step / (rate * kept)  # of one device, if it did everything
    several = f" each, of which {kept:.0%} are assumed to remain (scaling_efficiency)" if devices > 1 else ""
    on = f"{devices} device{'s' * (devices > 1)} at {rate:,.4g} images/s{several}"
    price = config["price_per_hour"]
    cost = "" if price is None else f", {seconds / 3600 * price:,.2f} at {price:g} an hour"
    return (
        f"{length.total_steps / length.steps_per_epoch:,.6g} epochs of {images:,} images, {length.total_steps:,} steps "
        f"of {length.images_per_step:,}, on {on}: {_time(seconds / devices)}, {seconds / 3600:,.1f} device "
        f"hours{cost}; {NOT_COUNTED}."
    )


def _time(seconds: float) -> str:
    hours = seconds / 3600
    if hours < 1:
        return f"{seconds / 60:,.1f} minutes"
    return f"{hours:,.1f} hours" + (f" ({hours / 24:,.1f} days)" if hours > 48 else "")


def images_of(config: Config) -> int:
    """Images of an epoch: `images_per_epoch`, or those that a run of `data.root` would train on.

    Raises:
        ValueError: If neither is given.
    """
    if config["images_per_epoch"] is not None:
        return int(config["images_per_epoch"])
    if config["data"]["source"] != "synthetic" and config["data"]["root"] is None:
        raise ValueError("images_per_epoch must be given, or data.root: how many images are there to train on?")
    return len(create_sources(config["data"], image_size_of(config))[0])


def read_throughput(given: float | str, title: str) -> float:
    """Images a second of one device: a number, or that of our network in a table of `benchmark=step`.

    Raises:
        ValueError: If there is no such table, or what lies beside it says that it is of another run.
    """
    if not isinstance(given, str):
        return float(given)
    path = Path(given).expanduser()
    path = path / "benchmark.csv" if path.is_dir() else path
    try:
        with path.open(newline="") as file:
            rates = [float(row["images_per_s"]) for row in csv.DictReader(file) if row["network"] == OURS]
    except (OSError, KeyError, TypeError, ValueError, csv.Error):
        rates = []
    if len(rates) != 1 or not rates[0] > 0:
        raise ValueError(
            f"throughput={given} is neither a number nor a table of python -m simmim.benchmark benchmark=step"
        )
    _check_title(given, path.with_suffix(".md"), title)
    return rates[0]


def _check_title(given: str, page: Path, title: str) -> None:
    """Refuses a table whose page names another model, image size, window or precision, or no training."""
    if not page.is_file():
        return
    measured = page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    if _what(measured) != _what(title) or "forward pass" in measured:
        raise ValueError(f"throughput={given} was measured of {measured}, and the run is {title}: measure that")


def _what(title: str) -> list[str]:
    """Model, image size, window and precision: what a throughput depends on most."""
    parts = title.split(", ")
    return parts[:3] + [part for part in parts if part in ("bf16", "fp32")]
