"""The `idloss` command: thin wrappers, one function of the library each."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError as missing:  # pragma: no cover - needs an install without extras
    sys.exit(f"the idloss command needs {missing.name}: pip install 'idloss[eval]'")

from idloss.cli import (
    evaluation,
    export,
    landmarks,
    models,
    people,
    prepare,
    similarity,
    training,
    upscale,
)

# what the library raises for what a user gave; all else is a bug, or a damaged file
_EXPECTED = (ValueError, OSError, RuntimeError, ImportError)
# control characters, the marks that reverse text, halves of file names that are not UTF-8
_UNPRINTABLE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command("list")(models.list_models)
app.command()(models.info)
app.command()(models.fetch)
app.command()(models.publish)
app.command()(prepare.prepare)
app.command()(training.train)
app.command("train-fnet")(training.train_fnet)
app.command()(upscale.upscale)
app.command()(landmarks.landmarks)
app.command()(people.verify)
app.command()(people.search)
app.command()(evaluation.evaluate)
app.command()(evaluation.compare)
app.command()(similarity.ids)
app.command()(export.export)


def _show_version(wanted: bool) -> None:
    if wanted:
        from idloss import __version__

        typer.echo(f"idloss {__version__}")
        raise typer.Exit


@app.callback(help=__doc__)
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None: ...


def main() -> None:
    """Run the command; what goes wrong is told in a few lines, without a traceback."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app()
        except _EXPECTED as error:
            sys.exit(_told(str(error)))
        except Exception as error:
            near = _file_at_hand(error.__traceback__)
            where = f"\nwhile reading {near}: is it damaged?" if near else ""
            sys.exit(_told(f"{type(error).__name__}: {error}{where}"))


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning without the place in our code that gave it."""
    print(_told(f"warning: {message}"), file=sys.stderr)


def _told(message: str) -> str:
    """A message of the library's for a terminal: options for arguments, no control characters."""
    lines = [line.rstrip() for line in message.splitlines() if line.strip()]
    shown = "\n  ".join(lines) or "failed without a message"
    for name in _option_names():
        flag = f"--{name.replace('_', '-')}"
        shown = re.sub(rf"(?<![\w-]){name}s?=True\b", flag, shown)
        shown = re.sub(rf"(?<![\w-]){name}s?=(?=\S)", f"{flag} ", shown)
    return "idloss: " + _UNPRINTABLE.sub(lambda m: m[0].encode("unicode_escape").decode(), shown)


def _option_names() -> list[str]:
    """Arguments that the command being run has options for; recipes' fields stay fields."""
    commands: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    command = next((commands[word] for word in sys.argv[1:] if word in commands), None)
    options = command.params if command else []
    return [option.name for option in options if option.param_type_name == "option"]


def _file_at_hand(traceback: TracebackType | None) -> Path | None:
    """The file that the innermost function with one was given or had opened."""
    for frame, _ in reversed(list(walk_tb(traceback))):
        for value in frame.f_locals.values():
            if not isinstance(value, str | Path) or "\0" in str(value):
                continue
            path = Path(value)
            if path.suffix and len(str(path)) < 4096 and path.is_file():
                return path
    return None
