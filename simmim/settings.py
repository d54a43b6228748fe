"""What the settings of each command may be: their kinds and ranges, in one table.

What settings mean together is checked where they are used; so are words, as `masking.strategy`, by those who know
them. A new command is a line of `SETTINGS`, a new key a line of its section.
"""

from simmim.kinds import (
    FLAG,
    NAME,
    NULL,
    ON,
    POSITIVE,
    RATIO,
    SHARE,
    TEXT,
    WORD,
    Kind,
    Section,
    Several,
    count,
    is_text,
    number,
    section_of,
    several,
    whole,
)

EPOCHS = 10**6
PIXELS = count(2**13)
CHANNELS = several(whole(0, 999), 3) | several(whole(0, 999), 1)
IMAGE_SIZE = Kind("a number of pixels, or [height, width]", (PIXELS | several(PIXELS, 2)).accepts)
SEED = whole(0, 2**32 - 1)  # as NumPy's
RUN: Section = {"name": NAME, "output_dir": TEXT}

WINDOW = count(2**12)
MODEL: Section = {
    "name": WORD,
    "embed_dim": count(2**16) | NULL,
    "depths": several(count(1000)) | NULL,
    "num_heads": several(count(2**16)) | NULL,
    "extra_norm_every": whole() | NULL,
    "window_size": WINDOW,
    "pretrained_window_size": WINDOW | several(WINDOW | several(WINDOW, 2)) | NULL,
    "patch_size": PIXELS,
    "drop_path": number(),
    "attention": WORD,
    "position_bias": WORD | NULL,
    "norm": WORD | NULL,
    "attention_similarity": WORD | NULL,
    "table_resizing": WORD | NULL,
    "layer_scale": number(0, 1000) | NULL,
}

MAX_VALUE = number(1e-12, 1e12)
FILES: Section = {"root": TEXT, "val_root": TEXT | NULL, "val_fraction": number(), "cache": WORD}
SOURCES: dict[str, Section] = {
    "synthetic": {"train_images": count(), "val_images": count(2**20)},
    "folder": FILES,
    "shards": {**FILES, "labels": WORD},
    "zip": FILES,
    "hf": {**FILES, "image_column": TEXT | NULL, "label_column": TEXT | NULL},
    "list": FILES,
}
BATCHES: Section = {
    "source": WORD,
    "channels": count(1000),
    "max_value": MAX_VALUE,
    "image_size": IMAGE_SIZE,
    "batch_size": count(),
    "crop_scale": several(POSITIVE, 2),
    "crop_ratio": several(POSITIVE, 2),
}
MEAN = number(-1e12, 1e12) | several(number(-1e12, 1e12))  # beyond them and STD, single precision is left
STD = number(1e-12, 1e12) | several(number(1e-12, 1e12))
STATISTICS: Section = {
    "statistics": TEXT | NULL,
    "mean": MEAN,
    "std": STD,
    "on_error": WORD,
    "max_bad_fraction": SHARE,
}
WORKERS = whole(0, 256)
LOADING: Section = {"num_workers": WORKERS | NULL, "timeout": POSITIVE, "global_batch_size": count() | NULL}

DEVICES: Section = {"accelerator": WORD, "strategy": WORD, "precision": WORD}
COMPUTING: Section = {
    "compile": FLAG,
    "activation_checkpointing": Kind("none, all", is_text) | several(count()),
}
SEVERAL_DEVICES: Section = {
    "devices": Kind("auto", lambda value: value == "auto") | count(128),
    "num_nodes": count(),
}
STRATEGIES: dict[str, Section] = {
    "single": {"devices": SEVERAL_DEVICES["devices"]},
    "ddp": SEVERAL_DEVICES,
    "fsdp": {**SEVERAL_DEVICES, "reshard_after_forward": FLAG},
}

LENGTH: Section = {
    "max_epochs": number(0, EPOCHS, above=True),
    "max_steps": count() | NULL,
    "accumulate_grad_batches": count(),
}

MASKING: Section = {"strategy": WORD, "patch_size": PIXELS, "ratio": RATIO}


