"""`python -m simmim.benchmark`: speed and memory, measured against other libraries on this machine.

`conf/benchmark.yaml` lists the parts and all keys.
"""

import logging
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simmim.command import command, quieten_libraries
from simmim.config import Config, image_size_of
from simmim.data.module import ImageData, create_sources
from simmim.data.transforms import centre_transform, pretraining_transform
from simmim.devices import on_gpu, precision_of
from simmim.masking import Masking
from simmim.measuring.attention import attention_table
from simmim.measuring.data import decoding_table, loader_table, workers_needed
from simmim.measuring.memory import peak_memory
from simmim.measuring.networks import OURS, Runner, Work
from simmim.measuring.optimizer import optimizer_table
from simmim.measuring.speed import interleaved, matmul_rate, model_flops
from simmim.measuring.tables import environment_notes, write_table
from simmim.run_folder import shown

log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


def benchmark(config: Config) -> Rows:
    """Measures one part, and leaves its table as CSV and Markdown in the run folder.

    Args:
        config: The composed `conf/benchmark.yaml`.

    Returns:
        The rows of the table.

    Raises:
        ValueError: If the config contradicts itself, or a peer cannot be built.
    """
    quieten_libraries()
    part = config["benchmark"]
    if part not in PARTS:
        raise ValueError(f"benchmark={part} is unknown: choose one of {', '.join(PARTS)}")
    if config["work"] not in ("training", "forward"):
        raise ValueError(f"work={config['work']} is unknown: choose training or forward")
    work = work_of(config)
    title, rows = PARTS[part](config, work)
    command_line = shlex.join(["python", "-m", "simmim.benchmark", *sys.argv[1:]])
    notes = [f"command: `{command_line}`", *NOTES[part], *environment_notes(gpu=work.gpu)]
    folder = Path(config["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    for path in [folder / "benchmark", *([Path(config["save"])] if config["save"] else [])]:
        text = write_table(rows, path, title=title, notes=notes)
    print(text)
    log.info(f"done: {shown(folder)}/benchmark.csv and benchmark.md")
    return rows


def work_of(config: Config) -> Work:
    """The settings that all parts share."""
    return Work(
        model={**config["model"], "in_channels": config["data"]["channels"]},
        image_size=image_size_of(config),
        batch_size=config["data"]["batch_size"],
        bf16=precision_of(config) == "bf16-mixed",
        compiled=config["trainer"]["compile"],
        training=config["work"] == "training",
        activation_checkpointing=config["trainer"]["activation_checkpointing"],
        gpu=on_gpu(config),
    )


def step_part(config: Config, work: Work) -> tuple[str, Rows]:
    """Ours and the peers, step by step in turns; memory in processes of their own."""
    names = [OURS, *config["peers"]]
    runners = {name: Runner(name, work) for name in names}
    seconds = interleaved(runners, rounds=config["rounds"], warmup=config["warmup"])
    runners.clear()
    flops, rate = model_flops(work), matmul_rate(work)
    memory = {name: peak_memory(name, work) for name in names}
    median = {name: statistics.median(seconds[name]) for name in names}
    rivals = [name for name in names if name != OURS]
    leanest = min((memory[name]["step"] for name in rivals), default=0.0)  # 0 where a step is too small to be seen
    rows = [
        {
            "network": name,
            "images_per_s": work.batch_size / median[name],
            "slowest": work.batch_size / max(seconds[name]),
            "fastest": work.batch_size / min(seconds[name]),
            "speed_to_best_peer": min(median[r] for r in rivals) / median[name] if rivals else None,
            "state_MB": memory[name]["state"],
            "step_MB": memory[name]["step"],
            "memory_to_best_peer": memory[name]["step"] / leanest if leanest else None,
            "GFLOP_a_step": flops / 1e9,
            "share_of_matrix_rate": flops / median[name] / rate,
        }
        for name in names
    ]
    return _title(config, work), rows


def memory_part(config: Config, work: Work) -> tuple[str, Rows]:
    """Peak memory of a step over image sizes, at one window."""
    rows = []
    for size in config["image_sizes"]:
        resized = work.changed(image_size=(size, size))
        row: dict[str, Any] = {"image_size": size, "megapixels": size * size * work.batch_size / 1e6}
        peaks = {name: peak_memory(name, resized)["step"] for name in [OURS, *config["peers"]]}
        checkpointed = peak_memory(OURS, resized.changed(activation_checkpointing="all"))["step"]
        row |= {f"{name}_MB": peak for name, peak in peaks.items()} | {"checkpointed_MB": checkpointed}
        rivals = [peaks[name] for name in config["peers"]]
        row["ours_to_best_peer"] = peaks[OURS] / min(rivals) if rivals else None
        rows.append(row)
    model = config["model"]
    return f"Peak memory of a step: {model['name']}, window {model['window_size']}, batch {work.batch_size}", rows


def attention_part(config: Config, work: Work) -> tuple[str, Rows]:
    """The implementations alone."""
    rows = attention_table(work, config["windows"], rounds=config["rounds"], warmup=config["warmup"])
    return "Attention alone, forward and backward", rows


def optimizer_part(config: Config, work: Work) -> tuple[str, Rows]:
    """The ways of AdamW."""
    rows = optimizer_table(work, rounds=config["rounds"], warmup=config["warmup"])
    return f"AdamW on the parameters of {config['model']['name']}", rows


def data_part(config: Config, work: Work) -> tuple[str, Rows]:
    """Decoding where there are JPEG files, the loader, and the workers that the model's own speed needs."""
    image_size = work.image_size
    rows: Rows = []
    if config["data"]["source"] == "folder":
        table = decoding_table(Path(config["data"]["root"]), image_size, repeats=config["rounds"])
        rows += [{"what": f"one core: {row.pop('method')}", **row} for row in table]
    masking = Masking(image_size, model_patch_size=config["model"]["patch_size"], **config["masking"])
    crop = {key: config["data"][key] for key in ("crop_scale", "crop_ratio")}
    data = ImageData(
        create_sources(config["data"], image_size),
        transforms=(pretraining_transform(image_size, **crop), centre_transform(image_size)),
        masking=masking,
        num_batches=1,
        on_gpu=work.gpu,
        seed=config["seed"],
        **{key: config["data"][key] for key in ("batch_size", "num_workers", "timeout")},
    )
    loader = loader_table(data, config["loader_workers"], seconds=config["seconds"])
    for row in loader:
        what = f"training loader, {row['workers']} worker" + "s" * (row["workers"] != 1)
        rows.append({"what": what, "images_per_s": row["images_per_s"], "ratio": None, "psnr_db": None})
    runner = Runner(OURS, work)
    speed = work.batch_size / statistics.median(interleaved({OURS: runner}, rounds=3, warmup=2)[OURS])
    needs = (
        "" if max(config["loader_workers"]) == 0 else f"; loader processes to keep up: {workers_needed(loader, speed)}"
    )
    rows.append({"what": f"{_title(config, work)}{needs}", "images_per_s": speed, "ratio": None, "psnr_db": None})
    return "Data", rows


PARTS: dict[str, Callable[[Config, Work], tuple[str, Rows]]] = {
    "step": step_part,
    "memory": memory_part,
    "attention": attention_part,
    "data": data_part,
    "optimizer": optimizer_part,
}

NOTES = {
    "step": [
        "one process, the networks in turns with the same weights, images and masks, fused AdamW and denormals flushed "
        "for all; medians of the rounds, the slowest and the fastest one",
        "memory: state is the weights and what the optimizer holds; a step takes its MB beyond that at its peak, for "
        "activations, gradients and temporary tensors; each network in a process of its own",
        "operations: of the model's matrix products, counted; their share: of the rate of one large product",
    ],
    "memory": [
        "what a step takes at its peak beyond weights and optimizer state: activations, gradients, temporary tensors; "
        "each in a process of its own; checkpointed: ours with trainer.activation_checkpointing=all",
    ],
    "attention": ["three heads of 32 channels, shifted windows over a map of at least 48 x 48 tokens; in turns"],
    "data": ["one core: decode, crop, resize, flip, in turns over files in memory; the same boxes for all"],
    "optimizer": ["in turns, on random gradients"],
}


def _title(config: Config, work: Work) -> str:
    model = config["model"]
    return (
        f"{model['name']}, {work.image_size[0]}x{work.image_size[1]} px, window {model['window_size']}, batch "
        f"{work.batch_size}, {'bf16' if work.bf16 else 'fp32'}, {'compiled' if work.compiled else 'eager'}, "
        f"{'training step' if work.training else 'forward pass'}"
    )


if __name__ == "__main__":
    command(benchmark)()
