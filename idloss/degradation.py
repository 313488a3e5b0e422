"""From HR to LR: the paper's bicubic, and blur, noise and JPEG as in the wild.

Each face is degraded by itself on the CPU, by a seed of its own: its bits are the same on every
device, in any batch and in any number of processes. A face takes about 3 ms of one core; threads
share the batch. JPEG is Pillow's: torchvision's codec is deprecated since 0.29 and knows no 4:4:4,
and its v2 transforms draw one quality and sigma for a batch, from torch's global generator.
"""

from __future__ import annotations

import inspect
import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from idloss.errors import did_you_mean
from idloss.plugins import Registry
from idloss.resample import Convention, Mode, resize, to_float

__all__ = [
    "BicubicDegradation",
    "Degradation",
    "RealWorldDegradation",
    "get_degradation",
    "list_degradations",
    "register_degradation",
]

Range: TypeAlias = tuple[float, float]
_Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

_BATCH_PURPOSE = 0  # sets a batch's numbers apart from others that are drawn from the same seed
_LEVELS = 255
_JPEG_GRID = 16  # a JPEG repeats itself every 16 pixels with 4:2:0, every 8 with 4:4:4
_KERNEL_BITS = 14  # with 8 of the image and weights that add up to 4 or less: float32's 24
# Of each round: the chances that the image grows and shrinks (else it keeps its size), and the
# widest blur in pixels of LR. Real-ESRGAN's, with blurs of 3 and 1.5 pixels at x4.
_ROUNDS = ((0.0, 0.7, 0.75), (0.3, 0.4, 0.375))
# The wide (antialiased) ones stand for Real-ESRGAN's "area": sensors and good software average,
# cheap software does not.
_METHODS: tuple[tuple[Mode, Convention], ...] = (
    ("bilinear", "cv2"),
    ("bicubic", "cv2"),
    ("bilinear", "antialias"),
    ("bicubic", "antialias"),
)
_LIMITS = {
    "blur_sigma": (0.05, 5.0),
    "blur_shape": (0.1, 10.0),
    "gaussian_noise": (0.0, _LEVELS),
    "shot_noise": (0.0, _LEVELS**0.5),
    "jpeg_quality": (1, 100),
    "sinc_cutoff": (0.1, math.pi),
}
_BLUR_SIZE = 15
_SINC_SIZE = 7  # Real-ESRGAN's smallest, for images that are as small as that
_NOT_GAUSSIAN = 0.3  # of the kernels; Real-ESRGAN's generalised and plateau-shaped ones together


class Degradation(Protocol):
    """From HR to LR: any callable of this form can be trained with."""

    def __call__(self, hr: Tensor, size: tuple[int, int], *, seeds: Sequence[int]) -> Tensor:
        """Make faces small.

        Args:
            hr: uint8 RGB `[B, 3, H, W]`.
            size: Rows and columns of LR.
            seeds: A whole number from 0 to 2^64 - 1 for each face. What happens to a face depends
                on it alone, not on the rest of the batch or the device.

        Returns:
            LR, float32 RGB `[B, 3, *size]` in [0, 1], on the device of `hr`; those of this package
            are multiples of 1/255.
        """


_degradations: Registry[Callable[..., Degradation]] = Registry("degradation")
register_degradation = _degradations.named
"""Name what makes a degradation, so that recipes can ask for it as `degradation:`.

Its arguments are what they write as `degradation_options:`.
"""
list_degradations = _degradations.names
"""Names of the registered degradations, plug-ins included, sorted."""


def get_degradation(name: str, **options: Any) -> Degradation:
    """Make a degradation from its name.

    Args:
        name: One of `list_degradations()`.
        **options: Its arguments.

    Raises:
        ValueError: The name or an option is unknown, or an option is out of range.
    """
    kind = _degradations.find(name)
    arguments = inspect.signature(kind).parameters
    if all(argument.kind is not argument.VAR_KEYWORD for argument in arguments.values()):
        for option in options.keys() - arguments.keys():
            raise ValueError(did_you_mean(f"option of degradation {name!r}", option, arguments))
    return kind(**options)


@register_degradation("bicubic")
class BicubicDegradation:
    """OpenCV's bicubic down-sampling of 8-bit images to 8 bits (paper, section 4.1)."""

    def __call__(self, hr: Tensor, size: tuple[int, int], *, seeds: Sequence[int]) -> Tensor:
        """Make faces small, as `Degradation` says; nothing is left to chance."""
        _check(hr, seeds)
        return to_float(resize(hr, size))


