"""`python -m simmim.embed`: features of a folder of images, for retrieval, probing and plots."""

import hashlib
import logging
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from simmim.command import command
from simmim.config import Config
from simmim.data.files import FileSource
from simmim.data.folder import FolderSource, SingleImage
from simmim.data.transforms import centre_transform, per_channel
from simmim.embedding import Embedder, create_embedder, crops_of, features_of, fitting_batch, list_unreadable
from simmim.encoders.encoder_files import read_encoder_weights
from simmim.feature_files import (
    Listing,
    Part,
    begun_with,
    check_out,
    claim,
    discard,
    join,
    unreadable_images,
    write_part,
)
from simmim.run_folder import UNREADABLE, shown
from simmim.stages import fill_in, open_encoder

log = logging.getLogger(__name__)

PART_BATCHES, PART_BYTES = 16, 64 << 20
"""A part is whole batches, at most so many, and of features hardly more than so many bytes."""


def embed(config: Config) -> Path:
    """Computes the features of all images that can be read, or goes on with it, and writes them to one file.

    Args:
        config: The composed `conf/embed.yaml`.

    Returns:
        The file. `simmim.feature_files.join` says what it holds.

    Raises:
        ValueError: If the config contradicts itself, the encoder or what lies beside `out`; if no image can be read;
            at Ctrl-C.
    """
    torch.set_flush_denormal(True)  # the -100 of the shifted windows makes denormals, which a CPU is slow with
    folder = Path(config["output_dir"])
    out = folder / "features.npz" if config["out"] is None else Path(config["out"]).expanduser()
    if config["features"] not in ("pooled", "patches"):
        raise ValueError(f"features={config['features']} is unknown: choose pooled or patches")
    check_out(out)
    config = fill_in(config, read_encoder_weights(Path(config["encoder"]))[1])
    embedder = create_embedder(config, open_encoder(config), pooled=config["features"] == "pooled")
    source = open_images(Path(config["images"]).expanduser(), channels=config["data"]["channels"])
    source = source.in_units_of(config["data"]["max_value"])
    begun = begun_with(out).get("data.batch_size")
    embedder.batch_size = config["data"]["batch_size"] or begun or fitting_batch(embedder)
    images = {"image_size": list(embedder.image_size), **per_channel(config["data"])}
    images |= {key: config["data"][key] for key in ("test_crop", "interpolation")}
    done, parts = claim(out, settings_of(config, embedder, source, images)), split(len(source), embedder)
    make_parts(out, parts, done, embedder, source, config)
    unreadable = unreadable_images(out, len(parts))
    list_unreadable(folder / UNREADABLE, [(source.name(index), reason) for index, reason in unreadable])
    if len(unreadable) == len(source):
        discard(out)
        raise ValueError(f"images={config['images']} holds no image that can be read")
    paths = [source.relative_name(index) for index in range(len(source))]
    labels = np.array([source.label(index) for index in range(len(source))], dtype=np.int64)
    facts = {"encoder": config["encoder"], **images}
    shape = join(out, len(parts), Listing(paths, labels, source.classes, facts))
    log.info(f"done: {shown(out)}, features {' x '.join(f'{side:,}' for side in shape)}, float32")
    return out


def open_images(path: Path, *, channels: int) -> FolderSource:
    """A folder of images, or one image."""
    return (SingleImage if path.is_file() else FolderSource)(path, channels=channels, key="images")


def settings_of(config: Config, embedder: Embedder, source: FileSource, images: dict[str, Any]) -> dict[str, Any]:
    """What decides about the features to the last bit, by the names of its keys."""
    weights = hashlib.sha256()
    for name, value in embedder.encoder.state_dict().items():
        weights.update(name.encode())
        weights.update(value.cpu().contiguous().numpy().data)
    return {
        "images": str(source.root.resolve()),
        "names_sha256": source.names_sha256(),
        **{f"data.{key}": value for key, value in images.items()},
        "encoder": config["encoder"],
        "encoder_sha256": weights.hexdigest(),
        "model": embedder.encoder.config,
        "features": config["features"],
        "data.batch_size": embedder.batch_size,
        "batches_a_part": batches_a_part(embedder),
        "device": embedder.device.type,
        "precision": "bf16" if embedder.bf16 else "fp32",
    }


def batches_a_part(embedder: Embedder) -> int:
    """Batches whose features are computed, kept and written together."""
    return max(1, min(PART_BATCHES, PART_BYTES // (4 * prod(embedder.shape) * embedder.batch_size)))


def split(images: int, embedder: Embedder) -> list[list[range]]:
    """Deals positions of so many images to batches, and these to parts."""
    batch, length = embedder.batch_size, batches_a_part(embedder)
    batches = [range(at, min(at + batch, images)) for at in range(0, images, batch)]
    return [batches[at : at + length] for at in range(0, len(batches), length)]


def make_parts(
    out: Path, parts: list[list[range]], done: int, embedder: Embedder, source: FileSource, config: Config
) -> None:
    """Writes the parts that are missing behind the first ones, of which so many are done.

    Raises:
        ValueError: At Ctrl-C.
    """
    ahead = [batch for part in parts[done:] for batch in part]
    share, interpolation = config["data"]["test_crop"], config["data"]["interpolation"]
    crop = centre_transform(embedder.image_size, share=share, interpolation=interpolation)
    loader = crops_of(source, ahead, config, transform=crop)
    begun = sum(map(len, [batch for part in parts[:done] for batch in part]))
    if begun:
        log.info(f"{begun:,} of {len(source):,} images are done already")
    with logging_redirect_tqdm(), tqdm(total=len(source), initial=begun, unit=" images") as bar:
        batches = iter(loader)
        for number in range(done, len(parts)):
            try:
                some = islice(batches, len(parts[number]))
                positions, features, unreadable = features_of(some, embedder, source, bar)
                write_part(out, number, Part(np.array(positions, dtype=np.int64), features.numpy(), unreadable))
            except KeyboardInterrupt:
                raise ValueError(
                    f"stopped after {number} whole parts: the same command with out={shown(out)} goes on behind them"
                ) from None


if __name__ == "__main__":
    command(embed)()
