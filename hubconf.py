"""torch.hub entry points: `torch.hub.load("<owner>/idloss", "edsr32_256_id")`.

Each loads pretrained weights unless told `pretrained=False`.
"""

from collections.abc import Callable as _Callable
from typing import Any as _Any

from timm.models import model_entrypoint as _model_entrypoint
from torch.nn import Module as _Module

from idloss import IdentityPreservedLoss as _IdentityPreservedLoss
from idloss import create_fnet as _create_fnet
from idloss import create_srnet as _create_srnet

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors", "numpy", "einops"]

_NETWORKS: dict[_Callable[..., _Module], tuple[str, ...]] = {
    _create_srnet: ("edsr16_64", "edsr16_64_id", "edsr32_256", "edsr32_256_id"),
    _create_fnet: ("sface", "vgg_face", "mobilefacenet"),
}


def _entry_point(create: _Callable[..., _Module], name: str) -> _Callable[..., _Module]:
    def load(pretrained: bool = True, **kwargs: _Any) -> _Module:
        return create(name, pretrained=pretrained, **kwargs)

    load.__name__ = load.__qualname__ = name
    load.__doc__ = (
        f"{_model_entrypoint(name).__doc__}\n\n"
        "    Args:\n"
        "        pretrained: Load the weights.\n"
        "        **kwargs: Arguments of the network.\n"
    )
    return load


# torch.hub lists the functions that stand in this module.
globals().update(
    {name: _entry_point(create, name) for create, names in _NETWORKS.items() for name in names}
)


def fnet(name: str, pretrained: bool = True, **kwargs: _Any) -> _Module:
    """Any face recogniser that `idloss.create_fnet` knows.

    Args:
        name: Its name, such as `"hf-hub:owner/name"`.
        pretrained: Load the weights.
        **kwargs: Arguments of the network.
    """
    return _create_fnet(name, pretrained=pretrained, **kwargs)


def srnet(name: str, pretrained: bool = True, **kwargs: _Any) -> _Module:
    """Any super-resolution network that `idloss.create_srnet` knows.

    Args:
        name: Its name, such as `"hf-hub:owner/name"`.
        pretrained: Load the weights.
        **kwargs: Arguments of the network.
    """
    return _create_srnet(name, pretrained=pretrained, **kwargs)


def identity_preserved_loss(fnet: str = "sface", **kwargs: _Any) -> _Module:
    """The identity-preserved loss: `loss(sr, hr)`.

    Args:
        fnet: Name of the face recogniser.
        **kwargs: Arguments of `idloss.IdentityPreservedLoss`, `pretrained=True` among them.
    """
    return _IdentityPreservedLoss(fnet, **kwargs)
