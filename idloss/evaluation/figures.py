"""Figures 1 and 5 of the paper and the curves people ask for, as PNG and PDF.

matplotlib, of the extra `eval`, is imported when a figure is drawn; its state is not touched.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from idloss.errors import import_extra
from idloss.evaluation.results import (
    HR,
    LR,
    Record,
    Results,
    metric_title,
    pretty_size,
    rising_sizes,
    write_together,
)
from idloss.evaluation.verification import Roc
from idloss.resample import to_uint8

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Styles = Mapping[str, dict[str, Any]]

_DPI = 200
_FAR_FLOOR = 1e-4
_FONT, _TITLE = 9.0, 10.0

# The colours of Okabe and Ito (jfly.uni-koeln.de/color), told apart by colour-blind readers;
# markers and line styles repeat the distinction for print in grey. A network and its
# identity-preserving twin share a family: light and dark blue, orange and vermilion.
_BLACK, _GREY, _SKY, _BLUE = "#000000", "#767676", "#56B4E9", "#0072B2"
_ORANGE, _VERMILION, _GREEN, _PURPLE = "#E69F00", "#D55E00", "#009E73", "#CC79A7"
_FIXED = {
    HR: (_BLACK, "*", "--"),
    "bilinear": (_GREY, "v", ":"),
    "bicubic": (_GREY, "^", "--"),
    "edsr16_64": (_SKY, "s", "--"),
    "edsr16_64_id": (_BLUE, "s", "-"),
    "edsr32_256": (_ORANGE, "o", "--"),
    "edsr32_256_id": (_VERMILION, "o", "-"),
}
_SPARE = (
    *((_GREEN, "D", "-"), (_PURPLE, "P", "-"), (_BLUE, "X", "-.")),
    *((_VERMILION, "h", "-."), (_GREEN, "<", "--"), (_PURPLE, ">", "--")),
)


def method_styles(methods: Iterable[str]) -> Styles:
    """A colour, a marker and a line for each method; what is not the paper's takes what is left."""
    styles = {}
    spare = itertools.cycle(_SPARE)
    for name in sorted(set(methods)):
        color, marker, line = _FIXED.get(name) or next(spare)
        styles[name] = {"color": color, "marker": marker, "markersize": 5, "linestyle": line}
    return styles


def accuracy_figure(results: Results, task: str, styles: Styles) -> Figure:
    """Accuracy against probe resolution (Fig. 1), a panel for each FNet; HR is a line across."""
    records = results.select(task)
    fnets = list(dict.fromkeys(record.cell.fnet for record in records))
    figure, panels = _panels(len(fnets), width=3.6, height=3.3)
    for fnet, axes in zip(fnets, panels, strict=True):
        _accuracy_panel(axes, [one for one in records if one.cell.fnet == fnet], styles)
        axes.set_title(_wrapped(_shown(fnet), 36), fontsize=_TITLE)
    panels[0].set_ylabel(f"{metric_title(records[0].metric)} (%)")
    _add_legend(figure, panels)
    return figure


def _accuracy_panel(axes: Axes, records: Sequence[Record], styles: Styles) -> None:
    degraded = [record for record in records if record.cell.srnet != HR]
    sizes = rising_sizes(record.cell for record in degraded)
    names = list(dict.fromkeys(record.cell.srnet for record in degraded))
    apart = min(0.08, 0.5 / max(1, len(names)))
    for number, name in enumerate(names):
        own = [record for record in degraded if record.cell.srnet == name]
        own.sort(key=lambda record: sizes.index((record.cell.height, record.cell.width)))
        places = [sizes.index((record.cell.height, record.cell.width)) for record in own]
        found = [record.estimate for record in own]
        values = 100 * np.array([one.value for one in found])
        # the interval is round the mean of the folds, which need not be the figure of all pairs
        reach = 100 * np.array([[one.mean - one.low, one.high - one.mean] for one in found]).T
        # Student's interval of a few folds may reach beyond all that a share can be
        reach = np.minimum(np.nan_to_num(reach), [values, 100 - values])
        # side by side, so that one method's bar does not hide another's
        beside = np.array(places) + apart * (number - (len(names) - 1) / 2)
        options: dict[str, Any] = {"capsize": 2, "elinewidth": 1, **styles[name]}
        axes.errorbar(beside, values, reach, label=_shown(name), **options)
    for record in records:
        if record.cell.srnet == HR:
            level = 100 * record.estimate.value
            axes.axhline(level, linewidth=1, label="HR", color=_BLACK, linestyle="--")
    axes.set_xticks(range(len(sizes)), [pretty_size(size) for size in sizes])
    axes.set_xlim(-0.3, len(sizes) - 0.7)
    if len(sizes) > 5:
        axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlabel("Probe resolution (pixels, height \N{MULTIPLICATION SIGN} width)")


