"""How idloss words its complaints, in one place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(kind: str, name: str, known: Iterable[str]) -> str:
    """Word the error for an unknown name of a kind, with the nearest known ones first."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Known: {some_of(names, 20)}"


def some_of(names: Sequence[str], most: int = 8) -> str:
    """Word the first `most` of some names, and how many more there are.

    Names come from files of others: what a terminal would obey is escaped.
    """
    shown = [name if name.isprintable() else repr(name)[1:-1] for name in names[:most]]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(shown) or "none") + more
