"""Command-line words that stand for something: sizes, named networks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

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
