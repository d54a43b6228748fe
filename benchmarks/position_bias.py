"""Which position bias moves to larger windows? python benchmarks/position_bias.py <folder of the Tiny-ImageNet shards>

Table 1 of Swin Transformer V2 (arXiv 2111.09883), made small: each bias is trained at one window, judged at larger ones
as it is, and once more after a short fine-tuning there. Tables and picture are written anew after every run.
"""

import argparse
import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure
from runs import Run, command_line, run_all, shards

from simmim.measuring.tables import environment_notes, write_csv, write_markdown

BIASES = {"table": "table (bicubic)", "linear_cpb": "linear-spaced continuous", "log_cpb": "log-spaced continuous"}
COLOURS = {"table": "tab:gray", "linear_cpb": "tab:orange", "log_cpb": "tab:blue"}
TRAINED = (32, 4)
SIZES = [TRAINED, (48, 6), (64, 8), (96, 12)]
"""Pixels, and tokens of the window."""

PAPER = {
    "table": {1.5: (79.4, 82.7), 2: (77.2, 83.0), 2.5: (73.2, 83.2), 3: (68.7, 83.2)},
    "linear_cpb": {1.5: (82.0, 82.9), 2: (81.2, 83.3), 2.5: (79.8, 83.6), 3: (77.6, 83.7)},
    "log_cpb": {1.5: (82.4, 83.2), 2: (81.7, 83.8), 2.5: (80.4, 84.0), 3: (79.1, 84.2)},
}
"""The paper's: Swin-T on ImageNet-1K from 256 px and window 8, without and with fine-tuning, by window ratio."""

TUNING_LR = 4e-4  # base: a twentieth of the training's


class Study:
    """The runs, and what is known of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.train_shards, self.val_shards = shards(options.folder)
        self.cells = [(bias, seed) for seed in options.seeds for bias in BIASES]

    def trained(self, bias: str, seed: int) -> Run:
        options = self.options
        return self._finetune(
            f"{bias}_seed{seed}",
            f"model.position_bias={bias}",
            f"trainer.max_epochs={options.epochs:g}",
            f"schedule.warmup_epochs={options.epochs / 10:g}",
            f"data.label_fraction={options.label_fraction:g}",
            f"seed={seed}",
        )

    def tuned(self, bias: str, seed: int, size: tuple[int, int]) -> Run:
        options = self.options
        return self._finetune(
            f"{bias}_seed{seed}_{size[0]}px",
            "model=pretrained",
            f"encoder={self.trained(bias, seed).folder}",
            *_at(size),
            f"trainer.max_epochs={options.tuning_epochs:g}",
            f"schedule.warmup_epochs={options.tuning_epochs / 10:g}",
            f"optimizer.base_lr={TUNING_LR:g}",
            f"data.label_fraction={options.tuning_fraction:g}",
            f"seed={seed}",
        )

    def moved(self, bias: str, seed: int, size: tuple[int, int]) -> Run:
        images = self.val_shards.replace("data.val_root", "data.root")
        settings = (f"encoder={self.trained(bias, seed).folder}", "data=shards", images, *_at(size))
        return Run("evaluate", f"{self.options.name}/{bias}_seed{seed}_{size[0]}px", settings)

    def _finetune(self, name: str, *settings: str) -> Run:
        own = ("experiment=position_bias_transfer", self.train_shards, self.val_shards)
        return Run("finetune", f"{self.options.name}/{name}", (*own, *settings))

    def runs(self) -> list[Run]:
        """In this order, every number of a column is there before the next column begins."""
        return [
            *(self.trained(*cell) for cell in self.cells),
            *(self.moved(*cell, size) for size in SIZES for cell in self.cells),
            *(self.tuned(*cell, size) for size in SIZES[1:] for cell in self.cells),
        ]

    def rows(self) -> list[dict]:
        """One a number that was measured."""
        options, rows = self.options, []
        for bias, seed in self.cells:
            for size in SIZES:
                kinds = [(self.moved(bias, seed, size), 0)]
                if size != TRAINED:
                    kinds.append((self.tuned(bias, seed, size), options.tuning_epochs))
                for run, tuning_epochs in kinds:
                    if (top1 := run.top1()) is not None:
                        cell = {"position_bias": bias, "seed": seed, "epochs": options.epochs, "px": size[0]}
                        rows.append({**cell, "window": size[1], "tuning_epochs": tuning_epochs, "top1": top1})
        return rows


def _at(size: tuple[int, int]) -> tuple[str, str]:
    return f"data.image_size={size[0]}", f"model.window_size={size[1]}"


def ratio(window: int) -> float:
    return window / TRAINED[1]


def accuracies(rows: list[dict], bias: str, window: int, *, tuned: bool) -> list[float]:
    """One a seed."""
    return [
        row["top1"]
        for row in rows
        if (row["position_bias"], row["window"], row["tuning_epochs"] > 0) == (bias, window, tuned)
    ]


def table(rows: list[dict], seeds: int) -> list[dict]:
    """Ours above the paper's, by the ratio of the windows; a mean stands for all seeds, or not at all."""

    def mean(bias: str, window: int, *, tuned: bool) -> str:
        found = accuracies(rows, bias, window, tuned=tuned)
        return f"{statistics.mean(found):.1f}" if len(found) == seeds else "-"

    ours = [
        {
            "position_bias": words,
            "trained_at": f"{TRAINED[0]} px, window {TRAINED[1]} (here)",
            "x1": mean(bias, TRAINED[1], tuned=False),
            **{
                f"x{ratio(window):g}": f"{mean(bias, window, tuned=False)} / {mean(bias, window, tuned=True)}"
                for _, window in SIZES[1:]
            },
        }
        for bias, words in BIASES.items()
    ]
    theirs = [
        {
            "position_bias": words,
            "trained_at": "256 px, window 8 (the paper's)",
            **{f"x{times:g}": f"{without} / {with_tuning}" for times, (without, with_tuning) in PAPER[bias].items()},
        }
        for bias, words in BIASES.items()
    ]
    columns = ["position_bias", "trained_at", "x1", "x1.5", "x2", "x2.5", "x3"]
    return [{column: row.get(column) for column in columns} for row in (*ours, *theirs)]


