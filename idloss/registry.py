"""Which of timm's models are FNets and which are SRNets, and the crops that they take.

Models live in timm's registry. This module remembers only what timm has no place for: a model's
kind and the face template that its crops are aligned to. `idloss.create` makes networks of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatch
from typing import Any, TypeVar, overload

import torch
from timm.models import (
    is_model,
    list_models,
    model_entrypoint,
    register_model,
    split_model_name_tag,
)
from torch import nn

from idloss.errors import did_you_mean, some_of
from idloss.geometry import TEMPLATES, Template, get_template
from idloss.plugins import load_plugins
from idloss.weights.files import NotFoundError
from idloss.weights.loading import ChannelOrder, build_model, reverse_input

_EntryPoint = TypeVar("_EntryPoint", bound=Callable[..., nn.Module])

# What timm.create_model hands on of its own, if only to say that there is none.
_TIMMS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_model_args")

fnet_crops: dict[str, str | Template | None] = {}
"""Templates of the FNets by architecture; None if crops are stretched."""

srnet_crops: dict[str, str | Template] = {}
"""Templates of the SRNets by architecture."""

_bgr: set[str] = set()  # architectures of FNets whose own weights take BGR

SRNET_CROP = "sphereface"
"""The crop of an SRNet that says nothing: 112x96 (paper, section 4.1)."""

YOUR_OWN = (
    "\nYour own: a module, 'local-dir:FOLDER', 'hf-hub:OWNER/NAME', 'timm/BACKBONE', or "
    "create_fnet(KNOWN, checkpoint=FILE)"
)
"""The end of an error about an FNet whose name is like none that is known."""

# What create_srnet calls them, which are no names to claim among all models of timm.
_BASELINES = {
    f"interpolation_{name}": name
    for name in ("bicubic", "bilinear", "bicubic_arcface", "bilinear_arcface")
}


@overload
def register_fnet(fn: _EntryPoint) -> _EntryPoint: ...
@overload
def register_fnet(
    *, crop: str | Template | None = None, channel_order: ChannelOrder = "rgb"
) -> Callable[[_EntryPoint], _EntryPoint]: ...
def register_fnet(
    fn: _EntryPoint | None = None,
    *,
    crop: str | Template | None = None,
    channel_order: ChannelOrder = "rgb",
) -> _EntryPoint | Callable[[_EntryPoint], _EntryPoint]:
    """Register an entry point with timm and mark it as a face recogniser (FNet).

    Args:
        fn: Entry point `fn(pretrained=False, **kwargs) -> nn.Module`, named as the model. Its
            module may hold timm's `default_cfgs`.
        crop: Template of the aligned crops that the model takes, such as `"sphereface"`; `None` if
            crops of any geometry are stretched to its input.
        channel_order: What the network takes with the weights that its entry point loads; of
            `"bgr"`, the first convolution's input is reversed, so that it takes RGB like all here.

    Returns:
        The entry point, or a decorator when only options are given.

    Raises:
        ValueError: If no template is called `crop`, or another model has the name.
    """
    template = checked_crop(crop) if crop is not None else None
    check_order(channel_order)

    def register(entry_point: _EntryPoint) -> _EntryPoint:
        _register(entry_point, channel_order)
        fnet_crops[entry_point.__name__] = template
        return entry_point

    return register if fn is None else register(fn)


@overload
def register_srnet(fn: _EntryPoint) -> _EntryPoint: ...
@overload
def register_srnet(
    *, crop: str | Template = SRNET_CROP
) -> Callable[[_EntryPoint], _EntryPoint]: ...
def register_srnet(
    fn: _EntryPoint | None = None, *, crop: str | Template = SRNET_CROP
) -> _EntryPoint | Callable[[_EntryPoint], _EntryPoint]:
    """Register an entry point with timm and mark it as a super-resolution network (SRNet).

    Args:
        fn: Entry point `fn(pretrained=False, **kwargs) -> nn.Module`, named as the model. The
            model maps RGB `[B, 3, H, W]` in [0, 1] to RGB `[B, 3, scale * H, scale * W]`.
        crop: Template of the crops that it makes: `"sphereface"` (112x96), `"arcface"` (112x112)
            for recognisers of today, `"ffhq"` for restorers of 512x512, ...

    Returns:
        The entry point, or a decorator when only `crop` is given.

    Raises:
        ValueError: If no template is called `crop`, or another model has the name.
    """
    template = checked_crop(crop)

    def register(entry_point: _EntryPoint) -> _EntryPoint:
        _register(entry_point)
        srnet_crops[entry_point.__name__] = template
        return entry_point

    return register if fn is None else register(fn)


def _register(fn: Callable[..., nn.Module], channel_order: ChannelOrder = "rgb") -> None:
    """Register an entry point with timm, unless its name is taken by another module's."""
    name = fn.__name__
    if is_model(name) and (owner := model_entrypoint(name).__module__) != fn.__module__:
        raise ValueError(f"{fn.__module__} registers {name!r}, which is a model of {owner}: rename")
    entry_point = fn if fn.__module__.startswith("idloss.") else _forgiving(fn)
    if channel_order == "bgr":
        _bgr.add(name)
        entry_point = _reversing(entry_point)
    register_model(entry_point)