@register_degradation("real_world")
@dataclass(kw_only=True, eq=False)
class RealWorldDegradation:
    """Blur, resize, add noise, compress; again; then reduce to the size asked for.

    The second-order degradation of Real-ESRGAN (Wang et al., ICCVW 2021, arXiv 2107.10833, section
    3), fitted to faces of a few pixels. Numbers that are said to be Real-ESRGAN's are those of its
    options/train_realesrgan_x4plus.yml.

    Every face has its own draw of everything, uniform in its range, and stays between HR and LR in
    size. The second JPEG comes mostly before the last reduction, as cameras compress more than a
    face, which lies anywhere in its grid of blocks. Images have 8 bits between all steps.

    Args:
        blur_sigma: Deviation of the blur in pixels of the image at that time, at most 0.75 pixels
            of LR in the first round, half that in the second. Real-ESRGAN's.
        blur_probability: Of a blur, in each round. Real-ESRGAN's second.
        anisotropic_probability: Of a blur that is wider in one direction. Real-ESRGAN's.
        blur_shape: Exponent of the generalised Gaussian, for 3 kernels of 10; 1 is the Gaussian.
            Real-ESRGAN's.
        gaussian_noise: Deviation in levels of 255. Up to half of Real-ESRGAN's, which leaves little
            of so small a face; twice it comes to the 0 to 20 of GFP-GAN's train_gfpgan_v1_simple.
        shot_noise: Deviation in levels over the square root of the level: the noise of photons
            (Poisson's, drawn as the Gaussian it is close to). Up to half of Real-ESRGAN's.
        shot_probability: Of shot noise, else it is Gaussian. Real-ESRGAN's.
        grey_probability: Of noise that is equal in all channels. Real-ESRGAN's.
        jpeg_quality: From 1 to 100. Between Real-ESRGAN's 30 to 95 and GFP-GAN's 60 to 100: 30 can
            leave a few patches of colour of a face of 28x24.
        full_chroma_probability: Of a JPEG without chroma subsampling.
        late_jpeg_probability: Of a second JPEG after the last reduction instead of before.
        sinc_probability: Of a sinc filter at the end, for the ringing of sharpened images.
        sinc_cutoff: Its cut-off in radians a pixel. Real-ESRGAN's begins at pi / 3, where a small
            face is blurred rather than sharpened.

    Raises:
        ValueError: An option is out of range.
    """

    blur_sigma: Range = (0.2, 3.0)
    blur_probability: float = 0.8
    anisotropic_probability: float = 0.31
    blur_shape: Range = (0.5, 4.0)
    gaussian_noise: Range = (0.0, 15.0)
    shot_noise: Range = (0.0, 1.5)
    shot_probability: float = 0.5
    grey_probability: float = 0.4
    jpeg_quality: Range = (40, 95)
    full_chroma_probability: float = 0.2
    late_jpeg_probability: float = 0.2
    sinc_probability: float = 0.2
    sinc_cutoff: Range = (2 * math.pi / 3, math.pi)

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            if name not in _LIMITS:
                if not 0 <= value <= 1:
                    raise ValueError(f"{name} must be from 0 to 1, got {value!r}")
                continue
            least, most = _LIMITS[name]
            try:
                low, high = (float(one) for one in value)
            except (TypeError, ValueError):
                low = high = math.nan
            if not least <= low <= high <= most:
                raise ValueError(
                    f"{name} must be two numbers, low and high, from {least:g} to {most:g}, got "
                    f"{value!r}"
                )
            if name == "jpeg_quality" and not (low.is_integer() and high.is_integer()):
                raise ValueError(f"jpeg_quality must be two whole numbers, got {value!r}")
            setattr(self, name, (low, high))  # from lists too, as YAML gives them

    def __call__(self, hr: Tensor, size: tuple[int, int], *, seeds: Sequence[int]) -> Tensor:
        """Make faces small, and worse, as `Degradation` says; LR is not to be larger than HR."""
        _check(hr, seeds)
        height, width = hr.shape[-2:]
        if not (1 <= size[0] <= height and 1 <= size[1] <= width):
            raise ValueError(
                f"size {size[0]}x{size[1]} does not lie within the faces' {height}x{width}"
            )
        lr = torch.empty((len(hr), 3, *size), dtype=torch.uint8)
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            small = threads.map(partial(self._degrade, size=size), hr.cpu(), seeds)
            for place, face in enumerate(small):
                lr[place] = face
        return to_float(lr.to(hr.device))

    def _degrade(self, face: Tensor, seed: int, size: tuple[int, int]) -> Tensor:
        """All that happens to one face: uint8 `[3, H, W]` to `[3, *size]`."""
        rng = np.random.default_rng(seed)
        # torch draws normal numbers five times as fast, but takes 32 bits of a seed: enough for
        # noise, not for the rest
        normals = torch.Generator().manual_seed(int(rng.integers(1 << 32)))
        late = rng.random() < self.late_jpeg_probability
        hr_size, place = (face.shape[-2], face.shape[-1]), 1.0
        for number, (grow, shrink, widest) in enumerate(_ROUNDS, start=1):
            face = self._blur(rng, face, widest * face.shape[-2] / size[0])
            direction = rng.random()
            if direction < shrink:
                place = rng.uniform(0, place)
            elif direction < shrink + grow:
                place = rng.uniform(place, 1)
            # from LR (0) to HR (1), equal ratios for equal steps
            between = [round(lr * (hr / lr) ** place) for lr, hr in zip(size, hr_size, strict=True)]
            face = _resize(rng, face, between)
            face = self._add_noise(rng, normals, face)
            if not (late and number == len(_ROUNDS)):
                face = self._compress(rng, face)
        face = _resize(rng, face, size)
        if rng.random() < self.sinc_probability:
            face = filter_face(face, sinc_kernel(rng.uniform(*self.sinc_cutoff), size=_SINC_SIZE))
        return self._compress(rng, face) if late else face

    def _blur(self, rng: np.random.Generator, face: Tensor, widest: float) -> Tensor:
        if rng.random() >= self.blur_probability:
            return face
        low, high = (min(sigma, widest) for sigma in self.blur_sigma)
        sigma, other = rng.uniform(low, high, size=2)
        if rng.random() >= self.anisotropic_probability:
            other = sigma
        shape = rng.uniform(*self.blur_shape) if rng.random() < _NOT_GAUSSIAN else 1.0
        angle = rng.uniform(0, math.pi)
        return filter_face(face, gaussian_kernel((sigma, other), angle, shape, size=_BLUR_SIZE))

    def _add_noise(
        self, rng: np.random.Generator, normals: torch.Generator, face: Tensor
    ) -> Tensor:
        channels = 1 if rng.random() < self.grey_probability else 3
        drawn = torch.randn(channels, *face.shape[-2:], generator=normals)
        levels = face.float()
        if rng.random() < self.shot_probability:
            deviation = rng.uniform(*self.shot_noise) * levels.sqrt()
        else:
            deviation = torch.tensor(rng.uniform(*self.gaussian_noise), dtype=torch.float32)
        return _to_bytes(levels + drawn * deviation)

    def _compress(self, rng: np.random.Generator, face: Tensor) -> Tensor:
        low, high = map(int, self.jpeg_quality)
        quality = int(rng.integers(low, high, endpoint=True))
        full_chroma = rng.random() < self.full_chroma_probability
        row, column = rng.integers(_JPEG_GRID, size=2)
        return jpeg(face, quality, "4:4:4" if full_chroma else "4:2:0", (int(row), int(column)))


