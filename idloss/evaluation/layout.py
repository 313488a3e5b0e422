"""Panels, legends and words of figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FONT = 9.0
TITLE = 10.0
_GRID = "#D9D9D9"


def lay_out(
    count: int,
    *,
    width: float,
    height: float,
    columns: int | None = None,
    share_y: bool = False,
    grid: bool = True,
) -> tuple[Figure, list[Axes]]:
    """Make a figure of panels; the places that are over stay empty.

    Args:
        count: How many panels.
        width: Of a panel, in inches.
        height: Of a panel, in inches.
        columns: Panels side by side; None for all.
        share_y: One y axis for all.
        grid: Draw a grid, and no frame above and to the right.

    Returns:
        The figure and its panels, row by row.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "figures need matplotlib, which comes with the extra: pip install 'idloss[eval]'"
        ) from error
    columns = columns or count
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns + 0.6, height * rows + 0.7), layout="constrained")
    laid_out = figure.subplots(rows, columns, sharey=share_y, squeeze=False).ravel()
    for unused in laid_out[count:]:
        unused.remove()
    panels: list[Axes] = list(laid_out[:count])
    for axes in panels:
        axes.tick_params(labelsize=FONT - 1)
        axes.xaxis.label.set_fontsize(FONT)
        axes.yaxis.label.set_fontsize(FONT)
        if grid:
            axes.grid(visible=True, color=_GRID, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Put one legend under all panels, each method once.

    Args:
        figure: The figure.
        panels: Those of its panels that have entries.
    """
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    for last in ("HR", "threshold"):  # what is only a line across comes after the methods
        if last in entries:
            entries[last] = entries.pop(last)
    # inches: the line and the gap before a label, and about what a letter takes
    entry = 0.6 + 0.065 * max(map(len, entries))
    columns = int(figure.get_figwidth() / entry)
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=max(1, min(len(entries), columns)),
        frameon=False,
        fontsize=FONT - 0.5,
        handlelength=2.6,
    )


def wrapped(name: str, width: int) -> str:
    """A name on as many lines as it needs: those from timm and the Hub are long.

    Args:
        name: The name.
        width: Letters in a line.

    Returns:
        The name, broken behind a slash, an underscore, a dot or a dash.
    """
    lines = [""]
    for part in re.split(r"(?<=[/_.-])", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
