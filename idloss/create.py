"""An FNet or SRNet from its name, file, folder or the Hub, which says what it takes and gives."""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, is_model, list_models, split_model_name_tag
from torch import nn

from idloss.errors import did_you_mean, some_of
from idloss.geometry import Template, get_template
from idloss.plugins import load_plugins
from idloss.registry import (
    YOUR_OWN,
    cfg_of,
    check_order,
    checked_crop,
    find_known,
    fnet_crops,
    other_kind,
    refuse_reversal,
    reverse_first,
    srnet_crop,
    srnet_crops,
)
from idloss.weights.files import (
    NotAsPromisedError,
    NotFoundError,
    TryAgain,
    WeightsError,
    checkpoint_in,
    load_checkpoint,
    no_larger_than,
    without_prefixes,
)
from idloss.weights.loading import PROVENANCE, ChannelOrder, Keys, load_own
from idloss.weights.sources import (
    ask_hub,
    hub_errors,
    hub_file,
    reach_hub,
    zoo_folder,
    zoo_models,
)

logger = logging.getLogger(__name__)

_HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
_SPANDREL = "spandrel:"  # a file follows, without which nothing can be built
_NORMALISATION = ("input_size", "mean", "std")
_INPUT_EXAMPLE = "input_size=(3, 112, 112), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)"
_MOST_SIDE = 768  # pixels of an FNet's input, which a stranger's config.json may tell