def gaussian_kernel(
    sigma: tuple[float, float], angle: float = 0.0, shape: float = 1.0, *, size: int
) -> _Array:
    """A generalised Gaussian (Real-ESRGAN's beta), `[size, size]` of sum 1, turned by angle."""
    x, y = _neighbours(size)
    along = (np.cos(angle) * x + np.sin(angle) * y) / sigma[0]
    across = (np.cos(angle) * y - np.sin(angle) * x) / sigma[1]
    weights = np.exp(-0.5 * (along**2 + across**2) ** shape)
    return np.asarray(weights / weights.sum())


def sinc_kernel(cutoff: float, *, size: int) -> _Array:
    """What cuts off frequencies: float64 `[size, size]` with sum 1 (Real-ESRGAN, section 3.3)."""
    distance = torch.from_numpy(np.hypot(*_neighbours(size)))
    ringing: Tensor = torch.special.bessel_j1(cutoff * distance) / distance
    ringing[size // 2, size // 2] = cutoff / 2  # its limit
    return np.asarray(ringing / ringing.sum())


def filter_face(face: Tensor, kernel: _Array) -> Tensor:
    """Filter uint8 `[3, H, W]` with a kernel of sum 1; edges are repeated.

    Weights are rounded to 2^-14 and still add up to 1: sums are exact in float32 in any order.
    """
    whole = np.rint(kernel * (1 << _KERNEL_BITS))
    whole.flat[whole.argmax()] += (1 << _KERNEL_BITS) - whole.sum()
    weights = torch.from_numpy((whole / (1 << _KERNEL_BITS)).astype(np.float32))
    edge = len(kernel) // 2
    padded = F.pad(face[None].float(), (edge,) * 4, mode="replicate")
    return _to_bytes(F.conv2d(padded, weights.expand(3, 1, -1, -1), groups=3)[0])


def jpeg(
    face: Tensor,
    quality: int,
    subsampling: Literal["4:2:0", "4:4:4"] = "4:2:0",
    offset: tuple[int, int] = (0, 0),
) -> Tensor:
    """Compress and decompress uint8 `[3, H, W]`; it begins at a row and column of the blocks."""
    row, column = offset
    picture = np.pad(face.permute(1, 2, 0).numpy(), ((row, 0), (column, 0), (0, 0)), mode="edge")
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality, subsampling=subsampling)
    with Image.open(file, formats=["JPEG"]) as compressed:
        return torch.from_numpy(np.array(compressed)[row:, column:]).permute(2, 0, 1)


