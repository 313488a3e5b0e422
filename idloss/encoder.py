"""FaceEncoder: a frozen face recogniser behind one door, from RGB [0, 1] crops to embeddings."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from idloss.create import create_fnet, describe_output
from idloss.frozen import freeze, quicken, reference
from idloss.geometry import Template, convert_crop, coverage, get_template
from idloss.resample import ImageWatch, check_images, interpolate, is_computed, resize

Interpolation = Literal["bicubic", "bilinear", "nearest"]
ChannelOrder = Literal["rgb", "bgr"]

# Aligned faces change little in the FNet's eyes if they are cut a little differently.
# Re-crops by which alignment is judged: scale, and shift as a share of half the crop. Mean cosine
# of embeddings and those of re-crops, 8 faces of LFW: 0.91 to 0.95 if aligned to the FNet's crop
# (0.89 if enlarged four times); on others 0.78 to 0.86 (MobileFaceNet of CASIA-WebFace), 0.70 to
# 0.84 (EdgeFace-XXS), 0.84 to 0.9 (MobileFaceNet of MS1M).
_STEADY = 0.88
# Mean cosine of 16 people of LFW: 0.0 to 0.25 for the trained FNets above, on aligned crops or not
# (shifted by 10 %, 0.46 once); 0.40 to 0.99 for 17 architectures with random weights.
_ALIKE = 0.35
_ENOUGH_FACES, _MOST_FACES = 8, 32
CUT = (
    "{} cuts the gradient (no_grad, detach, numpy, rounding?): the SR network would learn nothing "
    "from it"
)
COVERAGE = 0.75
"""Least share of an FNet's crop that other crops are to hold: 112x96 hold 86 % of ArcFace's."""
_RECROPS = ((1.08, 0.0, 0.0), (0.92, 0.0, 0.0), (1.0, 0.06, 0.0), (1.0, 0.0, 0.06))


class FaceEncoder(nn.Module):
    """A frozen FNet that takes face crops of any size and gives embeddings.

    The network is the encoder's own, a copy where a module is given, and held outside
    `nn.Module`'s bookkeeping: it moves with `.to()`, is copied and pickled with its owner, but no
    parent can train it, save it or lose it (`to_empty()`), and it is in no `state_dict()`,
    `parameters()`, optimizer or DDP bucket. Gradients flow to the images, never to the weights.

    Args:
        fnet: Name of a registered FNet, a `"timm/..."`, `"hf-hub:..."` or `"local-dir:..."` name,
            or a module from normalised RGB to embeddings `[B, D]` with a `pretrained_cfg` (its
            `mean`, `std`, `input_size`), scripted and exported ones too; see `create_fnet`.
        pretrained: Load the FNet's weights; ignored when `fnet` is a module.
        crop: Template the images are aligned to (`"sphereface"`, `"arcface"`, a `Template`, ...),
            from which they are converted to the FNet's own. `None`: they have that already, or are
            to be stretched to its input, as the paper does for VGG-Face (section 4.1).
        interpolation: How crops are enlarged to the FNet's input size (OpenCV convention):
            `"bilinear"` in training, `"bicubic"` at test (paper, section 3). Crops that shrink are
            antialiased.
        flip: Concatenate the embeddings of the crop and of its mirror image (paper, section 4.1).
        value_range: Lowest and highest value of the images.
        channel_order: Channel order of the images.
        **fnet_options: Passed on to `create_fnet`.

    Raises:
        ValueError: If the FNet is unknown, says nothing of its input, gives no embeddings, or an
            option is not valid.
    """

    fnet: nn.Module
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        fnet: str | nn.Module = "sface",
        *,
        pretrained: bool = True,
        crop: str | Template | None = None,
        interpolation: Interpolation = "bilinear",
        flip: bool = False,
        value_range: tuple[float, float] = (0.0, 1.0),
        channel_order: ChannelOrder = "rgb",
        **fnet_options: Any,
    ) -> None:
        super().__init__()
        self._watch = ImageWatch(value_range)  # refuses a range that is none
        if channel_order not in ("rgb", "bgr"):
            raise ValueError(f"channel_order must be 'rgb' or 'bgr', got {channel_order!r}")
        if isinstance(fnet, torch.export.ExportedProgram):
            fnet = fnet.module()
        if isinstance(fnet, nn.Module):
            fnet = _own_copy(fnet)
        # weights made on the meta device would be lost: the FNet is in nobody's checkpoint
        nowhere = torch.get_default_device().type == "meta"
        with torch.device("cpu" if nowhere else torch.get_default_device()):
            net = create_fnet(fnet, pretrained=pretrained, **fnet_options)
        # past nn.Module.__setattr__, which would make it a child: its parents' to train and save
        self.__dict__["fnet"] = freeze(net)
        self._list_parts()
        cfg: dict[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
        if cfg["input_size"][0] != 3:
            raise ValueError(
                f"{type(net).__name__} takes {cfg['input_size'][0]} channels and faces are RGB: "
                "wrap it in a module that turns RGB into what it takes"
            )
        self.input_size: tuple[int, int] = tuple(cfg["input_size"][-2:])
        self.num_features = int(net.num_features) * (2 if flip else 1)  # type: ignore[arg-type]
        self.interpolation = interpolation
        self.flip = flip
        self.channel_order = channel_order
        self.crop = get_template(crop) if crop is not None else None
        own: Any = net.crop
        self.fnet_crop: Template | None = get_template(own) if own is not None else None
        self._is_tried = False
        self.value_range = value_range
        # one affine map takes value_range to [0, 1] and on to the FNet's normalisation
        low, high = value_range
        span, lines = high - low, list(zip(cfg["mean"], cfg["std"], strict=True))
        self._affine = (
            [1 / (span * std) for _, std in lines],
            [(-low / span - mean) / std for mean, std in lines],
        )
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)
        self._place_affine(reference(net).device)
        if (doubt := self.border_complaint(self.crop)) is not None:
            warnings.warn(doubt, UserWarning, stacklevel=2)

    def _list_parts(self) -> None:
        """List the network's modules once: it takes a tenth of a millisecond."""
        # those of a script would be copied apart
        is_script = isinstance(self.fnet, torch.jit.ScriptModule)
        self._parts = (self.fnet,) if is_script else tuple(self.fnet.modules())

    def _place_affine(self, device: torch.device) -> None:
        """Make the affine map anew, in float32, or in float64 if the FNet is in that."""
        self._dtype = reference(self.fnet).dtype
        precise = torch.float64 if self._dtype == torch.float64 else torch.float32
        self.scale, self.shift = (
            torch.tensor(line, dtype=precise, device=device).view(1, -1, 1, 1)
            for line in self._affine
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FaceEncoder:
        """Let the hidden network follow `.to()`, `.cuda()`, `.half()` and their kin."""
        generator = torch.Generator()
        generator.seed()  # new each time, as freed memory may hold the last; nobody else's numbers
        sample = torch.rand(8, generator=generator, device="cpu")
        moved = fn(sample)
        keep = fn
        if not moved.is_meta and not torch.allclose(moved.float().cpu(), sample, atol=0.1):
            # to_empty(): its owner will load a checkpoint, in which the FNet is not
            if reference(self.fnet).is_meta:
                raise RuntimeError(
                    "the frozen FNet has no weights (it is on the meta device) and to_empty() "
                    "gives it none: make the encoder or the loss from an FNet that has them"
                )
            keep = lambda tensor: tensor.to(moved.device)  # noqa: E731
        self.fnet._apply(keep)
        super()._apply(keep, recurse)
        self._place_affine(self.scale.device)
        return self

    def preprocess(self, images: Tensor) -> Tensor:
        """Crops `[B, 3, H, W]` to normalised RGB `[B, 3, *input_size]` in the FNet's precision."""
        check_images(images)
        if self.crop is not None and self.fnet_crop not in (None, self.crop):
            images = self._resized(images, self.crop.size)
            images = convert_crop(images, self.crop, self.fnet_crop)
        images = self._resized(images, self.input_size)
        if self.channel_order == "bgr":
            images = images.flip(1)
        images = torch.addcmul(self.shift, images.to(self.scale.dtype), self.scale)
        return images.to(self._dtype)

    def _resized(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        rows, columns = images.shape[-2:]
        # shrunk with antialiasing, so that every pixel has its say
        mode = "bilinear" if self.interpolation == "nearest" else self.interpolation
        is_small: Any = (rows <= size[0]) & (columns <= size[1])
        if isinstance(is_small, torch.SymBool):  # exported for crops of any size
            enlarge, shrink = (
                partial(interpolate, height=size[0], width=size[1], mode=mode, antialias=antialias)
                for antialias in (False, True)
            )
            fitted: Tensor = torch.cond(is_small, enlarge, shrink, (images,))  # type: ignore[arg-type]
            return fitted
        if is_small:
            return resize(images, size, mode=self.interpolation)
        return resize(images, size, mode=mode, convention="antialias")

    def forward(self, images: Tensor) -> Tensor:
        """Embed face crops; differentiable with respect to them.

        Args:
            images: Face crops `[B, 3, H, W]` of any size, floating point, in `value_range`.

        Returns:
            Embeddings `[B, num_features]`, not normalised.
        """
        check_images(images)
        fresh = torch.is_grad_enabled() and images.requires_grad
        complaint = self._watch.complaint(images, "images", drawn_yet=not fresh)
        if complaint is not None:
            warnings.warn(complaint, UserWarning, stacklevel=2)
        return self.embed(images)

    def embed(self, images: Tensor) -> Tensor:
        """`forward` for images `[B, 3, H, W]` whose range somebody else watches."""
        self._keep_frozen()
        if torch.compiler.is_dynamo_compiling():
            if images.requires_grad and torch.is_grad_enabled():
                self._try_gradient_of_a_graph()
        elif not self._is_tried and is_computed(images) and is_differentiated(images):
            self._is_tried = True
            with temporarily_clear_interpreter_stack():
                self.__dict__["fnet"] = quicken(self.fnet, (3, *self.input_size))
            self._list_parts()
            self._refuse_a_cut(images)
        return self._embed(images)

    @torch.compiler.assume_constant_result  # runs while a graph is made, and is not in it
    def _keep_frozen(self) -> bool:
        """Freeze the network again if somebody reached for `encoder.fnet`, or a part of it."""
        for module in self._parts:
            weights = module._parameters.values()
            if getattr(module, "training", False) or any(
                weight is not None and weight.requires_grad for weight in weights
            ):
                freeze(self.fnet)
        return True

    def _embed(self, images: Tensor) -> Tensor:
        inputs = self.preprocess(images)
        if not self.flip:
            return self._embeddings(inputs)
        both = self._embeddings(torch.cat((inputs, inputs.flip(-1))))
        return torch.cat(both.unflatten(0, (2, -1)).unbind(), dim=1)

    def _refuse_a_cut(self, like: Tensor) -> None:
        """Raise if no gradient comes back to images like these, drawn at random."""
        low, high = self.value_range
        unit = lambda noise: self._embed(low + (high - low) * noise)  # noqa: E731
        if not passes_gradient(unit, like):
            raise RuntimeError(CUT.format(f"FNet {type(self.fnet).__name__}"))

    @torch.compiler.assume_constant_result
    def _try_gradient_of_a_graph(self) -> bool:
        like = torch.empty(2, 3, *self.input_size, dtype=self._dtype, device=self.scale.device)
        self._refuse_a_cut(like)
        return True

    def _embeddings(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.fnet(inputs)
        width = self.num_features // 2 if self.flip else self.num_features
        if not isinstance(features, Tensor) or features.shape[1:] != (width,):
            raise ValueError(
                f"{type(self.fnet).__name__} gave {describe_output(features)} for "
                f"{inputs.shape[0]} images, and its num_features is {width}: take its classifier "
                "off, mend its num_features, or wrap it so that forward gives embeddings alone"
            )
        if inputs.requires_grad and torch.is_grad_enabled() and not features.requires_grad:
            raise RuntimeError(CUT.format(f"FNet {type(self.fnet).__name__}"))
        return features

    @torch.no_grad()
    def alignment_complaint(self, images: Tensor) -> str | None:
        """Doubt that faces `[B, 3, H, W]` lie where the FNet expects them, with the evidence."""
        if len(images) < _ENOUGH_FACES or self.fnet_crop is None:
            return None
        inputs = self.preprocess(images[:_MOST_FACES])
        straight, cosines = self.fnet(inputs).float(), []
        for zoom, right, down in _RECROPS:
            line = inputs.new_tensor([[zoom, 0, right], [0, zoom, down]], dtype=torch.float32)
            lines = line.expand(len(inputs), 2, 3)
            grid = F.affine_grid(lines, list(inputs.shape), align_corners=False)
            moved = F.grid_sample(inputs.float(), grid, padding_mode="border", align_corners=False)
            other = self.fnet(moved.to(inputs.dtype)).float()
            cosines.append(F.cosine_similarity(straight, other).mean())
        steady = float(torch.stack(cosines).mean())
        count, together = len(straight), F.normalize(straight).sum(0).square().sum()
        alike = float(together - count) / (count * (count - 1))
        if not steady < _STEADY or alike > _ALIKE:
            return None
        crop = self.crop or self.fnet_crop
        return (
            f"hr does not look aligned to {crop.name!r}: moved or zoomed by 3 to 8 %, its faces "
            f"keep a cosine of {steady:.2f} for {self}, where aligned faces keep 0.91 or more. "
            "Is crop= right, and are the faces aligned?"
        )

    def stretches(self, height: int, width: int) -> bool:
        """Whether images of this size would lose their proportions on the way to the FNet."""
        if self.fnet_crop is None:  # as VGG-Face, which is meant to stretch them (paper)
            return False
        rows, columns = self.input_size if self.crop is None else self.crop.size
        return abs(height * columns / (width * rows) - 1) > 0.05  # 5 %: rounding at 7x6 is below

    def border_complaint(self, crop: Template | None) -> str | None:
        """Doubt that crops of a template hold what the FNet wants to see, with the evidence."""
        if crop is None or self.fnet_crop in (None, crop):
            return None
        share = coverage(crop, self.fnet_crop)
        if share >= COVERAGE:
            return None
        return (
            f"{self} takes {self.fnet_crop.name!r} crops, of which crop={crop.name} holds "
            f"{share:.0%}: the rest is its border, repeated. Give it wider crops"
        )

    def extra_repr(self) -> str:
        """What `print` shows, the hidden network's name included."""
        cfg: dict[str, Any] = self.fnet.pretrained_cfg  # type: ignore[assignment]
        name = cfg.get("architecture", type(self.fnet).__name__)
        return (
            f"fnet={name}, input_size={self.input_size}, crop={self.crop and self.crop.name}, "
            f"interpolation={self.interpolation}, flip={self.flip}, frozen"
        )


def is_differentiated(images: Tensor) -> bool:
    """Whether a derivative by images is wanted, `torch.func`'s transforms and tangents included."""
    if not torch.is_grad_enabled():
        return False
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(images).tangent is not None:
        return True
    while not images.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(images):
        images = torch._C._functorch.get_unwrapped(images)  # as mapped inside of grad
    return images.requires_grad


def passes_gradient(function: Callable[[Tensor], Any], like: Tensor) -> bool:
    """Whether a gradient comes back through a function, at noise in [0, 1] like a tensor.

    The function meets no tensors but its own: inside `torch.func` others belong to a transform,
    which is left for the while.
    """
    # of its own, so that the caller draws what it would have drawn: resumed runs are as others
    generator = torch.Generator().manual_seed(0)
    device = like.device
    with (
        temporarily_clear_interpreter_stack(),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        noise = torch.rand(like.shape, generator=generator, dtype=torch.float32, device="cpu")
        example = noise.to(device, like.dtype).requires_grad_()
        result = function(example)
        if not (isinstance(result, Tensor) and result.requires_grad):
            return False
        # not their plain sum, whose gradient may be zero for good (after a softmax)
        weights = torch.linspace(0.5, 1.5, result.numel(), device=result.device)
        total = (result.flatten().to(weights.dtype) * weights).sum()
        (gradient,) = torch.autograd.grad(total, example, allow_unused=True)
        return gradient is not None and bool(gradient.any())


def _own_copy(fnet: nn.Module) -> nn.Module:
    try:
        with torch.no_grad():  # a scripted module's copy would be tied to it by gradients
            return copy.deepcopy(fnet)
    except Exception as error:  # anything, from a stranger's module
        warnings.warn(
            f"{type(fnet).__name__} cannot be copied ({type(error).__name__}: {error}): it is used "
            "itself, frozen and in eval mode; let nobody train it",
            UserWarning,
            stacklevel=3,
        )
        return fnet


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The device that an option names, tried; `"auto"` is a GPU if there is one."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # which, differs from backend to backend
        reason = str(error).splitlines()[0]
        advice = "'auto' takes what this machine has"
        raise ValueError(f"device {str(name)!r} cannot be used ({reason}); {advice}") from error
    return device
