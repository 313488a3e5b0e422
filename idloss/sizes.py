"""Sizes as people write them: rows x columns."""

from __future__ import annotations

import re

Size = tuple[int, int]

_SIZE = re.compile(r"([1-9]\d*)[x\N{MULTIPLICATION SIGN}]([1-9]\d*)")


def parse_size(text: str) -> Size:
    """Turn `7x6` into rows and columns.

    Args:
        text: A size, rows first.

    Returns:
        `(rows, columns)`, both above zero.

    Raises:
        ValueError: It is not of that form.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not rows x columns; write it as 7x6")
    return int(match[1]), int(match[2])
