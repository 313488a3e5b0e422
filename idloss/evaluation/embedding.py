"""Pictures to embeddings, for a whole grid of FNets, SRNets and probe sizes.

Each photo is decoded and aligned once; each batch then goes through every size, SRNet and FNet
before the next, and embeddings go to disk as they come, so that memory does not grow with the
grid. What was computed before is taken from there.
"""

from __future__ import annotations

import copy
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor, nn

from idloss.data import DataError, Faces, Fault
from idloss.data.files import skip_or_raise
from idloss.encoder import FaceEncoder, fold_batch_norm
from idloss.evaluation.cache import (
    ONCE,
    EmbeddingCache,
    Embeddings,
    digest,
    digest_network,
    digest_software,
)
from idloss.evaluation.protocols import Protocol
from idloss.evaluation.results import HR, Cell
from idloss.geometry import Template, convert_crop, get_template
from idloss.registry import create_fnet
from idloss.resample import Size, resize, to_float, to_uint8
from idloss.srnets import Interpolation

SR_CROP = "sphereface"
"""The crop that SR networks work on (paper, section 4.1): 112x96."""
CANVAS = "arcface"
"""What photos are aligned to: the widest crop there is a use for. The SR crop is cut out of it."""
# Faces at a time, for each core or for a GPU. Measured on MobileFaceNet, SFace and EDSR: a core
# gains nothing beyond some 16 images (8 faces and their mirror images).
BATCH_ON_CORE = 8
BATCH_ON_GPU = 32
READERS = 4
"""Threads that decode and align for a GPU."""


def prepare_probe(crops: Tensor, size: Sequence[int], protocol: Protocol) -> Tensor:
    """Degrade HR crops to LR probes, uint8 `[B, 3, H, W]` to uint8 `[B, 3, *size]`.

    A probe is mirrored after this step, not before: the paper's flipped view is the mirrored LR
    image, super-resolved on its own.
    """
    _require_uint8(crops, "crops")
    return resize(crops, size, mode=protocol.down_mode, convention=protocol.convention)


def show_probe(srnet: nn.Module, probes: Tensor, protocol: Protocol) -> Tensor:
    """What the FNet is shown of LR probes: uint8 `[B, 3, h, w]` to RGB `[B, 3, 112, 96]` in [0, 1].

    An `Interpolation` enlarges 8-bit images in one step: the rows `bilinear` (the paper's
    "Bicubic") and `bicubic`.
    """
    _require_uint8(probes, "probes")
    size = get_template(SR_CROP).size
    if isinstance(srnet, Interpolation):
        return to_float(resize(probes, size, mode=srnet.mode, convention=protocol.convention))
    images = to_float(probes)
    if not images.is_cuda:  # a tenth quicker for EDSR on a CPU; not so on a GPU without TF32
        images = images.contiguous(memory_format=torch.channels_last)
    return to_fnet_input(srnet(images), size, protocol)


def to_fnet_input(sr: Tensor, size: Sequence[int], protocol: Protocol) -> Tensor:
    """Bring SR `[B, 3, h, w]` in [0, 1] to the FNet's crop size as the protocol does at test.

    In `paper` and `sphereface`, SR of the right size passes untouched; other sizes are cut down to
    8 bits (`floor(255 x)`, not rounded) and enlarged with 8-bit bicubic. The released code lets
    values outside the range wrap round, which its tanh keeps from happening; here they are clamped.
    """
    if protocol.keep_exact_size and tuple(sr.shape[-2:]) == tuple(size):
        return sr
    levels = to_uint8(sr, rounding=protocol.rounding)
    return to_float(resize(levels, size, mode=protocol.up_mode, convention=protocol.convention))


def fuse_views(embeddings: Tensor, mirrored: Tensor, protocol: Protocol) -> Tensor:
    """One embedding, `[B, 2 D]` or `[B, D]`, of a crop's and its mirror image's, both `[B, D]`."""
    if embeddings.shape != mirrored.shape:
        raise ValueError(
            f"both views need one shape, got {list(embeddings.shape)} and {list(mirrored.shape)}"
        )
    if protocol.flip == "concat":
        return torch.cat((embeddings, mirrored), dim=1)
    return embeddings + mirrored


