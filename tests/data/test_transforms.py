import pytest
import torch
from timm.data.auto_augment import LEVEL_TO_ARG
from torchvision.transforms import v2

from simmim.data.transforms import (
    NoiseErasing,
    centre_transform,
    create_mixing,
    finetuning_transform,
    pretraining_transform,
    random_box,
    resized_crop,
)


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


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 2, 13])
def test_floats_and_many_channels_are_cut_and_resized_alike(channels, interpolation):
    """Each channel as torchvision does it alone, in double precision: nothing is rounded or clipped."""
    torch.manual_seed(0)
    rows = 1000 * torch.randn(90, 120, channels)
    mode = v2.InterpolationMode(interpolation)
    for image in (rows.permute(2, 0, 1), rows.permute(2, 0, 1).contiguous()):
        for box in ((0, 0, 90, 120), (7, 11, 60, 50), (3, 80, 20, 40)):
            ours = resized_crop(image, box, (32, 48), interpolation)
            assert ours.dtype == torch.float32
            for channel in range(channels):
                alone = image[channel : channel + 1].double()
                expected = v2.functional.resized_crop(alone, *box, [32, 48], interpolation=mode, antialias=True)
                assert (ours[channel] - expected[0]).abs().max() < 0.1  # of 1000: weights in single precision
    whole = rows.permute(2, 0, 1).clamp(0, 255).to(torch.uint8)
    difference = resized_crop(whole.float(), box, (32, 48)) - resized_crop(whole, box, (32, 48)).float()
    assert difference.abs().max() <= 1  # 8 bits, rounded between the axes


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


FINETUNING = {
    "crop_scale": [0.08, 1.0], "crop_ratio": [0.75, 4 / 3], "interpolation": "bicubic", "randaugment": None,
    "color_jitter": 0, "erasing": 0, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
}  # fmt: skip


def photo(channels=3, size=(90, 120)):
    """Smooth, with edges, and no two pixels alike."""
    coarse = torch.rand(1, channels, 9, 12, generator=torch.Generator().manual_seed(5))
    return (255 * torch.nn.functional.interpolate(coarse, size, mode="bilinear")[0]).to(torch.uint8)


def test_the_crop_of_finetuning_is_that_of_torchvision_in_bicubic():
    ours = finetuning_transform((32, 48), **FINETUNING)
    crop = v2.RandomResizedCrop(
        (32, 48), scale=[0.08, 1.0], ratio=[0.75, 4 / 3], interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )
    theirs = v2.Compose([crop, v2.RandomHorizontalFlip()])
    for seed in range(20):
        torch.manual_seed(seed)
        expected = theirs(photo())
        torch.manual_seed(seed)
        assert torch.equal(ours(photo()), expected)


# What magnitude 9 of 10 means to timm, from whose names the recipe has it: 0.9 of the largest change.
LARGEST = {"ShearX": 0.3, "ShearY": 0.3, "Rotate": 30.0, "Brightness": 0.9, "Color": 0.9, "Contrast": 0.9,
           "Sharpness": 0.9}  # fmt: skip


@pytest.mark.parametrize("magnitude", [0, 5, 9, 10])
def test_the_magnitude_of_randaugment_is_of_ten(magnitude, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        v2.RandAugment,
        "_apply_image_or_video_transform",
        lambda self, image, name, magnitude, **settings: drawn.append((name, magnitude, settings)) or image,
    )
    transform = finetuning_transform((64, 64), **{**FINETUNING, "randaugment": magnitude})
    torch.manual_seed(0)
    for _ in range(400):
        transform(photo())
    assert 330 < len(drawn) < 470  # two operations an image, each with a probability of one half
    share = magnitude / 10
    for name, value, settings in drawn:
        if name in LARGEST:
            assert abs(value) == pytest.approx(share * LARGEST[name]), name
        elif name.startswith("Translate"):
            assert abs(value) == pytest.approx(share * 150 / 331 * 64)
        elif name == "Solarize":
            assert value == pytest.approx(1 - share, abs=1e-6)
        elif name == "Posterize":
            assert value == max(1, *LEVEL_TO_ARG["PosterizeIncreasing"](magnitude, {}))
        assert next(iter(settings["fill"].values())) == pytest.approx([255 * mean for mean in FINETUNING["mean"]])
    assert {name for name, *_ in drawn} >= {*LARGEST, "TranslateX", "TranslateY", "Solarize", "Posterize"}
    signs = [value > 0 for name, value, _ in drawn if name in LARGEST]
    assert magnitude == 0 or 0.4 < sum(signs) / len(signs) < 0.6


