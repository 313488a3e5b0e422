"""Degradations against the released code, OpenCV, Pillow and statistics, and their draws."""

import math
import re
from functools import partial

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import j1
from scipy.stats import chisquare

from idloss import degradation as module
from idloss.degradation import (
    BicubicDegradation,
    RealWorldDegradation,
    draw_batch,
    filter_face,
    gaussian_kernel,
    get_degradation,
    jpeg,
    list_degradations,
    mirror,
    register_degradation,
    sinc_kernel,
    sizes_of,
)
from idloss.resample import resize, to_float, to_uint8

Real = RealWorldDegradation
SIZES = ((28, 24), (14, 12), (7, 6))
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def noise(*shape):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def faces(golden):
    """The eight golden crops, uint8 RGB."""
    return torch.from_numpy(golden["aligned_bgr"]).permute(0, 3, 1, 2).flip(1).contiguous()


@pytest.mark.parametrize("size", SIZES)
def test_bicubic_is_the_released_codes_and_opencvs(golden, faces, size):
    lr = BicubicDegradation()(faces, size, seeds=range(8))
    wanted = torch.from_numpy(golden[f"down_f{112 // size[0]}"]).permute(0, 3, 1, 2).flip(1)
    assert lr.dtype == torch.float32
    assert torch.equal(lr, to_float(wanted))
    for face, small in zip(faces, lr, strict=True):
        array = cv2.resize(face.permute(1, 2, 0).numpy(), size[::-1], interpolation=cv2.INTER_CUBIC)
        assert torch.equal(small, to_float(torch.from_numpy(array).permute(2, 0, 1)))


@pytest.mark.parametrize("size", [*SIZES, (33, 20), (112, 96)])
def test_real_world_gives_bytes_of_the_size(faces, size):
    lr = Real()(faces, size, seeds=range(8))
    assert lr.shape == (8, 3, *size)
    assert lr.dtype == torch.float32
    assert not lr.requires_grad
    assert torch.equal(lr, to_float(to_uint8(lr)))
    assert torch.equal(lr, Real()(faces, size, seeds=range(8)))


@pytest.mark.parametrize("size", SIZES)
def test_a_face_depends_on_its_own_seed_alone(faces, size):
    degradation = Real()
    seeds = torch.randint(1 << 62, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    many = faces.repeat(3, 1, 1, 1)
    whole = degradation(many, size, seeds=seeds)  # more than are done at once
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    shuffled = degradation(many[order], size, seeds=[seeds[i] for i in order])
    assert torch.equal(shuffled, whole[order])
    for i in range(0, 24, 3):
        assert torch.equal(degradation(many[i : i + 1], size, seeds=seeds[i : i + 1])[0], whole[i])
    among_noise = torch.cat((noise(5, 3, 112, 96), many[7:8]))
    assert torch.equal(degradation(among_noise, size, seeds=[*range(5), seeds[7]])[5], whole[7])
    bits = [0, 1, 2, 1 << 31, 1 << 32, 1 << 33, 1 << 63, (1 << 64) - 1]  # all 64 count
    lr = degradation(faces[:1].expand(8, -1, -1, -1), size, seeds=bits)
    assert len({tuple(face.flatten().tolist()) for face in lr}) == 8


def test_layout_modes_and_lists_for_pairs_do_not_matter(faces):
    degradation = Real()
    wanted = degradation(faces, (28, 24), seeds=range(8))
    lists = get_degradation("real_world", blur_sigma=[0.2, 3], jpeg_quality=[40, 95])  # from YAML
    assert torch.equal(lists(faces, (28, 24), seeds=range(8)), wanted)
    lasts = faces.contiguous(memory_format=torch.channels_last)
    assert torch.equal(degradation(lasts, (28, 24), seeds=range(8)), wanted)
    strided = faces.flip(-1).contiguous().flip(-1)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert torch.equal(degradation(strided, (28, 24), seeds=range(8)), wanted)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    degradation(faces, (28, 24), seeds=range(8))
    assert torch.equal(torch.get_rng_state(), state)
    for kind in (BicubicDegradation(), degradation):
        assert kind(faces[:0], (28, 24), seeds=[]).shape == (0, 3, 28, 24)


@pytest.mark.parametrize("size", SIZES)
def test_faces_get_worse_and_neither_brighter_nor_unlike(faces, size):
    many = faces.repeat(24, 1, 1, 1)
    lr = 255 * Real()(many, size, seeds=range(len(many)))
    clean = resize(many, size, mode="bilinear", convention="antialias").float()
    assert (lr - clean).mean((0, 2, 3)).abs().max() < 1.5
    off = (lr - clean).abs().mean((1, 2, 3))
    assert 4 < off.mean() < 12
    assert off.max() < 45
    alike = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(lr, clean, strict=True)]
    assert np.mean(alike) > 0.95
    assert min(alike) > 0.75


