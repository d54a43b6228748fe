"""What an export says of its images, against what the model does."""

from types import SimpleNamespace

import pytest

from simmim.exporting.model import Preprocessing
from simmim.exporting.verification import _other_images

OURS = Preprocessing(mean=[0.5, 0.4], std=[0.2, 0.3], max_value=65535, interpolation="bicubic", crop=0.875)
SAID = {"mean": [0.5, 0.4], "std": [0.2, 0.3], "max_value": 65535.0, "interpolation": "bicubic", "test_crop": 32 / 37}


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, []),
        (dict.fromkeys(SAID), []),
        ({"mean": [0.5, 0.5]}, ["mean"]),
        ({"max_value": 255.0}, ["max_value"]),
        ({"interpolation": "bilinear"}, ["interpolation"]),
        ({"test_crop": 1.0}, ["test_crop"]),
    ],
    ids=["whole pixels", "silence", "mean", "max_value", "interpolation", "test_crop"],
)
def test_another_preprocessing_is_noticed(change, wrong):
    model = SimpleNamespace(preprocessing=OURS, image_size=(32, 48))
    assert _other_images(model, SAID | change) == wrong
