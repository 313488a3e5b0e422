"""What a run does, as a small YAML file: every field explained, checked, read and written."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from timm.models import is_model

from idloss.create import create_srnet
from idloss.degradation import get_degradation, sizes_of
from idloss.encoder import Interpolation
from idloss.errors import did_you_mean
from idloss.geometry import Template, get_template
from idloss.losses import get_distance, get_image_loss
from idloss.registry import srnet_crop
from idloss.resample import Size, parse_size
from idloss.weights.files import written_whole
from idloss.weights.sources import zoo_folder

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Self

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
AboveZero = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Options = TypeVar("Options", bound="RunOptions")

_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}


class RunOptions(BaseModel):
    """How a run goes, what faces it is on, how they are made small and what validates it.

    The same numbers come out whatever the `PASSIVE` fields and the number of processes: only
    rounding differs.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
    )

    PASSIVE: ClassVar[frozenset[str]] = frozenset(
        {"accumulate", "device", "hold_crops", "workers", "non_finite", "log_every", "data"}
        | {"checkpoint_every", "keep_checkpoints", "trackers", "validate_on", "validate_every"}
        | {"store_hr_features", "skip_missing"}
    )
    """Fields that do not change what comes out; data may have moved, their hash counts."""

    CHANGEABLE: ClassVar[frozenset[str]] = frozenset(
        {"iterations", "learning_rate", "weight_decay", "schedule", "decay_every", "decay_rate"}
        | {"warmup", "clip_norm", "precision", "channels_last", "compile", "grad_checkpointing"}
    )
    """Fields that a resumed run may change from there on, which is recorded."""

    iterations: Positive = 50_000
    """Optimizer steps."""
    batch_size: Positive = 64
    """Faces of a step, over all processes and parts of it."""
    accumulate: Positive = 1
    """Parts that each process computes its share of a step in."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """`adam`, `adamw` or `sgd` (momentum 0.9, Nesterov)."""
    learning_rate: AboveZero = 1e-4
    """Its peak."""
    weight_decay: NotNegative = 0.0
    """As the optimizer has it."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """`step`: times `decay_rate` after every `decay_every` steps, counted as in the paper's
    released code, where the last step of 50,000 is halved twice; `cosine` to zero; `constant`."""
    decay_every: Positive | None = None
    """Steps; null for half of `iterations`, as in the paper."""
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Factor of the schedule `step`."""
    warmup: Count = 0
    """Steps of linear warm-up."""
    clip_norm: AboveZero | None = None
    """Largest norm of the gradient; null to leave it."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, warmed up as in timm's `ModelEmaV3`,
    which is then what is validated and saved; null for none."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """`fp32`, `tf32` (float32 products rounded to TF32, on a GPU that has it), `bf16` or `fp16`
    (autocast; weights stay float32)."""
    channels_last: bool = True
    """Keep images and weights in that memory format."""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no"
    """`no`, or a mode of `torch.compile`: `default`, `reduce-overhead` (CUDA graphs, one for each
    input size), `max-autotune`."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of weights, batches and degradations."""
    non_finite: Literal["stop", "skip"] = "stop"
    """At a loss that is not finite, `stop`, or `skip` the step. The batch is saved either way."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps`."""
    hold_crops: Literal["auto", "device", "host"] = "auto"
    """Where aligned crops stay: `device`, `host`, or `auto`: on a GPU if a third of its free
    memory holds them."""
    workers: Count = 4
    """Processes that read faces which are not held in memory."""
    log_every: Positive = 50
    """Steps a row of the log covers."""
    checkpoint_every: Positive = 1000
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """How many checkpoints stay."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Names that Accelerate knows: `tensorboard`, `wandb`, `mlflow`, ..."""

    data: Path | None = None
    """A folder that `idloss prepare` made, CelebA, or a folder or tar with `landmarks.csv`."""
    skip_missing: bool = False
    """Leave out faces that are missing or cannot be aligned; one that turns out so in mid-run is
    replaced by the next."""
    exclude: tuple[str, ...] = ()
    """Identities and images to leave out, as they are written in the data."""
    crop: str = "sphereface"
    """Template of the HR crops; for an SRNet, the one it works in unless another is said here."""
    pretrained: bool = False
    """Begin with the network's published weights."""
    factors: tuple[Positive, ...] = (4, 8, 16)
    """Down-sampling factors, one drawn for each batch."""
    degradation: str = "bicubic"
    """From HR to LR."""
    degradation_options: dict[str, Any] = Field(default_factory=dict)
    """Its arguments."""
    validate_on: Path | None = None
    """LFW (or another set of pairs) to verify on while training; null for none."""
    validate_every: Count = 0
    """Steps between validations; 0 for one at the end."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Explain every field in the class's docstring, inherited ones too."""
        fields: Any = RunOptions.model_fields  # which explain those that a child sets otherwise
        lines = [
            f"        {name}: {' '.join((field.description or fields[name].description).split())}"
            for name, field in cls.model_fields.items()
        ]
        cls.__doc__ = "\n".join([f"{(cls.__doc__ or '').rstrip()}\n\n    Attributes:", *lines])

    @model_validator(mode="after")
    def _check_degradation_and_sizes(self) -> Self:
        get_degradation(self.degradation, **self.degradation_options)
        self.lr_sizes()
        return self

    def lr_sizes(self) -> tuple[Size, ...]:
        """LR sizes that batches are drawn at, rows and columns."""
        return self.sizes_by_factor(self.crop)

    def sizes_by_factor(self, crop: str | Template) -> tuple[Size, ...]:
        """LR sizes, rows and columns, that the factors give of crops of a template."""
        if not self.factors:
            raise ValueError("factors is empty: give at least one")
        return sizes_of(self.factors, get_template(crop).size)


