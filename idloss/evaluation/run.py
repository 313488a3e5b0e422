"""A run of the bench: embed once for the whole grid, then judge every cell."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from idloss.data import EvaluationSet, Fault
from idloss.errors import did_you_mean
from idloss.evaluation.embedding import (
    Bench,
    Embedded,
    Size,
    Variant,
    embed_grid,
)
from idloss.evaluation.enrolled import closed_set, found_within, open_set
from idloss.evaluation.identification import (
    DRAWS,
    draw_galleries,
    identify,
    identify_open_set,
)
from idloss.evaluation.intervals import Estimate
from idloss.evaluation.protocols import Protocol, get_protocol
from idloss.evaluation.results import HR, Cell, Results, Task
from idloss.evaluation.store import (
    Embeddings,
    EmbeddingStore,
    digest_network,
    digest_weights,
    open_store,
)
from idloss.evaluation.verification import pair_scores, summarise, verify

Probe = Literal["second", "both"]

PAPER_SIZES: Mapping[Task, tuple[Size, ...]] = {
    "verification": ((7, 6), (14, 12), (16, 16), (28, 24)),
    "identification": ((7, 6), (14, 12), (16, 14), (18, 16)),
    "open_set": ((7, 6), (14, 12), (16, 14), (18, 16)),
}
"""Probe sizes of the paper's Tables 1 and 2, rows and columns; the open set takes Table 2's."""


def evaluate(
    data: EvaluationSet,
    fnets: Mapping[str, nn.Module],
    srnets: Mapping[str, nn.Module],
    sizes: Sequence[Size] | None = None,
    *,
    tasks: Sequence[Task] = ("verification",),
    protocol: str | Protocol = "paper",
    probe: Probe = "second",
    draws: int = DRAWS,
    seed: int = 0,
    device: str = "cpu",
    batch_size: int | None = None,
    skip_missing: bool = False,
    cache: bool = True,
    progress: bool = True,
) -> Results:
    """Measure FNets on probes of low resolution, restored by SRNets (paper, sections 4.3 and 4.4).

    Sets with a gallery of their own are searched for their own probes; of others, galleries are
    drawn at random, one image a person.

    Args:
        data: Faces, with pairs to verify or identities to find.
        fnets: FNets by name, as from `create_fnet`; they are frozen.
        srnets: SRNets by name, as from `create_srnet`.
        sizes: Probe sizes, rows and columns; None for those of the paper's table of each task.
        tasks: `"verification"`, `"identification"`, `"open_set"`.
        protocol: Protocol or its name.
        probe: Whether the second face of a pair (the probe of a gallery) is LR, as in the paper, or
            both are.
        draws: Random galleries, where the set has none.
        seed: Seed of galleries and bootstrap.
        device: Where the networks run.
        batch_size: Faces at a time; None sizes it to the machine.
        skip_missing: Leave out photos that cannot be read, and what needs them; recorded.
        cache: Keep embeddings on disk and take them from there.
        progress: Show a progress bar.

    Returns:
        A cell for each task, FNet, SRNet and size, and one for HR.

    Raises:
        ValueError: The set lacks pairs or identities, or an option is unknown.
        DataError: A photo cannot be read or aligned.
    """
    for kind, value, known in (
        ("probe", probe, get_args(Probe)),
        *(("task", task, tuple(_TASKS)) for task in tasks),
    ):
        if value not in known:
            raise ValueError(did_you_mean(kind, value, known))
    fixed = get_protocol(protocol)
    results = Results(
        run={
            "tasks": list(tasks),
            "protocol": fixed.describe(),
            "probe": probe,
            "seed": seed,
            "data": _describe_data(data),
            "networks": {
                name: _describe_network(net) for name, net in (*fnets.items(), *srnets.items())
            },
            "sizes": {},
            "batch_size": {},
            "device": device,
        }
    )
    with open_store(keep=cache) as store:
        for task in dict.fromkeys(tasks):
            own = tuple(sizes) if sizes is not None else PAPER_SIZES[task]
            results.run["sizes"][task] = [list(size) for size in own]
            bench = Bench(fnets, srnets, own, fixed, batch_size, device)
            run = _Run(
                data, bench, store, results, task, probe, draws, seed, skip_missing, progress
            )
            _TASKS[task](run)
    return results


def evaluate_verification(
    data: EvaluationSet,
    fnets: Mapping[str, nn.Module],
    srnets: Mapping[str, nn.Module],
    sizes: Sequence[Size] | None = None,
    **options: Any,
) -> Results:
    """Verify pairs only; see `evaluate`, which takes the same options."""
    return evaluate(data, fnets, srnets, sizes, tasks=("verification",), **options)


@dataclass(frozen=True)
class _Run:
    """One task on the way to its results."""

    data: EvaluationSet
    bench: Bench
    store: EmbeddingStore
    results: Results
    task: Task
    probe: Probe
    draws: int
    seed: int
    skip_missing: bool
    progress: bool

    @property
    def labels(self) -> NDArray[np.int64]:
        """Who the faces are, `[N]`."""
        if self.data.faces.labels is None:
            raise ValueError(f"{self.data.name} has no identities to find; use verification")
        labels: NDArray[np.int64] = self.data.faces.labels.numpy()
        return labels

    def embed(self, enrolled: Tensor, probes: Tensor) -> Embedded:
        """Embed what the task needs, and note what was used and what was left out."""
        if self.probe == "both":
            probes = torch.cat((enrolled, probes))
        embedded = embed_grid(
            self.bench,
            self.data.faces,
            enrolled.unique(),
            probes.unique(),
            self.store,
            skip_missing=self.skip_missing,
            progress=self.progress,
        )
        self.results.run["batch_size"][self.task] = embedded.batch_size
        about = self.results.run["data"]
        about["content"][self.task] = embedded.content()
        known = set(about["skipped"])
        about["skipped"] += [s for s in map(str, embedded.faults.values()) if s not in known]
        return embedded

    def each(self, embedded: Embedded) -> Iterator[tuple[Variant, Embeddings, Embeddings]]:
        """Each variant with its gallery and its probes, one in memory at a time."""
        for fnet in self.bench.fnets:
            variants = [variant for variant in self.bench.variants() if variant.fnet == fnet]
            enrolled = embedded.rows(next(v for v in variants if v.srnet == HR))
            for variant in variants:
                rows = enrolled if variant.srnet == HR else embedded.rows(variant)
                yield variant, rows if self.probe == "both" else enrolled, rows

    def add(
        self, variant: Variant, figures: Mapping[str, Estimate], **arrays: NDArray[Any]
    ) -> None:
        """Take in one cell."""
        cell = Cell(self.task, variant.fnet, variant.srnet, *variant.size)
        self.results.add(cell, figures, arrays)


def _verification(run: _Run) -> None:
    pairs = run.data.pairs
    if pairs is None:
        raise ValueError(f"{run.data.name} has no pairs to verify; give the list of pairs")
    embedded = run.embed(pairs.first, pairs.second)
    lost = _mask(embedded.faults, len(run.data.faces))
    kept = ~(lost[pairs.first] | lost[pairs.second]).numpy()
    run.results.run["pairs"] = int(kept.sum())
    first, second = pairs.first.numpy()[kept], pairs.second.numpy()[kept]
    same, folds = pairs.same.numpy()[kept], pairs.fold.numpy()[kept]
    rule = run.bench.protocol.rule
    for variant, gallery, probes in run.each(embedded):
        left, right = gallery[first], probes[second]
        judged = verify(left, right, same, rule, folds=folds)
        scores = pair_scores(left, right)
        run.add(
            variant,
            summarise(scores, same, judged, seed=run.seed),
            scores=scores.astype(np.float32),
            same=same,
            correct=judged.correct,
            folds=folds,
            thresholds=judged.thresholds,
        )


def _identification(run: _Run) -> None:
    if run.data.gallery is not None:
        _search_own_gallery(run)
        return
    images = torch.from_numpy(draw_galleries(run.labels, draws=run.draws, seed=run.seed).images)
    embedded = run.embed(images, images)
    kept = _kept(run, embedded)
    labels = run.labels[kept]
    drawn = draw_galleries(labels, draws=run.draws, seed=run.seed)
    run.results.run["draws"] = drawn.digest
    run.results.run["identification"] = {
        "subjects": int(drawn.gallery.shape[1]),
        "images": len(drawn.images),
        "draws": run.draws,
    }
    for variant, gallery, probes in run.each(embedded):
        found = identify(gallery[kept], probes[kept], labels, draws=run.draws, seed=run.seed)
        run.add(variant, found.summarise(), rank1=found.rank1, cmc=found.cmc)


def _search_own_gallery(run: _Run) -> None:
    """Search the set's own gallery for each of its probe sets; strangers take no part."""
    labels = run.labels
    gallery, probes = _own_sets(run, strangers=False)
    embedded = run.embed(gallery, torch.cat([*probes.values()]))
    enrolled = _without(gallery, embedded.faults).numpy()
    sets = {name: _without(places, embedded.faults).numpy() for name, places in probes.items()}
    run.results.run["identification"] = {
        "gallery": len(enrolled),
        "probes": {name: len(places) for name, places in sets.items()},
    }
    for variant, gallery_rows, rows in run.each(embedded):
        parts = {
            name: found_within(gallery_rows[enrolled], labels[enrolled], rows[own], labels[own])
            for name, own in sets.items()
        }
        figures, curve = closed_set(np.concatenate([*parts.values()]), seed=run.seed)
        arrays = {"correct": np.concatenate([part[:, 0] for part in parts.values()])}
        if len(parts) > 1:
            for name, part in parts.items():
                own_figures, arrays[f"cmc {name}"] = closed_set(part, seed=run.seed)
                figures |= {f"{metric} {name}": one for metric, one in own_figures.items()}
        run.add(variant, figures, cmc=curve[None], **arrays)


