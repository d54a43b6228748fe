import hashlib

import pytest
import torch

from simmim.data.synthetic import SyntheticSource


@pytest.mark.parametrize("image_size", [(64, 64), (48, 96), (17, 5), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3, 4, 14])
def test_any_size_and_any_channels(image_size, channels):
    source = SyntheticSource(3, image_size, channels=channels)
    for index in range(len(source)):
        image, label = source.load(index)
        assert image.shape == (channels, *image_size)
        assert image.dtype == torch.uint8
        assert 0 <= label < len(source.classes)


def test_a_picture_depends_on_seed_and_index_alone():
    source = SyntheticSource(100, (32, 32), seed=1)
    image = source.load(7)[0]
    source.load(8)
    assert torch.equal(source.load(7)[0], image)
    assert torch.equal(SyntheticSource(8, (32, 32), seed=1).load(7)[0], image)
    assert not torch.equal(source.load(8)[0], image)
    assert not torch.equal(SyntheticSource(100, (32, 32), seed=2).load(7)[0], image)


def test_pictures_are_the_same_on_every_platform():
    source = SyntheticSource(40, (40, 56))
    content = b"".join(source.load(index)[0].numpy().tobytes() for index in range(40))
    # If this fails after a change of the drawing: put the new value here and a line into the change log.
    assert hashlib.sha256(content).hexdigest()[:16] == "4b7b171342698438"


def test_classes_are_balanced_and_named():
    source = SyntheticSource(1000, (8, 8))
    labels = [source.load(index)[1] for index in range(1000)]
    assert labels == [source.label(index) for index in range(1000)]
    assert len(set(source.classes)) == 6
    assert torch.bincount(torch.tensor(labels), minlength=6).min() > 120


def test_pictures_have_structure_at_large_scale_and_fine_detail():
    source = SyntheticSource(100, (64, 64))
    images = torch.stack([source.load(index)[0] for index in range(100)]).float() / 255
    coarse = torch.nn.functional.avg_pool2d(images, 16)
    detail = images - torch.nn.functional.interpolate(coarse, scale_factor=16)
    assert coarse.var(dim=(2, 3)).mean() > 0.005
    assert detail.var(dim=(2, 3)).mean() > 0.005
    # A pixel is much like its neighbour and less like one 16 px away: there is something to inpaint.
    near = (images[..., 1:] - images[..., :-1]).square().mean()
    far = (images[..., 16:] - images[..., :-16]).square().mean()
    assert near < far / 4


def test_a_class_shows_in_its_pictures():
    """The channels that a hue is made of are above the others in the mean of its pictures."""
    made_of = {"red": "r", "purple": "rb", "blue": "b", "cyan": "gb", "green": "g", "yellow": "rg"}
    source = SyntheticSource(600, (32, 32))
    colours = {name: [] for name in source.classes}
    for image, label in map(source.load, range(len(source))):
        colours[source.classes[label]].append(image.float().mean(dim=(1, 2)))
    for name, channels in made_of.items():
        mean = dict(zip("rgb", torch.stack(colours[name]).mean(dim=0).tolist(), strict=True))
        others = set("rgb").difference(channels)
        assert min(mean[c] for c in channels) > max(mean[c] for c in others), name


def test_names_and_length():
    source = SyntheticSource(200, (8, 8))
    assert (len(source), source.name(123)) == (200, "synthetic/000123")
    for index in (-1, 200):
        with pytest.raises(IndexError, match="200 synthetic images"):
            source.load(index)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"image_size": (0, 8)}, {"channels": 0}, {"seed": -1}])
def test_impossible_sets_are_refused(wrong):
    arguments = {"size": 4, "image_size": (8, 8), "channels": 3, "seed": 0} | wrong
    key, value = next(iter(wrong.items()))
    with pytest.raises(ValueError) as caught:
        SyntheticSource(arguments.pop("size"), arguments.pop("image_size"), **arguments)
    assert f"{key}={value}" in str(caught.value)
