"""Whole runs from a recipe: faces, networks, checks, training, and the saved network."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]
from torch import nn

from idloss import __version__
from idloss.create import create_fnet, create_srnet
from idloss.data import Faces, open_evaluation, open_faces
from idloss.degradation import Degradation
from idloss.encoder import FaceEncoder
from idloss.errors import some_of
from idloss.evaluation import HR, evaluate, write_sheets
from idloss.geometry import get_template
from idloss.losses import HallucinationLoss
from idloss.registry import SRNET_CROP
from idloss.training.batches import check_crop, stored_features
from idloss.training.engine import Engine, Validate, create_accelerator
from idloss.training.recipe import (
    FNetRecipe,
    Recipe,
    RunOptions,
    load_recipe,
    read_notes,
    save_recipe,
)
from idloss.training.saving import (
    Kind,
    cfg_of,
    name_of,
    save_network,
    together,
    try_to_save,
    unwrapped,
)
from idloss.training.tasks import (
    Distillation,
    FaceTask,
    FNetTask,
    Hallucination,
    HallucinationTask,
    Recognition,
    only_labelled,
)

RECIPE, MODEL = "recipe.yaml", "model"
REPLACED = {
    "srnet": {"srnet", "srnet_options", "pretrained"},
    "criterion": {"fnet", "identity_weight", "distance", "interpolation", "image_loss"},
    "degradation": {"degradation", "degradation_options"},
    "fnet": {"fnet", "fnet_options", "pretrained"},
    "teacher": {"teacher"},
}
"""Fields of a recipe that do not hold where a thing was given instead."""


def train(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    faces: Faces | None = None,
    srnet: nn.Module | None = None,
    criterion: HallucinationLoss | None = None,
    degradation: Degradation | None = None,
) -> nn.Module:
    """Train an SRNet.

    What is given takes the place of what the recipe names: the way to try a network, a loss or a
    degradation of one's own.

    Args:
        recipe: What to do.
        folder: Where everything goes: `recipe.yaml`, `training.csv`, `checkpoints/`, `pictures/`,
            and at the end `model/`, which `open_trained` opens.
        resume: Go on from the newest whole checkpoint in the folder. Fields in
            `recipe.CHANGEABLE` may have other values from there on; `recipe.yaml` tells them.
        faces: Faces to train on.
        srnet: The network; a compiled or data-parallel one is unwrapped, and its `crop` is set.
        criterion: The losses.
        degradation: From HR to LR.

    Returns:
        The trained network, in eval mode.

    Raises:
        ValueError: Something does not fit, or the network cannot be saved; before training starts,
            in one line that says what to change.
        FileNotFoundError: There are no data where the recipe says.
        FileExistsError: The folder holds a run and `resume` is False.
        TrainingStoppedError: Training ended before its time.
        OSError: The disk is full, or no checkpoint is whole.
    """
    given = {"srnet": srnet, "criterion": criterion, "degradation": degradation}
    network = unwrapped(srnet) if srnet is not None else None
    recipe = recipe.follow(network)
    run = _Run(recipe, Path(folder), faces, given, resume=resume)
    if network is None:
        network = create_srnet(recipe.srnet, pretrained=recipe.pretrained, **recipe.srnet_options)
    network = create_srnet(network, crop=recipe.crop)  # which it carries from now on
    if criterion is None:
        criterion = HallucinationLoss(
            recipe.fnet,
            weight=recipe.identity_weight,
            image_loss=recipe.image_loss,
            crop=recipe.crop,
            distance=recipe.distance,
            interpolation=recipe.interpolation,
        )
    module = Hallucination(network, criterion)
    _check_fit(recipe, module)
    task = HallucinationTask(module, network, run.faces, recipe, run.device, degradation)
    judge = recipe.fnet if isinstance(recipe.fnet, str) else next(iter(recipe.fnet))
    validate = _validation(run, judge)
    identity = criterion.identity
    if recipe.store_hr_features and identity is not None:
        if run.faces.crop is None:
            run.accelerator.print("photos are read anew each time: HR features are not stored")
        else:
            # one process of each machine computes them, the others read its file
            with run.accelerator.local_main_process_first():
                first = run.accelerator.is_local_main_process
                task.take_features(stored_features(run.faces, identity, run.device, progress=first))
    return run.carry_out(task, "srnet", (1, 3, *recipe.lr_sizes()[0]), validate)


def train_fnet(
    recipe: FNetRecipe,
    folder: str | Path,
    *,
    resume: bool = False,
    faces: Faces | None = None,
    fnet: nn.Module | None = None,
    teacher: nn.Module | None = None,
) -> nn.Module:
    """Train an FNet.

    What is given takes the place of what the recipe names.

    Args:
        recipe: What to do.
        folder: As for `train`.
        resume: As for `train`.
        faces: Faces to train on.
        fnet: The network.
        teacher: An FNet whose embeddings are to be learned.

    Returns:
        The trained network, in eval mode.

    Raises:
        ValueError: As for `train`, like the others: `FileNotFoundError`, `FileExistsError`,
            `TrainingStoppedError` and `OSError`.
    """
    run = _Run(recipe, Path(folder), faces, {"fnet": fnet, "teacher": teacher}, resume=resume)
    network = create_fnet(
        recipe.fnet if fnet is None else unwrapped(fnet),
        pretrained=recipe.pretrained,
        **(recipe.fnet_options if fnet is None else {}),
    )
    taught_by = teacher or recipe.teacher
    if taught_by is None:
        run.faces, left_out = only_labelled(run.faces)
        if left_out:
            run.accelerator.print(left_out)
    module: Recognition | Distillation
    if taught_by is not None:
        encoder = FaceEncoder(taught_by, crop=recipe.crop)
        check_crop(encoder, recipe.crop)
        module = Distillation(network, encoder)
    else:
        from idloss.training.margins import get_margin  # slow to import

        width: Any = network.num_features
        identities = len(run.faces.identities)
        margin = get_margin(recipe.margin, identities, width, **recipe.margin_options)
        module = Recognition(network, margin)
    task = FNetTask(module, run.faces, recipe, run.device)
    check_crop(task.input, recipe.crop)
    shape = (2, *network.pretrained_cfg["input_size"])  # type: ignore[index]
    return run.carry_out(task, "fnet", shape, _validation(run))


class _Run:
    """How every run on faces begins and ends; `given` is what takes the place of names."""

    def __init__(
        self,
        recipe: RunOptions,
        folder: Path,
        faces: Faces | None,
        given: Mapping[str, object],
        *,
        resume: bool,
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.given = {name: name_of(one) for name, one in given.items() if one is not None}
        self.resume = resume
        self.changes = _changes(recipe, folder, resume=resume)
        self.accelerator = create_accelerator(recipe, folder)
        self.device = self.accelerator.device
        self.faces = _chosen_faces(recipe, faces)
        torch.manual_seed(recipe.seed)

    def carry_out(
        self,
        task: FaceTask,
        kind: Kind,
        shape: tuple[int, ...],
        validate: Validate | None,
    ) -> nn.Module:
        """Try to save, train, save; `shape` is that of an input of the network."""
        engine = Engine(task, self.recipe, self.folder, self.accelerator, validate=validate)
        told = self._told(task.network, kind)
        model, path = self.folder / MODEL, self.folder / RECIPE
        self.folder.mkdir(parents=True, exist_ok=True)

        def try_out() -> None:
            probe = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
            own = try_to_save(task.network, model, told, probe)
            told["registered"] = not own
            if own:
                print(f"the saved network will open with open_trained(folder, network): {own}")

        def start(step: int) -> None:
            changes = [f"from step {step + 1} on: {change}" for change in self.changes]
            if changes:
                print("\n".join(changes))
            save_recipe(self.recipe, path, (*read_notes(path), *changes))

        def keep() -> None:
            told["changes"] = read_notes(path)
            save_network(trained, model, told)

        with ExitStack() as stack:
            lock = WeakFileLock(self.folder / ".lock", timeout=1)
            try:  # processes that were not launched together are runs of their own
                together(self.accelerator, lambda: stack.enter_context(lock))
            except TimeoutError as error:
                raise FileExistsError(
                    f"another process trains in {self.folder}: wait for it, or choose another "
                    "folder; launch processes of one run with torchrun or accelerate launch"
                ) from error
            together(self.accelerator, try_out)
            trained = engine.run(resume=self.resume, on_start=start)
            try:
                together(self.accelerator, keep)
            except OSError as error:
                raise OSError(
                    f"the trained network cannot be written to {model} ({error}): its checkpoint "
                    "is whole, make room and resume"
                ) from error
        return trained

    def _told(self, network: nn.Module, kind: Kind) -> dict[str, Any]:
        """What a saved network tells of its run."""
        left_out = self.recipe.PASSIVE.union(*(REPLACED[name] for name in self.given))
        told: dict[str, Any] = {
            "idloss": __version__,
            "kind": kind,
            "class": name_of(network),
            "registered": True,
            "recipe": self.recipe.model_dump(mode="json", exclude=set(left_out)),
            "given": self.given,
            "data": {
                "sha256": self.faces.content,
                "faces": len(self.faces),
                "identities": len(self.faces.identities),
            },
        }
        if isinstance(crop := getattr(network, "crop", None), str):
            told["crop"] = crop  # create_fnet and create_srnet take it from here
        cfg = cfg_of(network)
        # one that was given may have weights: ours has a tag only then
        ours = type(network).__module__.startswith("idloss.")
        if cfg.get("tag") and ours if kind in self.given else self.recipe.pretrained:
            facts = ("architecture", "tag", "license", "origin_url")
            told["began_with"] = {key: cfg[key] for key in facts if key in cfg}
        return told


def _changes(recipe: RunOptions, folder: Path, *, resume: bool) -> list[str]:
    """What a resumed run changes of its recipe; refuses what would make it another run."""
    written = folder / RECIPE
    if not written.is_file():
        return []
    if not resume:
        raise FileExistsError(f"{folder} holds a run: resume it, or choose another folder")
    before = load_recipe(written, (), type(recipe)).model_dump(mode="json")
    changed = {
        name: f"{name} was {before.get(name)!r} and is {value!r}"
        for name, value in recipe.model_dump(mode="json", exclude=set(recipe.PASSIVE)).items()
        if before.get(name) != value
    }
    fixed = [changed[name] for name in sorted(changed.keys() - recipe.CHANGEABLE)]
    if fixed:
        raise ValueError(
            f"the run in {folder} cannot be resumed with another recipe: {'; '.join(fixed)}"
        )
    return list(changed.values())


def _chosen_faces(recipe: RunOptions, faces: Faces | None) -> Faces:
    """The faces given, or those that a recipe names, without those that it excludes."""
    if faces is None:
        if recipe.data is None:
            raise ValueError("there are no faces to train on: set data=FOLDER")
        faces = open_faces(recipe.data, skip_missing=recipe.skip_missing)
    if not recipe.exclude:
        return faces
    unwanted = set(recipe.exclude)
    unknown = unwanted - set(faces.names) - set(faces.identities)
    if unknown:
        raise ValueError(
            f"exclude names {some_of(sorted(unknown))}: neither images nor identities of "
            f"{recipe.data or 'the faces given'}"
        )
    labels = [-1] * len(faces) if faces.labels is None else faces.labels.tolist()
    keep = [
        name not in unwanted and (label < 0 or faces.identities[label] not in unwanted)
        for name, label in zip(faces.names, labels, strict=True)
    ]
    return faces.select(torch.tensor(keep))


@torch.no_grad()
def _check_fit(recipe: Recipe, module: Hallucination) -> None:
    """Find out before training whether crop, FNet, SRNet and sizes fit each other."""
    height, width = get_template(recipe.crop).size
    identity = module.criterion.identity
    for encoder in identity.encoders if identity is not None else ():
        assert isinstance(encoder, FaceEncoder)
        taken_for = encoder.crop or encoder.fnet_crop
        if taken_for not in (None, get_template(recipe.crop)):
            raise ValueError(
                f"{encoder} takes faces for {taken_for.name!r} crops and the recipe says "
                f"crop={recipe.crop}: give the criterion crop={recipe.crop!r}"
            )
        check_crop(encoder, recipe.crop)
    training = module.training
    module.eval()
    for rows, columns in recipe.lr_sizes():
        try:
            sr = module.srnet(torch.zeros(1, 3, rows, columns))
        except RuntimeError as error:
            raise ValueError(
                f"{type(module.srnet).__name__} does not take a {rows}x{columns} face, float32 RGB "
                f"[1, 3, {rows}, {columns}]: {error}"
            ) from error
        if sr.ndim != 4 or sr.shape[1] != 3:
            raise ValueError(
                f"{type(module.srnet).__name__} gave {list(sr.shape)} for a {rows}x{columns} face: "
                "an SRNet gives RGB [B, 3, H, W]"
            )
        if sr.shape[-2] > height or sr.shape[-1] > width:
            raise ValueError(
                f"size {rows}x{columns} does not fit: its SR of {sr.shape[-2]}x{sr.shape[-1]} is "
                f"larger than the {height}x{width} crops it is compared with"
            )
    module.train(training)


def _validation(run: _Run, fnet_name: str | None = None) -> Validate | None:
    """Verify pairs by a published FNet on what an SRNet restores, or by the FNet that trains.

    The rates of right answers (protocol `paper`) are named by probe size (`7x6`), and `HR`. For an
    SRNet the first faces are drawn, too; for an FNet probes are enlarged.
    """
    recipe, device = run.recipe, run.device
    if recipe.validate_on is None:
        if recipe.validate_every:
            raise ValueError("validate_every needs faces to verify: set validate_on=LFW")
        return None
    data = open_evaluation(recipe.validate_on)
    if data.pairs is None:
        raise ValueError(f"validate_on={recipe.validate_on} has no pairs to verify")
    sizes = recipe.lr_sizes() if fnet_name else recipe.sizes_by_factor(SRNET_CROP)
    judge = create_fnet(fnet_name, pretrained=True) if fnet_name else None
    enlarged = create_srnet("bilinear")

    def validate(network: nn.Module, step: int) -> dict[str, float]:
        fnets = {"fnet": network if judge is None else judge}
        srnets = {"srnet": enlarged if judge is None else network}
        results = evaluate(data, fnets, srnets, sizes, device=device, cache=False, progress=False)
        rates = {
            "HR" if record.cell.srnet == HR else record.cell.size: record.estimate.value
            for record in results.records
            if record.metric == "accuracy"
        }
        if judge is not None:
            del rates["HR"]  # always the same
            sheets = run.folder / "pictures" / f"step-{step:06d}"
            shown = {"bicubic": create_srnet("bicubic", crop=recipe.crop), "srnet": network}
            try:
                write_sheets(sheets, data, fnets, shown, sizes, count=5, device=device)
            except OSError as error:
                print(f"no pictures in {sheets} ({error}): training goes on. Make room")
        return rates

    return validate
