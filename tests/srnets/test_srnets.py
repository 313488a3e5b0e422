"""Every SRNet of the registry keeps one interface; reduced depth and width keep this quick."""

import copy
import inspect

import cv2
import numpy as np
import pytest
import timm
import torch
from nets import opened
from timm.models import get_arch_pretrained_cfgs, model_entrypoint, save_for_hf

from idloss import create_srnet, list_srnets, register_srnet
from idloss.export import export
from idloss.registry import srnet_crop
from idloss.srnets import EDSR, Interpolation
from idloss.srnets.edsr import OFFICIAL
from idloss.weights import ManualFile, NotFoundError
from idloss.weights.loading import get_weights

SRNETS = list_srnets()
EDSRS = [name for name in SRNETS if name.startswith("edsr")]
BASELINES = ["bicubic", "bilinear", "bicubic_arcface", "bilinear_arcface"]


@pytest.fixture(params=SRNETS)
def name(request):
    return request.param


def make(name, **options):
    torch.manual_seed(0)
    small = {"depth": 2, "width": 8} if name in EDSRS else {}
    return create_srnet(name, **small, **options).eval()


def timm_name(name):
    return f"interpolation_{name}" if name in BASELINES else name


def faces(batch=2, size=(7, 6)):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def test_families_are_registered():
    assert set(SRNETS) >= {"edsr16_64", "edsr16_64_id", "edsr32_256", "edsr32_256_id", *BASELINES}


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_scales(name, scale):
    model = make(name, scale=scale)
    with torch.no_grad():
        assert model(faces()).shape == (2, 3, 7 * scale, 6 * scale)
    assert model.scale == scale


def test_any_size_and_batch(name):
    model = make(name)
    with torch.no_grad():
        assert model(faces(1, (5, 9))).shape == (1, 3, 20, 36)
        together = model(faces(3))
        assert torch.allclose(model(faces(3)[1:2]), together[1:2], atol=1e-6)


def test_gradient_reaches_image_and_weights(name):
    model = make(name)
    x = faces().requires_grad_()
    model(x).square().mean().backward()
    assert (x.grad != 0).all()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0
        for parameter in model.parameters()
    )


def test_timm_makes_the_same(name):
    small = {"depth": 2, "width": 8} if name in EDSRS else {}
    torch.manual_seed(0)
    by_timm, x = timm.create_model(timm_name(name), **small).eval(), faces()
    with torch.no_grad():
        assert torch.equal(by_timm(x), make(name)(x))


def test_local_dir(name, tmp_path):
    model = make(name, scale=2)
    save_for_hf(model, tmp_path, safe_serialization=True)
    with torch.no_grad():
        for create in (timm.create_model, create_srnet):
            again = create(f"local-dir:{tmp_path}", pretrained=True).eval()
            assert torch.equal(again(faces()), model(faces()))


def test_deepcopy_channels_last_and_double(name):
    model = make(name)
    with torch.no_grad():
        expected = model(faces())
        assert torch.equal(copy.deepcopy(model)(faces()), expected)
        other = faces().to(memory_format=torch.channels_last)
        assert torch.allclose(model(other), expected, atol=1e-5)
        assert torch.allclose(model.double()(faces().double()).float(), expected, atol=1e-5)


def test_compiles_without_a_break(name):
    model = make(name)
    torch.compiler.reset()
    backend = "inductor" if name == "edsr16_64" else "eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.allclose(compiled(faces()), model(faces()), atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_exports_with_any_batch_and_size(name, suffix, tmp_path):
    model = make(name)
    made = export(model, tmp_path / f"net{suffix}")
    assert made.inputs == ("batch", 3, "height", "width")
    x = faces(3, (9, 5))
    with torch.no_grad():
        assert torch.allclose(opened(made.path)(x), model(x), atol=1e-4)


def test_computes_in_bfloat16(name):
    model = make(name)
    with torch.no_grad():
        expected, got = model(faces()), model.bfloat16()(faces().bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0.02)


def test_documented(name):
    cfg = make(name).pretrained_cfg
    assert (cfg["mean"], cfg["std"]) == ((0, 0, 0), (1, 1, 1))  # RGB in [0, 1]
    assert cfg["input_size"] in ((3, 28, 24), (3, 28, 28))
    entry_point = model_entrypoint(timm_name(name))
    assert inspect.getdoc(entry_point)
    assert list(inspect.signature(entry_point).parameters) == ["pretrained", "kwargs"]


@pytest.mark.parametrize("name", EDSRS)
def test_tags(name):
    for tagged, cfg in get_arch_pretrained_cfgs(name).items():
        assert timm.create_model(tagged, depth=1, width=4).pretrained_cfg["architecture"] == name
        if cfg.has_weights:
            weights = get_weights(tagged)
            assert tagged in list_srnets(pretrained=True)
            assert cfg.url == weights.source.pieces[0].url
            pinned = all(piece.digest != "unpinned" for piece in weights.source.pieces)
            assert pinned or isinstance(weights.source, ManualFile)
            assert weights.licence
            assert weights.training_data in cfg.description


# --- EDSR ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "depth", "width"),
    [(name, *map(int, name.removeprefix("edsr").split("_")[:2])) for name in EDSRS],
)
def test_depth_and_width(name, depth, width):
    with torch.device("meta"):
        model = create_srnet(name)
    assert len(model.body) == depth
    assert model.head.out_channels == width


@pytest.mark.parametrize("name", ["edsr16_64", "edsr32_256_id"])
def test_output_stays_between_0_and_1(name):
    model = make(name)
    with torch.no_grad():
        model.tail.bias += torch.tensor([100.0, -100.0, 0.0])
        output = model(faces())
    assert output.min() == 0
    assert output.max() == 1


