"""Which of timm's models are FNets and which are SRNets, and how to make one from its name.

Models live in timm's registry. This module remembers only what timm has no place for: a model's
kind and, for an FNet, the face template its crops are aligned to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar, overload

import timm
import torch
from timm.models import (
    get_arch_name,
    get_pretrained_cfg,
    is_model,
    list_models,
    register_model,
    split_model_name_tag,
)
from torch import nn

from idloss.errors import did_you_mean
from idloss.geometry import TEMPLATES, Template, get_template
from idloss.plugins import load_plugins

_EntryPoint = TypeVar("_EntryPoint", bound=Callable[..., nn.Module])

_HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
_NORMALISATION = ("input_size", "mean", "std")

_fnet_crops: dict[str, str | Template | None] = {}  # architecture -> template, None: stretched
_srnets: set[str] = set()


@overload
def register_fnet(fn: _EntryPoint) -> _EntryPoint: ...
@overload
def register_fnet(
    *, crop: str | Template | None = None
) -> Callable[[_EntryPoint], _EntryPoint]: ...
def register_fnet(
    fn: _EntryPoint | None = None, *, crop: str | Template | None = None
) -> _EntryPoint | Callable[[_EntryPoint], _EntryPoint]:
    """Register an entry point with timm and mark it as a face recogniser (FNet).

    Args:
        fn: Entry point `fn(pretrained=False, **kwargs) -> nn.Module`, named as the model. Its
            module may hold timm's `default_cfgs`.
        crop: Template of the aligned crops that the model takes, such as `"sphereface"`; `None` if
            crops of any geometry are stretched to its input.

    Returns:
        The entry point, or a decorator when only `crop` is given.

    Raises:
        ValueError: If no template is called `crop`.
    """
    template = _checked_crop(crop) if crop is not None else None

    def register(entry_point: _EntryPoint) -> _EntryPoint:
        register_model(entry_point)
        _fnet_crops[entry_point.__name__] = template
        return entry_point

    return register if fn is None else register(fn)


def register_srnet(fn: _EntryPoint) -> _EntryPoint:
    """Register an entry point with timm and mark it as a super-resolution network (SRNet).

    Args:
        fn: Entry point `fn(pretrained=False, **kwargs) -> nn.Module`, named as the model. The
            model maps RGB `[B, 3, H, W]` in [0, 1] to RGB `[B, 3, scale * H, scale * W]`.

    Returns:
        The entry point.
    """
    register_model(fn)
    _srnets.add(fn.__name__)
    return fn


# "filter" is timm's name for the argument.
def list_fnets(
    filter: str | Sequence[str] = "",  # noqa: A002
    *,
    pretrained: bool = False,
) -> list[str]:
    """Names of the registered FNets, plug-ins included.

    Args:
        filter: Wildcard or wildcards, as for `timm.list_models`.
        pretrained: Only `arch.tag` names that have weights.

    Returns:
        The names in natural order.
    """
    load_plugins()
    return [
        name for name in list_models(filter, pretrained=pretrained) if _arch(name) in _fnet_crops
    ]


def list_srnets(
    filter: str | Sequence[str] = "",  # noqa: A002
    *,
    pretrained: bool = False,
) -> list[str]:
    """Names of the registered SRNets, plug-ins included.

    Args:
        filter: Wildcard or wildcards, as for `timm.list_models`.
        pretrained: Only `arch.tag` names that have weights.

    Returns:
        The names in natural order.
    """
    load_plugins()
    return [name for name in list_models(filter, pretrained=pretrained) if _arch(name) in _srnets]


def fnet_crop(name: str) -> str | Template | None:
    """Template of the crops that a registered FNet takes.

    Args:
        name: `arch` or `arch.tag` of a registered FNet.

    Returns:
        The template's name; `None` if crops of any geometry are stretched to the FNet's input.

    Raises:
        ValueError: If no FNet has that name.
    """
    load_plugins()
    return _fnet_crops[_known(name, "FNet", _fnet_crops)]


def create_fnet(
    fnet: str | nn.Module,
    *,
    pretrained: bool = False,
    crop: str | Template | None = "auto",
    input_size: tuple[int, int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Make a face recogniser that says what it takes and what it gives.

    A `"timm/..."` backbone loses its classification head. A model of the Hub or of a folder is
    taken as it was published, because many face recognisers end in a linear layer that *is* the
    embedding; `num_classes=0` strips it.

    Args:
        fnet: A registered FNet (`"sface"`, `"sface.casia_webface"`), any timm model
            (`"timm/resnet18"`), `"hf-hub:owner/name"`, `"local-dir:path"`, or a module from
            normalised RGB `[B, 3, H, W]` to embeddings `[B, D]`.
        pretrained: Load the weights; has no effect on a module.
        crop: Template of the crops the network takes, `None` if crops are stretched to its input.
            `"auto"`: what it was registered with, else the template whose size is its input's.
        input_size: `(3, H, W)` of the input; like `mean` and `std` it replaces what the network's
            `pretrained_cfg` says, and must be given for a module that has none.
        mean: Mean of RGB [0, 1] that the input is normalised with.
        std: Standard deviation likewise.
        **kwargs: Passed on to the entry point through `timm.create_model`.

    Returns:
        The network, with `num_features` (the D of its embeddings), `pretrained_cfg` (with
        `input_size`, `mean`, `std`) and `crop`.

    Raises:
        TypeError: If `fnet` is neither a name nor a module, or options are given with a module.
        ValueError: If the name or the crop is unknown, or a module says nothing of its input.
    """
    if isinstance(fnet, nn.Module):
        if kwargs:
            raise TypeError(
                f"create_fnet got a {type(fnet).__name__}, which is already built, and options "
                f"for building one: {', '.join(sorted(kwargs))}"
            )
        model = fnet
    else:
        load_plugins()
        model = _build_fnet(fnet, pretrained, kwargs)
    _describe_input(model, kwargs.get("img_size"), input_size=input_size, mean=mean, std=std)
    _describe_output(model)
    model.crop = _resolve_crop(model, crop)  # type: ignore[assignment]
    return model


