"""A whole run of an FNet from a recipe; see `idloss.training.run` for that of an SRNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from idloss.data import EvaluationSet
from idloss.degradation import get_degradation
from idloss.encoder import FaceEncoder
from idloss.evaluation.embedding import SR_CROP
from idloss.registry import create_fnet, create_srnet
from idloss.resample import Size
from idloss.training.accelerator import create_accelerator
from idloss.training.crops import Crops, Faces
from idloss.training.engine import Engine
from idloss.training.fnet_recipe import FNetRecipe
from idloss.training.folder import MODEL, RECIPE, check_folder, save_network
from idloss.training.opening import check_crop, content_of, open_all_but, open_pairs
from idloss.training.recipe import save_recipe
from idloss.training.recognition import (
    Distillation,
    DistillationTask,
    LowResolution,
    Recognition,
    RecognitionTask,
    Views,
    labels_of,
)
from idloss.training.validation import verification_rates

INPUT = frozenset({"input_size", "mean", "std", "crop"})
"""What `create_fnet` takes for itself and `pretrained_cfg` keeps: no arguments of the network."""


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
        folder: Where everything goes: `recipe.yaml`, `training.csv`, `checkpoints/`, and at the end
            `model/`, which `create_fnet("local-dir:FOLDER/model", pretrained=True)` opens.
        resume: Go on from the newest checkpoint in the folder.
        faces: Faces to train on.
        fnet: The network.
        teacher: An FNet whose embeddings are to be learned.

    Returns:
        The trained network, in eval mode.

    Raises:
        ValueError: Something does not fit; before training starts, in one line that says what to
            change.
        FileNotFoundError: There are no data where the recipe says.
        FileExistsError: The folder holds a run and `resume` is False.
        TrainingStoppedError: Training ended before its time.
        OSError: The disk is full.
    """
    folder = Path(folder)
    check_folder(recipe, folder, resume=resume)
    accelerator = create_accelerator(recipe, folder)
    device = accelerator.device
    if faces is None:
        faces = open_all_but(recipe.data, recipe.exclude, skip_missing=recipe.skip_missing)
    torch.manual_seed(recipe.seed)
    network = create_fnet(
        fnet if fnet is not None else recipe.fnet,
        pretrained=recipe.pretrained,
        **({} if fnet is not None else recipe.fnet_options),
    )
    taught_by = teacher or recipe.teacher
    if taught_by is None:
        faces, left_out = only_labelled(faces)
        if left_out:
            accelerator.print(left_out)
    views = Views(
        Crops(
            faces, template=recipe.crop, device=device, keep=recipe.crops, workers=recipe.workers
        ),
        network,
        seed=recipe.seed,
        low_resolution=_low_resolution(recipe),
        channels_last=recipe.channels_last,
    )
    check_crop(views.input, recipe.crop)
    content = content_of(faces)
    task: RecognitionTask | DistillationTask
    if taught_by is not None:
        encoder = FaceEncoder(taught_by, crop=recipe.crop)
        check_crop(encoder, recipe.crop)
        task = DistillationTask(Distillation(network, encoder).to(device), views, content=content)
    else:
        task = RecognitionTask(
            _with_margin(recipe, network, faces).to(device), views, content=content
        )
    engine = Engine(
        task,
        recipe,
        folder,
        accelerator,
        validate=_validation(recipe, str(device)),
        validate_every=recipe.validate_every,
    )
    if accelerator.is_main_process:
        save_recipe(recipe, folder / RECIPE)
    trained = engine.run(resume=resume)
    if accelerator.is_main_process:
        arguments = {} if fnet is not None else recipe.fnet_options
        own = {name: value for name, value in arguments.items() if name not in INPUT}
        save_network(trained, folder / MODEL, own)
    accelerator.wait_for_everyone()
    return trained


def only_labelled(faces: Faces) -> tuple[Faces, str]:
    """Leave out faces of nobody known, and identities without faces.

    Args:
        faces: The faces.

    Returns:
        Those of known identities, and a line that says what was left out, if anything was.
    """
    if faces.labels is None:
        return faces, ""
    known = faces.labels >= 0
    kept = faces.select(known)
    counts = {
        "faces of nobody known": len(faces) - len(kept),
        "identities without faces": len(faces.identities) - len(kept.identities),
    }
    lost = [f"{count} {what}" for what, count in counts.items() if count]
    return (kept, f"left out: {', '.join(lost)}") if lost else (faces, "")


class FNetVerification:
    """Verifies pairs with an FNet as it is, protocol `paper`: HR, and probes nobody restored.

    Args:
        data: The pairs.
        sizes: Probe sizes, rows and columns.
        device: Where the networks run.
    """

    def __init__(self, data: EvaluationSet, sizes: tuple[Size, ...], device: str) -> None:
        self.data = data
        self.sizes = sizes
        self.device = device

    def __call__(self, network: nn.Module, step: int) -> dict[str, float]:
        """Verify.

        Args:
            network: The FNet.
            step: Number of the step that was completed last.

        Returns:
            Share of right answers, by probe size; `"HR"` is without degradation.
        """
        restored = create_srnet("bilinear")
        return verification_rates(self.data, network, restored, self.sizes, self.device)


def _low_resolution(recipe: FNetRecipe) -> LowResolution | None:
    if not recipe.low_resolution:
        return None
    return LowResolution(
        recipe.low_resolution,
        recipe.sizes_by_factor(recipe.crop),
        get_degradation(recipe.degradation, **recipe.degradation_options),
    )


def _with_margin(recipe: FNetRecipe, fnet: nn.Module, faces: Faces) -> Recognition:
    from idloss.training.margins import get_margin  # slow to import

    width: Any = fnet.num_features
    identities = int(labels_of(faces).max()) + 1
    return Recognition(fnet, get_margin(recipe.margin, identities, width, **recipe.margin_options))


def _validation(recipe: FNetRecipe, device: str) -> FNetVerification | None:
    data = open_pairs(recipe.validate_on, recipe.validate_every)
    return None if data is None else FNetVerification(data, recipe.sizes_by_factor(SR_CROP), device)
