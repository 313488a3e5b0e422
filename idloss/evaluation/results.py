"""Results of a run: tidy rows, what they were made of, and all that is needed to run it again.

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
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from idloss import __version__
from idloss.errors import did_you_mean
from idloss.evaluation.statistics import Estimate
from idloss.weights.files import written_whole

SCHEMA = 1
# The method of a row whose probes are not degraded: the last column of the paper's tables.
HR = "hr"
LR = "lr"

Task = Literal["verification", "identification", "open_set"]
Arrays = Mapping[str, NDArray[Any]]

# A hundred thousand rows, and a hundred cells of a million pairs, stay below these; files of others
# may hold or claim anything.
_MOST_JSON_BYTES = 1 << 26
_MOST_BYTES = 1 << 31
_NUMBERS = "biuf"  # numpy's kinds: truth values, whole numbers, floating point
# Spreadsheets take a cell that begins so for a formula, and would run it.
_FORMULA = ("=", "+", "-", "@")
# What figures may depend on.
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "pillow", "safetensors")


def read_task(name: str) -> Task:
    """A task by its name, `open-set` or `open_set` alike; `ValueError` where there is none."""
    if (task := str(name).replace("-", "_")) not in get_args(Task):
        raise ValueError(did_you_mean("task", str(name)[:80], get_args(Task)))
    return cast("Task", task)


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", read_task(self.task))
        _require_printable("an FNet", self.fnet)
        _require_printable("an SRNet", self.srnet)
        for side in (self.height, self.width):
            if type(side) is not int or side < 1:
                raise ValueError(f"probes have whole rows and columns, got {side!r}")

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
    """One tidy row: a cell, a metric such as `tar@far=0.001`, its share in [0, 1]."""

    cell: Cell
    metric: str
    estimate: Estimate

    def __post_init__(self) -> None:
        _require_printable("a metric", self.metric)

    def row(self) -> dict[str, Any]:
        """The record as one flat row; JSON and spreadsheets know no NaN: None (of one draw)."""
        figures = {
            name: None if figure is None or not math.isfinite(figure) else figure
            for name, figure in asdict(self.estimate).items()
        }
        return {**asdict(self.cell), "metric": self.metric, **figures}


_CELL_COLUMNS = tuple(column.name for column in fields(Cell))
_ESTIMATE_COLUMNS = tuple(column.name for column in fields(Estimate))
COLUMNS = (*_CELL_COLUMNS, "metric", *_ESTIMATE_COLUMNS)


def environment() -> dict[str, Any]:
    """Versions and hardware of this process, as plain values."""
    versions = {}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    gpu = torch.cuda.is_available()
    return {
        "idloss": __version__,
        "python": platform.python_version(),
        "packages": versions,
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
    }


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
            `[N]`, and pairs at each threshold, `mates` and `strangers` `[T]`, for verification;
            `rank1` `[draws]` and `cmc` `[draws, R]` for identification; `tpir` `[draws, T]` for the
            open set; `correct`, `[P]`, in place of `rank1` and `tpir` where the set has a gallery
            of its own.
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
        self, cell: Cell, estimates: Mapping[str, Estimate], arrays: Arrays | None = None
    ) -> None:
        """Take in figures by metric and what they were made of; `ValueError` if there are any."""
        if any(record.cell == cell for record in self.records):
            raise ValueError(f"there is a result for {cell.label} already")
        self.records += [Record(cell, name, figure) for name, figure in estimates.items()]
        if arrays:
            self.arrays[cell] = dict(arrays)

    def cells(self, task: str | None = None) -> list[Cell]:
        """The cells, each once, in the order they were added; of one task or of all."""
        wanted = task and read_task(task)
        cells = dict.fromkeys(record.cell for record in self.records)
        return [cell for cell in cells if wanted in (None, cell.task)]

    def value(self, cell: Cell, metric: str) -> float:
        """One figure; `KeyError` where there is no such row."""
        for record in self.records:
            if record.cell == cell and record.metric == metric:
                return record.estimate.value
        raise KeyError(f"no {metric} for {cell.label}")

    def select(self, task: str, metric: str | None = None) -> list[Record]:
        """The rows of a task and metric (None: accuracy, rank 1 or the first), or `ValueError`."""
        wanted = read_task(task)
        records = [record for record in self.records if record.cell.task == wanted]
        known = list(dict.fromkeys(record.metric for record in records))
        if not known:
            raise ValueError(f"the run has no {wanted} results")
        metric = metric or next((m for m in ("accuracy", "rank1") if m in known), known[0])
        if metric not in known:
            raise ValueError(f"the run has no {metric!r} for {wanted}; it has {', '.join(known)}")
        return [record for record in records if record.metric == metric]

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write `.json`, `.csv` and `.npz` beside each other, all of them or none.

        Where the disk refuses, they are kept in a temporary folder, so that no work is lost.

        Args:
            path: Where the JSON is to be; the others take its stem.

        Returns:
            The files written, the JSON first.

        Raises:
            OSError: The folder cannot be written to; says where the files are instead.
            TypeError: `run` or an array holds something that cannot be written.
        """
        given = Path(path)
        main = given if given.suffix == ".json" else given.with_name(given.name + ".json")
        contents = self._contents(main.name)
        try:
            return write_together(main.parent, contents)
        except OSError as error:
            try:
                spare = write_together(Path(tempfile.mkdtemp(prefix="idloss-results-")), contents)
            except OSError:
                raise error from None
            raise OSError(f"{error}; meanwhile they are kept in {spare[0].parent}") from error

    def _contents(self, name: str) -> dict[str, bytes]:
        """The files by name, made before any is written: first the JSON, which pins the rest."""
        sidecar = Path(name).with_suffix(".npz").name
        flat: dict[str, Any] = {
            f"{place}/{key}": np.asarray(array)
            for place, arrays in enumerate(self.arrays.values())
            for key, array in arrays.items()
        }
        if strange := [key for key, array in flat.items() if array.dtype.kind not in _NUMBERS]:
            raise TypeError(f"arrays of no numbers cannot be written: {', '.join(strange)}")
        packed = io.BytesIO()
        np.savez_compressed(packed, **flat)  # before numpy 2.2, allow_pickle is one more array
        blob = packed.getvalue()
        document = {
            "schema": SCHEMA,
            "created": self.created,
            "run": self.run,
            "environment": self.environment,
            "records": [record.row() for record in self.records],
            "arrays": {
                "file": sidecar,
                "sha256": hashlib.sha256(blob).hexdigest(),
                "cells": [asdict(cell) for cell in self.arrays],
            },
        }
        return {
            name: (json.dumps(document, indent=1, allow_nan=False) + "\n").encode(),
            Path(name).with_suffix(".csv").name: self.to_csv().encode(),
            sidecar: blob,
        }

    def to_csv(self) -> str:
        """The rows as CSV, one a line, with a header; a name that looks like a formula quoted."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for record in self.records:
            row = record.row()
            for key in ("fnet", "srnet", "metric"):
                row[key] = f"'{row[key]}" if row[key].startswith(_FORMULA) else row[key]
            writer.writerow(row)
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
            ValueError: It is not a result file, is of another version, is damaged, or the `.npz`
                is not the one it was written with.
        """
        main = Path(path)
        if not main.is_file():
            raise FileNotFoundError(f"no result file at {main}; give the .json of a run")
        try:
            text = _read_small(main, _MOST_JSON_BYTES).decode()
            document = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{main} is not a result file: {error}") from error
        seen = document.get("schema") if isinstance(document, dict) else None
        if seen != SCHEMA:
            raise ValueError(
                f"{main} is of result schema {str(seen)[:20]}, this version of idloss reads "
                f"{SCHEMA}; run the evaluation again"
            )
        try:
            run, found = _of_type(dict, document, "run"), _of_type(dict, document, "environment")
            created = _of_type(str, document, "created")
            records = [_record(row) for row in _of_type(list, document, "records")]
            index = _of_type(dict, document, "arrays")
            cells = [Cell(**cell) for cell in _of_type(list, index, "cells")]
            name, pin = _of_type(str, index, "file"), _of_type(str, index, "sha256")
            for rows in (cells, [(record.cell, record.metric) for record in records]):
                if len(set(rows)) < len(rows):
                    raise ValueError("a row stands there twice")  # noqa: TRY301
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{main} is damaged: {error}; run the evaluation again") from error
        return cls(run, records, _load_arrays(main, name, pin, cells), found, created)


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


