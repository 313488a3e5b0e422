"""What is known of each model and was measured with it: to choose by, and as zoo/README.md."""

from __future__ import annotations

import csv
import functools
import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils.tqdm import tqdm
from timm.models import get_pretrained_cfg, model_entrypoint, split_model_name_tag
from torch.utils.flop_counter import FlopCounterMode

from idloss.create import create_fnet, create_srnet, published_config
from idloss.errors import did_you_mean
from idloss.evaluation import Cell, Results, paper_table
from idloss.evaluation.results import Record, markdown_table, metric_title
from idloss.evaluation.statistics import Estimate
from idloss.geometry import get_template
from idloss.registry import list_fnets, list_srnets, timms_name
from idloss.weights.files import NotFoundError, written_whole
from idloss.weights.loading import fetch, find_kept, get_weights
from idloss.weights.sources import zoo_folder, zoo_models

Kind = Literal["FNet", "SRNet"]
_Shape = tuple[int | None, int | None, tuple[int, int] | None, str | None]
HEADS = (
    *("model", "kind", "parameters", "multiply-adds", "input", "crop", "licence"),
    *("training data", "LFW (%)", "download"),
)
"""What `ModelFacts.row` holds."""
_KEPT = ("data", "protocol", "probe", "seed", "command")
_NOTES = ("recipe", "commit", "seed", "hardware")


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model; None or empty where it is not."""

    name: str  # `arch.tag`, `arch` where it has no weights, or that of a published model
    kind: Kind
    parameters: int | None
    multiply_adds: int | None  # of one image of `input`, in convolutions and matrix products
    input: tuple[int, int] | None  # rows and columns; an SRNet takes others, too
    crop: str | None  # template of the crops it takes
    licence: str = ""
    training_data: str = ""
    lfw: float | None = None  # per cent, as their authors state
    size: int | None = None  # bytes to download
    cached: bool = False  # whether the weights are here

    def row(self) -> list[str]:
        """The facts for a table, but for `cached`."""
        return [
            *(self.name, self.kind, _rounded(self.parameters), _rounded(self.multiply_adds)),
            f"{self.input[0]}x{self.input[1]}" if self.input else "",
            *(self.crop or "", self.licence, self.training_data),
            "" if self.lfw is None else f"{self.lfw:.2f}",
            "" if self.size is None else _rounded(self.size) + "B",
        ]


def _rounded(count: int | None) -> str:
    """Three digits of a count and its unit, `1.52 M`."""
    if count is None:
        return ""
    value, units = float(count), ["", "k", "M", "G"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    unit = units[0]
    digits = 0 if not unit else sum(value < limit for limit in (9.995, 99.95))
    return f"{value:.{digits}f} {unit}".rstrip()


def describe_model(name: str) -> ModelFacts:
    """What is known of a model, without its weights; of one on the Hub, its config is fetched."""
    config = published_config(name)
    if config is not None:
        return _published(name, config)
    arch, tag = split_model_name_tag(name)
    if arch not in (fnets := list_fnets()) + (srnets := list_srnets()):
        raise ValueError(did_you_mean("model", name, fnets + srnets))
    kind: Kind = "FNet" if arch in fnets else "SRNet"
    shape = _measure(kind, arch)
    try:
        weights = get_weights(name)
    except NotFoundError:
        cfg = get_pretrained_cfg(name)  # of a plug-in whose weights timm loads
        if tag and cfg is None:
            raise
        return ModelFacts(name, kind, *shape, licence=getattr(cfg, "license", None) or "")
    kept = find_kept(name)
    size = weights.size or (kept.stat().st_size if kept and zoo_folder() in kept.parents else None)
    told = (weights.licence, weights.training_data, weights.lfw, size)
    return ModelFacts(name, kind, *shape, *told, kept is not None)


def _published(name: str, config: dict[str, Any]) -> ModelFacts:
    """The facts of a folder, or of a repository of the Hub."""
    told = config["idloss"]
    an_srnet = told.get("kind") == "srnet" or config["architecture"] in list_srnets()
    kind: Kind = "SRNet" if an_srnet else "FNet"
    file = find_file(name)
    return ModelFacts(
        name,
        kind,
        *_count(kind, name),
        licence=(config.get("pretrained_cfg") or {}).get("license") or "",
        training_data=told.get("training_data") or "",
        size=file.stat().st_size if file else None,
        cached=file is not None,
    )


def fetch_model(name: str) -> Path:
    """Get a model's weights, or verify those that are here, so that no network is needed."""
    if published_config(name) is None:
        return fetch(name)
    facts = describe_model(name)
    # opening it checks each tensor
    (create_fnet if facts.kind == "FNet" else create_srnet)(name, pretrained=True)
    return find_file(name) or Path(name.partition(":")[2])


