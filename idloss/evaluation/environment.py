"""Versions and hardware: what a result was computed with."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from idloss import __version__

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
