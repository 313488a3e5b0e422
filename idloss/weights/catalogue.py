"""Which weights there are: what is known of each, by the `arch.tag` name that timm uses."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.models import get_pretrained_cfg, is_model
from torch import Tensor

from idloss.errors import did_you_mean
from idloss.weights.errors import UnknownWeightsError
from idloss.weights.sources import Source

Adapter = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
"""From the state dict of a released checkpoint to ours."""


@dataclass(frozen=True)
class Weights:
    """What is known of one set of weights.

    Args:
        source: Where they come from, pinned.
        licence: As its origin states it (an SPDX name where there is one), or that it states none.
        training_data: What the network was trained on.
        adapter: From the released state dict to ours; None where they are the same.
        description: One line for people: the loss it was trained with, its reported accuracy.
        trained_by: Who trained it, where that is not the origin's owner.
    """

    source: Source
    licence: str
    training_data: str
    adapter: Adapter | None = None
    description: str = ""
    trained_by: str = ""

    def cfg(self) -> dict[str, Any]:
        """What timm's `PretrainedCfg` has a place for, as keyword arguments.

        The `url` makes `list_models(pretrained=True)` list the model. Loading never follows it:
        `build_model` puts the verified file in its place.
        """
        about = (self.description, f"Trained on {self.training_data}.", self.trained_by)
        return {
            "url": self.source.pieces[0].url,
            "license": self.licence,
            "description": " ".join(part for part in about if part),
            "origin_url": self.source.origin_url,
        }

    @property
    def key(self) -> str:
        """A hash of the source's content and of the adapter's code: another one, other tensors."""
        parts = f"{self.source.fingerprint}\n{adapter_version(self.adapter)}"
        return hashlib.sha256(parts.encode()).hexdigest()


def adapter_version(adapter: Adapter | None) -> str:
    """Name an adapter together with a hash of its module's source, so that a changed one differs.

    Args:
        adapter: A function, or a `functools.partial` of one.

    Returns:
        `"none"`, or the qualified name, the arguments of a partial, and the hash.
    """
    if adapter is None:
        return "none"
    bound = ""
    while isinstance(adapter, functools.partial):
        bound += f"{adapter.args!r}{sorted(adapter.keywords.items())!r}"
        adapter = adapter.func
    module = inspect.getmodule(adapter)
    try:
        code = inspect.getsource(module if module is not None else adapter)
    except (OSError, TypeError):  # typed into an interpreter, or compiled
        code = repr(getattr(getattr(adapter, "__code__", None), "co_code", ""))
    name = f"{getattr(module, '__name__', '')}.{getattr(adapter, '__qualname__', repr(adapter))}"
    return f"{name}{bound}:{hashlib.sha256(code.encode()).hexdigest()[:16]}"


_registered: dict[str, Weights] = {}
_loaders: list[Callable[[], object]] = []


def register_weights(name: str, weights: Weights) -> Weights:
    """Make weights known under a name; the first one of equals stays.

    Args:
        name: `arch.tag`, as in timm; `arch` is the model's entry point.
        weights: What is known of them.

    Returns:
        The same `weights`, for `weights.cfg()` in the model's `default_cfgs`.

    Raises:
        ValueError: If other weights have the name.
    """
    known = _registered.setdefault(name, weights)
    # compared by the adapter's code: a module that is imported again brings equal functions
    if (known.source, adapter_version(known.adapter)) != (
        weights.source,
        adapter_version(weights.adapter),
    ):
        raise ValueError(f"weights {name!r} are registered already, from another source")
    return weights


def load_before_lookup(loader: Callable[[], object]) -> None:
    """Have `loader` called before a name counts as unknown: it may import model families.

    Args:
        loader: Without arguments; it may be called often.
    """
    _loaders.append(loader)


def is_registered(name: str) -> bool:
    """Whether weights are known under exactly this name."""
    return name in _registered


def get_weights(name: str) -> Weights:
    """Look up weights.

    Args:
        name: `arch.tag`, or `arch` for its default tag.

    Returns:
        What is known of them.

    Raises:
        UnknownWeightsError: If there are none; it says which there are.
    """
    return _registered[full_name(name)]


def full_name(name: str) -> str:
    """The `arch.tag` that `name` stands for: itself, or `arch` with its default tag.

    Args:
        name: `arch.tag` or `arch`.

    Raises:
        UnknownWeightsError: If no weights are registered for it.
    """
    if name not in _registered:
        for loader in _loaders:
            loader()
    if name not in _registered and "." not in name and is_model(name):
        cfg = get_pretrained_cfg(name)
        name = f"{name}.{cfg.tag}" if cfg is not None and cfg.tag else name
    if name not in _registered:
        raise UnknownWeightsError(did_you_mean("weights", name, _registered))
    return name
