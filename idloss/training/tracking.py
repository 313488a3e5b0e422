"""The run's own log: one CSV for training, one for validation."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

from idloss.weights.files import written_whole

VALIDATION = "validation/"
"""What names of validation figures begin with."""


class CsvTracker(GeneralTracker):
    """Writes `training.csv` and `validation.csv`, a row a step.

    Args:
        folder: Where they are.
    """

    name = "csv"
    requires_logging_directory = False

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @property
    def tracker(self) -> Path:
        """The folder, as Accelerate wants to know it."""
        return self.folder

    def _paths(self) -> tuple[Path, Path]:
        return self.folder / "training.csv", self.folder / "validation.csv"

    def cut(self, start: int) -> None:
        """Drop the rows of a run that was cut off, which its resumption writes again.

        Args:
            start: Step that it goes on from, and is validated after anew.
        """
        for path, last in zip(self._paths(), (start, start - 1), strict=True):
            if not path.exists():
                continue
            head, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= last]
            if not kept:
                path.unlink()
            elif len(kept) < len(rows):
                with written_whole(path) as temporary:
                    temporary.write_text(head + "".join(kept), encoding="utf-8")

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Add a row.

        Args:
            values: Figures by name.
            step: The step.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        validating = any(name.startswith(VALIDATION) for name in values)
        path = self._paths()[validating]
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(["step", *(name.removeprefix(VALIDATION) for name in values)])
            writer.writerow([step, *values.values()])