def draw(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, tuned in zip(panels, (False, True), strict=True):
        for bias, words in BIASES.items():
            points = {ratio(w): accuracies(rows, bias, w, tuned=tuned and w != TRAINED[1]) for _, w in SIZES}
            points = {times: found for times, found in points.items() if found}
            style = {"color": COLOURS[bias], "linewidth": 1.8}
            axis.plot(list(points), [statistics.mean(found) for found in points.values()], label=words, **style)
            for times, found in points.items():
                axis.plot([times] * len(found), found, "o", color=COLOURS[bias], markersize=4, alpha=0.6)
        axis.set_title("with a short fine-tuning" if tuned else "without fine-tuning", fontsize=10)
        axis.set_xticks([ratio(w) for _, w in SIZES], [f"{ratio(w):g}\n{px} px / {w}" for px, w in SIZES], fontsize=8)
        axis.set_xlabel("window, in trained windows; image px / window in tokens", fontsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("top-1 accuracy, %")
    panels[0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def notes(options: argparse.Namespace, rows: list[dict]) -> list[str]:
    seeds = ", ".join(map(str, options.seeds))
    spreads = [
        max(found) - min(found)
        for bias in BIASES
        for _, window in SIZES
        for tuned in (False, True)
        if len(found := accuracies(rows, bias, window, tuned=tuned)) > 1
    ]
    share = "all" if options.label_fraction == 1 else f"{options.label_fraction:.0%} of the"
    tuning_share = "all" if options.tuning_fraction == 1 else f"{options.tuning_fraction:.0%} of the"
    return [
        command_line("position_bias", options.folder),
        "cells: top-1 accuracy in %, without / with fine-tuning, at x times the trained window, and at images as much "
        "larger; a cell without a number has not been measured",
        f"here: experiment=position_bias_transfer, {options.epochs:g} epochs of {share} training images, fine-tuned "
        f"for {options.tuning_epochs:g} epochs of {tuning_share} images; mean of seeds {seeds}"
        + (f", which differ by {max(spreads):.1f} points at most" if spreads else ""),
        "Tiny-ImageNet has 64 px: up to there larger images show more, beyond it only more tokens",
        "the paper's: Swin-T on ImageNet-1K (arXiv 2111.09883); other data, another size: compare the order and the "
        "fall along a row, not the heights",
        *environment_notes(gpu=torch.cuda.is_available()),
    ]


def report(study: Study) -> None:
    """Writes tables and picture of what there is."""
    options, rows = study.options, study.rows()
    if not rows:
        return
    write_csv(rows, options.save)
    title, shown = "Position biases moved to larger windows", table(rows, len(options.seeds))
    write_markdown(shown, options.save, title=title, notes=notes(options, rows))
    draw(rows, options.picture)


def main() -> None:
    repository = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of tin50-train-*.tar.gz and tin50-val-*.tar.gz")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--tuning-epochs", type=float, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--label-fraction", type=float, default=1.0, help="of the images, in training")
    parser.add_argument("--tuning-fraction", type=float, default=1.0, help="of the images, in fine-tuning")
    parser.add_argument("--name", default="position_bias", help="of the runs: outputs/<command>/<name>/…")
    parser.add_argument("--save", type=Path, default=repository / "benchmarks" / "position_bias", help="tables")
    parser.add_argument("--picture", type=Path, default=repository / "docs" / "position_bias.png")
    study = Study(parser.parse_args())
    run_all(study.runs(), after=lambda: report(study))
    print(study.options.save.with_suffix(".md").read_text(), flush=True)


if __name__ == "__main__":
    main()