TRAINING: Section = {
    **RUN,
    "seed": SEED,
    "encoder": TEXT | NULL,
    "resume": TEXT | NULL,
    "data": section_of(SOURCES, "source", BATCHES, STATISTICS, LOADING),
    "model": MODEL,
    "optimizer": {
        "base_lr": number(0, 1000, above=True),
        "betas": several(number(0, 1, below=True), 2),
        "eps": POSITIVE,
        "weight_decay": number(),
        "clip_grad_norm": POSITIVE,
        "layer_decay": number(0, 1, above=True),
        "ema_decay": number(0, 1, below=True) | NULL,
    },
    "schedule": {
        "name": WORD,
        "warmup_epochs": number(0, EPOCHS),
        "warmup_steps": whole() | NULL,
        "final_ratio": SHARE,
        "milestone_epochs": several(number(0, EPOCHS)),
    },
    "trainer": section_of(STRATEGIES, "strategy", DEVICES, COMPUTING, LENGTH),
    "logger": Several(
        {
            "csv": {"csv": ON},
            "tensorboard": {"tensorboard": ON},
            "wandb": {"wandb": ON, "project": TEXT, "mode": WORD, "group": TEXT | NULL},
        }
    ),
    "checkpoint": {"every_n_steps": count(), "keep": whole(2) | NULL, "on_error": WORD},
    "guard": {
        "max_norm_ratio": number(1, above=True) | NULL,
        "window": count(10**6),
        "warmup_steps": count(10**6),
        "max_in_a_row": whole(),
    },
    "diagnostics": {"every_n_steps": whole() | NULL},
    "log_every_n_steps": count(),
}

PRETRAIN: Section = {
    **TRAINING,
    "masking": MASKING,
    "objective": {
        "head": WORD,
        "loss": WORD,
        "predict": WORD,
        "target": WORD,
        "target_window": count(2**16),
        "target_downsampling": PIXELS,
    },
    "pictures": count(1000),
    "picture_channels": CHANNELS | NULL,
    "probe_every_n_epochs": count(EPOCHS) | NULL,
}

OPTIONAL_MODEL: Section = {key: kind | NULL for key, kind in MODEL.items() if isinstance(kind, Kind)}
INHERITED: Section = {
    "channels": count(1000) | NULL,
    "max_value": MAX_VALUE | NULL,
    "image_size": IMAGE_SIZE | NULL,
    "mean": MEAN | NULL,
    "std": STD | NULL,
    "interpolation": WORD,
    "test_crop": number(0, 1, above=True) | NULL,
}

LABELS: Section = {"label_fraction": number(0, 1, above=True)}

FINETUNE: Section = {
    **TRAINING,
    "data": section_of(
        SOURCES,
        "source",
        BATCHES,
        STATISTICS,
        LOADING,
        INHERITED,
        LABELS,
    ),
    "model": OPTIONAL_MODEL,
    "augmentation": {
        "randaugment": whole(0, 10) | NULL,
        "color_jitter": SHARE,
        "erasing": SHARE,
        "mixup": number(0, 1000),
        "cutmix": number(0, 1000),
        "switch": SHARE,
    },
    "label_smoothing": SHARE,
    "trainer": section_of(STRATEGIES, "strategy", DEVICES, COMPUTING, LENGTH, {"max_epochs": number(0, EPOCHS)}),
}

EVALUATE: Section = {
    **RUN,
    "seed": SEED,
    "encoder": TEXT,
    "probe": WORD,
    "data": section_of(
        SOURCES,
        "source",
        {"source": WORD, "batch_size": count(), "num_workers": WORKERS | NULL, "timeout": POSITIVE},
        STATISTICS,
        INHERITED,
        LABELS,
    ),
    "model": OPTIONAL_MODEL,
    "knn": {"k": several(count()), "temperature": POSITIVE},
    "linear": {
        "lrs": several(POSITIVE),
        "optimizers": several(WORD),
        "epochs": count(EPOCHS),
        "batch_size": whole(2),  # its norm over the batch needs two
    },
    "trainer": section_of({"single": {"devices": count(1)}}, "strategy", DEVICES),
}

PLAN: Section = {
    **PRETRAIN,
    "data": section_of(SOURCES, "source", BATCHES, STATISTICS, LOADING, {"root": TEXT | NULL}),
    "trainer": section_of(STRATEGIES, "strategy", DEVICES, COMPUTING, LENGTH, {"device_memory_gb": POSITIVE | NULL}),
    "throughput": POSITIVE | TEXT | NULL,
    "images_per_epoch": count() | NULL,
    "scaling_efficiency": number(0, 1, above=True),
    "price_per_hour": number() | NULL,
    "save": TEXT | NULL,
}

