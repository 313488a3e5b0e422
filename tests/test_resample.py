"""The resampler against the paper's released code, OpenCV, torch's antialiasing, and abuse."""

import re

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from idloss.resample import resize, to_float, to_uint8

CV2 = {"bicubic": cv2.INTER_CUBIC, "bilinear": cv2.INTER_LINEAR, "nearest": cv2.INTER_NEAREST}
DOWN = ["f2", "f4", "f8", "f16", "16x16", "18x16", "16x14", "14x12", "7x6", "28x24"]


def chw(array):
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def noise(*shape):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def opencv(images, size, mode):
    """cv2.resize over a batch `[B, C, H, W]`, one channel at a time."""
    flat = images.reshape(-1, *images.shape[-2:]).numpy()
    done = [cv2.resize(plane, size[::-1], interpolation=CV2[mode]) for plane in flat]
    return torch.from_numpy(np.stack(done)).reshape(*images.shape[:-2], *size)


@pytest.mark.parametrize("key", DOWN)
def test_golden_down_sampling_bit_for_bit(golden, key):
    wanted = chw(golden[f"down_{key}"])
    assert torch.equal(resize(chw(golden["aligned_bgr"]), wanted.shape[-2:]), wanted)


@pytest.mark.parametrize("factor", [4, 8, 16])
def test_golden_up_sampling_bit_for_bit_and_floats_but_for_ties(golden, factor):
    lr, wanted = (chw(golden[f"{key}_f{factor}"]) for key in ("down", "bicubic_up"))
    released = chw(golden[f"released_up_f{factor}"])
    assert torch.equal(resize(lr, (112, 96), mode="bilinear"), released)
    assert torch.equal(resize(lr, (112, 96)), wanted)
    off = (resize(lr.float(), (112, 96)).round().clamp(0, 255) - wanted).abs()
    assert off.max() <= 1
    assert off.count_nonzero() < 2e-4 * off.numel()


