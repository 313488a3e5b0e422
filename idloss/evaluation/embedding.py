"""Pictures to embeddings, for a whole grid of FNets, SRNets and probe sizes.

Each photo is decoded and aligned once; each batch then goes through every size, SRNet and FNet
before the next, and embeddings go to disk as they come, so that memory does not grow with the
grid. What was computed before is taken from there.
"""

from __future__ import annotations

import copy
import functools
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor, nn

from idloss import __version__
from idloss.create import create_fnet
from idloss.data import DataError, Faces, Fault
from idloss.data.files import skip_or_raise
from idloss.degradation import get_degradation
from idloss.encoder import COVERAGE, FaceEncoder
from idloss.evaluation.cache import (
    ONCE,
    EmbeddingCache,
    Embeddings,
    as_tested,
    digest,
    digest_network,
)
from idloss.evaluation.protocols import Protocol
from idloss.evaluation.results import HR, LR, Cell
from idloss.frozen import fold_batch_norm
from idloss.geometry import Template, convert_crop, coverage, get_template
from idloss.registry import SRNET_CROP, srnet_crop
from idloss.resample import ImageWatch, Size, resize, to_float, to_uint8
from idloss.srnets import Interpolation

SR_CROP = get_template(SRNET_CROP)
"""The crop of SRNets that name no other, and of HR for FNets that take any: 112x96."""
CANVAS = get_template("arcface")
"""What photos are aligned to: 112x96 is cut out of it, other crops are aligned anew."""
# Faces at a time, for each core or for a GPU. Measured on MobileFaceNet, SFace and EDSR: a core
# gains nothing beyond some 16 images (8 faces and their mirror images).
BATCH_ON_CORE = 8
BATCH_ON_GPU = 32
READERS = 4
"""Threads that decode and align for a GPU."""
FLUSH_BYTES = 16 * 2**20
"""Embeddings held in memory before they go to disk."""
FLUSH_SECONDS = 60.0
"""How long they are held at most: a run that is killed loses no more work than that."""

Canvases = dict[Template, Tensor]
"""The same faces in several crops, uint8 `[B, 3, H, W]` each."""
_Rows = tuple[str, list[bytes], Embeddings]  # key, digests of N faces, `[N, D]`


def prepare_probe(
    crops: Tensor, size: Size, protocol: Protocol, faces: Sequence[bytes] | None = None
) -> Tensor:
    """Degrade HR crops to LR probes, uint8 `[B, 3, H, W]` to uint8 `[B, 3, *size]`.

    Chance, if a protocol leaves anything to it, goes by the faces' digests; None for their places.
    """
    seeds = (
        range(len(crops)) if faces is None else [int.from_bytes(one[:8], "big") for one in faces]
    )
    return to_uint8(get_degradation(protocol.degradation)(crops, size, seeds=seeds))


def show_probe(
    srnet: nn.Module, probes: Tensor, protocol: Protocol, watch: ImageWatch | None = None
) -> Tensor:
    """What FNets are shown of LR probes: uint8 `[B, 3, h, w]` to RGB [0, 1] of the SRNet's crop."""
    size = get_template(srnet_crop(srnet)).size
    if isinstance(srnet, Interpolation):  # the rows bilinear (the paper's "Bicubic") and bicubic
        return to_float(resize(probes, size, mode=srnet.mode, convention=protocol.convention))
    images = to_float(probes).to(next((p.dtype for p in srnet.parameters()), None))
    if not images.is_cuda:  # a tenth quicker for EDSR on a CPU; not so on a GPU without TF32
        images = images.contiguous(memory_format=torch.channels_last)
    sr = srnet(images)
    if not isinstance(sr, Tensor) or sr.ndim != 4 or sr.shape[:2] != images.shape[:2]:
        gave = list(sr.shape) if isinstance(sr, Tensor) else f"a {type(sr).__name__}"
        raise TypeError(
            f"{type(srnet).__name__} gave {gave} for {len(images)} images; wrap it so that forward "
            "gives images [B, 3, H, W] alone"
        )
    name = f"SR of {type(srnet).__name__}"
    if watch and "spans" in (seen := watch.complaint(sr, name) or ""):
        told = f"{seen.partition(' and value_range')[0]}, not [0, 1]: rescale it in forward"
        warnings.warn(told, stacklevel=2)
    return to_fnet_input(sr.float(), size, protocol)


