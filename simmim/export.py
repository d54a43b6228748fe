"""`python -m simmim.export`: a model as another library reads it, checked by that library before it appears."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from simmim.command import command
from simmim.config import Config, read_config
from simmim.data.decoding import EIGHT_BIT
from simmim.data.excerpt import read_excerpt
from simmim.data.synthetic import SyntheticSource
from simmim.data.transforms import centre_transform
from simmim.exporting import FORMATS
from simmim.exporting.format import Format, check_version
from simmim.exporting.model import Model, open_model
from simmim.exporting.model_card import CARD, Origin, card_of, find_run
from simmim.exporting.verification import read_back, verify
from simmim.run_folder import shown, whole_entries
from simmim.stages import USUAL, VALIDATED

log = logging.getLogger(__name__)

IMAGES = 4
"""What an export is compared on."""


def export(config: Config) -> Path:
    """Writes a model in another library's format, with its card, once that library computes the same with it.

    Args:
        config: The composed `conf/export.yaml`.

    Returns:
        The folder or file.

    Raises:
        ValueError: If the format cannot hold the model, it computes something else, or `out` exists.
    """
    form, out, path = find_format(config["format"]), Path(config["out"]).expanduser(), Path(config["encoder"])
    card = check_out(out, form)
    model = open_model(path, usual=USUAL | VALIDATED, with_decoder=form.with_decoder)
    check_version(model, form)
    images, words = images_of(model, config["images"])
    run = find_run(path)
    origin = Origin(str(path), read_config(run / "config.yaml") if run else None, run, config["license"])
    with whole_entries(out) as folder:
        form.write(model, folder / out.name)
        checks = verify(model, form, folder / out.name, images, words) + read_back(model, form, folder / out.name)
        text = card_of(model, form, origin, checks, str(shown(out)))
        (folder / card.relative_to(out.parent)).write_text(text, encoding="utf-8")
    for check in checks:
        log.info(check)
    log.info(f"card       {shown(card)}")
    log.info(f"done: {shown(out)}")
    return out


def find_format(name: str) -> Format:
    """The format of a name.

    Raises:
        ValueError: If there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"format={name} is unknown: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def check_out(out: Path, form: Format) -> Path:
    """Where the card is going to lie: in the folder, or beside the file.

    Raises:
        ValueError: If anything is there already, or `out` has the ending of something else.
    """
    endings = {known.ending for known in FORMATS.values()} - {""}
    if form.ending == "" and out.suffix in endings:
        raise ValueError(f"out={out} has the ending of a file, and format={form.name} writes a folder: out={out.stem}")
    if form.ending and out.suffix != form.ending:
        raise ValueError(f"out={out}: format={form.name} writes a file named *{form.ending}")
    if out.exists() or out.is_symlink():
        raise ValueError(f"out={out} exists already: give another out=…")
    card = (out if form.ending == "" else out.parent) / CARD
    if card.exists():
        raise ValueError(
            f"out={out}: {card} is there already, of another model: give the file a folder of its own, as "
            f"out={out.with_suffix('') / out.name}"
        )
    return card


def images_of(model: Model, path: str | None) -> tuple[Tensor, str]:
    """Images to compare on, (B, c, H, W) as decoded, and what they are, in words."""
    channels, ready = model.config["in_channels"], model.preprocessing
    if path is None:
        source = SyntheticSource(IMAGES, model.image_size, channels=channels)
        images = torch.stack([source.load(index)[0] for index in range(IMAGES)])
        if ready.max_value != EIGHT_BIT:
            images = images.float() * (ready.max_value / EIGHT_BIT)
        return images, f"{IMAGES} built-in synthetic images (images=<folder> for others)"
    crop = centre_transform(model.image_size, share=ready.crop, interpolation=ready.interpolation)
    names, images = read_excerpt(
        Path(path).expanduser(), channels=channels, max_value=ready.max_value, crop=crop, count=IMAGES
    )
    words = f"{len(names)} images of {path}" if len(names) > 1 else names[0]
    return images[torch.arange(IMAGES) % len(images)], words


if __name__ == "__main__":
    command(export)()
