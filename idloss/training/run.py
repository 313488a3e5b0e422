"""A whole run from a recipe: data, networks, checks, training, the saved network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from idloss.data import FileFaces
from idloss.degradation import Degradation, get_degradation
from idloss.geometry import get_template
from idloss.losses import HallucinationLoss, ImageLoss
from idloss.registry import create_fnet, create_srnet
from idloss.training.accelerator import create_accelerator
from idloss.training.crops import Crops, Faces
from idloss.training.engine import Engine
from idloss.training.features import stored_features
from idloss.training.folder import MODEL, RECIPE, check_folder, save_network
from idloss.training.hallucination import Hallucination, HallucinationTask
from idloss.training.opening import check_crop, content_of, open_all_but, open_pairs
from idloss.training.recipe import Recipe, save_recipe
from idloss.training.validation import Verification

IMAGE_LOSSES: Mapping[str, ImageLoss] = {
    "l1": F.l1_loss,
    "mse": F.mse_loss,
    "smooth_l1": F.smooth_l1_loss,
}
"""Image losses by name."""


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
            and at the end `model/`, which `create_srnet("local-dir:FOLDER/model")` opens.
        resume: Go on from the newest checkpoint in the folder.
        faces: Faces to train on.
        srnet: The network.
        criterion: The losses.
        degradation: From HR to LR.

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
    if srnet is None:
        srnet = create_srnet(recipe.srnet, pretrained=recipe.pretrained, **recipe.srnet_options)
    module = Hallucination(srnet, _criterion(recipe) if criterion is None else criterion)
    _check_fit(recipe, module)
    task = HallucinationTask(
        module.to(device),
        Crops(
            faces, template=recipe.crop, device=device, keep=recipe.crops, workers=recipe.workers
        ),
        recipe.lr_sizes(),
        degradation or get_degradation(recipe.degradation, **recipe.degradation_options),
        seed=recipe.seed,
        content=content_of(faces),
        channels_last=recipe.channels_last,
    )
    engine = Engine(
        task,
        recipe,
        folder,
        accelerator,
        validate=_validation(recipe, folder, str(device)),
        validate_every=recipe.validate_every,
    )
    identity = module.criterion.identity
    if recipe.features == "stored" and identity is not None:
        if isinstance(faces, FileFaces):
            accelerator.print("photos are read anew each time: HR features are not stored")
        else:
            # one process of each machine computes them, the others read its file
            with accelerator.local_main_process_first():
                show = accelerator.is_local_main_process
                found = stored_features(faces, identity, device=device, progress=show)
            task.take_features(found)
    if accelerator.is_main_process:
        save_recipe(recipe, folder / RECIPE)
    trained = engine.run(resume=resume)
    if accelerator.is_main_process:
        save_network(trained, folder / MODEL, recipe.srnet_options)
    accelerator.wait_for_everyone()
    return trained


def _criterion(recipe: Recipe) -> HallucinationLoss:
    return HallucinationLoss(
        recipe.fnet,
        weight=recipe.weight,
        image_loss=IMAGE_LOSSES[recipe.image_loss],
        crop=recipe.crop,
        distance=recipe.distance,
    )


@torch.no_grad()
def _check_fit(recipe: Recipe, module: Hallucination) -> None:
    """Find out before training whether crop, FNet, SRNet and sizes fit each other."""
    height, width = get_template(recipe.crop).size
    identity = module.criterion.identity
    for encoder in identity.encoders if identity is not None else ():
        check_crop(encoder, recipe.crop)  # type: ignore[arg-type]
    training = module.training
    module.eval()
    for rows, columns in recipe.lr_sizes():
        sr = module.srnet(torch.zeros(1, 3, rows, columns))
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


def _validation(recipe: Recipe, folder: Path, device: str) -> Verification | None:
    data = open_pairs(recipe.validate_on, recipe.validate_every)
    if data is None:
        return None
    name = recipe.fnet if isinstance(recipe.fnet, str) else next(iter(recipe.fnet))
    fnet = create_fnet(name, pretrained=True)
    return Verification(data, fnet, recipe.lr_sizes(), folder / "pictures", device)