def to_fnet_input(sr: Tensor, size: Sequence[int], protocol: Protocol) -> Tensor:
    """Bring SR `[B, 3, h, w]`, clamped to [0, 1], to the FNet's crop size as the protocol does."""
    if protocol.keep_exact_size and tuple(sr.shape[-2:]) == tuple(size):
        return sr
    levels = to_uint8(sr, rounding=protocol.rounding)
    return to_float(resize(levels, size, mode=protocol.up_mode, convention=protocol.convention))


def fuse_views(embeddings: Tensor, protocol: Protocol) -> Tensor:
    """One embedding, `[B, 2 D]` or `[B, D]`, of crops and then their mirror images, `[2 B, D]`."""
    straight, mirrored = embeddings.chunk(2)
    joined = torch.cat((straight, mirrored), dim=1)
    return joined if protocol.flip == "concat" else straight + mirrored


def fit_size(size: Size, crop: Template) -> Size:
    """A probe size for a crop: of one of the shape of 112x96 only the rows are taken.

    So 7x6, 14x12 and 28x24 are 7x7, 14x14 and 28x28 for an SRNet of 112x112 crops; other sizes are
    what they say.
    """
    (rows, columns), (height, width) = SR_CROP.size, crop.size
    squashed = abs(size[1] - size[0] * columns / rows) >= 0.75  # 16x16; 18x16 is rounded
    if squashed or (height, width) == (rows, columns):
        return size
    return size[0], max(1, round(size[0] * width / height))


def cut(canvas: Tensor, own: Template, wanted: Template) -> Tensor:
    """One crop out of a wider one, uint8; no resampling between sphereface and arcface."""
    return canvas if own == wanted else to_uint8(convert_crop(to_float(canvas), own, wanted))


def read_canvases(
    faces: Faces, places: Tensor, wanted: Iterable[Template], faults: dict[int, Fault]
) -> Canvases:
    """Some faces in what all crops wanted are cut out of.

    A photo may hold what the canvas does not: for other crops no border is made up.
    """
    anew = [] if faces.crop else [crop for crop in wanted if crop != SR_CROP]
    own = get_template(faces.crop or CANVAS)
    return {c: faces.crops_at(places, c, faults=faults) for c in dict.fromkeys((own, *anew))}


def cut_out(canvases: Canvases, wanted: Template) -> Tensor:
    """A crop of faces, uint8 `[B, 3, H, W]`."""
    own = wanted if wanted in canvases else next(iter(canvases))
    return cut(canvases[own], own, wanted)


