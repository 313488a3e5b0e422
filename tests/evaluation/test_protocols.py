import json

import cv2
import numpy as np
import pytest
import torch

from idloss import create_srnet
from idloss.evaluation import get_protocol
from idloss.evaluation.embedding import fuse_views, prepare_probe, show_probe, to_fnet_input
from idloss.evaluation.protocols import PROTOCOLS
from idloss.resample import to_float

CROP = (112, 96)
PAPER, STANDARD = map(get_protocol, ("paper", "standard"))


def rgb(bgr_hwc):
    """Golden images as the library takes them: RGB, NCHW."""
    return torch.from_numpy(np.ascontiguousarray(bgr_hwc[..., ::-1])).permute(0, 3, 1, 2)


def sizes(golden, prefix):
    return sorted(key.removeprefix(prefix) for key in golden if key.startswith(prefix))


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
@pytest.mark.parametrize("size", ["7x6", "14x12", "16x14", "16x16", "18x16", "28x24"])
def test_probes_equal_released_code(golden, protocol, size):
    probes = prepare_probe(rgb(golden["aligned_bgr"]), map_size(size), get_protocol(protocol))
    assert torch.equal(probes, rgb(golden[f"down_{size}"]))


def map_size(text):
    return tuple(int(side) for side in text.split("x"))


@pytest.mark.parametrize("factor", [4, 8, 16])
def test_rows_without_srnet_equal_released_code(golden, factor):
    probes = rgb(golden[f"down_f{factor}"])
    bilinear, bicubic = map(create_srnet, ("bilinear", "bicubic"))
    released = show_probe(bilinear, probes, PAPER)  # what the paper calls "Bicubic"
    assert torch.equal(released, to_float(rgb(golden[f"released_up_f{factor}"])))
    bicubic = show_probe(bicubic, probes, PAPER)
    levels = (bicubic - to_float(rgb(golden[f"bicubic_up_f{factor}"]))).abs() * 255
    assert levels.max() <= 1.001  # ties that OpenCV's vendor library breaks in its own way
    assert (levels > 0.5).float().mean() < 1e-4
    assert not torch.equal(released, bicubic)


@pytest.mark.parametrize("protocol", ["paper", "sphereface"])
@pytest.mark.parametrize("size", ["28x24", "56x48", "64x64", "112x96"])
def test_fnet_input_equals_released_code(golden, protocol, size):
    sr = torch.from_numpy(golden[f"fnet_resize_in_{size}"]).flip(1)
    shown = to_fnet_input((sr + 1) * 0.5, CROP, get_protocol(protocol))
    expected = torch.from_numpy(golden[f"fnet_resize_out_{size}"]).flip(1)
    levels = (shown * 2 - 1 - expected).abs() * 127.5
    assert levels.max() < 1.001
    # two pixels of 129,024 at 64x64, none elsewhere
    assert (levels > 1e-3).sum() <= (2 if size == "64x64" else 0)


def test_fnet_input_of_edsr_output_equals_released_code(golden):
    sr = torch.from_numpy(golden["edsr_out"]).flip(1)
    shown = to_fnet_input((sr + 1) * 0.5, CROP, PAPER).flip(1) * 2 - 1
    np.testing.assert_allclose(shown.numpy(), golden["fnet_resize_face_out"], atol=1e-6)


def test_sr_of_the_right_size_is_rounded_only_by_standard(seeded):
    sr = torch.rand(1, 3, *CROP, generator=seeded)
    assert to_fnet_input(sr, CROP, PAPER) is sr
    rounded = to_fnet_input(sr, CROP, STANDARD)
    assert torch.equal(rounded, (sr * 255).round() / 255)


def test_standard_rounds_where_paper_cuts_off(seeded):
    sr = torch.rand(2, 3, 28, 24, generator=seeded)
    for protocol, cut in (("paper", torch.floor), ("standard", torch.round)):
        levels = cut(sr * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        expected = [
            cv2.resize(image, CROP[::-1], interpolation=cv2.INTER_CUBIC) for image in levels
        ]
        shown = to_fnet_input(sr, CROP, get_protocol(protocol)) * 255
        difference = np.abs(shown.permute(0, 2, 3, 1).numpy() - np.stack(expected))
        assert difference.max() <= 1.001
        assert (difference > 0.5).mean() < 1e-4


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_values_outside_the_range_are_clamped(protocol):
    sr = torch.tensor([-0.3, 0.5, 1.4]).reshape(1, 3, 1, 1).expand(1, 3, 28, 24)
    shown = to_fnet_input(sr, CROP, get_protocol(protocol))
    assert shown[:, 0].unique().tolist() == [0]
    assert shown[:, 2].unique().tolist() == [1]


def test_views_are_concatenated_or_added(seeded):
    a, b = torch.rand(2, 3, 8, generator=seeded)
    assert torch.equal(fuse_views(a, b, PAPER), torch.cat((a, b), 1))
    assert torch.equal(fuse_views(a, b, get_protocol("sphereface")), torch.cat((a, b), 1))
    assert torch.equal(fuse_views(a, b, STANDARD), a + b)
    with pytest.raises(ValueError, match=r"\[3, 8\] and \[2, 8\]"):
        fuse_views(a, b[:2], PAPER)


def test_unknown_protocol_is_named_with_its_likeliest_meaning():
    with pytest.raises(ValueError, match=r"unknown protocol 'standart'\. Did you mean 'standard'"):
        get_protocol("standart")
    with pytest.raises(ValueError, match="Known: paper, sphereface, standard"):
        get_protocol("?")
    assert get_protocol(get_protocol("paper")) is get_protocol("paper")


def test_probes_are_8_bit():
    with pytest.raises(TypeError, match=r"crops must be uint8, got torch.float32.*to_uint8"):
        prepare_probe(torch.zeros(1, 3, 8, 8), (4, 4), PAPER)
    with pytest.raises(TypeError, match="probes must be uint8"):
        show_probe(create_srnet("bicubic"), torch.zeros(1, 3, 8, 8), PAPER)
    with pytest.raises(TypeError, match="floating point"):
        to_fnet_input(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (4, 4), PAPER)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_protocols_are_frozen_and_described(protocol):
    with pytest.raises(AttributeError):
        protocol.flip = "none"
    plain = json.loads(json.dumps(protocol.describe()))
    assert plain["name"] == plain["rule"]["name"] == protocol.name
    assert plain["rule"]["grid"]["count"] == protocol.rule.grid().size
    counts = {"paper": 10001, "sphereface": 20001, "standard": 400}
    assert plain["rule"]["grid"]["count"] == counts[protocol.name]
