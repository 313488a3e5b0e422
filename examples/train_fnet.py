"""Train a face recogniser (FNet): on identities with a margin, or after another FNet.

With no data it trains a small one on made-up faces, on a CPU, in about a minute, and verifies faces
of people it has not seen:

    python examples/train_fnet.py

With data it runs a recipe on real ones; with a teacher they need no identities:

    python examples/train_fnet.py --data casia --recipe fnet_sphereface20 --lfw lfw
    python examples/train_fnet.py --data celeba --recipe fnet_mobilefacenet --teacher sface

`--data` takes what `idloss prepare` made, CelebA, or a folder or tar with landmarks.csv. Any field
of the recipe (`idloss.training.FNetRecipe`) can follow: margin=adaface low_resolution=0.5
precision=bf16. A run that was stopped goes on when it is started again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import nn

from idloss import create_fnet, create_srnet
from idloss.data import AlignedFaces, EvaluationSet, Pairs, draw_faces, lfw
from idloss.evaluation import evaluate, paper_table
from idloss.training import FNetRecipe, load_recipe, train_fnet

SIZES = ((14, 12), (28, 24))
console = Console()


def main(options: argparse.Namespace) -> None:
    """Train, then verify at full resolution and with small faces enlarged again."""
    fields = list(options.fields)
    if options.teacher:
        fields.append(f"teacher={options.teacher}")
    faces, test = None, lfw(options.lfw) if options.lfw else None
    if options.data is None:
        fields = ["device=cpu", *fields]
        faces = draw_faces(300, 10)
        unseen = draw_faces(60, 6, first_identity=300)
        test = EvaluationSet("people not trained on", unseen, all_pairs(unseen))
    else:
        fields = [f"data={options.data}", *fields]
    recipe = load_recipe(options.recipe, fields, FNetRecipe)
    fnet = train_fnet(recipe, options.out, faces=faces, resume=True)
    console.print(f"saved: idloss.create_fnet('local-dir:{options.out}/model', pretrained=True)")
    if test is not None:
        torch.manual_seed(recipe.seed)  # as the run began
        before = create_fnet(recipe.fnet, pretrained=recipe.pretrained, **recipe.fnet_options)
        report(test, {"before": before, "after": fnet}, options.device)


def all_pairs(faces: AlignedFaces) -> Pairs:
    """Every pair of one person, and as many of two, in ten folds."""
    assert faces.labels is not None
    first, second = torch.combinations(torch.arange(len(faces))).T
    same = faces.labels[first] == faces.labels[second]
    first, second = first[same], second[same]
    stranger = second.roll(len(second) // 2)
    place = torch.arange(2 * len(first))
    return Pairs(first.repeat(2), torch.cat((second, stranger)), place < len(first), place % 10)


def report(test: EvaluationSet, fnets: Mapping[str, nn.Module], device: str) -> None:
    """A table of verification rates: the second face at low resolution, enlarged again."""
    srnets = {"bilinear": create_srnet("bilinear")}
    results = evaluate(test, fnets, srnets, SIZES, device=device, cache=False)
    console.print(f"Verification on {test.name}, % right:")
    console.print(Markdown(paper_table(results)))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fields", nargs="*", help="fields of the recipe to change, field=value")
    parser.add_argument("--data", type=Path, help="faces to train on; none: drawn ones")
    parser.add_argument("--recipe", default="fnet_small", help="name in zoo/recipes, or a file")
    parser.add_argument("--teacher", help="FNet to learn from, instead of identities")
    parser.add_argument("--lfw", type=Path, help="LFW with pairs.txt and lfw_landmarks.csv")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/train_fnet"))
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
