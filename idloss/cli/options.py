"""Command-line words that stand for something: sizes, named networks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from idloss.resample import parse_size

_LABEL = re.compile(r"([\w.-]+)=(.+)")


def parse_sizes(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Turn `7x6` and the like into rows and columns.

    Args:
        texts: Sizes, rows first.

    Returns:
        `(rows, columns)` of each.

    Raises:
        ValueError: One is not of that form, or is given twice.
    """
    sizes: list[tuple[int, int]] = []
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
    """Turn `sface` or `ours=local-dir:runs/best` into networks with weights.

    Args:
        option: The option's name, for messages.
        texts: A name that `create` knows, or LABEL=NAME.
        create: `create_fnet` or `create_srnet`.

    Returns:
        Networks by label; the name is the label where none is given.

    Raises:
        ValueError: A label is given twice, or a network is unknown.
    """
    networks: dict[str, nn.Module] = {}
    for text in texts:
        labelled = _LABEL.fullmatch(text)
        label, name = labelled.groups() if labelled else (text, text)
        if label in networks:
            raise ValueError(f"{option} {label!r} is given twice; label one as OTHER={name}")
        networks[label] = create(name, pretrained=True)
    return networks
