"""Does pretraining pay? python benchmarks/tiny_imagenet.py <folder of the Tiny-ImageNet shards>

SimMIM without labels, then fine-tuning on a share of them; against the same encoder from scratch: with the same recipe,
with a learning rate of its own, and at the compute of both stages together. Table and picture are written anew after
every run. A part at a time: --only finetune; what has been run is not run again.
"""

import argparse
import functools
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from matplotlib.figure import Figure
from runs import Run, below_outputs, command_line, run_all, shards
from torch.utils.flop_counter import FlopCounterMode

from simmim.config import compose_config, image_size_of
from simmim.data.module import create_sources
from simmim.encoders import create_encoder
from simmim.length import run_length
from simmim.masking import Masking
from simmim.measuring.tables import environment_notes, write_table
from simmim.seeding import generator_from
from simmim.tasks.classification import ImageClassifier
from simmim.tasks.pretraining import MaskedImageModel

PARTS = ("pretrain", "finetune", "scratch", "sweep", "long")
COLOURS = {"finetune": "tab:blue", "scratch": "tab:gray", "sweep": "tab:orange", "long": "tab:red"}
NAMES = {
    "finetune": "pretrained, fine-tuned",
    "scratch": "from scratch, same recipe",
    "sweep": "from scratch, best rate of its own",
    "long": "from scratch, best rate, same compute",
}


@dataclass(frozen=True)
class Pretraining:
    """What a finished pretraining run cost.

    Args:
        epochs: Over all images.
        images: Images that it has seen, each as often as it came.
        available: Training images there are.
        cost: Floating-point operations of an image in pretraining,
        tuning_cost: and in fine-tuning.
    """

    epochs: float
    images: int
    available: int
    cost: int
    tuning_cost: int


