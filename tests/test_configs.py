"""Every YAML composes, and the recipes hold the published numbers."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.types import RunMode

from simmim.config import compose_config, config_folder
from simmim.encoders import create_encoder
from simmim.length import run_length
from simmim.masking import Masking
from simmim.pretrain import build
from simmim.settings import SETTINGS
from simmim.stages import VALIDATED
from simmim.training.schedule import lr_factor

GROUPS = ("data", "experiment", "logger", "model", "stage", "sweep", "trainer")
SPECIAL = {  # ranges of a sweep for a model, and what Hydra's own groups get
    *(f"sweep/mask/{model}.yaml" for model in ("swinv2_mini", "vit_s", "vit_b", "vit_l")),
    *(
        f"sweep/{sweep}/{model}.yaml"
        for sweep in ("learning_rate", "learning_rate_optuna")
        for model in ("swinv2_mini", "pretrained")
    ),
    "hydra/launcher/processes.yaml",
    "hydra/launcher/slurm.yaml",
}
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((config_folder() / group).glob("*.yaml"))]

# Typed from the published tables. lr at the global batch it is given for.
B_800 = {"batch": 2048, "lr": 4e-4, "epochs": 800, "image": 192, "window": 12, "drop_path": 0.1,
         "target": "normalized"}  # fmt: skip
RECIPES = {
    "simmim_swin_b_100ep": {**B_800, "lr": 8e-4, "epochs": 100, "window": 6, "drop_path": 0, "target": "raw"},
    "simmim_swin_b_800ep": {**B_800, "window": 6, "drop_path": 0, "target": "raw"},
    "simmim_swin_l_800ep": {**B_800, "drop_path": 0, "target": "raw"},
    "simmim_vit_b_800ep": {**B_800, "image": 224, "window": 14, "target": "raw"},
    "simmim_swinv2_t_800ep": B_800,
    "simmim_swinv2_s_800ep": B_800,
    "simmim_swinv2_b_800ep": B_800,
    "simmim_swinv2_l_800ep": B_800,
    "simmim_swinv2_h_800ep": B_800,
    "simmim_swinv2_g": {**B_800, "batch": 9216, "lr": 1.4e-3, "epochs": 20, "drop_path": 0, "target": "raw"},
}

# Fine-tuning on ImageNet-1K: image, window, layer decay, drop path.
TUNED = {
    "finetune_swin_b_100ep_192": (192, 6, 0.9, 0.1),
    "finetune_swin_b_100ep_224": (224, 7, 0.9, 0.1),
    "finetune_swin_b_800ep": (224, 7, 0.8, 0.1),
    "finetune_swin_l_800ep": (224, 14, 0.7, 0.2),
    "finetune_swinv2_b_800ep": (224, 14, 0.75, 0.1),
    "finetune_vit_b_800ep": (224, 14, 0.65, 0.1),
}


FINETUNED = (
    *("finetune_", "transfer_", "supervised_", "pretrained", "low_label", "ablation_finetune"),
    *("position_bias_transfer", "tiny_imagenet_finetune", "tiny_imagenet_scratch"),
)
"""How the choices that fine-tuning alone has begin."""


def config_of(*overrides, command="pretrain"):
    return compose_config(command, [*overrides], output_dir=Path("unused"))


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_of_every_group_composes(group, choice):
    needed = {
        "folder": ["data.root=photos"],
        "shards": ["data.root=copy"],
        "zip": ["data.root=train.zip"],
        "hf": ["data.root=pets"],
        "list": ["data.root=images.txt"],
        "swinv2": ["model.embed_dim=32", "model.depths=[1,1]", "model.num_heads=[1,2]"],
        "vit": ["model.embed_dim=32", "model.depths=[1]", "model.num_heads=[1]"],
    }
    root = ["data.root=photos"] if group == "experiment" and choice not in ("debug", "low_label") else []
    command = "finetune" if choice.startswith(FINETUNED) else "pretrain"
    config = config_of(f"{group}={choice}", *needed.get(choice, []), *root, command=command)
    inherited = ("pretrained", "low_label", "tiny_imagenet_finetune", "ablation_finetune")
    assert choice in inherited or config["model"]["window_size"] > 0


@pytest.mark.parametrize(
    "model", [choice for group, choice in CHOICES if group == "model" and choice.startswith(("swinv2_", "vit_"))]
)
def test_the_sweep_over_masks_holds_what_each_model_accepts(model):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("pretrain", overrides=["sweep=mask", f"model={model}"], return_hydra_config=True)
    cells, ratios = (config.hydra.sweeper.params[f"masking.{key}"].split(",") for key in ("patch_size", "ratio"))
    assert config.hydra.mode == RunMode.MULTIRUN
    assert len(cells) >= 3 and len(ratios) >= 3
    for cell in cells:
        for ratio in ratios:
            size = (config.data.image_size,) * 2
            settings = {"patch_size": int(cell), "ratio": float(ratio), "strategy": "random"}
            assert Masking(size, **settings, model_patch_size=config.model.patch_size)


@pytest.mark.parametrize("study", ["mask", "head", "resolution", "loss", "prediction"])
def test_an_ablation_holds_what_its_model_accepts(study):
    words = [f"experiment=ablation_{study}", "data=synthetic", "data.train_images=64", "data.val_images=64"]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("pretrain", overrides=words, return_hydra_config=True)
    assert config.hydra.mode == RunMode.MULTIRUN
    values = {key: str(value).split(",") for key, value in config.hydra.sweeper.params.items()}
    assert math.prod(map(len, values.values())) >= 2
    for key, choices in values.items():
        for value in choices:
            job = config_of(*words, f"{key}={value}")
            section, name = key.split(".")
            assert str(build(job)[0].hparams[section][name]) == value


@pytest.mark.parametrize(
    ("command", "words", "rates"),
    [
        ("pretrain", [], "1.2e-2,"),
        ("pretrain", ["experiment=simmim_swinv2_b_800ep", "data.root=x"], "2.5e-5,"),
        ("finetune", [], "3e-4,"),
    ],
)
def test_learning_rates_are_swept_around_those_of_the_model(command, words, rates):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose(command, overrides=["sweep=learning_rate", *words], return_hydra_config=True)
    given = config.hydra.sweeper.params["optimizer.base_lr"]
    assert given.startswith(rates)
    if command == "pretrain":
        own = config_of(*words)["optimizer"]["base_lr"]
        assert min(map(float, given.split(","))) < own < max(map(float, given.split(",")))


@pytest.mark.parametrize(
    ("launcher", "plugin", "settings"),
    [
        ("processes", "joblib_launcher", {"n_jobs": 2}),
        ("slurm", "submitit_launcher", {"gpus_per_node": 1, "tasks_per_node": 1}),
    ],
)
def test_launchers_compose_with_sweeps(launcher, plugin, settings):
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}")
    words = ["sweep=mask", "experiment=debug", f"hydra/launcher={launcher}"]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("pretrain", overrides=words, return_hydra_config=True)
    assert config.hydra.launcher._target_.startswith(f"hydra_plugins.hydra_{plugin}")
    assert settings.items() <= dict(config.hydra.launcher).items()


def test_every_yaml_is_a_command_or_a_choice():
    files = {str(p.relative_to(config_folder())) for p in config_folder().rglob("*.yaml")}
    known = {f"{group}/{choice}.yaml" for group, choice in CHOICES} | {f"{c}.yaml" for c in (*SETTINGS, "run")}
    assert files == known | SPECIAL


@pytest.mark.parametrize("command", SETTINGS)
def test_every_command_composes_with_its_run_folder(command):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose(command, overrides=["name=mine"], return_hydra_config=True)
        assert config.hydra.job.name == command
        assert config.hydra.run.dir == f"outputs/{command}/mine"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_hold_the_published_numbers(name):
    published = RECIPES[name]
    config = config_of(f"experiment={name}", "data.root=photos")
    images = {"simmim_swinv2_g": 70_000_000}.get(name, 1_281_167)
    length = run_length(config, images)
    assert length.images_per_step == published["batch"]
    assert config["optimizer"]["base_lr"] * length.images_per_step / 512 == pytest.approx(published["lr"])
    assert config["optimizer"]["betas"] == [0.9, 0.999]
    assert config["optimizer"]["eps"] == 1e-8
    assert (config["data"]["image_size"], config["model"]["window_size"]) == (published["image"], published["window"])
    assert config["trainer"]["max_epochs"] == published["epochs"]
    assert config["model"]["drop_path"] == published["drop_path"]
    assert config["objective"]["target"] == published["target"]
    assert config["masking"] == {"strategy": "random", "patch_size": 32, "ratio": 0.6}
    assert config["data"]["crop_scale"] == [0.67, 1.0]
    assert config["data"]["crop_ratio"] == pytest.approx([3 / 4, 4 / 3])
    assert (config["objective"]["loss"], config["objective"]["head"]) == ("l1", "linear")
    assert (config["objective"]["predict"], config["objective"]["target_downsampling"]) == ("hidden", 1)
    assert (config["data"]["mean"], config["data"]["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert config["model"]["name"] == re.sub(r"simmim_|_\d+ep", "", name)
    if name == "simmim_swinv2_g":
        assert config["optimizer"]["weight_decay"] == 0.1
        assert config["optimizer"]["clip_grad_norm"] == 100
        assert config["schedule"]["warmup_steps"] == 30_000
    else:
        assert config["optimizer"]["weight_decay"] == 0.05
        assert config["optimizer"]["clip_grad_norm"] == 5
        assert config["objective"]["target_window"] == 47
        schedule = {
            "name": config["schedule"]["name"],
            "warmup_steps": length.steps(config["schedule"]["warmup_epochs"]),
            "milestones": [length.steps(epoch) for epoch in config["schedule"]["milestone_epochs"]],
            "total_steps": length.total_steps,
            "final_ratio": config["schedule"]["final_ratio"],
        }
        epoch = length.steps_per_epoch
        assert schedule["warmup_steps"] == 10 * epoch
        if published["epochs"] == 100:  # a cosine to 4e-5
            assert published["lr"] * lr_factor(length.total_steps, **schedule) == pytest.approx(4e-5)
            assert lr_factor(55 * epoch, **schedule) == pytest.approx((1 + 0.05) / 2)
        else:
            factors = [lr_factor(at * epoch, **schedule) for at in (5, 10, 699.9, 700.1, 799)]
            assert factors == pytest.approx([0.5, 1, 1, 0.1, 0.1], rel=1e-3)


@pytest.mark.parametrize("name", TUNED)
def test_recipes_of_fine_tuning_hold_the_published_numbers(name):
    image_size, window, layer_decay, drop_path = TUNED[name]
    config = config_of(f"experiment={name}", "data.root=photos", "encoder=run", command="finetune")
    length = run_length(config, 1_281_167)
    assert length.images_per_step == 2048
    assert config["optimizer"]["base_lr"] * 2048 / 512 == pytest.approx(5e-3)
    assert (config["data"]["image_size"], config["model"]["window_size"]) == (image_size, window)
    assert (config["optimizer"]["layer_decay"], config["model"]["drop_path"]) == (layer_decay, drop_path)
    assert (config["trainer"]["max_epochs"], config["schedule"]["warmup_epochs"]) == (100, 20)
    assert (config["schedule"]["name"], config["optimizer"]["weight_decay"]) == ("cosine", 0.05)
    augmentation = {"randaugment": 9, "color_jitter": 0.4, "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0, "switch": 0.5}
    assert config["augmentation"] == augmentation
    assert (config["label_smoothing"], config["data"]["interpolation"] or VALIDATED["interpolation"]) == (
        0.1,
        "bicubic",
    )
    assert config["model"]["name"] is None  # the encoder's


def test_recipe_headers_say_what_a_reader_needs():
    for path in sorted((config_folder() / "experiment").glob("*.yaml")):
        command = "finetune" if path.stem.startswith(FINETUNED) else "pretrain"
        header = path.read_text().split("defaults:")[0]
        experiment = re.search(rf"python -m simmim\.{command} (-m )?experiment={path.stem}\b", header)
        assert experiment, path.name
        for word in ("Hardware:", "Time:", "Expect:") if path.stem != "debug" else ():
            assert word in header, path.name


def test_from_scratch_differs_from_fine_tuning_by_the_start_alone():
    small = ["model=swinv2_mini", "model.patch_size=4"]
    tuned = config_of("experiment=tiny_imagenet_finetune", "data.root=x", command="finetune")
    scratch = config_of("experiment=tiny_imagenet_scratch", "data.root=x", *small, command="finetune")
    pretrained = config_of("experiment=tiny_imagenet_pretrain", "data.root=x", *small)
    assert scratch["optimizer"].pop("layer_decay") == 1 > tuned["optimizer"].pop("layer_decay")
    for section in ("optimizer", "schedule", "augmentation", "label_smoothing", "trainer"):
        assert scratch[section] == tuned[section]
    own = {key: tuned["data"][key] for key in tuned["data"] if tuned["data"][key] is not None}
    assert own.items() <= scratch["data"].items()
    assert scratch["model"] == {**pretrained["model"], "drop_path": tuned["model"]["drop_path"]}
    assert scratch["data"]["image_size"] == pretrained["data"]["image_size"]


@pytest.mark.parametrize(
    "choice",
    [choice for group, choice in CHOICES if group == "model" and choice not in ("swinv2", "vit", "pretrained")],
)
def test_every_model_builds_and_its_depths_can_be_overridden(choice):
    config = config_of(f"model={choice}")
    assert config["model"]["name"] == choice.removesuffix("_mini")
    with torch.device("meta"):
        encoder = create_encoder(**config["model"])
    encoder.check_image_size(config["data"]["image_size"], config["data"]["image_size"])
    stages = len(encoder.config["depths"])
    config = config_of(f"model={choice}", f"model.depths={[1] * stages}".replace(" ", ""))
    with torch.device("meta"):
        assert create_encoder(**config["model"]).config["depths"] == [1] * stages


def test_no_yaml_names_a_class():
    for path in config_folder().rglob("*.yaml"):
        assert "_target_" not in path.read_text(), path.name


def test_the_default_run_masks_as_the_paper_in_tokens():
    config = config_of()
    encoder = create_encoder(**config["model"])
    assert encoder.stride == config["masking"]["patch_size"]
    assert math.isclose(config["masking"]["ratio"], 0.6)
    assert yaml.safe_dump(config)