def test_sizes_on_the_way_lie_between_hr_and_lr(faces, monkeypatch):
    """Three reductions of each face, and two JPEGs, the second before the last or after it."""
    seen = []

    def noted(kind, real, face, *rest, **options):
        seen.append((kind, tuple(rest[0]) if kind == "resize" else None))
        return real(face, *rest, **options)

    for kind in ("resize", "jpeg"):
        monkeypatch.setattr(module, kind, partial(noted, kind, getattr(module, kind)))
    degradation, each = Real(), []
    for seed in range(400):
        seen.clear()
        degradation(faces[:1], (14, 12), seeds=[seed])
        each.append(list(seen))
    order = [" ".join(kind for kind, _ in steps) for steps in each]
    assert set(order) == {"resize jpeg resize jpeg resize", "resize jpeg resize resize jpeg"}
    late = np.array([steps.endswith("jpeg") for steps in order])
    assert abs(late.mean() - 0.2) < 0.06
    sizes = np.array([[size for kind, size in steps if kind == "resize"] for steps in each])
    assert sizes.shape == (400, 3, 2)
    assert (sizes >= (14, 12)).all()
    assert (sizes <= (112, 96)).all()
    assert (sizes[:, 2] == (14, 12)).all()
    first, second = sizes[:, :2, 0].T
    assert abs((first == 112).mean() - 0.3) < 0.06  # of those that shrink, few keep their size
    for change, probability in ((second > first, 0.21), (second < first, 0.4)):
        assert abs(change.mean() - probability) < 0.07


def mild(**options):
    """No degradation but what is asked for: no blur, a flawless JPEG."""
    rest = {"blur_probability": 0, "gaussian_noise": (0, 0), "shot_probability": 0}
    rest |= {"jpeg_quality": (100, 100), "full_chroma_probability": 1, "sinc_probability": 0}
    return RealWorldDegradation(**rest | options)


def test_noise_is_as_strong_and_as_grey_as_asked(faces):
    lr = 255 * mild()(faces, (112, 96), seeds=range(8))
    assert (lr - faces).abs().max() <= 6  # JPEG at quality 100, twice
    grey = torch.full((16, 3, 112, 96), 100, dtype=torch.uint8)
    for option in ({"gaussian_noise": (8, 8)}, {"shot_noise": (0.8, 0.8), "shot_probability": 1}):
        lr = 255 * mild(**option)(grey, (112, 96), seeds=range(16))
        assert abs(lr.mean() - 100) < 0.1
        assert abs(lr.std() / (8 * math.sqrt(2)) - 1) < 0.02  # twice; 0.8 * sqrt(100) is 8
    for probability in (0, 1):
        noisy = mild(gaussian_noise=(8, 8), grey_probability=probability)
        lr = 255 * noisy(grey[:4], (112, 96), seeds=range(4))
        apart = (lr[:, 0] - lr[:, 1]).std()
        assert apart < 1 if probability else apart > 14


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
@pytest.mark.parametrize("size", [(112, 96), (28, 24), (57, 43), (7, 6), (16, 5)])
def test_jpeg_is_opencvs_bit_for_bit(faces, subsampling, size):
    factor = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{subsampling.replace(':', '')}")
    qualities = [1, 10, 30, 49, 50, 51, 75, 90, 95, 100]
    for image, quality in zip(resize(faces.repeat(2, 1, 1, 1), size), qualities, strict=False):
        words = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor]
        _, file = cv2.imencode(".jpg", image.permute(1, 2, 0).numpy()[:, :, ::-1], words)
        wanted = torch.from_numpy(cv2.imdecode(file, cv2.IMREAD_COLOR)).permute(2, 0, 1).flip(0)
        assert torch.equal(jpeg(image, quality, subsampling), wanted)


