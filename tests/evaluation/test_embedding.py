"""Pictures as the released code makes them, and networks of all kinds left as they were."""

import warnings

import cv2
import numpy as np
import pytest
import torch
from minilfw import mini_lfw
from nets import TinySRNet, tiny_fnet
from tinybench import assert_same_scores, run
from torch import nn

from idloss import create_srnet
from idloss.data import draw_faces, lfw
from idloss.degradation import RealWorldDegradation
from idloss.evaluation import get_protocol
from idloss.evaluation.embedding import (
    cut_out,
    fit_size,
    fuse_views,
    prepare_probe,
    read_canvases,
    show_probe,
    to_fnet_input,
)
from idloss.evaluation.protocols import PROTOCOLS
from idloss.geometry import get_template
from idloss.resample import parse_size, to_float

CROP = (112, 96)
PAPER, STANDARD = map(get_protocol, ("paper", "standard"))


def rgb(bgr_hwc):
    """Golden images as the library takes them: RGB, NCHW."""
    return torch.from_numpy(np.ascontiguousarray(bgr_hwc[..., ::-1])).permute(0, 3, 1, 2)


@pytest.mark.parametrize("protocol", ["paper", "sphereface", "standard"])
@pytest.mark.parametrize("size", ["7x6", "14x12", "16x14", "16x16", "18x16", "28x24"])
def test_probes_equal_released_code(golden, protocol, size):
    probes = prepare_probe(rgb(golden["aligned_bgr"]), parse_size(size), get_protocol(protocol))
    assert torch.equal(probes, rgb(golden[f"down_{size}"]))


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
    sr = torch.from_numpy(golden["edsr_out"]).flip(1)
    shown = to_fnet_input((sr + 1) * 0.5, CROP, get_protocol(protocol)).flip(1) * 2 - 1
    np.testing.assert_allclose(shown.numpy(), golden["fnet_resize_face_out"], atol=1e-6)


def test_standard_rounds_where_paper_cuts_off(seeded):
    sr = torch.rand(1, 3, *CROP, generator=seeded)  # of the right size
    assert to_fnet_input(sr, CROP, PAPER) is sr
    assert torch.equal(to_fnet_input(sr, CROP, STANDARD), (sr * 255).round() / 255)
    sr = torch.rand(2, 3, 28, 24, generator=seeded)
    for protocol, cut in (("paper", torch.floor), ("standard", torch.round)):
        levels = cut(sr * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        expected = [cv2.resize(one, CROP[::-1], interpolation=cv2.INTER_CUBIC) for one in levels]
        shown = to_fnet_input(sr, CROP, get_protocol(protocol)) * 255
        difference = np.abs(shown.permute(0, 2, 3, 1).numpy() - np.stack(expected))
        assert difference.max() <= 1.001
        assert (difference > 0.5).mean() < 1e-4


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_values_are_clamped_and_views_concatenated_or_added(protocol, seeded):
    sr = torch.tensor([-0.3, 0.5, 1.4]).reshape(1, 3, 1, 1).expand(1, 3, 28, 24)
    shown = to_fnet_input(sr, CROP, protocol)
    assert shown[:, 0].unique().tolist() == [0]
    assert shown[:, 2].unique().tolist() == [1]
    a, b = torch.rand(2, 3, 8, generator=seeded)
    expected = a + b if protocol is STANDARD else torch.cat((a, b), 1)
    assert torch.equal(fuse_views(torch.cat((a, b)), protocol), expected)


def test_probes_of_the_real_world_are_drawn_by_the_face():
    crops, real = draw_faces(2, 2, seed=0).crops, get_protocol("real_world")
    digests = [bytes([0] * 7 + [place]) + b"the rest" for place in range(len(crops))]
    probes = prepare_probe(crops, (14, 12), real, digests)
    seeds = range(len(crops))
    expected = RealWorldDegradation()(crops, (14, 12), seeds=seeds)
    assert torch.equal(to_float(probes), expected)
    assert torch.equal(prepare_probe(crops[-1:], (14, 12), real, digests[-1:]), probes[-1:])
    assert not torch.equal(probes, prepare_probe(crops, (14, 12), PAPER, digests))


def test_probes_are_8_bit():
    with pytest.raises(TypeError, match=r"faces must be uint8, got torch.float32.*to_uint8"):
        prepare_probe(torch.zeros(1, 3, 8, 8), (4, 4), PAPER)
    for srnet in (create_srnet("bicubic"), TinySRNet()):
        with pytest.raises(TypeError, match="takes uint8 images, got torch"):
            show_probe(srnet, torch.zeros(1, 3, 8, 8), PAPER)
    with pytest.raises(TypeError, match="floating point"):
        to_fnet_input(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (4, 4), PAPER)


def test_networks_run_on_cudnn_without_tf32(data, fnet):
    seen = []
    fnet.register_forward_hook(
        lambda *_: seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
    )
    run(data, {"f": fnet}, {}, cache=False)
    assert set(seen) == {(True, False)}


def test_one_network_that_keeps_its_input_is_not_mixed_up(data, fnet, threads):
    class Forgetful(nn.Module):
        """Keeps what it is given, as some samplers do, and takes its time."""

        def forward(self, x):
            self.kept = x
            for _ in range(20):
                torch.sort(torch.rand(2000))
            return self.kept

    nets = ({"f": fnet}, {"n": Forgetful()})
    alone = run(data, *nets, cache=False, batch_size=1)
    threads(4)
    assert_same_scores(run(data, *nets, cache=False, batch_size=1), alone)


def kept_output(net=None):
    """Keeps what it made, with its graph, for a loss of its own: it cannot be copied."""
    net = net or TinySRNet()
    net.register_forward_hook(lambda module, _, output: setattr(module, "kept", output))
    net(torch.rand(2, 3, 8, 8))
    return net


def weight_normed():
    net = TinySRNet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has a newer one, which can be copied
        nn.utils.weight_norm(net.body[0])
    return net


class Late(TinySRNet):
    """Makes a table when it is first called, and trains with it later."""

    table = None

    def forward(self, x):
        if self.table is None:
            self.table = torch.ones(3, 1, 1)
        return super().forward(x * self.table)


@pytest.mark.filterwarnings("ignore:.* cannot be copied:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        *(TinySRNet, kept_output, weight_normed, Late),
        *(lambda: tiny_fnet(size=CROP), lambda: kept_output(tiny_fnet(size=CROP))),
    ],
)
def test_live_networks_are_judged_and_left_as_they_were(make, data, fnet, threads):
    torch.manual_seed(0)
    net = make().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    nets = ({"f": net}, {}) if hasattr(net, "num_features") else ({"f": fnet}, {"n": net})
    expected = run(data, *nets, cache=False)
    threads(3)
    found = run(data, *nets, cache=False, batch_size=2)
    assert_same_scores(found, expected)
    assert all(module.training for module in net.modules())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    net(torch.rand(2, 3, 8, 8, requires_grad=True)).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def exported(net):
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    return torch.export.export(net, (torch.rand(4, 3, 14, 12),), dynamic_shapes=[free]).module()


