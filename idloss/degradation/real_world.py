"""Degradation as in the wild: blur, resizing, noise and JPEG, twice over, then the last reduction.

Second-order degradation of Real-ESRGAN (Wang et al., ICCVW 2021, arXiv 2107.10833, section 3),
fitted to faces of a few pixels. Numbers that are said to be Real-ESRGAN's are those of its
options/train_realesrgan_x4plus.yml.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from idloss.degradation.base import check_faces, check_seeds
from idloss.degradation.fate import GRID, Fate, JpegFile, Resizing, Round, degrade
from idloss.degradation.filters import Array, gaussian_kernel, resize_weights, sinc_kernel
from idloss.resample import Convention, Mode, to_float

Range = Sequence[float]

# Of each round: the chances that the image grows and shrinks (else it keeps its size), and the
# widest blur in pixels of LR. Real-ESRGAN's, whose blurs of 3 and 1.5 pixels at x4 these are; but
# nothing grows beyond HR.
_ROUNDS = ((0.0, 0.7, 0.75), (0.3, 0.4, 0.375))
# The wide (antialiased) ones stand for Real-ESRGAN's "area": sensors and good software average,
# cheap software does not.
_METHODS: tuple[tuple[Mode, Convention], ...] = (
    ("bilinear", "cv2"),
    ("bicubic", "cv2"),
    ("bilinear", "antialias"),
    ("bicubic", "antialias"),
)
_BLUR_SIZE = 15
_SINC_SIZE = 7  # Real-ESRGAN's smallest, for images that are as small as that
_NOT_GAUSSIAN = 0.3  # of the kernels; Real-ESRGAN's generalised and plateau-shaped ones together
_AT_ONCE = 16  # faces of like size, on a CPU: they stay in its caches and need less padding
_LEVELS = 255


class RealWorldDegradation:
    """Blur, resize, add noise, compress; again; then reduce to the size asked for.

    Every face has its own draw of everything. It starts at HR and never gets larger than that or
    smaller than LR. The second JPEG comes mostly before the last reduction, as cameras and web
    sites compress more than a face, and the face lies anywhere in its grid of blocks. Images have 8
    bits between all steps.

    Ranges are drawn from uniformly.

    Args:
        blur_sigma: Standard deviation of the blur in pixels of the image at that time, and not
            more than 0.75 pixels of LR in the first round, half that in the second. Real-ESRGAN's.
        blur_probability: Of a blur, in each round. Real-ESRGAN's second.
        anisotropic_probability: Of a blur that is wider in one direction. Real-ESRGAN's.
        blur_shape: Exponent of the generalised Gaussian, for 3 kernels of 10; 1 is the Gaussian.
            Real-ESRGAN's.
        gaussian_noise: Standard deviation in levels of 255. Up to half of Real-ESRGAN's, which
            leaves little of so small a face; twice over it comes to the 0 to 20 of GFP-GAN's
            options/train_gfpgan_v1_simple.yml.
        shot_noise: Standard deviation in levels over the square root of the level: the noise of
            photons (Poisson's, drawn as the Gaussian it is close to). Up to half of Real-ESRGAN's.
        shot_probability: Of shot noise, else it is Gaussian. Real-ESRGAN's.
        grey_probability: Of noise that is equal in all channels. Real-ESRGAN's.
        jpeg_quality: Whole numbers from 1 to 100. Between Real-ESRGAN's 30 to 95 and GFP-GAN's 60
            to 100: 30 can leave a few patches of colour of a face of 28x24.
        full_chroma_probability: Of a JPEG without chroma subsampling.
        late_jpeg_probability: Of a second JPEG after the last reduction instead of before.
        sinc_probability: Of a sinc filter at the end, for the ringing of sharpened images.
        sinc_cutoff: Its cut-off in radians a pixel. Real-ESRGAN's begins at pi / 3, where a small
            face is blurred rather than sharpened.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        *,
        blur_sigma: Range = (0.2, 3.0),
        blur_probability: float = 0.8,
        anisotropic_probability: float = 0.31,
        blur_shape: Range = (0.5, 4.0),
        gaussian_noise: Range = (0.0, 15.0),
        shot_noise: Range = (0.0, 1.5),
        shot_probability: float = 0.5,
        grey_probability: float = 0.4,
        jpeg_quality: Range = (40, 95),
        full_chroma_probability: float = 0.2,
        late_jpeg_probability: float = 0.2,
        sinc_probability: float = 0.2,
        sinc_cutoff: Range = (2 * math.pi / 3, math.pi),
    ) -> None:
        self.blur_sigma = _range("blur_sigma", blur_sigma, 0.05, 5.0)
        self.blur_probability = _probability("blur_probability", blur_probability)
        self.anisotropic_probability = _probability(
            "anisotropic_probability", anisotropic_probability
        )
        self.blur_shape = _range("blur_shape", blur_shape, 0.1, 10.0)
        self.gaussian_noise = _range("gaussian_noise", gaussian_noise, 0.0, _LEVELS)
        self.shot_noise = _range("shot_noise", shot_noise, 0.0, _LEVELS**0.5)
        self.shot_probability = _probability("shot_probability", shot_probability)
        self.grey_probability = _probability("grey_probability", grey_probability)
        self.jpeg_quality = _range("jpeg_quality", jpeg_quality, 1, 100)
        if not all(quality.is_integer() for quality in self.jpeg_quality):
            raise ValueError(f"jpeg_quality must be two whole numbers, got {jpeg_quality!r}")
        self.full_chroma_probability = _probability(
            "full_chroma_probability", full_chroma_probability
        )
        self.late_jpeg_probability = _probability("late_jpeg_probability", late_jpeg_probability)
        self.sinc_probability = _probability("sinc_probability", sinc_probability)
        self.sinc_cutoff = _range("sinc_cutoff", sinc_cutoff, 0.1, math.pi)

    def __call__(self, hr: Tensor, size: tuple[int, int], *, seeds: Sequence[int]) -> Tensor:
        """Make faces small, and worse.

        Args:
            hr: uint8 RGB `[B, 3, H, W]`.
            size: Rows and columns of LR, not more than those of `hr`.
            seeds: A whole number from 0 to 2^64 - 1 for each face.

        Returns:
            LR, float32 RGB `[B, 3, *size]` in [0, 1], multiples of 1/255, on the device of `hr`.

        Raises:
            TypeError: The faces are not uint8.
            ValueError: They are not `[B, 3, H, W]`, the seeds do not fit, or LR would be larger.
        """
        check_faces(hr)
        check_seeds(seeds, len(hr))
        height, width = hr.shape[-2:]
        if not (1 <= size[0] <= height and 1 <= size[1] <= width):
            raise ValueError(
                f"size {size[0]}x{size[1]} does not lie within the faces' {height}x{width}"
            )
        fates = [self._draw(seed, (height, width), size) for seed in seeds]
        order = sorted(range(len(fates)), key=lambda face: fates[face].rounds[0].resizing.size)
        at_once = _AT_ONCE if hr.device.type == "cpu" else max(len(order), 1)
        lr = hr.new_empty((len(hr), 3, *size))
        with torch.autocast(hr.device.type, enabled=False):  # exact sums need their 24 bits
            for start in range(0, len(order), at_once):
                chosen = order[start : start + at_once]
                index = torch.tensor(chosen, device=hr.device)
                lr[index] = degrade(hr[index], [fates[face] for face in chosen])
        return to_float(lr)

    def _draw(self, seed: int, hr_size: tuple[int, int], size: tuple[int, int]) -> Fate:
        """Everything that is left to chance, from the seed of one face."""
        rng = np.random.default_rng(seed)
        # torch draws normal numbers five times as fast, but takes 32 bits of a seed: enough for
        # noise, not for the rest
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 32)))
        late = rng.random() < self.late_jpeg_probability
        place, now, rounds = 1.0, hr_size, []
        for number, (grow, shrink, widest) in enumerate(_ROUNDS, start=1):
            kernel = self._blur_kernel(rng, widest * now[0] / size[0])
            direction = rng.random()
            if direction < shrink:
                place = rng.uniform(0, place)
            elif direction < shrink + grow:
                place = rng.uniform(place, 1)
            resizing = _resizing(rng, now, _between(size, hr_size, place))
            now = resizing.size
            channels = 1 if rng.random() < self.grey_probability else 3
            normals = torch.randn(channels, *now, generator=generator).expand(3, -1, -1)
            variance = self._noise_variance(rng)
            file = None if late and number == len(_ROUNDS) else self._file(rng)
            rounds.append(Round(kernel, resizing, normals.numpy(), variance, file))
        return Fate(
            tuple(rounds),
            _resizing(rng, now, size),
            self._sinc_kernel(rng),
            self._file(rng) if late else None,
        )

    def _blur_kernel(self, rng: np.random.Generator, widest: float) -> Array:
        if rng.random() >= self.blur_probability:
            return _nothing(_BLUR_SIZE)
        low, high = (min(sigma, widest) for sigma in self.blur_sigma)
        sigma, other = rng.uniform(low, high, size=2)
        if rng.random() >= self.anisotropic_probability:
            other = sigma
        shape = rng.uniform(*self.blur_shape) if rng.random() < _NOT_GAUSSIAN else 1.0
        angle = rng.uniform(0, math.pi)
        return gaussian_kernel((sigma, other), angle, shape, size=_BLUR_SIZE)

    def _sinc_kernel(self, rng: np.random.Generator) -> Array:
        if rng.random() >= self.sinc_probability:
            return _nothing(_SINC_SIZE)
        return sinc_kernel(rng.uniform(*self.sinc_cutoff), size=_SINC_SIZE)

    def _noise_variance(self, rng: np.random.Generator) -> tuple[float, float]:
        if rng.random() < self.shot_probability:
            return 0.0, rng.uniform(*self.shot_noise) ** 2
        return rng.uniform(*self.gaussian_noise) ** 2, 0.0

    def _file(self, rng: np.random.Generator) -> JpegFile:
        low, high = map(int, self.jpeg_quality)
        quality = int(rng.integers(low, high, endpoint=True))
        full = rng.random() < self.full_chroma_probability
        row, column = rng.integers(GRID, size=2)
        return JpegFile(quality, "4:4:4" if full else "4:2:0", (int(row), int(column)))


def _range(name: str, value: Range, least: float, most: float) -> tuple[float, float]:
    try:
        low, high = (float(one) for one in value)
    except (TypeError, ValueError):
        low = high = math.nan
    if not least <= low <= high <= most:
        raise ValueError(
            f"{name} must be two numbers, low and high, from {least:g} to {most:g}, got {value!r}"
        )
    return low, high


def _probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value!r}")
    return value


def _nothing(size: int) -> Array:
    """The kernel that changes nothing."""
    kernel = np.zeros((size, size))
    kernel[size // 2, size // 2] = 1
    return kernel


def _between(lr: tuple[int, int], hr: tuple[int, int], place: float) -> tuple[int, int]:
    """The size at a place between LR (0) and HR (1), equal ratios for equal steps."""
    height, width = (round(low * (high / low) ** place) for low, high in zip(lr, hr, strict=True))
    return height, width


def _resizing(
    rng: np.random.Generator, before: tuple[int, int], after: tuple[int, int]
) -> Resizing:
    method = _METHODS[rng.integers(len(_METHODS))]
    rows, columns = (
        resize_weights(old, new, *method) for old, new in zip(before, after, strict=True)
    )
    return Resizing(after, rows, columns)