def test_jpeg_begins_anywhere_in_the_grid(faces):
    for row, column in ((0, 0), (8, 16), (3, 13)):
        framed = F.pad(faces[:1].float(), (column, 0, row, 0), mode="replicate")[0].byte()
        wanted = jpeg(framed, 50)[:, row:, column:]
        assert torch.equal(jpeg(faces[0], 50, offset=(row, column)), wanted)
    assert not torch.equal(jpeg(faces[0], 50, offset=(3, 13)), jpeg(faces[0], 50))


@pytest.mark.parametrize("sigma", [0.2, 0.7, 1.0, 1.8])
def test_gaussian_kernels_are_opencvs(sigma):
    wide, narrow = (cv2.getGaussianKernel(15, one)[:, 0] for one in (1.5 * sigma, sigma))
    kernel = gaussian_kernel((1.5 * sigma, sigma), size=15)
    np.testing.assert_allclose(kernel, np.outer(narrow, wide), atol=1e-6)
    turned = gaussian_kernel((1.5 * sigma, sigma), math.pi / 2, size=15)
    np.testing.assert_allclose(turned, np.outer(wide, narrow), atol=1e-6)


@pytest.mark.parametrize("shape", [0.5, 1.0, 4.0])
def test_kernels_add_up_to_one_in_any_shape(shape):
    kernel = gaussian_kernel((2.5, 0.6), 0.4, shape, size=15)
    assert abs(kernel.sum() - 1) < 1e-12
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-12)
    moments = np.cov(*np.indices((15, 15)).reshape(2, -1), aweights=kernel.ravel())
    along = np.linalg.eigh(moments)[1][:, 1]  # row, column
    assert abs(math.tan(0.4) - along[0] / along[1]) < 0.1


@pytest.mark.parametrize("cutoff", [1.0, 2.0, math.pi])
def test_sinc_kernel_is_the_formula(cutoff):
    radius = np.hypot(*(np.indices((7, 7)) - 3))
    with np.errstate(invalid="ignore"):
        wanted = cutoff * j1(cutoff * radius) / (2 * np.pi * radius)
    wanted[3, 3] = cutoff**2 / (4 * np.pi)
    np.testing.assert_allclose(sinc_kernel(cutoff, size=7), wanted / wanted.sum(), atol=1e-6)


