"""From a name to verified weights in our layout, and to a model that has every one of them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    load_pretrained,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from idloss.errors import did_you_mean, some_of
from idloss.plugins import load_plugins
from idloss.weights.files import (
    NotAsPromisedError,
    NotFoundError,
    Piece,
    checkpoint_in,
    disk_advice,
    is_safetensors,
    load_checkpoint,
    load_verified,
    save_tensors,
    without_prefixes,
)
from idloss.weights.placing import give_numbers, without_numbers
from idloss.weights.sources import Cache, Source, hub_file

_Model = TypeVar("_Model", bound=nn.Module)
_StateDict = dict[str, Tensor]

StateDict = Mapping[str, Tensor]
Adapter = Callable[[StateDict], StateDict]
"""From the state dict of a released checkpoint to ours; `ValueError` for any other layout."""

CacheDir = str | os.PathLike[str] | None
ChannelOrder = Literal["rgb", "bgr"]
Keys = Adapter | Mapping[str, str | None] | None

CONV = ("weight", "bias")
"""The entries of a convolution or a linear layer."""

URL_LIMIT = 4 << 30
"""The most bytes that a file may have whose hash nobody pinned."""

PROVENANCE = {"url", "file", "state_dict", "source", "hf_hub_id", "hf_hub_filename"}
PROVENANCE |= {"tag", "license", "description", "origin_url"}
"""What a PretrainedCfg tells of one set of weights, which is false of any other."""

OURS: dict[str, Any] = {
    "licence": "research use only, as CelebA is",
    "trained_by": "idloss, a short run on a CPU: see the card in zoo/.",
}
"""What `Weights` says of every network in `zoo/`."""


# --- which weights there are ---------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """What is known of one set of weights.

    Args:
        source: Where they come from, pinned.
        licence: As its origin states it (an SPDX name where there is one), or that it states none.
        training_data: What the network was trained on.
        adapter: From the released state dict to ours; None where they are the same.
        version: Of the adapter; whoever changes what it makes raises it, and files that the
            old one made are made again.
        description: One line for people: the loss it was trained with, its reported accuracy.
        trained_by: Who trained it, where that is not the origin's owner.
        cfg: What of timm's `PretrainedCfg` these weights have for themselves, such as `mean`.
        channel_order: What the network of the adapted state dict takes, `"rgb"` or `"bgr"`; of BGR
            the first convolution's input is reversed.
        lfw: Per cent on LFW, its authors' own figure.
        size: Bytes of the download.
    """

    source: Source
    licence: str
    training_data: str
    adapter: Adapter | None = None
    version: int = 1
    description: str = ""
    trained_by: str = ""
    cfg: Mapping[str, Any] = field(default_factory=dict)
    channel_order: ChannelOrder = "rgb"
    lfw: float | None = None
    size: int | None = None

    def pretrained_cfg(self, **shared: Any) -> dict[str, Any]:
        """What timm's `PretrainedCfg` has a place for; `url` is for its lists, never followed."""
        about = (self.description, f"Trained on {self.training_data}.", self.trained_by)
        return {
            **shared,
            **self.cfg,
            "url": self.source.pieces[0].url,
            "license": self.licence,
            "origin_url": self.source.origin_url,
            "description": " ".join(filter(None, about)),
        }

    def key(self, cache: Cache, name: str) -> str:
        """A hash of the source's content and the adapter's version: another one, other tensors."""
        parts = f"{self.source.fingerprint(cache, name)}\n{self.version}"
        return hashlib.sha256(parts.encode()).hexdigest()


_registered: dict[str, Weights] = {}


def register_weights(entries: Mapping[str, Weights], **shared: Any) -> dict[str, Any]:
    """Make weights known under their names; a module that is imported again changes nothing.

    Args:
        entries: Weights by `arch.tag`, as in timm; `arch` is the model's entry point.
        **shared: What all of them have in timm's `PretrainedCfg`.

    Returns:
        The `default_cfgs` of the module that has the entry points, which timm looks for there.

    Raises:
        ValueError: If other weights have one of the names.
    """
    for name, weights in entries.items():
        known = _registered.setdefault(name, weights)
        if (known.source, known.version) != (weights.source, weights.version):
            raise ValueError(f"weights {name!r} are registered already, from another source")
    default_cfgs: dict[str, Any] = generate_default_cfgs(
        {name: weights.pretrained_cfg(**shared) for name, weights in entries.items()}
    )
    return default_cfgs


