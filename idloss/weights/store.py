"""Where weights are kept on this machine: `$HF_HOME/idloss`, or a folder of the caller's."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from idloss.weights.files import Piece, settle

# A scratch folder older than this, in seconds, was left by a killed process.
_STALE = 3600.0


def offline() -> bool:
    """Whether the user forbids the network (`HF_HUB_OFFLINE`), at import time or by now."""
    asked = os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
    return bool(constants.HF_HUB_OFFLINE) or asked


@dataclass(frozen=True)
class Store:
    """The folders of one cache.

    `downloads/` holds verified files as they came, `converted/` what was made of them. Anything
    in either may be deleted at any time: it is fetched or made again.

    Args:
        root: The cache's top folder.
        hub_cache: The Hub client's cache; None for its own default (`HF_HUB_CACHE`).
    """

    root: Path
    hub_cache: Path | None = None

    @classmethod
    def at(cls, cache_dir: str | os.PathLike[str] | None) -> Store:
        """The cache in `cache_dir`, or the default one under `HF_HOME`."""
        if cache_dir is None:
            return cls(Path(constants.HF_HOME) / "idloss")
        return cls(Path(cache_dir) / "idloss", Path(cache_dir))

    def download_path(self, piece: Piece) -> Path:
        """Where a piece is kept as it came; its hash is in the name."""
        return self.root / "downloads" / f"{piece.digest.replace(':', '-')}-{piece.filename}"

    def converted_path(self, name: str, key: str) -> Path:
        """Where the safetensors of weights `name` are kept, made from what `key` stands for."""
        return self.root / "converted" / f"{name}-{key[:16]}.safetensors"

    def keep(self, piece: Piece, path: Path) -> None:
        """Copy a verified file into `downloads/`."""
        target = self.download_path(piece)
        with self.scratch() as folder:
            copy = folder / piece.filename
            shutil.copyfile(path, copy)
            target.parent.mkdir(parents=True, exist_ok=True)
            settle(copy, target)

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """One process at a time for what is to be at `path`; the others wait."""
        lock = self.root / ".locks" / f"{path.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            yield

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for unfinished work, on the cache's own file system, gone afterwards."""
        parent = self.root / ".scratch"
        parent.mkdir(parents=True, exist_ok=True)
        for old in parent.iterdir():
            if time.time() - old.stat().st_mtime > _STALE:
                shutil.rmtree(old, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            yield Path(folder)
