"""What every training run can be told, whatever it trains, and what every run on faces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from idloss.degradation import list_degradations, sizes_of
from idloss.errors import did_you_mean
from idloss.geometry import get_template
from idloss.resample import Size

if TYPE_CHECKING:
    from typing_extensions import Self

Precision = Literal["fp32", "tf32", "bf16", "fp16"]


class RunOptions(BaseModel):
    """How a run goes: batches, optimizer, schedule, arithmetic, checkpoints and logs.

    The same numbers come out whatever `accumulate`, `device`, `crops`, `workers`, the number of
    processes, and everything about logs and checkpoints: only rounding differs.

    Attributes:
        iterations: Optimizer steps.
        batch_size: Faces of a step, over all processes and parts of it.
        accumulate: Parts that each process computes its share of a step in.
        optimizer: `"adam"`, `"adamw"` or `"sgd"` (momentum 0.9, Nesterov).
        learning_rate: Its peak.
        weight_decay: As the optimizer has it.
        schedule: `"step"`: times `decay_rate` after every `decay_every` steps, counted as in the
            paper's released code, where the last step of 50,000 is halved twice; `"cosine"` to
            zero; `"constant"`.
        decay_every: Steps; None for half of `iterations`, as in the paper.
        decay_rate: Factor.
        warmup: Steps of linear warm-up.
        clip: Largest norm of the gradient; None to leave it.
        ema: Decay of an exponential moving average of the weights, warmed up as in timm's
            `ModelEmaV3`, which is then what is validated and saved; None for none.
        precision: `"fp32"`, `"tf32"` (float32 products rounded to TF32, on a GPU that has it),
            `"bf16"` or `"fp16"` (autocast; weights stay float32).
        channels_last: Keep images and weights in that memory format.
        compile: `"no"`, or a mode of `torch.compile`: `"default"`, `"reduce-overhead"` (CUDA
            graphs, one for each input size), `"max-autotune"`.
        grad_checkpointing: Recompute activations in the backward pass instead of keeping them.
        seed: Of weights, batches and degradations.
        non_finite: At a loss that is not finite, `"stop"`, or `"skip"` the step. The batch is saved
            either way.
        device: `"auto"` or `"cpu"`.
        crops: Where aligned crops stay: `"device"`, `"host"`, or `"auto"`: on a GPU if a third of
            its free memory holds them.
        workers: Processes that read faces which are not held in memory.
        log_every: Steps a row of the log covers.
        checkpoint_every: Steps between checkpoints.
        keep: How many checkpoints stay.
        trackers: Names that Accelerate knows: `"tensorboard"`, `"wandb"`, `"mlflow"`, ...
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        coerce_numbers_to_str=True,  # YAML takes the name of identity 7398 for a number
    )

    PASSIVE: ClassVar[frozenset[str]] = frozenset(
        {"accumulate", "device", "crops", "workers", "non_finite"}
        | {"log_every", "checkpoint_every", "keep", "trackers"}
    )
    """Fields that do not change what comes out; a run may be resumed with others."""

    iterations: Annotated[int, Field(gt=0)] = 50_000
    batch_size: Annotated[int, Field(gt=0)] = 64
    accumulate: Annotated[int, Field(gt=0)] = 1
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["step", "cosine", "constant"] = "step"
    decay_every: Annotated[int, Field(gt=0)] | None = None
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    warmup: Annotated[int, Field(ge=0)] = 0
    clip: Annotated[float, Field(gt=0)] | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    precision: Precision = "fp32"
    channels_last: bool = True
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no"
    grad_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    non_finite: Literal["stop", "skip"] = "stop"
    device: Literal["auto", "cpu"] = "auto"
    crops: Literal["auto", "device", "host"] = "auto"
    workers: Annotated[int, Field(ge=0)] = 4
    log_every: Annotated[int, Field(gt=0)] = 50
    checkpoint_every: Annotated[int, Field(gt=0)] = 1000
    keep: Annotated[int, Field(gt=0)] = 2
    trackers: tuple[str, ...] = ("tensorboard",)

    @classmethod
    def parse(cls, fields: Mapping[str, Any], where: str = "the recipe") -> Self:
        """Check fields that a person wrote.

        Args:
            fields: Values by name.
            where: What to call their place in an error.

        Returns:
            The options.

        Raises:
            ValueError: A field is unknown or its value is not valid; one line that names each.
        """
        try:
            return cls.model_validate(dict(fields))
        except ValidationError as error:
            complaints = [cls._complaint(one) for one in error.errors()]
            raise ValueError(f"{where}: {'; '.join(complaints)}") from None

    @classmethod
    def _complaint(cls, error: Any) -> str:
        name = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            return did_you_mean("field", name, cls.model_fields)
        message = error["msg"].removeprefix("Value error, ")
        if not name:
            return str(message)
        return f"{name}: {message[:1].lower()}{message[1:]}, got {error['input']!r}"


class FaceOptions(RunOptions):
    """What faces to train on, how they are made small, and what a run is validated on.

    Attributes:
        data: A folder that `idloss prepare` made, CelebA, or a folder or tar with `landmarks.csv`.
        skip_missing: Leave out faces that are missing or cannot be aligned.
        exclude: Identities and images to leave out.
        crop: Template of the HR crops.
        pretrained: Begin with the network's published weights.
        factors: Down-sampling factors, one drawn for each batch.
        degradation: From HR to LR.
        degradation_options: Its arguments.
        validate_on: LFW (or another set of pairs) to verify on while training; None for none.
        validate_every: Steps between validations; 0 for one at the end.
    """

    # Data may have moved: what counts is the hash of their content.
    PASSIVE: ClassVar[frozenset[str]] = RunOptions.PASSIVE | {
        "data",
        "skip_missing",
        "validate_on",
        "validate_every",
    }

    data: Path | None = None
    skip_missing: bool = False
    exclude: tuple[str, ...] = ()
    crop: str = "sphereface"
    pretrained: bool = False
    factors: tuple[Annotated[int, Field(gt=0)], ...] = (4, 8, 16)
    degradation: str = "bicubic"
    degradation_options: dict[str, Any] = Field(default_factory=dict)
    validate_on: Path | None = None
    validate_every: Annotated[int, Field(ge=0)] = 0

    @field_validator("degradation")
    @classmethod
    def _check_degradation(cls, name: str) -> str:
        if name not in list_degradations():
            raise ValueError(did_you_mean("degradation", name, list_degradations()))
        return name

    def sizes_by_factor(self, template: str) -> tuple[Size, ...]:
        """LR sizes that the factors give, rows and columns.

        Args:
            template: Of the crops.

        Raises:
            ValueError: There are no factors, one does not divide the crop, or the template is
                unknown.
        """
        if not self.factors:
            raise ValueError("factors is empty: give at least one")
        return sizes_of(self.factors, get_template(template).size)