SIZES = [(112, 96), (28, 24), (7, 6), (5, 9), (1, 1), (31, 64), (250, 3)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("source", [(112, 96), (7, 6), (1, 1), (33, 17), (2, 50)])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_bytes_equal_opencv_bit_for_bit(source, size, mode):
    images = noise(2, 3, *source)
    assert torch.equal(resize(images, size, mode=mode), opencv(images, size, mode))


@pytest.mark.skipif(not cv2.ipp.useIPP(), reason="this OpenCV weighs bicubic taps in 11 bits")
@pytest.mark.parametrize("size", SIZES)
def test_bicubic_bytes_equal_opencv_but_for_ties(size):
    images = noise(4, 3, 33, 18)
    off = (resize(images, size).int() - opencv(images, size, "bicubic").int()).abs()
    assert off.max() <= 1
    assert off.count_nonzero() <= max(1, 3e-4 * off.numel())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", list(CV2))
def test_floats_equal_opencv(size, mode):
    images = noise(2, 3, 33, 18).float() / 255
    torch.testing.assert_close(
        resize(images, size, mode=mode), opencv(images, size, mode), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("scale", range(2, 12))
def test_nearest_follows_opencv_through_its_reciprocal(scale):
    """At exact multiples OpenCV's rounded reciprocal may fall a pixel short of the true one."""
    for size_in in range(1, 80):
        row = torch.arange(size_in, dtype=torch.uint8).expand(1, 1, 1, -1)
        size = (1, max(1, size_in * 7 // scale))
        assert torch.equal(resize(row, size, mode="nearest"), opencv(row, size, "nearest"))


PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@pytest.mark.parametrize("size", [(14, 12), (28, 24), (7, 6), (33, 41), (200, 150), (112, 12)])
@pytest.mark.parametrize("mode", list(PILLOW))
def test_antialiased_bytes_are_pillows(golden, mode, size):
    faces = golden["aligned_bgr"]
    wanted = [np.asarray(Image.fromarray(face).resize(size[::-1], PILLOW[mode])) for face in faces]
    small = resize(chw(faces), size, mode=mode, convention="antialias")
    off = (small.int() - chw(np.stack(wanted)).int()).abs()
    assert off.max() <= 2  # one level in either pass
    assert off.count_nonzero() < {"bicubic": 1e-3, "bilinear": 2e-2}[mode] * off.numel()
    if size == (14, 12):  # the conventions are far apart, and the names keep them so
        assert (small.int() - resize(chw(faces), size, mode=mode).int()).abs().max() > 20
    images = chw(faces) / 255
    wanted = F.interpolate(images, size, mode=mode, antialias=True)
    assert torch.equal(resize(images, size, mode=mode, convention="antialias"), wanted)


@pytest.mark.parametrize("mode", list(CV2))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_keep_their_type(mode, dtype):
    images = noise(2, 3, 30, 22).to(dtype) / 255
    small = resize(images, (9, 8), mode=mode)
    assert small.dtype == dtype
    wanted = resize(images.float(), (9, 8), mode=mode)
    torch.testing.assert_close(small.float(), wanted.to(dtype).float(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", list(CV2))
@pytest.mark.parametrize("byte", [True, False])
def test_layout_and_leading_axes_do_not_matter(mode, byte):
    images = noise(6, 3, 20, 31)
    images = images if byte else images / 255
    wanted = resize(images, (13, 40), mode=mode)
    for given, expected in (
        (images.contiguous(memory_format=torch.channels_last), wanted),
        (images.flip(-1).transpose(-1, -2).contiguous().transpose(-1, -2).flip(-1), wanted),
        (images[0], wanted[0]),
        (images.unflatten(0, (2, 3)), wanted.unflatten(0, (2, 3))),
        (images[:0], wanted[:0]),
    ):
        got = resize(given, (13, 40), mode=mode)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", list(CV2))
@pytest.mark.parametrize("size", [(3, 2), (11, 9)])
def test_gradient_is_the_derivative(mode, size):
    images = torch.rand(1, 2, 7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resize(x, size, mode=mode), images)


def test_float_is_neither_clamped_nor_rounded_and_the_same_size_the_same_tensor():
    edge = torch.zeros(1, 1, 8, 8)
    edge[..., 4:] = 1
    wide = resize(edge, (32, 32))
    assert wide.min() < -0.01
    assert wide.max() > 1.01
    assert torch.equal(resize((edge * 255).byte(), (32, 32)), to_uint8(wide))
    assert resize(edge, (8, 8)) is edge


def test_bytes_are_exact_under_autocast_and_inference_mode(golden):
    faces, wanted = chw(golden["aligned_bgr"]), chw(golden["down_f4"])
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert torch.equal(resize(faces, (28, 24)), wanted)
    images = torch.rand(1, 3, 8, 8, requires_grad=True)
    resize(images, (4, 4), mode="nearest").sum().backward()  # nothing inferred stays behind
    assert torch.equal(resize(faces, (28, 24)), wanted)


@pytest.mark.parametrize("mode", list(CV2))
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")  # the taps' cache: it traces through
def test_compiles_into_one_graph_and_exports_with_a_free_batch(mode):
    compiled = torch.compile(resize, fullgraph=True, backend="eager")
    for images in (noise(2, 3, 20, 31), noise(2, 3, 20, 31) / 255):
        assert torch.equal(compiled(images, (7, 40), mode=mode), resize(images, (7, 40), mode=mode))

    class Resize(torch.nn.Module):
        def forward(self, images):
            return resize(images, (28, 24), mode=mode)

    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Resize(), (torch.rand(2, 3, 14, 12),), dynamic_shapes=({0: batch},)
    )
    other = torch.rand(5, 3, 14, 12)
    torch.testing.assert_close(program.module()(other), resize(other, (28, 24), mode=mode))


def test_levels_round_trip_exactly_and_else_round_floor_and_clamp():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_float(levels, torch.float64).dtype == torch.float64
    values = torch.tensor([-0.5, 0.0, 1.5 / 255, 2.5 / 255, 254.9 / 255, 1.0, 7.0])
    assert to_uint8(values).tolist() == [0, 0, 2, 2, 255, 255, 255]
    floored = to_uint8(values[[0, 1, 4, 5, 6]], rounding="floor")
    assert floored.tolist() == [0, 0, 254, 255, 255]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: resize(x, (4, 4), mode="bicubik"), ValueError, "'bicubik'. Did you mean 'bic"),
        (lambda x: resize(x, (4, 4), convention="cv"), ValueError, "unknown convention 'cv'"),
        (lambda x: resize(x, (4, 4), mode="nearest", convention="antialias"), ValueError, "near"),
        (lambda x: resize(x, (0, 4)), ValueError, "size must be (H, W)"),
        (lambda x: resize(x, (4, -4)), ValueError, "size must be (H, W)"),
        (lambda x: resize(x, (4,)), ValueError, "size must be (H, W)"),
        (lambda x: resize(x, 4), ValueError, "size must be (H, W)"),
        (lambda x: resize(x, (4.5, 4)), ValueError, "size must be (H, W)"),
        (lambda x: resize(x.long(), (4, 4)), TypeError, "torch.int64"),
        (lambda x: resize(x.bool(), (4, 4)), TypeError, "torch.bool"),
        (lambda x: resize(x[0, 0], (4, 4)), ValueError, "[8, 8]"),
        (lambda x: resize(x[..., :0], (4, 4)), ValueError, "[1, 3, 8, 0]"),
        (lambda x: to_float(x), TypeError, "uint8"),
        (lambda x: to_uint8(x.long()), TypeError, "torch.int64"),
        (lambda x: to_uint8(x, rounding="flor"), ValueError, "Did you mean 'floor'"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(torch.zeros(1, 3, 8, 8))