def rising_sizes(cells: Iterable[Cell]) -> list[tuple[int, int]]:
    """The probe sizes of cells, each once, from few pixels to many."""
    return sorted({(c.height, c.width) for c in cells}, key=lambda size: (size[0] * size[1], size))


def markdown_table(lines: Sequence[Sequence[str]], *, left: Sequence[int] = (0, 1)) -> str:
    """Lines of cells as Markdown, padded to be read as it is; all but some columns to the right."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ends = ["-" if place in left else ":" for place in range(len(widths))]
    rule = ["-" * (width - 1) + end for width, end in zip(widths, ends, strict=True)]
    text = ""
    for line in (lines[0], rule, *lines[1:]):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        text += f"| {' | '.join(cells)} |\n"
    return text


def _require_printable(what: str, name: object) -> None:
    """Line breaks and escapes would forge rows of tables and reach the terminal."""
    if not isinstance(name, str) or not 0 < len(name.strip()) < 1000 or not name.isprintable():
        raise ValueError(f"{str(name)[:80]!r} cannot be the name of {what}; use printable letters")


def write_together(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files by name into a folder, all or none; `OSError` names what and where."""
    try:
        with ExitStack() as stack:
            # the first is entered first and left last: where it is, the others are
            for name, content in contents.items():
                stack.enter_context(written_whole(folder / name)).write_bytes(content)
    except OSError as error:
        names = ", ".join(contents)
        raise OSError(
            f"{names} cannot be written to {folder} ({error.strerror or error}); free space there, "
            "or name another folder"
        ) from error
    return [folder / name for name in contents]


