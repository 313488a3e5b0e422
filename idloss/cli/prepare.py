"""`idloss prepare`: photos to aligned crops that training reads without decoding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from idloss.data import Faces, Report

_KINDS = ("celeba", "folder", "lfw")
_FNET = "mobilefacenet"


def prepare(
    kind: Annotated[str, typer.Argument(help="celeba, folder (with landmarks.csv) or lfw.")],
    path: Annotated[Path, typer.Argument(help="Folder, .tar or .tgz; tars are read in place.")],
    out: Annotated[Path, typer.Argument(help="Folder to fill; a run that stopped goes on.")],
    clean_list: Annotated[
        Path | None,
        typer.Option(help="Images to take, one a row, with ten coordinates or without."),
    ] = None,
    exclude_overlap: Annotated[
        Path | None, typer.Option(help="Evaluation set whose people are removed, such as LFW.")
    ] = None,
    fnet: Annotated[str, typer.Option(help="FNet that finds the people to remove.")] = _FNET,
    threshold: Annotated[
        float | None,
        typer.Option(help=f"Cosine of one person. [default: the one measured for {_FNET}]"),
    ] = None,
    crop: Annotated[
        str, typer.Option(help="Template to align to: sphereface (112x96), arcface (112x112), ...")
    ] = "sphereface",
    split: Annotated[
        str | None, typer.Option(help="Of CelebA: train, valid or test. [default: all]")
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Drop what cannot be read; recorded.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Decoding threads. [default: one a core, 8 at most]")
    ] = None,
    device: Annotated[str, typer.Option(help="Of the FNet: auto, cpu, cuda, cuda:1, mps")] = "auto",
) -> None:
    """Align faces once, for training to read them as they are."""
    from idloss import FaceEncoder
    from idloss.data import Exclusion, open_evaluation
    from idloss.data import prepare as run
    from idloss.data.overlap import THRESHOLD
    from idloss.encoder import resolve_device

    source = _source(kind, path, split, skip_missing=skip_missing)
    exclude = None
    if exclude_overlap is not None:
        if threshold is None and fnet != _FNET:
            raise ValueError(
                f"the cosine of one person depends on the FNet, and only that of {_FNET} was "
                f"measured: give the one of {fnet} with --threshold"
            )
        found = open_evaluation(exclude_overlap, skip_missing=skip_missing)
        encoder = FaceEncoder(fnet, crop=crop).to(resolve_device(device)).eval()
        least = THRESHOLD if threshold is None else threshold
        exclude = Exclusion(found.name, found.faces, encoder, fnet, least)
    report = run(
        source,
        out,
        crop=crop,
        clean_list=clean_list,
        exclude=exclude,
        skip_missing=skip_missing,
        threads=threads,
    )
    for line in _lines(report):
        # names come from other people's tables and archives
        typer.echo("".join(letter if letter.isprintable() else "?" for letter in line))


def _source(kind: str, path: Path, split: str | None, *, skip_missing: bool) -> Faces:
    from idloss.data import celeba_faces, folder_faces, lfw
    from idloss.errors import did_you_mean

    if kind not in _KINDS:
        raise ValueError(did_you_mean("kind of faces", kind, _KINDS))
    if split is not None and kind != "celeba":
        raise ValueError(f"--split is CelebA's; {kind!r} has none")
    if kind == "folder":
        return folder_faces(path, skip_missing=skip_missing)
    if kind == "lfw":
        return lfw(path, skip_missing=skip_missing).faces
    try:
        return celeba_faces(path, split=split or "all", skip_missing=skip_missing)
    except FileNotFoundError as error:
        advice = f"photos beside a landmarks.csv are prepared by: idloss prepare folder {path} OUT"
        raise FileNotFoundError(f"{error}; {advice}") from error


def _lines(report: Report) -> list[str]:
    """What came of it, in a few lines."""
    faces = report.faces
    _, _, height, width = faces.pixels.shape
    people = f" of {len(faces.identities):,} people" if faces.labels is not None else ""
    lines = [f"{len(faces):,} faces{people}, {faces.crop} {height}x{width}, in {faces.folder}"]
    lines += [f"dropped {count:,}: {reason}" for reason, count in report.dropped.items()]
    if report.dropped:
        lines.append(f"each is named in {faces.folder / 'dropped.csv'}")
    for match in report.matches:
        who = f"{match.photo} of {match.identity}" if match.photo else f"all of {match.identity}"
        lines.append(f"removed: {who} is {match.other} (cosine {match.similarity:.2f})")
    for fault in report.unchecked:
        lines.append(f"not looked for, and perhaps among the faces still: who is in {fault}")
    if report.duplicates:
        lines.append(f"{report.duplicates:,} crops have the pixels of another; they are kept")
    return lines