def get_weights(name: str) -> Weights:
    """Look up weights by `arch.tag`, or `arch` for its default tag."""
    return _look_up(name, None)[1]


def _look_up(name: str, cache_dir: CacheDir) -> tuple[str, Weights, Cache]:
    if name not in _registered:
        load_plugins()
    if name not in _registered and "." not in name and is_model(name):
        cfg = get_pretrained_cfg(name)
        name = f"{name}.{cfg.tag}" if cfg is not None and cfg.tag else name
    if name not in _registered:
        raise NotFoundError(did_you_mean("weights", name, _registered))
    return name, _registered[name], Cache.at(cache_dir)


def describe(name: str, *, cache_dir: CacheDir = None) -> dict[str, Any]:
    """What is known of weights, for people: source, hash, licence, training data, size.

    Args:
        name: `arch.tag`, or `arch` for its default tag.
        cache_dir: As in `fetch`.

    Returns:
        Readable values by readable key; `size` and `cached` are None for what is not here yet.
        Nothing is downloaded.

    Raises:
        NotFoundError: If the name is not known.
    """
    name, weights, cache = _look_up(name, cache_dir)
    key = weights.key(cache, name)
    target = cache.converted_path(name, key)
    cached = target if load_verified(target, key) else None
    pieces = weights.source.pieces
    return {
        "name": name,
        "description": weights.description,
        "source": [piece.url for piece in pieces],
        "hash": [piece.digest for piece in pieces],
        "origin": weights.source.origin_url,
        "licence": weights.licence,
        "training data": weights.training_data,
        "trained by": weights.trained_by,
        "adapter": _adapter_name(weights),
        "cached": cached,
        "size": cached.stat().st_size if cached else None,
    }


def find_kept(name: str, *, cache_dir: CacheDir = None) -> Path | None:
    """Where weights are that need no network; None where there are none. Nothing is verified."""
    name, weights, cache = _look_up(name, cache_dir)
    made = cache.converted_path(name, weights.key(cache, name))
    return made if made.exists() else weights.source.kept(cache, name)


# --- from a name to a file -----------------------------------------------------------------------


def fetch(name: str, *, cache_dir: CacheDir = None, force: bool = False) -> Path:
    """Get weights: download, verify, convert, each only if it was not done before.

    Args:
        name: `arch.tag`, or `arch` for its default tag.
        cache_dir: Folder to keep things in; None for `$HF_HOME/idloss`, and `HF_HUB_CACHE`
            for files of the Hub.
        force: Do all of it again.

    Returns:
        A safetensors file in the model's own layout, verified.

    Raises:
        WeightsError: One of its four kinds, which says the way out.
        ImportError: If a 7z archive is to be opened and py7zr is not installed.
    """
    return _fetched(name, cache_dir, force=force)[0]


def _fetched(name: str, cache_dir: CacheDir, *, force: bool = False) -> tuple[Path, StateDict]:
    """As `fetch`, and the tensors, which were read to be verified."""
    name, weights, cache = _look_up(name, cache_dir)
    key = weights.key(cache, name)
    target = cache.converted_path(name, key)
    if not force and (made := load_verified(target, key)):
        return target, made
    with disk_advice():
        paths = weights.source.obtain(cache, name, force=force)
        if weights.adapter is None and len(paths) == 1 and is_safetensors(paths[0]):
            return paths[0], load_checkpoint(paths[0], name)  # it is what we would make of it
        with cache.lock(target):
            # another process may have made it meanwhile
            if not force and (made := load_verified(target, key)):
                return target, made
            with cache.scratch() as scratch:
                checkpoint = weights.source.assemble(paths, scratch, name)
                about = {
                    "idloss.name": name,
                    "idloss.key": key,
                    "source": weights.source.pieces[0].url,
                    "source_hash": weights.source.fingerprint(cache, name),
                    "licence": weights.licence,
                    "training_data": weights.training_data,
                    "adapter": _adapter_name(weights),
                }
                save_tensors(_adapted(checkpoint, weights, name), target, about)
    return target, load_checkpoint(target, name)


def _adapter_name(weights: Weights) -> str:
    name = getattr(weights.adapter, "__name__", "of its own")
    return "none" if weights.adapter is None else f"{name}, version {weights.version}"


