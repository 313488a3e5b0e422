"""`idloss list`, `info`, `fetch` and `publish`: models, where their weights are, and to the Hub."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]


def list_models(
    pattern: Annotated[str, typer.Argument(help="Wildcard, such as 'edsr*'.")] = "",
    kind: Annotated[str | None, typer.Option(help="fnet or srnet.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Those with weights.")] = False,
    cached: Annotated[bool, typer.Option("--cached", help="Those whose weights are here.")] = False,
    licence: Annotated[str, typer.Option(help="Those of a licence with these letters.")] = "",
    crop: Annotated[str | None, typer.Option(help="Those that take this crop.")] = None,
    as_json: AsJson = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="The page zoo/README.md, of idloss's own models.")
    ] = False,
) -> None:
    """List FNets and SRNets: sizes, input, crop, licence; * marks weights that are here."""
    from idloss import catalogue

    if as_markdown:
        typer.echo(catalogue.markdown(), nl=False)
        return
    found = catalogue.find_models(
        pattern, kind=kind, pretrained=pretrained, cached=cached, licence=licence, crop=crop
    )
    if as_json:
        typer.echo(json.dumps([asdict(facts) for facts in found], indent=1))
        return
    shown = [place for place, head in enumerate(catalogue.HEADS) if head != "training data"]
    table = Table(box=None, pad_edge=False)
    for place in shown:
        numeric = catalogue.HEADS[place] in ("parameters", "multiply-adds", "LFW (%)", "download")
        justify: Literal["left", "right"] = "right" if numeric else "left"
        table.add_column(
            catalogue.HEADS[place], justify=justify, no_wrap=place == 0, overflow="fold"
        )
    for facts in found:
        row = facts.row()
        row[0] += " *" if facts.cached else ""
        table.add_row(*(row[place] for place in shown))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def info(
    name: Annotated[
        str, typer.Argument(help="A model with its tag, hf-hub:owner/name or local-dir:path.")
    ],
    as_json: AsJson = False,
) -> None:
    """Say all that is known of a model, and where its weights come from."""
    from idloss import catalogue, weights

    facts = catalogue.describe_model(name)
    told: dict[str, Any] = dict(zip(catalogue.HEADS, facts.row(), strict=True))
    told["cached"] = catalogue.find_file(name) if facts.cached else "no"
    try:
        about = weights.describe(name)
        told |= {key: about[key] for key in about if key not in ("name", "cached", "size")}
        told["model"] = about["name"]
    except weights.NotFoundError:  # it has none, or is published
        told["weights"] = "where it was published" if ":" in name else "none"
    if as_json:
        typer.echo(json.dumps({**told, **asdict(facts)}, indent=1, default=str))
        return
    for key, value in told.items():
        for line in value if isinstance(value, list) else [value]:
            if line not in ("", None):
                typer.echo(f"{key:<15}{line}")  # whole, however narrow the terminal


def fetch(
    names: Annotated[
        list[str], typer.Argument(help="Models with tags, wildcards, or hf-hub:owner/name.")
    ],
    file: Annotated[
        Path | None, typer.Option(help="A copy you downloaded by hand, to verify and convert.")
    ] = None,
) -> None:
    """Download, verify and convert weights, or verify those that are here; print where they are.

    Afterwards the models are made without a network (HF_HUB_OFFLINE=1).
    """
    from idloss import catalogue, weights

    if file is not None:
        if len(names) != 1:
            raise ValueError("--file is of one model")
        typer.echo(weights.add(names[0], file))
        return
    wanted = []
    for name in names:
        wild = any(letter in name for letter in "*?[")
        found = (
            [one.name for one in catalogue.find_models(name, pretrained=True)] if wild else [name]
        )
        if not found:
            raise ValueError(f"no model with weights is called {name!r}: see idloss list")
        wanted += found
    failed = [why for one in dict.fromkeys(wanted) if (why := _fetch_one(one))]
    if failed:
        raise RuntimeError("\n".join(failed))


def _fetch_one(name: str) -> str:
    """Print where a model's weights are; gives the reason if they are nowhere."""
    from idloss import catalogue
    from idloss.weights import WeightsError

    try:
        typer.echo(catalogue.fetch_model(name))
    except WeightsError as error:
        return str(error)
    return ""


def publish(
    model: Annotated[
        str, typer.Argument(help="A model with weights, the folder of a run, or local-dir:path.")
    ],
    to: Annotated[str, typer.Option(help="owner/name on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Only for who has access to the repository.")
    ] = False,
    licence: Annotated[str | None, typer.Option(help="Of a model of your own.")] = None,
    training_data: Annotated[str | None, typer.Option(help="What it was trained on.")] = None,
    results: Annotated[
        list[Path] | None, typer.Option(help="results.json of idloss evaluate, for the card.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Upload without asking.")] = False,
) -> None:
    """Publish a model: show its files and card, and upload them when you say so."""
    from idloss.evaluation import Results
    from idloss.publish import prepare_publication

    with TemporaryDirectory(prefix="idloss-publish-") as folder:
        publication = prepare_publication(
            model,
            to,
            Path(folder),
            private=private,
            licence=licence,
            training_data=training_data,
            results=[Results.load(path) for path in results or ()],
        )
        typer.echo(publication.card)
        for path in sorted(Path(folder).iterdir()):
            typer.echo(f"{path.stat().st_size:>13,} bytes  {path}")
        where = "a private repository" if private else "a repository that everybody can read"
        if yes or typer.confirm(f"Upload these files to {to}, {where}?"):
            typer.echo(f"hf-hub:{to}@{publication.upload()}")
