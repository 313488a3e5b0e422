"""What to train, as a small YAML file: the paper's recipes and any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, overload

import yaml
from pydantic import Field, model_validator

from idloss.errors import did_you_mean
from idloss.losses import DISTANCES
from idloss.resample import Size, parse_size
from idloss.training.options import FaceOptions, RunOptions
from idloss.weights.files import written_whole
from idloss.weights.zoo import zoo_folder

Options = TypeVar("Options", bound=RunOptions)


class Recipe(FaceOptions):
    """Train an SRNet with an image loss plus lambda times an identity loss.

    With its defaults it is section 4.1 of the paper (Lai, He and Lam, ICIP 2019), with what its
    released code adds.

    Attributes:
        srnet: Name of the SRNet.
        srnet_options: Its arguments, such as `depth`.
        fnet: Name of the FNet of the identity loss, or names with their weights.
        weight: Lambda; 0 leaves the image loss alone.
        distance: Between embeddings.
        image_loss: Between SR and MR, both in [-1, 1].
        features: `"stored"`: HR features are computed once for the whole set and kept beside
            prepared data; `"live"`: in each step.
        sizes: LR sizes, rows and columns, instead of `factors`.
    """

    PASSIVE: ClassVar[frozenset[str]] = FaceOptions.PASSIVE | {"features"}

    srnet: str = "edsr16_64"
    srnet_options: dict[str, Any] = Field(default_factory=dict)
    fnet: str | dict[str, float] = "sface"
    weight: Annotated[float, Field(ge=0)] = 0.5
    distance: str = "cosine"
    image_loss: Literal["l1", "mse", "smooth_l1"] = "l1"
    features: Literal["stored", "live"] = "stored"
    sizes: tuple[Size, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _spell_out_sizes(cls, fields: Any) -> Any:
        """`sizes: [7x6, 14x12]`, as on every command line of the house."""
        if isinstance(fields, Mapping) and isinstance(fields.get("sizes"), (list, tuple)):
            sizes = [parse_size(one) if isinstance(one, str) else one for one in fields["sizes"]]
            return {**fields, "sizes": sizes}
        return fields

    @model_validator(mode="after")
    def _check_names_and_sizes(self) -> Recipe:
        if self.distance not in DISTANCES:
            raise ValueError(did_you_mean("distance", self.distance, DISTANCES))
        self.lr_sizes()
        return self

    def lr_sizes(self) -> tuple[Size, ...]:
        """LR sizes that batches are drawn at, rows and columns.

        Raises:
            ValueError: As `sizes_by_factor`.
        """
        return self.sizes or self.sizes_by_factor(self.crop)


def recipe_names() -> list[str]:
    """Names of the recipes in the zoo."""
    return sorted(path.stem for path in (zoo_folder() / "recipes").glob("*.yaml"))


@overload
def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe: ...


@overload
def load_recipe(recipe: str | Path, overrides: Sequence[str], kind: type[Options]) -> Options: ...


def load_recipe(
    recipe: str | Path, overrides: Sequence[str] = (), kind: type[RunOptions] = Recipe
) -> RunOptions:
    """Read a recipe and change some of its fields.

    Args:
        recipe: A name in `recipe_names()`, or the path of a YAML file.
        overrides: `field=value`, the value in YAML: `batch_size=32`, `factors=[4, 8]`.
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
    fields = _yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(fields, dict):
        raise ValueError(  # noqa: TRY004 - its content, not an argument's type
            f"{path}: a recipe is a list of 'field: value', got {fields!r}"
        )
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"{override!r} is not field=value, such as batch_size=32")
        fields[name] = _yaml(value, override)
    return kind.parse(fields, path.name)


def save_recipe(options: RunOptions, path: Path) -> None:
    """Write a recipe with every field resolved.

    Args:
        options: The recipe.
        path: The YAML file, written whole.
    """
    fields = options.model_dump(mode="json")
    with written_whole(path) as temporary:
        temporary.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML ({' '.join(str(error).split())})") from None
