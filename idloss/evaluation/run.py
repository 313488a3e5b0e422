"""A run of the bench: embed once for the whole grid and all tasks, then judge every cell."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from huggingface_hub.utils.tqdm import tqdm
from numpy.typing import NDArray
from torch import Tensor, nn

from idloss.data import EvaluationSet, Pairs
from idloss.encoder import resolve_device
from idloss.errors import did_you_mean
from idloss.evaluation.cache import EmbeddingCache, Embeddings, digest, digest_weights
from idloss.evaluation.calibration import count_reached
from idloss.evaluation.embedding import SR_CROP, EmbeddedGrid, fit_size, ready
from idloss.evaluation.identification import (
    DRAWS,
    closed_set,
    draw_galleries,
    found_within,
    identify,
    identify_open_set,
    open_set,
)
from idloss.evaluation.protocols import Protocol, get_protocol
from idloss.evaluation.results import HR, LR, Cell, Results, Task, read_task
from idloss.evaluation.statistics import Estimate, require_scipy
from idloss.evaluation.verification import pair_scores, summarise, verify
from idloss.geometry import Template, get_template
from idloss.registry import srnet_crop
from idloss.resample import Size

Probe = Literal["second", "both"]
Figures = tuple[Mapping[str, Estimate], Mapping[str, NDArray[Any]]]
Judge = Callable[[Embeddings, Embeddings], Figures]
"""From embeddings of gallery and probes, `[N, D]`, to the figures of a cell and their arrays."""

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
    tasks: Sequence[str] = ("verification",),
    protocol: str | Protocol = "paper",
    probe: Probe = "second",
    draws: int = DRAWS,
    seed: int = 0,
    device: str | torch.device = "auto",
    batch_size: int | None = None,
    skip_missing: bool = False,
    cache: bool | str | os.PathLike[str] = True,
    progress: bool = True,
) -> Results:
    """Measure FNets on probes of low resolution, restored by SRNets (paper, sections 4.3 and 4.4).

    Sets with a gallery of their own are searched for their own probes; of others, galleries are
    drawn at random, one image a person.

    Args:
        data: Faces, with pairs to verify or identities to find.
        fnets: FNets by name, as from `create_fnet`.
        srnets: SRNets by name, as from `create_srnet`.
        sizes: Probe sizes, rows and columns; None for those of the paper's table of each task. Of
            one of the shape of 112x96 crops, SRNets of other crops take the rows: 14x14 for 14x12.
        tasks: `"verification"`, `"identification"`, `"open_set"` (or `"open-set"`).
        protocol: Protocol or its name.
        probe: Whether the second face of a pair (the probe of a gallery) is LR, as in the paper, or
            both are.
        draws: Random galleries, where the set has none.
        seed: Seed of galleries and bootstrap.
        device: Where the networks run and stay, `"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`.
        batch_size: Faces at a time on each core, or on the GPU; None for 8 on a core, 32 on a GPU.
        skip_missing: Leave out photos that cannot be read, and what needs them; recorded.
        cache: Keep embeddings on disk and take them from there: True for
            `$HF_HOME/idloss/embeddings`, or a folder.
        progress: Show a progress bar.

    Returns:
        A cell for each task, FNet, SRNet and size, and one for HR.

    Raises:
        ValueError: The set lacks pairs or identities, or an option is unknown or out of range.
        DataError: A photo cannot be read or aligned.
    """
    if probe not in get_args(Probe):
        raise ValueError(did_you_mean("probe", probe, get_args(Probe)))
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    named = dict.fromkeys(map(read_task, [tasks] if isinstance(tasks, str) else tasks))
    own = {
        task: tuple(dict.fromkeys(PAPER_SIZES[task] if sizes is None else sizes)) for task in named
    }
    require_scipy()  # for the intervals: say so before hours are spent
    fixed = get_protocol(protocol)
    place = resolve_device(device)
    crops = {name: get_template(srnet_crop(net)) for name, net in srnets.items()}
    _require_sense(fnets, crops, [size for one in own.values() for size in one])
    about: dict[str, Any] = {
        "name": data.name,
        "faces": len(data.faces),
        "pairs": 0 if data.pairs is None else len(data.pairs),
        "list": _digest_list(data),
        "skipped": [str(fault) for fault in data.faces.skipped],
    }
    results = Results(
        run={
            "tasks": list(own),
            "protocol": fixed.describe(),
            "probe": probe,
            "seed": seed,
            "skip_missing": skip_missing,
            "data": about,
            "sizes": {task: [list(size) for size in one] for task, one in own.items()},
            "device": str(place),
            "batch_size": batch_size,
        }
    )
    run = _Run(data, own, [*fnets], crops, fixed, probe, draws, seed, results)
    wanted = {cell: places for task in own for cell, places in run.wanted(task).items()}
    folder = Path(HF_HOME) / "idloss" / "embeddings" if cache is True else cache
    with (
        ready(fnets, srnets, fixed, place) as networks,
        EmbeddingCache(Path(folder) if folder else None) as store,
    ):
        networks.warn_of_borders(data.faces.crop)
        results.run["networks"] = {
            name: _describe_network(net) for name, net in (*fnets.items(), *srnets.items())
        }
        options = (batch_size, skip_missing, progress)
        embedded = EmbeddedGrid(networks, data.faces, wanted, store, *options)
        embedded.fill()
        about["content"] = {task: embedded.content(torch.cat(run.sides(task))) for task in own}
        about["skipped"] += dict.fromkeys(map(str, embedded.faults.values()))
        for task in own:
            run.judge(task, embedded, progress=progress)
    return results


def _require_sense(
    fnets: Mapping[str, nn.Module], srnets: Mapping[str, Template], sizes: Sequence[Size]
) -> None:
    """Refuse names that mean something else in results, or two things, and probes too large."""
    if not fnets:
        raise ValueError("no FNet to measure; give one or more")
    for name in srnets:
        if name in (HR, LR):
            raise ValueError(f"an SRNet cannot be called {name!r}, as faces without one are")
        if name in fnets:
            raise ValueError(f"{name!r} is both an FNet and an SRNet; call one of them otherwise")
    for crop in dict.fromkeys(srnets.values() or (SR_CROP,)):
        rows, columns = crop.size
        for height, width in (fit_size(size, crop) for size in sizes):
            if not (0 < height <= rows and 0 < width <= columns):
                raise ValueError(
                    f"a probe of {height}x{width} is no smaller version of the {rows}x{columns} "
                    f"crop; give 1x1 to {rows}x{columns}, rows first"
                )


def _describe_network(net: nn.Module) -> dict[str, Any]:
    cfg = getattr(net, "pretrained_cfg", None) or {}
    wanted = ("architecture", "tag", "url", "hf_hub_id", "license", "origin_url")
    known = {key: str(cfg[key]) for key in wanted if cfg.get(key)}
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return {"weights": digest_weights(net), "parameters": parameters, **known}


def _digest_list(data: EvaluationSet) -> str:
    """SHA-256 of what is compared with what: names of the faces, pairs, gallery and probes."""
    columns = [data.faces.labels, data.gallery, *data.probes.values()]
    if data.pairs is not None:
        columns += [data.pairs.first, data.pairs.second, data.pairs.same, data.pairs.fold]
    return digest(data.faces.names, *(None if one is None else one.tolist() for one in columns))


@dataclass(frozen=True)
class _Run:
    """Tasks on the way to their results: which faces each needs, and what it makes of them."""

    data: EvaluationSet
    sizes: Mapping[Task, tuple[Size, ...]]
    fnets: Sequence[str]
    srnets: Mapping[str, Template]
    protocol: Protocol
    probe: Probe
    draws: int
    seed: int
    results: Results

    def sides(self, task: Task) -> tuple[Tensor, Tensor]:
        """Positions of the faces enrolled and of the probes, each int64."""
        if task == "verification":
            pairs = self._pairs()
            return pairs.first, pairs.second
        if self.data.gallery is not None:
            sets = [*self._probe_sets(strangers=False).values()]
            if task == "open_set":
                sets += self._probe_sets(strangers=True).values()
            return self.data.gallery, torch.cat(sets)
        drawn = draw_galleries(self._labels(), draws=self.draws, seed=self.seed)
        able = torch.from_numpy(drawn.images)
        return able, able if task == "identification" else torch.arange(len(self.data.faces))

    def cells(self, task: Task) -> list[Cell]:
        """The cells of a task, HR first of those of each FNet."""
        grid = [(HR, SR_CROP.size)]
        for srnet, crop in self.srnets.items():
            fitting = dict.fromkeys(fit_size(size, crop) for size in self.sizes[task])
            grid += [(srnet, size) for size in fitting]
        return [Cell(task, fnet, srnet, *size) for fnet in self.fnets for srnet, size in grid]

    def wanted(self, task: Task) -> dict[Cell, Tensor]:
        """Positions of the faces that each cell of a task needs."""
        enrolled, probes = self.sides(task)
        everyone = torch.cat((enrolled, probes)).unique()
        low = everyone if self.probe == "both" else probes.unique()
        return {cell: everyone if cell.srnet == HR else low for cell in self.cells(task)}

    def judge(self, task: Task, embedded: EmbeddedGrid, *, progress: bool) -> None:
        """Judge every cell of a task, one in memory at a time beside HR."""
        lost = torch.tensor(sorted(embedded.faults), dtype=torch.int64)
        if task == "verification":
            judge = self._verification(lost)
        elif self.data.gallery is None:
            judge = self._drawn_galleries(task, lost)
        else:
            judge = self._own_gallery(task, _without(self.data.gallery, lost), lost)
        what = task.replace("_", " ")
        for cell in tqdm(self.cells(task), desc=what, unit="cell", delay=2, disable=not progress):
            rows = embedded.rows(cell)
            if cell.srnet == HR:
                enrolled = rows
            figures, arrays = judge(rows if self.probe == "both" else enrolled, rows)
            self.results.add(cell, figures, arrays)

    def _verification(self, lost: Tensor) -> Judge:
        pairs = self._pairs(lost)
        self._note("judged", "verification", {"pairs": len(pairs)})
        first, second = pairs.first.numpy(), pairs.second.numpy()
        same, folds = pairs.same.numpy(), pairs.fold.numpy()
        labels = self.data.faces.labels
        people = None if labels is None else labels.numpy()

        def judge(gallery: Embeddings, probes: Embeddings) -> Figures:
            left, right = gallery[first], probes[second]
            judged = verify(left, right, same, self.protocol.rule, folds=folds)
            scores = pair_scores(left, right)
            return summarise(scores, same, judged, seed=self.seed), {
                "scores": scores.astype(np.float32),
                "same": same,
                "correct": judged.correct,
                "folds": folds,
                "thresholds": judged.thresholds,
                **count_reached(gallery, probes, first, second, same, people),
            }

        return judge

    def _drawn_galleries(self, task: Task, lost: Tensor) -> Judge:
        kept = _without(torch.arange(len(self.data.faces)), lost)
        labels = self._labels()[kept]
        options: dict[str, Any] = {"draws": self.draws, "seed": self.seed}
        drawn = draw_galleries(labels, **options)
        counts = {"subjects": int(drawn.gallery.shape[1]), "images": len(drawn.images)}
        self._note("draws", task, drawn.digest)
        self._note("judged", task, {**counts, "draws": self.draws})

        found = identify if task == "identification" else identify_open_set
        return lambda gallery, probes: found(gallery[kept], probes[kept], labels, **options)

    def _own_gallery(self, task: Task, enrolled: NDArray[np.int64], lost: Tensor) -> Judge:
        """Search the set's own gallery for each of its probe sets; turn strangers away."""
        labels = self._labels()
        known = {name: _without(p, lost) for name, p in self._probe_sets(strangers=False).items()}
        if task == "identification":
            sizes: dict[str, Any] = {"probes": {name: len(p) for name, p in known.items()}}
        else:
            mated = np.concatenate([*known.values()])
            sets = self._probe_sets(strangers=True)
            strangers = _without(torch.cat([*sets.values()]), lost)
            sizes = {"mated": len(mated), "unmated": len(strangers)}
        self._note("judged", task, {"gallery": len(enrolled), **sizes})

        def search(gallery: Embeddings, probes: Embeddings) -> Figures:
            parts = {
                name: found_within(gallery[enrolled], labels[enrolled], probes[own], labels[own])
                for name, own in known.items()
            }
            figures, curve = closed_set(np.concatenate([*parts.values()]), seed=self.seed)
            arrays = {"cmc": curve[None]}
            arrays["correct"] = np.concatenate([part[:, 0] for part in parts.values()])
            if len(parts) > 1:
                for name, part in parts.items():
                    own_figures, arrays[f"cmc {name}"] = closed_set(part, seed=self.seed)
                    figures |= {f"{metric} {name}": one for metric, one in own_figures.items()}
            return figures, arrays

        def turn_away(gallery: Embeddings, probes: Embeddings) -> Figures:
            people = (gallery[enrolled], labels[enrolled], probes[mated], labels[mated])
            figures, correct = open_set(*people, probes[strangers], seed=self.seed)
            return figures, {"correct": correct}

        return search if task == "identification" else turn_away

    def _pairs(self, lost: Tensor | None = None) -> Pairs:
        """The pairs whose faces are there, refused where no k-fold figures can be made of them."""
        name, pairs = self.data.name, self.data.pairs
        if pairs is None:
            raise ValueError(f"{name} has no pairs to verify; give the list of pairs")
        if lost is not None:
            pairs = pairs.select(~(torch.isin(pairs.first, lost) | torch.isin(pairs.second, lost)))
        folds = int(pairs.fold.max()) + 1 if len(pairs) else 0
        if folds < 2:
            raise ValueError(
                f"{name}: {len(pairs)} pairs in {folds} folds; each fold is judged at the "
                "threshold of the others, so give two folds or more"
            )
        alike = pairs.fold[pairs.same].bincount(minlength=folds).tolist()
        apart = pairs.fold[~pairs.same].bincount(minlength=folds).tolist()
        for fold, (one, two) in enumerate(zip(alike, apart, strict=True), start=1):
            if not one or not two:
                raise ValueError(
                    f"{name}: fold {fold} of {folds} has {one} pairs of one person and {two} of "
                    "two; ROC, AUC and EER need both in each fold, so give more pairs"
                )
        return pairs

    def _labels(self) -> NDArray[np.int64]:
        if self.data.faces.labels is None:
            raise ValueError(f"{self.data.name} has no identities to find; use verification")
        labels = self.data.faces.labels.numpy().copy()
        # those who are not known (-1) are not one person, but nobody's like
        labels[labels < 0] = -1 - np.arange((labels < 0).sum())
        return np.asarray(labels)

    def _probe_sets(self, *, strangers: bool) -> dict[str, Tensor]:
        """The probes of people in the set's own gallery, or of strangers, by probe set."""
        labels = torch.from_numpy(self._labels())
        sets = {name: p[(labels[p] < 0) == strangers] for name, p in self.data.probes.items()}
        sets = {name: places for name, places in sets.items() if len(places)}
        if not sets:
            who = "strangers" if strangers else "people in its gallery"
            raise ValueError(f"{self.data.name} has no probes of {who}; choose another task")
        return sets

    def _note(self, key: str, task: Task, value: Any) -> None:
        """Keep what holds for one task only."""
        self.results.run.setdefault(key, {})[task] = value


def _without(places: Tensor, lost: Tensor) -> NDArray[np.int64]:
    kept: NDArray[np.int64] = places[~torch.isin(places, lost)].numpy()
    return kept
