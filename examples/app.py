"""A page to drop a photo on: what is left of a face in a few pixels, and what comes back.

    pip install ".[demo]"
    python examples/app.py

It cuts out a face, makes it as small as you choose or takes it as it is, and shows what
interpolation and networks trained without and with the identity loss make of it, each with its
cosine to the face at full size, or to another photo of the person, and how often strangers are as
alike. It runs on a CPU with the networks that come with the package; the recogniser and the
detector are fetched once (`idloss fetch`), or your own: `--fnet local-dir:FOLDER`. Photos stay on
this machine.
"""

from __future__ import annotations

import argparse
from typing import Any

import gradio as gr
import torch
from torch import Tensor

from idloss import create_detector, create_fnet, create_srnet
from idloss.data.files import DataError
from idloss.data.pictures import read_photo
from idloss.detection import Detector
from idloss.evaluation import HR, Calibration, get_protocol, picture_sheet
from idloss.evaluation.calibration import identity, zoo_tables
from idloss.evaluation.embedding import Networks, prepare_probe
from idloss.geometry import get_template
from idloss.matching import face_rows
from idloss.pipeline import cut_face
from idloss.resample import to_uint8
from idloss.weights import WeightsError

AS_IT_IS = "as it is"
SIZES = {"7x6": (7, 6), "14x12": (14, 12), "28x24": (28, 24)}
METHODS = ("bilinear", "edsr16_64", "edsr16_64_id")
CROP = get_template("sphereface")
WARNING = (
    "What is not in the pixels does not come back: a super-resolved face is no evidence of who "
    "somebody is. Rates are those of pairs of LFW, not the chance that it is one person."
)


class Page:
    """The networks behind the page."""

    def __init__(self, fnet: str = "mobilefacenet", detector: str | Detector = "mtcnn") -> None:
        self.detector = create_detector(detector)
        nets = {name: create_srnet(name, pretrained=True).eval() for name in METHODS}
        self.fnet, self.protocol = create_fnet(fnet, pretrained=True).eval(), get_protocol("paper")
        self.networks = Networks({fnet: self.fnet}, nets, self.protocol, torch.device("cpu"))
        self.name, self.calibration = fnet, Calibration(zoo_tables())

    @torch.no_grad()
    def show(self, photo: str | None, size: str, other: str | None) -> tuple[Any, str]:
        """The pictures side by side, and what the cosines under them mean."""
        face, rows = self.cut(photo)
        target = face if other is None else self.cut(other)[0]
        full = [crop.shape[-2:] == CROP.size for crop in (face, target)]
        if size != AS_IT_IS and not full[0]:
            raise gr.Error(f"The face has {rows:.0f} rows of pixels: take it {AS_IT_IS}.")
        if other is not None and not full[1]:
            raise gr.Error("The face on the other photo has too few pixels to compare with.")
        rows = rows if size == AS_IT_IS else SIZES[size][0]
        lr = face if size == AS_IT_IS else prepare_probe(face, SIZES[size], self.protocol)
        reference = self.networks.embed_hr(self.name, target, CROP)
        columns, cosines = self.networks.restore(self.name, {CROP: lr}, reference)
        if size == AS_IT_IS and other is None:  # nothing to compare with
            return picture_sheet(columns), WARNING
        columns |= {HR: target}
        figures = {method: float(cosine) for method, cosine in cosines.items()}
        lines = [self.tell(method, figures[method], rows) for method in figures]
        return picture_sheet(columns, {**cosines}), "\n".join([*lines, "", WARNING])

    def cut(self, photo: str | None) -> tuple[Tensor, float]:
        """The surest face of a photo, uint8 `[1, 3, h, w]`, and the rows of pixels that it has."""
        if photo is None:
            raise gr.Error("Drop a photo first.")
        try:
            image = read_photo(photo)
            (found,) = self.detector([image])
            if not len(found):
                raise gr.Error("No face was found.")
            points, place = found.landmarks[0], (image.shape[-2], image.shape[-1])
            face = to_uint8(cut_face(image, points, CROP))[None]
            return face, face_rows(points, CROP, place)
        except (DataError, ValueError) as error:
            raise gr.Error(str(error)) from error

    def tell(self, method: str, cosine: float, rows: float) -> str:
        """How often a cosine is reached, where that was measured."""
        nets = identity(self.fnet), identity(self.networks.srnets[method])
        odds = self.calibration.odds(*nets, (rows, CROP.size[0]), cosine)
        return f"- `{method}` {cosine:.3f}: {odds or 'what that means was not measured'}"


def build(page: Page) -> Any:
    """The page itself."""
    with gr.Blocks(title="idloss", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        gr.Markdown(
            "# Small faces\nWhat super-resolution makes of a face, and what it cannot know."
        )
        with gr.Row():
            photo = gr.Image(type="filepath", label="Photo", height=300)
            other = gr.Image(type="filepath", label="Another of the person, or none", height=300)
        size = gr.Radio([*SIZES, AS_IT_IS], value="14x12", label="Rows and columns of the face")
        button = gr.Button("Show", variant="primary")
        sheet, told = gr.Plot(show_label=False), gr.Markdown()
        button.click(page.show, [photo, size, other], [sheet, told], api_name="show")
    return blocks


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fnet", default="mobilefacenet", help="name, or local-dir:FOLDER")
    parser.add_argument("--detector", default="mtcnn", help="mtcnn or yunet")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()
    try:
        page = Page(options.fnet, options.detector)
    except WeightsError as error:
        parser.exit(1, f"{error}\n")
    build(page).launch(server_port=options.port)
