"""A run of the bench: embed once for the whole grid and all tasks, then judge every cell."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from idloss.data import EvaluationSet
from idloss.errors import did_you_mean
from idloss.evaluation.embedding import Bench, embed_grid
from idloss.evaluation.identification import DRAWS
from idloss.evaluation.protocols import Protocol, get_protocol
from idloss.evaluation.recogniser import SR_CROP
from idloss.evaluation.results import HR, LR, Results, Task
from idloss.evaluation.store import digest_network, digest_weights, open_store
from idloss.evaluation.tasks import Probe, Run
from idloss.geometry import get_template
from idloss.resample import Size

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
        ValueError: The set lacks pairs or identities, or an option is unknown or out of range.
        DataError: A photo cannot be read or aligned.
    """
    options = {"probe": (probe, get_args(Probe)), "task": (tasks, get_args(Task))}
    for kind, (given, known) in options.items():
        for value in (given,) if isinstance(given, str) else given:
            if value not in known:
                raise ValueError(did_you_mean(kind, value, known))
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    fixed = get_protocol(protocol)
    _require_labels(fnets, srnets)
    _require_device(device)
    own = {
        task: tuple(dict.fromkeys(sizes if sizes is not None else PAPER_SIZES[task]))
        for task in dict.fromkeys(tasks)
    }
    every = tuple(dict.fromkeys(size for one in own.values() for size in one))
    _require_sizes(every)
    results = Results(
        run={
            "tasks": list(own),
            "protocol": fixed.describe(),
            "probe": probe,
            "seed": seed,
            "skip_missing": skip_missing,
            "data": _describe_data(data),
            "networks": {
                name: _describe_network(net) for name, net in (*fnets.items(), *srnets.items())
            },
            "sizes": {task: [list(size) for size in one] for task, one in own.items()},
            "device": device,
        }
    )
    bench = Bench(fnets, srnets, every, fixed, batch_size, device)
    runs = [
        Run(data, replace(bench, sizes=one), results, task, probe, draws, seed, progress)
        for task, one in own.items()
    ]
    needs = [run.need() for run in runs]
    with open_store(keep=cache) as store:
        embedded = embed_grid(
            bench, data.faces, needs, store, skip_missing=skip_missing, progress=progress
        )
        results.run["batch_size"] = embedded.batch_size
        about = results.run["data"]
        about["content"] = {
            run.task: embedded.content(need) for run, need in zip(runs, needs, strict=True)
        }
        about["skipped"] += dict.fromkeys(map(str, embedded.faults.values()))
        for run in runs:
            run.judge(embedded)
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


def _require_labels(fnets: Mapping[str, nn.Module], srnets: Mapping[str, nn.Module]) -> None:
    """Refuse names that mean something else in results, or two things."""
    if not fnets:
        raise ValueError("no FNet to measure; give one or more")
    for name in srnets:
        if name in (HR, LR):
            raise ValueError(f"an SRNet cannot be called {name!r}, as faces without one are")
        if name in fnets:
            raise ValueError(f"{name!r} is both an FNet and an SRNet; call one of them otherwise")


def _require_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch lacks the backend
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {device!r} cannot be used here ({reason}); give cpu") from error


def _require_sizes(sizes: Sequence[Size]) -> None:
    rows, columns = get_template(SR_CROP).size
    for height, width in sizes:
        if not (0 < height <= rows and 0 < width <= columns):
            raise ValueError(
                f"a probe of {height}x{width} is no smaller version of the {rows}x{columns} crop; "
                f"give 1x1 to {rows}x{columns}, rows first"
            )


def _describe_data(data: EvaluationSet) -> dict[str, Any]:
    return {
        "name": data.name,
        "faces": len(data.faces),
        "pairs": 0 if data.pairs is None else len(data.pairs),
        "list": _digest_list(data),
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