def _size(value: Any) -> Any:
    return parse_size(value) if isinstance(value, str) else value


class Recipe(RunOptions):
    """Train an SRNet with an image loss plus lambda times an identity loss.

    With its defaults it is section 4.1 of the paper (Lai, He and Lam, ICIP 2019), with what its
    released code adds.
    """

    srnet: str = "edsr16_64"
    """Name of the SRNet."""
    srnet_options: dict[str, Any] = Field(default_factory=dict)
    """Its arguments, such as `depth`."""
    fnet: str | dict[str, float] = "sface"
    """Name of the FNet of the identity loss, or names with their weights."""
    identity_weight: NotNegative = 0.5
    """Lambda of the identity loss; 0 leaves the image loss alone."""
    distance: str = "cosine"
    """Between embeddings."""
    interpolation: Interpolation = "bilinear"
    """How SR is enlarged for the FNets: `bilinear`, as in the paper, `bicubic`, as protocols do at
    the test (0.3 to 0.7 points more at 14x12 of LFW, nothing sure at 7x6: zoo/studies), or
    `nearest`."""
    image_loss: str = "l1"
    """Between SR and MR, both in [-1, 1]: `l1`, `mse`, `huber`, or what a plug-in registered."""
    store_hr_features: bool = True
    """Compute HR features once for the whole set, kept beside prepared data, instead of in each
    step."""
    sizes: tuple[Annotated[Size, BeforeValidator(_size)], ...] | None = None
    """LR sizes, rows and columns (`[7x6, 14x12]`), instead of `factors`."""

    @model_validator(mode="after")
    def _check_losses(self) -> Self:
        get_distance(self.distance)
        get_image_loss(self.image_loss)
        return self

    def lr_sizes(self) -> tuple[Size, ...]:
        """LR sizes that batches are drawn at, rows and columns."""
        return self.sizes or super().lr_sizes()

    def model_post_init(self, _: Any) -> None:
        """Follow the SRNet that is named, where no crop is."""
        if "crop" not in self.model_fields_set:
            crop = self.srnet_options.get("crop") or srnet_crop(self.srnet)
            self.__dict__["crop"] = get_template(crop).name

    def follow(self, srnet: nn.Module | None) -> Recipe:
        """The recipe with the crop of the SRNet given, or saved under its name, if it says none."""
        if "crop" in self.model_fields_set:
            return self
        if srnet is None and not is_model(self.srnet):  # but a network that was published
            srnet = create_srnet(self.srnet, pretrained=self.pretrained, **self.srnet_options)
        crop = self.crop if srnet is None else get_template(srnet_crop(srnet)).name
        return Recipe.model_validate({**self.model_dump(), "crop": crop})


