import math
import re

import pytest
import torch
from PIL import Image
from transformers import Swinv2Config, Swinv2ForMaskedImageModeling

from simmim.config import compose_config
from simmim.masking import expand_mask
from simmim.pictures import GREY
from simmim.pretrain import pretrain
from simmim.reconstruct import load_images, load_pretraining, losses, masking_of, reconstruct
from simmim.tasks.pretraining import MaskedImageModel


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    overrides = ["experiment=debug", "trainer.max_steps=2", "objective.target=normalized"]
    pretrain(compose_config("pretrain", overrides, output_dir=folder))
    return folder


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    Image.effect_noise((50, 40), 60).convert("RGB").save(tmp_path / "photos" / "a.png")
    Image.effect_noise((30, 90), 60).convert("L").save(tmp_path / "photos" / "deep" / "b.jpg")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    return tmp_path / "photos"


def draw(run, photos, out, *overrides):
    overrides = [f"encoder={run}", f"images={photos}", *overrides]
    return reconstruct(compose_config("reconstruct", overrides, output_dir=out))


def test_any_folder_of_images_is_drawn_and_what_cannot_be_read_is_named(run, photos, tmp_path, caplog):
    picture = Image.open(draw(run, photos, tmp_path / "out"))
    rows = (picture.height - 60) / (picture.width / 4)
    assert 1.6 < rows < 2.4
    assert "broken.jpg cannot be read" in caplog.text


def test_a_file_and_a_checkpoint_will_do(run, photos, tmp_path):
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert draw(checkpoint, photos / "a.png", tmp_path / "out").exists()
    assert not load_pretraining(checkpoint).training


def test_the_same_seed_gives_the_same_picture_and_masking_can_change(run, photos, tmp_path):
    first = draw(run, photos, tmp_path / "1").read_bytes()
    assert draw(run, photos, tmp_path / "2").read_bytes() == first
    assert draw(run, photos, tmp_path / "3", "masking.patch_size=8", "masking.ratio=0.3").read_bytes() != first
    masking = masking_of(load_pretraining(run), patch_size=8, ratio=0.3, strategy=None)
    assert (masking.patch_size, masking.ratio, masking.strategy) == (8, 0.3, "random")


def test_each_image_and_each_seed_has_its_own_mask(run, photos, tmp_path, monkeypatch):
    grey = []
    monkeypatch.setattr("simmim.reconstruct.draw_panels", lambda panels, *_, caption: grey.append(panels[:, 1] == GREY))
    for override in ("seed=0", "seed=1", "count=1"):
        draw(run, photos, tmp_path, override, "masking.patch_size=4")
    first, other, one = grey
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, other)
    assert len(one) == 1


def test_the_log_compares_each_image_with_the_visible_mean(run, photos, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(MaskedImageModel, "visible_mean_loss", lambda *_: torch.tensor(2.0))
    caplog.set_level("INFO")
    draw(run, photos, tmp_path)
    for name in ("a.png", "deep/b.jpg"):
        (line,) = re.findall(rf"loss (\d\.\d+), (\d\.\d+) of the visible mean's 2\.000: .*{name}", caplog.text)
        assert float(line[1]) == pytest.approx(float(line[0]) / 2, abs=0.01)


def test_the_caption_owns_up_to_true_statistics(run, photos, tmp_path, monkeypatch):
    captions = []
    monkeypatch.setattr("simmim.reconstruct.draw_panels", lambda *_, caption: captions.append(caption))
    draw(run, photos, tmp_path)
    assert captions == [
        "60% of the 16-px cells hidden; what is predicted for visible cells was never trained; "
        "the normalised target is undone with the true image's local mean and deviation"
    ]
    task = load_pretraining(run)
    task.network.predict, task.network.target_window = "all", None
    assert task.caption(ratio=0.6, patch_size=16) == "60% of the 16-px cells hidden"


def test_an_encoder_without_its_head_is_refused(run, photos, tmp_path):
    with pytest.raises(ValueError, match=r"without its prediction head: give the run folder"):
        draw(run / "encoder.safetensors", photos, tmp_path)


def test_no_image_is_one_line(run, photos, tmp_path):
    with pytest.raises(ValueError, match=r"does not exist"):
        draw(run, tmp_path / "none", tmp_path)
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be read \(not an image"):
        draw(run, photos / "broken.jpg", tmp_path)
    (photos / "a.png").unlink()
    (photos / "deep" / "b.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no image that can be read"):
        draw(run, photos, tmp_path)


@pytest.fixture
def released(tmp_path):
    """A model of masked images, pretrained elsewhere; its folder says all but the target."""
    torch.manual_seed(0)
    shape = {"embed_dim": 16, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8]}
    theirs = Swinv2ForMaskedImageModeling(Swinv2Config(image_size=96, window_size=6, encoder_stride=32, **shape))
    for parameter in theirs.parameters():
        parameter.data += torch.randn(parameter.shape) * (0.02 if parameter.ndim > 1 else 0.3)
    theirs.save_pretrained(tmp_path / "released")
    return theirs.eval()


def test_a_released_decoder_predicts_what_it_did(released, photos, tmp_path):
    task = load_pretraining(tmp_path / "released", target="raw")
    names, images = load_images(photos, task, 2)
    masks = torch.stack([torch.rand(3, 3, generator=torch.Generator().manual_seed(n)) < 0.6 for n in range(len(names))])
    with torch.no_grad():
        hidden = expand_mask(masks, 24, 24).flatten(1)
        pixels = task.normalize(images)
        expected = [
            float(released(pixels[n : n + 1], bool_masked_pos=hidden[n : n + 1]).loss) for n in range(len(names))
        ]
        whole = released(pixels, bool_masked_pos=hidden).reconstruction
        torch.testing.assert_close(task.network.reconstruct(pixels, masks), whole, atol=1e-4, rtol=1e-4)
    assert losses(task, images, masks)[0] == pytest.approx(expected, rel=1e-4)
    assert not math.isclose(*expected)
    assert draw(tmp_path / "released", photos, tmp_path / "out", "target=normalized").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], r"target=None: encoder=.* does not say which pixels its decoder predicts: give target=raw"),
        (["target=words"], r"^target=words: "),
    ],
)
def test_what_a_released_decoder_predicts_must_be_said(released, words, reason, photos, tmp_path):
    with pytest.raises(ValueError, match=reason) as caught:
        draw(tmp_path / "released", photos, tmp_path / "out", *words)
    assert "\n" not in str(caught.value)


def test_a_run_says_its_own_target(run, photos, tmp_path):
    with pytest.raises(ValueError, match=r"^target=raw is for decoders that others released"):
        draw(run, photos, tmp_path, "target=raw")


def test_released_weights_without_a_decoder_are_refused(released, photos, tmp_path):
    released.swinv2.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"holds no decoder, which predicts pixels"):
        draw(tmp_path / "encoder", photos, tmp_path / "out", "target=raw")