@dataclass
class Networks:
    """FNets and SRNets by name, ready for many faces on one device; made by `ready`."""

    fnets: dict[str, nn.Module]
    srnets: dict[str, nn.Module]
    protocol: Protocol
    device: torch.device
    crops: dict[str, Template] = field(init=False)  # of the SRNets
    encoders: dict[tuple[str, str | Template], FaceEncoder] = field(default_factory=dict)
    watch: ImageWatch = field(default_factory=ImageWatch)

    def __post_init__(self) -> None:
        self.crops = {name: get_template(srnet_crop(net)) for name, net in self.srnets.items()}
        for name, fnet in self.fnets.items():
            net = fold_batch_norm(fnet, fnet.pretrained_cfg["input_size"])  # type: ignore[index, arg-type]
            if net is not fnet and self.device.type == "cpu":
                net = net.to(memory_format=torch.channels_last)
            encoder = FaceEncoder(net, interpolation=self.protocol.up_mode)
            encoder.to(self.device)
            # SR comes as its SRNet's crop, HR as the FNet's own; all go to the same network
            shown: dict[str | Template, Template] = {crop: crop for crop in self.crops.values()}
            shown[HR] = encoder.fnet_crop or SR_CROP
            for key, crop in shown.items():
                self.encoders[name, key] = copy.copy(encoder)
                self.encoders[name, key].crop = crop

    def warn_of_borders(self, faces_crop: str | Template | None) -> None:
        """Warn of crops (None: photos) that do not hold what an FNet or an SRNet wants to see."""
        own = None if faces_crop is None else get_template(faces_crop)
        doubts: list[str] = []
        for (name, shown), encoder in self.encoders.items():
            # what aligned faces lack, they lack first
            source = own if shown == HR or encoder.border_complaint(own) else encoder.crop
            doubts += [f"{name}: {doubt}" for doubt in [encoder.border_complaint(source)] if doubt]
        for name, crop in self.crops.items():
            if own is not None and (share := coverage(own, crop)) < COVERAGE:
                made = f"{name} makes {crop.name!r} crops, of which crop={own.name} holds"
                doubts.append(f"{made} {share:.0%}: the rest is its border, repeated")
        for doubt in dict.fromkeys(doubts):
            warnings.warn(doubt, UserWarning, stacklevel=3)

    def copies(self, count: int) -> list[Networks]:
        """A set for each thread over the same weights; one alone where a network has no copy."""
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

    def crop_of(self, fnet: str, srnet: str) -> Template:
        """What faces are cut to at full resolution, for an SRNet, or with `HR` for the FNet."""
        return self.encoders[fnet, HR].crop or SR_CROP if srnet == HR else self.crops[srnet]

    def embed_hr(self, fnet: str, canvas: Tensor, crop: Template) -> Tensor:
        """Embed faces at full resolution, uint8 `[B, 3, H, W]` of a template; `[B, D]`."""
        straight = to_float(cut(canvas, crop, self.crop_of(fnet, HR)))
        views = torch.cat((straight, straight.flip(-1)))
        return fuse_views(self.encoders[fnet, HR](views), self.protocol)

    def embed_sr(self, fnet: str, srnet: str, views: Tensor) -> Tensor:
        """Embed what `show` gave, `[2 B, 3, H, W]`; `[B, D]`, the views of a face fused."""
        return fuse_views(self.encoders[fnet, self.crops[srnet]](views), self.protocol)

    def show(self, srnet: str, probes: Tensor) -> Tensor:
        """What FNets are shown of LR probes and of their mirror images, `[2 B, 3, H, W]`."""
        # the paper's flipped view is the mirrored LR image, super-resolved on its own
        views = torch.cat((probes, probes.flip(-1)))
        return show_probe(self.srnets[srnet], views, self.protocol, self.watch)

    def restore(
        self, fnet: str, probes: Canvases, reference: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """LR and what each SRNet makes of it, `[B, 3, H, W]`; their cosines to embeddings, `[B]`.

        Probes are given for each crop that an SRNet takes.
        """
        columns: dict[str, Tensor] = {}
        cosines: dict[str, Tensor] = {}
        for method, crop in self.crops.items():
            lr = probes[crop]
            shown = self.show(method, lr)
            columns |= {LR: columns.get(LR, lr), method: shown[: len(lr)]}
            found = self.embed_sr(fnet, method, shown)
            cosines[method] = F.cosine_similarity(found, reference).cpu()
        return columns, cosines


@contextmanager
def ready(
    fnets: Mapping[str, nn.Module],
    srnets: Mapping[str, nn.Module],
    protocol: Protocol,
    device: torch.device,
) -> Iterator[Networks]:
    """Networks on their device, where they stay, otherwise afterwards as before."""
    fnets = {name: create_fnet(net) for name, net in fnets.items()}
    nets = [net.to(device) for net in (*fnets.values(), *srnets.values())]
    learning = [one for net in nets for one in net.parameters() if one.requires_grad]
    try:
        with as_tested(*nets):
            yield Networks(fnets, dict(srnets), protocol, device)
    finally:
        for parameter in learning:
            parameter.requires_grad = True


def cell_keys(networks: Networks, cells: Iterable[Cell]) -> dict[Cell, str]:
    """Digests of all that a cell's embeddings depend on beside the face, task and judging aside."""
    shared = (
        networks.protocol.treatment(),
        *(CANVAS, SR_CROP),
        networks.device.type,
        # what may change a pixel or the last digits
        (__version__, *(metadata.version(name) for name in ("torch", "pillow", "numpy"))),
    )

    @functools.cache
    def identity(name: str, size: Size | None = None) -> str:
        net = networks.fnets[name] if size is None else networks.srnets[name]
        found = digest_network(net, None if size is None else (3, *size))
        if found is None:
            warnings.warn(
                f"embeddings made with {name!r} are not kept: it cannot be told from another "
                "network by its answer to a batch of noise",
                stacklevel=2,
            )
        return found or f"{ONCE}{uuid.uuid4().hex}"

    @functools.cache
    def made_small(size: Size) -> str:
        noise = torch.randint(
            256, (8, 3, *SR_CROP.size), generator=torch.Generator().manual_seed(0)
        )
        return digest(prepare_probe(noise.byte(), size, networks.protocol).numpy().tobytes())

    keys = {}
    for cell in cells:
        parts = [identity(cell.fnet)]
        if cell.srnet != HR:
            crop = repr(networks.crops[cell.srnet])
            size = cell.height, cell.width
            parts += [identity(cell.srnet, size), made_small(size), cell.size, crop]
        once = ONCE if any(part.startswith(ONCE) for part in parts) else ""
        keys[cell] = once + digest(*shared, *parts)
    return keys


@dataclass
class EmbeddedGrid:
    """Embeddings of the faces wanted for each cell, kept in the cache, read one cell at a time."""

    networks: Networks
    faces: Faces
    wanted: Mapping[Cell, Tensor]  # positions, int64
    cache: EmbeddingCache
    batch_size: int | None = None
    skip_missing: bool = False
    progress: bool = True
    faults: dict[int, Fault] = field(default_factory=dict)  # faces that cannot be read, by position
    _digests: dict[int, bytes] = field(default_factory=dict)  # of the others
    _keys: dict[Cell, str] = field(default_factory=dict)
    _missing: dict[Cell, Tensor] = field(default_factory=dict)  # faces to be embedded, bool [N]
    _held: dict[str, list[tuple[list[bytes], Embeddings]]] = field(default_factory=dict)
    _flushed: float = field(default_factory=time.monotonic)
    _stopped: bool = False

    def rows(self, cell: Cell) -> Embeddings:
        """Embeddings `[N, D]` of one cell, a row for each face, zero for those not asked for."""
        wanted: list[bytes | None] = [None] * len(self.faces)
        for place in self.wanted[cell].tolist():
            wanted[place] = self._digests.get(place)
        return self.cache.load(self._keys[cell], wanted)

    def content(self, places: Tensor) -> str:
        """SHA-256 of some faces, those that could be read: their files and points."""
        known = (place for place in places.unique().tolist() if place in self._digests)
        return digest(*((place, self._digests[place]) for place in known))

    def fill(self) -> None:
        """Embed what the cache lacks; `DataError` names what cannot be read or aligned."""
        self._keys = cell_keys(self.networks, self.wanted)
        everything = torch.cat([*self.wanted.values()]).unique().tolist()
        for place in self._bar(everything, desc="hashing"):
            try:
                self._digests[place] = self.faces.digest(place)
            except DataError as error:  # noqa: PERF203 -- each file may be missing
                self.faults[place] = error.faults[0]
        skip_or_raise(self.faults.values(), skip_missing=self.skip_missing)
        cells_of: dict[str, list[Cell]] = {}
        for cell, key in self._keys.items():
            cells_of.setdefault(key, []).append(cell)
        for key, cells in cells_of.items():
            places = torch.cat([self.wanted[cell] for cell in cells]).unique().tolist()
            able = [place for place in reversed(places) if place in self._digests]
            new = {self._digests[place]: place for place in able}  # each content once
            for known in self.cache.known(key):
                new.pop(known, None)
            if new:
                self._missing[cells[0]] = torch.zeros(len(self.faces), dtype=torch.bool)
                self._missing[cells[0]][[*new.values()]] = True
        if self._missing:
            bad = {self._digests[place]: fault for place, fault in self._embed_missing().items()}
            found = {place: bad[own] for place, own in self._digests.items() if own in bad}
            skip_or_raise(found.values(), skip_missing=self.skip_missing)
            self.faults |= found
            for place in found:
                del self._digests[place]

    def _bar(self, items: Iterable[Any] | None, **about: Any) -> Any:
        return tqdm(items, unit="face", delay=2, disable=not self.progress, **about)

    def _embed_missing(self) -> dict[int, Fault]:
        """Embed and store; gives the faces that could not be read, by position.

        On a CPU every core takes a batch from the file to the embedding: convolutions of small
        faces share a core's caches better than they share cores. Threads read ahead for a GPU.
        """
        on_cpu = self.networks.device.type == "cpu"
        size = self.batch_size or (BATCH_ON_CORE if on_cpu else BATCH_ON_GPU)
        places = torch.stack([*self._missing.values()]).any(0).nonzero().flatten()
        cores = torch.get_num_threads()
        workers = cores if on_cpu else READERS
        copies = self.networks.copies(workers if on_cpu else 1)
        idle: SimpleQueue[Networks] = SimpleQueue()
        for networks in copies:
            idle.put(networks)

        wanted = [self.networks.crop_of(cell.fnet, cell.srnet) for cell in self._missing]

        def work(part: Tensor) -> tuple[int, dict[int, Fault], list[_Rows]]:
            faults: dict[int, Fault] = {}
            read = read_canvases(self.faces, part, wanted, faults)
            for place in part.tolist():  # hashed before: what is kept must be of that content
                if place not in faults and self.faces.digest(place) != self._digests[place]:
                    faults[place] = Fault(self.faces.names[place], "changed while it was read")
            # once stopped, faces are only read, to name all faults at once
            self._stopped |= bool(faults) and not self.skip_missing
            good = torch.tensor([place not in faults for place in part.tolist()])
            made: list[_Rows] = []
            if good.any() and not self._stopped:
                networks = idle.get()
                try:
                    kept = {crop: one[good].to(networks.device) for crop, one in read.items()}
                    with torch.no_grad():  # holds for one thread only
                        made += self._embed(networks, part[good], kept)
                finally:
                    idle.put(networks)
            return len(part), faults, made

        faults: dict[int, Fault] = {}
        threads = cores if on_cpu and len(copies) == 1 else 1
        pool = ThreadPoolExecutor(workers, "idloss", torch.set_num_threads, (threads,))
        try:
            with self._bar(None, total=len(places), desc="embedding") as bar:
                for done, found, made in pool.map(work, places.split(size)):
                    faults |= found
                    self._keep(made)
                    bar.update(done)
        finally:  # leave soon; what was computed before an error or Ctrl-C is not computed again
            self._stopped = True
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)
            self._flush()
        return faults

    def _embed(self, networks: Networks, places: Tensor, canvases: Canvases) -> Iterator[_Rows]:
        device = networks.device
        # one SRNet's output is shown to all FNets that lack it
        groups: dict[tuple[str, Size], list[Cell]] = {}
        for cell, needed in self._missing.items():
            rows = needed[places]
            if cell.srnet != HR:
                groups.setdefault((cell.srnet, (cell.height, cell.width)), []).append(cell)
            elif rows.any() and not self._stopped:
                own = networks.crop_of(cell.fnet, HR)
                faces = cut_out(canvases, own)[rows.to(device)]
                yield self._rows(cell, places[rows], networks.embed_hr(cell.fnet, faces, own))
        used = {networks.crops[srnet] for srnet, _ in groups}
        hr = {crop: cut_out(canvases, crop) for crop in used}
        for (srnet, size), cells in groups.items():
            rows = torch.stack([self._missing[cell][places] for cell in cells]).any(0)
            if rows.any() and not self._stopped:
                own_hr = hr[networks.crops[srnet]][rows.to(device)]
                digests = [self._digests[place] for place in places[rows].tolist()]
                lr = prepare_probe(own_hr, size, networks.protocol, digests)
                shown = networks.show(srnet, lr)
                for cell in cells:
                    yield self._rows(cell, places[rows], networks.embed_sr(cell.fnet, srnet, shown))

    def _rows(self, cell: Cell, places: Tensor, embeddings: Tensor) -> _Rows:
        rows = embeddings.float().cpu()
        finite = rows.isfinite().all(1)
        if not finite.all():
            name = self.faces.names[int(places[~finite][0])]
            raise ValueError(
                f"FNet {cell.fnet!r} gives an embedding that is not finite for {name} "
                f"({cell.srnet} at {cell.size}); look for weights that are not finite, or an SRNet "
                "that overflowed"
            )
        return self._keys[cell], [self._digests[place] for place in places.tolist()], rows.numpy()

    def _keep(self, made: Iterable[_Rows]) -> None:
        """Hold embeddings in memory until there are enough for a file."""
        for key, faces, rows in made:
            self._held.setdefault(key, []).append((faces, rows))
        held = sum(rows.nbytes for parts in self._held.values() for _, rows in parts)
        if held >= FLUSH_BYTES or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        for key, parts in self._held.items():
            faces = [face for part, _ in parts for face in part]
            self.cache.add(key, faces, np.concatenate([rows for _, rows in parts]))
        self._held.clear()
        self._flushed = time.monotonic()
