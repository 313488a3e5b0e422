"""torch.hub entry points: `torch.hub.load("<owner>/idloss", "edsr32_256_id")`.

Each loads pretrained weights unless told `pretrained=False`.
"""

from typing import Any as _Any

from torch.nn import Module as _Module

from idloss import IdentityPreservedLoss as _IdentityPreservedLoss
from idloss import create_fnet as _create_fnet
from idloss import create_srnet as _create_srnet

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors", "numpy", "einops"]


def edsr16_64(pretrained: bool = True, **kwargs: _Any) -> _Module:
    """EDSR x4, 16 blocks of 64 filters, image loss alone: RGB [0, 1] `[B, 3, h, w]` to x4.

    Args:
        pretrained: Load the weights.
        **kwargs: `scale`, `depth`, `width`, `res_scale` and other arguments of the network.
    """
    return _create_srnet("edsr16_64", pretrained=pretrained, **kwargs)


def edsr16_64_id(pretrained: bool = True, **kwargs: _Any) -> _Module:
    """EDSR x4, 16 blocks of 64 filters, identity-preserved (lambda 0.5).

    Args:
        pretrained: Load the weights.
        **kwargs: `scale`, `depth`, `width`, `res_scale` and other arguments of the network.
    """
    return _create_srnet("edsr16_64_id", pretrained=pretrained, **kwargs)


def edsr32_256(pretrained: bool = True, **kwargs: _Any) -> _Module:
    """EDSR x4, 32 blocks of 256 filters, image loss alone: RGB [0, 1] `[B, 3, h, w]` to x4.

    Args:
        pretrained: Load the weights.
        **kwargs: `scale`, `depth`, `width`, `res_scale` and other arguments of the network.
    """
    return _create_srnet("edsr32_256", pretrained=pretrained, **kwargs)


def edsr32_256_id(pretrained: bool = True, **kwargs: _Any) -> _Module:
    """EDSR x4, 32 blocks of 256 filters, identity-preserved (lambda 0.5).

    Args:
        pretrained: Load the weights.
        **kwargs: `scale`, `depth`, `width`, `res_scale` and other arguments of the network.
    """
    return _create_srnet("edsr32_256_id", pretrained=pretrained, **kwargs)


def sface(pretrained: bool = True, **kwargs: _Any) -> _Module:
    """SFace (SphereFace-20), the paper's FNet: normalised RGB `[B, 3, 112, 96]` to `[B, 512]`.

    Args:
        pretrained: Load the weights.
        **kwargs: Passed on to the network.
    """
    return _create_fnet("sface", pretrained=pretrained, **kwargs)


def vgg_face(pretrained: bool = True, **kwargs: _Any) -> _Module:
    """VGG-Face, fc7 before ReLU: normalised RGB `[B, 3, 224, 224]` to `[B, 4096]`.

    Args:
        pretrained: Load the weights.
        **kwargs: `layer` ("fc6", "fc7", "fc8") and other arguments of the network.
    """
    return _create_fnet("vgg_face", pretrained=pretrained, **kwargs)


def mobilefacenet(pretrained: bool = True, **kwargs: _Any) -> _Module:
    """MobileFaceNet: normalised RGB `[B, 3, 112, 112]` to `[B, 128]`.

    Args:
        pretrained: Load the weights.
        **kwargs: Passed on to the network.
    """
    return _create_fnet("mobilefacenet", pretrained=pretrained, **kwargs)


def identity_preserved_loss(fnet: str = "sface", **kwargs: _Any) -> _Module:
    """The identity-preserved loss: `loss(sr, hr)`.

    Args:
        fnet: Name of the face recogniser.
        **kwargs: Arguments of `idloss.IdentityPreservedLoss`, `pretrained=True` among them.
    """
    return _IdentityPreservedLoss(fnet, **kwargs)
