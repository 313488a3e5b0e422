"""One pass over the faces: read, degrade, restore, recognise, store."""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor, nn

from idloss.data import FaceSource, Fault
from idloss.evaluation.protocols import prepare_probe
from idloss.evaluation.reading import Batch, read_batch
from idloss.evaluation.recogniser import (
    SR_CROP,
    Recogniser,
    both_views,
    cut,
    evaluating,
    super_resolve,
)
from idloss.evaluation.results import HR
from idloss.evaluation.store import Embeddings, EmbeddingStore
from idloss.resample import Size

if TYPE_CHECKING:
    from idloss.evaluation.embedding import Bench, Variant

READERS = 4
"""Threads that decode and align for a GPU."""
FLUSH_BYTES = 16 * 2**20
"""Embeddings held in memory before they go to disk."""
FLUSH_SECONDS = 60.0
"""How long they are held at most: a run that is killed loses no more work than that."""


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


class Pass:
    """One pass over the faces for the embeddings that are missing.

    On a CPU every core takes a batch from the file to the embedding: convolutions of small faces
    share a core's caches better than they share cores. A GPU is fed by threads that read ahead.

    Args:
        bench: The grid.
        batch_size: Faces at a time.
        faces: The faces.
        digests: Digest of each face, by position.
        missing: Whether each face is to be embedded, bool `[N]`, by variant.
        store: Takes the embeddings.
        keys: Keys of the variants there.
        template: What faces are aligned to.
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
        template: str,
    ) -> None:
        self.bench = bench
        self.faces = faces
        self.digests = digests
        self.missing = missing
        self.store = store
        self.keys = keys
        self.template = template
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
        self.flushed = time.monotonic()
        self.stopped = False

    def run(self, *, stop_at_fault: bool, progress: bool) -> dict[int, Fault]:
        """Embed and store.

        Args:
            stop_at_fault: Embed nothing more once a face could not be read, but name all faults.
            progress: Show a progress bar when it takes more than two seconds.

        Returns:
            The faces that could not be read, by position.

        Raises:
            ValueError: An embedding is not finite.
        """
        wanted = torch.stack(list(self.missing.values())).any(0)
        faults: dict[int, Fault] = {}
        total = int(wanted.sum())
        bar = tqdm(total=total, desc="embedding", unit="face", delay=2, disable=not progress)
        try:
            parts = wanted.nonzero().flatten().split(self.at_once)
            networks = evaluating(self.srnets.values(), self.bench.device)
            with bar, networks, closing(self._batches(parts)) as batches:
                for batch in batches:
                    faults |= batch.faults
                    # what is left is then only read, to name all faults at once
                    self.stopped = bool(faults) and stop_at_fault
                    if not self.on_cpu:
                        self._embed(batch)
                    bar.update(len(batch.places) + len(batch.faults))
        finally:  # what was computed before an error or Ctrl-C is not computed again
            self._flush()
        return faults

    def _batches(self, parts: Sequence[Tensor]) -> Generator[Batch, None, None]:
        """Read batches, and on a CPU embed them, in threads that run a little ahead."""
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(self.threads, "idloss", self._begin_thread) as pool:
                ahead: deque[Future[Batch]] = deque()
                try:
                    for part in parts:
                        ahead.append(pool.submit(self._work, part.tolist()))
                        if len(ahead) > self.threads + 1:
                            yield ahead.popleft().result()
                    while ahead:
                        yield ahead.popleft().result()
                except BaseException:  # an error, or Ctrl-C: leave soon
                    self.stopped = True
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
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
        if not batch.places.numel():
            return
        places, canvas = batch.places, batch.crops.to(self.bench.device)
        networks = self.own.networks if self.on_cpu else self
        for variant, need in self.missing.items():
            if self.stopped:
                return
            if variant.srnet == HR and (rows := need[places]).any():
                crops = canvas[rows.to(canvas.device)]
                fused = networks.recognisers[variant.fnet].full(crops, self.template)
                self._put(variant, places[rows], fused)
        if not self.groups:
            return
        crops = cut(canvas, self.template, SR_CROP)
        for (srnet, size), variants in self.groups.items():
            if self.stopped:
                return
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
            held = time.monotonic() - self.flushed
            if self.waiting_bytes >= FLUSH_BYTES or held >= FLUSH_SECONDS:
                self._flush()

    def _flush(self) -> None:
        for variant, parts in self.waiting.items():
            digests = [one for part, _ in parts for one in part]
            self.store.add(self.keys[variant], digests, np.concatenate([rows for _, rows in parts]))
        self.waiting.clear()
        self.waiting_bytes = 0
        self.flushed = time.monotonic()
