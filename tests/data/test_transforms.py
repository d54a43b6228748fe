import pytest
import torch

from simmim.data.transforms import centre_transform, pretraining_transform


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
