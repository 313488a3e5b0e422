"""A model to the Hub: its files, a card that says what it is, and only what its licence allows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from timm.models import get_pretrained_cfg, model_entrypoint, save_for_hf, split_model_name_tag
from torch import nn

from idloss import __version__
from idloss.catalogue import (
    ModelFacts,
    circumstances,
    describe_model,
    find_file,
    result_tables,
    zoo_results,
)
from idloss.create import create_fnet, create_srnet, published_config
from idloss.evaluation import HR, Results
from idloss.registry import list_fnets, list_srnets
from idloss.weights.files import NotAllowedError, TryAgain, UnreachableError
from idloss.weights.sources import hub_errors, offline

# The Hub's names of licences (huggingface.co/docs/hub/repositories-licenses) that let anybody pass
# weights on under the same terms.
_FREE = {
    *("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "unlicense", "gpl-3.0", "lgpl-3.0"),
    *("mpl-2.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
}
# Others that do: the Hub has no name for them.
_FREE_TOO = {"cc-by-nc", "cc-by", "research use only, as CelebA is", "celeba-research-only"}

_CITATION = """\
@inproceedings{lai2019identity,
  title     = {Low-Resolution Face Recognition Based on Identity-Preserved Face Hallucination},
  author    = {Lai, Shun-Cheung and He, Chen-Hang and Lam, Kin-Man},
  booktitle = {2019 IEEE International Conference on Image Processing (ICIP)},
  year      = {2019}
}"""


@dataclass(frozen=True)
class Publication:
    """The files in `folder`, and nothing else, that are to go to `repo` on the Hub."""

    repo: str
    folder: Path
    private: bool

    @property
    def card(self) -> str:
        """The model card."""
        return (self.folder / "README.md").read_text(encoding="utf-8")

    def upload(self) -> str:
        """Make the repository where there is none, commit the files, and give the commit's hash."""
        if offline():
            raise UnreachableError(f"{self.repo}: HF_HUB_OFFLINE forbids the network: unset it")
        api = HfApi(library_name="idloss", library_version=__version__)
        try:
            with hub_errors(f"publishing to {self.repo}", self.repo):
                # None: as the owner's organisation has it
                made = api.create_repo(self.repo, private=self.private or None, exist_ok=True)
                # the Hub leaves a repository that exists as public as it is
                if self.private and not api.model_info(made.repo_id).private:
                    raise NotAllowedError(
                        f"{self.repo} exists and is public: make it private on its page, or "
                        "name another"
                    )
                message = f"Publish by idloss {__version__}"
                commit = api.upload_folder(
                    repo_id=made.repo_id, folder_path=self.folder, commit_message=message
                )
        except TryAgain as again:
            raise again.error from again
        return str(commit.oid)


def prepare_publication(
    model: str,
    repo: str,
    folder: Path,
    *,
    private: bool = False,
    licence: str | None = None,
    training_data: str | None = None,
    results: Sequence[Results] = (),
) -> Publication:
    """Write what publishing a model needs, and see that it opens again; nothing is uploaded.

    Args:
        model: A name with weights, `"local-dir:path"`, the folder of a run, or of a model.
        repo: `owner/name` on the Hub.
        folder: Empty folder for the files.
        private: For few people only, whatever the licence says.
        licence: Of a model of one's own.
        training_data: What such a model was trained on, in words.
        results: What was measured with it, beside what `zoo/results/` has.
    """
    validate_repo_id(repo)
    if "/" not in repo:
        raise ValueError(f"--to takes owner/name, got {repo!r}")
    name = _find(model)
    facts = describe_model(name)
    config = published_config(name) or {}
    told: dict[str, Any] = config.get("idloss", {})
    data = told.get("data")
    counted = f"{data['faces']:,} faces of {data['identities']:,} people" if data else ""
    terms = _licence(facts, licence, told.get("began_with", {}).get("license"), private=private)
    facts = replace(
        facts,
        licence=terms,
        crop=facts.crop or told.get("recipe", {}).get("crop"),
        training_data=training_data or facts.training_data or counted,
    )
    create = create_fnet if facts.kind == "FNet" else create_srnet
    network = create(name, pretrained=True).eval()
    own = {"kind": facts.kind.lower(), "crop": facts.crop, "training_data": facts.training_data}
    cfg: dict[str, Any] = dict(network.pretrained_cfg)  # type: ignore[arg-type]
    save_for_hf(
        network,
        str(folder),
        model_config={
            "idloss": told | {key: value for key, value in own.items() if value},
            "pretrained_cfg": {"license": terms},
        },
        model_args=config.get("model_args"),
        safe_serialization=True,
    )
    _check_opens(network, create(f"local-dir:{folder}", pretrained=True).eval(), name, cfg)
    measured = [*result_tables(zoo_results(), _labels(facts.name)), *result_tables(results)]
    text = _card(facts, repo, cfg, config)
    text += "\n## Measured\n\n" + ("\n\n".join(measured) or "Nothing, with `idloss evaluate`.")
    text += f"\n\n{_notes(name)}## Citation\n\n```bibtex\n{_CITATION}\n```\n"
    metadata = _metadata(facts, repo, [*zoo_results(), *results])
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")
    card.save(folder / "README.md")
    return Publication(repo, folder, private)


def _find(model: str) -> str:
    """The name of a model; of the folder of a run or a model, where it is no other name."""
    if model.startswith(("hf-hub:", "hf_hub:")):
        raise ValueError(f"{model} is on the Hub already")
    known = {*list_fnets(), *list_srnets()}
    if split_model_name_tag(model)[0] not in known:
        for folder in (Path(model), Path(model, "model")):
            if (folder / "config.json").is_file():
                return f"local-dir:{folder}"
    return model


