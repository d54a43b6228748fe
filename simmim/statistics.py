"""`python -m simmim.statistics`: mean and deviation of the pixels of any images, for `data.statistics=<run folder>`.

Photographs have ImageNet's, which are the default. Images with other bands or ranges have their own.
"""

import logging
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from simmim.command import command
from simmim.config import STATISTICS, Config, image_size_of, save_config
from simmim.data.module import create_source
from simmim.data.moments import Moments, measure
from simmim.embedding import list_unreadable
from simmim.run_folder import UNREADABLE, shown, whole_file

log = logging.getLogger(__name__)


def statistics(config: Config) -> dict[str, Any]:
    """Measures all images of `data.root`, at their full size, each pixel counting alike.

    Images that cannot be read are left out, and listed in `bad_images.txt`.

    Args:
        config: The composed `conf/statistics.yaml`.

    Returns:
        What `statistics.yaml` in the run folder holds: `mean` and `std` of each channel in units of `max_value`,
        `channels`, `max_value`, and how many `images` and `pixels` were counted, and `unreadable` images not.

    Raises:
        ValueError: If the images cannot be found, or none of them can be read.
    """
    data_config, folder = config["data"], Path(config["output_dir"])
    source = create_source(data_config, image_size_of(config))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = cores if data_config["num_workers"] is None else data_config["num_workers"]
    channels, max_value = data_config["channels"], data_config["max_value"]
    total, unreadable = Moments(0, (0,) * channels, (0,) * channels), []
    samples = measure(source, num_workers=workers, timeout=data_config["timeout"])
    with logging_redirect_tqdm():
        for index, moments, reason in tqdm(samples, total=len(source), unit=" images"):
            if moments is None:
                log.warning(f"{source.name(index)} cannot be read ({reason}): left out")
                unreadable.append((source.name(index), reason))
            else:
                total += moments
    list_unreadable(folder / UNREADABLE, unreadable)
    if not total.pixels:
        raise ValueError(f"none of {len(source)} images can be read, the first being {unreadable[0][0]}: {reason}")
    images = len(source) - len(unreadable)
    numbers = {"mean": total.mean(max_value), "std": total.std(max_value), "channels": channels, "max_value": max_value}
    result = {**numbers, "images": images, "pixels": total.pixels, "unreadable": len(unreadable)}
    with whole_file(folder / STATISTICS) as temporary:
        save_config(result, temporary)
    _tell(result, folder)
    return result


def _tell(result: dict[str, Any], folder: Path) -> None:
    log.info(f"{result['pixels']:,} pixels of {result['images']:,} images")
    if result["unreadable"]:
        log.warning(f"{result['unreadable']:,} images could not be read: {shown(folder / UNREADABLE)}")
    if constant := [str(channel) for channel, std in enumerate(result["std"]) if std == 0]:
        log.warning(f"channel {', '.join(constant)} is the same everywhere: nothing can be learnt from it")
    mean, std = (",".join(f"{value:.6g}" for value in result[key]) for key in ("mean", "std"))
    log.info(f"data.mean=[{mean}] data.std=[{std}]")
    log.info(f"done: {shown(folder / STATISTICS)}; next: python -m simmim.pretrain data.statistics={shown(folder)} …")


if __name__ == "__main__":
    command(statistics)()
