"""What is wrong with a data set: every fault named, counted, and fatal unless skipped."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

SHOWN = 10


class Fault(NamedTuple):
    """One thing wrong with a data set.

    Attributes:
        where: the file, with its line or archive member, e.g. `pairs.txt:17`.
        what: what is wrong there.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class DataError(ValueError):
    """A data set cannot be used as it is.

    Args:
        faults: what is wrong; the first ten are spelt out in the message.
        remedy: the way out, one sentence.
    """

    def __init__(self, faults: Iterable[Fault], remedy: str = "") -> None:
        self.faults = tuple(faults)
        self.remedy = remedy
        super().__init__(describe(self.faults) + (f"\n{remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[type[DataError], tuple[tuple[Fault, ...], str]]:
        # the default would rebuild from the message alone, and fail on the way out of a worker
        return (type(self), (self.faults, self.remedy))


def describe(faults: tuple[Fault, ...]) -> str:
    """Spell out faults, one a line, the first ten of them.

    Args:
        faults: at least one.

    Returns:
        One line for a single fault, else a count and a list.
    """
    if len(faults) == 1:
        return str(faults[0])
    lines = [f"{len(faults)} faults:", *(f"  {fault}" for fault in faults[:SHOWN])]
    if len(faults) > SHOWN:
        lines.append(f"  ... and {len(faults) - SHOWN} more")
    return "\n".join(lines)


def settle(faults: Iterable[Fault], *, skip_missing: bool) -> tuple[Fault, ...]:
    """Stop at faults, or skip them with a warning and hand them on to be recorded.

    Args:
        faults: what was found wrong, possibly nothing.
        skip_missing: True leaves the faulty items out.

    Returns:
        The faults that were skipped.

    Raises:
        DataError: there are faults and `skip_missing` is False.
    """
    found = tuple(faults)
    if found and not skip_missing:
        raise DataError(found, "Mend them, or pass skip_missing=True to leave them out.")
    if found:
        warnings.warn(f"left out: {describe(found)}", UserWarning, stacklevel=3)
    return found
