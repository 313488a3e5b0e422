"""How idloss words its complaints, in one place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any


def did_you_mean(kind: str, name: str, known: Iterable[str]) -> str:
    """Word the error for an unknown name of a kind, with the nearest known ones first."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Known: {some_of(names, 20)}"


def import_extra(module: str, extra: str, what: str) -> Any:
    """A module that comes with an extra; the error where it is missing says of what use it is."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        advice = f"{what} {error.name}: pip install 'idloss[{extra}]'"
        raise ModuleNotFoundError(advice, name=error.name) from error


def some_of(names: Sequence[str], most: int = 8) -> str:
    """Word the first `most` of some names, and how many more there are.

    Names come from files of others: what a terminal would obey is escaped.
    """
    shown = [name if name.isprintable() else repr(name)[1:-1] for name in names[:most]]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(shown) or "none") + more