def both_views(images: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` and then their mirror images, `[2 B, 3, H, W]`."""
    return torch.cat((images, images.flip(-1)))


def cut(canvas: Tensor, crop: str, wanted: str | Template) -> Tensor:
    """One crop out of a wider one, uint8; no resampling between sphereface and arcface."""
    own, other = get_template(crop), get_template(wanted)
    return canvas if own == other else to_uint8(convert_crop(to_float(canvas), own, other))


def _require_uint8(images: Tensor, what: str) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(
            f"{what} must be uint8, got {images.dtype}: protocols resample 8-bit images, turn "
            "float ones into them with idloss.resample.to_uint8"
        )


class Networks:
    """FNets and SRNets ready for many faces; made by `ready`.

    Args:
        fnets: FNets by name, as from `create_fnet`.
        srnets: SRNets by name.
        protocol: How probes are shown and views fused.
        device: Where they are.
    """

    def __init__(
        self,
        fnets: Mapping[str, nn.Module],
        srnets: Mapping[str, nn.Module],
        protocol: Protocol,
        device: torch.device,
    ) -> None:
        self.fnets, self.srnets = dict(fnets), dict(srnets)
        self.protocol, self.device = protocol, device
        # HR comes as the FNet's own crop, SR as the SR crop
        self.crops: dict[str, Template] = {}
        self.encoders: dict[tuple[str, str], FaceEncoder] = {}
        for name, fnet in fnets.items():
            net = fold_batch_norm(fnet, fnet.pretrained_cfg["input_size"])  # type: ignore[index, arg-type]
            if net is not fnet and device.type == "cpu":
                net = net.to(memory_format=torch.channels_last)
            crop: Any = net.crop
            self.crops[name] = get_template(crop or SR_CROP)
            encoder = FaceEncoder(net, crop=SR_CROP, interpolation=protocol.up_mode).to(device)
            self.encoders[name, "sr"] = encoder
            self.encoders[name, "hr"] = copy.copy(encoder)  # over the same network
            self.encoders[name, "hr"].crop = encoder.fnet_crop or encoder.crop

    def copies(self, count: int) -> list[Networks]:
        """As many sets over the same weights, or this one alone where a network cannot be copied.

        Each thread has its own, so that a network that keeps something between its layers is not
        disturbed by another thread.
        """
        nets = (*self.srnets.values(), *(encoder.fnet for encoder in self.encoders.values()))
        shared = {id(one): one for net in nets for one in (*net.parameters(), *net.buffers())}
        copies = [self]
        try:
            for _ in range(count - 1):
                twin = copy.copy(self)
                own = copy.deepcopy((self.encoders, self.srnets), dict(shared))
                twin.encoders, twin.srnets = own
                copies.append(twin)
        except Exception:  # weight norm, kept outputs, sessions of other runtimes
            return [self]
        return copies

    def embed_hr(self, fnet: str, canvas: Tensor, crop: str) -> Tensor:
        """Embed faces at full resolution, uint8 `[B, 3, H, W]` of a template; `[B, D]`."""
        views = both_views(cut(canvas, crop, self.crops[fnet]))
        return self._embed(fnet, "hr", to_float(views))

    def embed_sr(self, fnet: str, views: Tensor) -> Tensor:
        """Embed what `show` gave, `[2 B, 3, 112, 96]`; `[B, D]`, the views of a face fused."""
        return self._embed(fnet, "sr", views)

    def _embed(self, fnet: str, kind: str, views: Tensor) -> Tensor:
        straight, mirrored = self.encoders[fnet, kind](views).chunk(2)
        return fuse_views(straight, mirrored, self.protocol)

    def show(self, srnet: str, probes: Tensor) -> Tensor:
        """What FNets are shown of LR probes and of their mirror images, `[2 B, 3, 112, 96]`."""
        return show_probe(self.srnets[srnet], both_views(probes), self.protocol)


@contextmanager
def ready(
    fnets: Mapping[str, nn.Module],
    srnets: Mapping[str, nn.Module],
    protocol: Protocol,
    device: torch.device,
) -> Iterator[Networks]:
    """Networks on their device in eval mode, without gradients and TF32; afterwards as before.

    They stay on the device. TF32 keeps 10 bits: answers would depend on the device in the third
    digit.
    """
    fnets = {name: create_fnet(net) for name, net in fnets.items()}
    nets = (*fnets.values(), *srnets.values())
    modes = {module: module.training for net in nets for module in net.modules()}
    learning = [one for net in nets for one in net.parameters() if one.requires_grad]
    try:
        for net in nets:
            net.to(device).eval()
        # not inference mode: what a network keeps is to serve training again
        with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
            yield Networks(fnets, srnets, protocol, device)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter in learning:
            parameter.requires_grad = True


@dataclass(frozen=True)
class Embedded:
    """Embeddings of a grid, read from disk one cell at a time.

    Args:
        cache: Where they are.
        keys: Their keys there.
        wanted: Positions of the faces of each cell.
        digests: Digest of each face that could be read, by position.
        count: How many faces there are in all.
        faults: Faces that could not be read or aligned, by position.
    """

    cache: EmbeddingCache
    keys: Mapping[Cell, str]
    wanted: Mapping[Cell, Tensor]
    digests: Mapping[int, bytes]
    count: int
    faults: Mapping[int, Fault] = field(default_factory=dict)

    def rows(self, cell: Cell) -> Embeddings:
        """Embeddings `[N, D]` of one cell, a row for each face, zero for those not asked for."""
        wanted: list[bytes | None] = [None] * self.count
        for place in self.wanted[cell].tolist():
            wanted[place] = self.digests.get(place)
        return self.cache.load(self.keys[cell], wanted)

    def content(self, places: Tensor) -> str:
        """SHA-256 of some faces, those that could be read: their files and points."""
        known = (place for place in places.unique().tolist() if place in self.digests)
        return digest(*((place, self.digests[place]) for place in known))


def embed_grid(
    networks: Networks,
    faces: Faces,
    wanted: Mapping[Cell, Tensor],
    cache: EmbeddingCache,
    *,
    batch_size: int | None = None,
    skip_missing: bool = False,
    progress: bool = True,
) -> Embedded:
    """Embed the faces at some positions for each cell, as far as the cache lacks them.

    Raises `DataError` naming each photo that cannot be read or aligned, unless `skip_missing`, and
    `ValueError` where an FNet gives embeddings that are not finite.
    """
    keys = cell_keys(networks, wanted)
    everything = torch.cat([*wanted.values()]).unique()
    digests, faults = _digest_faces(faces, everything, progress=progress)
    skip_or_raise(faults.values(), skip_missing=skip_missing)
    missing: dict[Cell, Tensor] = {}
    for key in dict.fromkeys(keys.values()):
        cells = [cell for cell in wanted if keys[cell] == key]
        places = torch.cat([wanted[cell] for cell in cells]).unique().tolist()
        known = cache.known(key)
        new: dict[bytes, int] = {}  # each content once
        for place in places:
            if place in digests and digests[place] not in known:
                new.setdefault(digests[place], place)
        if new:
            missing[cells[0]] = torch.zeros(len(faces), dtype=torch.bool)
            missing[cells[0]][[*new.values()]] = True
    if missing:
        work = _Pass(networks, faces, digests, missing, keys, cache)
        unreadable = work.run(batch_size, stop_at_fault=not skip_missing, progress=progress)
        bad = {digests[place]: fault for place, fault in unreadable.items()}
        found = {place: bad[own] for place, own in digests.items() if own in bad}
        skip_or_raise(found.values(), skip_missing=skip_missing)
        faults |= found
    good = {place: own for place, own in digests.items() if place not in faults}
    return Embedded(cache, keys, wanted, good, len(faces), faults)


def cell_keys(networks: Networks, cells: Iterable[Cell]) -> dict[Cell, str]:
    """Digests of all that a cell's embeddings depend on beside the face.

    That is the networks, the protocol's treatment of pictures, the templates, the size, the
    software and the kind of device. Tasks share embeddings.
    """
    shared = (
        networks.protocol.treatment(),
        get_template(CANVAS),
        get_template(SR_CROP),
        networks.device.type,
        digest_software(),
    )
    identities: dict[tuple[str, Size | None], str] = {}

    def identity(name: str, net: nn.Module, size: Size | None = None) -> str:
        if (name, size) not in identities:
            found = digest_network(net, None if size is None else (3, *size))
            if found is None:
                warnings.warn(
                    f"embeddings made with {name!r} are not kept: it cannot be told from another "
                    "network, for it gives different answers to the same batch, or none",
                    stacklevel=2,
                )
            identities[name, size] = found or f"{ONCE}{uuid.uuid4().hex}"
        return identities[name, size]

    keys = {}
    for cell in cells:
        parts = [identity(cell.fnet, networks.fnets[cell.fnet])]
        if cell.srnet != HR:
            size = (cell.height, cell.width)
            parts += [identity(cell.srnet, networks.srnets[cell.srnet], size), repr(size)]
        once = ONCE if any(part.startswith(ONCE) for part in parts) else ""
        keys[cell] = once + digest(*shared, *parts)
    return keys


def _digest_faces(
    faces: Faces, places: Tensor, *, progress: bool
) -> tuple[dict[int, bytes], dict[int, Fault]]:
    """Digests of some faces by position, and what is wrong with those that cannot be read."""
    digests: dict[int, bytes] = {}
    faults: dict[int, Fault] = {}
    for place in tqdm(places.tolist(), desc="hashing", unit="face", delay=2, disable=not progress):
        try:
            digests[place] = faces.digest(place)
        except DataError as error:  # noqa: PERF203 -- each file may be missing
            faults[place] = error.faults[0]
    return digests, faults


@dataclass
class _Pass:
    """One pass over the faces for the embeddings that are missing.

    On a CPU every core takes a batch from the file to the embedding: convolutions of small faces
    share a core's caches better than they share cores. Threads read ahead for a GPU.
    """

    networks: Networks
    faces: Faces
    digests: Mapping[int, bytes]
    missing: Mapping[Cell, Tensor]  # whether each face is to be embedded, bool [N]
    keys: Mapping[Cell, str]
    cache: EmbeddingCache
    stopped: bool = False

    def run(
        self, batch_size: int | None, *, stop_at_fault: bool, progress: bool
    ) -> dict[int, Fault]:
        """Embed and store; gives the faces that could not be read, by position."""
        on_cpu = self.networks.device.type == "cpu"
        size = batch_size or (BATCH_ON_CORE if on_cpu else BATCH_ON_GPU)
        places = torch.stack([*self.missing.values()]).any(0).nonzero().flatten()
        cores = torch.get_num_threads()
        workers = cores if on_cpu else READERS
        copies = self.networks.copies(workers if on_cpu else 1)
        idle: SimpleQueue[Networks] = SimpleQueue()
        for networks in copies:
            idle.put(networks)

        def work(part: Tensor) -> tuple[int, dict[int, Fault]]:
            faults: dict[int, Fault] = {}
            crops = self.faces.crops_at(part, self.crop, faults=faults)
            # once stopped, faces are only read, to name all faults at once
            self.stopped |= stop_at_fault and bool(faults)
            good = torch.tensor([place not in faults for place in part.tolist()])
            if good.any() and not self.stopped:
                networks = idle.get()
                try:
                    with torch.no_grad():  # holds for one thread only
                        self._embed(networks, part[good], crops[good])
                finally:
                    idle.put(networks)
            return len(part), faults

        faults: dict[int, Fault] = {}
        bar = tqdm(total=len(places), desc="embedding", unit="face", delay=2, disable=not progress)
        threads = cores if on_cpu and len(copies) == 1 else 1
        pool = ThreadPoolExecutor(workers, "idloss", torch.set_num_threads, (threads,))
        try:
            with bar, pool:
                try:
                    for done, found in pool.map(work, places.split(size)):
                        faults |= found
                        bar.update(done)
                except BaseException:  # an error, or Ctrl-C: leave soon
                    self.stopped = True
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        finally:  # what was computed before an error or Ctrl-C is not computed again
            torch.set_num_threads(cores)
            self.cache.flush()
        return faults

    @property
    def crop(self) -> str:
        """What faces are brought to."""
        return self.faces.crop or CANVAS

    def _embed(self, networks: Networks, places: Tensor, crops: Tensor) -> None:
        canvas = crops.to(networks.device)
        hr = cut(canvas, self.crop, SR_CROP)
        # one SRNet's output is shown to all FNets that lack it
        groups: dict[tuple[str, Size], list[Cell]] = {}
        for cell, needed in self.missing.items():
            rows = needed[places]
            if cell.srnet != HR:
                groups.setdefault((cell.srnet, (cell.height, cell.width)), []).append(cell)
            elif rows.any() and not self.stopped:
                own = canvas[rows.to(canvas.device)]
                self._put(cell, places[rows], networks.embed_hr(cell.fnet, own, self.crop))
        for (srnet, size), cells in groups.items():
            rows = torch.stack([self.missing[cell][places] for cell in cells]).any(0)
            if rows.any() and not self.stopped:
                lr = prepare_probe(hr[rows.to(hr.device)], size, networks.protocol)
                shown = networks.show(srnet, lr)
                for cell in cells:
                    self._put(cell, places[rows], networks.embed_sr(cell.fnet, shown))

    def _put(self, cell: Cell, places: Tensor, embeddings: Tensor) -> None:
        rows = embeddings.float().cpu()
        finite = rows.isfinite().all(1)
        if not finite.all():
            name = self.faces.names[int(places[~finite][0])]
            raise ValueError(
                f"FNet {cell.fnet!r} gives an embedding that is not finite for {name} "
                f"({cell.srnet} at {cell.size}); look for weights that are not finite, or an SRNet "
                "that overflowed"
            )
        digests = [self.digests[place] for place in places.tolist()]
        self.cache.add(self.keys[cell], digests, rows.numpy())