def add(name: str, *paths: str | os.PathLike[str], cache_dir: CacheDir = None) -> Path:
    """Bring files downloaded by hand: they are verified, kept, and converted as `fetch` does it.

    Args:
        name: `arch.tag`, or `arch` for its default tag.
        *paths: The file, or all its parts in any order, as they are at the origin. Parts
            left out are downloaded.
        cache_dir: As in `fetch`.

    Returns:
        A safetensors file in the model's own layout, which `fetch` returns from now on.

    Raises:
        NotAsPromisedError: If a file is none of those that are pinned, or has another layout;
            nothing is kept then.
        WeightsError: As in `fetch`.
    """
    name, weights, cache = _look_up(name, cache_dir)
    matched = []
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"{name}: there is no file {path} to add")
        wrong = {piece: piece.mismatch(path) for piece in weights.source.pieces}
        piece = next((piece for piece, reason in wrong.items() if reason is None), None)
        if piece is None:
            reasons = "; ".join(f"as {piece.filename}: {why}" for piece, why in wrong.items())
            raise NotAsPromisedError(f"{name}: {path} is not the pinned file: {reasons}")
        if piece.digest == "unpinned":
            _adapted(path, weights, name)  # all there is to tell a wrong one by
        matched.append((piece, path))
    for piece, path in matched:
        cache.keep(piece, path, name)
    return fetch(name, cache_dir=cache_dir)


def _adapted(checkpoint: Path, weights: Weights, name: str) -> StateDict:
    """What a checkpoint in the released layout holds, in ours."""
    try:
        return _in_our_layout(load_checkpoint(checkpoint, name), weights, name)
    except (KeyError, ValueError) as error:
        reason = error.args[0] if error.args else error
        raise NotAsPromisedError(
            f"{name}: {checkpoint.name} does not have the layout it was released with: {reason}"
        ) from error


def _in_our_layout(released: StateDict, weights: Weights, name: str) -> StateDict:
    if weights.adapter is None:
        return released
    adapted = dict(weights.adapter(without_prefixes(released, name)))
    cfg = get_pretrained_cfg(name) if weights.channel_order == "bgr" else None
    return reverse_input(adapted, str(cfg.first_conv)) if cfg else adapted


def load_own(
    make: Callable[[], nn.Module],
    checkpoint: str | os.PathLike[str],
    name: str,
    keys: Keys = None,
    channel_order: ChannelOrder | None = None,
) -> tuple[nn.Module, ChannelOrder]:
    """Make FNet `name` with a checkpoint of one's own (see `create_fnet`); what it takes then."""
    path = Path(checkpoint)
    path = checkpoint_in(path) if path.is_dir() else path
    bare = without_numbers(make)
    model = make() if bare is None else bare
    tensors, orders = _in_own_layout(load_checkpoint(path, name), model, name, keys)
    if channel_order is None and len(orders) > 1:
        raise ValueError(
            f"{path.name} takes RGB or BGR: there are weights of both kinds for {name}, with the "
            "same keys. Say which, channel_order='rgb' or 'bgr'"
        )
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    # the head of a backbone of timm may be the embedding: it is not left out unasked
    heads = {} if name.startswith("timm/") else cfg
    fitting = _fitting(tensors, model, name, heads, None)
    own = model.state_dict().keys()
    wanted = {key: fitting[key] for key in own & fitting.keys()}
    if bare is None or not give_numbers(bare, wanted):
        model = make()
        try:
            model.load_state_dict(wanted)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise NotAsPromisedError(f"{path} does not fit {name}: {reason}") from error
    return model, channel_order or orders.pop()


def _in_own_layout(
    released: StateDict, model: nn.Module, name: str, keys: Keys
) -> tuple[StateDict, set[ChannelOrder]]:
    """A state dict under the model's keys, and the channel orders that it may have."""
    own = model.state_dict().keys()
    bare = without_prefixes(released, name, own)
    if callable(keys):
        return keys(bare), {"rgb"}
    if keys is not None:
        return _renamed(released, keys), {"rgb"}
    if own <= bare.keys():
        return bare, {"rgb"}
    arch = name.partition(".")[0]
    known = [weights for key, weights in _registered.items() if key.partition(".")[0] == arch]
    for adapter in dict.fromkeys(weights.adapter for weights in known if weights.adapter):
        try:
            adapted = adapter(bare)
        except (KeyError, ValueError):
            continue
        return adapted, {weights.channel_order for weights in known if weights.adapter is adapter}
    return bare, {"rgb"}