class BatchDraw(NamedTuple):
    """What is left to chance in a batch: its LR size, and of each face the flip and the seed."""

    size: tuple[int, int]
    mirrored: Tensor  # bool [count]
    seeds: tuple[int, ...]


def draw_batch(step: int, count: int, *, seed: int, sizes: Sequence[tuple[int, int]]) -> BatchDraw:
    """Draw a step's LR size, and mirrorings (one half) and seeds of `count` faces.

    They depend on the arguments alone, the same for a resumed run and any number of processes.
    """
    if not sizes:
        raise ValueError("sizes is empty: give at least one, such as (28, 24)")
    for name, value in (("step", step), ("count", count), ("seed", seed)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_BATCH_PURPOSE, step)))
    height, width = sizes[int(rng.integers(len(sizes)))]
    mirrored = torch.from_numpy(rng.random(count) < 0.5)
    seeds = rng.integers(1 << 64, size=count, dtype=np.uint64)
    return BatchDraw((height, width), mirrored, tuple(seeds.tolist()))


def mirror(hr: Tensor, flags: Tensor) -> Tensor:
    """Flip those of images `[B, C, H, W]` from left to right whose flags `[B]` are true."""
    if flags.shape != hr.shape[:1]:
        raise ValueError(f"flags must be [{len(hr)}], one for each face, got {list(flags.shape)}")
    return torch.where(flags[:, None, None, None], hr.flip(-1), hr)


def sizes_of(factors: Sequence[int], hr_size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """LR sizes for down-sampling factors, each a divisor of both sides of HR."""
    height, width = hr_size
    for factor in factors:
        if factor < 1 or height % factor or width % factor:
            raise ValueError(
                f"factor {factor} does not divide {height}x{width}; give sizes instead, such as "
                "'sizes=[[7, 6]]', or a factor such as 4, 8 or 16"
            )
    return tuple((height // factor, width // factor) for factor in factors)


def _check(faces: Tensor, seeds: Sequence[int]) -> None:
    if faces.dtype != torch.uint8:
        raise TypeError(
            f"faces must be uint8, got {faces.dtype}; idloss.resample.to_uint8 makes them so"
        )
    if faces.ndim != 4 or faces.shape[1] != 3:
        raise ValueError(f"faces must be [B, 3, H, W], got {list(faces.shape)}")
    if len(seeds) != len(faces):
        raise ValueError(f"{len(seeds)} seeds for {len(faces)} faces: give one for each")
    for seed in seeds:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"a seed must be from 0 to 2^64 - 1, got {seed}")


def _resize(rng: np.random.Generator, face: Tensor, size: Sequence[int]) -> Tensor:
    mode, convention = _METHODS[rng.integers(len(_METHODS))]
    return resize(face, size, mode=mode, convention=convention)


def _neighbours(size: int) -> tuple[_Array, _Array]:
    places = np.arange(size) - size // 2
    return places[None, :], places[:, None]


def _to_bytes(levels: Tensor) -> Tensor:
    return levels.round_().clamp_(0, _LEVELS).to(torch.uint8)
