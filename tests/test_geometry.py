"""Alignment against the paper's crops, scikit-image and OpenCV; crops to crops; and abuse."""

import itertools
import math
import re
from functools import partial

import cv2
import numpy as np
import pytest
import torch

from idloss.geometry import (
    TEMPLATES,
    Template,
    align,
    convert_crop,
    fit_similarity,
    fit_similarity_forward,
    get_template,
    warp,
)
from idloss.resample import resize, to_float, to_uint8

SPHEREFACE = TEMPLATES["sphereface"].points


def chw(array):
    return torch.from_numpy(array).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def photos(golden):
    """Eight LFW photos in [0, 1] and their landmarks."""
    return to_float(chw(golden["raw_bgr"])), torch.from_numpy(golden["landmarks"])


def levels_apart(ours, theirs):
    return (to_uint8(ours).int() - theirs.int()).abs().float()


def face(angle=0.3, scale=1.7, right=80.0, down=60.0, dtype=torch.float64):
    """SphereFace's points turned, scaled and moved: a face that fits the template exactly."""
    points = torch.tensor(SPHEREFACE, dtype=torch.float64)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return (scale * points @ turn.double().T + torch.tensor([right, down])).to(dtype)[None]


def test_golden_aligned_crops_and_what_the_forward_fit_misses_them_by(golden, photos):
    off = levels_apart(align(*photos), chw(golden["aligned_bgr"]))
    assert off.mean(dim=(1, 2, 3)).max() < 0.15
    assert off.max() <= 2
    off = levels_apart(align(*photos, fit=fit_similarity_forward), chw(golden["aligned_bgr"]))
    per_face = off.mean(dim=(1, 2, 3))
    assert round(per_face.min().item(), 1) == 1.1
    assert round(per_face.max().item(), 1) == 8.7


def test_arcface_crop_contains_the_sphereface_crop(golden, photos):
    wide = align(*photos, "arcface")
    assert (wide[..., 8:104] - align(*photos)).abs().max() < 1e-4
    off = levels_apart(wide[..., 8:104], chw(golden["aligned_bgr"]))
    assert off.max() <= 4


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_fits_equal_scikit_image(photos, template):
    transform = pytest.importorskip("skimage.transform")
    wanted = np.array(TEMPLATES[template].points)
    forward, released = [], []
    for points in photos[1].numpy():
        forward.append(transform.estimate_transform("similarity", points, wanted).params[:2])
        back = transform.estimate_transform("similarity", wanted, points).params
        released.append(np.linalg.inv(back)[:2])
    for fit, params in ((fit_similarity_forward, forward), (fit_similarity, released)):
        torch.testing.assert_close(
            fit(photos[1], template), torch.from_numpy(np.stack(params)), atol=1e-9, rtol=1e-9
        )


@pytest.mark.parametrize("fit", [fit_similarity, fit_similarity_forward])
def test_exact_face_is_fitted_exactly(fit):
    points = face()
    matrix = fit(points)
    placed = points @ matrix[:, :, :2].mT + matrix[:, None, :, 2]
    wanted = torch.tensor(SPHEREFACE, dtype=torch.float64)
    torch.testing.assert_close(placed[0], wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("mode", "flag"), [("bicubic", cv2.INTER_CUBIC), ("bilinear", cv2.INTER_LINEAR)]
)
def test_warp_is_opencvs_but_for_its_32nds_of_a_pixel(photos, mode, flag):
    matrices = fit_similarity(photos[1])
    ours = warp(photos[0], matrices, (112, 96), mode=mode)
    for photo, matrix, crop in zip(photos[0], matrices, ours, strict=True):
        pixels = np.ascontiguousarray(photo.permute(1, 2, 0).numpy())
        wanted = cv2.warpAffine(pixels, matrix.numpy(), (96, 112), flags=flag)
        off = 255 * (crop.permute(1, 2, 0) - torch.from_numpy(wanted)).abs()
        assert off.mean() < 0.3


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "nearest"])
def test_whole_pixel_warp_moves_pixels_and_nothing_else(mode):
    images = torch.rand(2, 3, 20, 30)
    moved = warp(images, torch.tensor([[[1.0, 0, 3], [0, 1, -2]]] * 2), (20, 30), mode=mode)
    wanted = torch.zeros_like(images)
    wanted[:, :, :18, 3:] = images[:, :, 2:, :27]
    torch.testing.assert_close(moved, wanted, atol=1e-4, rtol=0)  # grid_sample rounds places


