"""`idloss verify` and `idloss search`: how alike faces are, and how often strangers are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from idloss.evaluation import Odds
    from idloss.matching import Face

_MEANING = (
    "These are rates among the pairs measured, not the chance that it is one person; other people, "
    "cameras and light have others. A super-resolved face is no evidence of who somebody is."
)
SRNet = Annotated[str, typer.Option(help="SRNet that faces of few pixels go through.")]
FNet = Annotated[str, typer.Option(help="FNet.")]
Finder = Annotated[str, typer.Option(help="mtcnn or yunet.")]
Crop = Annotated[
    str | None, typer.Option(help="The pictures are crops of this template, not photos.")
]
Table = Annotated[
    list[Path] | None, typer.Option(help="calibration.csv of your own, by idloss evaluate.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]


def verify(
    a: Annotated[Path, typer.Argument(help="A photo.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    face_a: Annotated[int | None, typer.Option(min=1, help="Which of several faces of A.")] = None,
    face_b: Annotated[int | None, typer.Option(min=1, help="Which of several faces of B.")] = None,
    srnet: SRNet = "edsr16_64_id",
    fnet: FNet = "mobilefacenet",
    detector: Finder = "mtcnn",
    crop: Crop = None,
    table: Table = None,
    device: Device = "auto",
) -> None:
    """Say how alike two faces are, and how often strangers are as alike."""
    from idloss.matching import FaceMatcher

    matcher = FaceMatcher(srnet, fnet, detector, crop=crop, tables=table or (), device=device)
    faces = [
        _choose(matcher.read(path), path, chosen, option)
        for path, chosen, option in ((a, face_a, "face_a"), (b, face_b, "face_b"))
    ]
    cosine, odds = matcher.compare(*faces)
    pixels = " and ".join(f"{face.rows:.0f}" for face in faces)
    typer.echo(f"similarity {cosine:.3f} (cosine; faces of {pixels} rows; {fnet}, {srnet})")
    typer.echo(_told(odds, fnet, srnet))


def _choose(faces: list[Face], path: Path, chosen: int | None, option: str) -> Face:
    """The face that is meant, or an error that says which there are."""
    if not faces:
        raise ValueError(f"{path}: no face was found; say crop=TEMPLATE if it is a crop")
    if len(faces) > 1 and chosen is None:
        places = [
            f"{number}: from ({left:.0f}, {top:.0f}) to ({right:.0f}, {bottom:.0f})"
            for number, (left, top, right, bottom) in enumerate((f.box for f in faces), start=1)
        ]
        raise ValueError("\n".join([f"{path} has several faces, choose by {option}=N:", *places]))
    if (chosen or 1) > len(faces):
        raise ValueError(f"{path} has {len(faces)} faces, there is no {option}={chosen}")
    return faces[(chosen or 1) - 1]


def _told(odds: Odds | None, fnet: str, srnet: str) -> str:
    """What a similarity means, or that nobody measured it."""
    if odds is not None:
        return f"{str(odds)[0].upper()}{str(odds)[1:]}.\n{_MEANING}"
    return (
        "This is a bare cosine: how often strangers are as alike was not measured for faces of so "
        f"many pixels with these weights of {fnet} and {srnet}. idloss evaluate measures it (with "
        "--probe both where both faces are small) and writes calibration.csv, for --table."
    )


def search(
    probe: Annotated[str, typer.Argument(help="A photo, a folder of them, or a pattern.")],
    gallery: Annotated[Path, typer.Argument(help="Folder of photos to find the person in.")],
    top: Annotated[int, typer.Option(min=1, help="Faces to show for each of the probe's.")] = 5,
    index: Annotated[
        Path | None,
        typer.Option(help="Folder for embeddings. [default: below $HF_HOME/idloss/galleries]"),
    ] = None,
    srnet: SRNet = "edsr16_64_id",
    fnet: FNet = "mobilefacenet",
    detector: Finder = "mtcnn",
    crop: Crop = None,
    table: Table = None,
    device: Device = "auto",
) -> None:
    """Find the faces of photos in a folder of others, whose embeddings are kept on disk.

    What is new or changed in the folder is embedded first; a run that was stopped goes on.
    """
    from huggingface_hub.constants import HF_HOME
    from huggingface_hub.utils.tqdm import tqdm

    from idloss.data.files import DataError, Fault
    from idloss.data.pictures import find_pictures
    from idloss.errors import some_of
    from idloss.evaluation.cache import digest
    from idloss.gallery import Gallery
    from idloss.matching import FaceMatcher

    matcher = FaceMatcher(srnet, fnet, detector, crop=crop, tables=table or (), device=device)
    key = digest(str(gallery.absolute()), matcher.settings)
    folder = index or Path(HF_HOME) / "idloss" / "galleries" / key[:24]
    faults: list[Fault] = []
    with Gallery(folder, matcher) as known:
        photos = find_pictures([str(gallery)], faults, without=folder)
        known.update(tqdm(photos, desc="gallery", unit="photo", delay=2), faults)
        typer.echo(f"{len(known):,} faces in the gallery, kept in {folder}")
        measured, looked = False, 0
        for path in find_pictures([probe], faults):
            looked += 1
            try:
                faces = matcher.read(path)
            except DataError as error:
                faults += error.faults
                continue
            if not faces:
                faults.append(Fault(str(path), "no face was found"))
            for number, (face, hits) in enumerate(
                zip(faces, known.search(faces, top), strict=True), start=1
            ):
                typer.echo(f"{some_of([str(path)])}, face {number} of {face.rows:.0f} rows:")
                for hit in hits:
                    cosine, odds = matcher.compare(face, hit.face)
                    left, upper, _, _ = hit.face.box
                    typer.echo(
                        f"  {cosine:.3f}  {some_of([str(hit.photo)])}, at ({left:.0f}, {upper:.0f})"
                        + (f": {_expected(odds, len(known))}" if odds else "")
                    )
                    measured |= odds is not None
        typer.echo(_MEANING if measured else _told(None, fnet, srnet))
        for count, place in ((len(known), gallery), (looked, probe)):
            if not count:
                faults.append(Fault(str(place), "no picture or face is there"))
    if faults:
        raise DataError(faults, "The rest is done; the same command tries these again.")


def _expected(odds: Odds, count: int) -> str:
    """How many of so many strangers are as alike."""
    # where none of n was seen, 3 / n is the bound of 95 %
    expected = count * (odds.fmr or 3 / int(odds.about["strangers"]))
    less = "" if odds.fmr else "fewer than "
    return f"of {count:,} strangers {less}{expected:,.2g} are expected to be as alike"