def _renamed(state_dict: StateDict, prefixes: Mapping[str, str | None]) -> _StateDict:
    """Put other prefixes in place of the longest ones that keys have; None leaves a key out."""
    renamed = {}
    for key, value in state_dict.items():
        theirs = max(filter(key.startswith, prefixes), key=len, default="")
        ours = prefixes.get(theirs, theirs)
        if ours is None:
            continue
        name = ours + key.removeprefix(theirs)
        if name in renamed:
            raise ValueError(f"keys= makes two keys of the checkpoint {name!r}, {key!r} the second")
        renamed[name] = value
    return renamed


# --- adapters ------------------------------------------------------------------------------------
# Pure functions of a state dict, which list the keys that a checkpoint of their kind has: one too
# many or too few is an error that names it, so that a wrong file is never half loaded. BGR ends
# here, on the way in and (of an SRNet) on the way out.


def layer_keys(theirs: str, ours: str) -> dict[str, str]:
    """Names of weight and bias of one layer, theirs to ours."""
    return {f"{theirs}.{entry}": f"{ours}.{entry}" for entry in CONV}


def count_indices(state_dict: StateDict, pattern: str) -> int:
    """How many different indices the pattern finds in the keys."""
    return len({match[1] for key in state_dict if (match := re.search(pattern, key))})


def rename_keys(
    state_dict: StateDict, names: Mapping[str, str], kind: str, *, dropped: tuple[str, ...] = ()
) -> _StateDict:
    """Rename every key, drop those that start with `dropped`, and refuse any other set of keys."""
    kept = {key for key in state_dict if not key.startswith(dropped)}
    unknown, missing = sorted(kept - names.keys()), sorted(names.keys() - kept)
    if unknown or missing:
        found = {"unknown keys": unknown, "missing keys": missing}
        complaints = [f"{what}: {some_of(keys, 5)}" for what, keys in found.items() if keys]
        raise ValueError(f"this is not a checkpoint of {kind}: {'; '.join(complaints)}")
    return {ours: state_dict[theirs] for theirs, ours in names.items()}


def with_counters(state_dict: StateDict) -> _StateDict:
    """Give batch norms the counters of batches that files of torch before 0.4.1 lack."""
    norms = [key.removesuffix("running_mean") for key in state_dict if key.endswith("running_mean")]
    counters = {f"{norm}num_batches_tracked": torch.zeros((), dtype=torch.int64) for norm in norms}
    return {**counters, **state_dict}


def reverse_input(state_dict: _StateDict, layer: str) -> _StateDict:
    """Make a first convolution that takes BGR take RGB."""
    weight = f"{layer}.weight"
    if (taken := state_dict[weight].shape[1]) != 3:
        raise ValueError(f"{weight} takes {taken} channels, where the order of 3 was to be changed")
    return {**state_dict, weight: state_dict[weight].flip(1)}


def reverse_output(state_dict: _StateDict, layer: str) -> _StateDict:
    """Make a last convolution that gives BGR give RGB."""
    flipped = {f"{layer}.{entry}": state_dict[f"{layer}.{entry}"].flip(0) for entry in CONV}
    return {**state_dict, **flipped}


# --- from a name to a model ----------------------------------------------------------------------


def build_model(
    model_cls: Callable[..., _Model],
    variant: str,
    pretrained: bool,
    *,
    cache_dir: CacheDir = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_filter_fn: Callable[..., _StateDict] | None = None,
    **kwargs: Any,
) -> _Model:
    """Build a model as timm's `build_model_with_cfg` does, from verified weights.

    Weights that the caller names in `pretrained_cfg`, `hf-hub:` or `local-dir:` have the model's
    own layout, or that in which the weights of its name were released.

    Args:
        model_cls: The model's class.
        variant: Its entry point's name.
        pretrained: Load weights; every tensor must be there, but for those of a classifier
            whose `num_classes` differs.
        cache_dir: As in `fetch`.
        pretrained_cfg: As in timm.
        pretrained_cfg_overlay: As in timm.
        pretrained_filter_fn: As in timm.
        **kwargs: As in timm, and the rest for the class.

    Returns:
        The model, in train mode. Its `pretrained_cfg` tells of tag, licence and origin only if
        its weights have them.

    Raises:
        NotFoundError: If there are no weights to load.
        NotAsPromisedError: If the state dict has not exactly the model's keys.
        WeightsError: As in `fetch`.
    """
    if isinstance(size := kwargs.get("img_size"), int):
        kwargs["img_size"] = (size, size)
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    name = f"{variant}.{cfg.tag}" if cfg.tag else variant
    tensors = find_tensors(cfg, name, cache_dir) if pretrained else None
    published = _is_ours(cfg, name) or cfg.source in ("hf-hub", "local-dir")
    told = {
        key: value
        for key, value in vars(cfg).items()
        if value is not None and (key not in PROVENANCE or (pretrained and published))
    }

    def build(**arguments: Any) -> _Model:
        bare = None
        if tensors is not None and not cfg.state_dict:  # which stays the caller's own
            bare = without_numbers(lambda: model_cls(**arguments))
        if bare is not None and tensors is not None:
            fitting = _fitting(tensors, bare, name, told, pretrained_filter_fn)
            if give_numbers(bare, fitting):
                return bare
        model = model_cls(**arguments)
        if kwargs.get("features_only") and not hasattr(model, "feature_info"):
            raise ValueError(
                f"{variant} has no features_only; forward_features gives its last feature map"
            )
        if tensors is not None:
            fitting = _fitting(tensors, model, name, told, pretrained_filter_fn)
            _load(fitting, model, name, told, arguments.get("in_chans", 3))
        return model

    built: _Model = build_model_with_cfg(build, variant, False, pretrained_cfg=told, **kwargs)
    return built


