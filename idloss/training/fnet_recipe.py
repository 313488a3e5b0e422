"""How to train an FNet, as a recipe: on identities with a margin, or after a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from idloss.degradation import DEGRADATIONS, sizes_of
from idloss.errors import did_you_mean
from idloss.geometry import get_template
from idloss.sizes import Size
from idloss.training.options import RunOptions


class FNetRecipe(RunOptions):
    """Train an FNet to tell identities apart, or to embed faces as another does.

    With its defaults it trains the paper's FNet as its authors did (Liu et al., CVPR 2017;
    wy1iu/sphereface, sphereface_solver.prototxt), but for a cosine schedule, and clipped: without
    batch norm, the network may not survive their rate otherwise.

    Attributes:
        data: Faces to train on, as in `Recipe`; labelled, unless there is a teacher.
        skip_missing: Leave out faces that are missing or cannot be aligned.
        exclude: Identities and images to leave out.
        crop: Template of the crops; best the FNet's own.
        fnet: Name of the FNet.
        fnet_options: Its arguments.
        pretrained: Begin with its published weights.
        margin: Name of the loss over identities.
        margin_options: Its arguments.
        teacher: Name of an FNet whose embeddings are to be learned instead of identities, for which
            no margin is needed then.
        low_resolution: Share of the faces that are made small and enlarged again before the FNet
            sees them; a teacher sees them as they were.
        factors: Down-sampling factors for that, one drawn for each batch, and for validation.
        degradation: From HR to LR.
        degradation_options: Its arguments.
        validate_on: LFW (or another set of pairs) to verify on while training; None for none.
        validate_every: Steps between validations; 0 for one at the end.
    """

    PASSIVE: ClassVar[frozenset[str]] = RunOptions.PASSIVE | {"validate_on", "validate_every"}

    iterations: Annotated[int, Field(gt=0)] = 28_000
    batch_size: Annotated[int, Field(gt=0)] = 256
    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Literal["step", "cosine", "constant"] = "cosine"
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    data: Path | None = None
    skip_missing: bool = False
    exclude: tuple[str, ...] = ()
    crop: str = "sphereface"
    fnet: str = "sface"
    fnet_options: dict[str, Any] = Field(default_factory=dict)
    pretrained: bool = False
    margin: str = "sphereface"
    margin_options: dict[str, Any] = Field(default_factory=dict)
    teacher: str | None = None
    low_resolution: Annotated[float, Field(ge=0, le=1)] = 0.0
    factors: tuple[Annotated[int, Field(gt=0)], ...] = (4, 8, 16)
    degradation: str = "bicubic"
    degradation_options: dict[str, Any] = Field(default_factory=dict)
    validate_on: Path | None = None
    validate_every: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check_names_and_factors(self) -> FNetRecipe:
        from idloss.training.margins import check_margin  # slow to import

        if self.degradation not in DEGRADATIONS:
            raise ValueError(did_you_mean("degradation", self.degradation, DEGRADATIONS))
        check_margin(self.margin, self.margin_options)
        if not self.factors:
            raise ValueError("factors is empty: give at least one")
        self.sizes(self.crop)
        return self

    def sizes(self, template: str) -> tuple[Size, ...]:
        """LR sizes, rows and columns, for crops of a template.

        Args:
            template: Its name.

        Raises:
            ValueError: A factor does not divide the crop, or the template is unknown.
        """
        return sizes_of(self.factors, get_template(template).size)