@functools.cache
def pretraining_of(folder: Path) -> Pretraining:
    """Counts from the run's own config; the products of a training step of one image, forward and backward."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    size = image_size_of(config)
    train_images, _ = create_sources(config["data"], size)
    length = run_length(config, len(train_images))
    images = torch.randn(1, config["data"]["channels"], *size)
    masking = Masking(size, model_patch_size=config["model"]["patch_size"], **config["masking"])
    mask = masking(generator_from(0))[None]
    model = {**config["model"], "attention": "reference", "in_channels": config["data"]["channels"]}
    pretraining = MaskedImageModel(create_encoder(**model), **config["objective"])
    classes = len(train_images.classes)
    classifier = ImageClassifier(create_encoder(**model), classes=classes, label_smoothing=0)
    return Pretraining(
        epochs=length.total_steps / length.steps_per_epoch,
        images=length.total_steps * length.images_per_step,
        available=len(train_images),
        cost=_operations(pretraining, images, mask),
        tuning_cost=_operations(classifier, images, torch.tensor([0])),
    )


def _operations(network: torch.nn.Module, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        network(*inputs).backward()
    return counter.get_total_flops()


class Study:
    """The runs, and what is known of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.shards = shards(options.folder)
        self.epochs = dict(zip(options.fractions, options.epochs, strict=True))
        settings = ["experiment=tiny_imagenet_scratch", "data.root=x", *options.overrides]
        self.rate = compose_config("finetune", settings, output_dir=Path())["optimizer"]["base_lr"]

    @property
    def pretrained(self) -> Path:
        """Run folder of the pretraining."""
        return self.options.pretrained or self.pretraining().folder

    def facts(self) -> Pretraining | None:
        finished = (self.pretrained / "encoder.safetensors").is_file()
        return pretraining_of(self.pretrained) if finished else None

    def pretraining(self) -> Run:
        length = f"trainer.max_epochs={self.options.pretraining_epochs:g}"
        settings = ("experiment=tiny_imagenet_pretrain", *self.shards, length, *self.options.overrides)
        return Run("pretrain", f"{self.options.name}/pretrained", settings)

    def tuned(self, fraction: float, seed: int) -> Run:
        """The model is the encoder's own."""
        overrides = (word for word in self.options.overrides if not word.startswith("model"))
        own = ("experiment=tiny_imagenet_finetune", f"encoder={self.pretrained}", *overrides)
        return self._finetune(f"finetuned_{fraction:.0%}_seed{seed}", own, self.epochs[fraction], fraction, seed)

    def scratch(self, fraction: float, seed: int, rate: float, epochs: float) -> Run:
        own = ("experiment=tiny_imagenet_scratch", f"optimizer.base_lr={rate:g}", *self.options.overrides)
        name = f"scratch_{fraction:.0%}_lr{rate:g}_{epochs:g}epochs_seed{seed}"
        return self._finetune(name, own, epochs, fraction, seed)

    def _finetune(self, name: str, own: tuple[str, ...], epochs: float, fraction: float, seed: int) -> Run:
        settings = (
            *self.shards,
            f"data.label_fraction={fraction:g}",
            f"trainer.max_epochs={epochs:g}",
            f"schedule.warmup_epochs={epochs / 10:g}",
            f"seed={seed}",
        )
        return Run("finetune", f"{self.options.name}/{name.replace('%', '')}", (*own, *settings))

    def best_rate(self, fraction: float) -> float | None:
        """The rate of the best mean over the seeds, once all of them have run."""
        means = {}
        for rate in self.options.rates:
            found = [self.scratch(fraction, seed, rate, self.epochs[fraction]).top1() for seed in self.options.seeds]
            if None in found:
                return None
            means[rate] = statistics.mean(found)
        return max(means, key=means.__getitem__)

    def long_epochs(self, fraction: float) -> float | None:
        """Epochs from scratch that cost as much as pretraining and fine-tuning together."""
        if (facts := self.facts()) is None:
            return None
        more = facts.images * facts.cost / (fraction * facts.available * facts.tuning_cost)
        return round(self.epochs[fraction] + more, 1)

    def kinds(self, fraction: float) -> dict[str, list[Run] | None]:
        """The runs of each part, one a seed, of `sweep` those of the best rate; None where it is not known yet."""
        seeds, epochs = self.options.seeds, self.epochs[fraction]
        best, long = self.best_rate(fraction), self.long_epochs(fraction)
        return {
            "finetune": [self.tuned(fraction, seed) for seed in seeds],
            "scratch": [self.scratch(fraction, seed, self.rate, epochs) for seed in seeds],
            "sweep": None if best is None else [self.scratch(fraction, seed, best, epochs) for seed in seeds],
            "long": None if None in (best, long) else [self.scratch(fraction, seed, best, long) for seed in seeds],
        }

    def runs(self, part: str) -> list[Run]:
        """What a part runs."""
        options = self.options
        if part == "pretrain":
            return [] if options.pretrained else [self.pretraining()]
        if part == "sweep":
            cells = [(f, seed, rate) for f in options.fractions for rate in options.rates for seed in options.seeds]
            return [self.scratch(fraction, seed, rate, self.epochs[fraction]) for fraction, seed, rate in cells]
        return [run for fraction in options.fractions for run in self.kinds(fraction)[part] or self._later(part)]

    def _later(self, part: str) -> list[Run]:
        print(f"{part} waits: it needs the parts pretrain and sweep", flush=True)
        return []

    def rows(self) -> list[dict]:
        """One a line of the table, whether it was measured or not."""
        rows = []
        for fraction in self.options.fractions:
            for part, runs in self.kinds(fraction).items():
                rows.append({"labels": f"{fraction:.0%}", "way": NAMES[part], **self._row(fraction, part, runs)})
        return rows

    def _row(self, fraction: float, part: str, runs: list[Run] | None) -> dict:
        facts = self.facts()
        rate = {"finetune": self.rate, "scratch": self.rate}.get(part, self.best_rate(fraction))
        epochs = self.long_epochs(fraction) if part == "long" else self.epochs[fraction]
        pairs = zip(self.options.seeds, runs or [], strict=False)
        found = {seed: top1 for seed, run in pairs if (top1 := run.top1()) is not None}
        return {
            "pretraining_epochs": "-" if part != "finetune" or facts is None else f"{facts.epochs:g}",
            "epochs": "-" if epochs is None else f"{epochs:g}",
            "base_lr": "-" if rate is None else f"{rate:g}",
            "compute": None if epochs is None else self.compute(fraction, epochs, pretrained=part == "finetune"),
            "top1": statistics.mean(found.values()) if found else None,
            "each_seed": ", ".join(f"{top1:.1f} ({seed})" for seed, top1 in found.items()) or "not measured",
        }

    def compute(self, fraction: float, epochs: float, *, pretrained: bool) -> float | None:
        """In units of pretraining and fine-tuning together."""
        if (facts := self.facts()) is None:
            return None
        images = fraction * facts.available
        before = facts.images * facts.cost
        total = before + self.epochs[fraction] * images * facts.tuning_cost
        return (pretrained * before + epochs * images * facts.tuning_cost) / total


