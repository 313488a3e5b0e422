"""Figures 1 and 5 of the paper and the curves people ask for, as PNG and PDF.

matplotlib comes with the extra `eval` and is imported when a figure is drawn. No figure touches
matplotlib's global state: each is a `Figure` of its own, to be changed or saved by the caller.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from idloss.evaluation.results import (
    HR,
    LR,
    Cell,
    Record,
    Results,
    Task,
    metric_title,
    pretty_size,
)
from idloss.evaluation.verification import Roc
from idloss.resample import to_uint8

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


_DPI = 200

Curves = Mapping[str, Roc]


def accuracy_figure(
    results: Results,
    task: Task = "verification",
    metric: str | None = None,
    *,
    styles: Styles | None = None,
) -> Figure:
    """Accuracy against probe resolution (Fig. 1), a panel for each FNet.

    Sizes stand at equal distances, from small to large; bars are the intervals over folds or
    draws, cut off at 0 and 100 %; HR is a line across.

    Args:
        results: The run.
        task: Which task to show.
        metric: The metric; None for accuracy, rank 1, or the first there is.
        styles: Styles by method; None for those of the run's methods.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: The run has no such results.
    """
    records = results.select(task, metric)
    styles = styles or method_styles(cell.srnet for cell in results.cells())
    fnets = list(dict.fromkeys(record.cell.fnet for record in records))
    figure, panels = lay_out(len(fnets), width=3.6, height=3.3, share_y=True)
    for fnet, axes in zip(fnets, panels, strict=True):
        mine = [record for record in records if record.cell.fnet == fnet]
        _accuracy_panel(axes, mine, styles)
        axes.set_title(wrapped(fnet, 36), fontsize=TITLE)
    panels[0].set_ylabel(f"{metric_title(records[0].metric)} (%)")
    legend(figure, panels)
    return figure


def roc_figure(
    curves: Curves, *, title: str = "", far_floor: float = 1e-4, styles: Styles | None = None
) -> Figure:
    """ROC curves over a logarithmic FAR.

    Args:
        curves: ROC of each method.
        title: What was measured.
        far_floor: Left end of the FAR axis.
        styles: Styles by method.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: There are no curves.
    """
    styles = styles or method_styles(_require_some(curves))
    figure, (axes,) = lay_out(1, width=4.8, height=3.9)
    for name, curve in curves.items():
        style = styles[name]
        # FAR 0 has no place on the axis: a step from its left end to the first false accept
        far = np.maximum(curve.far, far_floor / 10)
        axes.step(
            far,
            100 * curve.tar,
            where="post",
            color=style.colour,
            linestyle=style.line,
            label=f"{method_name(name)} (AUC {curve.auc:.4f})",
        )
    axes.set_xscale("log")
    axes.set_xlim(far_floor, 1)
    _finish_curves(figure, axes, "False accept rate", "True accept rate (%)", title)
    return figure


def cmc_figure(
    curves: Mapping[str, ArrayLike], *, title: str = "", styles: Styles | None = None
) -> Figure:
    """CMC curves: mean over the draws, and one standard deviation either side as a band.

    Args:
        curves: CMC of each method in each draw, `[draws, R]`.
        title: What was measured.
        styles: Styles by method.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: There are no curves.
    """
    styles = styles or method_styles(_require_some(curves))
    figure, (axes,) = lay_out(1, width=4.8, height=3.9)
    for name, draws in curves.items():
        style = styles[name]
        shares = 100 * np.atleast_2d(np.asarray(draws))
        ranks = np.arange(1, shares.shape[1] + 1)
        mean, spread = shares.mean(0), shares.std(0)
        axes.plot(
            ranks,
            mean,
            color=style.colour,
            linestyle=style.line,
            marker=style.marker,
            markevery=max(1, len(ranks) // 10),
            markersize=5,
            label=f"{method_name(name)} (rank 1: {mean[0]:.2f} %)",
        )
        axes.fill_between(
            ranks, mean - spread, mean + spread, color=style.colour, alpha=0.2, linewidth=0
        )
    longest = max(np.atleast_2d(np.asarray(draws)).shape[1] for draws in curves.values())
    step = max(1, longest // 20) * 5 if longest > 10 else 1
    axes.set_xticks(sorted({1, *range(step, longest + 1, step)}))
    axes.set_xlim(0.5, longest + 0.5)
    _finish_curves(figure, axes, "Rank", "Identification rate (%)", title)
    return figure


def similarity_figure(
    scores: Mapping[str, ArrayLike],
    same: ArrayLike,
    *,
    thresholds: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """Histograms of the similarities of same-person and different-person pairs.

    Args:
        scores: Cosines of each method, `[N]`; a panel for each.
        same: Whether each pair is of one person, `[N]`.
        thresholds: Threshold of each method, drawn as a line.
        title: What was measured.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: There are no scores.
    """
    _require_some(scores)
    truth = np.asarray(same).astype(bool)
    values = {name: np.asarray(row, dtype=np.float64) for name, row in scores.items()}
    low = min(row.min() for row in values.values())
    high = max(row.max() for row in values.values())
    edges = np.linspace(low, high, 61)
    columns = min(3, len(values))
    figure, panels = lay_out(len(values), width=3.1, height=2.5, columns=columns, share_y=True)
    for place, (name, row) in enumerate(values.items()):
        axes = panels[place]
        for members, colour, hatch, label in (
            (~truth, ORANGE, None, "different people"),
            (truth, BLUE, "////", "same person"),
        ):
            weights = np.full(int(members.sum()), 100 / max(1, int(members.sum())))
            axes.hist(
                row[members],
                edges.tolist(),
                weights=weights,
                histtype="stepfilled",
                facecolor=(colour, 0.35),
                edgecolor=colour,
                hatch=hatch,
                linewidth=1.0,
                label=label,
            )
        if thresholds and name in thresholds:
            axes.axvline(
                thresholds[name], color=BLACK, linestyle=DASHED, linewidth=1, label="threshold"
            )
        axes.set_title(wrapped(method_name(name), 32), fontsize=TITLE)
        if place + columns >= len(values):
            axes.set_xlabel("Cosine similarity")
        if place % columns == 0:
            axes.set_ylabel("Pairs (% of class)")
    if title:
        figure.suptitle(title, fontsize=TITLE)
    legend(figure, panels[:1])
    return figure


def picture_sheet(
    columns: Mapping[str, Tensor],
    cosines: Mapping[str, ArrayLike] | None = None,
    *,
    names: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """The sheet of Fig. 5: a face in each row, LR, each method and HR in columns.

    Args:
        columns: Images of each column, `[B, 3, H, W]`, uint8 or float in [0, 1], RGB, in the order
            they are to stand; sizes may differ, all are shown at the size of the last (HR) without
            smoothing.
        cosines: Cosine to HR of each column's faces, `[B]`, written under them; the best of each
            row (HR apart) is bold.
        names: Name of each row.
        title: What is shown.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: There are no columns, or they differ in how many faces they hold.
    """
    _require_some(columns)
    counts = {name: len(images) for name, images in columns.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"columns hold different numbers of faces: {counts}")
    rows = next(iter(counts.values()))
    marks = {name: np.asarray(row, dtype=np.float64) for name, row in (cosines or {}).items()}
    rated = [name for name in columns if name in marks and name != HR]
    height, width = list(columns.values())[-1].shape[-2:]
    side = 1.15
    figure, panels = lay_out(
        rows * len(columns),
        width=side,
        height=side * height / width + (0.2 if marks else 0.05),
        columns=len(columns),
        grid=False,
    )
    for column, (name, images) in enumerate(columns.items()):
        pictures = _pictures(images)
        for row in range(rows):
            axes = panels[row * len(columns) + column]
            axes.imshow(pictures[row], extent=(0, width, height, 0), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for edge in axes.spines.values():
                edge.set_visible(False)
            if row == 0:
                head = wrapped(method_name(name), 14)
                if images.shape[-2:] != (height, width):
                    head += f"\n{pretty_size(images.shape[-2:])}"
                axes.set_title(head, fontsize=FONT)
            if column == 0 and names:
                axes.set_ylabel(names[row], fontsize=FONT - 1)
            if name in marks:
                best = name in rated and marks[name][row] >= max(marks[r][row] for r in rated)
                axes.set_xlabel(
                    f"{marks[name][row]:.3f}",
                    fontsize=FONT,
                    labelpad=2,
                    fontweight="bold" if best else "normal",
                )
    if title:
        figure.suptitle(title, fontsize=TITLE)
    if marks:
        figure.supxlabel("Under each face: cosine similarity to HR", fontsize=FONT - 0.5)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> list[Path]:
    """Save a figure as PNG and PDF beside each other.

    Args:
        figure: The figure.
        path: Where, with or without `.png` or `.pdf`.

    Returns:
        The two files.

    Raises:
        OSError: The folder cannot be written to.
    """
    import matplotlib as mpl

    given = Path(path)
    stem = given.with_suffix("") if given.suffix in (".png", ".pdf") else given
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]
    # TrueType fonts in the PDF: publishers refuse matplotlib's default, Type 3
    with mpl.rc_context({"pdf.fonttype": 42}):
        for file in files:
            figure.savefig(file, dpi=_DPI)
    return files


def _finish_curves(figure: Figure, axes: Axes, across: str, up: str, title: str) -> None:
    """Name the axes of a figure of rates, and the methods."""
    axes.set_ylim(0, 101)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_title(title, fontsize=TITLE)
    legend(figure, [axes])


def _accuracy_panel(axes: Axes, records: Sequence[Record], styles: Styles) -> None:
    degraded = [record for record in records if record.cell.srnet != HR]
    sizes = sorted({_size(record.cell) for record in degraded}, key=lambda s: (s[0] * s[1], s))
    names = list(dict.fromkeys(record.cell.srnet for record in degraded))
    apart = min(0.08, 0.5 / max(1, len(names)))
    for number, name in enumerate(names):
        mine = [record for record in degraded if record.cell.srnet == name]
        mine.sort(key=lambda record: sizes.index(_size(record.cell)))
        found = [record.estimate for record in mine]
        values = 100 * np.array([one.value for one in found])
        # the interval is round the mean of the folds, which need not be the figure of all pairs
        reach = 100 * np.array([[one.mean - one.low, one.high - one.mean] for one in found]).T
        # Student's interval of a few folds may reach beyond all that a share can be
        reach = np.minimum(np.nan_to_num(reach), [values, 100 - values])
        # side by side, so that one method's bar does not hide another's
        shift = apart * (number - (len(names) - 1) / 2)
        style = styles[name]
        axes.errorbar(
            [sizes.index(_size(record.cell)) + shift for record in mine],
            values,
            yerr=reach,
            color=style.colour,
            linestyle=style.line,
            marker=style.marker,
            markersize=5,
            capsize=2,
            elinewidth=1,
            label=method_name(name),
        )
    for record in records:
        if record.cell.srnet == HR:
            value = 100 * record.estimate.value
            style = {**method_styles([HR]), **styles}[HR]
            axes.axhline(value, color=style.colour, linestyle=style.line, linewidth=1, label="HR")
    axes.set_xticks(range(len(sizes)), [pretty_size(size) for size in sizes])
    axes.set_xlim(-0.3, len(sizes) - 0.7)
    if len(sizes) > 5:
        axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlabel("Probe resolution (pixels, height \N{MULTIPLICATION SIGN} width)")


def _require_some(curves: Mapping[str, Any]) -> list[str]:
    if not curves:
        raise ValueError("nothing to draw: give at least one method")
    return list(curves)


def _pictures(images: Tensor) -> NDArray[np.uint8]:
    levels = to_uint8(images) if images.is_floating_point() else images
    pictures: NDArray[np.uint8] = levels.permute(0, 2, 3, 1).cpu().numpy()
    return pictures


def _size(cell: Cell) -> tuple[int, int]:
    return cell.height, cell.width


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
