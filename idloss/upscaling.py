"""Photos of whole folders through a FacePipeline: each once, whoever stops the run or shares it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from idloss.data.faces import MANY_PIXELS, map_ahead
from idloss.data.files import SHOWN, DataError, Fault
from idloss.data.pictures import find_pictures, read_photo
from idloss.encoder import resolve_device
from idloss.errors import import_extra
from idloss.pipeline import FacePipeline
from idloss.resample import resize
from idloss.weights.files import written_whole

FOUND, SHEET = "found.jsonl", "sheet.png"
_SETTINGS = "settings.json"
_ON_SHEET, _CELL = 64, (224, 192)  # faces on a sheet, and rows and columns of each picture
# a detector holds 20 bytes a pixel
_large_photos = threading.BoundedSemaphore(2)


@dataclass
class Processes:
    """Which of the processes that share a run this is, and what it computes on."""

    rank: int = 0
    count: int = 1
    device: str | torch.device = "auto"
    state: Any = None

    @classmethod
    def join(cls, device: str) -> Processes:
        """Meet the processes that torchrun has started, if it has."""
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started == 1:
            return cls(device=device)
        accelerate = import_extra("accelerate", "train", "several processes need")
        # whoever is done first waits for the others, days if need be
        on_cpu = resolve_device(device).type == "cpu"  # else processes on CPUs do not join
        state = accelerate.PartialState(cpu=on_cpu, timeout=timedelta(days=30))
        if state.num_processes != started:
            raise ValueError(
                f"{started} processes were started and on {state.device} they do not join: start "
                "one, or set device=cpu"
            )
        own = state.device if device == "auto" else device
        return cls(state.process_index, state.num_processes, own, state)

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.state is not None:
            self.state.wait_for_everyone()


@dataclass
class Summary:
    """What came of a run."""

    photos: int = 0
    faces: int = 0
    restored: int = 0
    failed: int = 0
    faults: list[Fault] = field(default_factory=list)
    """The first of those that failed."""

    def error(self) -> DataError | None:
        """What to raise at the end, if anything failed."""
        if not self.failed:
            return None
        lines = [f"  {fault}" for fault in self.faults]
        if self.failed > len(lines):
            lines.append(f"  ... and {self.failed - len(lines):,} more, in {FOUND}")
        head = f"{self.failed:,} could not be read:"
        rest = "The rest is done; the same command tries these again."
        return DataError("\n".join([head, *lines, rest]))


def upscale(
    pipeline: FacePipeline,
    paths: Sequence[str],
    out: Path,
    *,
    crop: str | None = None,
    paste: bool = False,
    settings: Mapping[str, Any] | None = None,
    processes: Processes | None = None,
) -> Summary:
    """Write the faces of photos, and what was found, into a folder; what is there is not done anew.

    A photo is told by its place, size and time. Its record in `found/` is written last and at once,
    so that a run may be killed, and shared by any processes, and nothing else need be remembered.

    Args:
        pipeline: What finds and restores faces.
        paths: Photos, folders of them, and patterns.
        out: Gets `crops/`, `pictures/`, `found/`, then `found.jsonl` with a line a photo, and
            `sheet.png` with the first 64 faces.
        crop: The photos are crops of this template.
        paste: Also write to `pasted/` the photos with super-resolved faces laid over them.
        settings: What makes another run; other ones in the same folder are refused.
        processes: This and those that share the run; None for this alone.

    Returns:
        What came of it, for the first process; for others that is empty.

    Raises:
        ValueError: The folder holds a run with other settings.
        OSError: The folder cannot be written to.
    """
    ours = processes or Processes()
    lead = ours.rank == 0
    if lead:
        _begin(out, {**(settings or {}), "crop": crop, "paste": paste})
    ours.wait()

    def work(photo: tuple[Path, str]) -> None:
        _finish_photo(pipeline, *photo, out, crop=crop, paste=paste)

    photos = ((path, _name(path)) for path in find_pictures(paths, [], without=out))
    # by its name, not its turn: processes may see a folder in different orders
    mine = (one for one in photos if int(one[1][-16:], 16) % ours.count == ours.rank)
    due = (one for one in mine if "error" in (_record(out, one[1]) or {"error": ""}))
    bar = tqdm(desc="upscale", unit="photo", delay=2, disable=not lead)
    with bar, one_core_each() as threads:
        for _ in map_ahead(work, due, threads):
            bar.update()
    ours.wait()
    return _gather(paths, out) if lead else Summary()


@contextmanager
def one_core_each() -> Iterator[int]:
    """How many photos to work at: on one core each nothing waits, and all photos come out alike."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(8, cores)
    finally:
        torch.set_num_threads(cores)