def find_file(name: str) -> Path | None:
    """The weights of a model, if they are here; nothing is verified."""
    place = name.partition(":")[2]
    if name.startswith(("hf-hub:", "hf_hub:")):
        repo, _, revision = place.partition("@")
        found = try_to_load_from_cache(repo, "model.safetensors", revision=revision or None)
        return Path(found) if isinstance(found, str) else None
    if place or name in zoo_models():
        file = Path(place or zoo_folder() / name, "model.safetensors")
        return file if file.is_file() else None
    return find_kept(name)


def _count(kind: Kind, name: str) -> _Shape:
    """Parameters, multiply-adds, input and crop of a network, found from shapes alone."""
    with torch.device("meta"), torch.no_grad():
        model: Any = (create_fnet if kind == "FNet" else create_srnet)(name).eval()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        crop: Any = getattr(model, "crop", None)
        counted = size = None
        # a network of others may need more than shapes, or say nothing of its input
        with suppress(Exception), FlopCounterMode(display=False) as counter:
            size = tuple(model.pretrained_cfg["input_size"])
            model(torch.zeros(1, *size))
            counted = counter.get_total_flops() // 2
    return parameters, counted, size and size[-2:], getattr(crop, "name", crop)


@functools.cache
def _measure(kind: Kind, arch: str) -> _Shape:
    """The same of a registered network, if it can be made so."""
    with suppress(Exception):
        return _count(kind, arch)
    return None, None, None, None


def find_models(
    pattern: str = "",
    *,
    kind: str | None = None,
    pretrained: bool = False,
    cached: bool = False,
    licence: str = "",
    crop: str | None = None,
) -> list[ModelFacts]:
    """The models that there are: registered ones, plug-ins' included, and those in the zoo.

    `pattern` is a wildcard for names with or without tags; `kind` is `"fnet"` or `"srnet"`;
    `licence` is a part of what is asked for.
    """
    kind = kind and kind.lower()
    if kind not in (None, "fnet", "srnet"):
        raise ValueError(did_you_mean("kind of model", str(kind), ("fnet", "srnet")))
    crop = crop and get_template(crop).name
    names = []
    for one, listed in (("fnet", list_fnets), ("srnet", list_srnets)):
        tagged = listed(pretrained=True)
        having = {split_model_name_tag(name)[0] for name in tagged}
        bare = [] if pretrained else [name for name in listed() if name not in having]
        names += sorted([*tagged, *bare]) if kind in (None, one) else []
    known = {split_model_name_tag(name)[0] for name in (*list_fnets(), *list_srnets())}
    names += [name for name in zoo_models() if split_model_name_tag(name)[0] not in known]
    wanted = [
        name
        for name in names
        if not pattern or any(fnmatch(n, pattern) for n in (name, split_model_name_tag(name)[0]))
    ]
    facts = map(describe_model, tqdm(wanted, desc="models", unit="model", delay=2, leave=False))
    return [
        one
        for one in facts
        if kind in (None, one.kind.lower())
        and licence.lower() in one.licence.lower()
        and crop in (None, one.crop)
        and (one.cached or not cached)
    ]


# --- results and the zoo's page ------------------------------------------------------------------


def keep_results(results: Results, path: str | os.PathLike[str], **notes: str) -> Path:
    """Write what was measured as a table for `zoo/results/`, under lines that say how.

    `notes` are what the run does not know: its commit, the recipe of its networks, hardware.
    """
    about = results.environment
    told = {
        **{key: circumstances(results).get(key, "") for key in _KEPT},
        "content": results.run["data"]["list"],
        "processor": about.get("gpu") or about["processor"],
        "created": results.created,
        **notes,
    }
    lines = [f"# {key}: {' '.join(str(value).split())}\n" for key, value in told.items()]
    with written_whole(Path(path)) as temporary:
        temporary.write_text("".join(lines) + results.to_csv(), encoding="utf-8")
    return Path(path)


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read what `keep_results` wrote; its lines are `Results.run`."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    notes = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    try:
        rows = csv.DictReader(line for line in lines if not line.startswith("#"))
        return Results(notes, [_record(row) for row in rows], environment={})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of results: {error!r}") from error


