"""Plug-ins: modules of other packages that register models, distances, templates and the like."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TypeVar, cast

from idloss.errors import did_you_mean

PLUGIN_GROUP = "idloss.plugins"
"""Entry-point group of the modules that are imported before the first name is looked up."""

_BASICSR = """
torchvision no longer has that module. Where basicsr/data/degradations.py imports rgb_to_grayscale
from it, torchvision.transforms.functional is the place today."""

_loaded = False
_Thing = TypeVar("_Thing")
_Named = TypeVar("_Named")


class Registry(dict[str, _Thing]):
    """Things of a kind by their names."""

    def __init__(self, kind: str, **known: _Thing) -> None:
        super().__init__(known)
        self.kind = kind

    def register(self, name: str, thing: _Thing) -> None:
        """Add a thing whose name no other has."""
        if self.setdefault(name, thing) != thing:
            raise ValueError(f"there is another {self.kind} {name!r}: give this one its own name")

    def named(self, name: str) -> Callable[[_Named], _Named]:
        """Decorate a thing of this kind, so that it is found by a name that no other has."""

        def register(thing: _Named) -> _Named:
            self.register(name, cast("_Thing", thing))
            return thing

        return register

    def names(self) -> list[str]:
        """All names, those of plug-ins included, sorted."""
        load_plugins()
        return sorted(self)

    def find(self, name: str) -> _Thing:
        """The thing of a name, looked for among those of plug-ins too."""
        if name not in self:  # idloss's own are needed while it is imported, before plug-ins can be
            load_plugins()
        if name not in self:
            raise ValueError(did_you_mean(self.kind, name, self))
        return self[name]


def load_plugins() -> None:
    """Import the plug-ins of others, once; what cannot be imported is left out with a warning."""
    global _loaded
    if _loaded:
        return
    _loaded = True  # first: a plug-in may itself look a name up
    for plugin in entry_points(group=PLUGIN_GROUP):
        try:
            plugin.load()
        # Whatever a stranger's module raises, sys.exit included, must not take idloss down with it.
        except (Exception, SystemExit) as error:  # noqa: PERF203
            lacking = getattr(error, "name", None)  # of an import
            advice = _BASICSR if lacking == "torchvision.transforms.functional_tensor" else ""
            owner = f" of {plugin.dist.name} {plugin.dist.version}" if plugin.dist else ""
            warnings.warn(
                f"idloss plug-in {plugin.name!r} ({plugin.value}){owner} could not be loaded and "
                f"is left out: {type(error).__name__}: {error}{advice}",
                stacklevel=3,
            )
