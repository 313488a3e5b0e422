"""How idloss words its complaints, in one place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(kind: str, name: str, known: Iterable[str]) -> str:
    """Word the error for an unknown name, with the nearest known ones first.

    Args:
        kind: What the name was to be, such as `"distance"`.
        name: The name seen.
        known: The names there are.

    Returns:
        One line: the name, its likeliest meaning, and all there is to choose from.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}"