def _open_set(run: _Run) -> None:
    labels = run.labels
    if run.data.gallery is None:
        everyone = torch.arange(len(labels))
        able = draw_galleries(labels, draws=run.draws, seed=run.seed).images
        embedded = run.embed(torch.from_numpy(able), everyone)
        kept = _kept(run, embedded)
        for variant, gallery_rows, rows in run.each(embedded):
            found = identify_open_set(
                gallery_rows[kept], rows[kept], labels[kept], draws=run.draws, seed=run.seed
            )
            run.add(variant, found.summarise(), tpir=found.tpir, thresholds=found.thresholds)
        return
    gallery, mated = _own_sets(run, strangers=False)
    _, unmated = _own_sets(run, strangers=True)
    if not unmated:
        raise ValueError(f"{run.data.name} has no probes of strangers, so there is no open set")
    sought = torch.cat([*mated.values()])
    others = torch.cat([*unmated.values()])
    embedded = run.embed(gallery, torch.cat((sought, others)))
    enrolled, sought, others = (
        _without(places, embedded.faults) for places in (gallery, sought, others)
    )
    for variant, gallery_rows, rows in run.each(embedded):
        figures, tpir = open_set(
            gallery_rows[enrolled],
            labels[enrolled],
            rows[sought],
            labels[sought],
            rows[others],
            seed=run.seed,
        )
        run.add(variant, figures, tpir=tpir[None])


