"""A run as files: results, the paper's tables and all figures."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import nn

from idloss.data import EvaluationSet, Fault
from idloss.encoder import resolve_device
from idloss.errors import some_of
from idloss.evaluation.embedding import (
    SR_CROP,
    cut_out,
    fit_size,
    prepare_probe,
    read_canvases,
    ready,
)
from idloss.evaluation.figures import (
    accuracy_figure,
    cmc_figure,
    method_styles,
    picture_sheet,
    roc_figure,
    save_figure,
    similarity_figure,
)
from idloss.evaluation.protocols import Protocol, get_protocol
from idloss.evaluation.results import (
    HR,
    Cell,
    Results,
    Task,
    markdown_table,
    metric_title,
    pretty_size,
    read_task,
    rising_sizes,
    write_together,
)
from idloss.evaluation.verification import roc
from idloss.resample import Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# After the paper's numbers.
_FILES: Mapping[Task, str] = {
    "verification": "table1",
    "identification": "table2",
    "open_set": "open_set",
}


def write_tables(results: Results, folder: str | os.PathLike[str]) -> dict[Path, str]:
    """Write a Markdown table in the paper's layout for each task, under a line that says of what.

    Args:
        results: The run.
        folder: Where to.

    Returns:
        The texts by file.

    Raises:
        OSError: The folder cannot be written to.
    """
    tables = {}
    for task in (task for task in _FILES if results.cells(task)):
        record = results.select(task)[0]
        caption = f"{metric_title(record.metric)} (%)"
        if task != "verification" and record.estimate.repeats > 1:
            caption += f", mean ± deviation of {record.estimate.repeats} draws"
        names = (_get(_get(results.run, key), "name") for key in ("data", "protocol"))
        data, protocol = (some_of([str(name)]) for name in names)
        # the paper's Table 1 gives no deviations; of drawn galleries they are asked for
        table = paper_table(results, task, deviation=task != "verification")
        text = f"{caption}: {data}, protocol {protocol}\n\n{table}"
        (file,) = write_together(Path(folder), {f"{_FILES[task]}.md": text.encode()})
        tables[file] = text
    return tables


def paper_table(
    results: Results,
    task: str = "verification",
    *,
    metric: str | None = None,
    deviation: bool = False,
) -> str:
    """The results as a Markdown table in the paper's layout (Table 1 or Table 2).

    Sizes rise from left to right and HR comes last, on the first row of each FNet. In Table 1 a
    square size stands in parentheses behind the one with as many rows of pixels or about so, as
    the paper's 14x12 (16x16). The best of each column is bold.

    Args:
        results: The run.
        task: `"verification"` for Table 1, `"identification"` for Table 2,
            `"open-set"`.
        metric: The metric; None for accuracy, rank 1, or the first there is.
        deviation: Add the standard deviation over folds or draws, where there are several.

    Returns:
        The table in per cent, `-` where nothing was measured.

    Raises:
        ValueError: There are no results for the task or the metric.
    """
    task = read_task(task)
    chosen = {record.cell: record.estimate for record in results.select(task, metric)}
    # the paper prints two decimals: the best are those that print the same
    shown = {cell: f"{100 * figure.value:.2f}" for cell, figure in chosen.items()}
    best: dict[str, str] = {}
    for cell, text in shown.items():
        if cell.srnet != HR:
            best[cell.size] = max(best.get(cell.size, text), text, key=float)

    def text_of(cell: Cell) -> str:
        if cell not in chosen:
            return "-"
        text = shown[cell]
        if deviation and chosen[cell].repeats > 1 and math.isfinite(chosen[cell].std):
            text += f" ± {100 * chosen[cell].std:.2f}"
        return f"**{text}**" if cell.srnet != HR and shown[cell] == best[cell.size] else text

    sizes = rising_sizes(cell for cell in chosen if cell.srnet != HR)
    columns = _columns(sizes, pair=task == "verification")
    hr = {cell.fnet: cell for cell in chosen if cell.srnet == HR}
    heads = [
        " ".join([pretty_size(main), *(f"({pretty_size(size)})" for size in other)])
        for main, *other in columns
    ]
    if hr:
        heads.append(" / ".join(map(pretty_size, rising_sizes(hr.values()))))
    lines = [["FNet", "Method/SRNet", *heads]]
    for fnet in dict.fromkeys(cell.fnet for cell in chosen):
        methods = dict.fromkeys(c.srnet for c in chosen if c.fnet == fnet and c.srnet != HR)
        for place, method in enumerate(methods or (HR,)):
            line = [fnet if place == 0 else "", method]
            for main, *other in columns:
                cells = [Cell(task, fnet, method, *size) for size in (main, *other)]
                first, *rest = (text_of(cell) for cell in cells)
                line.append(" ".join([first, *(f"({text})" for text in rest)]))
            if hr:
                line.append(text_of(hr[fnet]) if place == 0 and fnet in hr else "")
            lines.append(line)
    return markdown_table(lines)


def _columns(sizes: Iterable[tuple[int, int]], *, pair: bool) -> list[list[tuple[int, int]]]:
    """Sizes from small to large; a square one joins the face-shaped one just below it."""
    columns: list[list[tuple[int, int]]] = []
    for size in sizes:
        square = size[0] == size[1]
        # 16 rows against 14; from one of the paper's sizes to the next it is a factor of two
        if pair and square and columns and columns[-1][0][0] * 1.5 > size[0]:
            columns[-1].append(size)
        else:
            columns.append([size])
    return columns


def write_figures(results: Results, folder: str | os.PathLike[str]) -> list[Path]:
    """Draw everything a run can be drawn as: rates over sizes, ROC, CMC, similarities.

    Args:
        results: The run, with its arrays.
        folder: Where to.

    Returns:
        The files, a PNG and a PDF of each figure.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        OSError: The folder cannot be written to.
    """
    files: dict[Path, None] = {}
    for name, draw in tqdm(list(_figures(results)), desc="drawing", unit="figure", delay=2):
        twins = (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))
        stem = next(twin for twin in twins if Path(folder) / f"{twin}.png" not in files)
        files |= dict.fromkeys(save_figure(draw(), Path(folder) / stem))
    return list(files)


def _figures(results: Results) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Names of the figures, and how to draw each: one is held in memory at a time."""
    styles = method_styles(cell.srnet for cell in results.cells())
    rule = _get(_get(results.run, "protocol"), "rule")
    for task, name in _FILES.items():
        cells = results.cells(task)
        if any(cell.srnet != HR for cell in cells):
            yield f"{name}-by-size", partial(accuracy_figure, results, task, styles)
        degraded = (cell for cell in cells if cell.srnet != HR)
        for fnet, *size in dict.fromkeys((cell.fnet, cell.height, cell.width) for cell in degraded):
            own = [cell for cell in cells if cell.fnet == fnet]
            row = [cell for cell in own if cell.srnet != HR and [cell.height, cell.width] == size]
            row += [cell for cell in own if cell.srnet == HR]
            arrays = {cell.srnet: results.arrays.get(cell, {}) for cell in row}
            pairs = {method: a for method, a in arrays.items() if {"scores", "same"} <= a.keys()}
            scores = {method: a["scores"] for method, a in pairs.items()}
            curves = {method: a["cmc"] for method, a in arrays.items() if np.size(a.get("cmc", ()))}
            title = f"{fnet}, probes {pretty_size(size)}"
            # names from the Hub hold colons and slashes
            end = re.sub(r"[^\w.-]+", "_", fnet)[:100] + f"-{size[0]}x{size[1]}"
            if scores:
                same = next(a["same"] for a in pairs.values())
                rocs = {method: roc(one, same) for method, one in scores.items()}
                yield f"roc-{end}", partial(roc_figure, rocs, title, styles)
                marks = {
                    method: float(a["thresholds"].mean())
                    for method, a in arrays.items()
                    if _get(rule, "measure") == "cosine" and "thresholds" in a
                }
                yield f"similarity-{end}", partial(similarity_figure, scores, same, marks, title)
            if curves:
                yield f"cmc-{end}", partial(cmc_figure, curves, title, styles)


