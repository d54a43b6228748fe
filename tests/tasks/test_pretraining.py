import pytest
import torch
import torch.nn.functional as F

from simmim.encoders import create_encoder
from simmim.masking import Masking, expand_mask
from simmim.seeding import generator_from
from simmim.targets import normalize_locally
from simmim.tasks.pretraining import MaskedImageModel

OBJECTIVE = {
    "head": "linear",
    "loss": "l1",
    "predict": "hidden",
    "target": "raw",
    "target_window": 7,
    "target_downsampling": 1,
}


def model(channels=3, **objective):
    torch.manual_seed(0)
    encoder = create_encoder(
        "swinv2",
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 4],
        extra_norm_every=0,
        window_size=4,
        patch_size=2,
        in_channels=channels,
    )
    for parameter in encoder.parameters():  # post-norms start at zero: move them, so that every branch counts
        torch.nn.init.normal_(parameter, std=0.3)
    return MaskedImageModel(encoder, **{**OBJECTIVE, **objective})


def batch(channels=3, patch_size=16, size=64, ratio=0.6):
    torch.manual_seed(1)
    masking = Masking((size, size), patch_size=patch_size, ratio=ratio, strategy="random", model_patch_size=2)
    return torch.randn(3, channels, size, size), torch.stack([masking(generator_from(i)) for i in range(3)])


def full_prediction(network, images, mask):
    """Every token through the head as a 1x1 convolution and pixel shuffle, as the released code does."""
    features = network.encoder(images, mask).permute(0, 3, 1, 2)
    predicted = F.conv2d(features, network.head.weight[:, :, None, None], network.head.bias)
    return F.pixel_shuffle(predicted, network.side)


@pytest.mark.parametrize("patch_size", [2, 8, 16, 32])
@pytest.mark.parametrize("channels", [1, 3, 4, 14])
def test_the_loss_of_the_needed_tokens_is_the_released_formula_on_all_of_them(patch_size, channels):
    network = model(channels)
    images, mask = batch(channels, patch_size)
    hidden = expand_mask(mask, 64, 64)[:, None].float()
    error = (images - full_prediction(network, images, mask)).abs()
    expected = (error * hidden).sum() / (hidden.sum() + 1e-5) / channels
    loss = network(images, mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours = torch.autograd.grad(loss, list(network.parameters()))
    theirs = torch.autograd.grad(expected, list(network.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_head_runs_on_hidden_tokens_only():
    network = model()
    images, mask = batch()
    seen = []
    network.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    network(images, mask)
    assert seen == [(int(mask.sum()), 128)]


@pytest.mark.parametrize(
    ("loss", "function"),
    [("l1", F.l1_loss), ("l2", F.mse_loss), ("smooth_l1", F.smooth_l1_loss)],
)
def test_loss_functions(loss, function):
    network = model(loss=loss)
    images, mask = batch()
    hidden = expand_mask(mask, 64, 64)[:, None].expand_as(images)
    expected = function(full_prediction(network, images, mask)[hidden], images[hidden])
    assert network(images, mask).item() == pytest.approx(expected.item(), rel=1e-5)


def test_predicting_all_pixels_counts_the_visible_ones_too():
    network = model(predict="all")
    images, mask = batch()
    expected = F.l1_loss(full_prediction(network, images, mask), images)
    assert network(images, mask).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_normalised_target():
    network = model(target="normalized")
    images, mask = batch()
    hidden = expand_mask(mask, 64, 64)[:, None].expand_as(images)
    target = normalize_locally(images, 7)
    expected = F.l1_loss(full_prediction(network, images, mask)[hidden], target[hidden])
    assert network(images, mask).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_coarser_target():
    network = model(target_downsampling=4)
    images, mask = batch()
    hidden = expand_mask(mask, 16, 16)[:, None].expand(3, 3, 16, 16)
    expected = F.l1_loss(full_prediction(network, images, mask)[hidden], F.avg_pool2d(images, 4)[hidden])
    assert network(images, mask).item() == pytest.approx(expected.item(), rel=1e-5)
    assert network.reconstruct(images, mask).shape == images.shape


def test_the_two_layer_head_is_another_function_of_the_same_shape():
    network = model(head="mlp")
    images, mask = batch()
    assert network(images, mask).isfinite()
    assert network.reconstruct(images, mask).shape == images.shape
    tokens = torch.randn(5, 128)
    bent = network.head(tokens) + network.head(-tokens) - 2 * network.head(0 * tokens)  # 0 of a single layer
    assert bent.abs().max() > 0.01


def test_only_hidden_pixels_reach_the_loss():
    """Gradients prove it: of the target on hidden pixels, of the input on visible ones, of nothing on both."""
    network = model()
    images, mask = batch()
    hidden = expand_mask(mask, 64, 64)[:, None].expand_as(images)
    images.requires_grad_()
    features = network.encoder(images, mask)
    through_encoder = torch.autograd.grad(features.square().sum(), images)[0]
    assert (through_encoder[hidden] == 0).all()
    assert (through_encoder[~hidden] != 0).any()
    network.encoder.requires_grad_(False)
    prediction = network.head(network.encoder(images.detach(), mask))
    target = network.to_tokens(network.target(images)).flatten(3)
    counted = network.to_tokens(network.counted_pixels(mask, images)).expand(-1, -1, -1, 3, -1).flatten(3)
    through_target = torch.autograd.grad(network.mean_error(prediction, target, counted), images)[0]
    assert (through_target[~hidden] == 0).all()
    assert (through_target[hidden] != 0).all()


def test_the_reconstruction_is_what_the_loss_compares():
    network = model()
    images, mask = batch()
    assert torch.allclose(network.reconstruct(images, mask), full_prediction(network, images, mask), atol=1e-5)


def test_a_perfect_prediction_of_the_normalised_target_reconstructs_the_image():
    network = model(target="normalized")
    images, mask = batch()
    perfect = network.to_tokens(network.target(images)).flatten(3)
    network.encoder.forward = lambda images, mask: perfect
    network.head = torch.nn.Identity()
    assert torch.allclose(network.reconstruct(images, mask), images, atol=1e-4)


def test_the_trivial_predictor_is_the_mean_of_the_visible_pixels():
    network = model()
    images, mask = batch()
    hidden = expand_mask(mask, 64, 64)
    total = 0.0
    for image, where in zip(images, hidden, strict=True):
        for channel in image:
            total += (channel[where] - channel[~where].mean()).abs().sum().item()
    expected = total / (3 * hidden.sum().item())
    assert network.visible_mean_loss(images, mask).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"loss": "huber"}, "objective.loss=huber is unknown: choose one of l1, l2, smooth_l1"),
        ({"head": "deep"}, "objective.head=deep"),
        ({"predict": "visible"}, "objective.predict=visible"),
        ({"target": "edges"}, "objective.target=edges"),
        ({"target_downsampling": 3}, "objective.target_downsampling=3 must divide the encoder's stride of 16 px"),
        ({"target_window": 8}, "objective.target_window=8 must be odd"),
    ],
)
def test_bad_options_are_refused(objective, words):
    with pytest.raises(ValueError) as error:
        model(**objective)
    assert words in str(error.value)
