from typing import ClassVar

import pytest
import torch
from torch.utils.data import DataLoader

from simmim.data.decoding import UnreadableImage
from simmim.data.module import MAX_REPLACEMENTS, ImageSamples, collate, create_sources, fixed_batch
from simmim.data.sampler import SampleStream
from simmim.data.synthetic import SyntheticSource
from simmim.data.transforms import centre_transform, pretraining_transform
from simmim.masking import Masking


class Alike(SyntheticSource):
    """A source in which all images are the same."""

    def load(self, index):
        return super().load(0)


class Broken:
    """A source in which some images cannot be read."""

    classes: ClassVar[list[str]] = []

    def __init__(self, size, bad):
        self.size, self.bad = size, bad

    def __len__(self):
        return self.size

    def load(self, index):
        if index in self.bad:
            raise UnreadableImage("empty file")
        return torch.full((3, 40, 40), index, dtype=torch.uint8), -1

    def name(self, index):
        return f"folder/{index}.jpg"


def samples(source, seed=0, transform=None):
    transform = transform or pretraining_transform((32, 32), crop_scale=[0.67, 1.0], crop_ratio=[0.75, 1.33])
    masking = Masking((32, 32), patch_size=8, ratio=0.5, strategy="random", model_patch_size=2)
    return ImageSamples(source, transform, masking, seed)


def same(a, b):
    return torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"])


def test_a_sample_is_a_function_of_seed_epoch_and_index_alone():
    source = Alike(8, (40, 40), channels=3)
    torch.manual_seed(1)
    first = samples(source)[(2, 3)]
    torch.manual_seed(2)
    assert same(first, samples(source)[(2, 3)])
    for other in (samples(source)[(1, 3)], samples(source)[(2, 4)], samples(source, seed=1)[(2, 3)]):
        assert not torch.equal(first["image"], other["image"])
        assert not torch.equal(first["mask"], other["mask"])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_do_not_change_the_batches(num_workers):
    dataset = samples(SyntheticSource(8, (40, 40), channels=3))

    def batches(workers):
        stream = SampleStream(8, 3, num_batches=6, seed=0)
        return list(DataLoader(dataset, batch_sampler=stream, num_workers=workers, collate_fn=collate))

    for a, b in zip(batches(0), batches(num_workers), strict=True):
        assert same(a, b)


def test_an_unreadable_image_is_replaced_by_the_next_and_named():
    sample = samples(Broken(10, {4, 5}), transform=centre_transform((32, 32)))[(0, 4)]
    assert int(sample["image"][0, 0, 0]) == 6
    assert sample["unreadable"] == [("folder/4.jpg", "empty file"), ("folder/5.jpg", "empty file")]


def test_nothing_but_unreadable_images_is_one_clear_line():
    with pytest.raises(
        ValueError, match=rf"^{MAX_REPLACEMENTS} images in a row cannot be read, the first being folder/7"
    ):
        samples(Broken(500, range(500)))[(0, 7)]


def test_a_batch_gathers_what_could_not_be_read():
    dataset = samples(Broken(10, {4}))
    batch = collate([dataset[(0, 3)], dataset[(0, 4)]])
    assert batch["image"].shape == (2, 3, 32, 32)
    assert batch["image"].dtype == torch.uint8
    assert batch["mask"].shape == (2, 4, 4)
    assert batch["unreadable"] == [("folder/4.jpg", "empty file")]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_batch_keeps_the_layout_of_its_images(channels):
    rows = [torch.randint(0, 256, (6, 5, channels), dtype=torch.uint8) for _ in range(3)]
    images = [image.permute(2, 0, 1) for image in rows]
    others = {"mask": torch.ones(1, 1, dtype=torch.bool), "label": 0, "counts": True, "unreadable": []}
    decoded = collate([{"image": image, **others} for image in images])["image"]
    drawn = collate([{"image": image.contiguous(), **others} for image in images])["image"]
    assert torch.equal(decoded, drawn) and torch.equal(decoded, torch.stack(images))
    assert decoded.is_contiguous(memory_format=torch.channels_last)
    assert drawn.is_contiguous()


def test_the_pictures_show_the_first_samples_of_the_validation_set():
    dataset = samples(SyntheticSource(3, (40, 40), channels=3))
    assert fixed_batch(dataset, 8)["image"].shape[0] == 3
    assert same(fixed_batch(dataset, 2), collate([dataset[(0, 0)], dataset[(0, 1)]]))


def test_training_and_validation_differ():
    config = {"source": "synthetic", "channels": 3, "train_images": 4, "val_images": 4}
    train, validation = create_sources(config, (32, 32))
    assert not torch.equal(train.load(0)[0], validation.load(0)[0])


def test_an_unknown_source_is_refused():
    with pytest.raises(
        ValueError, match=r"^data\.source=lmdb is unknown: choose synthetic, folder, shards, zip, hf, list$"
    ):
        create_sources({"source": "lmdb", "channels": 3}, (32, 32))
