import pytest
import torch

from simmim.training.callbacks import UnreadableImages


def batch(images, *bad):
    return {"image": torch.zeros(images, 3, 1, 1), "unreadable": [(name, "truncated JPEG") for name in bad]}


def policy(tmp_path, **settings):
    settings = {"on_error": "skip", "max_fraction": 0.01, **settings}
    return UnreadableImages(tmp_path / "bad_images.txt", **settings)


def draw(callback, *batches):
    for index, drawn in enumerate(batches):
        callback.on_train_batch_start(None, None, drawn, index)


def test_each_bad_image_is_listed_once_with_its_reason(tmp_path):
    draw(policy(tmp_path), batch(8, "a.jpg"), batch(8), batch(8, "b.jpg", "a.jpg"))
    assert (tmp_path / "bad_images.txt").read_text() == "a.jpg\ttruncated JPEG\nb.jpg\ttruncated JPEG\n"


def test_validation_images_count_too(tmp_path):
    callback = policy(tmp_path)
    callback.on_validation_batch_start(None, None, batch(8, "a.jpg"), 0)
    assert (callback.drawn, callback.unreadable) == (8, 1)
    assert (tmp_path / "bad_images.txt").read_text() == "a.jpg\ttruncated JPEG\n"


def test_a_run_without_bad_images_has_no_list(tmp_path):
    draw(policy(tmp_path), batch(8))
    assert not (tmp_path / "bad_images.txt").exists()


def test_raise_names_the_first(tmp_path):
    with pytest.raises(ValueError, match=r"^a\.jpg cannot be read \(truncated JPEG\).*data\.on_error=skip"):
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