def test_what_an_operation_lays_bare_has_the_mean_colour():
    torch.manual_seed(0)
    transform = finetuning_transform((64, 64), **{**FINETUNING, "randaugment": 10, "crop_scale": [1.0, 1.0]})
    white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    mean = torch.tensor([255 * mean for mean in FINETUNING["mean"]])
    corners = torch.stack([transform(white)[:, 0, 0].float() for _ in range(200)])
    bare = (corners - mean).abs().amax(dim=1) <= 1
    assert 0.03 < bare.float().mean() < 0.5  # every second operation is left out


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("change", [{"randaugment": 9}, {"color_jitter": 0.4}, {"randaugment": 9, "color_jitter": 0.4}])
def test_augmented_images_stay_uint8_of_their_shape(channels, change):
    statistics = {"mean": [0.5] * channels, "std": [0.2] * channels}
    transform = finetuning_transform((40, 56), **{**FINETUNING, "erasing": 0.5, **statistics, **change})
    torch.manual_seed(0)
    results = [transform(photo(channels)) for _ in range(60)]
    assert {(result.dtype, tuple(result.shape)) for result in results} == {(torch.uint8, (channels, 40, 56))}
    assert len({float(result.float().mean()) for result in results}) > 50


def test_jitter_is_used_where_there_is_no_randaugment():
    both = finetuning_transform((64, 64), **{**FINETUNING, "randaugment": 9, "color_jitter": 0.4})
    names = [type(step).__name__ for step in both.transforms[1:]]
    alone = finetuning_transform((64, 64), **{**FINETUNING, "color_jitter": 0.4, "erasing": 0.25})
    jitter = alone.transforms[1]
    assert names == ["RandAugment"]
    assert [type(step).__name__ for step in alone.transforms[1:]] == ["ColorJitter", "NoiseErasing"]
    assert tuple(jitter.brightness) == tuple(jitter.contrast) == tuple(jitter.saturation) == (0.6, 1.4)
    assert jitter.hue is None


@pytest.mark.parametrize("change", [{"randaugment": 0}, {"randaugment": 9}, {"color_jitter": 0.4}])
def test_colours_of_other_channels_are_not_changed(change):
    four = {"mean": [0.5] * 4, "std": [0.2] * 4}
    with pytest.raises(ValueError, match=r"^data\.channels=4: .*augmentation\.randaugment=null .*color_jitter=0$"):
        finetuning_transform((32, 32), **{**FINETUNING, **four, **change})
    transform = finetuning_transform((32, 32), **{**FINETUNING, **four, "erasing": 1})
    assert transform(photo(4)).shape == (4, 32, 32)


def test_an_unknown_interpolation_is_refused():
    for refused in (lambda: finetuning_transform((8, 8), **{**FINETUNING, "interpolation": "area"}),
                    lambda: centre_transform((8, 8), interpolation="area")):  # fmt: skip
        with pytest.raises(ValueError, match=r"^data\.interpolation=area is unknown: choose bilinear or bicubic$"):
            refused()


def erased(probability, count, mean=(0.5, 0.4, 0.6), std=(0.12, 0.1, 0.13)):
    """Images whose noise is never cut off at black or white, and where it lies."""
    image = photo(size=(64, 64))
    erasing = NoiseErasing(probability, mean=mean, std=std)
    torch.manual_seed(0)
    results = [erasing(image) for _ in range(count)]
    return image, results, [(result != image).any(0) for result in results]


def test_the_probability_of_erasing():
    _, _, changed = erased(0.25, 800)
    assert 0.2 < sum(bool(where.any()) for where in changed) / 800 < 0.3


def test_erased_is_one_rectangle_and_the_rest_is_untouched():
    image, results, changed = erased(1.0, 50)
    for result, where in zip(results, changed, strict=True):
        rows, columns = where.any(1).nonzero().flatten(), where.any(0).nonzero().flatten()
        box = torch.zeros_like(where)
        box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        assert where[box].float().mean() > 0.99  # noise may meet the colour that was there
        assert 0.015 < box.float().mean() < 0.35
        assert torch.equal(result[:, ~box], image[:, ~box])