_TASKS: Mapping[str, Callable[[_Run], None]] = {
    "verification": _verification,
    "identification": _identification,
    "open_set": _open_set,
}


def _own_sets(run: _Run, *, strangers: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The gallery, and the probes of people in it, or of strangers, by probe set."""
    gallery = cast("Tensor", run.data.gallery)
    labels = torch.from_numpy(run.labels)
    sets = {name: p[(labels[p] < 0) == strangers] for name, p in run.data.probes.items()}
    return gallery, {name: places for name, places in sets.items() if len(places)}


def _kept(run: _Run, embedded: Embedded) -> NDArray[np.int64]:
    """Positions of all faces but those that could not be read."""
    lost = _mask(embedded.faults, len(run.data.faces))
    places: NDArray[np.int64] = (~lost).nonzero().flatten().numpy()
    return places


def _without(places: Tensor, faults: Mapping[int, Fault]) -> Tensor:
    return places[~torch.isin(places, torch.tensor(sorted(faults), dtype=torch.int64))]


def _mask(faults: Mapping[int, Fault], count: int) -> Tensor:
    lost = torch.zeros(count, dtype=torch.bool)
    lost[list(faults)] = True
    return lost


def _describe_data(data: EvaluationSet) -> dict[str, Any]:
    return {
        "name": data.name,
        "faces": len(data.faces),
        "pairs": 0 if data.pairs is None else len(data.pairs),
        "list": _digest_list(data),
        "content": {},
        "skipped": [str(fault) for fault in data.faces.skipped],
    }


def _describe_network(net: nn.Module) -> dict[str, Any]:
    cfg = getattr(net, "pretrained_cfg", None) or {}
    wanted = ("architecture", "tag", "url", "hf_hub_id", "license", "origin_url")
    return {
        "network": digest_network(net),
        "weights": digest_weights(net),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        **{key: str(cfg[key]) for key in wanted if cfg.get(key)},
    }


def _digest_list(data: EvaluationSet) -> str:
    """SHA-256 of what is compared with what: names of the faces, pairs, gallery and probes."""
    digest = hashlib.sha256("\n".join(data.faces.names).encode())
    columns: list[Tensor] = []
    if data.pairs is not None:
        columns += [data.pairs.first, data.pairs.second, data.pairs.same, data.pairs.fold]
    if data.faces.labels is not None:
        columns.append(data.faces.labels)
    if data.gallery is not None:
        columns += [data.gallery, *data.probes.values()]
    for column in columns:
        digest.update(len(column).to_bytes(8, "little"))
        digest.update(column.long().numpy().tobytes())
    return digest.hexdigest()
