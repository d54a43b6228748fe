"""SimMIM around other libraries' Swin Transformer V2, with the same weights as ours: what the benchmark compares.

Each peer is that library's own encoder, unchanged, between the mask token and the linear head of SimMIM. They are
extras: a library that is not installed is refused with one line.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.encoders import Encoder, SwinTransformerV2
from simmim.encoders.names import to_timm, to_torchvision, to_transformers
from simmim.encoders.swinv2 import V2
from simmim.masking import expand_mask
from simmim.tasks.pretraining import MaskedImageModel

EXTRAS = {"timm": "timm", "transformers": "hf"}
"""What of this package brings a library along."""


def create_peer(name: str, network: MaskedImageModel, image_size: tuple[int, int]) -> nn.Module:
    """A peer with the weights of one of our networks, whose `forward(images, mask)` returns the loss.

    Args:
        name: "timm", "transformers" or "torchvision".
        network: Ours, with a linear head, raw targets and the L1 loss.
        image_size: Height and width in pixels.

    Raises:
        ValueError: If the name is unknown, the library is not installed, or it cannot build this geometry.
    """
    if name not in PEERS:
        raise ValueError(f"peers={name} is unknown: choose from {', '.join(PEERS)}")
    try:
        import_module(name)
    except ImportError as error:
        way = f"pip install 'simmim[{EXTRAS[name]}]'" if name in EXTRAS else f"pip install {name}"
        raise ValueError(f"peers={name} is not installed: {way}, or leave it out of peers") from error
    return PEERS[name](network, image_size)


class TimmPeer(nn.Module):
    """timm's `SwinTransformerV2` with a mask token and a linear head."""

    def __init__(self, network: MaskedImageModel, image_size: tuple[int, int]) -> None:
        super().__init__()
        from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2

        config = _geometry(network.encoder)
        self.encoder = TimmSwinV2(
            img_size=image_size,
            patch_size=config["patch_size"],
            in_chans=config["in_channels"],
            num_classes=0,
            embed_dim=config["embed_dim"],
            depths=config["depths"],
            num_heads=config["num_heads"],
            window_size=config["window_size"],
            drop_path_rate=config["drop_path"],
        )
        weights = to_timm(network.encoder.state_dict())
        _load(self.encoder, weights)
        self.mask_token = nn.Parameter(network.encoder.mask_token.detach().clone())
        self.head = _copy_head(network)
        self.stride = network.encoder.stride

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """The SimMIM loss."""
        x = _hide(self.encoder.patch_embed(images), mask, self.mask_token)  # (B, H, W, C)
        features = self.encoder.norm(self.encoder.layers(x))
        return _loss(self.head, features, images, mask, self.stride)


