"""Train EDSR to keep the person: the recipe of Lai, He and Lam (ICIP 2019), section 4.1.

With no data it runs a quick start on made-up faces, on a CPU, in under three minutes:

    python examples/train_celeba.py

With data it trains on real ones, and with LFW at hand leaves out the people that both hold and
measures what the loss brought:

    python examples/train_celeba.py --data celeba --lfw lfw --srnet edsr32_256 --fnet sface

`--data` takes CelebA in the wild, torchvision's CelebA, or a folder or tar with landmarks.csv. Any
field of the recipe (`idloss.training.Recipe`) can follow: iterations=1500 batch_size=16
precision=bf16. A run that was stopped goes on when it is started again. The same steps as commands:
`idloss prepare`, `idloss train` and `idloss evaluate`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import nn

from idloss import FaceEncoder, HallucinationLoss, create_fnet, create_srnet
from idloss.data import (
    EvaluationSet,
    Exclusion,
    align_all,
    draw_faces,
    draw_pairs,
    lfw,
    open_faces,
    prepare,
)
from idloss.evaluation import evaluate, paper_table, picture_sheet, save_figure
from idloss.resample import resize, to_float
from idloss.training import FNetRecipe, Recipe, load_recipe, train, train_fnet

SIZES = ((7, 6), (14, 12), (28, 24))
SHALLOW = (  # four strided convolutions, which train in half a minute
    "fnet_options={widths: [32, 64, 96, 128], depths: [0, 0, 0, 0], num_features: 128,"
    " img_size: [56, 48], input_size: [3, 56, 48]}"
)
console = Console()


def train_on(options: argparse.Namespace) -> None:
    """The recipe on real faces, and verification on LFW."""
    test = lfw(options.lfw) if options.lfw else None
    fnet = create_fnet(options.fnet, pretrained=True)
    exclude = None
    if test is not None:
        encoder = FaceEncoder(fnet, crop="sphereface").to(options.device)
        exclude = Exclusion(test.name, test.faces, encoder, options.fnet)
    faces = open_faces(options.data, skip_missing=options.skip_missing)
    prepared = prepare(
        faces, options.out / "faces", exclude=exclude, skip_missing=options.skip_missing
    )
    for match in prepared.matches:
        console.print(
            f"left out, in the test set as {match.other} (cosine {match.similarity:.2f}): "
            f"{match.photo or 'all photos'} of {match.identity}"
        )
    trained = {}
    for weight in options.weight or (0.5,):
        fields = [f"srnet={options.srnet}", f"fnet={options.fnet}", f"identity_weight={weight}"]
        fields += [f"data={options.out / 'faces'}", f"seed={options.seed}", *options.fields]
        name = f"{options.srnet} lambda {weight:g}"
        folder = options.out / name.replace(" ", "_")
        trained[name] = train(load_recipe("paper_edsr16_64_id", fields), folder, resume=True)
        console.print(f"saved: idloss.create_srnet('local-dir:{folder}/model', pretrained=True)")
    if test is not None:
        report(test, {options.fnet: fnet}, trained, options.out, device=options.device)


def quick_start(options: argparse.Namespace) -> None:
    """The whole story in three minutes, on faces the package draws itself."""
    start = time.perf_counter()
    training = draw_faces(300, 10, seed=options.seed)
    unseen = draw_faces(60, 6, seed=options.seed, first_identity=300)
    small = [f"seed={options.seed}", "device=cpu", "trackers=[]"]
    fnet = train_fnet(
        load_recipe("fnet_small", [*small, SHALLOW, "iterations=400"], FNetRecipe),
        options.out / "fnet",
        faces=training,
        resume=True,
    )
    trained = {}
    for weight in options.weight or (0.0, 0.5):
        fields = [*small, f"identity_weight={weight}", "srnet_options={depth: 4, width: 32}"]
        fields += ["iterations=300", "batch_size=16", "learning_rate=1e-3"]
        recipe = load_recipe("paper_edsr16_64_id", fields, Recipe)
        trained[f"EDSR lambda {weight:g}"] = train(
            recipe,
            options.out / f"lambda_{weight:g}",
            faces=training,
            criterion=HallucinationLoss(fnet, weight=weight),
            resume=True,
        )
    test = EvaluationSet(
        "people not trained on", unseen, draw_pairs(unseen, 1200, seed=options.seed)
    )
    report(test, {"small": fnet}, trained, options.out)
    console.print(f"{time.perf_counter() - start:.0f} s on {torch.get_num_threads()} CPU threads")


def report(
    test: EvaluationSet,
    fnets: Mapping[str, nn.Module],
    trained: Mapping[str, nn.Module],
    out: Path,
    *,
    device: str = "cpu",
) -> None:
    """Before and after: a table of verification rates, and a picture."""
    srnets = {name: create_srnet(name) for name in ("bilinear", "bicubic")} | dict(trained)
    results = evaluate(test, fnets, srnets, SIZES, device=device, cache=False)
    results.save(out / "verification.json")
    console.print(f"Verification on {test.name}, second face LR, % right:")
    console.print(Markdown(paper_table(results)))

    sample = torch.arange(0, len(test.faces), max(1, len(test.faces) // 5))[:5]
    hr = to_float(align_all(test.faces.select(sample), progress=False).crops)
    lr = resize(hr, (14, 12)).clamp(0, 1)
    columns = {"LR": lr, "bicubic": resize(lr, (112, 96)).clamp(0, 1)}
    with torch.inference_mode():
        columns |= {name: net(lr.to(device)).cpu() for name, net in trained.items()}
    columns["HR"] = hr
    for path in save_figure(picture_sheet(columns), out / "faces"):
        console.print(f"picture: {path}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fields", nargs="*", help="fields of the recipe, such as iterations=1500")
    parser.add_argument("--data", type=Path, help="faces to train on; none: the quick start")
    parser.add_argument("--lfw", type=Path, help="LFW with pairs.txt and lfw_landmarks.csv")
    parser.add_argument("--srnet", default="edsr16_64")
    parser.add_argument("--fnet", default="sface")
    parser.add_argument("--weight", type=float, nargs="+", help="lambda, or several to compare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-missing", action="store_true", help="leave out what is unreadable")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/train_celeba"))
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.data is None:
        quick_start(arguments)
    else:
        train_on(arguments)
