"""The `idloss` command: thin wrappers, one function of the library each."""

from __future__ import annotations

import sys
import warnings

try:
    import typer
except ModuleNotFoundError as missing:  # pragma: no cover - needs an install without extras
    sys.exit(f"the idloss command needs {missing.name}: pip install 'idloss[eval]'")

from idloss.cli import evaluation, models, prepare, training

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
app.command("list")(models.list_models)
app.command()(models.info)
app.command()(models.fetch)
app.command()(prepare.prepare)
app.command()(training.train)
app.command("train-fnet")(training.train_fnet)
app.command()(evaluation.evaluate)
app.command()(evaluation.compare)


def main() -> None:
    """Run the command; an error of the user's is one line, not a traceback."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app()
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            sys.exit(f"idloss: {_one_line(str(error))}")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as one line, without the place in our code that gave it."""
    print(f"idloss: warning: {_one_line(str(message))}", file=sys.stderr)


def _one_line(message: str) -> str:
    """A message of the library's as one line of the command's, which has options for arguments."""
    lines = [line.strip() for line in message.splitlines()]
    return "; ".join(filter(None, lines)).replace("skip_missing=True", "--skip-missing")
