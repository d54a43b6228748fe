from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from simmim.training.callbacks import Reconstructions, UnreadableImages
from tests.training.test_metrics import files_limited_to

ALONE = SimpleNamespace(world_size=1, training=True)


def batch(images, *bad):
    return {"image": torch.zeros(images, 3, 1, 1), "unreadable": [(name, "truncated JPEG") for name in bad]}


def policy(tmp_path, **settings):
    settings = {"on_error": "skip", "max_fraction": 0.01, **settings}
    return UnreadableImages(tmp_path / "bad_images.txt", **settings)


def draw(callback, *batches):
    for index, drawn in enumerate(batches):
        callback.on_train_batch_start(ALONE, None, drawn, index)


def test_each_bad_image_is_listed_once_with_its_reason(tmp_path):
    draw(policy(tmp_path), batch(8, "a.jpg"), batch(8), batch(8, "b.jpg", "a.jpg"))
    assert (tmp_path / "bad_images.txt").read_text() == "a.jpg\ttruncated JPEG\nb.jpg\ttruncated JPEG\n"


def test_validation_images_count_too(tmp_path):
    callback = policy(tmp_path)
    callback.on_validation_batch_start(ALONE, None, batch(8, "a.jpg"), 0)
    assert (callback.drawn, callback.unreadable) == (8, 1)
    assert (tmp_path / "bad_images.txt").read_text() == "a.jpg\ttruncated JPEG\n"


def test_a_run_without_bad_images_has_no_list(tmp_path):
    draw(policy(tmp_path), batch(8))
    assert not (tmp_path / "bad_images.txt").exists()


def test_raise_names_the_first(tmp_path):
    with pytest.raises(ValueError, match=r"^a\.jpg and b\.jpg cannot be read.*data\.on_error=skip"):
        draw(policy(tmp_path, on_error="raise"), batch(8), batch(8, "a.jpg", "b.jpg"))


def test_too_many_stop_the_run_but_not_before_the_first_thousand(tmp_path):
    callback = policy(tmp_path)
    draw(callback, batch(990, *(f"{n}.jpg" for n in range(11))))
    with pytest.raises(
        ValueError, match=r"11 of 1000 images could not be read.*max_bad_fraction=0\.01.*bad_images\.txt"
    ):
        draw(callback, batch(10))
    draw(policy(tmp_path), batch(1000, *(f"{n}.jpg" for n in range(10))))  # one in a hundred is allowed


def test_the_counts_outlive_an_interruption(tmp_path):
    first = policy(tmp_path)
    draw(first, batch(990, "a.jpg"))
    second = policy(tmp_path)
    second.load_state_dict(first.state_dict())
    draw(second, batch(5, "a.jpg"))
    assert (second.drawn, second.unreadable) == (995, 2)
    assert (tmp_path / "bad_images.txt").read_text().count("a.jpg") == 1


def test_lines_wait_for_room_on_a_full_disk(tmp_path, caplog):
    callback, path = policy(tmp_path), tmp_path / "bad_images.txt"
    with files_limited_to(20):
        draw(callback, batch(8, "a.jpg"), batch(8), batch(8, "b.jpg"))
    assert path.read_text() == ""
    assert sum("bad_images.txt cannot be written (File too large)" in line for line in caplog.messages) == 1
    draw(callback, batch(8))
    assert path.read_text() == "a.jpg\ttruncated JPEG\nb.jpg\ttruncated JPEG\n"


def test_a_picture_without_room_is_left_out_and_the_older_one_stays(tmp_path, caplog):
    module = SimpleNamespace(
        device="cpu",
        hparams={"masking": {"ratio": 0.6, "patch_size": 16}},
        panels=lambda images, mask, channels: torch.rand(2, 4, 3, 32, 32),
        caption=lambda **settings: "",
    )
    trainer = SimpleNamespace(
        precision_plugin=SimpleNamespace(forward_context=nullcontext), global_step=3, is_global_zero=True, loggers=[]
    )
    callback = Reconstructions(tmp_path, {"image": torch.zeros(1), "mask": torch.zeros(1)}, steps_per_epoch=1)
    callback.on_validation_end(trainer, module)
    before = (tmp_path / "epoch_0003.png").read_bytes()
    with files_limited_to(1000):
        callback.on_validation_end(trainer, module)
    [line] = caplog.messages
    assert "epoch_0003.png cannot be written (File too large): the run goes on without it" in line
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