def draw(study: Study, path: Path) -> None:
    fractions = study.options.fractions
    figure = Figure(figsize=(5.2 * len(fractions), 4.6), layout="constrained")
    for axis, fraction in zip(figure.subplots(1, len(fractions), squeeze=False)[0], fractions, strict=True):
        before = study.compute(fraction, 0, pretrained=True)
        axis.axvspan(0, before, color="tab:blue", alpha=0.08, linewidth=0)
        axis.text(
            before / 2,
            0.95,
            "pretraining of the blue one",
            transform=axis.get_xaxis_transform(),
            ha="center",
            fontsize=8,
        )
        for part, runs in study.kinds(fraction).items():
            curves = [curve for run in runs or [] if run.finished and (curve := run.curve())]
            if not curves:
                continue
            start = before if part == "finetune" else 0
            epochs = study.long_epochs(fraction) if part == "long" else study.epochs[fraction]
            cost = study.compute(fraction, epochs, pretrained=False)
            x = [start + step / curves[0][-1][0] * cost for step, _ in curves[0]]
            y = [statistics.mean(top1) for top1 in zip(*([top1 for _, top1 in c] for c in curves), strict=True)]
            label = f"{NAMES[part]}: {y[-1]:.1f} %"
            axis.plot(x, y, color=COLOURS[part], label=label, linewidth=1.6)
            axis.plot(x[-1], y[-1], "o", color=COLOURS[part], markersize=4)
        axis.set_title(f"{fraction:.0%} of the labels", fontsize=10)
        axis.set_xlabel("training compute: 1 is pretraining and fine-tuning together", fontsize=8)
        axis.set_ylabel("top-1 accuracy on validation images, %", fontsize=8)
        axis.set_xlim(0, 1.03)
        axis.set_ylim(0, 1.12 * axis.get_ylim()[1])
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def notes(study: Study) -> list[str]:
    options, facts = study.options, study.facts()
    said = [command_line("tiny_imagenet", options.folder)]
    if facts is not None:
        said.append(
            f"pretraining: {below_outputs(study.pretrained)}, {facts.epochs:g} epochs of {facts.available} images, "
            "once; the seeds of the table are those of what follows it"
        )
        said.append(
            f"compute: products of a training step, counted on the real networks ({facts.cost / 1e9:.3f} GFLOP an "
            f"image in pretraining, {facts.tuning_cost / 1e9:.3f} in fine-tuning), times the images seen; validation "
            "is not counted; 1 is pretraining and fine-tuning together"
        )
    rates = ", ".join(f"{rate:g}" for rate in options.rates)
    return [
        *said,
        "top1: % of all validation images after the last epoch, mean over the seeds that have run (in brackets)",
        f"rates of its own: base_lr {rates}, for a batch of 512; the best is chosen on the validation images, which is "
        "to the advantage of training from scratch; fine-tuning has its recipe's only",
        "epochs: warm-up is a tenth of them; scratch has layer decay 1, all else is the same",
        *environment_notes(gpu=torch.cuda.is_available()),
    ]


def report(study: Study) -> None:
    """Writes table and picture of what there is."""
    write_table(study.rows(), study.options.save, title="Does pretraining pay? Tiny-ImageNet", notes=notes(study))
    if study.facts() is not None:
        draw(study, study.options.picture)


def main() -> None:
    repository = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of tin50-train-*.tar.gz and tin50-val-*.tar.gz")
    parser.add_argument("--pretrained", type=Path, help="run folder of a pretraining that is there; else it is run")
    parser.add_argument("--pretraining-epochs", type=float, default=200)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 1.0], help="of the labels")
    parser.add_argument("--epochs", type=float, nargs="+", default=[100, 30], help="one for each of the fractions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 4e-3, 1.6e-2], help="base_lr of the sweep")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run now")
    parser.add_argument(
        "--overrides", nargs="+", default=[], help="of all runs: trainer=gpu; model=… is not for the pretrained encoder"
    )
    parser.add_argument("--name", default="tiny_imagenet", help="of the runs: outputs/<command>/<name>/…")
    parser.add_argument("--save", type=Path, default=repository / "benchmarks" / "tiny_imagenet", help="table")
    parser.add_argument("--picture", type=Path, default=repository / "docs" / "tiny_imagenet.png")
    options = parser.parse_args()
    if len(options.fractions) != len(options.epochs):
        parser.error("--epochs needs one number for each of --fractions")
    study = Study(options)
    for part in filter(options.only.__contains__, PARTS):
        run_all(study.runs(part), after=lambda: report(study))
    report(study)
    print(options.save.with_suffix(".md").read_text(), flush=True)


if __name__ == "__main__":
    main()
