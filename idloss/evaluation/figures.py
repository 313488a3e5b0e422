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

from idloss.evaluation.results import HR, Cell, Record, Results, Task
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
_BLACK, _GREY, _SKY, _BLUE = "#000000", "#767676", "#56B4E9", "#0072B2"
_ORANGE, _VERMILION, _GREEN, _PURPLE = "#E69F00", "#D55E00", "#009E73", "#CC79A7"
_FIXED = {
    HR: Style(_BLACK, "*", (dashed := "--")),
    "bilinear": Style(_GREY, "v", ":"),
    "bicubic": Style(_GREY, "^", dashed),
    "edsr16_64": Style(_SKY, "s", dashed),
    "edsr16_64_id": Style(_BLUE, "s", "-"),
    "edsr32_256": Style(_ORANGE, "o", dashed),
    "edsr32_256_id": Style(_VERMILION, "o", "-"),
}
_SPARE = (
    Style(_GREEN, "D", "-"),
    Style(_PURPLE, "P", "-"),
    Style(_BLUE, "X", "-."),
    Style(_VERMILION, "h", "-."),
    Style(_GREEN, "<", dashed),
    Style(_PURPLE, ">", dashed),
)
_GRID = "#D9D9D9"
_NAMES = {HR: "HR", "lr": "LR"}
_FONT = 9.0
_TITLE = 10.0
_DPI = 200
_BY = "\N{MULTIPLICATION SIGN}"

Curves = Mapping[str, Roc]
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