@pytest.mark.parametrize("become", [exported, torch.jit.script, nn.Module.double, nn.DataParallel])
def test_srnets_of_other_kinds_give_what_the_plain_one_does(become, data, fnet):
    plain = TinySRNet().eval()
    expected = run(data, {"f": fnet}, {"n": plain}, cache=False)
    found = run(data, {"f": fnet}, {"n": become(plain)}, cache=False)
    assert_same_scores(found, expected, atol=1e-5)


class Odd(nn.Module):
    """Gives whatever a hook makes of its images."""

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: (x,), r"Odd gave a tuple for \d+ images; wrap it"),
        (lambda x: {"sr": x}, "Odd gave a dict"),
        (lambda x: x[:, :1], r"Odd gave \[\d+, 1, 14, 12\]"),
        (lambda x: x * 2 - 1, r"SR of Odd spans \[-\d.*\], not \[0, 1\]: rescale it in forward"),
        (lambda x: x * 255, r"SR of Odd spans \["),
        (lambda x: {"embedding": x}, r"TinyFNet gave .*embedding.* wrap it"),
        (lambda x: x * torch.nan, r"FNet 'f' .* not finite for 0/0"),
    ],
)
@pytest.mark.filterwarnings("ignore:embeddings made with:UserWarning")
def test_what_is_no_rgb_in_0_1_and_no_embedding_is_told(change, says, data, fnet):
    srnet = Odd()
    changed = fnet if "FNet" in says else srnet
    changed.register_forward_hook(lambda module, images, output: change(output))
    told = pytest.raises((TypeError, ValueError), match=says)
    with pytest.warns(UserWarning, match=says) if says.startswith("SR") else told:
        run(data, {"f": fnet}, {"n": srnet}, cache=False)


def test_batch_size_and_threads_do_not_change_the_answer(data, fnet, srnets, threads):
    whole = run(data, {"f": fnet}, srnets, cache=False, batch_size=64)
    threads(3)
    small = run(data, {"f": fnet}, srnets, cache=False, batch_size=1)
    assert torch.get_num_threads() == 3
    assert_same_scores(small, whole)
    assert [r.estimate for r in whole.records if r.metric == "accuracy"] == [
        r.estimate for r in small.records if r.metric == "accuracy"
    ]


def test_photos_are_aligned_anew_for_crops_that_hold_more(tmp_path):
    """What is in no 112x112 crop must not be made up of its border."""
    faces = lfw(mini_lfw(tmp_path, 2, 2)).faces
    places, faults = torch.tensor([0, 2]), {}
    sphereface, arcface, ffhq = map(get_template, ("sphereface", "arcface", "ffhq"))
    canvases = read_canvases(faces, places, (sphereface, ffhq, ffhq), faults)
    assert list(canvases) == [arcface, ffhq]
    assert torch.equal(cut_out(canvases, ffhq), faces.crops_at(places, "ffhq"))
    assert torch.equal(cut_out(canvases, sphereface), canvases[arcface][..., 8:104])
    assert not faults


@pytest.mark.parametrize(
    ("size", "crop", "fitted"),
    [
        ((18, 16), "sphereface", (18, 16)),
        ((14, 12), "arcface", (14, 14)),
        ((18, 16), "arcface", (18, 18)),
        ((16, 16), "arcface", (16, 16)),
        ((16, 16), "sphereface", (16, 16)),
        ((20, 14), "arcface", (20, 14)),
        ((7, 6), "ffhq", (7, 7)),
    ],
)
def test_a_size_of_the_shape_of_112x96_stands_for_its_rows(size, crop, fitted):
    assert fit_size(size, get_template(crop)) == fitted
