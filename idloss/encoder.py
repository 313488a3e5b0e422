"""FaceEncoder: a frozen face recogniser behind one door, from RGB [0, 1] crops to embeddings."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from idloss.geometry import convert_crop, get_template
from idloss.registry import create_fnet
from idloss.resample import resize

if TYPE_CHECKING:
    from collections.abc import Callable

Interpolation = Literal["bicubic", "bilinear", "nearest"]
ChannelOrder = Literal["rgb", "bgr"]


# how far a folded network may stray, relative to its output: some ten roundings of float32
_FOLD_TOLERANCE = 1e-5


class FaceEncoder(nn.Module):
    """A frozen FNet that takes face crops of any size and gives embeddings.

    The network is held outside `nn.Module`'s bookkeeping: it moves with `.to()`, is copied and
    pickled with its owner, but no parent can switch it to training mode, and it appears in no
    `state_dict()`, `parameters()`, optimizer or DDP bucket. Gradients flow to the images, never
    to the weights.

    Args:
        fnet: Name of a registered FNet, a `"timm/..."`, `"hf-hub:..."` or `"local-dir:..."` name,
            or a module with `pretrained_cfg` (its `mean`, `std`, `input_size`) and `num_features`.
        pretrained: Load the FNet's weights; ignored when `fnet` is a module.
        crop: Template the images are aligned to (`"sphereface"`, `"arcface"`, ...). When it is not
            the FNet's own crop the images are converted. `None`: they are the FNet's crop, or are
            to be stretched to its input, as the paper does for VGG-Face (section 4.1).
        interpolation: How crops reach the FNet's input size (OpenCV convention, no antialias):
            `"bilinear"` in training, `"bicubic"` at test (paper, section 3).
        flip: Concatenate the embeddings of the crop and of its mirror image (paper, section 4.1).
        value_range: Lowest and highest value of the images.
        channel_order: Channel order of the images.
        **fnet_options: Passed on to `create_fnet`.

    Raises:
        ValueError: If the FNet is unknown, says nothing of its input, or an option is not valid.
    """

    fnet: nn.Module
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        fnet: str | nn.Module = "sface",
        *,
        pretrained: bool = True,
        crop: str | None = None,
        interpolation: Interpolation = "bilinear",
        flip: bool = False,
        value_range: tuple[float, float] = (0.0, 1.0),
        channel_order: ChannelOrder = "rgb",
        **fnet_options: Any,
    ) -> None:
        super().__init__()
        low, high = value_range
        if not low < high:
            raise ValueError(f"value_range must be (low, high) with low < high, got {value_range}")
        if channel_order not in ("rgb", "bgr"):
            raise ValueError(f"channel_order must be 'rgb' or 'bgr', got {channel_order!r}")
        net = create_fnet(fnet, pretrained=pretrained, **fnet_options)
        # Straight into __dict__: nn.Module.__setattr__ would make it a child, and with that a part
        # of the parent's mode, parameters and checkpoint.
        self.__dict__["fnet"] = net.eval().requires_grad_(False)
        cfg: dict[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
        self.input_size: tuple[int, int] = tuple(cfg["input_size"][-2:])
        self.num_features = int(net.num_features) * (2 if flip else 1)  # type: ignore[arg-type]
        self.interpolation = interpolation
        self.flip = flip
        self.channel_order = channel_order
        self.crop = get_template(crop).name if crop is not None else None
        self.fnet_crop: str | None = net.crop  # type: ignore[assignment]

        # One affine map takes value_range to [0, 1] and on to the FNet's normalisation.
        mean = torch.tensor(cfg["mean"], dtype=torch.float64)
        std = torch.tensor(cfg["std"], dtype=torch.float64)
        scale = 1 / ((high - low) * std)
        shift = (-low / (high - low) - mean) / std
        self.register_buffer("scale", scale.float().view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(1, -1, 1, 1), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FaceEncoder:
        """Let the hidden network follow `.to()`, `.cuda()`, `.half()` and their kin."""
        self.fnet._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def preprocess(self, images: Tensor) -> Tensor:
        """Bring crops to what the FNet takes.

        Args:
            images: Face crops `[B, 3, H, W]` of any size, floating point, in `value_range`.

        Returns:
            The normalised RGB input of the FNet, `[B, 3, *input_size]`, in the FNet's precision.
        """
        check_images(images, "images")
        if self.crop is not None and self.fnet_crop not in (None, self.crop):
            images = resize(images, get_template(self.crop).size, mode=self.interpolation)
            images = convert_crop(images, self.crop, str(self.fnet_crop))
        images = resize(images, self.input_size, mode=self.interpolation)
        if self.channel_order == "bgr":
            images = images.flip(1)
        return torch.addcmul(self.shift, images.to(self.scale.dtype), self.scale)

    def forward(self, images: Tensor) -> Tensor:
        """Embed face crops; differentiable with respect to them.

        Args:
            images: Face crops `[B, 3, H, W]` of any size, floating point, in `value_range`.

        Returns:
            Embeddings `[B, num_features]`, not normalised.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If they are not `[B, 3, H, W]`.
        """
        inputs = self.preprocess(images)
        if not self.flip:
            return self.fnet(inputs)  # type: ignore[no-any-return]
        straight, mirrored = self.fnet(torch.cat((inputs, inputs.flip(-1)))).chunk(2)
        return torch.cat((straight, mirrored), dim=1)

    def stretches(self, height: int, width: int) -> bool:
        """Whether images of this size would lose their proportions on the way to the FNet.

        An FNet without a crop of its own (VGG-Face in the paper) is meant to stretch them.
        """
        if self.fnet_crop is None:
            return False
        rows, columns = self.input_size if self.crop is None else get_template(self.crop).size
        return abs(height * columns / (width * rows) - 1) > 0.05  # 5 %: rounding at 7x6 is below

    def extra_repr(self) -> str:
        """What `print` shows, the hidden network's name included."""
        cfg: dict[str, Any] = self.fnet.pretrained_cfg  # type: ignore[assignment]
        name = cfg.get("architecture", type(self.fnet).__name__)
        return (
            f"fnet={name}, input_size={self.input_size}, crop={self.crop}, "
            f"interpolation={self.interpolation}, flip={self.flip}, frozen"
        )


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Find the device that an option names.

    Args:
        name: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`, or `"auto"`: a GPU if there is one.

    Returns:
        The device, which has been tried.

    Raises:
        ValueError: There is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # what a device that is not there raises differs from backend to backend
    except Exception as error:
        reason = str(error).splitlines()[0]
        here = f"'{accelerator}' and 'cpu'" if accelerator else "'cpu' alone"
        raise ValueError(
            f"device {str(name)!r} cannot be used ({reason}); this machine has {here}"
        ) from error
    return device


def check_images(images: Tensor, name: str) -> None:
    """Refuse what is not a float batch `[B, 3, H, W]`, by shape and dtype alone.

    It reads no pixel, so it costs nothing and compiles.

    Args:
        images: What to look at.
        name: What the error is to call it.

    Raises:
        TypeError: If `images` is not a floating-point tensor.
        ValueError: If it is not `[B, 3, H, W]`.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(
            f"{name} must be floating point, got {images.dtype}; "
            "idloss.resample.to_float turns uint8 images into [0, 1]"
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{name} must be [B, 3, H, W], got {list(images.shape)}")


@torch.no_grad()
def fold_batch_norm(net: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """A copy of a network with its batch norms folded into convolutions, where that is exact.

    Pairs are found by watching one image go through: a batch norm is folded when it is given the
    very tensor that a convolution returned. Whether nothing else used that tensor cannot be seen,
    so the copy is compared with the original, and given up where they differ.

    Args:
        net: A network in eval mode.
        input_size: `(3, H, W)` of its input.

    Returns:
        The copy, or the network itself where there is nothing to fold or folding changed it.
    """
    reference = next(net.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, *input_size, generator=generator).to(reference)
    try:
        twin = copy.deepcopy(net)
    except Exception:  # weight norm, kept outputs, sessions of other runtimes
        return net
    pairs = _pairs(twin, image)
    if not pairs:
        return net
    names = {module: name for name, module in twin.named_modules()}
    for conv, norm in pairs:
        _replace(twin, names[conv], fuse_conv_bn_eval(conv, norm))
        _replace(twin, names[norm], nn.Identity())
    expected, got = net(image), twin(image)
    error = torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected)
    return twin if error <= _FOLD_TOLERANCE else net


def _pairs(net: nn.Module, image: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and the batch norms that take their output, each of them used once."""
    made_by: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # holds the tensors, so that ids stay theirs
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    runs: dict[nn.Module, int] = {}

    def ran(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        runs[module] = runs.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            made_by[id(output)] = (module, output)
        elif id(inputs[0]) in made_by:
            pairs.append((made_by[id(inputs[0])][0], module))  # type: ignore[arg-type]

    # subclasses may do more than their parent
    watched = [m for m in net.modules() if type(m) in (nn.Conv2d, nn.BatchNorm2d)]
    hooks = [module.register_forward_hook(ran) for module in watched]
    try:
        net(image)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in pairs if all(runs[module] == 1 for module in pair)]


def _replace(net: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, child = name.rpartition(".")
    setattr(net.get_submodule(owner), child, module)
