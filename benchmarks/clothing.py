"""A whole chain on photographs: python benchmarks/clothing.py <folder of train/ validation/ test/, a folder a class>

Pretraining at 192 px without labels, fine-tuning at 192 px, transfer to 384 px, each judged on the test images; beside
them the same fine-tuning from scratch, and the fine-tuned classifier at 384 px as it is. The table is written anew
after every run; what has been run is not run again.
"""

import argparse
import shlex
from pathlib import Path

import torch
from runs import Run, command_line, run_all

from simmim.measuring.tables import environment_notes, write_table

MODEL = (
    "model=swinv2",
    "model.embed_dim=32",
    "model.depths=[2,2,2,2]",
    "model.num_heads=[1,2,4,8]",
    "model.extra_norm_every=0",
)
"""A tenth of SwinV2-T's operations: what two CPU cores train within the hour."""

LITTLE_AUGMENTATION = (
    "data.crop_scale=[0.4,1.0]",
    "augmentation.randaugment=null",
    "augmentation.mixup=0",
    "augmentation.cutmix=0",
)
"""A short run ends before it has learnt what more would keep it from learning by heart."""


class Chain:
    """The runs, and what is known of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        folder = options.folder
        self.train, self.validation, self.test = (f"{folder}/{part}" for part in ("train", "validation", "test"))

    def pretrained(self) -> Run:
        options = self.options
        settings = (
            *("stage=pretrain_192", *MODEL, "data=folder", f"data.root='{self.train}'"),
            *(f"data.val_root='{self.validation}'", "data.batch_size=32", "optimizer.base_lr=2.4e-2"),
            *_epochs(options.pretraining_epochs),
        )
        return Run("pretrain", f"{options.name}/pretrained", settings)

    def tuned(self) -> Run:
        own = (f"encoder={self.pretrained().folder}", "optimizer.layer_decay=0.85")
        return self._finetune("tuned_192", "finetune_192", own, self.options.epochs)

    def scratch(self) -> Run:
        return self._finetune("scratch_192", "finetune_192", (*MODEL, "optimizer.layer_decay=1"), self.options.epochs)

    def transferred(self) -> Run:
        own = (f"encoder={self.tuned().folder}", "data.batch_size=16", "optimizer.base_lr=3.2e-3")
        return self._finetune("tuned_384", "transfer_384", own, self.options.transfer_epochs)

    def _finetune(self, name: str, stage: str, own: tuple[str, ...], epochs: float) -> Run:
        settings = (
            *(f"stage={stage}", "data.batch_size=32", "optimizer.base_lr=1.6e-2", *LITTLE_AUGMENTATION),
            *("data=folder", f"data.root='{self.train}'", f"data.val_root='{self.validation}'"),
            *_epochs(epochs),
        )
        given = {word.partition("=")[0] for word in own}
        kept = (word for word in settings if word.partition("=")[0] not in given)
        return Run("finetune", f"{self.options.name}/{name}", (*kept, *own))

    def judged(self, run: Run, *stage: str) -> Run:
        """On the test images, at its own size or at that of a stage."""
        settings = (f"encoder={run.folder}", *stage, "data=folder", f"data.root='{self.test}'")
        name = "_".join([Path(run.name).name, *(word.partition("=")[2] for word in stage)])
        return Run("evaluate", f"{self.options.name}/{name}", settings)

    def runs(self) -> list[Run]:
        return [
            *(self.pretrained(), self.tuned(), self.judged(self.tuned())),
            *(self.judged(self.tuned(), "stage=transfer_384"), self.transferred(), self.judged(self.transferred())),
            *(self.scratch(), self.judged(self.scratch())),
        ]

    def rows(self) -> list[dict]:
        """One a line of the table, whether it was measured or not."""
        options = self.options
        before = f"{options.pretraining_epochs:g} at 192 px, "
        kinds = [
            ("pretrained, fine-tuned", "192 / 12", f"{before}{options.epochs:g}", self.tuned(), ()),
            ("the same at 384 px, not trained there", "384 / 24", "-", self.tuned(), ("stage=transfer_384",)),
            ("and trained there", "384 / 24", f"{options.transfer_epochs:g} more", self.transferred(), ()),
            ("from scratch", "192 / 12", f"{options.epochs:g}", self.scratch(), ()),
        ]
        return [
            {
                "encoder": words,
                "px_window": at,
                "epochs": epochs,
                "validation_top1": None if stage else run.top1(),
                "test_top1": self.judged(run, *stage).top1(),
            }
            for words, at, epochs, run, stage in kinds
        ]


def _epochs(epochs: float) -> tuple[str, str]:
    return f"trainer.max_epochs={epochs:g}", f"schedule.warmup_epochs={epochs / 10:g}"


def notes(chain: Chain) -> list[str]:
    folder = chain.options.folder
    lines = [run.line.replace(folder, "<clothing>") for run in chain.runs()]
    return [
        command_line("clothing", folder).replace("<shards>", "<clothing>"),
        "images: 1,000 clothing photographs of 10 kinds to learn from, 186 to validate on, 347 to test (CC0), about "
        "400 x 533 px",
        "top1: %; one seed: the standard error of a test accuracy is about 2.6 points, so compare with care",
        *environment_notes(gpu=torch.cuda.is_available()),
        "the commands that it ran, in this order:",
        *(f"`{shlex.join(shlex.split(line))}`" for line in lines),
    ]


def report(chain: Chain) -> None:
    """Writes the table of what there is."""
    title = "192 px to 192 px to 384 px on photographs"
    write_table(chain.rows(), chain.options.save, title=title, notes=notes(chain))


def main() -> None:
    repository = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="with train/, validation/ and test/, in each a folder a class")
    parser.add_argument("--pretraining-epochs", type=float, default=15)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--transfer-epochs", type=float, default=2)
    parser.add_argument("--name", default="clothing", help="of the runs: outputs/<command>/<name>/…")
    parser.add_argument("--save", type=Path, default=repository / "benchmarks" / "clothing", help="table")
    chain = Chain(parser.parse_args())
    run_all(chain.runs(), after=lambda: report(chain))
    print(chain.options.save.with_suffix(".md").read_text(), flush=True)


if __name__ == "__main__":
    main()
