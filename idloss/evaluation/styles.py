"""How methods look and what they are called, in every figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from idloss.evaluation.results import HR, LR


class Style(NamedTuple):
    """How a method looks, in every figure."""

    colour: str
    marker: str
    line: str


# The colours of Okabe and Ito (jfly.uni-koeln.de/color), told apart by colour-blind readers;
# markers and line styles repeat the distinction for print in grey. A network and its
# identity-preserving twin share a family: light and dark blue, orange and vermilion.
DASHED = "--"
BLACK, _GREY, _SKY, BLUE = "#000000", "#767676", "#56B4E9", "#0072B2"
ORANGE, _VERMILION, _GREEN, _PURPLE = "#E69F00", "#D55E00", "#009E73", "#CC79A7"
_FIXED = {
    HR: Style(BLACK, "*", DASHED),
    "bilinear": Style(_GREY, "v", ":"),
    "bicubic": Style(_GREY, "^", DASHED),
    "edsr16_64": Style(_SKY, "s", DASHED),
    "edsr16_64_id": Style(BLUE, "s", "-"),
    "edsr32_256": Style(ORANGE, "o", DASHED),
    "edsr32_256_id": Style(_VERMILION, "o", "-"),
}
_SPARE = (
    Style(_GREEN, "D", "-"),
    Style(_PURPLE, "P", "-"),
    Style(BLUE, "X", "-."),
    Style(_VERMILION, "h", "-."),
    Style(_GREEN, "<", DASHED),
    Style(_PURPLE, ">", DASHED),
)
_NAMES = {HR: "HR", LR: "LR"}

Styles = Mapping[str, Style]


def method_styles(methods: Iterable[str]) -> dict[str, Style]:
    """Give each method a colour, a marker and a line, the same in every figure.

    Interpolations, HR and the paper's networks always look alike. Others take what is left in the
    order of their names: where figures show different subsets of them, hand all figures the styles
    of the whole set.

    Args:
        methods: Names of SRNets and interpolations.

    Returns:
        Style by name.
    """
    names = list(dict.fromkeys(methods))
    others = sorted(set(names) - set(_FIXED))
    spare = {name: _SPARE[place % len(_SPARE)] for place, name in enumerate(others)}
    return {name: _FIXED[name] if name in _FIXED else spare[name] for name in names}


def method_name(method: str) -> str:
    """What a method is called in figures."""
    return _NAMES.get(method, method)