def test_warp_uses_a_of_opencvs_cubic():
    spike = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    spike[..., 4, 4] = 1
    half = warp(spike, torch.tensor([[[1.0, 0, 0.5], [0, 1, 0]]], dtype=torch.float64), (9, 9))
    # the cubic of a = -0.75 at distances 1.5 and 0.5
    wanted = torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375], dtype=torch.float64)
    torch.testing.assert_close(half[0, 0, 4, 3:7], wanted)


def test_gradients_reach_the_photo_and_the_landmarks():
    images = torch.rand(1, 2, 12, 10, dtype=torch.float64, requires_grad=True)
    small = Template("small", (9, 6), tuple((x / 28, y / 28) for x, y in face()[0].tolist()))
    points = (face(angle=0.1) / 28).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: align(x, points.detach(), small), images)
    assert torch.autograd.gradcheck(lambda p: align(images.detach(), p, small), points)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_align_keeps_the_photos_type_whatever_layout_and_autocast(photos, dtype):
    crop = align(photos[0][:2].to(dtype), photos[1][:2])
    assert crop.dtype == dtype
    wanted = align(photos[0][:2].to(dtype).float(), photos[1][:2])
    torch.testing.assert_close(crop.float(), wanted.to(dtype).float(), atol=1e-4, rtol=1e-2)
    lasts = photos[0][:2].to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(align(lasts, photos[1][:2]), crop, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.float16])
def test_landmarks_of_any_real_type(dtype):
    points = face().round()
    torch.testing.assert_close(fit_similarity(points.to(dtype)), fit_similarity(points))


def test_alignment_compiles(photos):
    compiled = torch.compile(align, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*photos), align(*photos))


def test_empty_batches_pass_through():
    none, nowhere = torch.zeros(0, 3, 112, 96), torch.zeros(0, 5, 2)
    assert fit_similarity(nowhere).shape == (0, 2, 3)
    assert align(none, nowhere).shape == (0, 3, 112, 96)
    for target, side in (("vggface", 224), ("arcface", 112)):
        assert convert_crop(none, "sphereface", target).shape == (0, 3, side, side)


@pytest.mark.parametrize("rows", [112, 56, 28, 14])
@pytest.mark.parametrize("fill", ["edge", 0.25])
def test_sphereface_to_arcface_and_back_is_exact(rows, fill):
    crop = torch.rand(2, 3, rows, rows * 6 // 7)
    wide = convert_crop(crop, "sphereface", "arcface", fill=fill)
    border = rows // 14
    assert wide.shape == (2, 3, rows, rows)
    assert torch.equal(wide[..., border:-border], crop)
    left, right = (crop[..., :1], crop[..., -1:]) if fill == "edge" else (fill, fill)
    assert (wide[..., :border] == left).all()
    assert (wide[..., -border:] == right).all()
    assert torch.equal(convert_crop(wide, "arcface", "sphereface"), crop)


def test_faces_that_shrink_are_antialiased(photos):
    """A face of 1,000 px turned into a crop is what a small photo of it gives."""
    big = align(*photos, Template("big", (896, 768), face(0, 8.0, 3.5, 3.5)[0].tolist()))
    fine = torch.stack([(torch.arange(768) % 2).expand(896, -1).float()] * 3)[None]
    large = Template("large", (896, 768), tuple((8 * x + 3.5, 8 * y + 3.5) for x, y in SPHEREFACE))
    grey = convert_crop(fine, large, "sphereface")
    torch.testing.assert_close(grey, torch.full_like(grey, 0.5), atol=0.02, rtol=0)
    off = (convert_crop(big, large, "sphereface") - align(*photos)).abs().mean()
    assert off < 0.01
    assert convert_crop(torch.rand(1, 3, 128, 128), "ffhq", "arcface").shape[-2:] == (95, 95)


def test_psp_template_is_its_window():
    """Rows 35 to 223 and columns 32 to 220 of 256 px, shrunk to the FNet's 112."""
    x = torch.rand(1, 3, 256, 256)
    x = torch.nn.functional.avg_pool2d(x, 9, 1, 4)
    small = resize(x[..., 35:223, 32:220], (112, 112), convention="antialias")
    off = (convert_crop(x, "psp", "arcface") - small).abs()[..., 2:-2, 2:-2]
    assert off.max() < 0.02  # a pixel beside it: 0.1


def test_half_pixel_borders_are_warped():
    """7x6 lies half a pixel inside 7x7: no padding can say that."""
    crop = torch.rand(1, 3, 7, 6)
    wide = convert_crop(crop, "sphereface", "arcface")
    assert wide.shape == (1, 3, 7, 7)
    taps = torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375])
    middle = (crop[..., 1:5] * taps).sum(-1)
    torch.testing.assert_close(wide[..., 3], middle, atol=1e-5, rtol=0)