def _licence(facts: ModelFacts, own: str | None, before: str | None, *, private: bool) -> str:
    """The licence to publish under; `ValueError` where it forbids that or there is none."""
    if own and facts.licence and own != facts.licence:
        raise ValueError(
            f"{facts.name} is under another licence ({facts.licence}) than {own!r}; --licence is "
            "for models of your own"
        )
    terms = facts.licence or own
    if not terms:
        raise ValueError(f"{facts.name} has no licence: say yours, such as --licence mit")
    for what, text in (("its licence", facts.licence), ("that of what it began with", before)):
        if text and text not in _FREE | _FREE_TOO and not private:
            raise ValueError(
                f"{facts.name} may not be published, by {what} ({text}): ask who owns it, or "
                "publish it with --private for who may have it"
            )
    return terms


@torch.no_grad()
def _check_opens(network: nn.Module, opened: nn.Module, name: str, cfg: dict[str, Any]) -> None:
    probe = torch.rand(1, *cfg["input_size"], generator=torch.Generator().manual_seed(0))
    if not torch.equal(network(probe), opened(probe)):
        raise ValueError(f"{name} opens as another network from its own files: was it changed?")


def _labels(name: str) -> set[str]:
    """What a model is called in results: its name, and without its tag if that is the default."""
    if name.startswith("local-dir:"):
        return {name}
    arch, tag = split_model_name_tag(name)
    cfg = get_pretrained_cfg(arch)
    default = cfg.tag if cfg is not None else ""
    return {name, arch, f"{arch}.{default}"} if tag in ("", default) else {name}


def _notes(name: str) -> str:
    """What the card in its folder says of a model, without the metadata and the headline."""
    file = find_file(name)
    card = file.parent / "README.md" if file else None
    if card is None or not card.is_file():
        return ""
    text = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).text
    return "## Notes\n\n" + re.sub(r"\A\s*# .*\n", "", text).strip() + "\n\n"


def _card(
    facts: ModelFacts, repo: str, cfg: Mapping[str, Any], published: Mapping[str, Any]
) -> str:
    """What a model is, how to get it and, where a run made it, by what recipe."""
    call, arch = facts.kind.lower(), str(cfg["architecture"])
    entry = model_entrypoint(arch)
    arguments = ", ".join(f"{key}={one}" for key, one in published.get("model_args", {}).items())
    # an entry point tells of the weights that it was registered with, and of no others
    what = f"`{arch}` with {arguments}." if arguments else f"`{arch}`."
    if not published:
        what = f"`{arch}`: {(entry.__doc__ or '').strip().splitlines()[0]}"
    origin = str(cfg.get("origin_url") or "")  # one in the zoo has no address
    recipe = published.get("idloss", {}).get("recipe", {})
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in recipe.items())
    training = f"\n## Recipe\n\n```yaml\n{lines}\n```\n" if recipe else ""
    height, width = cfg["input_size"][-2:]
    takes = f"{height}x{width} RGB, normalised by mean {cfg['mean']} and std {cfg['std']}"
    rows = {
        "takes": takes if call == "fnet" else f"RGB in [0, 1], such as {height}x{width}",
        "crop": facts.crop or "any",
        "parameters": f"{facts.parameters or 0:,}",
        "multiply-adds": f"{facts.multiply_adds or 0:,} for one such image",
        "training data": facts.training_data or "not told",
        "licence": facts.licence,
        "LFW, its authors' figure": "" if facts.lfw is None else f"{facts.lfw} %",
        "origin": origin if origin.startswith("https:") else "",
    }
    told = {key: " ".join(str(value).split()).replace("|", "\\|") for key, value in rows.items()}
    table = "\n".join(f"| {key} | {value} |" for key, value in told.items() if value)
    packages = dict.fromkeys(["idloss", "timm", "torch", entry.__module__.partition(".")[0]])
    return f"""\
# {repo.partition("/")[2]}

{what}

| {facts.kind} | |
|---|---|
{table}

```python
import {", ".join(packages)}

{call} = idloss.create_{call}("hf-hub:{repo}", pretrained=True).eval()
{call} = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
{call} = torch.hub.load("<owner>/idloss", "{call}", "hf-hub:{repo}").eval()
```
{training}"""


def _metadata(facts: ModelFacts, repo: str, results: Sequence[Results]) -> ModelCardData:
    """What the Hub sorts models by."""
    terms = facts.licence
    named = terms if terms in _FREE else None
    an_fnet, labels = facts.kind == "FNet", _labels(facts.name)
    figures = [
        EvalResult(
            task_type=record.cell.task,
            dataset_type="faces",
            dataset_name=told["data"],
            dataset_config=f"{record.cell.size}, {record.cell.fnet}",
            metric_type=record.metric,
            metric_value=round(record.estimate.value, 4),
            metric_args={"protocol": told["protocol"]},
        )
        for told, one in zip(map(circumstances, results), results, strict=True)
        for record in one.records
        if (record.cell.fnet if an_fnet else record.cell.srnet) in labels
        and (record.cell.srnet == HR or not an_fnet)
    ]
    return ModelCardData(
        license=named or "other",
        license_name=None if named else re.sub(r"[^a-z0-9.]+", "-", terms.lower()).strip("-"),
        library_name="timm",
        pipeline_tag="image-feature-extraction" if an_fnet else "image-to-image",
        tags=["idloss", "face-recognition" if an_fnet else "face-super-resolution"],
        model_name=repo.partition("/")[2],
        eval_results=figures or None,
    )