def roc_figure(curves: Mapping[str, Roc], title: str, styles: Styles) -> Figure:
    """ROC curves of each method over a logarithmic FAR."""
    figure, (axes,) = _panels(1, width=4.8, height=3.9)
    for name, curve in curves.items():
        label = f"{_shown(name)} (AUC {curve.auc:.4f})"
        # FAR 0 has no place on the axis: a step from its left end to the first false accept
        far = np.maximum(curve.far, _FAR_FLOOR / 10)
        axes.step(far, 100 * curve.tar, where="post", label=label, **styles[name] | {"marker": ""})
    axes.set_xscale("log")
    axes.set_xlim(_FAR_FLOOR, 1)
    _name_rates(figure, axes, "False accept rate", "True accept rate (%)", title)
    return figure


def cmc_figure(curves: Mapping[str, ArrayLike], title: str, styles: Styles) -> Figure:
    """CMC curves `[draws, R]` of each method: the mean, one deviation either side as a band."""
    figure, (axes,) = _panels(1, width=4.8, height=3.9)
    longest = 1
    for name, draws in curves.items():
        shares = 100 * np.atleast_2d(np.asarray(draws))
        ranks = np.arange(1, shares.shape[1] + 1)
        longest = max(longest, len(ranks))
        mean, spread = shares.mean(0), shares.std(0)
        label = f"{_shown(name)} (rank 1: {mean[0]:.2f} %)"
        axes.plot(ranks, mean, markevery=max(1, len(ranks) // 10), label=label, **styles[name])
        band = {"color": styles[name]["color"], "alpha": 0.2, "linewidth": 0}
        axes.fill_between(ranks, mean - spread, mean + spread, **band)
    step = max(1, longest // 20) * 5 if longest > 10 else 1
    axes.set_xticks(sorted({1, *range(step, longest + 1, step)}))
    axes.set_xlim(0.5, longest + 0.5)
    _name_rates(figure, axes, "Rank", "Identification rate (%)", title)
    return figure


def similarity_figure(
    scores: Mapping[str, ArrayLike],
    same: ArrayLike,
    thresholds: Mapping[str, float],
    title: str,
) -> Figure:
    """Histograms of the cosines `[N]` of same-person and different-person pairs, by method."""
    truth = np.asarray(same).astype(bool)
    values = {name: np.asarray(row, dtype=np.float64) for name, row in scores.items()}
    everything = np.concatenate([*values.values()])
    edges = np.linspace(everything.min(), everything.max(), 61).tolist()
    kinds = ((~truth, "different people", _ORANGE, None), (truth, "same person", _BLUE, "////"))
    columns = min(3, len(values))
    figure, panels = _panels(len(values), width=3.1, height=2.5, columns=columns)
    for place, (name, row) in enumerate(values.items()):
        axes = panels[place]
        for members, label, colour, hatch in kinds:
            shares = np.full(members.sum(), 100 / max(1, members.sum()))
            look: dict[str, Any] = {
                "facecolor": (colour, 0.35),
                "edgecolor": colour,
                "hatch": hatch,
            }
            look |= {"histtype": "stepfilled", "linewidth": 1.0, "label": label}
            axes.hist(row[members], edges, weights=shares, **look)
        if name in thresholds:
            line: dict[str, Any] = {"color": _BLACK, "linestyle": "--", "linewidth": 1}
            axes.axvline(thresholds[name], label="threshold", **line)
        axes.set_title(_wrapped(_shown(name), 32), fontsize=_TITLE)
        if place + columns >= len(values):
            axes.set_xlabel("Cosine similarity")
        if place % columns == 0:
            axes.set_ylabel("Pairs (% of class)")
    figure.suptitle(_title(figure, title), fontsize=_TITLE)
    _add_legend(figure, panels[:1])
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
    counts = {name: len(images) for name, images in columns.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"columns must hold one number of faces each, got {counts}")
    rows = next(iter(counts.values()))
    marks = {name: np.asarray(row, dtype=np.float64) for name, row in (cosines or {}).items()}
    rated = [row for name, row in marks.items() if name in columns and name != HR]
    height, width = list(columns.values())[-1].shape[-2:]
    inches = {"width": 1.15, "height": 1.15 * height / width + (0.2 if marks else 0.05)}
    figure, panels = _panels(rows * len(columns), columns=len(columns), share_y=False, **inches)
    for column, (name, images) in enumerate(columns.items()):
        levels = to_uint8(images) if images.is_floating_point() else images
        pictures = levels.permute(0, 2, 3, 1).cpu().numpy()
        for row in range(rows):
            axes = panels[row * len(columns) + column]
            axes.imshow(pictures[row], extent=(0, width, height, 0), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row == 0:
                head = _wrapped(_shown(name), 14)
                if images.shape[-2:] != (height, width):
                    head += f"\n{pretty_size(images.shape[-2:])}"
                axes.set_title(head, fontsize=_FONT)
            if column == 0 and names:
                axes.set_ylabel(_shown(names[row]), fontsize=_FONT - 1)
            if name in marks:
                own = marks[name][row]
                best = name != HR and own >= max(other[row] for other in rated)
                weight = "bold" if best else "normal"
                axes.set_xlabel(f"{own:.3f}", labelpad=2, fontweight=weight)
    if title:
        figure.suptitle(_title(figure, title), fontsize=_TITLE)
    if marks:
        figure.supxlabel("Under each face: cosine similarity to HR", fontsize=_FONT - 0.5)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> list[Path]:
    """Save a figure as PNG and PDF beside each other, both of them or none.

    Args:
        figure: The figure.
        path: Where, with or without `.png` or `.pdf`.

    Returns:
        The two files.

    Raises:
        OSError: The folder cannot be written to.
    """
    from matplotlib import rc_context

    given = Path(path)
    stem = given.with_suffix("") if given.suffix in (".png", ".pdf") else given
    contents = {}
    _add_fonts(figure)
    # TrueType fonts in the PDF: publishers refuse matplotlib's default, Type 3
    with rc_context({"pdf.fonttype": 42}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # told already
        for kind in ("png", "pdf"):
            drawn = io.BytesIO()
            figure.savefig(drawn, dpi=_DPI, format=kind)
            contents[f"{stem.name}.{kind}"] = drawn.getvalue()
    return write_together(stem.parent, contents)


def _panels(
    count: int, *, width: float, height: float, columns: int | None = None, share_y: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure of panels of so many inches, row by row; the places that are over stay empty."""
    columns = columns or count
    rows = -(-count // columns)
    drawing = import_extra("matplotlib.figure", "eval", "figures need")
    figure = drawing.Figure(
        figsize=(width * columns + 0.6, height * rows + 0.7), layout="constrained"
    )
    places = figure.subplots(rows, columns, sharey=share_y, squeeze=False).ravel()
    for unused in places[count:]:
        unused.remove()
    for axes in places[:count]:
        axes.grid(visible=True, color="#D9D9D9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=_FONT - 1)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set_fontsize(_FONT)
    return figure, list(places[:count])


def _name_rates(figure: Figure, axes: Axes, across: str, up: str, title: str) -> None:
    axes.set(ylim=(0, 101), xlabel=across, ylabel=up)
    axes.set_title(_title(figure, title), fontsize=_TITLE)
    _add_legend(figure, [axes])


def _add_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend under all panels, each method once."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    for last in ("HR", "threshold"):  # what is only a line across comes after the methods
        if last in entries:
            entries[last] = entries.pop(last)
    # inches: the line and the gap before a label, and about what a letter takes
    room = figure.get_figwidth()
    labels = [_wrapped(label, (room - 0.6) / 0.065) for label in entries]
    entry = 0.6 + 0.065 * max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, min(len(labels), int(room / entry)))
    options = {"frameon": False, "fontsize": _FONT - 0.5, "handlelength": 2.6, "ncols": columns}
    figure.legend(entries.values(), labels, loc="outside lower center", **options)


def _shown(name: str) -> str:
    """A name as matplotlib is to write it: no formula, no control letter, in every legend."""
    name = {HR: "HR", LR: "LR"}.get(name, name).replace("$", r"\$")
    name = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in name)
    return f" {name}" if name.startswith("_") else name  # a legend leaves out what begins with _


def _title(figure: Figure, text: str) -> str:
    # inches that about a letter takes
    return _wrapped(_shown(text), figure.get_figwidth() / 0.09)


def _wrapped(text: str, width: float) -> str:
    """A text broken behind a slash, an underscore, a dot, a dash or a blank, not within 0.5."""
    lines = [""]
    for part in re.split(r"(?<=[/_. -])(?!(?<=\d\.)\d)", text):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _add_fonts(figure: Figure) -> None:
    """Let texts fall back on installed fonts for letters that theirs lacks, or warn."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
    from matplotlib.text import Text

    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    letters = {ord(letter) for text in texts for letter in text.get_text() if letter.isprintable()}
    lacking = letters - get_font(findfont(FontProperties())).get_charmap().keys()
    families: list[str] = []
    for font in fontManager.ttflist if lacking else ():
        held = lacking & get_font(font.fname).get_charmap().keys()
        if held and "Last Resort" not in font.name:  # whose glyphs are boxes themselves
            families.append(font.name)
            lacking -= held
    for text in texts if families else ():
        text.set_fontfamily([*text.get_fontfamily(), *families])
    if lacking:
        warnings.warn(
            f"no installed font holds {''.join(map(chr, sorted(lacking)))[:40]!r}, drawn as boxes; "
            "install one that does, such as Noto Sans",
            stacklevel=3,
        )
