"""SimMIM against transformers' `Swinv2ForMaskedImageModeling`: reconstruction, loss and all gradients."""

import pytest
import torch
from torch import Tensor, nn
from transformers import Swinv2Config, Swinv2ForMaskedImageModeling
from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer

from simmim.encoders import create_encoder
from simmim.encoders.names import from_transformers
from simmim.masking import expand_mask
from simmim.tasks.pretraining import MaskedImageModel

SIZE = 128
WINDOW = 8


def models() -> tuple[MaskedImageModel, Swinv2ForMaskedImageModeling]:
    """The same random weights in both; post-norms too, which ours starts at zero."""
    size = {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [3, 3, 6, 12]}
    theirs = Swinv2ForMaskedImageModeling(
        Swinv2Config(image_size=SIZE, window_size=WINDOW, drop_path_rate=0.0, encoder_stride=32, **size)
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2 * noise)
    encoder = create_encoder("swinv2", window_size=WINDOW, extra_norm_every=0, **size)
    ours = MaskedImageModel(
        encoder,
        head="linear",
        loss="l1",
        predict="hidden",
        target="raw",
        target_window=47,
        target_downsampling=1,
    )
    ours.load_state_dict(renamed(theirs.state_dict()))
    return ours, theirs


def renamed(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of theirs in our names; their head is a 1x1 convolution."""
    encoder = {f"encoder.{key}": value for key, value in from_transformers(theirs).items()}
    head = {"head.weight": theirs["decoder.0.weight"].flatten(1), "head.bias": theirs["decoder.0.bias"]}
    return encoder | head


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_equals_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers adds its mask of -100 twice, where the authors add it once: halved, the two agree.
    original = Swinv2Layer.get_attn_mask
    monkeypatch.setattr(Swinv2Layer, "get_attn_mask", lambda *args, **kwargs: halved(original(*args, **kwargs)))
    ours, theirs = models()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, SIZE, SIZE, generator=generator)
    mask = torch.rand(3, SIZE // 32, SIZE // 32, generator=generator) < torch.tensor([0.3, 0.6, 0.8]).view(3, 1, 1)
    expected = theirs(images, bool_masked_pos=expand_mask(mask, SIZE // 4, SIZE // 4).flatten(1))
    torch.testing.assert_close(ours.reconstruct(images, mask), expected.reconstruction, atol=1e-4, rtol=0)
    loss = ours(images, mask)
    torch.testing.assert_close(loss, expected.loss, atol=1e-6, rtol=1e-6)
    loss.backward()
    expected.loss.backward()
    found, wanted = gradients(ours), renamed(gradients(theirs))
    assert found.keys() == wanted.keys() == dict(ours.named_parameters()).keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() < 1e-3 * wanted[name].norm(), name


def halved(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask / 2