@pytest.mark.parametrize(
    "kernel",
    [
        *(gaussian_kernel((s, 1.0), s, size=15) for s in (0.05, 0.3, 1.2, 3.0)),
        *(sinc_kernel(cutoff, size=7) for cutoff in (0.1, math.pi / 2, math.pi)),
    ],
)
def test_filter_is_opencvs_to_a_level_and_exact(faces, kernel):
    """Sums do not depend on the order of adding: those of reals, then rounded."""
    for face in faces:
        picture = face.permute(1, 2, 0).numpy().astype(np.float64)
        wanted = cv2.filter2D(picture, -1, kernel[::-1, ::-1], borderType=cv2.BORDER_REPLICATE)
        off = np.abs(filter_face(face, kernel).permute(1, 2, 0).numpy() - wanted.clip(0, 255))
        assert off.max() < 1.1
        assert off.mean() < 0.3  # rounding alone gives 0.25
    flat = torch.full((3, 20, 20), 200, dtype=torch.uint8)
    assert torch.equal(filter_face(flat, kernel), flat)
    flipped = filter_face(face.flip(-1).flip(-2), kernel[::-1, ::-1]).flip(-1).flip(-2)
    assert torch.equal(flipped, filter_face(face, kernel))


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ({"gaussian_noise": (5, 5)}, lambda level: 5.0),
        ({"shot_noise": (0.5, 0.5), "shot_probability": 1}, lambda level: 0.5 * level.sqrt()),
    ],
)
def test_noise_follows_the_level(option, wanted):
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 4000, 256)
    degradation = mild(**option, grey_probability=0)
    generator = torch.Generator().manual_seed(0)
    noisy = degradation._add_noise(np.random.default_rng(0), generator, ramp).float()
    off = noisy.std((0, 1)) / wanted(torch.arange(256.0)) - 1
    assert off[20:-40].abs().max() < 0.06
    assert off[20:-40].mean().abs() < 0.01