def _begin(out: Path, settings: Mapping[str, Any]) -> None:
    """Start a run, or see that the one in the folder is this one."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / _SETTINGS
    text = json.dumps(settings, sort_keys=True)
    if not path.exists():
        _write(path, text.encode())
    elif path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{out} holds a run with other settings: name another folder")


def _name(path: Path) -> str:
    """What the files of a photo are called; ends in what tells it from others, and from itself."""
    about = [os.path.join(os.path.realpath(path.parent), path.name)]  # noqa: PTH118
    try:
        stat = path.stat()
        about += [str(stat.st_size), str(stat.st_mtime_ns)]
    except OSError:  # told when it is read
        pass
    key = hashlib.sha256("\0".join(about).encode(errors="surrogateescape")).hexdigest()[:16]
    # names of others may hold what a terminal or another system obeys, and be too long for more
    stem = re.sub(r"[^\w.-]", "_", path.stem).encode()[:100].decode(errors="ignore")
    return f"{stem}-{key}"


def _record(out: Path, name: str) -> dict[str, Any] | None:
    """What is known of a photo."""
    try:
        record: dict[str, Any] = json.loads((out / "found" / f"{name}.json").read_bytes())
    except (OSError, ValueError):
        return None
    return record


def _finish_photo(
    pipeline: FacePipeline, path: Path, name: str, out: Path, *, crop: str | None, paste: bool
) -> None:
    """Write what a photo holds, and last its record."""
    record: dict[str, Any] = {"photo": os.fspath(path)}
    try:
        photo = read_photo(path)
        large = photo[0].numel() > MANY_PIXELS
        with _large_photos if large else nullcontext():
            (faces,) = pipeline(photo, crop=crop)
            pasted = pipeline.paste(photo, faces) if paste and any(faces.restored) else None
    except ValueError as error:  # of this photo
        faults = getattr(error, "faults", ())
        record["error"] = faults[0].what if faults else str(error)
    else:
        record["faces"] = []
        for place, restored in enumerate(faces.restored):
            files = {kind: f"{kind}s/{name}_{place}.png" for kind in ("crop", "picture")}
            _save(faces.crops[place], out / files["crop"])
            _save(faces.pictures[place], out / files["picture"])
            points = faces.found.landmarks[place].tolist()
            record["faces"].append(
                {
                    "box": [round(value, 2) for value in faces.found.boxes[place].tolist()],
                    "score": round(float(faces.found.scores[place]), 5),
                    "landmarks": [[round(x, 2), round(y, 2)] for x, y in points],
                    "restored": restored,
                    **files,
                }
            )
        if faces.left_out:
            record["left_out"] = faces.left_out
        if pasted is not None:
            record["pasted"] = f"pasted/{name}.png"
            _save(pasted, out / record["pasted"])
    _write(out / "found" / f"{name}.json", json.dumps(record).encode())


def _save(picture: Tensor, path: Path) -> None:
    content = io.BytesIO()
    # a fifth of the time that Pillow's level takes, for pictures that are no larger
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    image.save(content, format="PNG", compress_level=1)
    _write(path, content.getvalue())


def _write(path: Path, content: bytes) -> None:
    """Write a file whole; `written_whole` would list a folder of a million for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _gather(paths: Sequence[str], out: Path) -> Summary:
    """Write the records of all photos into one file, and the first faces on a sheet."""
    summary, shown, folders = Summary(), list[dict[str, str]](), list[Fault]()
    with written_whole(out / FOUND) as unfinished, unfinished.open("w", encoding="utf-8") as told:
        for path in find_pictures(paths, folders, without=out):
            record = _record(out, _name(path))
            if record is None:  # it has come, or was changed, since
                continue
            print(json.dumps(record), file=told)
            if "error" in record:
                summary.failed += 1
                summary.faults += [Fault(record["photo"], record["error"])]
                del summary.faults[SHOWN:]
                continue
            summary.photos += 1
            summary.faces += len(record["faces"])
            summary.restored += sum(face["restored"] for face in record["faces"])
            shown += record["faces"][: _ON_SHEET - len(shown)]
        for fault in folders:
            print(json.dumps({"photo": fault.where, "error": fault.what}), file=told)
    summary.failed += len(folders)
    summary.faults = [*folders, *summary.faults][:SHOWN]
    if shown:
        _save(_sheet(out, shown), out / SHEET)
    return summary


def _sheet(out: Path, faces: Sequence[Mapping[str, str]]) -> Tensor:
    """Crops as they are, enlarged without smoothing, each beside its picture."""
    cells = []
    for face in faces:
        crop, picture = (
            torch.from_numpy(np.array(Image.open(out / face[kind]))).permute(2, 0, 1)[None]
            for kind in ("crop", "picture")
        )
        pair = [resize(crop, _CELL, mode="nearest"), resize(picture, _CELL, convention="antialias")]
        cells.append(torch.cat(pair, 3)[0])
    sheet: Tensor = make_grid(cells, nrow=min(8, len(cells)), padding=8, pad_value=255)
    return sheet
