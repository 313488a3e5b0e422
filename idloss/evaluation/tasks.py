"""Verification, identification, open set: which faces each needs, and what it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm
from numpy.typing import NDArray
from torch import Tensor

from idloss.data import EvaluationSet, Fault, Pairs
from idloss.evaluation.embedding import Bench, Embedded, Need, Variant
from idloss.evaluation.identification import (
    closed_set,
    draw_galleries,
    found_within,
    identify,
    identify_open_set,
    open_set,
)
from idloss.evaluation.results import HR, Cell, Results, Task
from idloss.evaluation.statistics import Estimate
from idloss.evaluation.store import Embeddings
from idloss.evaluation.verification import pair_scores, summarise, verify

Probe = Literal["second", "both"]


@dataclass(frozen=True)
class Run:
    """One task on the way to its results.

    Attributes:
        data: The faces, with what to compare.
        bench: The networks and the sizes of this task.
        results: Takes in the cells.
        task: The task.
        probe: Which faces are LR.
        draws: Random galleries, where the set has none.
        seed: Seed of galleries and bootstrap.
        progress: Show progress bars.
    """

    data: EvaluationSet
    bench: Bench
    results: Results
    task: Task
    probe: Probe
    draws: int
    seed: int
    progress: bool

    @property
    def labels(self) -> NDArray[np.int64]:
        """Who the faces are, `[N]`."""
        if self.data.faces.labels is None:
            raise ValueError(f"{self.data.name} has no identities to find; use verification")
        labels: NDArray[np.int64] = self.data.faces.labels.numpy()
        return labels

    def need(self) -> Need:
        """The faces that the task needs.

        Raises:
            ValueError: The set does not hold what the task is about.
        """
        enrolled, probes = _TASKS[self.task].faces(self)
        if self.probe == "both":
            probes = torch.cat((enrolled, probes))
        return Need(self.bench.sizes, enrolled.unique(), probes.unique())

    def judge(self, embedded: Embedded) -> None:
        """Judge every cell.

        Raises:
            ValueError: What is left of the faces is too little.
        """
        _TASKS[self.task].judge(self, embedded)

    def each(self, embedded: Embedded) -> Iterator[tuple[Variant, Embeddings, Embeddings]]:
        """Each variant with its gallery and its probes, one in memory at a time."""
        variants = self.bench.variants()
        what = self.task.replace("_", " ")
        bar = tqdm(total=len(variants), desc=what, unit="cell", delay=2, disable=not self.progress)
        with bar:
            for fnet in self.bench.fnets:
                own = [variant for variant in variants if variant.fnet == fnet]
                enrolled = embedded.rows(next(v for v in own if v.srnet == HR))
                for variant in own:
                    rows = enrolled if variant.srnet == HR else embedded.rows(variant)
                    yield variant, rows if self.probe == "both" else enrolled, rows
                    bar.update()

    def add(
        self, variant: Variant, figures: Mapping[str, Estimate], **arrays: NDArray[Any]
    ) -> None:
        """Take in one cell."""
        cell = Cell(self.task, variant.fnet, variant.srnet, *variant.size)
        self.results.add(cell, figures, arrays)

    def note(self, key: str, value: Any) -> None:
        """Keep what holds for this task only."""
        self.results.run.setdefault(key, {})[self.task] = value


class _Task(NamedTuple):
    """What a task needs, enrolled faces and probes, and how it is judged."""

    faces: Callable[[Run], tuple[Tensor, Tensor]]
    judge: Callable[[Run, Embedded], None]


def _pairs_to_verify(run: Run) -> tuple[Tensor, Tensor]:
    pairs = _pairs(run)
    _require_both_kinds(run, pairs)
    return pairs.first, pairs.second


def _verify(run: Run, embedded: Embedded) -> None:
    pairs = _pairs(run)
    lost = torch.tensor(sorted(embedded.faults), dtype=torch.int64)
    pairs = pairs.select(~(torch.isin(pairs.first, lost) | torch.isin(pairs.second, lost)))
    _require_both_kinds(run, pairs)
    run.note("judged", {"pairs": len(pairs)})
    first, second = pairs.first.numpy(), pairs.second.numpy()
    same, folds = pairs.same.numpy(), pairs.fold.numpy()
    for variant, gallery, probes in run.each(embedded):
        left, right = gallery[first], probes[second]
        judged = verify(left, right, same, run.bench.protocol.rule, folds=folds)
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


def _pairs(run: Run) -> Pairs:
    if run.data.pairs is None:
        raise ValueError(f"{run.data.name} has no pairs to verify; give the list of pairs")
    return run.data.pairs


def _require_both_kinds(run: Run, pairs: Pairs) -> None:
    """Refuse pairs that k-fold figures cannot be made of, before hours are spent on them."""
    folds = int(pairs.fold.max()) + 1 if len(pairs) else 0
    if folds < 2:
        raise ValueError(
            f"{run.data.name}: {len(pairs)} pairs in {folds} folds; each fold is judged at the "
            "threshold of the others, so give two folds or more"
        )
    alike = pairs.fold[pairs.same].bincount(minlength=folds)
    apart = pairs.fold[~pairs.same].bincount(minlength=folds)
    for fold, (one, two) in enumerate(zip(alike.tolist(), apart.tolist(), strict=True), start=1):
        if not one or not two:
            raise ValueError(
                f"{run.data.name}: fold {fold} of {folds} has {one} pairs of one person and {two} "
                "of two; ROC, AUC and EER need both in each fold, so give more pairs"
            )


def _faces_to_identify(run: Run) -> tuple[Tensor, Tensor]:
    if run.data.gallery is not None:
        gallery, probes = _own_sets(run, strangers=False)
        return gallery, torch.cat([*probes.values()])
    able = draw_galleries(run.labels, draws=run.draws, seed=run.seed).images
    images = torch.from_numpy(able)
    return images, images


def _identify(run: Run, embedded: Embedded) -> None:
    if run.data.gallery is not None:
        _search_own_gallery(run, embedded)
        return
    kept = _note_draws(run, embedded)
    labels = run.labels[kept]
    for variant, gallery, probes in run.each(embedded):
        found = identify(gallery[kept], probes[kept], labels, draws=run.draws, seed=run.seed)
        run.add(variant, found.summarise(), rank1=found.rank1, cmc=found.cmc)


def _search_own_gallery(run: Run, embedded: Embedded) -> None:
    """Search the set's own gallery for each of its probe sets; strangers take no part."""
    labels = run.labels
    gallery, probes = _own_sets(run, strangers=False)
    enrolled = _without(gallery, embedded.faults).numpy()
    sets = {name: _without(places, embedded.faults).numpy() for name, places in probes.items()}
    run.note(
        "judged",
        {
            "gallery": len(enrolled),
            "probes": {name: len(places) for name, places in sets.items()},
        },
    )
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