@pytest.mark.parametrize("target", ["arcface", "vggface", "facenet"])
def test_conversion_agrees_with_aligning_anew(photos, target):
    """Where the crop has pixels, converting it is cutting the photo with the other template."""
    crop = convert_crop(align(*photos), "sphereface", target, fill=0.0)
    anew = align(*photos, target)
    assert crop.shape == anew.shape
    inside = convert_crop(torch.ones(1, 1, 112, 96), "sphereface", target, fill=0.0)[0, 0] > 0.999
    inside = -torch.nn.functional.max_pool2d(-inside.float()[None], 9, 1, 4)[0] > 0  # off the seam
    off = (255 * (crop - anew)).abs().mean(dim=(0, 1))[inside]
    assert off.mean() < 4  # twice through a bicubic kernel; a misplaced crop is 20 or more apart
    shifted = (255 * (crop.roll(3, -1) - anew)).abs().mean(dim=(0, 1))[inside]
    assert off.mean() < shifted.mean() / (1 if target == "arcface" else 1.5)


@pytest.mark.parametrize("source", list(TEMPLATES))
@pytest.mark.parametrize("target", list(TEMPLATES))
def test_points_land_on_points(source, target):
    """A blob on each point of the source crop ends on the same point of the target crop."""
    old, new = TEMPLATES[source], TEMPLATES[target]
    rows, columns = old.size
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    width = rows / 40
    there = fit_similarity(torch.tensor(old.points)[None].double(), new)[0]
    landed = torch.tensor(old.points).double() @ there[:, :2].T + there[:, 2]
    if "ffhq" not in (source, target):  # FFHQ's mean face is no other template's, moved
        torch.testing.assert_close(landed, torch.tensor(new.points).double(), atol=0.01, rtol=0)
    for (px, py), (qx, qy) in zip(old.points, landed.tolist(), strict=True):
        blob = torch.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * width**2))[None, None]
        found = convert_crop(blob, source, target, fill=0.0)[0, 0].clamp(min=0)
        assert found.shape == new.size
        middle_x = (found.sum(0) * torch.arange(new.size[1])).sum() / found.sum()
        middle_y = (found.sum(1) * torch.arange(new.size[0])).sum() / found.sum()
        assert abs(middle_x - qx) < 0.1
        assert abs(middle_y - qy) < 0.1


