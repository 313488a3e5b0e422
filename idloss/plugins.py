"""Plug-ins: modules of other packages that register models, distances, templates and the like."""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points

PLUGIN_GROUP = "idloss.plugins"
"""Entry-point group of the modules that are imported before the first name is looked up."""

_loaded = False


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
            owner = f" of {plugin.dist.name} {plugin.dist.version}" if plugin.dist else ""
            warnings.warn(
                f"idloss plug-in {plugin.name!r} ({plugin.value}){owner} could not be loaded and "
                f"is left out: {type(error).__name__}: {error}",
                stacklevel=3,
            )