RECONSTRUCT: Section = {
    **RUN,
    "encoder": TEXT,
    "target": WORD,
    "images": TEXT,
    "count": count(1000),
    "picture_channels": CHANNELS | NULL,
    "seed": SEED,
    "masking": {"strategy": WORD, "patch_size": PIXELS | NULL, "ratio": RATIO | NULL},
}

EMBED: Section = {
    **RUN,
    "encoder": TEXT,
    "images": TEXT,
    "out": TEXT | NULL,
    "features": WORD,
    "data": {
        "image_size": IMAGE_SIZE | NULL,
        "max_value": MAX_VALUE | NULL,
        "interpolation": INHERITED["interpolation"],
        "test_crop": INHERITED["test_crop"],
        "mean": MEAN | NULL,
        "std": STD | NULL,
        "batch_size": count(2**16) | NULL,
        "num_workers": WORKERS | NULL,
        "timeout": POSITIVE,
    },
    "model": OPTIONAL_MODEL,
    "trainer": section_of({"single": {"devices": count(1)}}, "strategy", DEVICES),
}

UNREAD = ("val_root", "val_fraction", "cache")
STORED: dict[str, Section] = {
    source: {"source": WORD, **{key: kind for key, kind in own.items() if key not in UNREAD}}
    for source, own in SOURCES.items()
    if source != "synthetic"
}

MEASURE: Section = {
    **RUN,
    "data": section_of(
        SOURCES,
        "source",
        {"source": WORD, "channels": count(1000), "max_value": MAX_VALUE, "image_size": IMAGE_SIZE},
        {"num_workers": WORKERS | NULL, "timeout": POSITIVE},
    ),
}

PREPARE: Section = {
    **RUN,
    "data": section_of(STORED, "source"),
    "out": TEXT,
    "short_side": PIXELS,
    "quality": count(100),
    "shard_mb": count(2**20),
    "workers": WORKERS | NULL,
}

BENCHMARK: Section = {
    **RUN,
    "benchmark": WORD,
    "peers": several(WORD),
    "work": WORD,
    "rounds": count(),
    "warmup": count(),
    "save": TEXT | NULL,
    "image_sizes": several(PIXELS),
    "windows": several(count(2**12)),
    "loader_workers": several(WORKERS),
    "seconds": POSITIVE,
    "data": section_of(SOURCES, "source", BATCHES, {"num_workers": WORKERS, "timeout": POSITIVE}),
    "model": MODEL,
    "trainer": section_of(STRATEGIES, "strategy", DEVICES, COMPUTING),
    "masking": MASKING,
    "seed": SEED,
}

DIAGNOSE: Section = {
    **RUN,
    "diagnosis": WORD,
    "encoder": TEXT | several(TEXT) | NULL,
    "initial": FLAG,
    "models": several(WORD) | NULL,
    "out": TEXT | NULL,
    "seed": SEED,
    "data": section_of(
        SOURCES,
        "source",
        {"source": WORD, "channels": count(1000), "max_value": MAX_VALUE, "image_size": IMAGE_SIZE},
        {"batch_size": count(2**16), "mean": MEAN, "std": STD},
    ),
    "model": MODEL,
    "masking": MASKING,
    "trainer": section_of({"single": {"devices": count(1)}}, "strategy", DEVICES),
}

CONSOLIDATE: Section = {**RUN, "checkpoint": TEXT, "out": TEXT | NULL}

EXPORT: Section = {
    **RUN,
    "encoder": TEXT,
    "format": WORD,
    "out": TEXT,
    "images": TEXT | NULL,
    "license": TEXT,
}

INSPECT: Section = {**RUN, "encoder": TEXT}
REPORT: Section = {**RUN, "folder": TEXT, "finetuned": TEXT | NULL, "out": TEXT | NULL}

SETTINGS: dict[str, Section] = {
    "consolidate": CONSOLIDATE,
    "diagnose": DIAGNOSE,
    "embed": EMBED,
    "evaluate": EVALUATE,
    "export": EXPORT,
    "finetune": FINETUNE,
    "inspect": INSPECT,
    "plan": PLAN,
    "pretrain": PRETRAIN,
    "reconstruct": RECONSTRUCT,
    "prepare": PREPARE,
    "statistics": MEASURE,
    "benchmark": BENCHMARK,
    "report": REPORT,
}