def _record(row: dict[str, str]) -> Record:
    size = int(row["height"]), int(row["width"])
    cell = Cell(cast("Any", row["task"]), row["fnet"], row["srnet"], *size)
    figures = {key: float(row[key] or "nan") for key in ("value", "mean", "std", "low", "high")}
    return Record(cell, row["metric"], Estimate(**figures, repeats=int(row["repeats"])))


def result_tables(results: Iterable[Results], models: Collection[str] = ()) -> list[str]:
    """The paper's tables in Markdown, under what was measured and how; of `models` only."""
    tables = []
    for one in results:
        told = circumstances(one)
        for task in dict.fromkeys(cell.task for cell in one.cells()):
            if models and not any({c.fnet, c.srnet} & {*models} for c in one.cells(task)):
                continue
            title = metric_title(one.select(task)[0].metric)
            notes = [f"{key} {told[key]}" for key in _NOTES if told.get(key)]
            caption = f"{title} in %, {told['data']}, protocol `{told['protocol']}`"
            table = paper_table(one, task, deviation=task != "verification")
            command = f"\n```bash\n{told['command']}\n```\n" if told.get("command") else ""
            tables.append(f"{'; '.join([caption, *notes])}:\n\n{table}{command}".rstrip())
    return tables


def circumstances(results: Results) -> dict[str, str]:
    """What a run, or a table that is kept of one, tells of itself: data, protocol, command."""
    told = {}
    for key, value in results.run.items():
        named = value.get("name", "") if isinstance(value, dict) else value
        told[key] = " ".join(map(str, named)) if isinstance(named, list) else str(named)
    return told


def zoo_results() -> list[Results]:
    """What was measured and is kept in `zoo/results/`."""
    return [read_results(path) for path in sorted(zoo_folder().glob("results/*.csv"))]


def markdown() -> str:
    """The page `zoo/README.md`: idloss's own models and what was measured with them."""
    own = [facts for facts in find_models() if _is_ours(facts.name)]
    parts = [
        "# The zoo",
        "Every model of idloss by its name: `idloss.create_fnet(NAME, pretrained=True)` or "
        "`idloss.create_srnet(NAME, pretrained=True)`; `idloss info NAME` tells where its weights "
        "come from. Those with a folder here come with the package. This page is made by "
        "`idloss list --markdown > zoo/README.md`.",
    ]
    for kind in ("FNet", "SRNet"):
        lines = [[*HEADS[:1], *HEADS[2:]]]
        lines += [[_linked(row[0]), *row[2:]] for row in (f.row() for f in own if f.kind == kind)]
        parts += [f"## {kind}s", markdown_table(lines, left=(0, 4, 5, 6)).rstrip()]
    if tables := result_tables(zoo_results()):
        parts += ["## Results", *tables]
    if studies := sorted((zoo_folder() / "studies").glob("*.yaml")):
        parts += [
            "## Studies",
            "What decides the result, and [what came out](studies/README.md); on faces that "
            "`idloss prepare folder photos faces --exclude-overlap lfw.tar` wrote.",
            *map(_study, studies),
        ]
    return "\n\n".join(parts) + "\n"


def _study(path: Path) -> str:
    """What a study asks and the command that makes it again: its file's first two lines."""
    asked, command = path.read_text(encoding="utf-8").replace("# ", "").splitlines()[:2]
    return f"{asked}\n\n```bash\n{command}\n```"


def _linked(name: str) -> str:
    """A name in Markdown, with a link to the model's card where it has one here."""
    folder = split_model_name_tag(name)[0] if name not in zoo_models() else name
    card = zoo_folder() / folder / "README.md"
    return f"[`{name}`]({folder}/README.md)" if card.is_file() else f"`{name}`"


def _is_ours(name: str) -> bool:
    """Whether a model is the package's, not a plug-in's."""
    arch = split_model_name_tag(name)[0]
    if name in zoo_models():
        return True
    return bool(model_entrypoint(timms_name(arch)).__module__.startswith("idloss."))