@pytest.mark.parametrize("rows", [112, 56, 28, 21])
@pytest.mark.parametrize("target", ["arcface", "vggface", "facenet"])
def test_small_crops_are_converted_about_pixel_corners(rows, target):
    """On a ramp that says where in the source a pixel lies, at every scale of the crop."""
    columns, new = rows * 6 // 7, TEMPLATES[target]
    ramp = ((torch.arange(columns, dtype=torch.float64) + 0.5) / columns).expand(1, 1, rows, -1)
    found = convert_crop(ramp, "sphereface", target, fill="edge")[0, 0, rows // 2]
    places = (torch.arange(len(found), dtype=torch.float64) + 0.5) / len(found) * new.size[1] - 0.5
    (left, _), (right, _) = new.points[:2]
    scale = (SPHEREFACE[1][0] - SPHEREFACE[0][0]) / (right - left)
    source = SPHEREFACE[0][0] + scale * (places - left)
    wanted = (source + 0.5) / 96
    inside = (source > 3 * 112 / rows) & (source < 95 - 3 * 112 / rows)
    assert inside.sum() > 8
    # the cubic of a = -0.75 bends a ramp by up to 0.05 pixels; a misplaced corner is 0.1 or more
    off = (found[inside] - wanted[inside]) * columns
    assert off.abs().max() < 0.06
    assert off.mean().abs() < 0.02


def test_fill_values_and_gradients():
    crop = torch.rand(1, 1, 14, 12, dtype=torch.float64, requires_grad=True)
    for target, fill in itertools.product(("arcface", "facenet"), ("edge", 0.5)):
        convert = partial(convert_crop, source="sphereface", target=target, fill=fill)
        assert torch.autograd.gradcheck(convert, crop)
        grey = convert(torch.full((1, 3, 112, 96), 0.5))
        torch.testing.assert_close(grey, torch.full_like(grey, 0.5))


def test_same_template_and_rounded_sizes():
    """Table 2's 18x16 and 16x14 are 112x96 with rounded columns."""
    crop = torch.rand(1, 3, 28, 28)
    assert convert_crop(crop, "arcface", TEMPLATES["arcface"]) is crop
    assert convert_crop(torch.rand(1, 3, 18, 16), "sphereface", "arcface").shape[-2:] == (18, 19)
    assert convert_crop(torch.rand(1, 3, 16, 14), "sphereface", "arcface").shape[-2:] == (16, 16)


@pytest.mark.parametrize("target", ["arcface", "facenet"])
def test_conversion_compiles_and_exports(target):
    class Convert(torch.nn.Module):
        def forward(self, crops):
            return convert_crop(crops, "sphereface", target)

    crops = torch.rand(2, 3, 28, 24)
    wanted = convert_crop(crops, "sphereface", target)
    compiled = torch.compile(Convert(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(crops), wanted)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Convert(), (crops,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(crops[[0, 1, 0]]), wanted[[0, 1, 0]])


def test_arcface_is_sphereface_8_px_to_the_right():
    shifted = [(x + 8, y) for x, y in TEMPLATES["sphereface"].points]
    np.testing.assert_allclose(TEMPLATES["arcface"].points, shifted)
    sides = {"arcface": 112, "vggface": 224, "facenet": 160, "psp": 256, "ffhq": 512}
    sizes = {"sphereface": (112, 96)} | {name: (side, side) for name, side in sides.items()}
    assert sizes == {name: template.size for name, template in TEMPLATES.items()}


@pytest.mark.parametrize("template", list(TEMPLATES.values()), ids=list(TEMPLATES))
def test_templates_hold_an_upright_face(template):
    left, right, nose, mouth_left, mouth_right = template.points
    assert 0 < left[0] < nose[0] < right[0] < template.size[1]
    assert mouth_left[0] < nose[0] < mouth_right[0]
    assert max(left[1], right[1]) < nose[1] < min(mouth_left[1], mouth_right[1])
    assert mouth_left[1] < template.size[0]


def test_own_templates_serve_everywhere(photos):
    points = tuple((x / 2 + 4, y / 2) for x, y in TEMPLATES["sphereface"].points)
    mine = Template("mine", (56, 56), points)
    assert mine == Template("mine", [56, 56], [list(point) for point in points])
    assert get_template(mine) is mine
    assert align(*photos, mine).shape == (8, 3, 56, 56)
    assert convert_crop(align(*photos), "sphereface", mine).shape == (8, 3, 56, 56)


FAULTS = [
    ("are not finite", lambda p: p[2].fill_(float("nan"))),
    ("are not finite", lambda p: p[0, 0].fill_(float("-inf"))),
    ("lie within one pixel", lambda p: p.copy_(torch.rand(5, 2))),
    ("lie within one pixel", lambda p: p.fill_(7.0)),
    ("lie on one line", lambda p: p.copy_(torch.arange(10.0).view(5, 2) * 9)),
    ("lie on one line", lambda p: p[:, 0].fill_(50.0)),
    ("lie far outside the 250x200 photo", lambda p: p.add_(4000.0)),
    ("lie far outside the 250x200 photo", lambda p: p[4].add_(900.0)),
    ("lie far outside the 250x200 photo", lambda p: p.sub_(p.mean(0) + 5)),
    ("lie far outside the 250x200 photo", lambda p: p[4].copy_(torch.tensor([100.0, 400.0]))),
]


@pytest.mark.parametrize("fit", [fit_similarity, fit_similarity_forward])
@pytest.mark.parametrize(("fault", "spoil"), FAULTS)
def test_degenerate_landmarks_name_the_photo(fit, fault, spoil):
    points = torch.cat([face(), face(angle=-0.2), face(angle=0.0)])
    spoil(points[1])
    with pytest.raises(ValueError, match=f"landmarks of image 1 {fault}"):
        fit(points, image_size=(250, 200))
    with pytest.raises(ValueError, match=re.escape("landmarks of image 'b.jpg' ")):
        fit(points, image_size=(250, 200), names=["a.jpg", "b.jpg", "c.jpg"])
    with pytest.raises(ValueError, match="image 1 "):
        align(torch.zeros(3, 3, 250, 200), points, fit=fit)
    with pytest.raises(ValueError, match=rf"image 0 {fault}.*\(and 2 more in this batch\)"):
        fit(points[1:2].repeat(3, 1, 1), image_size=(250, 200))


def test_real_landmarks_are_all_accepted(shared):
    """All 13,233 faces of LFW, profiles and all."""
    rows = np.loadtxt(shared("data/lfw_landmarks.csv"), delimiter=",", usecols=range(1, 11))
    points = torch.from_numpy(rows).view(-1, 5, 2)
    assert fit_similarity(points, image_size=(250, 250)).isfinite().all()


PHOTOS, POINTS = torch.rand(2, 3, 40, 40), face(scale=0.3, right=2.0, down=2.0).repeat(2, 1, 1)
SWAPPED = [SPHEREFACE[place] for place in (1, 0, 2, 4, 3)]
EYE = torch.eye(2, 3).expand(2, 2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: get_template("archface"), ValueError, "Did you mean 'arcface'"),
        (lambda: Template("t", (0, 4), POINTS[0]), ValueError, "(0, 4)"),
        (lambda: Template("t", (4, 4), ((1, 2),)), ValueError, "five"),
        (
            lambda: Template("t", (9, 9), ((math.nan, 1),) * 5),
            ValueError,
            "no upright face in its crop",
        ),
        (lambda: Template("t", (9, 9), ((1, 1),) * 5), ValueError, "no upright face"),
        (lambda: Template("t", (9, 9), SPHEREFACE), ValueError, "no upright face"),
        (lambda: Template("t", (112, 96), SWAPPED), ValueError, "left as seen before right"),
        (lambda: get_template(5), ValueError, "unknown template 5"),
        (lambda: fit_similarity(POINTS[0]), ValueError, "[5, 2]"),
        (lambda: fit_similarity(POINTS[:, :4]), ValueError, "[2, 4, 2]"),
        (lambda: fit_similarity(POINTS.flatten(1)), ValueError, "[2, 10]"),
        (lambda: fit_similarity(POINTS > 0), TypeError, "torch.bool"),
        (lambda: fit_similarity(POINTS + 0j), TypeError, "torch.complex128"),
        (lambda: fit_similarity(POINTS, names=["a"]), ValueError, "1 names for 2"),
        (lambda: fit_similarity(POINTS, "nobody"), ValueError, "unknown template"),
        (lambda: warp(PHOTOS.byte(), EYE, (4, 4)), TypeError, "to_float"),
        (lambda: warp(PHOTOS[0], EYE, (4, 4)), ValueError, "[3, 40, 40]"),
        (lambda: warp(PHOTOS, EYE[:1], (4, 4)), ValueError, "[1, 2, 3]"),
        (lambda: warp(PHOTOS, EYE.long(), (4, 4)), TypeError, "torch.int64"),
        (lambda: warp(PHOTOS, EYE, (4, 0)), ValueError, "(4, 0)"),
        (lambda: warp(PHOTOS, EYE, (4, 4), mode="bicubci"), ValueError, "Did you mean 'bicubic'"),
        (lambda: align(PHOTOS, POINTS[:1]), ValueError, "1 sets of landmarks for 2 photos"),
        (lambda: align(PHOTOS.byte(), POINTS), TypeError, "torch.uint8"),
        (lambda: convert_crop(PHOTOS, "sphereface", "arcface"), ValueError, "got 40x40"),
        (lambda: convert_crop(PHOTOS[0], "arcface", "sphereface"), ValueError, "[3, 40, 40]"),
        (lambda: convert_crop(PHOTOS.long(), "arcface", "sphereface"), TypeError, "torch.int64"),
        (lambda: convert_crop(PHOTOS, "arcface", "sface"), ValueError, "Did you mean"),
        (lambda: convert_crop(PHOTOS, "arcface", "sphereface", fill="egde"), ValueError, "'egde'"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