def _read_small(path: Path, most: int) -> bytes:
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path.name} has {size:,} bytes, a run at most {most:,}")
    return path.read_bytes()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


def _of_type(kind: type, values: Mapping[str, Any], key: str) -> Any:
    if not isinstance(values.get(key), kind):
        raise TypeError(f"{key!r} is {str(values.get(key))[:40]!r}, no {kind.__name__}")
    return values[key]


def _record(row: Any) -> Record:
    if not isinstance(row, dict) or set(row) != set(COLUMNS):
        raise TypeError(f"a row is {str(row)[:80]!r}, not of {', '.join(COLUMNS)}")
    figures = {name: row[name] for name in _ESTIMATE_COLUMNS}
    for name in ("low", "high"):
        figures[name] = math.nan if figures[name] is None else figures[name]
    for name, figure in figures.items():
        optional = figure is None and name.startswith("boot_")
        if not optional and (type(figure) not in (int, float) or math.isinf(figure)):
            raise TypeError(f"{name!r} is {str(figure)[:40]!r}, no number")
    cell = Cell(**{name: row[name] for name in _CELL_COLUMNS})
    return Record(cell, row["metric"], Estimate(**figures))


def _load_arrays(
    main: Path, name: str, pin: str, cells: Sequence[Cell]
) -> dict[Cell, dict[str, NDArray[Any]]]:
    # a renamed run keeps its files together: the stem is the JSON's, wherever that was moved
    there = {path.name for path in main.parent.iterdir()}
    own = main.with_suffix(".npz").name
    sidecar = main.with_name(name if name in there else own)
    if sidecar.name not in there:
        raise FileNotFoundError(f"{main} needs {own} beside it; copy both")
    blob = _read_small(sidecar, _MOST_BYTES)
    if (seen := hashlib.sha256(blob).hexdigest()) != pin:
        raise ValueError(
            f"{sidecar} is not the file that {main.name} was written with: its SHA-256 is {seen}, "
            f"not {pin[:64]!r}; copy both from one run"
        )
    arrays: dict[Cell, dict[str, NDArray[Any]]] = {cell: {} for cell in cells}
    places = {str(place): cell for place, cell in enumerate(cells)}
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as packed:
            size = sum(member.file_size for member in packed.infolist())
        if len(blob) + size > _MOST_BYTES:
            raise ValueError(f"{len(blob):,} bytes unpack to {size:,}; a run takes less")
        with np.load(io.BytesIO(blob), allow_pickle=False) as stored:
            for key in stored.files:
                place, slash, kind = key.partition("/")
                if slash:  # numpy before 2.2 wrote its argument allow_pickle as an array
                    array = arrays[places[place]][kind] = stored[key]
                    if not isinstance(array, np.ndarray) or array.dtype.kind not in _NUMBERS:
                        raise ValueError(f"{key!r} is no array of numbers")
    except (
        *(zipfile.BadZipFile, zlib.error, EOFError, KeyError, MemoryError, OverflowError),
        *(NotImplementedError, RuntimeError, TypeError, ValueError),
    ) as error:
        raise ValueError(f"{sidecar} is damaged: {error}; run the evaluation again") from error
    return arrays