@cuda
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_cuda_gives_the_same_bits(faces, size, tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    for degradation in (BicubicDegradation(), Real()):
        many = faces.repeat(4, 1, 1, 1)
        lr = degradation(many.cuda(), size, seeds=range(32))
        assert lr.is_cuda
        assert torch.equal(lr.cpu(), degradation(many, size, seeds=range(32)))


def test_a_draw_is_a_function_of_its_arguments():
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        drawn.append(draw_batch(7, 64, seed=3, sizes=SIZES))
    one, same = drawn
    assert one.size == same.size
    assert torch.equal(one.mirrored, same.mirrored)
    assert one.seeds == same.seeds
    for step, seed in ((8, 3), (7, 4), (3, 7)):
        other = draw_batch(step, 64, seed=seed, sizes=SIZES)
        assert not set(other.seeds) & set(one.seeds)
        assert not torch.equal(other.mirrored, one.mirrored)


def test_draws_are_fair():
    draws = [draw_batch(step, 16, seed=0, sizes=SIZES) for step in range(1500)]
    counts = [sum(draw.size == size for draw in draws) for size in SIZES]
    assert chisquare(counts).pvalue > 0.01
    flags = torch.cat([draw.mirrored for draw in draws])
    assert flags.dtype == torch.bool
    assert abs(flags.float().mean() - 0.5) < 0.01
    seeds = [seed for draw in draws for seed in draw.seeds]
    assert len(set(seeds)) == len(seeds) == 24000
    assert all(type(seed) is int and 0 <= seed < 1 << 64 for seed in seeds[:100])
    assert max(seeds) > 1 << 63


def test_mirror_and_sizes_of_factors(faces):
    flags = torch.arange(8) % 3 == 0
    mirrored = mirror(faces, flags)
    assert mirrored.dtype == torch.uint8
    for face, image, flag in zip(faces, mirrored, flags, strict=True):
        assert torch.equal(image, face.flip(-1) if flag else face)
    assert sizes_of((4, 8, 16), (112, 96)) == ((28, 24), (14, 12), (7, 6))
    assert sizes_of((), (112, 96)) == ()


def test_degradations_by_name_a_plug_ins_too(monkeypatch):
    assert list_degradations() == ["bicubic", "real_world"]
    assert isinstance(get_degradation("bicubic"), BicubicDegradation)
    made = get_degradation("real_world", sinc_probability=0.5)
    assert isinstance(made, RealWorldDegradation)
    assert made.sinc_probability == 0.5
    monkeypatch.setitem(module._degradations, "nearest", None)  # and away with it afterwards
    del module._degradations["nearest"]

    @register_degradation("nearest")
    def nearest(step=4, **rest):
        return lambda hr, size, *, seeds: to_float(resize(hr, size, mode="nearest"))

    assert list_degradations() == ["bicubic", "nearest", "real_world"]
    lr = get_degradation("nearest", step=2, anything=1)(noise(2, 3, 8, 8), (4, 4), seeds=[0, 1])
    assert lr.shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match="another degradation 'nearest': give this one its own"):
        register_degradation("nearest")(BicubicDegradation)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_degradation("bicubik"), "unknown degradation 'bicubik'. Did you mean 'bicub"),
        (lambda: get_degradation("bicubic", blur_sigma=1), "option of degradation 'bicubic' 'blur"),
        (lambda: get_degradation("real_world", blur_sigm=1), "Did you mean 'blur_sigma'"),
        (lambda: Real(blur_sigma=2), "blur_sigma must be two numbers"),
        (lambda: Real(blur_sigma=(3, 2)), "low and high, from 0.05 to 5, got (3, 2)"),
        (lambda: Real(blur_sigma=("a", "b")), "got ('a', 'b')"),
        (lambda: Real(blur_sigma=(math.nan, 2)), "blur_sigma must be"),
        (lambda: Real(gaussian_noise=(-1, 2)), "gaussian_noise must be two numbers"),
        (lambda: Real(shot_noise=(0, 99)), "shot_noise must be two numbers"),
        (lambda: Real(blur_shape=(0, 1)), "blur_shape must be two numbers"),
        (lambda: Real(jpeg_quality=(0, 95)), "from 1 to 100, got (0, 95)"),
        (lambda: Real(jpeg_quality=(40.2, 95)), "two whole numbers, got (40.2, 95"),
        (lambda: Real(sinc_cutoff=(1, 4)), "sinc_cutoff must be two numbers"),
        (lambda: Real(grey_probability=2), "grey_probability must be from 0 to 1"),
        (
            lambda: Real()(noise(1, 3, 8, 8), (16, 8), seeds=[1]),
            "size 16x8 does not lie within the faces' 8x8",
        ),
        (lambda: sizes_of((4, 5), (112, 96)), "factor 5 does not divide 112x96; give sizes"),
        (lambda: sizes_of((0,), (112, 96)), "factor 0 does not divide"),
        (lambda: draw_batch(1, 4, seed=0, sizes=()), "sizes is empty"),
        (lambda: draw_batch(-1, 4, seed=0, sizes=SIZES), "step must not be negative, got -1"),
        (lambda: draw_batch(1, 4, seed=-3, sizes=SIZES), "seed must not be negative, got -3"),
        (lambda: mirror(noise(2, 3, 8, 8), torch.ones(3, dtype=torch.bool)), "flags must be [2]"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("degradation", [BicubicDegradation(), Real()])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((noise(2, 3, 8, 8), (4, 4), [1]), ValueError, "1 seeds for 2 faces"),
        ((noise(1, 3, 8, 8), (4, 4), [-1]), ValueError, "from 0 to 2^64 - 1, got -1"),
        ((noise(1, 3, 8, 8), (4, 4), [1 << 64]), ValueError, "from 0 to 2^64 - 1, got 1844"),
        ((noise(1, 3, 8, 8), (0, 4), [1]), ValueError, "size"),
        ((noise(1, 1, 8, 8), (4, 4), [1]), ValueError, "[B, 3, H, W], got [1, 1, 8, 8]"),
        ((noise(3, 8, 8), (4, 4), [1]), ValueError, "[B, 3, H, W], got [3, 8, 8]"),
        ((noise(1, 3, 8, 8).float(), (4, 4), [1]), TypeError, "uint8, got torch.float32"),
    ],
)
def test_bad_faces_are_named(degradation, arguments, error, message):
    hr, size, seeds = arguments
    with pytest.raises(error, match=re.escape(message)):
        degradation(hr, size, seeds=seeds)
