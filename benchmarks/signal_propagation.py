"""Which encoder is stable in depth? python benchmarks/signal_propagation.py <folder of the Tiny-ImageNet shards>

Figure 2 of Swin Transformer V2 (arXiv 2111.09883), made small: deep and narrow encoders of the first and the second
version and in between, their signal as they begin and after a short training, block by block. What has been run is not
run again.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from runs import Run, command_line, run_all, shards

from simmim.measuring.tables import environment_notes, write_csv, write_markdown

V1 = ("norm=pre", "attention_similarity=dot", "position_bias=table")
VARIANTS = {
    "V1": V1,
    "V1_cosine": ("norm=pre", "attention_similarity=cosine", "position_bias=log_cpb"),
    "V2_dot": ("norm=res_post", "attention_similarity=dot", "position_bias=log_cpb"),
    "V2": ("norm=res_post", "attention_similarity=cosine", "position_bias=log_cpb"),
    "V2_extra_norms": ("norm=res_post", "attention_similarity=cosine", "position_bias=log_cpb", "extra_norm_every=2"),
}
WORDS = {
    "V1": "V1: norms in front, dot products, table",
    "V1_cosine": "norms in front, cosines, log-spaced bias",
    "V2_dot": "norms behind, dot products, log-spaced bias",
    "V2": "V2: norms behind, cosines, log-spaced bias",
    "V2_extra_norms": "V2 with an extra norm every 2 blocks",
}
COLOURS = dict(zip(VARIANTS, ("tab:red", "tab:orange", "tab:green", "tab:blue", "tab:purple"), strict=True))
PANELS = {
    "variance": "variance of a token over its channels",
    "attention_max": "highest attention, extreme head",
    "gradient_norm": "gradient norm of a block",
}
INITIAL = ", initial"


class Study:
    """The runs, and what is known of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.train_shards, self.val_shards = shards(options.folder)

    def trained(self, variant: str) -> Run:
        options, depths = self.options, self.options.depths
        geometry = ("experiment=tiny_imagenet_pretrain", "model=swinv2", "model.patch_size=2", "model.window_size=8")
        size = (
            f"model.embed_dim={options.embed_dim}",
            f"model.depths=[{','.join(map(str, depths))}]",
            f"model.num_heads=[{','.join(str(2**stage) for stage in range(len(depths)))}]",
            "model.extra_norm_every=0",
        )
        own = tuple(f"model.{setting}" for setting in VARIANTS[variant])
        given = {word.partition("=")[0] for word in own}
        length = (
            *(f"data.batch_size={options.batch_size}", f"trainer.max_steps={options.steps}"),
            *(f"optimizer.base_lr={options.lr * 512 / options.batch_size:g}", f"seed={options.seed}"),
            *(
                f"schedule.warmup_steps={options.steps // 10}",
                f"diagnostics.every_n_steps={max(1, options.steps // 10)}",
            ),
            *("pictures=1", "log_every_n_steps=1"),
        )
        data = (self.train_shards, self.val_shards)
        size = tuple(word for word in size if word.partition("=")[0] not in given)
        return Run("pretrain", f"{options.name}/{variant}", (*geometry, *size, *own, *length, *data))

    def diagnosed(self) -> Run:
        images = self.val_shards.replace("data.val_root", "data.root")
        encoders = ",".join(str(self.trained(variant).folder) for variant in self.options.variants)
        settings = ("signal", f"encoder=[{encoders}]", "initial=true", "data=shards", images)
        return Run("diagnose", self.options.name, (*settings, f"data.batch_size={self.options.images}"))

    def runs(self) -> list[Run]:
        return [*map(self.trained, self.options.variants), self.diagnosed()]

    def rows(self) -> list[dict]:
        """Those of the diagnosis; none before it is made."""
        table = self.diagnosed().folder / "signal.csv"
        if not self.diagnosed().finished:
            return []
        with table.open(newline="") as file:
            return list(csv.DictReader(file))


def values(rows: list[dict], model: str, key: str) -> list[float]:
    """Of each block."""
    return [float(row[key]) for row in rows if row["model"] == model and row["variance"]]