class TorchvisionPeer(nn.Module):
    """torchvision's `SwinTransformer` with its V2 blocks, a mask token and a linear head."""

    def __init__(self, network: MaskedImageModel, image_size: tuple[int, int]) -> None:
        super().__init__()
        from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

        config = _geometry(network.encoder)
        sides = [s // (config["patch_size"] * 2**i) for s in image_size for i in range(len(config["depths"]))]
        if any(side % config["window_size"] for side in sides):
            raise ValueError(
                f"peers=torchvision pads every map to whole windows of model.window_size={config['window_size']} "
                f"where the others shrink the window, on {image_size[0]}x{image_size[1]} px: another function"
            )
        self.encoder = SwinTransformer(
            patch_size=[config["patch_size"]] * 2,
            embed_dim=config["embed_dim"],
            depths=config["depths"],
            num_heads=config["num_heads"],
            window_size=[config["window_size"]] * 2,
            stochastic_depth_prob=config["drop_path"],
            block=SwinTransformerBlockV2,
            downsample_layer=PatchMergingV2,
        )
        self.encoder.head = nn.Identity()
        _load(self.encoder, to_torchvision(network.encoder.state_dict()))
        self.mask_token = nn.Parameter(network.encoder.mask_token.detach().clone())
        self.head = _copy_head(network)
        self.stride = network.encoder.stride

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """The SimMIM loss."""
        x = _hide(self.encoder.features[0](images), mask, self.mask_token)  # (B, H, W, C)
        features = self.encoder.norm(self.encoder.features[1:](x))
        return _loss(self.head, features, images, mask, self.stride)


class TransformersPeer(nn.Module):
    """transformers' `Swinv2ForMaskedImageModeling`, loss included. It adds the mask of shifted windows twice."""

    def __init__(self, network: MaskedImageModel, image_size: tuple[int, int]) -> None:
        super().__init__()
        from transformers import Swinv2Config, Swinv2ForMaskedImageModeling

        config = _geometry(network.encoder)
        if image_size[0] != image_size[1]:
            raise ValueError(
                f"peers=transformers reconstructs square images only, not {image_size[0]}x{image_size[1]} px"
            )
        self.network = Swinv2ForMaskedImageModeling(
            Swinv2Config(
                image_size=image_size[0],
                patch_size=config["patch_size"],
                num_channels=config["in_channels"],
                embed_dim=config["embed_dim"],
                depths=config["depths"],
                num_heads=config["num_heads"],
                window_size=config["window_size"],
                drop_path_rate=config["drop_path"],
                encoder_stride=network.encoder.stride,
            )
        )
        _load(self.network.swinv2, to_transformers(network.encoder.state_dict()))
        head = _copy_head(network)
        self.network.decoder[0].weight = nn.Parameter(head.weight.detach()[:, :, None, None].clone())
        self.network.decoder[0].bias = head.bias
        self.patches = [side // config["patch_size"] for side in image_size]

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """The SimMIM loss."""
        hidden = expand_mask(mask, *self.patches).flatten(1)  # (B, patches)
        loss: Tensor = self.network(images, bool_masked_pos=hidden).loss
        return loss


PEERS: dict[str, Callable[[MaskedImageModel, tuple[int, int]], nn.Module]] = {
    "timm": TimmPeer,
    "transformers": TransformersPeer,
    "torchvision": TorchvisionPeer,
}


def _geometry(encoder: Encoder) -> dict[str, Any]:
    if not isinstance(encoder, SwinTransformerV2):
        raise ValueError(f"peers are Swin V2, and the model is a {encoder.title}: give peers=[]")
    if encoder.config["extra_norm_every"]:
        raise ValueError("peers have no extra norms: model=swinv2_h and swinv2_g are ours alone, give peers=[]")
    if other := [f"model.{key}={encoder.config[key]}" for key in V2 if encoder.config[key] != V2[key]]:
        raise ValueError(f"peers are Swin V2, without {other[0]}: give peers=[]")
    return encoder.config


def _hide(x: Tensor, mask: Tensor, token: Tensor) -> Tensor:
    hidden = expand_mask(mask, *x.shape[1:3]).unsqueeze(-1)
    return torch.where(hidden, token.to(x.dtype), x)


def _loss(head: nn.Linear, features: Tensor, images: Tensor, mask: Tensor, stride: int) -> Tensor:
    """As released: the whole image predicted, the error weighted by the mask."""
    predicted = F.pixel_shuffle(head(features).permute(0, 3, 1, 2), stride)
    error = F.l1_loss(predicted, images, reduction="none")
    hidden = expand_mask(mask, *images.shape[-2:])[:, None]
    return (error * hidden).sum() / (hidden.sum() + 1e-5) / images.shape[1]


def _copy_head(network: MaskedImageModel) -> nn.Linear:
    head = network.head
    assert isinstance(head, nn.Linear)
    copy = nn.Linear(head.in_features, head.out_features)
    copy.load_state_dict(head.state_dict())
    return copy


def _load(encoder: nn.Module, weights: dict[str, Tensor]) -> None:
    missing, unexpected = encoder.load_state_dict(weights, strict=False)
    buffers = {name for name, _ in encoder.named_buffers()}
    assert not unexpected and set(missing) <= buffers, (missing, unexpected)
