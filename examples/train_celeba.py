"""Train EDSR to keep the person: the recipe of Lai, He and Lam (ICIP 2019), section 4.1.

With no data it runs a quick start on made-up faces, on a CPU, in under three minutes:

    python examples/train_celeba.py

With data it trains on real ones, and with LFW at hand measures what it brought:

    python examples/train_celeba.py --data celeba --lfw lfw --srnet edsr32_256 --fnet sface

`--data` takes CelebA in the wild, torchvision's CelebA, or a folder or tar with landmarks.csv.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track
from timm.models import save_for_hf
from torch import Tensor, nn

from idloss import FaceEncoder, HallucinationLoss, IdentityPreservedLoss, create_fnet, create_srnet
from idloss.data import AlignedFaces, EvaluationSet, Pairs, align_all, lfw, open_faces
from idloss.data.overlap import embed_faces, find_overlap, without_overlap
from idloss.data.synthetic import SyntheticFaces
from idloss.evaluation.figures import picture_sheet, save_figure
from idloss.evaluation.results import paper_table
from idloss.evaluation.run import evaluate_verification
from idloss.resample import resize, to_float

SIZES = ((7, 6), (14, 12), (28, 24))
console = Console()


@dataclass(frozen=True)
class Recipe:
    """Section 4.1 of the paper, with the details of its released code."""

    iterations: int = 50_000
    batch_size: int = 64
    learning_rate: float = 1e-4
    factors: tuple[int, ...] = (4, 8, 16)  # one for each mini-batch
    seed: int = 0
    bfloat16: bool = False

    def rate(self, iteration: int) -> float:
        """Halved after each half of the run: at 25,000 of 50,000, and on the very last step."""
        return self.learning_rate * 0.5 ** (iteration // max(self.iterations // 2, 1))


def train_srnet(
    srnet: nn.Module, criterion: HallucinationLoss, crops: Tensor, recipe: Recipe
) -> nn.Module:
    """Train an SRNet, RGB [0, 1] to x4, on aligned crops, uint8 RGB `[N, 3, 112, 96]`."""
    device = next(srnet.parameters()).device
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.Adam(srnet.parameters(), lr=recipe.learning_rate)
    batches = endless_batches(len(crops), recipe.batch_size, generator)
    features = None if criterion.identity is None else embed_both_ways(criterion.identity, crops)
    name = f"SRNet, lambda {criterion.weight if criterion.identity else 0:g}"
    for iteration in track(range(1, recipe.iterations + 1), name, console=console):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(iteration)
        index = next(batches)
        mirrored = torch.rand(len(index), generator=generator) < 0.5
        factor = recipe.factors[int(torch.randint(len(recipe.factors), (), generator=generator))]

        hr = crops[index].to(device)
        hr = torch.where(mirrored.to(device)[:, None, None, None], hr.flip(-1), hr)
        lr = resize(hr, (hr.shape[-2] // factor, hr.shape[-1] // factor))
        targets = None if features is None else features[mirrored.long(), index].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
            sr = srnet(to_float(lr))
        loss, _ = criterion(sr.float(), to_float(hr), target_features=targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return srnet.eval().to(memory_format=torch.contiguous_format)  # as safetensors wants it


def endless_batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled positions for ever; a last batch that is not full is dropped, as in the release."""
    if count < batch_size:
        raise SystemExit(f"{count} faces do not fill a batch of {batch_size}: lower --batch-size")
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch_size].split(batch_size)


@torch.no_grad()
def embed_both_ways(identity: IdentityPreservedLoss, crops: Tensor) -> Tensor:
    """HR features of all crops and of their mirror images, `[2, N, D]`: once, not every step."""
    device = next(identity.buffers()).device
    rows = []
    for batch in track(crops.split(64), "HR features", console=console):
        hr = to_float(batch.to(device))
        rows.append(torch.stack([identity.embed(x).cpu() for x in (hr, hr.flip(-1))]))
    return torch.cat(rows, dim=1)