def last(run: Run, key: str) -> float:
    """The last value of a metric."""
    with (run.folder / "metrics.csv").open(newline="") as file:
        return [float(row[key]) for row in csv.DictReader(file) if row[key]][-1]


def table(study: Study, rows: list[dict]) -> list[dict]:
    """A row a variant."""
    found = []
    for variant in study.options.variants:
        own: dict = {"encoder": WORDS[variant]}
        for when, model in (("begin", f"{variant}{INITIAL}"), ("end", variant)):
            variances = values(rows, model, "variance")
            own[f"variance ratio, {when}"] = f"{max(variances) / min(variances):.2f}"
            own[f"highest attention, {when}"] = f"{max(values(rows, model, 'attention_max')):.3f}"
        gradients = values(rows, variant, "gradient_norm")
        run = study.trained(variant)
        own["gradient norms, highest over lowest block, end"] = f"{max(gradients) / min(gradients):.1f}"
        own["share of the trivial loss"] = f"{last(run, 'val_loss') / last(run, 'val_loss_visible_mean'):.3f}"
        own["steps left out"] = int(last(run, "skipped_steps"))
        found.append(own)
    return found


def draw(rows: list[dict], path: Path, *, variants: Sequence[str], steps: int) -> None:
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.subplots(2, len(PANELS), sharex=True)
    for line, (when, suffix) in zip(axes, (("as it begins", INITIAL), (f"after {steps} steps", "")), strict=True):
        for axis, (key, words) in zip(line, PANELS.items(), strict=True):
            for variant in variants:
                heights = values(rows, f"{variant}{suffix}", key)
                style = {"color": COLOURS[variant], "linewidth": 1.5, "markersize": 3}
                axis.plot(range(1, len(heights) + 1), heights, "o-", label=WORDS[variant], **style)
            if key != "attention_max":
                axis.set_yscale("log")
            axis.set_title(f"{words}, {when}", fontsize=9)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("block", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def notes(options: argparse.Namespace) -> list[str]:
    depths = ", ".join(map(str, options.depths))
    return [
        command_line("signal_propagation", options.folder),
        f"encoders: embed_dim {options.embed_dim}, depths {depths}, patches of 2 px, windows of 8 tokens, 64 px",
        f"trained for {options.steps} steps of {options.batch_size} images, learning rate {options.lr:g}, seed "
        f"{options.seed}; measured by `python -m simmim.diagnose signal` on {options.images} validation images; every "
        "block: signal.csv",
        "variance ratio: the highest block's over the lowest's; 10^4 is reported of a trained Swin-L of V1, of another "
        "size, on other data, and trained much longer: compare the order, not the heights",
        "highest attention: what a query gives to the key that it attends to most, on average over the queries of a "
        "head; of the extreme head of all blocks; cosines begin with a scale of 10, and so with higher ones",
        *environment_notes(gpu=torch.cuda.is_available()),
    ]


def report(study: Study) -> None:
    """Writes tables and picture once all is measured."""
    options, rows = study.options, study.rows()
    if not rows:
        return
    write_csv(rows, options.save)
    write_markdown(table(study, rows), options.save, title="The signal through deep encoders", notes=notes(options))
    draw(rows, options.picture, variants=options.variants, steps=options.steps)


def main() -> None:
    repository = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of tin50-train-*.tar.gz and tin50-val-*.tar.gz")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 2, 18, 2])
    parser.add_argument("--embed-dim", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of the run")
    parser.add_argument("--images", type=int, default=64, help="that are measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="signal", help="of the runs: outputs/<command>/<name>/…")
    parser.add_argument("--save", type=Path, default=repository / "benchmarks" / "signal", help="tables")
    parser.add_argument("--picture", type=Path, default=repository / "docs" / "signal.png")
    study = Study(parser.parse_args())
    run_all(study.runs(), after=lambda: report(study))
    print(study.options.save.with_suffix(".md").read_text(), flush=True)


if __name__ == "__main__":
    main()
