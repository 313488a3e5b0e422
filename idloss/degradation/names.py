"""Degradations by name, as recipes write them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from idloss.degradation.base import Degradation
from idloss.degradation.bicubic import BicubicDegradation
from idloss.degradation.real_world import RealWorldDegradation
from idloss.errors import did_you_mean

DEGRADATIONS: Mapping[str, Callable[..., Degradation]] = MappingProxyType(
    {"bicubic": BicubicDegradation, "real_world": RealWorldDegradation}
)


def get_degradation(name: str, **options: Any) -> Degradation:
    """Make a degradation.

    Args:
        name: One of `DEGRADATIONS`.
        **options: Its arguments.

    Returns:
        The degradation.

    Raises:
        ValueError: The name or an option is unknown, or an option is out of range.
    """
    if name not in DEGRADATIONS:
        raise ValueError(did_you_mean("degradation", name, DEGRADATIONS))
    kind = DEGRADATIONS[name]
    known = inspect.signature(kind).parameters
    for option in options:
        if option not in known:
            raise ValueError(did_you_mean(f"option of degradation {name!r}", option, known))
    return kind(**options)