def accuracy_figure(
    results: Results,
    task: Task = "verification",
    metric: str | None = None,
    *,
    styles: Styles | None = None,
) -> Figure:
    """Accuracy against probe resolution (Fig. 1), a panel for each FNet.

    Sizes stand at equal distances, from small to large; bars are the intervals over folds or
    draws; HR is a line across.

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
    records = [record for record in results.records if record.cell.task == task]
    known = list(dict.fromkeys(record.metric for record in records))
    metric = metric or next((m for m in ("accuracy", "rank1", *known) if m in known), "accuracy")
    records = [record for record in records if record.metric == metric]
    if not records:
        raise ValueError(f"the run has no {metric!r} for {task}; it has {', '.join(known) or '-'}")
    styles = styles or method_styles(cell.srnet for cell in results.cells())
    fnets = list(dict.fromkeys(record.cell.fnet for record in records))
    figure, panels = _panels(len(fnets), width=3.6, height=3.3, share_y=True)
    for fnet, axes in zip(fnets, panels, strict=True):
        mine = [record for record in records if record.cell.fnet == fnet]
        _accuracy_panel(axes, mine, styles)
        axes.set_title(_wrapped(fnet, 36), fontsize=_TITLE)
    panels[0].set_ylabel(f"{_metric_name(metric)} (%)")
    _legend(figure, panels)
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
    figure, (axes,) = _panels(1, width=4.8, height=3.9)
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
            label=f"{_label(name)} (AUC {curve.auc:.4f})",
        )
    axes.set_xscale("log")
    axes.set_xlim(far_floor, 1)
    axes.set_ylim(0, 101)
    axes.set_xlabel("False accept rate")
    axes.set_ylabel("True accept rate (%)")
    axes.set_title(title, fontsize=_TITLE)
    _legend(figure, [axes])
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
    figure, (axes,) = _panels(1, width=4.8, height=3.9)
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
            label=f"{_label(name)} (rank 1: {mean[0]:.2f} %)",
        )
        axes.fill_between(
            ranks, mean - spread, mean + spread, color=style.colour, alpha=0.2, linewidth=0
        )
    longest = max(np.atleast_2d(np.asarray(draws)).shape[1] for draws in curves.values())
    step = max(1, longest // 20) * 5 if longest > 10 else 1
    axes.set_xticks(sorted({1, *range(step, longest + 1, step)}))
    axes.set_xlim(0.5, longest + 0.5)
    axes.set_ylim(0, 101)
    axes.set_xlabel("Rank")
    axes.set_ylabel("Identification rate (%)")
    axes.set_title(title, fontsize=_TITLE)
    _legend(figure, [axes])
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
    figure, panels = _panels(len(values), width=3.1, height=2.5, columns=columns, share_y=True)
    for place, (name, row) in enumerate(values.items()):
        axes = panels[place]
        for members, colour, hatch, label in (
            (~truth, _ORANGE, None, "different people"),
            (truth, _BLUE, "////", "same person"),
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
                thresholds[name], color=_BLACK, linestyle=dashed, linewidth=1, label="threshold"
            )
        axes.set_title(_wrapped(_label(name), 32), fontsize=_TITLE)
        if place + columns >= len(values):
            axes.set_xlabel("Cosine similarity")
        if place % columns == 0:
            axes.set_ylabel("Pairs (% of class)")
    if title:
        figure.suptitle(title, fontsize=_TITLE)
    _legend(figure, panels[:1])
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
    figure, panels = _panels(
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
                small = _pretty_size(images) if images.shape[-2:] != (height, width) else ""
                head = filter(None, (_wrapped(_label(name), 14), small))
                axes.set_title("\n".join(head), fontsize=_FONT)
            if column == 0 and names:
                axes.set_ylabel(names[row], fontsize=_FONT - 1)
            if name in marks:
                best = name in rated and marks[name][row] >= max(marks[r][row] for r in rated)
                axes.set_xlabel(
                    f"{marks[name][row]:.3f}",
                    fontsize=_FONT,
                    labelpad=2,
                    fontweight="bold" if best else "normal",
                )
    if title:
        figure.suptitle(title, fontsize=_TITLE)
    if marks:
        figure.supxlabel("Under each face: cosine similarity to HR", fontsize=_FONT - 0.5)
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


def _accuracy_panel(axes: Axes, records: Sequence[Record], styles: Styles) -> None:
    degraded = [record for record in records if record.cell.srnet != HR]
    sizes = sorted({_size(record.cell) for record in degraded}, key=lambda s: (s[0] * s[1], s))
    for name in dict.fromkeys(record.cell.srnet for record in degraded):
        mine = [record for record in degraded if record.cell.srnet == name]
        mine.sort(key=lambda record: sizes.index(_size(record.cell)))
        found = [record.estimate for record in mine]
        values = 100 * np.array([one.value for one in found])
        # the interval is round the mean of the folds, which need not be the figure of all pairs
        reach = 100 * np.array([[one.mean - one.low, one.high - one.mean] for one in found]).T
        style = styles[name]
        axes.errorbar(
            [sizes.index(_size(record.cell)) for record in mine],
            values,
            yerr=np.nan_to_num(reach),
            color=style.colour,
            linestyle=style.line,
            marker=style.marker,
            markersize=5,
            capsize=2,
            elinewidth=1,
            label=_label(name),
        )
    for record in records:
        if record.cell.srnet == HR:
            value = 100 * record.estimate.value
            style = styles.get(HR, _FIXED[HR])
            axes.axhline(value, color=style.colour, linestyle=style.line, linewidth=1, label="HR")
    axes.set_xticks(range(len(sizes)), [f"{height}{_BY}{width}" for height, width in sizes])
    axes.set_xlim(-0.3, len(sizes) - 0.7)
    if len(sizes) > 5:
        axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlabel("Probe resolution (pixels, height \N{MULTIPLICATION SIGN} width)")


def _panels(
    count: int,
    *,
    width: float,
    height: float,
    columns: int | None = None,
    share_y: bool = False,
    grid: bool = True,
) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, sizes in inches; the places that are over stay empty."""
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
        axes.tick_params(labelsize=_FONT - 1)
        axes.xaxis.label.set_fontsize(_FONT)
        axes.yaxis.label.set_fontsize(_FONT)
        if grid:
            axes.grid(visible=True, color=_GRID, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend under all panels, each method once."""
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
        fontsize=_FONT - 0.5,
        handlelength=2.6,
    )


def _require_some(curves: Mapping[str, Any]) -> list[str]:
    if not curves:
        raise ValueError("nothing to draw: give at least one method")
    return list(curves)


def _pictures(images: Tensor) -> NDArray[np.uint8]:
    levels = to_uint8(images) if images.is_floating_point() else images
    pictures: NDArray[np.uint8] = levels.permute(0, 2, 3, 1).cpu().numpy()
    return pictures


def _pretty_size(images: Tensor) -> str:
    return f"{images.shape[-2]}{_BY}{images.shape[-1]}"


def _size(cell: Cell) -> tuple[int, int]:
    return cell.height, cell.width


def _label(name: str) -> str:
    return _NAMES.get(name, name)


def _wrapped(name: str, width: int) -> str:
    """A name on as many lines as it needs: those from timm and the Hub are long."""
    lines = [""]
    for part in re.split(r"(?<=[/_.-])", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _metric_name(metric: str) -> str:
    if metric == "accuracy":
        return "Verification accuracy"
    if metric.startswith("rank"):
        return f"Rank-{metric.removeprefix('rank')} identification rate"
    return metric.upper().replace("FAR=", "FAR ").replace("FPIR=", "FPIR ")
