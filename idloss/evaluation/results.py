"""Results of a run: tidy rows, all that is needed to run it again, and the paper's tables.

A run is kept as three files of one stem: `run.json` (rows and circumstances), `run.csv` (the rows,
for a spreadsheet) and `run.npz` (scores of each pair, figures of each draw), so that
`idloss compare` can test two runs pair by pair.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from idloss import __version__
from idloss.evaluation.statistics import Estimate
from idloss.weights.files import written_whole

SCHEMA = 1
# The method of a row whose probes are not degraded: the last column of the paper's tables.
HR = "hr"
LR = "lr"

Task = Literal["verification", "identification", "open_set"]


@dataclass(frozen=True, order=True)
class Cell:
    """One cell of the grid: what was measured.

    Attributes:
        task: The task.
        fnet: Name of the FNet.
        srnet: Name of the SRNet or interpolation; `HR` where probes are not degraded.
        height: Rows of the probes.
        width: Columns of the probes.
    """

    task: Task
    fnet: str
    srnet: str
    height: int
    width: int

    @property
    def size(self) -> str:
        """Probe size as `7x6`, rows first."""
        return f"{self.height}x{self.width}"

    @property
    def label(self) -> str:
        """The cell in words, for messages and tables."""
        return f"{self.task} {self.fnet} + {self.srnet} at {self.size}"


@dataclass(frozen=True)
class Record:
    """One tidy row: a cell, a metric and its estimate.

    Attributes:
        cell: What was measured.
        metric: `accuracy`, `tar@far=0.001`, `rank1`, `tpir@fpir=0.01`, ...; shares in [0, 1].
        estimate: The figure and how sure it is.
    """

    cell: Cell
    metric: str
    estimate: Estimate

    def row(self) -> dict[str, Any]:
        """The record as one flat row."""
        return {**asdict(self.cell), "metric": self.metric, **asdict(self.estimate)}


_CELL_COLUMNS = tuple(column.name for column in fields(Cell))
_ESTIMATE_COLUMNS = tuple(column.name for column in fields(Estimate))
COLUMNS = (*_CELL_COLUMNS, "metric", *_ESTIMATE_COLUMNS)


_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "safetensors",
    "huggingface-hub",
    "opencv-python",
    "opencv-python-headless",
)


def environment() -> dict[str, Any]:
    """Versions and hardware of this process, as plain values.

    Returns:
        idloss, Python, packages, system, processor, threads and GPU.
    """
    versions = {name: version for name in _PACKAGES if (version := _version(name))}
    gpu = torch.cuda.is_available()
    return {
        "idloss": __version__,
        "python": platform.python_version(),
        "packages": versions,
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
    }


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _processor() -> str:
    """The processor's name; `platform.processor()` is empty on most Linux systems."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass
class Results:
    """All that a run found, and all that is needed to run it again.

    Attributes:
        run: Circumstances, as plain values: `protocol`, `seed`, command, `data` (sets with the
            hash of their lists and what was skipped), `draws` (digest of the galleries of each
            task), weights with their hashes. Two runs are comparable where `protocol`, `data` and
            `draws` agree.
        records: The rows.
        arrays: What the rows were made of, by cell: `scores`, `same`, `correct`, `folds`, each
            `[N]`, for verification; `rank1` `[draws]` and `cmc` `[draws, R]` for identification;
            `tpir` `[draws, T]` for the open set; `correct`, `[P]`, in place of `rank1` and `tpir`
            where the set has a gallery of its own.
        environment: Versions and hardware.
        created: When, UTC, ISO 8601.
    """

    run: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    arrays: dict[Cell, dict[str, NDArray[Any]]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=environment)
    created: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )

    def add(
        self,
        cell: Cell,
        estimates: Mapping[str, Estimate],
        arrays: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        """Take in what was found for one cell.

        Args:
            cell: What was measured.
            estimates: Figures by metric.
            arrays: What they were made of.

        Raises:
            ValueError: The cell is there already.
        """
        if any(record.cell == cell for record in self.records):
            raise ValueError(f"there is a result for {cell.label} already")
        self.records += [Record(cell, name, figure) for name, figure in estimates.items()]
        if arrays:
            self.arrays[cell] = dict(arrays)

    def cells(self, task: Task | None = None) -> list[Cell]:
        """The cells, in the order they were added.

        Args:
            task: Only those of one task.

        Returns:
            Each cell once.
        """
        cells = dict.fromkeys(record.cell for record in self.records)
        return [cell for cell in cells if task in (None, cell.task)]

    def value(self, cell: Cell, metric: str) -> float:
        """One figure.

        Args:
            cell: What was measured.
            metric: The metric.

        Returns:
            Its value.

        Raises:
            KeyError: There is no such row.
        """
        for record in self.records:
            if record.cell == cell and record.metric == metric:
                return record.estimate.value
        raise KeyError(f"no {metric} for {cell.label}")

    def select(self, task: Task, metric: str | None = None) -> list[Record]:
        """The rows of one task and metric.

        Args:
            task: The task.
            metric: The metric; None for accuracy, rank 1, or the first there is.

        Returns:
            At least one row.

        Raises:
            ValueError: There are none; says what there is.
        """
        records = [record for record in self.records if record.cell.task == task]
        known = list(dict.fromkeys(record.metric for record in records))
        if not known:
            raise ValueError(f"the run has no {task} results")
        metric = metric or next((m for m in ("accuracy", "rank1") if m in known), known[0])
        if metric not in known:
            raise ValueError(f"the run has no {metric!r} for {task}; it has {', '.join(known)}")
        return [record for record in records if record.metric == metric]

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write `.json`, `.csv` and `.npz` beside each other, each whole or not at all.

        Args:
            path: Where the JSON is to be; the others take its stem.

        Returns:
            The files written, the JSON first.

        Raises:
            OSError: The folder cannot be written to.
            TypeError: `run` holds something that JSON does not know.
        """
        main = _json_path(path)
        table, sidecar = main.with_suffix(".csv"), main.with_suffix(".npz")
        flat = {
            f"{place}/{name}": array
            for place, arrays in enumerate(self.arrays.values())
            for name, array in arrays.items()
        }
        packed = io.BytesIO()
        np.savez_compressed(packed, allow_pickle=False, **flat)
        blob = packed.getvalue()
        document = {
            "schema": SCHEMA,
            "created": self.created,
            "run": self.run,
            "environment": self.environment,
            "records": [_plain(record.row()) for record in self.records],
            "arrays": {
                "file": sidecar.name,
                "sha256": hashlib.sha256(blob).hexdigest(),
                "cells": [asdict(cell) for cell in self.arrays],
            },
        }
        # everything is made before anything is written, so that a value that JSON does not know
        # costs no older result; the JSON comes last: where it is, the others are
        text = json.dumps(document, indent=1, allow_nan=False) + "\n"
        contents = {
            sidecar: blob,
            table: self.to_csv().encode(),
            main: text.encode(),
        }
        for file, content in contents.items():
            with written_whole(file) as temporary:
                temporary.write_bytes(content)
        return [main, table, sidecar]

    def to_csv(self) -> str:
        """The rows as CSV, one a line, with a header."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_plain(record.row()) for record in self.records)
        return text.getvalue()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Read a run back.

        Args:
            path: Its JSON file.

        Returns:
            The run.

        Raises:
            FileNotFoundError: There is no such file, or its `.npz` is missing.
            ValueError: It is not a result file, is of another version, or the `.npz` is not the
                one it was written with.
        """
        main = Path(path)
        if not main.is_file():
            raise FileNotFoundError(f"no result file at {main}; give the .json of a run")
        try:
            document = json.loads(main.read_text("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{main} is not a result file: {error}") from error
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            seen = document.get("schema") if isinstance(document, dict) else None
            raise ValueError(
                f"{main} has result schema {seen}, this version of idloss reads {SCHEMA}; run the "
                "evaluation again"
            )
        try:
            records = [_record(row) for row in document["records"]]
            arrays = _load_arrays(main, document["arrays"])
            return cls(
                document["run"], records, arrays, document["environment"], document["created"]
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{main} is damaged: {type(error).__name__} {error}") from error


def metric_title(metric: str) -> str:
    """A metric in words, such as `Rank-1 identification rate`."""
    if metric == "accuracy":
        return "Verification accuracy"
    if metric.startswith("rank"):
        return f"Rank-{metric.removeprefix('rank')} identification rate"
    return metric.upper().replace("FAR=", "FAR ").replace("FPIR=", "FPIR ")


def pretty_size(size: Sequence[int]) -> str:
    """Rows and columns with a multiplication sign between, for people."""
    return f"{size[0]}\N{MULTIPLICATION SIGN}{size[1]}"


def _json_path(path: str | os.PathLike[str]) -> Path:
    given = Path(path)
    return given if given.suffix == ".json" else given.with_name(given.name + ".json")


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON and spreadsheets know no NaN (the interval of a single draw): leave the field empty."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def _record(row: Mapping[str, Any]) -> Record:
    figures = {name: row[name] for name in _ESTIMATE_COLUMNS}
    for name in ("low", "high"):
        figures[name] = math.nan if figures[name] is None else figures[name]
    cell = Cell(**{name: row[name] for name in _CELL_COLUMNS})
    return Record(cell, row["metric"], Estimate(**figures))


def _load_arrays(main: Path, index: Mapping[str, Any]) -> dict[Cell, dict[str, NDArray[Any]]]:
    # a renamed run keeps its files together: the stem is the JSON's, wherever that was moved
    beside = [main.with_name(Path(index["file"]).name), main.with_suffix(".npz")]
    sidecar = next((path for path in beside if path.is_file()), None)
    if sidecar is None:
        raise FileNotFoundError(f"{main} needs {beside[0].name} beside it; copy both")
    blob = sidecar.read_bytes()
    if (seen := hashlib.sha256(blob).hexdigest()) != index["sha256"]:
        raise ValueError(
            f"{sidecar} is not the file that {main.name} was written with: its SHA-256 is {seen}, "
            f"not {index['sha256']}; copy both from one run"
        )
    cells = [Cell(**cell) for cell in index["cells"]]
    arrays: dict[Cell, dict[str, NDArray[Any]]] = {cell: {} for cell in cells}
    with np.load(io.BytesIO(blob), allow_pickle=False) as stored:
        for key in stored.files:
            place, name = key.split("/", 1)
            arrays[cells[int(place)]][name] = stored[key]
    return arrays
