"""Embeddings for a whole grid of FNets, SRNets and probe sizes, in one pass over the faces.

Each photo is decoded and aligned once; each batch then goes through every size, SRNet and FNet
before the next, and embeddings go to disk as they come, so that memory does not grow with the
grid. What was computed before is taken from there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from idloss.data import FaceSource, Fault
from idloss.data.faults import settle
from idloss.evaluation.passes import Pass
from idloss.evaluation.protocols import Protocol
from idloss.evaluation.reading import digest_faces
from idloss.evaluation.recogniser import SR_CROP
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
from idloss.resample import Size

CANVAS = "arcface"
"""What photos are aligned to: the widest crop there is a use for. The SR crop is cut out of it."""


class Need(NamedTuple):
    """What a task asks for.

    Attributes:
        sizes: Sizes of its probes, rows and columns.
        enrolled: Positions of faces needed at full resolution beside the probes, int64.
        probes: Positions of the faces to degrade, int64.
    """

    sizes: Sequence[Size]
    enrolled: Tensor
    probes: Tensor

    def faces(self, variant: Variant) -> Tensor:
        """Positions of the faces that are needed in a variant."""
        if variant.srnet == HR:
            return torch.cat((self.enrolled, self.probes))
        return self.probes if variant.size in self.sizes else self.probes[:0]


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
        wanted: Whether each face was asked for, bool `[N]`, by variant.
        digests: Digest of each face that was asked for and could be read, by position.
        faults: Faces that could not be read or aligned, by position.
        batch_size: Faces at a time; None where nothing had to be computed.
    """

    store: EmbeddingStore
    keys: Mapping[Variant, str]
    wanted: Mapping[Variant, Tensor]
    digests: Mapping[int, bytes]
    faults: Mapping[int, Fault] = field(default_factory=dict)
    batch_size: int | None = None

    def rows(self, variant: Variant) -> Embeddings:
        """Embeddings of one variant, both views of a face fused.

        Args:
            variant: Which.

        Returns:
            `[N, D]`, a row for each face of the source, zero for those not asked for.
        """
        wanted = [
            self.digests.get(place) if is_wanted else None
            for place, is_wanted in enumerate(self.wanted[variant].tolist())
        ]
        return self.store.load(self.keys[variant], wanted)

    def content(self, need: Need) -> str:
        """SHA-256 of the faces of a task that could be read: their files and points."""
        places = torch.cat((need.enrolled, need.probes)).unique().tolist()
        return digest(*((place, self.digests[place]) for place in places if place in self.digests))


def embed_grid(
    bench: Bench,
    faces: FaceSource,
    needs: Sequence[Need],
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
        needs: What of it each task asks for.
        store: Where embeddings are looked for and kept.
        skip_missing: Leave out photos that cannot be read or aligned.
        progress: Show a progress bar when it takes more than two seconds.

    Returns:
        The embeddings.

    Raises:
        DataError: Photos cannot be read or aligned; names each.
        ValueError: An FNet gives embeddings that are not finite.
    """
    keys = variant_keys(bench)
    wanted = {
        variant: _mask(torch.cat([need.faces(variant) for need in needs]), len(faces))
        for variant in keys
    }
    everything = torch.stack([*wanted.values()]).any(0).nonzero().flatten()
    digests, faults = digest_faces(faces, everything, progress=progress)
    settle(faults.values(), skip_missing=skip_missing)
    missing = {}
    for variant, key in keys.items():
        places = (p for p in wanted[variant].nonzero().flatten().tolist() if p in digests)
        new = _first_of_each(digests, places, store.known(key))
        if new:
            missing[variant] = _mask(torch.tensor(new), len(faces))
    batch_size = None
    if missing:
        batch_size = bench.batch_size or batch_size_for(
            bench.fnets, bench.srnets, bench.sizes, bench.device
        )
        work = Pass(
            bench, batch_size, faces, digests, missing, store, keys, faces.template or CANVAS
        )
        unreadable = work.run(stop_at_fault=not skip_missing, progress=progress)
        bad = {digests[place]: fault for place, fault in unreadable.items()}
        found = {place: bad[own] for place, own in digests.items() if own in bad}
        settle(found.values(), skip_missing=skip_missing)
        faults |= found
    good = {place: own for place, own in digests.items() if place not in faults}
    return Embedded(store, keys, wanted, good, faults, batch_size)


def _mask(places: Tensor, count: int) -> Tensor:
    """Positions as a bool mask `[count]`."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[places] = True
    return mask


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