class FNetRecipe(RunOptions):
    """Train an FNet to tell identities apart, or to embed faces as another does.

    With its defaults it trains the paper's FNet as its authors did (Liu et al., CVPR 2017;
    wy1iu/sphereface, sphereface_solver.prototxt), but for a cosine schedule, and clipped: without
    batch norm, the network may not survive their rate otherwise.
    """

    # explained where RunOptions has them
    iterations: Positive = 28_000
    batch_size: Positive = 256
    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    learning_rate: AboveZero = 0.1
    weight_decay: NotNegative = 5e-4
    schedule: Literal["step", "cosine", "constant"] = "cosine"
    clip_norm: AboveZero | None = 1.0

    fnet: str = "sface"
    """Name of the FNet."""
    fnet_options: dict[str, Any] = Field(default_factory=dict)
    """Its arguments."""
    margin: str = "sphereface"
    """Name of the loss over identities; without effect with a teacher."""
    margin_options: dict[str, Any] = Field(default_factory=dict)
    """Its arguments."""
    teacher: str | None = None
    """Name of an FNet whose embeddings are to be learned, instead of identities."""
    low_resolution: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the faces that are made small and enlarged again before the FNet sees them, at
    sizes that `factors` give; a teacher sees them as they were."""

    @model_validator(mode="after")
    def _check_margin(self) -> Self:
        from idloss.training.margins import check_margin  # slow to import

        check_margin(self.margin, self.margin_options)
        return self


def recipe_names() -> list[str]:
    """Names of the recipes in the zoo."""
    return sorted(path.stem for path in (zoo_folder() / "recipes").glob("*.yaml"))


def load_recipe(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    kind: type[Options] = Recipe,  # type: ignore[assignment]
) -> Options:
    """Read a recipe and change some of its fields.

    A value is what its field takes it for, not what YAML 1.1 does: `no` is a word in a text, 0045
    a text or 45.

    Args:
        recipe: A name in `recipe_names()`, or the path of a YAML file.
        overrides: `field=value`, a list or mapping in YAML, anything else as it is written:
            `batch_size=32`, `factors=[4, 8]`, `data=my faces #1`.
        kind: The class of its fields.

    Returns:
        The recipe.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: It is not YAML, or a field or value is not valid; one line that names it.
    """
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = zoo_folder() / "recipes" / f"{recipe}.yaml"
        if not path.is_file():
            raise FileNotFoundError(
                did_you_mean("recipe", str(recipe), recipe_names())
                + "; a file of your own ends in .yaml"
            )
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}")
    fields = _texts(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(fields, dict):
        raise ValueError(  # noqa: TRY004 - its content, not an argument's type
            f"{path}: a recipe is a list of 'field: value', got {fields!r}"
        )
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"{override!r} is not field=value, such as batch_size=32")
        value = value.strip()
        fields[name] = _texts(value, override) if value[:1] in tuple("[{\"'") else value
    for name, value in fields.items():
        if isinstance(value, dict) and name.endswith("_options"):
            fields[name] = _typed(value)
        elif isinstance(value, str) and _typed(value) is None:
            fields[name] = None
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        complaints = "; ".join(_complaint(kind, one) for one in error.errors())
        raise ValueError(f"{path.name}: {complaints}") from None


def save_recipe(options: RunOptions, path: Path, notes: Sequence[str] = ()) -> None:
    """Write a recipe with every field resolved, below some notes, whole or not at all."""
    above = "".join(f"# {note}\n" for note in notes)
    fields = yaml.safe_dump(options.model_dump(mode="json"), sort_keys=False)
    with written_whole(path) as temporary:
        temporary.write_text(above + fields, encoding="utf-8")


def read_notes(path: Path) -> list[str]:
    """The notes above a recipe; none if there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [line.removeprefix("# ") for line in lines if line.startswith("# ")]


def _complaint(kind: type[RunOptions], error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return did_you_mean("field", name, kind.model_fields)
    message = error["msg"].removeprefix("Value error, ")
    if not name:
        return str(message)
    return f"{name}: {message[:1].lower()}{message[1:]}, got {_typed(error['input'])!r}"


class _Texts(yaml.BaseLoader):
    """Reads every scalar as the text that is written, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is said twice")
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        return _Quoted(node.value) if node.style else str(node.value)


class _Quoted(str):
    """A text, whatever it looks like."""

    __slots__ = ()


def _texts(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Texts)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML ({' '.join(str(error).split())})") from None


def _typed(value: Any) -> Any:
    """What a text says where no field tells its type: a number, true, false, null, or a text."""
    if isinstance(value, dict):
        for key, one in value.items():
            if type(one) is str and one.lower() in ("yes", "no", "on", "off"):
                # as a text it would count as true
                raise ValueError(f"{key}: {one} can be two things: write true, false or '{one}'")
        return {str(key): _typed(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_typed(one) for one in value]
    if not isinstance(value, str) or isinstance(value, _Quoted):
        return str(value) if isinstance(value, str) else value
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    return value