def test_res_scale_is_an_argument():
    outputs = []
    for res_scale in (0.0, 0.1, 1.0):
        model = make("edsr16_64", res_scale=res_scale)
        with torch.no_grad():
            outputs.append(model(faces()))
    assert inspect.signature(EDSR).parameters["res_scale"].default == 0.1
    small, large = (outputs[1] - outputs[0]).abs().max(), (outputs[2] - outputs[0]).abs().max()
    assert 0 < 5 * small < large


@pytest.mark.parametrize(
    ("options", "said"),
    [({"scale": scale}, r"2, 4, 8.*scale=") for scale in (0, 1, 3, 16, 2.5)]
    + [({"mean": (0.5, 0.5)}, "one number or 3")],
)
def test_options_are_checked(options, said):
    with pytest.raises(ValueError, match=said):
        EDSR(**options)


@pytest.mark.parametrize("name", EDSRS)
def test_never_random_weights_in_silence(name):
    """Architectures without weights refuse pretrained=True."""
    nowhere = {"url": "", "tag": ""}  # as if none had been registered
    with pytest.raises(NotFoundError, match=name):
        create_srnet(name, pretrained=True, pretrained_cfg_overlay=nowhere)


# --- interpolation -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_interpolation_is_opencv(name):
    image = np.random.default_rng(0).random((14, 12, 3), dtype=np.float32)
    flag = {"bicubic": cv2.INTER_CUBIC, "bilinear": cv2.INTER_LINEAR}[name.removesuffix("_arcface")]
    low = torch.from_numpy(image).permute(2, 0, 1)[None]
    for size, options in (
        ((56, 48), {}),
        ((28, 24), {"scale": 2}),
        ((112, 96), {"size": (112, 96)}),
        ((35, 30), {"scale": 2.5}),
    ):
        expected = torch.from_numpy(cv2.resize(image, size[::-1], interpolation=flag))
        ours = create_srnet(name, **options)(low)[0].permute(1, 2, 0)
        assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("factor", [4, 8, 16])
def test_bicubic_row_of_the_tables(golden, factor):
    """True bicubic at 8 bits; ties may fall one level to either side."""
    low = torch.from_numpy(golden[f"down_f{factor}"]).permute(0, 3, 1, 2) / 255
    levels = create_srnet("bicubic", size=(112, 96))(low).mul(255).round().clamp(0, 255)
    difference = (
        levels - torch.from_numpy(golden[f"bicubic_up_f{factor}"]).permute(0, 3, 1, 2)
    ).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 2e-4


@pytest.mark.parametrize("name", BASELINES)
def test_bare_names_are_not_claimed_among_all_models_of_timm(name):
    assert not timm.is_model(name)
    assert name in list_srnets("bi*")


@pytest.mark.parametrize("name", BASELINES)
def test_nothing_to_load(name):
    """pretrained=True is right for a baseline: there are no weights that could be random."""
    model = create_srnet(name, pretrained=True)
    assert isinstance(model, Interpolation)
    assert not model.state_dict()
    assert name.removesuffix("_arcface") in repr(model)


@pytest.mark.parametrize("options", [{}, OFFICIAL], ids=["paper", "official"])
def test_edsr_survives_the_meta_device_and_mixed_precision(options):
    torch.manual_seed(0)
    model, x = EDSR(depth=1, width=4, **options), torch.rand(2, 3, 8, 6)
    expected = model(x)
    with torch.device("meta"):
        twin = EDSR(depth=1, width=4, **options)
    assert not list(twin.named_buffers())
    twin.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(twin(x), expected)
    for parameter in twin.parameters():  # as FSDP2 does: buffers stay as they are
        parameter.data = parameter.data.bfloat16()
    torch.testing.assert_close(twin(x.bfloat16()).float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.zeros(1, 3, 8, 6, dtype=torch.uint8), TypeError, "to_float"),
        (torch.rand(1, 3, 8, 6) * 255, ValueError, r"lr spans .* takes \[0, 1\]"),
        (torch.rand(3, 8, 6), ValueError, r"lr must be \[B, \w, H, W\]"),
    ],
)
@pytest.mark.parametrize("make", [lambda: EDSR(depth=1, width=4), Interpolation])
def test_refuses_images_of_another_kind(make, x, error, says):
    with pytest.raises(error, match=says):
        make()(x)
    with pytest.raises(ValueError, match="3, H, W"):
        EDSR(depth=1, width=4)(torch.rand(1, 4, 8, 6))


def test_an_srnet_carries_the_crop_it_works_in(tmp_path):
    """From the registry, from a folder, or said; a module says its own or nothing."""
    assert create_srnet("bicubic_arcface").crop == "arcface"
    assert create_srnet("edsr16_64", depth=1, width=4).crop == "sphereface"
    small = {"depth": 1, "width": 4}
    srnet = create_srnet("edsr16_64", crop="arcface", **small)
    assert srnet.crop == "arcface"
    save_for_hf(srnet, tmp_path, model_args=small, model_config={"idloss": {"crop": srnet.crop}})
    assert create_srnet(f"local-dir:{tmp_path}").crop == "arcface"
    assert create_srnet(f"local-dir:{tmp_path}", crop="ffhq").crop == "ffhq"
    module = torch.nn.Identity()
    assert create_srnet(module) is module
    assert not hasattr(module, "crop")
    assert srnet_crop(module) == "sphereface"
    module.crop = 8  # a stranger's word for something else
    assert srnet_crop(module) == "sphereface"
    assert create_srnet(module, crop="arcface") is module
    assert srnet_crop(module) == "arcface"
    with pytest.raises(ValueError, match="Did you mean 'arcface'"):
        create_srnet("bicubic", crop="arcfase")
    with pytest.raises(ValueError, match="unknown template"):
        register_srnet(crop="no_such")
