"""Networks of others as SRNets: what spandrel loads, and restorers of one size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from timm.models import generate_default_cfgs, resolve_pretrained_cfg
from torch import Tensor, nn

from idloss.errors import import_extra
from idloss.geometry import Template, get_template
from idloss.registry import register_srnet
from idloss.resample import ImageWatch, resize
from idloss.weights.files import no_larger_than
from idloss.weights.loading import find_tensors

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

Size = tuple[int, int]
_Call = Callable[[nn.Module, Tensor], Tensor]

RESTORED = (512, 512)
"""What GFPGAN, CodeFormer and RestoreFormer take and give: FFHQ crops."""


class Restorer(nn.Module):
    """A face restorer of one size as an SRNet: faces of any size in, its own size out.

    GFPGAN, CodeFormer and their kin take faces that were enlarged to 512x512 already, in [-1, 1],
    and give a tuple that begins with the face (TencentARC/GFPGAN, gfpgan/utils.py).

    Args:
        module: From `[B, 3, *size]` in `value_range` to the same, or to a tuple that begins so.
        size: Rows and columns it takes.
        value_range: Lowest and highest value of the images it takes and gives.
        crop: Template of its faces.
        **options: Passed on to its `forward`, such as `randomize_noise=False` of GFPGAN, with which
            it gives the same answer twice, or `w=0.5` of CodeFormer.

    Example:
        >>> srnet = Restorer(gfpgan, return_rgb=False, randomize_noise=False)
    """

    def __init__(
        self,
        module: nn.Module,
        size: Size = RESTORED,
        *,
        value_range: tuple[float, float] = (-1.0, 1.0),
        crop: str | Template = "ffhq",
        **options: Any,
    ) -> None:
        super().__init__()
        get_template(crop)
        self.module = module
        self.size, self.value_range, self.crop, self.options = size, value_range, crop, options
        self._watch = ImageWatch(margin=1.0)  # bicubic LR and noise may leave [0, 1]

    def forward(self, x: Tensor) -> Tensor:
        """RGB `[B, 3, H, W]` in [0, 1] to RGB `[B, 3, *size]`, which may leave [0, 1]."""
        self._watch.refuse(x, 3)
        low, high = self.value_range
        x = resize(x, self.size, mode="bilinear")  # as GFPGAN's own inference enlarges
        found = self.module(x * (high - low) + low, **self.options)
        face: Tensor = found if isinstance(found, Tensor) else found[0]
        return (face - low) / (high - low)


class SpandrelNetwork(nn.Module):
    """An image network that spandrel has loaded, as an SRNet that can be trained.

    Its `state_dict()` has the network's own keys behind `module.`, which spandrel takes off again,
    as most loaders do: what is saved opens there.

    Args:
        descriptor: What spandrel gives for a file.
        size: Rows and columns that faces are enlarged to first; None for 512x512 of networks that
            restore faces, and for others no such step.

    Raises:
        ValueError: If the network takes a mask, or other images than RGB.
    """

    def __init__(self, descriptor: ImageModelDescriptor[Any], size: Size | None = None) -> None:
        super().__init__()
        name, purpose = descriptor.architecture.name, descriptor.purpose
        if purpose == "Inpainting":
            raise ValueError(f"{name} is for inpainting and takes a mask: no SRNet")
        channels = (descriptor.input_channels, descriptor.output_channels)
        if channels != (3, 3):
            raise ValueError(f"{name} takes and gives {channels} channels; an SRNet takes RGB")
        self.module = descriptor.model.float()
        self.scale: int = descriptor.scale
        # What timm's tools ask of any model: no classifier, and a width.
        self.num_classes, self.num_features = 0, 3
        self.architecture = str(descriptor.architecture.id)
        self._padding = descriptor.size_requirements.get_padding
        # not the descriptor's __call__, which is for inference: no gradient gets out of it
        self._call: _Call = _CALLS.get(self.architecture, descriptor._call_fn)
        self.size = size
        if purpose == "FaceSR":
            self.crop = "ffhq"
            self.size = size or RESTORED
        self._watch = ImageWatch(margin=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """RGB `[B, 3, H, W]` in [0, 1] to RGB of `scale` times the size, which may leave [0, 1]."""
        self._watch.refuse(x, 3)
        if self.size is not None:
            x = resize(x, self.size, mode="bilinear")
        height, width = x.shape[-2:]
        across, down = self._padding(width, height)
        # mirrored as far as the image reaches, as spandrel does
        near = (min(across, width - 1), min(down, height - 1))
        x = F.pad(x, (0, near[0], 0, near[1]), "reflect")
        x = F.pad(x, (0, across - near[0], 0, down - near[1]), "replicate")
        return self._call(self.module, x)[..., : height * self.scale, : width * self.scale]

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.architecture}, scale={self.scale}, size={self.size}"


def _gfpgan(module: nn.Module, x: Tensor) -> Tensor:
    """GFPGAN in the range of its authors; spandrel 0.4.2 hands [0, 1] on to it.

    Its noise is the stored one at test, so that it gives the same answer twice.
    """
    face: Tensor = module(x * 2 - 1, return_rgb=False, randomize_noise=module.training)[0]
    return (face + 1) / 2


_CALLS: dict[str, _Call] = {"GFPGAN": _gfpgan}

default_cfgs = generate_default_cfgs(
    {"spandrel": {"num_classes": 0, "input_size": (3, 28, 24), "mean": (0, 0, 0), "std": (1, 1, 1)}}
)


@register_srnet
def spandrel(
    pretrained: bool = False,
    *,
    size: Size | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    pretrained_model_args: Any = None,
    num_classes: int = 0,  # which every config.json says
    cache_dir: Any = None,
) -> SpandrelNetwork:
    """What `create_srnet("spandrel:FILE")` builds; its weights tell its shape and come with it."""
    loader = _loader()
    cfg = resolve_pretrained_cfg("spandrel", pretrained_cfg, pretrained_cfg_overlay)
    if not (cfg.file or cfg.hf_hub_id):
        raise ValueError("a network of spandrel's is made from a file: 'spandrel:FILE'")
    place = f"spandrel:{cfg.file}" if cfg.file else f"hf-hub:{cfg.hf_hub_id}"
    if cfg.file and not Path(cfg.file).exists():
        raise FileNotFoundError(f"{place}: there is no such file")
    try:
        # read by us: spandrel unpacks what may fill the memory; its numbers are those of the keys
        tensors = dict(find_tensors(cfg, place, cache_dir))
        with no_larger_than(sum(tensor.nbytes for tensor in tensors.values())):
            descriptor = loader.load_from_state_dict(tensors)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes it raise
        reason = " ".join(str(error).split())[:400]
        raise ValueError(
            f"{place} is no network that spandrel loads ({type(error).__name__}: {reason}); "
            "spandrel_extra_arches, if installed, adds CodeFormer and others"
        ) from error
    model = SpandrelNetwork(descriptor, None if size is None else (size[0], size[1]))
    told = {key: value for key, value in vars(cfg).items() if value is not None and key != "file"}
    model.pretrained_cfg = {**told, "architecture": "spandrel"}  # type: ignore[assignment]
    return model


def _loader() -> Any:
    loading = import_extra("spandrel", "spandrel", "networks named 'spandrel:FILE' need")
    with suppress(ModuleNotFoundError):
        import spandrel_extra_arches

        spandrel_extra_arches.install(ignore_duplicates=True)
    return loading.ModelLoader()