def create_fnet(
    fnet: str | nn.Module,
    *,
    pretrained: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    keys: Keys = None,
    channel_order: ChannelOrder | None = None,
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
        fnet: A registered FNet (`"sface"`, `"sface.casia_webface"`), one in the zoo's folder, any
            timm model (`"timm/resnet18"`), `"hf-hub:owner/name"` (or `owner/name@revision`),
            `"local-dir:path"`, or a module from normalised RGB `[B, 3, H, W]` to embeddings
            `[B, D]`.
        pretrained: Load the weights; has no effect on a module.
        checkpoint: File of your own, or folder with one, in place of published weights: safetensors
            or what `torch.save` wrote, of which every tensor must fit; no code in it is run.
        keys: How its keys become the network's: prefixes to replace (`{"backbone.": "", "head.":
            None}`, where None leaves out), or a function of the state dict. None: they are the
            network's own, or those of a checkpoint that the architecture was published with.
        channel_order: `"rgb"` or `"bgr"`: what the checkpoint, the published folder or the module
            takes. None: as published with these keys, else RGB. The network returned takes RGB.
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
        ValueError: If the name or the crop is unknown, a module says nothing of its input, or a
            checkpoint may take RGB or BGR.
        WeightsError: If weights cannot be had, or do not fit.
    """
    if crop not in (None, "auto"):
        crop = checked_crop(crop)
    fnet = _at_home(fnet) if isinstance(fnet, str) else fnet
    check_order(channel_order or "rgb")
    given = {"checkpoint": checkpoint, "keys": keys}
    if keys is not None and checkpoint is None:
        raise TypeError("keys= tells of the keys in a checkpoint=, and none is given")
    model = _built(fnet, "FNet", kwargs | {key: value for key, value in given.items() if value})
    with _naming(fnet):
        if model is None:
            load_plugins()
            build = partial(_build_fnet, str(fnet), kwargs=kwargs)
            if checkpoint is not None:
                make = partial(build, pretrained=False)
                model, channel_order = load_own(make, checkpoint, str(fnet), keys, channel_order)
            else:
                model = build(pretrained=pretrained)
                if channel_order == "bgr":
                    refuse_reversal(str(fnet))
            if channel_order == "bgr":
                reverse_first(model, str(fnet))
        elif channel_order == "bgr":
            model = _TakesBGR(model)
        if (arch := str(cfg_of(model).get("architecture"))) in srnet_crops:
            raise ValueError(f"this is no FNet{other_kind(arch, arch, 'FNet')}")
        _describe_input(model, kwargs.get("img_size"), input_size=input_size, mean=mean, std=std)
        _describe_output(model)
        overlay = kwargs.get("pretrained_cfg_overlay") or {}
        # of another origin of the weights the network is the same
        options = (
            kwargs.keys() - {"cache_dir", "pretrained_cfg_overlay"} | overlay.keys() - PROVENANCE
        )
        if options or (isinstance(fnet, str) and fnet.startswith(_HUB_PREFIXES)):
            _try_out(model, kwargs)
        model.crop = _resolve_crop(model, crop)  # type: ignore[assignment]
    return model


def create_srnet(
    srnet: str | nn.Module,
    *,
    pretrained: bool = False,
    crop: str | Template = "auto",
    **kwargs: Any,
) -> nn.Module:
    """Make a super-resolution network that says in which crop it works.

    Args:
        srnet: A registered SRNet (`"edsr16_64"`, `"bicubic"`), any name that `create_fnet` takes
            but `"timm/..."`, `"spandrel:file.pth"` for what spandrel loads (with its weights), or a
            module, which is returned as it is; `srnets.Restorer` fits in those of 512x512.
        pretrained: Load the weights; has no effect on a module.
        crop: Template of the crops that it makes. `"auto"`: what it was saved or registered with.
        **kwargs: Passed on to the entry point, such as `scale=8`.

    Returns:
        The network: RGB `[B, 3, H, W]` in [0, 1] to RGB of `scale` times the size. Its `crop` is
        what evaluation and training follow; a module without one works in `"sphereface"`.

    Raises:
        TypeError: If `srnet` is neither a name nor a module, or options are given with a module.
        ValueError: If the name or the crop is unknown.
    """
    model = _built(srnet, "SRNet", kwargs)
    if kwargs.get("in_chans", 3) != 3:
        raise ValueError(f"faces are RGB: leave in_chans={kwargs['in_chans']} out")
    told: Mapping[str, Any] = {}
    if model is not None:
        if (arch := str(cfg_of(model).get("architecture"))) in fnet_crops:
            raise ValueError(f"this is no SRNet{other_kind(arch, arch, 'SRNet')}")
    else:
        load_plugins()
        name = _at_home(str(srnet))
        if name.startswith(_HUB_PREFIXES):
            with _naming(name):
                model, told = _open_published(name, "SRNet", pretrained, kwargs)
        elif name.startswith(_SPANDREL):
            # not an argument, which would be saved in its config.json, and opened again
            found = {"pretrained_cfg_overlay": {"file": name.removeprefix(_SPANDREL)}}
            model = _timm_create("spandrel", False, {**found, **kwargs})
        else:
            model = _timm_create(find_known(name, "SRNet", srnet_crops), pretrained, kwargs)
    if crop == "auto" and isinstance(srnet, str):
        said = told.get("crop", getattr(model, "crop", None))
        named = isinstance(said, str | Template)
        crop = said if named else srnet_crop(told.get("architecture", srnet))
    if crop != "auto":
        model.crop = checked_crop(crop)  # type: ignore[assignment]
    return model


def _built(net: object, kind: str, options: Collection[str]) -> nn.Module | None:
    """A network that is built already; None where it is a name."""
    what = type(net).__name__
    if isinstance(net, str):
        return None
    if not isinstance(net, nn.Module):
        inner = isinstance(getattr(net, "model", None), nn.Module)
        advice = ": pass its .model, or 'spandrel:FILE' if spandrel loaded it" if inner else ""
        raise TypeError(f"{kind} must be a name or a torch.nn.Module, got {what}{advice}")
    if options:
        raise TypeError(
            f"{kind} is a {what}, which is already built, and there are options for building one: "
            f"{', '.join(sorted(options))}"
        )
    return net


def _timm_create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    return model


class _TakesBGR(nn.Module):
    """A network that takes BGR, behind RGB."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        about = ("num_features", "num_classes", "head_hidden_size", "pretrained_cfg", "crop")
        for told in about:
            if hasattr(net, told):
                setattr(self, told, getattr(net, told))

    def forward(self, x: torch.Tensor) -> Any:
        """RGB `[B, 3, H, W]` to what the network makes of BGR."""
        return self.net(x.flip(1))


def _build_fnet(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """Build an FNet from a name of any kind that `create_fnet` knows."""
    if name.startswith(_HUB_PREFIXES):
        if name.partition(":")[2].startswith("timm/"):
            kwargs = {"num_classes": 0, **kwargs}  # timm's own uploads are classifiers
        model, told = _open_published(name, "FNet", pretrained, kwargs)
        if "num_classes" not in kwargs and _is_headless(model):
            model.reset_classifier(0)  # type: ignore[operator]
        if "crop" in told:
            model.crop = told["crop"]
        return model
    if name.startswith("timm/"):
        name = name.removeprefix("timm/")
        if split_model_name_tag(name)[0] in fnet_crops:
            raise ValueError(f"{name!r} is a model of idloss, not of timm: leave 'timm/' out")
        if not is_model(name):
            timms = set(list_models()) - fnet_crops.keys() - srnet_crops.keys()
            raise ValueError(did_you_mean("timm model", name, timms) + YOUR_OWN)
        if pretrained and not kwargs.keys() & {"pretrained_cfg", "pretrained_cfg_overlay"}:
            _reach_timms(name, kwargs.get("cache_dir"))
        return _timm_create(name, pretrained, {"num_classes": 0, **kwargs})
    name = find_known(name, "FNet", fnet_crops)
    model = _timm_create(name, pretrained, kwargs)
    registered = fnet_crops[split_model_name_tag(name)[0]]
    own = getattr(model, "crop", registered)
    said, known = (crop if crop is None else get_template(crop) for crop in (own, registered))
    if said != known:
        raise ValueError(
            f"{name} is registered with crop={registered!r}, and what it builds says {own!r}: let "
            "both say the same"
        )
    model.crop = registered  # type: ignore[assignment]
    return model


def _reach_timms(name: str, cache_dir: str | None) -> None:
    """See that there are weights of timm's and that they can be had: timm itself draws others."""
    cfg = get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise NotFoundError(
            f"timm/{name} has no weights: pretrained=True would draw them at random"
        )
    if cfg.hf_hub_id:
        reach_hub(f"timm/{name}", cfg.hf_hub_id, cache_dir)


def _at_home(name: str) -> str:
    """The folder of a published model of the zoo, unless an architecture has its name."""
    here = name in zoo_models() and not is_model(name)
    return f"local-dir:{zoo_folder() / name}" if here else name


def published_config(name: str, cache_dir: Any = None) -> dict[str, Any] | None:
    """The `config.json` of a folder, a Hub repository or the zoo; None for other names."""
    name = _at_home(name)
    if not name.startswith(_HUB_PREFIXES):
        return None
    place = name.partition(":")[2]
    with _naming(name):
        if name.startswith("local-dir:"):
            path = Path(place, "config.json")
            if not path.is_file():
                raise NotFoundError(f"{name} holds no published network: there is no {path}")
        else:
            repo, _, revision = place.partition("@")
            path = ask_hub(name, repo, "config.json", revision or None, cache_dir)
        config = json.loads(path.read_text(encoding="utf-8"))
        arch, told = str(config["architecture"]), dict(config.get("idloss") or {})
        return {**config, "architecture": arch, "idloss": told}


def _open_published(
    name: str, kind: str, pretrained: bool, kwargs: dict[str, Any]
) -> tuple[nn.Module, Mapping[str, Any]]:
    """Build what a folder or a Hub repository holds; the model, and what idloss tells of it."""
    config = published_config(name, kwargs.get("cache_dir")) or {}
    arch, told = config["architecture"], config["idloss"] | {"architecture": config["architecture"]}
    source, _, place = name.partition(":")
    _check_kind(name, kind, arch, told)
    path = None
    if source == "local-dir":
        with nullcontext() if pretrained else suppress(NotFoundError):
            path = checkpoint_in(Path(place))
    elif pretrained:
        path = hub_file(name, place, None, kwargs.get("cache_dir"))
    size = None if path is None else path.stat().st_size
    try:  # without memory first: what it asks for is a stranger's number
        with no_larger_than(size), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _timm_create(name, False, kwargs)
    except WeightsError:
        raise
    except Exception:  # some need numbers while they are built; what else is wrong is told below
        logger.debug("%s cannot be tried without memory", name, exc_info=True)
    with no_larger_than(size):
        if path is None or not pretrained or arch in fnet_crops or arch in srnet_crops:
            return _timm_create(name, pretrained, kwargs), told
        # timm reads fewer kinds of checkpoints
        tensors = without_prefixes(load_checkpoint(path, name), name)
        overlay = {"state_dict": tensors, "source": "", **kwargs.get("pretrained_cfg_overlay", {})}
        model = _timm_create(name, True, {**kwargs, "pretrained_cfg_overlay": overlay})
    model.pretrained_cfg = {**cfg_of(model), "source": source}  # type: ignore[assignment]
    cfg_of(model).pop("state_dict")
    return model, told


@contextmanager
def _naming(net: object) -> Iterator[None]:
    """Make whatever is wrong with what strangers published an error that names the place."""
    try:
        yield
    except Exception as error:
        name = str(net) if isinstance(net, str) else ""
        if not name.startswith(_HUB_PREFIXES) or name in str(error):
            raise
        if isinstance(error, OSError):
            try:
                with hub_errors(name, name.partition(":")[2].partition("@")[0]):
                    raise
            except TryAgain as again:
                raise again.error from error
        kind = type(error) if isinstance(error, WeightsError) else NotAsPromisedError
        reason = some_of([" ".join(str(error).split())[:300]])
        raise kind(f"{name} cannot be opened ({type(error).__name__}: {reason})") from error


def _check_kind(name: str, kind: str, arch: str, told: Mapping[str, Any]) -> None:
    """Refuse what is of the other kind, or of no kind that is known here."""
    if told.get("registered") is False:
        raise NotAsPromisedError(
            f"{name} holds a {told.get('class')!r}, which is not registered: open it with "
            "idloss.training.open_trained(folder, network)"
        )
    if arch in (srnet_crops if kind == "FNet" else fnet_crops):
        raise ValueError(f"{name} holds another kind{other_kind(name, arch, kind)}")
    if kind == "SRNet" and arch not in srnet_crops:
        raise ValueError(f"{name} holds a {arch!r}, which is not a registered SRNet")
    if not is_model(arch):
        raise NotFoundError(f"{name} holds a {arch!r}, which no installed package registers")


def _is_headless(model: nn.Module) -> bool:
    """Whether it is an FNet that has a classifier only while it is trained."""
    arch = cfg_of(model).get("architecture")
    cfg = get_pretrained_cfg(arch) if arch in fnet_crops else None
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
            f"pretrained_cfg, as timm's models have (one for inputs in [-1, 1]: {_INPUT_EXAMPLE})"
        )
    for key in _NORMALISATION:
        value = cfg[key].tolist() if hasattr(cfg[key], "tolist") else cfg[key]
        if not isinstance(value, Sequence) or not all(isinstance(one, Real) for one in value):
            raise ValueError(f"{key} must be numbers, as in {_INPUT_EXAMPLE}, got {value!r}")
        cfg[key] = tuple(value)
    size, mean, std = (cfg[key] for key in _NORMALISATION)
    if len(size) != 3 or min(size) < 1 or max(size) > _MOST_SIDE:
        most = f"; no side has more than {_MOST_SIDE} pixels" if max(size) > _MOST_SIDE else ""
        raise ValueError(f"input_size must be (3, H, W), got {size}{most}")
    if len(mean) != size[0] or not all(0 <= one <= 1 for one in mean):
        raise ValueError(f"mean must be {size[0]} numbers in [0, 1], as images are, got {mean}")
    if len(std) != size[0] or not all(0 < one <= 1 for one in std):
        raise ValueError(
            f"std must be {size[0]} positive numbers up to 1, as images are, got {std}"
        )
    model.pretrained_cfg = cfg  # type: ignore[assignment]


def _describe_output(model: nn.Module) -> None:
    """See to it that `model.num_features` is the width of what `forward` returns.

    What a module declares is checked by the first images that `FaceEncoder` shows it.
    """
    arch, width = cfg_of(model).get("architecture"), getattr(model, "num_features", None)
    if arch not in fnet_crops and arch is not None and is_model(arch):
        # timm's num_features is the trunk's width; its head may widen that (VGG, MobileNetV3),
        # and a kept head is what forward returns
        classes = getattr(model, "num_classes", 0)
        width = classes or getattr(model, "head_hidden_size", None) or width
    model.num_features = width or _probe_width(model)  # type: ignore[assignment]


def _try_out(model: nn.Module, options: Mapping[str, Any]) -> None:
    """See that a network built with options, or by a stranger, takes RGB and gives embeddings."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    try:
        try:
            width = _probe_width(model)
        except ValueError:  # its kernels may be a GPU's alone
            if (gpu := torch.accelerator.current_accelerator(check_available=True)) is None:
                raise
            width = _probe_width(copy.deepcopy(model).to(gpu))
    except ValueError as error:
        grey = options.get("in_chans", 3) != 3
        advice = "faces are RGB, leave in_chans out" if grey else "leave out what does not fit"
        given = ", ".join(f"{key}={some_of([str(one)])}" for key, one in options.items())
        raise ValueError(f"{error}; built with {given or 'its model_args'}: {advice}") from error
    if width != model.num_features and not getattr(model, "num_classes", 0):
        raise ValueError(
            f"{type(model).__name__} gives {width} numbers a face and its num_features is "
            f"{model.num_features}: mend it"
        )


@torch.no_grad()
def _probe_width(model: nn.Module) -> int:
    """Width of the embeddings of a foreign module, by running two empty images through it."""
    floating = (tensor for tensor in model.parameters() if tensor.is_floating_point())
    reference = next(floating, torch.empty(0, dtype=torch.float32))
    size = (2, *cfg_of(model)["input_size"])
    modes = {one: one.training for one in model.modules() if hasattr(one, "training")}
    for module in modes:
        module.training = False
    kind = type(model).__name__
    try:
        output = model(torch.zeros(size, device=reference.device, dtype=reference.dtype))
    # a stranger's network raises what it likes
    except (Exception, SystemExit) as error:
        raise ValueError(f"{kind} cannot take images {list(size)}: {error}") from error
    finally:
        for module, training in modes.items():
            module.training = training
    if (
        isinstance(output, torch.Tensor)
        and output.ndim == 2
        and len(output) == 2
        and output.numel()
    ):
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
        items = (f"{key}: {describe_output(item)}" for key, item in output.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(output, (tuple, list)):
        return f"({', '.join(map(describe_output, output))})"
    return type(output).__name__


def _resolve_crop(model: nn.Module, crop: str | Template | None) -> str | Template | None:
    if crop != "auto":
        return crop
    own = getattr(model, "crop", "")
    if own is None:
        return None
    if own and isinstance(own, str | Template):
        return checked_crop(own)
    if (arch := cfg_of(model).get("architecture")) in fnet_crops:
        return fnet_crops[arch]
    size = tuple(cfg_of(model)["input_size"][-2:])
    # Only crops of 112 rows: at 224 or 160 an input size says nothing of the alignment.
    return {(112, 96): "sphereface", (112, 112): "arcface"}.get(size)
