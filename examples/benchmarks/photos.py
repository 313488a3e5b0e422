"""How long photos take from file to super-resolved faces, and how much memory.

    python examples/benchmarks/photos.py lfw.tar --photos 10000

One small face in a JPEG of 12 megapixels, file to picture; and `idloss upscale` of folders: photos
as they are, where faces of LFW have pixels enough and are cut out, and those shrunk to 48x48, where
each face that is found goes through the SRNet as 28x24. A hundredth and a tenth of the photos come
first, to show whether memory grows with them. Every row is a process of its own; the loading of
networks is not timed.
"""

from __future__ import annotations

import io
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import typer
from PIL import Image, ImageOps
from timing import in_own_process, peak_mebibytes, seconds, table

from idloss import FacePipeline
from idloss.data.faces import is_picture
from idloss.data.files import open_files
from idloss.upscaling import upscale

LARGE = (4000, 3000)
SMALL = (48, 48)


class Run(NamedTuple):
    """What one way took, all photos together."""

    photos: int
    faces: int
    restored: int
    seconds: float
    mebibytes: float


def pictures(data: str, most: int) -> Iterator[tuple[str, Image.Image]]:
    """Photos spread over a folder or tar, with their names."""
    files = open_files(data)
    names = [name for name in files.names() if is_picture(name)]
    for name in names[:: max(1, len(names) // most)][:most]:
        yield Path(name).name, Image.open(io.BytesIO(files.read(name))).convert("RGB")


def one_large(data: str, folder: Path, srnet: str, detector: str, rounds: int) -> Run:
    """Time a photo with one small face before a view that fills 12 megapixels; the median."""
    (_, face) = next(pictures(data, 1))
    large = ImageOps.flip(face.resize(LARGE, Image.Resampling.BICUBIC))  # no face upside down
    large.paste(face.resize((64, 64), Image.Resampling.LANCZOS), (2000, 1500))
    path = folder / "large.jpg"
    large.save(path, quality=92)
    del large
    pipeline = FacePipeline(detector, srnet, None, device="cpu")
    (found,) = pipeline(path)
    taken = statistics.median(seconds(lambda: pipeline(path)) for _ in range(rounds))
    return Run(1, len(found), sum(found.restored), taken, peak_mebibytes())


def whole_folder(data: str, folder: Path, srnet: str, detector: str, most: int, small: bool) -> Run:
    """Time `idloss upscale` of a folder."""
    photos = folder / "photos"
    photos.mkdir()
    for name, photo in pictures(data, most):
        kept = photo.resize(SMALL, Image.Resampling.LANCZOS) if small else photo
        kept.save(photos / f"{Path(name).stem}.{'png' if small else 'jpg'}", quality=95)
    pipeline = FacePipeline(detector, srnet, None, device="cpu")
    found = []
    taken = seconds(lambda: found.append(upscale(pipeline, [str(photos)], folder / "out")))
    (came,) = found
    return Run(came.photos, came.faces, came.restored, taken, peak_mebibytes())


def compare(data: str, photos: int, srnet: str, detector: str, rounds: int) -> dict[str, Run]:
    """Every way in a process of its own."""
    runs = {}
    with tempfile.TemporaryDirectory() as place:
        runs["12 megapixels"] = in_own_process(
            one_large, data, Path(place), srnet, detector, rounds
        )
    some, few = (max(1, photos // part) for part in (10, 100))
    for most, small in ((few, False), (some, False), (photos, False), (some, True)):
        name = f"{most} photos{f' of {SMALL[0]}x{SMALL[1]}' if small else ''}"
        with tempfile.TemporaryDirectory() as place:
            runs[name] = in_own_process(
                whole_folder, data, Path(place), srnet, detector, most, small
            )
    return runs


def main(
    data: str,
    photos: int = 10_000,
    srnet: str = "edsr16_64_id",
    detector: str = "mtcnn",
    rounds: int = 5,
) -> None:
    """Print the table."""
    rows = [
        f"{name} | {run.faces} | {run.restored} | {run.seconds:.2f}"
        f" | {run.photos / run.seconds:.1f} | {run.mebibytes:.0f}"
        for name, run in compare(data, photos, srnet, detector, rounds).items()
    ]
    print(table(" | faces | super-resolved | s | photos/s | peak MiB", rows))


if __name__ == "__main__":
    typer.run(main)
