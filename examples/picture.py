"""Make the README's picture: faces of LFW at 14x12, what networks make of them, cosines below.

    python examples/picture.py lfw.tar --out examples/faces.png

The people are spread evenly over the set, not picked; the cosines are by a recogniser that no
network of the package was trained with.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from idloss import create_fnet, create_srnet
from idloss.data import open_evaluation
from idloss.evaluation import write_sheets
from idloss.resample import parse_size

FNET = "mobilefacenet_relu6"
SRNETS = {
    "bilinear": "bilinear",
    "without identity loss": "edsr16_64",
    "with identity loss": "edsr16_64_id",
}
WIDTH = 900  # pixels; with 256 colours some 200 kB


def main(options: argparse.Namespace) -> None:
    """Draw the sheet, and keep a small copy."""
    srnets = {title: create_srnet(name, pretrained=True) for title, name in SRNETS.items()}
    data, size = open_evaluation(options.lfw), parse_size(options.size)
    with TemporaryDirectory() as folder:
        fnets = {FNET: create_fnet(FNET, pretrained=True)}
        sheet, *_ = write_sheets(folder, data, fnets, srnets, [size], count=options.faces)
        picture = Image.open(sheet).convert("RGB")
    picture.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
    picture.quantize(256).save(options.out, optimize=True)
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lfw", type=Path, help="LFW, as idloss evaluate takes it")
    parser.add_argument("--out", type=Path, default=Path("faces.png"))
    parser.add_argument("--size", default="14x12")
    parser.add_argument("--faces", type=int, default=4)
    main(parser.parse_args())
