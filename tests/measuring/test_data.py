"""The measurement of data: small, and not about its numbers."""

import pytest
import torch
from PIL import Image

from simmim.config import compose_config
from simmim.data.module import ImageData, create_sources
from simmim.data.transforms import centre_transform, pretraining_transform
from simmim.masking import Masking
from simmim.measuring import data as measuring
from simmim.measuring.data import decoding_table, loader_table, workers_needed


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for index in range(5):
        Image.effect_noise((300 + index, 280), 40).convert("RGB").save(root / f"{index}.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (300, 200)).save(root / "turned.jpg", exif=turned)
    Image.new("RGB", (300, 200)).save(root / "other.png")
    (root / "broken.jpg").write_bytes((root / "0.jpg").read_bytes()[:500])
    return root


def test_each_method_has_its_row_and_ours_its_distance_from_pil(photos):
    threads = torch.get_num_threads()
    baseline, files, prepared, alone = decoding_table(photos, (64, 64), repeats=2)
    assert torch.get_num_threads() == threads
    assert (baseline["method"], baseline["ratio"], baseline["psnr_db"]) == (measuring.BASELINE, 1.0, None)
    assert files["psnr_db"] > 60
    assert prepared["psnr_db"] is alone["psnr_db"] is None
    assert min(row["images_per_s"] for row in (baseline, files, prepared, alone)) > 0


def test_the_ways_cut_the_same_boxes(photos):
    (crop,) = measuring._crops(measuring.FolderSource(photos).subset([0]))
    difference = measuring.pil_crop(crop, (48, 64)).int() - measuring.tensor_crop(crop, (48, 64)).int()
    assert difference.abs().max() <= 2


def test_a_folder_without_jpeg_files_is_refused(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"holds no upright JPEG file"):
        decoding_table(tmp_path, (64, 64), repeats=1)


def test_the_measured_copy_is_the_one_that_the_command_makes(tmp_path):
    config = compose_config("prepare", ["data.root=a", "out=b"], output_dir=tmp_path)
    assert (config["short_side"], config["quality"]) == (measuring.SHORT_SIDE, measuring.QUALITY)
    data = compose_config("pretrain", [], output_dir=tmp_path)["data"]
    assert (tuple(data["crop_scale"]), tuple(data["crop_ratio"])) == (measuring.CROP_SCALE, measuring.CROP_RATIO)


def test_the_training_loader_is_timed_with_any_number_of_workers():
    config = {"source": "synthetic", "channels": 3, "train_images": 8, "val_images": 2}
    data = ImageData(
        create_sources(config, (32, 32)),
        masking=Masking((32, 32), patch_size=8, ratio=0.5, strategy="random", model_patch_size=4),
        transforms=(
            pretraining_transform((32, 32), crop_scale=[0.67, 1.0], crop_ratio=[0.75, 1.33]),
            centre_transform((32, 32)),
        ),
        batch_size=4,
        num_workers=7,
        timeout=60,
        on_gpu=False,
        num_batches=1,
        seed=0,
    )
    table = loader_table(data, [0, 1], seconds=0.05)
    assert [row["workers"] for row in table] == [0, 1]
    assert min(row["images_per_s"] for row in table) > 0
    assert (data.num_workers, data.num_batches) == (7, 1)


@pytest.mark.parametrize(("speed", "workers"), [(50, 1), (100, 1), (101, 2), (180, 2), (1000, 10)])
def test_the_fewest_workers_that_keep_up(speed, workers):
    table = [{"workers": count, "images_per_s": rate} for count, rate in ((0, 90), (1, 100), (2, 180))]
    assert workers_needed(table, speed) == workers
