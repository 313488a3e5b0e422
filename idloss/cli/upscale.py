"""`idloss upscale`: the faces of photos, cut out, super-resolved and told of in one file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from idloss import FacePipeline

_FOUND = "found.jsonl"


def upscale(
    paths: Annotated[list[str], typer.Argument(help="Photos, folders of them, or patterns.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; a stopped run goes on.")],
    srnet: Annotated[str, typer.Option(help="SRNet.")] = "edsr16_64_id",
    detector: Annotated[str, typer.Option(help="mtcnn or yunet.")] = "mtcnn",
    crop: Annotated[
        str | None, typer.Option(help="Template to align to. [default: the SRNet's, or sphereface]")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Rows x columns of pictures. [default: 4 x the template]"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
) -> None:
    """Find the faces of photos, cut them out, and super-resolve them."""
    from huggingface_hub.utils.tqdm import tqdm

    from idloss.cli.options import find_pictures, parse_sizes
    from idloss.data.files import DataError, Fault
    from idloss.pipeline import FacePipeline

    rows = parse_sizes([size])[0] if size else None
    settings = {"srnet": srnet, "detector": detector, "crop": crop, "size": size}
    done = _begun(out, settings)
    pipeline = FacePipeline(detector, srnet, None, crop=crop, size=rows, device=device)
    faults: list[Fault] = []
    photos = faces = 0
    with (out / _FOUND).open("a", encoding="utf-8") as told:
        for path in tqdm(
            find_pictures(paths, faults, without=out), desc="upscale", unit="photo", delay=2
        ):
            key = _key(path)
            if key in done:
                continue
            done.add(key)
            line: dict[str, Any] = {"photo": os.fspath(path), "key": key}
            try:
                line["faces"] = _restore(pipeline, path, out, key)
                photos, faces = photos + 1, faces + len(line["faces"])
            except (DataError, OSError) as error:
                fault = error.faults[0] if isinstance(error, DataError) and error.faults else None
                faults.append(fault or Fault(str(path), str(error)))
                line["error"] = faults[-1].what
            print(json.dumps(line), file=told, flush=True)
    typer.echo(f"{faces:,} faces in {photos:,} photos, told of in {out / _FOUND}")
    if faults:
        raise DataError(faults, "The rest is done; the same command tries these again.")


def _restore(pipeline: FacePipeline, path: Path, out: Path, key: str) -> list[dict[str, Any]]:
    """Write what a photo holds, whole or not at all; a record for each face."""
    (restored,) = pipeline(path)
    # names of others may hold what a terminal or another system obeys
    stem = re.sub(r"[^\w.-]", "_", path.stem)[:80]
    found, records = restored.found, []
    for place in range(len(restored)):
        name = f"{stem}-{key[:12]}_{place}.png"
        for folder, picture in (
            ("crops", restored.crops[place]),
            ("pictures", restored.pictures[place]),
        ):
            _save(picture, out / folder / name)
        records.append(
            {
                "box": [round(value, 2) for value in found.boxes[place].tolist()],
                "score": round(float(found.scores[place]), 5),
                "landmarks": [[round(v, 2) for v in xy] for xy in found.landmarks[place].tolist()],
                "crop": f"crops/{name}",
                "picture": f"pictures/{name}",
            }
        )
    return records


def _save(picture: Tensor, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(unfinished, format="PNG")
    unfinished.replace(path)


def _begun(out: Path, settings: dict[str, Any]) -> set[str]:
    """Keys of the photos that an earlier run in the folder has done."""
    out.mkdir(parents=True, exist_ok=True)
    told = out / _FOUND
    if not told.exists():
        told.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return set()
    with told.open("r+b") as file:
        first = file.readline()
        if not first.endswith(b"\n") or json.loads(first) != settings:
            raise ValueError(
                f"{out} holds a run with other settings: name another folder with out="
            )
        done, whole = set(), file.tell()
        for line in file:
            if not line.endswith(b"\n"):  # killed while it wrote that
                break
            whole += len(line)
            record = json.loads(line)
            if "error" not in record:
                done.add(record["key"])
        file.truncate(whole)
    return done


def _key(path: Path) -> str:
    """What a photo is told by: its place, and whether it was changed."""
    place = [os.fspath(path.absolute())]
    if path.exists():
        about = path.stat()
        place += [str(about.st_size), str(about.st_mtime_ns)]
    return hashlib.sha256("\0".join(place).encode(errors="surrogateescape")).hexdigest()[:24]
