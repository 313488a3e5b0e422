"""Embeddings for a whole grid of FNets, SRNets and probe sizes, in one pass over the faces.

Each photo is decoded and aligned once; each batch then goes through every size, SRNet and FNet
before the next, and embeddings go to disk as they come, so that memory does not grow with the
grid. What was computed before is taken from there.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor, nn

from idloss.data import FaceSource, Fault
from idloss.data.faults import settle
from idloss.evaluation.protocols import Protocol, prepare_probe
from idloss.evaluation.reading import Batch, digest_faces, read_batch
from idloss.evaluation.recogniser import (
    SR_CROP,
    Recogniser,
    both_views,
    cut,
    evaluating,
    super_resolve,
)
from idloss.evaluation.results import HR
from idloss.evaluation.sizing import batch_size_for
from idloss.evaluation.store import (
    Embeddings,
    EmbeddingStore,
    digest,
    digest_network,
    digest_software,
)
from idloss.geometry import get_template

Size = tuple[int, int]

CANVAS = "arcface"
"""What photos are aligned to: the widest crop there is a use for. The SR crop is cut out of it."""
READERS = 4
"""Threads that decode and align for a GPU."""
FLUSH_BYTES = 16 * 2**20
"""Embeddings held in memory before they go to disk."""


class Variant(NamedTuple):
    """What a face went through before the FNet saw it: an SRNet and a size; `HR` for nothing."""

    fnet: str
    srnet: str
    size: Size


@dataclass(frozen=True)
class Bench:
    """A grid to embed faces for.

    Attributes:
        fnets: Face recognisers by name.
        srnets: SR networks by name; `Interpolation` modules are the rows without one.
        sizes: Probe sizes, rows and columns.
        protocol: How probes are degraded and shown to the FNets.
        batch_size: Faces at a time; None sizes it to the machine.
        device: Where the networks run.
    """

    fnets: Mapping[str, nn.Module]
    srnets: Mapping[str, nn.Module]
    sizes: Sequence[Size]
    protocol: Protocol
    batch_size: int | None = None
    device: str = "cpu"

    def variants(self) -> list[Variant]:
        """All rows of the grid, HR first."""
        full = get_template(SR_CROP).size
        grid = [Variant(fnet, HR, full) for fnet in self.fnets]
        grid += [
            Variant(fnet, srnet, size)
            for fnet in self.fnets
            for srnet in self.srnets
            for size in dict.fromkeys(self.sizes)
        ]
        return grid


@dataclass(frozen=True)
class Embedded:
    """Embeddings of a grid, read from disk one variant at a time.

    Attributes:
        store: Where they are.
        keys: Their keys there.
        digests: Digest of each face that was asked for and could be read, by position.
        probes: Whether each face is a probe, bool `[N]`.
        faults: Faces that could not be read or aligned, by position.
        batch_size: Faces at a time; None where nothing had to be computed.
    """

    store: EmbeddingStore
    keys: Mapping[Variant, str]
    digests: Mapping[int, bytes]
    probes: Tensor
    faults: Mapping[int, Fault] = field(default_factory=dict)
    batch_size: int | None = None

    def rows(self, variant: Variant) -> Embeddings:
        """Embeddings of one variant, both views of a face fused.

        Args:
            variant: Which.

        Returns:
            `[N, D]`, a row for each face of the source, zero for those not asked for.
        """
        every = variant.srnet == HR
        wanted = [
            self.digests.get(place) if every or is_probe else None
            for place, is_probe in enumerate(self.probes.tolist())
        ]
        return self.store.load(self.keys[variant], wanted)

    def content(self) -> str:
        """SHA-256 of all the faces: their files and points."""
        return digest(*sorted(self.digests.items()))


def embed_grid(
    bench: Bench,
    faces: FaceSource,
    enrolled: Tensor,
    probes: Tensor,
    store: EmbeddingStore,
    *,
    skip_missing: bool = False,
    progress: bool = True,
) -> Embedded:
    """Embed faces at full resolution and probes through the whole grid.

    Args:
        bench: The grid.
        faces: Photos with landmarks, or aligned crops (of any size: they are brought to their
            template's).
        enrolled: Positions of faces needed at full resolution beside the probes, int64.
        probes: Positions of the faces to degrade, int64.
        store: Where embeddings are looked for and kept.
        skip_missing: Leave out photos that cannot be read or aligned.
        progress: Show a progress bar when it takes more than two seconds.

    Returns:
        The embeddings.

    Raises:
        DataError: Photos cannot be read or aligned; names each.
        ValueError: An FNet gives embeddings that are not finite.
    """
    is_probe = torch.zeros(len(faces), dtype=torch.bool)
    is_probe[probes] = True
    digests, faults = digest_faces(faces, torch.cat((enrolled, probes)).unique())
    settle(faults.values(), skip_missing=skip_missing)
    keys = variant_keys(bench)
    missing = {}
    for variant, key in keys.items():
        places = (p for p in digests if variant.srnet == HR or is_probe[p])
        need = _first_of_each(digests, places, store.known(key))
        if need:
            missing[variant] = torch.zeros(len(faces), dtype=torch.bool)
            missing[variant][need] = True
    batch_size = None
    if missing:
        batch_size = bench.batch_size or batch_size_for(
            bench.fnets, bench.srnets, bench.sizes, bench.device
        )
        work = _Pass(bench, batch_size, faces, digests, missing, store, keys)
        unreadable = work.run(stop_at_fault=not skip_missing, progress=progress)
        bad = {digests[place]: fault for place, fault in unreadable.items()}
        found = {place: bad[own] for place, own in digests.items() if own in bad}
        settle(found.values(), skip_missing=skip_missing)
        faults |= found
    good = {place: own for place, own in digests.items() if place not in faults}
    return Embedded(store, keys, good, is_probe, faults, batch_size)


class _Networks:
    """The networks of a grid for one thread.

    The modules are the thread's own, so that one that keeps something between its layers is not
    disturbed; the weights are shared.
    """

    def __init__(
        self, recognisers: Mapping[str, Recogniser], srnets: Mapping[str, nn.Module]
    ) -> None:
        tensors = {
            id(tensor): tensor
            for net in (*srnets.values(), *(r.of_hr.fnet for r in recognisers.values()))
            for tensor in (*net.parameters(), *net.buffers())
        }
        self.recognisers, self.srnets = copy.deepcopy((recognisers, srnets), tensors)


class _Pass:
    """One pass over the faces for the embeddings that are missing.

    On a CPU every core takes a batch from the file to the embedding: convolutions of small faces
    share a core's caches better than they share cores. A GPU is fed by threads that read ahead.
    """

    def __init__(
        self,
        bench: Bench,
        batch_size: int,
        faces: FaceSource,
        digests: Mapping[int, bytes],
        missing: Mapping[Variant, Tensor],
        store: EmbeddingStore,
        keys: Mapping[Variant, str],
    ) -> None:
        self.bench = bench
        self.faces = faces
        self.digests = digests
        self.missing = missing
        self.store = store
        self.keys = keys
        self.template = faces.template or CANVAS
        self.on_cpu = torch.device(bench.device).type == "cpu"
        self.threads = torch.get_num_threads() if self.on_cpu else READERS
        self.at_once = max(1, batch_size // (self.threads if self.on_cpu else 1))
        # one SRNet's output is shown to all FNets that lack it
        self.groups: dict[tuple[str, Size], list[Variant]] = {}
        for variant in missing:
            if variant.srnet != HR:
                self.groups.setdefault((variant.srnet, variant.size), []).append(variant)
        self.recognisers = {
            name: Recogniser(bench.fnets[name], bench.protocol, bench.device)
            for name in dict.fromkeys(variant.fnet for variant in missing)
        }
        self.srnets = {name: bench.srnets[name] for name, _ in self.groups}
        self.own = threading.local()
        self.lock = threading.Lock()
        self.waiting: dict[Variant, list[tuple[list[bytes], Embeddings]]] = {}
        self.waiting_bytes = 0
        self.stopped = False

    def run(self, *, stop_at_fault: bool, progress: bool) -> dict[int, Fault]:
        """Embed and store; gives the faces that could not be read, by position."""
        wanted = torch.stack(list(self.missing.values())).any(0)
        faults: dict[int, Fault] = {}
        bar = tqdm(total=int(wanted.sum()), unit="face", delay=2, disable=not progress)
        bar.set_description("embedding")
        with bar, evaluating(self.srnets.values(), self.bench.device):
            for batch in self._batches(wanted.nonzero().flatten().split(self.at_once)):
                faults |= batch.faults
                # what is left is then only read, to name all faults at once
                self.stopped = bool(faults) and stop_at_fault
                if not self.on_cpu:
                    self._embed(batch)
                bar.update(len(batch.places) + len(batch.faults))
            self._flush()
        return faults

    def _batches(self, parts: Sequence[Tensor]) -> Iterator[Batch]:
        """Read batches, and on a CPU embed them, in threads that run a little ahead."""
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(self.threads, "idloss", self._begin_thread) as pool:
                ahead: deque[Future[Batch]] = deque()
                for part in parts:
                    ahead.append(pool.submit(self._work, part.tolist()))
                    if len(ahead) > self.threads + 1:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
        finally:
            torch.set_num_threads(threads)

    def _begin_thread(self) -> None:
        torch.set_num_threads(1)  # of this thread, and the default of later ones
        if self.on_cpu:
            self.own.networks = _Networks(self.recognisers, self.srnets)

    def _work(self, places: list[int]) -> Batch:
        batch = read_batch(self.faces, places, self.template)
        if self.on_cpu:
            with torch.inference_mode():  # holds for one thread only
                self._embed(batch)
        return batch

    def _embed(self, batch: Batch) -> None:
        if self.stopped or not batch.places.numel():
            return
        places, canvas = batch.places, batch.crops.to(self.bench.device)
        networks = self.own.networks if self.on_cpu else self
        for variant, need in self.missing.items():
            if variant.srnet == HR and (rows := need[places]).any():
                crops = canvas[rows.to(canvas.device)]
                fused = networks.recognisers[variant.fnet].full(crops, self.template)
                self._put(variant, places[rows], fused)
        if not self.groups:
            return
        crops = cut(canvas, self.template, SR_CROP)
        for (srnet, size), variants in self.groups.items():
            rows = torch.stack([self.missing[variant][places] for variant in variants]).any(0)
            if not rows.any():
                continue
            lr = prepare_probe(crops[rows.to(crops.device)], size, self.bench.protocol)
            shown = super_resolve(networks.srnets[srnet], both_views(lr), self.bench.protocol)
            for variant in variants:
                fused = networks.recognisers[variant.fnet].restored(shown)
                self._put(variant, places[rows], fused)

    def _put(self, variant: Variant, places: Tensor, embeddings: Tensor) -> None:
        rows = embeddings.float().cpu()
        finite = rows.isfinite().all(1)
        if not finite.all():
            name = self.faces.names[int(places[~finite][0])]
            raise ValueError(
                f"FNet {variant.fnet!r} gives an embedding that is not finite for {name} "
                f"({variant.srnet} at {variant.size[0]}x{variant.size[1]}); look for weights that "
                "are not finite, or an SRNet that overflowed"
            )
        digests = [self.digests[place] for place in places.tolist()]
        with self.lock:
            self.waiting.setdefault(variant, []).append((digests, rows.numpy()))
            self.waiting_bytes += rows.nbytes
            if self.waiting_bytes >= FLUSH_BYTES:
                self._flush()

    def _flush(self) -> None:
        for variant, parts in self.waiting.items():
            digests = [one for part, _ in parts for one in part]
            self.store.add(self.keys[variant], digests, np.concatenate([rows for _, rows in parts]))
        self.waiting.clear()
        self.waiting_bytes = 0


def _first_of_each(
    digests: Mapping[int, bytes], places: Iterable[int], known: Collection[bytes]
) -> list[int]:
    """Positions of the faces to embed: not known, and each content once."""
    chosen: dict[bytes, int] = {}
    for place in places:
        if digests[place] not in known:
            chosen.setdefault(digests[place], place)
    return list(chosen.values())


def variant_keys(bench: Bench) -> dict[Variant, str]:
    """Digests of all that the embeddings of each variant depend on beside the face.

    Args:
        bench: The grid.

    Returns:
        Key by variant: of the networks, the protocol's treatment of pictures, the size, the
        software and the kind of device.
    """
    networks = {
        name: digest_network(net) for name, net in (*bench.fnets.items(), *bench.srnets.items())
    }
    # how pairs are judged is no part of it: protocols that only differ in that share embeddings
    shown = bench.protocol.describe()
    for other in ("name", "rule", "source"):
        del shown[other]
    shared = (
        sorted(shown.items()),
        CANVAS,
        SR_CROP,
        torch.device(bench.device).type,
        digest_software(),
    )
    return {
        variant: digest(
            *shared,
            networks[variant.fnet],
            (networks[variant.srnet], variant.size) if variant.srnet != HR else HR,
        )
        for variant in bench.variants()
    }
