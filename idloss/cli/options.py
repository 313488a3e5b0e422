"""Command-line words that stand for something: sizes, named networks, picture files."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import nn

from idloss.data.faces import is_picture
from idloss.data.files import DataError, Fault, FolderFiles
from idloss.resample import Size, parse_size

_LABEL = re.compile(r"([\w.-]+)=(.+)")


def parse_sizes(texts: Sequence[str]) -> tuple[Size, ...]:
    """Turn each `7x6` of `--size` into rows and columns."""
    sizes: list[Size] = []
    for text in texts:
        try:
            size = parse_size(text)
        except ValueError as error:
            raise ValueError(f"--size {error}") from None
        if size in sizes:
            raise ValueError(f"--size {text!r} is given twice")
        sizes.append(size)
    return tuple(sizes)


def parse_networks(
    option: str, texts: Sequence[str], create: Callable[..., nn.Module]
) -> dict[str, nn.Module]:
    """Turn `sface` or `ours=local-dir:runs/best` into networks with weights, by label."""
    networks: dict[str, nn.Module] = {}
    for text in texts:
        labelled = _LABEL.fullmatch(text)
        label, name = labelled.groups() if labelled else (text, text)
        if label in networks:
            raise ValueError(f"{option} {label!r} is given twice; label one as OTHER={name}")
        networks[label] = create(name, pretrained=True)
    return networks


def find_pictures(
    paths: Sequence[str], faults: list[Fault], *, without: Path | None = None
) -> Iterator[Path]:
    """The picture files meant by photos, folders and patterns, but those below a folder.

    What is none is added to the faults.
    """
    hidden = without and without.resolve()
    for text in paths:
        found = [Path(text)] if os.path.lexists(text) else map(Path, sorted(glob.glob(text)))  # noqa: PTH207
        none = True
        for path in found:
            none = False
            if not path.is_dir():
                yield path
                continue
            try:
                for name in FolderFiles(path).names():
                    picture = path / name
                    if is_picture(name) and hidden not in picture.resolve().parents:
                        yield picture
            except DataError as error:
                faults += error.faults
        if none:
            faults.append(Fault(text, "there is no such file or folder"))
