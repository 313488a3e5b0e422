"""How to train an FNet, as a recipe: on identities with a margin, or after a teacher."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from idloss.training.options import FaceOptions


class FNetRecipe(FaceOptions):
    """Train an FNet to tell identities apart, or to embed faces as another does.

    With its defaults it trains the paper's FNet as its authors did (Liu et al., CVPR 2017;
    wy1iu/sphereface, sphereface_solver.prototxt), but for a cosine schedule, and clipped: without
    batch norm, the network may not survive their rate otherwise.

    Attributes:
        fnet: Name of the FNet.
        fnet_options: Its arguments.
        margin: Name of the loss over identities; without effect with a teacher.
        margin_options: Its arguments.
        teacher: Name of an FNet whose embeddings are to be learned, instead of identities.
        low_resolution: Share of the faces that are made small and enlarged again before the FNet
            sees them, at sizes that `factors` give; a teacher sees them as they were.
    """

    iterations: Annotated[int, Field(gt=0)] = 28_000
    batch_size: Annotated[int, Field(gt=0)] = 256
    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Literal["step", "cosine", "constant"] = "cosine"
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    fnet: str = "sface"
    fnet_options: dict[str, Any] = Field(default_factory=dict)
    margin: str = "sphereface"
    margin_options: dict[str, Any] = Field(default_factory=dict)
    teacher: str | None = None
    low_resolution: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _check_names_and_factors(self) -> FNetRecipe:
        from idloss.training.margins import check_margin  # slow to import

        check_margin(self.margin, self.margin_options)
        self.sizes_by_factor(self.crop)
        return self