class SmallFNet(nn.Module):
    """A recogniser small enough to train in half a minute: any module can be an FNet."""

    num_features = 128
    crop = "sphereface"
    pretrained_cfg = {"input_size": (3, 56, 48), "mean": (0.5,) * 3, "std": (0.5,) * 3}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        self.trunk = nn.Sequential()
        for before, after in pairwise(widths):
            self.trunk.extend(
                [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.PReLU(after)]
            )
        self.embedding = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(128 * 4 * 3, 128), nn.BatchNorm1d(128)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB `[B, 3, 56, 48]` to embeddings `[B, 128]`."""
        embedding: Tensor = self.embedding(self.trunk(x))
        return embedding


def train_fnet(fnet: nn.Module, faces: AlignedFaces, recipe: Recipe) -> nn.Module:
    """Train an FNet to tell identities apart: softmax over scaled cosines with a margin."""
    if faces.labels is None:
        raise SystemExit("an FNet needs identities to learn from")
    generator = torch.Generator().manual_seed(recipe.seed)
    centres = nn.Parameter(torch.randn(len(faces.identities), 128, generator=generator))
    parameters = [*fnet.parameters(), centres]
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, recipe.iterations
    )
    batches = endless_batches(len(faces), recipe.batch_size, generator)
    small = to_float(resize(faces.crops, (56, 48), convention="antialias")) * 2 - 1
    for _ in track(range(recipe.iterations), "FNet", console=console):
        index = next(batches)
        images, labels = small[index], faces.labels[index]
        if torch.rand((), generator=generator) < 0.5:
            images = images.flip(-1)
        cosines = F.normalize(fnet(images)) @ F.normalize(centres).T
        margin = 0.2 * F.one_hot(labels, len(faces.identities))  # CosFace
        loss = F.cross_entropy(16 * (cosines - margin), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return fnet.eval()


def quick_start(options: argparse.Namespace) -> None:
    """The whole story in three minutes, on faces the package draws itself."""
    start = time.perf_counter()
    training = SyntheticFaces(300, 10, seed=options.seed).render()
    unseen = SyntheticFaces(60, 6, seed=options.seed, first_identity=300).render()
    torch.manual_seed(options.seed)
    fnet = train_fnet(SmallFNet(), training, Recipe(400, 64, 2e-3, seed=options.seed))
    recipe = Recipe(options.iterations or 300, 16, 1e-3, seed=options.seed)
    trained = {
        f"edsr4_32 lambda {weight:g}": train_srnet(
            new_srnet("edsr16_64", options, depth=4, width=32),
            HallucinationLoss(fnet, weight=weight),
            training.crops,
            recipe,
        )
        for weight in options.weight or (0.0, 0.5)
    }
    test = EvaluationSet("people not trained on", unseen, random_pairs(unseen, 1200, options.seed))
    report(test, {"small": fnet}, trained, options.out)
    console.print(f"{time.perf_counter() - start:.0f} s on {torch.get_num_threads()} CPU threads")


def train_on(options: argparse.Namespace) -> None:
    """The recipe on real faces, and verification on LFW."""
    fnet = create_fnet(options.fnet, pretrained=True)
    faces = align_all(open_faces(options.data, skip_missing=options.skip_missing))
    test = lfw(options.lfw) if options.lfw else None
    if options.exclude:
        faces = excluding(faces, options.exclude)
    elif test is not None and faces.labels is not None:
        faces = excluding_people_of(test, faces, fnet.to(options.device))
    console.print(f"{len(faces)} faces of {len(faces.identities)} people")
    recipe = Recipe(seed=options.seed, bfloat16=options.bfloat16)
    for field in ("iterations", "batch_size", "learning_rate"):
        if (value := getattr(options, field)) is not None:
            recipe = replace(recipe, **{field: value})
    trained = {}
    for weight in options.weight or (0.5,):
        name = f"{options.srnet} lambda {weight:g}"
        criterion = HallucinationLoss(fnet, weight=weight, crop="sphereface").to(options.device)
        srnet = train_srnet(new_srnet(options.srnet, options), criterion, faces.crops, recipe)
        folder = options.out / name.replace(" ", "_")
        save_for_hf(srnet, folder, safe_serialization=True)
        console.print(f"saved: idloss.create_srnet('local-dir:{folder}', pretrained=True)")
        trained[name] = srnet
    if test is not None:
        report(test, {options.fnet: fnet}, trained, options.out, device=options.device)


def new_srnet(name: str, options: argparse.Namespace, **arguments: Any) -> nn.Module:
    """The same first weights for every lambda."""
    torch.manual_seed(options.seed)
    srnet = create_srnet(name, **arguments).to(options.device)
    return srnet.to(memory_format=torch.channels_last)


def excluding(faces: AlignedFaces, names: Sequence[str]) -> AlignedFaces:
    """Faces without some identities or photos."""
    labels = faces.labels.tolist() if faces.labels is not None else [-1] * len(faces)
    unwanted = set(names)
    keep = [
        name not in unwanted and (label < 0 or faces.identities[label] not in unwanted)
        for name, label in zip(faces.names, labels, strict=True)
    ]
    return faces.select(torch.tensor(keep))


def excluding_people_of(test: EvaluationSet, faces: AlignedFaces, fnet: nn.Module) -> AlignedFaces:
    """Faces without the people who are in the test set as well: CelebA and LFW share some."""
    encoder = FaceEncoder(fnet, crop="sphereface")
    others = align_all(test.faces)
    matches = find_overlap(faces, embed_faces(faces, encoder), others, embed_faces(others, encoder))
    for match in matches:
        console.print(
            f"left out, in the test set as {match.other} (cosine {match.similarity:.2f}): "
            f"{match.photo or 'all photos'} of {match.identity}"
        )
    return without_overlap(faces, matches)


def random_pairs(faces: AlignedFaces, count: int, seed: int) -> Pairs:
    """As many pairs of one person as of two, in ten folds, each half and half."""
    if faces.labels is None:
        raise SystemExit("pairs need identities")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(faces), (2, 100 * count), generator=generator)
    drawn = drawn[:, drawn[0] != drawn[1]]
    equal = faces.labels[drawn[0]] == faces.labels[drawn[1]]
    both = torch.stack((drawn[:, equal][:, : count // 2], drawn[:, ~equal][:, : count // 2]))
    first, second = both.permute(1, 2, 0).reshape(2, -1)
    fold = torch.arange(count) * 10 // count
    return Pairs(first, second, faces.labels[first] == faces.labels[second], fold)


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
    results = evaluate_verification(test, fnets, srnets, SIZES, device=device, cache=False)
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
    parser.add_argument("--data", type=Path, help="faces to train on; none: the quick start")
    parser.add_argument("--lfw", type=Path, help="LFW with pairs.txt and lfw_landmarks.csv")
    parser.add_argument("--exclude", nargs="+", help="identities or photos to leave out")
    parser.add_argument("--srnet", default="edsr16_64")
    parser.add_argument("--fnet", default="sface")
    parser.add_argument("--weight", type=float, nargs="+", help="lambda, or several to compare")
    parser.add_argument("--iterations", type=int, help="50,000 in the paper")
    parser.add_argument("--batch-size", type=int, help="64 in the paper")
    parser.add_argument("--learning-rate", type=float, help="1e-4 in the paper")
    parser.add_argument("--bfloat16", action="store_true", help="run the SRNet in bfloat16")
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
