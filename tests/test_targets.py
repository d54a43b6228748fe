import pytest
import torch

from simmim.targets import denormalize_locally, local_statistics, normalize_locally


def by_hand(image, row, column, window):
    half = window // 2
    patch = image[max(0, row - half) : row + half + 1, max(0, column - half) : column + half + 1]
    return patch.mean(), patch.var(unbiased=True)


@pytest.mark.parametrize("window", [3, 7, 47])
def test_statistics_equal_each_window_computed_alone(window):
    images = torch.rand(2, 3, 30, 21, dtype=torch.float64)
    mean, variance = local_statistics(images, window)
    for row, column in [(0, 0), (0, 10), (15, 10), (29, 20), (13, 1)]:
        expected_mean, expected_variance = by_hand(images[1, 2], row, column, window)
        assert mean[1, 2, row, column] == pytest.approx(float(expected_mean), rel=1e-9)
        assert variance[1, 2, row, column] == pytest.approx(float(expected_variance), rel=1e-7)


def test_the_target_is_the_formula():
    images = torch.rand(1, 1, 16, 16, dtype=torch.float64)
    mean, variance = by_hand(images[0, 0], 8, 8, 5)
    expected = (images[0, 0, 8, 8] - mean) / (variance + 1e-6).sqrt()
    assert normalize_locally(images, 5)[0, 0, 8, 8] == pytest.approx(float(expected), rel=1e-9)


def test_flat_areas_stay_finite():
    greys = torch.linspace(-2.5, 2.5, 50)[:, None, None, None].expand(-1, 1, 64, 64)
    target = normalize_locally(greys, 47)
    assert target.isfinite().all()
    assert target.abs().max() < 1


def test_undoing_with_the_true_image_gives_it_back():
    images = torch.rand(2, 3, 64, 64)
    assert torch.allclose(denormalize_locally(normalize_locally(images, 47), images, 47), images, atol=1e-5)