def _faces_to_turn_away(run: Run) -> tuple[Tensor, Tensor]:
    if run.data.gallery is not None:
        gallery, mated = _own_sets(run, strangers=False)
        _, unmated = _own_sets(run, strangers=True)
        return gallery, torch.cat([*mated.values(), *unmated.values()])
    able = draw_galleries(run.labels, draws=run.draws, seed=run.seed).images
    return torch.from_numpy(able), torch.arange(len(run.labels))


def _turn_away(run: Run, embedded: Embedded) -> None:
    if run.data.gallery is not None:
        _turn_away_from_own_gallery(run, embedded)
        return
    kept = _note_draws(run, embedded)
    labels = run.labels[kept]
    for variant, gallery, probes in run.each(embedded):
        found = identify_open_set(
            gallery[kept], probes[kept], labels, draws=run.draws, seed=run.seed
        )
        run.add(variant, found.summarise(), tpir=found.tpir, thresholds=found.thresholds)


def _turn_away_from_own_gallery(run: Run, embedded: Embedded) -> None:
    labels = run.labels
    gallery, mated = _own_sets(run, strangers=False)
    _, unmated = _own_sets(run, strangers=True)
    enrolled, sought, others = (
        _without(places, embedded.faults).numpy()
        for places in (gallery, torch.cat([*mated.values()]), torch.cat([*unmated.values()]))
    )
    run.note("judged", {"gallery": len(enrolled), "mated": len(sought), "unmated": len(others)})
    for variant, gallery_rows, rows in run.each(embedded):
        figures, correct = open_set(
            gallery_rows[enrolled],
            labels[enrolled],
            rows[sought],
            labels[sought],
            rows[others],
            seed=run.seed,
        )
        run.add(variant, figures, correct=correct)


_TASKS: Mapping[Task, _Task] = {
    "verification": _Task(_pairs_to_verify, _verify),
    "identification": _Task(_faces_to_identify, _identify),
    "open_set": _Task(_faces_to_turn_away, _turn_away),
}


def _note_draws(run: Run, embedded: Embedded) -> NDArray[np.int64]:
    """Positions of all faces but those that could not be read; notes what is drawn from them."""
    everyone = torch.arange(len(run.data.faces))
    kept: NDArray[np.int64] = _without(everyone, embedded.faults).numpy()
    drawn = draw_galleries(run.labels[kept], draws=run.draws, seed=run.seed)
    run.note("draws", drawn.digest)
    run.note(
        "judged",
        {
            "subjects": int(drawn.gallery.shape[1]),
            "images": len(drawn.images),
            "draws": run.draws,
        },
    )
    return kept


def _own_sets(run: Run, *, strangers: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The gallery, and the probes of people in it, or of strangers, by probe set."""
    gallery = cast("Tensor", run.data.gallery)
    labels = torch.from_numpy(run.labels)
    sets = {name: p[(labels[p] < 0) == strangers] for name, p in run.data.probes.items()}
    sets = {name: places for name, places in sets.items() if len(places)}
    if not sets:
        who = "strangers" if strangers else "people in its gallery"
        raise ValueError(f"{run.data.name} has no probes of {who}; choose another task")
    return gallery, sets


def _without(places: Tensor, faults: Mapping[int, Fault]) -> Tensor:
    return places[~torch.isin(places, torch.tensor(sorted(faults), dtype=torch.int64))]
