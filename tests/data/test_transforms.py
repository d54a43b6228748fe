import pytest
import torch
from torchvision.transforms import v2

from simmim.data.transforms import centre_transform, pretraining_transform, random_box, resized_crop


def test_the_crop_covers_the_asked_share_and_half_are_flipped():
    """A ramp from 0 to 255 tells where its crop began and ended, and whether it was flipped."""
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 256, 256)
    transform = pretraining_transform((64, 64), crop_scale=[0.67, 1.0], crop_ratio=[0.75, 4 / 3])
    torch.manual_seed(0)
    crops = [transform(ramp)[0, 0].int() for _ in range(400)]
    widths = [(int(crop[-1]) - int(crop[0])) / 255 * 64 / 63 for crop in crops]
    assert 0.4 < sum(width < 0 for width in widths) / 400 < 0.6
    assert (0.67 * 0.75) ** 0.5 - 0.02 < min(map(abs, widths)) < 0.75
    assert 0.97 < max(map(abs, widths)) <= 1.02


@pytest.mark.parametrize("size", [(8, 600), (300, 200), (64, 64), (65, 64)])
def test_the_centre_is_kept_whatever_the_shape(size):
    image = torch.zeros(3, *size, dtype=torch.uint8)
    image[:, size[0] // 2 - 4 : size[0] // 2 + 4, size[1] // 2 - 4 : size[1] // 2 + 4] = 200
    result = centre_transform((48, 64))(image)
    assert result.shape == (3, 48, 64)
    assert result.dtype == torch.uint8
    assert result[0, 24, 32] > 150


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match=r"data\.crop_scale=\[1\.0, 0\.5\]"):
        pretraining_transform((64, 64), crop_scale=[1.0, 0.5], crop_ratio=[0.75, 1.33])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_crops_of_either_layout_are_those_of_torchvision(channels):
    torch.manual_seed(0)
    rows = torch.randint(0, 256, (90, 120, channels), dtype=torch.uint8)
    for image in (rows.permute(2, 0, 1), rows.permute(2, 0, 1).contiguous()):
        for box in ((0, 0, 90, 120), (7, 11, 60, 50), (3, 80, 20, 40)):
            expected = v2.functional.resized_crop(image, *box, [32, 48], antialias=True)
            assert torch.equal(resized_crop(image, box, (32, 48)), expected)


def test_colours_keep_the_layout_of_the_decoder():
    image = torch.zeros(90, 120, 3, dtype=torch.uint8).permute(2, 0, 1)
    assert resized_crop(image, (1, 2, 80, 90), (32, 32)).stride() == (1, 96, 3)


@pytest.mark.parametrize("size", [(300, 400), (40, 300), (500, 30), (192, 192)])
def test_boxes_are_those_of_torchvision(size):
    scale, ratio = [0.67, 1.0], [0.75, 4 / 3]
    picture, theirs = torch.empty(3, *size), v2.RandomResizedCrop((64, 64), scale=scale, ratio=ratio)
    for seed in range(200):
        torch.manual_seed(seed)
        expected = theirs.make_params([picture])
        torch.manual_seed(seed)
        box = random_box(*size, scale, ratio)
        assert box == tuple(expected[side] for side in ("top", "left", "height", "width"))


def test_crop_and_flip_are_those_of_torchvision():
    scale, ratio = [0.67, 1.0], [0.75, 4 / 3]
    picture = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8)
    ours = pretraining_transform((32, 48), crop_scale=scale, crop_ratio=ratio)
    theirs = v2.Compose(
        [v2.RandomResizedCrop((32, 48), scale=scale, ratio=ratio, antialias=True), v2.RandomHorizontalFlip()]
    )
    for seed in range(20):
        torch.manual_seed(seed)
        expected = theirs(picture)
        torch.manual_seed(seed)
        assert torch.equal(ours(picture), expected)
