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
# # What a pretrained model sees
#
# SimMIM hides cells of an image and asks the encoder for their pixels. This notebook pretrains a small model (or
# opens a run of yours), shows original, masked, reconstruction and both pasted, and then changes what is hidden.

# %%
import os
from pathlib import Path

import torch
from IPython.display import Image, display

from simmim.config import compose_config
from simmim.data.module import create_sources
from simmim.masking import average_distance
from simmim.pictures import draw_panels
from simmim.pretrain import pretrain
from simmim.reconstruct import load_images, load_pretraining, masking_of
from simmim.run_folder import list_checkpoints
from simmim.seeding import generator_from

# %% [markdown]
# ## A run
#
# Set `SIMMIM_RUN` to a run folder of yours, and `SIMMIM_IMAGES` to a folder of images. Without them the notebook
# pretrains for a quarter of a minute on synthetic images and shows those.

# %%
work = Path(os.environ.get("SIMMIM_WORK", "outputs/notebook"))
work.mkdir(parents=True, exist_ok=True)
run = Path(os.environ.get("SIMMIM_RUN", work / "run"))
overrides = os.environ.get("SIMMIM_OVERRIDES", "trainer.max_steps=120").split()

if not run.exists():
    keep_all = ["checkpoint.every_n_steps=30", "checkpoint.keep=null"]
    pretrain(compose_config("pretrain", [*keep_all, *overrides], output_dir=run))

task = load_pretraining(run)
if folder := os.environ.get("SIMMIM_IMAGES"):
    _, images = load_images(Path(folder), task, 4)
else:
    height, width = task.hparams["image_size"]
    synthetic = {"source": "synthetic", "channels": 3, "train_images": 1, "val_images": 4}
    _, source = create_sources(synthetic, (height, width))
    images = torch.stack([source.load(index)[0] for index in range(4)])
print(f"{run}, {tuple(images.shape)} images")

# %% [markdown]
# ## Four panels
#
# The third column is predicted everywhere, but only the hidden cells were ever trained: the visible ones look wrong
# and do not matter. The fourth column pastes what counts.


# %%
def masks_of(masking):
    return torch.stack([masking(generator_from(0, "mask", index)) for index in range(len(images))])


def show(panels, name, titles, caption=""):
    draw_panels(panels, work / name, titles=titles, caption=caption)
    display(Image(work / name))


masking = masking_of(task)
masks = masks_of(masking)
caption = task.caption(ratio=masking.ratio, patch_size=masking.patch_size)
titles = ("original", "masked", "reconstruction", "with visible part")
panels = task.panels(images, masks)
original = panels[:, 0]
show(panels, "panels.png", titles, caption)

# %% [markdown]
# ## Mask patch size, ratio, and AvgDist
#
# Small cells are easy to fill in from their neighbours, unless nearly all are hidden. AvgDist, the mean distance
# from a hidden pixel to the nearest visible one, puts patch size and ratio on one scale; the paper finds 10 to
# 20 px good (for images of 192 px). The same model looks at each mask below,
# though it was trained with one: cells of another size than it knows puzzle it.

# %%
columns, names, rows = [original], ["original"], []
cells = [masking.patch_size // 4, masking.patch_size // 2, masking.patch_size]
for patch_size in (size for size in cells if size >= task.network.encoder.patch_size):
    for ratio in (0.4, 0.6, 0.75):
        other = masking_of(task, patch_size=patch_size, ratio=ratio)
        drawn = masks_of(other)
        distance = sum(average_distance(mask, patch_size) for mask in drawn) / len(drawn)
        rows.append((patch_size, ratio, distance))
        if ratio == 0.6:
            panels = task.panels(images, drawn)
            columns += [panels[:, 1], panels[:, 3]]
            names += [f"{patch_size} px, {ratio:.0%}", f"AvgDist {distance:.1f} px"]

show(torch.stack(columns, dim=1), "masks.png", names)
print("patch size   ratio   AvgDist")
for patch_size, ratio, distance in rows:
    print(f"{patch_size:7} px   {ratio:5.0%}   {distance:5.1f} px")

# %% [markdown]
# ## Several checkpoints of one run
#
# Colour comes first, then large shapes, then edges.

# %%
checkpoints = list_checkpoints(run)
chosen = checkpoints[:: max(1, len(checkpoints) // 4)][-4:]
stages = [load_pretraining(path).panels(images, masks)[:, 3] for path in chosen]
steps = [f"step {int(path.stem.removeprefix('step_'))}" for path in chosen]
show(torch.stack([original, *stages], dim=1), "checkpoints.png", ["original", *steps])