def create_srnet(srnet: str | nn.Module, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Make a super-resolution network.

    Args:
        srnet: A registered SRNet (`"edsr16_64"`, `"bicubic"`), `"hf-hub:owner/name"`,
            `"local-dir:path"`, or a module, which is returned as it is.
        pretrained: Load the weights; has no effect on a module.
        **kwargs: Passed on to the entry point, such as `scale=8`.

    Returns:
        The network: RGB `[B, 3, H, W]` in [0, 1] to RGB of `scale` times the size.

    Raises:
        TypeError: If `srnet` is neither a name nor a module, or options are given with a module.
        ValueError: If the name is unknown.
    """
    if isinstance(srnet, nn.Module):
        if kwargs:
            raise TypeError(
                f"create_srnet got a {type(srnet).__name__}, which is already built, and options "
                f"for building one: {', '.join(sorted(kwargs))}"
            )
        return srnet
    load_plugins()
    _check_is_name(srnet, "SRNet")
    if not srnet.startswith(_HUB_PREFIXES):
        _known(srnet, "SRNet", _srnets)
        return _timm_create(srnet, pretrained, kwargs)
    model = _timm_create(srnet, pretrained, kwargs)
    if _arch_of(model) not in _srnets:
        raise ValueError(f"{srnet!r} holds a {_arch_of(model)}, which is not a registered SRNet")
    return model


def _checked_crop(crop: str | Template) -> str | Template:
    """A template that has a name is told by it, so that it can be written down."""
    template = get_template(crop)
    return template.name if TEMPLATES.get(template.name) == template else template


def _arch(name: str) -> str:
    """`arch` of `arch.tag`."""
    return str(get_arch_name(name))


def _timm_create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    return model


def _check_is_name(name: object, kind: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{kind} must be a name or a torch.nn.Module, got {type(name).__name__}")


def _known(name: str, kind: str, registered: Collection[str]) -> str:
    """Architecture of a registered name; did-you-mean for unknown architectures and tags."""
    arch, tag = split_model_name_tag(name)
    if arch not in registered:
        raise ValueError(did_you_mean(kind, name, registered) + _other_kind(name, arch, kind))
    tagged = list_models(arch, include_tags=True)
    if tag and name not in tagged:
        raise ValueError(did_you_mean(f"weights of {kind}", name, tagged))
    return str(arch)


def _other_kind(name: str, arch: str, kind: str) -> str:
    """What else a name is that was asked for as a kind it is not."""
    if arch in _fnet_crops or arch in _srnets:
        return f". {arch!r} is an {'SRNet' if kind == 'FNet' else 'FNet'}"
    if kind == "FNet" and is_model(arch):
        return f". A backbone of timm is asked for as 'timm/{name}'"
    return ""


def _build_fnet(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """Build an FNet from a name of any kind that `create_fnet` knows."""
    _check_is_name(name, "FNet")
    if name.startswith(_HUB_PREFIXES):
        if name.partition(":")[2].startswith("timm/"):
            kwargs = {"num_classes": 0, **kwargs}  # timm's own uploads are classifiers
        model = _timm_create(name, pretrained, kwargs)
        if "num_classes" not in kwargs and _is_headless(model):
            model.reset_classifier(0)  # type: ignore[operator]
        return model
    if name.startswith("timm/"):
        name = name.removeprefix("timm/")
        if not is_model(name):
            raise ValueError(did_you_mean("timm model", name, list_models()))
        return _timm_create(name, pretrained, {"num_classes": 0, **kwargs})
    _known(name, "FNet", _fnet_crops)
    return _timm_create(name, pretrained, kwargs)


def _arch_of(model: nn.Module) -> str | None:
    """Architecture that timm built the model from."""
    cfg = getattr(model, "pretrained_cfg", None)
    return cfg.get("architecture") if isinstance(cfg, dict) else None


def _is_headless(model: nn.Module) -> bool:
    """Whether it is an FNet that has a classifier only while it is trained."""
    arch = _arch_of(model)
    if arch not in _fnet_crops:
        return False
    cfg = get_pretrained_cfg(arch)
    return cfg is not None and cfg.num_classes == 0


def _describe_input(
    model: nn.Module, img_size: int | Sequence[int] | None = None, **given: Any
) -> None:
    """See to it that `model.pretrained_cfg` holds `input_size`, `mean` and `std`."""
    known = getattr(model, "pretrained_cfg", None) or {}
    cfg = dict(known if isinstance(known, dict) else known.to_dict())
    # what a network was built for, where it can be built for several sizes
    built_for = img_size or getattr(getattr(model, "patch_embed", model), "img_size", None)
    if built_for is not None:
        sides = (built_for, built_for) if isinstance(built_for, int) else tuple(built_for)
        cfg["input_size"] = (*tuple(cfg.get("input_size", (3,)))[:1], *sides)
    cfg.update({key: value for key, value in given.items() if value is not None})
    missing = [key for key in _NORMALISATION if key not in cfg]
    if missing:
        raise ValueError(
            f"{type(model).__name__} says nothing of its {', '.join(missing)}: pass "
            f"{', '.join(f'{key}=' for key in missing)} to create_fnet, or give the module a "
            "pretrained_cfg, as timm's models have (an FNet trained on inputs in [-1, 1] has "
            "mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))"
        )
    cfg.update({key: tuple(cfg[key]) for key in _NORMALISATION})
    if len(cfg["input_size"]) != 3:
        raise ValueError(f"input_size must be (3, H, W), got {cfg['input_size']}")
    model.pretrained_cfg = cfg  # type: ignore[assignment]


def _describe_output(model: nn.Module) -> None:
    """See to it that `model.num_features` is the width of what `forward` returns.

    What a module declares is checked by the first images that `FaceEncoder` shows it.
    """
    arch, width = _arch_of(model), getattr(model, "num_features", None)
    if arch not in _fnet_crops and arch is not None and is_model(arch):
        # timm's num_features is the trunk's width; its head may widen that (VGG, MobileNetV3),
        # and a kept head is what forward returns
        classes = getattr(model, "num_classes", 0)
        width = classes or getattr(model, "head_hidden_size", None) or width
    model.num_features = width or _probe_width(model)  # type: ignore[assignment]


@torch.no_grad()
def _probe_width(model: nn.Module) -> int:
    """Width of the embeddings of a foreign module, by running two empty images through it."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    floating = (tensor for tensor in model.parameters() if tensor.is_floating_point())
    reference = next(floating, torch.empty(0, dtype=torch.float32))
    size = (2, *cfg["input_size"])
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = False
    kind = type(model).__name__
    try:
        output = model(torch.zeros(size, device=reference.device, dtype=reference.dtype))
    # a stranger's network raises what it likes
    except Exception as error:
        raise ValueError(f"{kind} cannot take images {list(size)}: {error}") from error
    finally:
        for module, training in modes.items():
            module.training = training
    if isinstance(output, torch.Tensor) and output.ndim == 2 and len(output) == 2:
        return int(output.shape[1])
    raise ValueError(
        f"an FNet maps [B, 3, H, W] to embeddings [B, D]; {kind} gave {describe_output(output)} "
        f"for images {list(size)}: wrap it in a module whose forward returns the embeddings alone"
    )


def describe_output(output: Any) -> str:
    """What a network gave, in a few words."""
    if isinstance(output, torch.Tensor):
        return str(list(output.shape))
    if isinstance(output, dict):
        return (
            "{" + ", ".join(f"{key}: {describe_output(item)}" for key, item in output.items()) + "}"
        )
    if isinstance(output, (tuple, list)):
        return "(" + ", ".join(describe_output(item) for item in output) + ")"
    return type(output).__name__


def _resolve_crop(model: nn.Module, crop: str | Template | None) -> str | Template | None:
    if crop is None:
        return None
    if crop != "auto":
        return _checked_crop(crop)
    own = getattr(model, "crop", "")
    if own is None or isinstance(own, Template) or own in TEMPLATES:
        return own
    if _arch_of(model) in _fnet_crops:
        return _fnet_crops[str(_arch_of(model))]
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    size = tuple(cfg["input_size"][-2:])
    # Only crops of 112 rows: at 224 or 160 an input size says nothing of the alignment.
    return {(112, 96): "sphereface", (112, 112): "arcface"}.get(size)