def test_the_noise_is_standard_normal_once_it_is_normalised():
    mean, std = (0.5, 0.4, 0.6), (0.12, 0.1, 0.13)
    _, results, changed = erased(1.0, 100, mean, std)
    for channel in range(3):
        noise = torch.cat([result[channel][where] for result, where in zip(results, changed, strict=True)])
        normalised = (noise.float() / 255 - mean[channel]) / std[channel]
        assert normalised.mean().abs() < 0.02
        assert normalised.std().item() == pytest.approx(1, abs=0.02)
        within = (normalised.abs() < 1).float().mean().item()
        assert within == pytest.approx(0.683, abs=0.015)


def test_noise_in_floats_is_normal_too_and_never_clipped():
    mean, std = [0.1, -3.0], [0.5, 2.0]
    settings = {"randaugment": None, "color_jitter": 0, "erasing": 1, "mean": mean, "std": std, "max_value": 10000}
    transform = finetuning_transform((64, 64), **{**FINETUNING, **settings})
    torch.manual_seed(0)
    image = torch.full((2, 80, 80), 123456.0)
    results = torch.stack([transform(image) for _ in range(100)])
    assert results.dtype == torch.float32
    erased_pixels = (results - 123456).abs() > 1
    assert 0.02 < erased_pixels.float().mean() < 0.4
    for channel in range(2):
        noise = results[:, channel][erased_pixels[:, channel]]
        normalised = (noise / 10000 - mean[channel]) / std[channel]
        assert normalised.mean().abs() < 0.02
        assert normalised.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("change", [{"randaugment": 0}, {"randaugment": 9}, {"color_jitter": 0.4}])
def test_colours_of_more_than_8_bits_are_not_changed(change):
    with pytest.raises(ValueError, match=r"^data\.max_value=65535: .*augmentation\.randaugment=null .*color_jitter=0$"):
        finetuning_transform((32, 32), **{**FINETUNING, "max_value": 65535, **change})


def mixed(**settings):
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    mixing = create_mixing(5, **{"mixup": 0, "cutmix": 0, "switch": 0.5, **settings})
    for seed in range(40):
        torch.manual_seed(seed)
        result, shares = mixing(images, labels)
        assert shares.shape == (6, 5)
        assert torch.allclose(shares.sum(1), torch.ones(6))
        yield images, labels, result, shares


def partner(labels, shares):
    """How much of the image behind it each one has got, from its label."""
    others = labels.roll(1)
    assert (labels != others)[1:].all()
    return shares[range(1, 6), others[1:]]


def test_mixup_blends_images_as_it_blends_labels():
    blends = []
    for images, labels, result, shares in mixed(mixup=0.8):
        share = partner(labels, shares)
        assert torch.allclose(share, share[:1].expand(5))  # one blend a batch
        blend = share[0]
        assert torch.allclose(result, (1 - blend) * images + blend * images.roll(1, 0), atol=1e-6)
        blends.append(float(blend))
    assert min(blends) < 0.15 and max(blends) > 0.85


def test_cutmix_pastes_as_much_as_the_label_says():
    areas = []
    for images, labels, result, shares in mixed(cutmix=1.0):
        pasted = (result != images).any(1)
        assert torch.equal(result.permute(0, 2, 3, 1)[pasted], images.roll(1, 0).permute(0, 2, 3, 1)[pasted])
        areas.append(float(pasted[1:].float().mean()))
        assert torch.allclose(partner(labels, shares), torch.tensor(areas[-1]), atol=1e-5)
    assert min(areas) < 0.15 and max(areas) > 0.6


@pytest.mark.parametrize("switch", [0.0, 0.3, 1.0])
def test_the_switch_is_the_share_of_cutmix(switch):
    pasted = [bool((result == images).any()) for images, _, result, _ in mixed(mixup=0.8, cutmix=1.0, switch=switch)]
    assert sum(pasted) / len(pasted) == pytest.approx(switch, abs=0.15)


def test_nothing_is_mixed_where_nothing_is_wanted():
    assert create_mixing(5, mixup=0, cutmix=0, switch=0.5) is None


@pytest.mark.parametrize("size", [(256, 256), (300, 400), (500, 333)])
def test_a_share_of_the_centre_is_the_usual_resize_and_crop(size):
    """Resized to 256 px and cut to 224: the same part of the image, but for half a pixel of rounding."""
    image = photo(size=size)
    usual = v2.Compose([v2.Resize(256, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224)])
    ours = centre_transform((224, 224), share=0.875, interpolation="bicubic")(image)
    difference = (ours.float() - usual(image).float()).abs()
    whole = centre_transform((224, 224), interpolation="bicubic")(image)
    assert difference.mean() < 1.5
    assert (whole.float() - usual(image).float()).abs().mean() > 5 * difference.mean()
