"""What a similarity means: the shares of strangers and of pairs of one person that reach it.

A run of the bench counts both for each FNet, SRNet and probe size and keeps them as a table,
`calibration.csv`; `zoo/calibration/` has those of networks that were measured. A table holds for
the very weights that it was measured with, whose hashes it carries.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from idloss.evaluation.cache import digest_weights
from idloss.evaluation.results import HR, Results, write_together
from idloss.evaluation.statistics import Floats, Ints
from idloss.evaluation.verification import pair_scores
from idloss.weights.sources import zoo_folder

THRESHOLDS = np.concatenate(([-1.0], np.arange(-10, 50) / 50))
"""Cosines at which pairs are counted; the first is reached by all."""
_BLOCK = 512  # faces compared with all others at a time
_MOST_BYTES = 1 << 26
_COLUMNS = ("fnet", "srnet", "height", "width", "threshold", "fmr", "tmr")
_NOTES = ("data", "protocol", "probe", "strangers", "mates", "created")


def count_reached(
    gallery: NDArray[np.float32],
    probes: NDArray[np.float32],
    first: Ints,
    second: Ints,
    same: NDArray[np.bool_],
    labels: Ints | None,
) -> dict[str, Ints]:
    """Pairs at or above each threshold, `[T]` each: `mates` of one person, `strangers` of two.

    Mates are the listed pairs. Strangers are every first face with every second one of somebody
    else, or the listed pairs where nobody is known by label.
    """
    mates = _count(pair_scores(gallery[first[same]], probes[second[same]]))
    if labels is None or (labels[first] < 0).any() or (labels[second] < 0).any():
        listed = pair_scores(gallery[first[~same]], probes[second[~same]])
        return {"mates": mates, "strangers": _count(listed)}
    rows, columns = np.unique(first), np.unique(second)
    enrolled, searched = _unit(gallery[rows]), _unit(probes[columns])
    strangers = np.zeros(len(THRESHOLDS), dtype=np.int64)
    for start in range(0, len(rows), _BLOCK):
        part = slice(start, start + _BLOCK)
        scores = enrolled[part] @ searched.T
        strangers += _count(scores[labels[rows[part], None] != labels[columns]])
    return {"mates": mates, "strangers": strangers}


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float32] = rows / np.maximum(norms, 1e-8)
    return unit


def _count(scores: Floats) -> Ints:
    reached = np.searchsorted(THRESHOLDS, np.maximum(scores, -1), side="right")
    counts: Ints = np.bincount(reached, minlength=len(THRESHOLDS) + 1)[::-1].cumsum()[::-1][1:]
    return counts


def write_calibration(results: Results, folder: str | Path) -> list[Path]:
    """Write `calibration.csv` of a run that verified pairs; no file of one that did not."""
    counted = {cell: a for cell, a in results.arrays.items() if "strangers" in a}
    if not counted:
        return []
    one = next(iter(counted.values()))
    told = {name: results.run.get(name, "") for name in _NOTES}
    told |= {key: told[key]["name"] for key in ("data", "protocol")}
    told |= {key: int(one[key][0]) for key in ("strangers", "mates")}
    told["created"] = results.created
    told["networks"] = json.dumps(
        {
            name: [about.get("architecture", ""), about["weights"]]
            for name, about in results.run["networks"].items()
        }
    )
    text = io.StringIO()
    text.writelines(f"# {key}: {value}\n" for key, value in told.items())
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for cell, arrays in counted.items():
        fmr, tmr = (arrays[key] / arrays[key][0] for key in ("strangers", "mates"))
        for threshold, false, true in zip(THRESHOLDS, fmr, tmr, strict=True):
            rates = [f"{rate:.4g}" for rate in (threshold, false, true)]
            writer.writerow([cell.fnet, cell.srnet, cell.height, cell.width, *rates])
            if not false and not true:  # nor at any higher one
                break
    return write_together(Path(folder), {"calibration.csv": text.getvalue().encode()})


@dataclass(frozen=True)
class Odds:
    """How often a similarity is reached, as it was measured.

    Attributes:
        fmr: Share of pairs of strangers that reach it (false-match rate).
        tmr: Share of pairs of one person that do.
        size: Rows and columns of the probes that were measured.
        about: What was measured: `data`, `protocol`, `probe` (`"both"` faces of that size, or the
            `"second"`), and how many pairs, `strangers` and `mates`.
    """

    fmr: float
    tmr: float
    size: tuple[int, int]
    about: Mapping[str, str]

    def __str__(self) -> str:
        """In words, with the number of pairs that they rest on."""
        strangers, mates = (int(self.about[key]) for key in ("strangers", "mates"))
        few = f"none of {strangers:,} pairs of strangers"
        if self.fmr:
            few = f"1 in {1 / self.fmr:,.0f} of {strangers:,} pairs of strangers"
        which = "both faces" if self.about["probe"] == "both" else "one face"
        return (
            f"as alike: {few} (false-match rate {100 * self.fmr:.2g} %), and "
            f"{100 * self.tmr:.3g} % of {mates:,} pairs of one person, of {self.about['data']} "
            f"with {which} at {self.size[0]}x{self.size[1]}"
        )


Identity = tuple[str, str]


def identity(net: nn.Module) -> Identity:
    """What tables know a network by: its architecture's name and the hash of its weights."""
    cfg: Any = getattr(net, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture", "")), digest_weights(net)


class Calibration:
    """Tables of how often similarities are reached, by the hashes of networks.

    Args:
        paths: Files that a run of the bench wrote; the first that knows the networks answers.

    Raises:
        ValueError: If a file is no such table.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self._tables = [_read(Path(path)) for path in paths]

    def odds(
        self,
        fnet: Identity,
        srnet: Identity,
        rows: Sequence[float],
        cosine: float,
        protocol: str = "paper",
    ) -> Odds | None:
        """What is known of a cosine of two faces with so many rows of pixels; None if nothing.

        Args:
            fnet: The FNet, by `identity`.
            srnet: The SRNet that smaller faces went through, likewise.
            rows: Rows of pixels of both faces, in the SRNet's crop.
            cosine: Their similarity.
            protocol: How faces were treated.

        Returns:
            The rates at the largest measured size that the smaller face has the pixels for, and at
            the threshold just below the cosine: that many strangers or fewer.
        """
        for about, networks, cells in self._tables:
            full = max(size[0] for method, _, size in cells if method == HR)
            probe = "both" if max(rows) < full else "second"
            if about["protocol"] != protocol or about["probe"] != probe:
                continue
            judged = [name for name, one in networks.items() if one == fnet]
            fitting = {
                size: rates
                for (method, name, size), rates in cells.items()
                if name in judged
                and size[0] <= round(min(rows))
                and (method == HR or networks[method] == srnet)
            }
            if fitting:
                size = max(fitting)
                below = [row for row in fitting[size] if row[0] <= max(cosine, -1)]
                _, fmr, tmr = below[-1]
                told = "both" if size[0] >= full else probe
                return Odds(fmr, tmr, size, {**about, "probe": told})
        return None


def zoo_tables() -> list[Path]:
    """The tables that the zoo carries."""
    return sorted(zoo_folder().glob("calibration/*.csv"))


_Cells = dict[tuple[str, str, tuple[int, int]], list[tuple[float, float, float]]]


def _read(path: Path) -> tuple[dict[str, str], dict[str, Identity], _Cells]:
    """What a table tells of itself, its networks' identities, and rates by method, FNet, size."""
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, a calibration far fewer")
    cells: _Cells = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        about = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
        networks = {k: (a, w) for k, (a, w) in json.loads(about.pop("networks")).items()}
        for row in csv.DictReader(line for line in lines if not line.startswith("#")):
            key = (row["srnet"], row["fnet"], (int(row["height"]), int(row["width"])))
            rates = tuple(float(row[name]) for name in ("threshold", "fmr", "tmr"))
            cells.setdefault(key, []).append(rates)  # type: ignore[arg-type]
        whole = all(name in about for name in _NOTES) and all(
            rates[0][0] == -1 and rates == sorted(rates) for rates in cells.values()
        )
        if not whole or not any(method == HR for method, _, _ in cells):
            raise ValueError("lines are missing")  # noqa: TRY301
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is no calibration.csv of idloss evaluate ({error!r}); give one"
        ) from error
    return about, networks, cells
