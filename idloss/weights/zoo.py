"""Where the zoo is: models and recipes that come with idloss."""

from __future__ import annotations

from pathlib import Path


def zoo_folder() -> Path:
    """The zoo in the installed package, or else in the checkout around it."""
    package = Path(__file__).resolve().parent.parent
    zoo = package / "zoo"
    return zoo if zoo.is_dir() else package.parent / "zoo"