def write_sheets(
    folder: str | os.PathLike[str],
    data: EvaluationSet,
    fnets: Mapping[str, nn.Module],
    srnets: Mapping[str, nn.Module],
    sizes: Sequence[Size],
    *,
    count: int = 5,
    protocol: str | Protocol = "paper",
    device: str | torch.device = "auto",
    progress: bool = False,
) -> list[Path]:
    """Draw the sheets of Fig. 5: LR, each method and HR, with the cosine to HR under each.

    Args:
        folder: Where to.
        data: Whose probes to show; those that cannot be read are passed over.
        fnets: FNets by name; the first one measures.
        srnets: SRNets by name.
        sizes: Probe sizes, rows and columns, a sheet for each.
        count: How many probes, spread over the set.
        protocol: Protocol or its name.
        device: Where the networks run.
        progress: Show a progress bar when it takes more than two seconds.

    Returns:
        The files; none where no face could be read.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    if data.pairs is not None:
        places = data.pairs.second.unique()
    elif data.probes:
        places = torch.cat([*data.probes.values()])
    else:
        places = torch.arange(len(data.faces))
    places = places[torch.linspace(0, len(places) - 1, min(count, len(places))).long()]
    faults: dict[int, Fault] = {}
    name = next(iter(fnets))
    files = []
    bar = tqdm(dict.fromkeys(sizes), desc="drawing", unit="sheet", delay=2, disable=not progress)
    fixed, place = get_protocol(protocol), resolve_device(device)
    with bar, ready({name: fnets[name]}, srnets, fixed, place) as networks:
        networks.warn_of_borders(data.faces.crop)
        own = networks.crop_of(name, HR)
        read = read_canvases(data.faces, places, (own, *networks.crops.values()), faults)
        good = [row for row, place in enumerate(places.tolist()) if place not in faults]
        if not good:
            return []
        names = [Path(data.faces.names[i]).stem.replace("_", "\n") for i in places[good].tolist()]
        digests = [data.faces.digest(i) for i in places[good].tolist()]
        canvases = {crop: one[good].to(place) for crop, one in read.items()}
        reference = networks.embed_hr(name, cut_out(canvases, own), own)
        for size in bar:
            probes = {
                crop: prepare_probe(cut_out(canvases, crop), fit_size(size, crop), fixed, digests)
                for crop in networks.crops.values()
            }
            columns, cosines = networks.restore(name, probes, reference)
            columns[HR] = cut_out(canvases, next(iter(networks.crops.values()), SR_CROP))
            figure = picture_sheet(columns, cosines, names=names, title=f"FNet: {name}")
            files += save_figure(figure, Path(folder) / f"faces-{size[0]}x{size[1]}")
    return files


def _get(values: object, key: str) -> object:
    """What a run says under a key; files of others may hold anything there."""
    return values.get(key) if isinstance(values, Mapping) else None