def _forgiving(fn: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """An entry point that need not know what timm hands on, and never gives random weights."""

    @functools.wraps(fn)
    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        handed = {key: kwargs.pop(key) for key in _TIMMS if key in kwargs}
        handed = {key: value for key, value in handed.items() if value is not None}
        cfg = handed.get("pretrained_cfg")
        source = cfg.get("source") if isinstance(cfg, dict) else None
        try:
            try:
                # our own load all they have, or fail: nothing is drawn
                if pretrained and source is None and not fn.__module__.startswith("idloss."):
                    return _trained(fn, {**handed, **kwargs})
                model = fn(pretrained=pretrained, **handed, **kwargs)
                if not pretrained or source == cfg_of(model).get("source"):
                    return model
            except TypeError as error:
                if not any(repr(key) in str(error) for key in handed):
                    raise
            plain = functools.partial(_plain, fn, kwargs)
            return build_model(lambda **_: plain(), fn.__name__, pretrained, **handed)
        except SystemExit as error:
            raise RuntimeError(f"{fn.__module__}.{fn.__name__} called sys.exit({error})") from error

    return entry_point


def _reversing(fn: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """An entry point whose own weights take BGR, for those who have RGB."""

    @functools.wraps(fn)
    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model = fn(pretrained=pretrained, **kwargs)
        cfg, overlay = kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay") or {}
        # what was saved from here, or given in place of its own, takes RGB
        saved = isinstance(cfg, dict) and cfg.get("source") in ("hf-hub", "local-dir")
        if pretrained and not saved and not overlay.keys() & {"file", "state_dict"}:
            reverse_first(model, fn.__name__)
        return model

    return entry_point


def _plain(fn: Callable[..., nn.Module], kwargs: dict[str, Any]) -> nn.Module:
    """Build without what timm writes into every config.json, where the network does not take it."""
    try:
        return fn(pretrained=False, **kwargs)
    except TypeError as error:
        given = [key for key in ("num_classes", "in_chans") if key in kwargs]
        refused = [key for key in given if repr(key) in str(error)]
        if not refused or kwargs[refused[0]] not in (0, 3):
            raise
        return _plain(fn, {key: value for key, value in kwargs.items() if key not in refused})


def _trained(fn: Callable[..., nn.Module], kwargs: dict[str, Any]) -> nn.Module:
    """Build with pretrained=True, and see that the weights are not random."""
    models = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models.append(fn(pretrained=True, **kwargs))
    first, second = (model.state_dict() for model in models)
    drawn = [key for key in first if not torch.equal(first[key], second[key])]
    if drawn:
        raise NotFoundError(
            f"{fn.__name__} has no weights: with pretrained=True it draws {some_of(drawn, 3)} at "
            "random. Load them in its entry point, or register_weights"
        )
    return models[0]


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
        Their names, in timm's order.
    """
    return _listed(fnet_crops, filter, pretrained)


def list_srnets(
    filter: str | Sequence[str] = "",  # noqa: A002
    *,
    pretrained: bool = False,
) -> list[str]:
    """Names of the registered SRNets, as `list_fnets` gives those of FNets.

    Args:
        filter: Wildcard or wildcards.
        pretrained: Only `arch.tag` names that have weights.

    Returns:
        Their names.
    """
    return _listed(srnet_crops, filter, pretrained)


def _listed(
    registered: Collection[str], wanted: str | Sequence[str], pretrained: bool
) -> list[str]:
    load_plugins()
    # nothing can be built of "spandrel" alone
    every = [name for name in list_models(pretrained=pretrained) if name != "spandrel"]
    patterns = [wanted] if isinstance(wanted, str) else wanted
    names = [_BASELINES.get(n, n) for n in every if split_model_name_tag(n)[0] in registered]
    return [name for name in names if any(fnmatch(name, pattern or "*") for pattern in patterns)]


def find_known(name: str, kind: str, registered: Collection[str]) -> str:
    """A registered name as timm has it; did-you-mean for unknown architectures and tags."""
    name = timms_name(name)
    arch, tag = split_model_name_tag(name)
    if arch not in registered:
        # weights with the word in their names help more than names that are spelt alike
        near = [tagged for tagged in _listed(registered, f"*{name}*", True) if name]
        known = near or [_BASELINES.get(one, one) for one in registered]
        said, other = did_you_mean(kind, name, known), other_kind(name, arch, kind)
        misspelt = "Did you mean" in said
        raise ValueError(said + other + (YOUR_OWN if kind == "FNet" and not misspelt else ""))
    tagged = list_models(arch, include_tags=True)
    if tag and name not in tagged:
        raise ValueError(did_you_mean(f"weights of {kind}", name, tagged))
    return name


def timms_name(name: str) -> str:
    """What timm calls an SRNet that has a shorter name here."""
    return {ours: timms for timms, ours in _BASELINES.items()}.get(name, name)


def other_kind(name: str, arch: str, kind: str) -> str:
    """What else a name is that was asked for as a kind it is not."""
    if arch in fnet_crops or arch in srnet_crops:
        return f". {arch!r} is an {'SRNet' if kind == 'FNet' else 'FNet'}"
    if kind == "FNet" and is_model(arch):
        return f". A backbone of timm is asked for as 'timm/{name}'"
    return ""


def srnet_crop(srnet: str | nn.Module) -> str | Template:
    """The crop that an SRNet works in: a network, or the name of a registered one."""
    own = getattr(srnet, "crop", None)  # a stranger's may be anything
    if isinstance(own, str | Template):
        return checked_crop(own)
    if isinstance(srnet, str):
        load_plugins()
    name = srnet if isinstance(srnet, str) else str(cfg_of(srnet).get("architecture"))
    return srnet_crops.get(split_model_name_tag(timms_name(name))[0], SRNET_CROP)


def checked_crop(crop: str | Template) -> str | Template:
    """A template that has a name is told by it, so that it can be written down."""
    template = get_template(crop)
    return template.name if TEMPLATES.get(template.name) == template else template


def check_order(channel_order: str) -> None:
    """Refuse what is no order of channels."""
    if channel_order not in ("rgb", "bgr"):
        raise ValueError(f"channel_order must be 'rgb' or 'bgr', got {channel_order!r}")


def refuse_reversal(name: str) -> None:
    """Refuse to reverse the channels of weights that are known, and take RGB already."""
    arch = split_model_name_tag(name)[0]
    ours = arch in fnet_crops and model_entrypoint(arch).__module__.startswith("idloss.")
    if ours or arch in _bgr:
        raise ValueError(
            f"the weights of {name} take RGB already; channel_order='bgr' is for a checkpoint=, a "
            "folder or a module of your own"
        )


def reverse_first(model: nn.Module, name: str) -> None:
    """Let a network with weights for BGR take RGB."""
    first = cfg_of(model).get("first_conv")
    if not isinstance(first, str):
        modules = model.named_modules()
        takers = [n for n, m in modules if isinstance(m, nn.Conv2d) and m.in_channels == 3]
        if len(takers) != 1:
            raise ValueError(
                f"{name} takes BGR, and its first convolution is one of: {some_of(takers)}. Name "
                "it in its pretrained_cfg, as first_conv"
            )
        first = takers[0]
    model.load_state_dict(reverse_input(model.state_dict(), first))


def cfg_of(model: nn.Module) -> dict[str, Any]:
    """The `pretrained_cfg` of a network; empty where it has no dict of that name."""
    cfg = getattr(model, "pretrained_cfg", None)
    return cfg if isinstance(cfg, dict) else {}
