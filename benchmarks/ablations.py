"""SimMIM's ablations, made small: python benchmarks/ablations.py <mask|head|resolution|loss|prediction> <shards>

The sweep `experiment=ablation_<which>` pretrains, `experiment=ablation_finetune` fine-tunes each run on a tenth of the
labels, `simmim.report` compares. Stopped, it goes on where it was. Table and picture are those of the report, beside
what the paper says.
"""

import argparse
import csv
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from runs import command_line, shards

from simmim.measuring.tables import environment_notes, write_table

PAPER = {
    "mask": "hidden pixels 10 to 20 px (at 192 px) from the nearest visible one are good (AvgDist); cells of 4 to 8 px "
    "need a ratio of 0.8 or more",
    "head": "a linear layer is as good as an inverse Swin-B, at 2.3 times less cost",
    "resolution": "not printed here: the numbers are not at hand",
    "loss": "L1, L2 and smooth L1 are about equal",
    "prediction": "hidden pixels 82.8 %, all pixels 81.7 % (Swin-B, ImageNet-1K, fine-tuned)",
}
"""What SimMIM found (arXiv 2111.09886, section 4.1)."""

COLUMNS = ("AvgDist_px", "val_loss", "share", "top1")
"""Of the report, beside the keys that vary."""


def run(command: str, *words: str) -> None:
    """One command of simmim.

    Raises:
        SystemExit: If it fails.
    """
    ended = subprocess.run([sys.executable, "-m", f"simmim.{command}", *words]).returncode
    if ended:
        sys.exit(ended)


def rows(sweep: Path) -> list[dict]:
    """What the report says, in short."""
    with (sweep / "report.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    keys = [key for key in found[0] if key.startswith(("masking.", "objective."))]
    chosen = [*keys, *(key for key in COLUMNS if any(row[key] for row in found))]
    return [{key: _rounded(key, row[key]) for key in chosen} for row in found]


def _rounded(key: str, text: str) -> str:
    if key == "top1" and text:
        return f"{100 * float(text):.1f}"
    return f"{float(text):.3g}" if "." in text and key in COLUMNS else text


def notes(which: str, options: argparse.Namespace) -> list[str]:
    return [
        command_line("ablations", options.folder),
        f"of the paper: {PAPER[which]}",
        "top1: % of 2,500 validation images after fine-tuning on a tenth of the labels; its standard error is about "
        "0.6 points, and seeds move it too: differences below 2 points say nothing",
        "share: validation loss over that of the mean of the visible pixels; another mask is another task, and its "
        "share is not comparable",
        f"the settings: conf/experiment/ablation_{which}.yaml and conf/experiment/ablation_finetune.yaml",
        *environment_notes(gpu=torch.cuda.is_available()),
    ]


def main() -> None:
    repository = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=PAPER)
    parser.add_argument("folder", help="with the shards tin50-*.tar.gz")
    parser.add_argument("--overrides", nargs="*", default=[], help="for pretraining and fine-tuning: trainer=cpu")
    parser.add_argument("--save", type=Path, help="table and picture; benchmarks/ablation_<which> if not given")
    options = parser.parse_args()
    name = f"ablation_{options.which}"
    sweep, save = Path("multirun", name), options.save or repository / "benchmarks" / name
    common = (*options.overrides, *shards(options.folder), "resume=auto")
    run("pretrain", f"experiment={name}", *common, f"name={name}")
    runs = [file.parent for file in sweep.glob("*/encoder.safetensors")]
    encoders = ",".join(map(str, sorted(runs, key=lambda run: int(run.name))))
    run("finetune", "-m", "experiment=ablation_finetune", f"encoder={encoders}", *common, f"name={name}_tuned")
    run("report", str(sweep))
    write_table(rows(sweep), save, title=f"SimMIM's ablations: {options.which}", notes=notes(options.which, options))
    shutil.copy(sweep / "report.png", save.with_suffix(".png"))
    print(save.with_suffix(".md").read_text(), flush=True)


if __name__ == "__main__":
    main()