def _is_ours(cfg: PretrainedCfg, name: str) -> bool:
    """Whether registered weights are meant, not what the caller put in their place."""
    if cfg.source in ("hf-hub", "local-dir") or cfg.file or cfg.state_dict or cfg.hf_hub_id:
        return False
    return name in _registered and cfg.url == _registered[name].source.pieces[0].url


def find_tensors(cfg: PretrainedCfg, name: str, cache_dir: CacheDir) -> StateDict:
    """The state dict that a `PretrainedCfg` leads to."""
    if _is_ours(cfg, name):
        return _fetched(name, cache_dir)[1]
    if cfg.state_dict:
        return dict(cfg.state_dict)
    if cfg.file:
        path = Path(cfg.file)
        return load_checkpoint(checkpoint_in(path) if path.is_dir() else path, name)
    if cfg.hf_hub_id:
        return load_checkpoint(hub_file(name, cfg.hf_hub_id, cfg.hf_hub_filename, cache_dir), name)
    if url := str(cfg.url or ""):
        piece = Piece(PurePosixPath(urlsplit(url).path).name, url, limit=URL_LIMIT)
        owner = hashlib.sha256(url.encode()).hexdigest()
        cache = Cache.at(cache_dir)
        with disk_advice():
            return load_checkpoint(cache.download(piece, owner), name)
    raise NotFoundError(
        f"there are no weights for {name!r}. Use pretrained=False, or a tag that has some: "
        "timm.list_models(..., pretrained=True)"
    )


def _fitting(
    tensors: StateDict,
    model: nn.Module,
    name: str,
    cfg: Mapping[str, Any],
    inner: Callable[..., _StateDict] | None,
) -> _StateDict:
    """A state dict under exactly the model's keys, but for those of a classifier."""
    # timm's own comparison is not strict where num_classes differs
    own = model.state_dict().keys()
    state_dict = without_prefixes(tensors, name, own)
    if not own <= state_dict.keys() and name in _registered:
        with suppress(KeyError, ValueError):  # of another layout
            state_dict = dict(_in_our_layout(tensors, _registered[name], name))
    fit = getattr(model, "fit_weights", None)
    if fit is not None:
        state_dict = fit(state_dict)
    if inner is not None:
        state_dict = inner(state_dict, model)
    classifiers = cfg.get("classifier") or ()
    heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    wrong = {key for key in own ^ state_dict.keys() if key.rpartition(".")[0] not in heads}
    if wrong:
        raise NotAsPromisedError(
            f"{name}: the weights do not fit the model; missing: {some_of(sorted(wrong & own))}; "
            f"unexpected: {some_of(sorted(wrong - own))}. Other keys go through "
            "create_fnet(checkpoint=, keys=)"
        )
    return state_dict


def _load(
    state_dict: _StateDict, model: nn.Module, name: str, cfg: Mapping[str, Any], in_chans: int
) -> None:
    """Load as timm does, which adapts the first convolution and leaves out another classifier."""
    if not state_dict:  # a network without weights
        return
    source = {**cfg, "state_dict": state_dict, "source": None}
    classes = getattr(model, "num_classes", 0)
    try:
        load_pretrained(model, source, num_classes=classes, in_chans=in_chans)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise NotAsPromisedError(f"{name}: the weights do not fit the model: {reason}") from error
