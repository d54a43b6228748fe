# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What happens to the position bias in a larger window
#
# Attention inside of a window compares contents; where two tokens lie to one another reaches it through one number
# alone, the position bias of their offset. An encoder that learnt in windows of 12 tokens meets offsets of up to 11.
# In windows of 48, for larger images, there are offsets of up to 47, and nobody has taught it what they mean. This
# notebook draws what it makes of them, and counts what that costs.

# %%
import os
from pathlib import Path

import torch
import yaml
from IPython.display import Image, display
from matplotlib.figure import Figure

from simmim.config import compose_config
from simmim.encoders import create_encoder
from simmim.encoders.encoder_files import read_encoder_weights, trained_windows
from simmim.encoders.position_bias import OFFSETS
from simmim.encoders.weights import load_encoder_weights
from simmim.evaluate import evaluate
from simmim.finetune import finetune
from simmim.pictures import draw_position_bias

# %% [markdown]
# ## A run
#
# Set `SIMMIM_RUN` to a run folder of `simmim.finetune`. Without it the notebook trains a small classifier for a moment,
# on synthetic images of 32 px in windows of 4 tokens: enough to see how surfaces go on outside of what was trained, too
# short to recognise more than by chance. What a bias has really learnt shows in a run of yours.

# %%
work = Path(os.environ.get("SIMMIM_WORK", "outputs/notebook"))
work.mkdir(parents=True, exist_ok=True)
run = Path(os.environ.get("SIMMIM_RUN", work / "classifier"))
small = (
    "model=swinv2_mini model.embed_dim=32 model.depths=[2,2,2] model.patch_size=2 model.window_size=4 "
    "data.image_size=32 data.train_images=512 data.val_images=32 data.batch_size=32 data.crop_scale=[0.5,1] "
    "augmentation.randaugment=null augmentation.color_jitter=0 augmentation.erasing=0 augmentation.mixup=0 "
    "augmentation.cutmix=0 optimizer.base_lr=0.03 optimizer.layer_decay=1 schedule.warmup_epochs=1 trainer.max_epochs=5"
)
overrides = os.environ.get("SIMMIM_OVERRIDES", small).split()

if not run.exists():
    finetune(compose_config("finetune", overrides, output_dir=run))

_, known = read_encoder_weights(run)
if known["architecture"] != "swinv2":
    raise ValueError(f"SIMMIM_RUN={run} is a {known['architecture']}: give a run of a Swin Transformer")
config, trained = known["config"], trained_windows(known)
print(f"{run}: {config['position_bias']}, {known['image_size']} px, trained windows {trained}")

# %% [markdown]
# ## The surfaces
#
# Each panel is one head of one block. Its middle is the token itself; a step to the right is a neighbour one token
# further to the right. Bright means: looks there whatever the content is. The white square holds the offsets that the
# trained window had; all outside of it is read off, not learnt.
#
# The bias is a small network of the offset, so it answers for any. The log-spaced one (`log_cpb`) gets the logarithm
# of the distance: an offset of 47 tokens is then only 1.6 times as far as the 11 that it knows, and what it draws
# outside of the square goes on as inside. The linear-spaced one (`linear_cpb`) must guess 4.3 times as far. A `table`
# has no answer at all: it is stretched over the larger window, and every near neighbour gets the bias of a nearer one.
#
# **Why the pretraining window is kept.** Offsets are divided by the window that the network was trained in. A later
# stage that divided by its own window instead would stretch the whole surface, as in the last column, and lose what was
# learnt about near neighbours. That is what `pretrained_window_size` prevents; it is read from the encoder's file, and
# later stages hand it on.

# %%
TIMES = (1, 2, 4)  # windows and images, in those of the training

stage = max(0, len(config["depths"]) - 2)  # the last but one: most blocks of the published sizes are there
height, width = (trained[stage],) * 2 if isinstance(trained[stage], int) else trained[stage]


def surfaces(times, *, forgotten=False):
    """The biases of the last block of the stage in a window so many times as large: (heads, 2h - 1, 2w - 1)."""
    window = (times * height, times * width)
    own = {**config, "window_size": max(window), "pretrained_window_size": trained}
    encoder = create_encoder("swinv2", **own)
    sides = tuple(side * config["patch_size"] * 2**stage for side in window)
    load_encoder_weights(encoder, run, image_size=tuple(max(side, encoder.stride) for side in sides))
    offsets = OFFSETS[config["position_bias"]](window, window if forgotten else (height, width), torch.device("cpu"))
    with torch.no_grad():
        return encoder.blocks[stage][-1].attention.position_bias(offsets)[:3]


tables, titles = [surfaces(times) for times in TIMES], [f"window {times * height}" for times in TIMES]
if config["position_bias"] != "table":
    tables.append(surfaces(TIMES[-1], forgotten=True))
    titles.append(f"window {TIMES[-1] * height},\npretraining window forgotten")
caption = f"stage {stage + 1}, last block; offsets in tokens; the square is the trained window of {height}x{width}"
draw_position_bias(tables, work / "bias.png", titles=titles, trained_window=(height, width), caption=caption)
display(Image(work / "bias.png"))

# %% [markdown]
# ## Accuracy against resolution
#
# Nothing is trained here: the same classifier looks at larger images. Its windows either grow with the image, and the
# bias is read outside of the square, or stay as they are, and a token sees a smaller part of the image than it is used
# to. A run without `data.val_root` is counted on all images of its `data.root`, those that it was trained on among
# them. A loss at larger sizes is what a short fine-tuning there has to make good (`stage=transfer_384` and the like);
# `benchmarks/position_bias.py` compares the three kinds of bias this way.

# %%
data = yaml.safe_load((run / "config.yaml").read_text())["data"]
if data["source"] == "synthetic":
    images = [f"data.val_images={data['val_images']}"]
else:
    root = data["val_root"] or data["root"]
    images = [f"data={data['source']}", f"data.root='{root}'"]
    images += [f"data.{key}='{data[key]}'" for key in ("labels", "image_column", "label_column") if data.get(key)]


def accuracy(times, window):
    size = [times * side for side in known["image_size"]]
    settings = [f"encoder='{run}'", f"data.image_size={size}", f"model.window_size={window}", *images]
    folder = work / "evaluate" / f"{size[0]}x{size[1]}_window{window}"
    return 100 * evaluate(compose_config("evaluate", settings, output_dir=folder))["top1"]


window = config["window_size"]
grown = [accuracy(times, times * window) for times in TIMES]
kept = [accuracy(times, window) for times in TIMES]
print("image px   windows grow   windows stay")
for times, with_image, as_before in zip(TIMES, grown, kept, strict=True):
    print(f"{times * known['image_size'][0]:8}   {with_image:10.1f} %   {as_before:10.1f} %")

figure = Figure(figsize=(5.2, 3.2), layout="constrained")
axis = figure.subplots()
axis.plot(TIMES, grown, "o-", label="windows grow with the image")
axis.plot(TIMES, kept, "s--", label=f"windows stay at {window} tokens", color="tab:gray")
axis.set_xticks(TIMES, [f"{times * known['image_size'][0]} px" for times in TIMES])
axis.set_ylim(0, max(*grown, *kept) * 1.15 + 1)
axis.set_ylabel("top-1 accuracy, %")
axis.set_xlabel("size of the images, without any training there")
axis.spines[["top", "right"]].set_visible(False)
axis.grid(alpha=0.25)
axis.legend(frameon=False, fontsize=8)
figure.savefig(work / "resolution.png", dpi=110)
display(Image(work / "resolution.png"))
