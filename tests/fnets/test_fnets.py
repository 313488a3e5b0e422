"""Every FNet of the registry keeps timm's interface; small sizes keep this quick."""

import copy
import inspect

import pytest
import timm
import torch
from nets import opened
from timm.models import (
    get_arch_pretrained_cfgs,
    group_parameters,
    model_entrypoint,
    save_for_hf,
)

from idloss import create_fnet, list_fnets
from idloss.export import export
from idloss.fnets import FNet, MobileFaceNet, SphereFace, VGGFace
from idloss.fnets.vggface import LAYERS
from idloss.weights import ManualFile
from idloss.weights.loading import get_weights

# Few and narrow blocks; fully connected layers hold most parameters, and shrink with the image
FEW = {"img_size": (32, 32), "depths": (1, 2, 1, 1), "widths": (16, 32, 48, 64)}
SMALL = {
    "sface": {"img_size": (32, 32)},
    "mobilefacenet": {"img_size": (32, 32)},
    "vgg_face": {"img_size": (32, 32), "layer": "fc6"},
    "arcface_resnet18": {**FEW, "img_size": (64, 64)},
    "inception_resnet_v1": {"img_size": (80, 80), "depths": (1, 1, 1)},
    "edgeface": {
        "img_size": (32, 32),
        "depths": (1, 1, 1, 1),
        "dims": (8, 16, 24, 32),
        "heads": (2, 2, 2, 2),
    },
    "convnext": {"img_size": (32, 32), "depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "vit": {"img_size": (32, 32), "depth": 2, "embed_dim": 48},
}
SMALL |= dict.fromkeys(("iresnet", "ir"), FEW)
# not those that other tests register
FNETS = [n for n in list_fnets() if model_entrypoint(n).__module__.startswith("idloss.")]


def small(name):
    """Options that make a network small: those of the longest name it begins with."""
    return SMALL.get(max(filter(name.startswith, SMALL), key=len, default=""), {})


@pytest.fixture(params=FNETS)
def name(request):
    return request.param


def make(name, **options):
    torch.manual_seed(0)
    return create_fnet(name, **small(name), **options).eval()


def images(model, batch=2):
    return torch.randn(batch, 3, *model.img_size, generator=torch.Generator().manual_seed(1))


def test_families_are_registered():
    assert {"mobilefacenet", "mobilefacenet_relu6", "sface", "vgg_face"} <= set(FNETS)
    assert {"iresnet18", "iresnet34", "iresnet50", "iresnet100", "ir_se50"} <= set(FNETS)
    assert {"ir18", "ir50", "ir101", "arcface_resnet18", "inception_resnet_v1"} <= set(FNETS)
    assert {f"edgeface_{size}" for size in ("xxs", "xs", "s", "base")} <= set(FNETS)
    assert {"convnext_atto_112", "convnext_nano_112"} <= set(FNETS)
    assert {"vit_tiny_patch8_112", "vit_small_patch8_gap_112"} <= set(FNETS)


def test_embeds(name):
    model = make(name)
    x = images(model)
    with torch.no_grad():
        embeddings = model(x)
        features = model.forward_features(x)
    assert embeddings.shape == (2, model.num_features)
    assert features.ndim == (3 if name.startswith("vit") else 4)
    assert torch.equal(model.forward_head(features, pre_logits=True), embeddings)
    assert (embeddings[0] - embeddings[1]).abs().max() > 1e-4
    assert embeddings.min() < 0 < embeddings.max()


def test_gradient_reaches_the_image(name):
    model = make(name).requires_grad_(False)
    x = images(model).requires_grad_()
    model(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad != 0).float().mean() > 0.9


def test_eval_is_deterministic_and_alike_for_any_batch(name):
    model = make(name)
    x = images(model, batch=3)
    with torch.no_grad():
        together = model(x)
        assert torch.equal(model(x), together)
        alone = model(x[1:2])
    assert (alone - together[1:2]).norm() < 1e-5 * together[1:2].norm()


def test_says_what_it_takes(name):
    with torch.device("meta"):
        model = create_fnet(name)
    cfg = model.pretrained_cfg
    assert tuple(cfg["input_size"][-2:]) == model.img_size
    assert cfg["num_classes"] == model.num_classes == 0
    assert len(cfg["mean"]) == len(cfg["std"]) == 3
    assert isinstance(model.get_submodule(cfg["first_conv"]), torch.nn.Conv2d)


def test_other_sizes_are_refused(name):
    model = make(name)
    height, width = model.img_size
    with pytest.raises(ValueError, match=f"takes {height}x{width} images"):
        model(torch.zeros(1, 3, 2 * height, 2 * width))


def test_classifier(name):
    """For training an FNet: timm's arguments and methods, and no other change of the network."""
    model = make(name, num_classes=7)
    x = images(model)
    assert model.get_classifier().out_features == 7
    with torch.no_grad():
        logits, features = model(x), model.forward_features(x)
        assert logits.shape == (2, 7)
        embeddings = model.forward_head(features, pre_logits=True)
        assert torch.equal(model.get_classifier()(embeddings), logits)
        model.reset_classifier(0)
        assert torch.equal(model(x), embeddings)
        model.double().reset_classifier(3)
        assert model(x.double()).shape == (2, 3)
    with pytest.raises(ValueError, match="does not pool"):
        model.reset_classifier(3, global_pool="avg")


def test_timm_makes_the_same(name):
    options = small(name)
    torch.manual_seed(0)
    by_timm = timm.create_model(name, **options)
    ours = make(name)
    assert type(by_timm) is type(ours)
    assert all(
        torch.equal(value, ours.state_dict()[key]) for key, value in by_timm.state_dict().items()
    )


def test_tags(name):
    """`arch.tag` names are timm's, and each comes with its source, licence and training data."""
    tags = get_arch_pretrained_cfgs(name)
    assert tags
    for tagged, cfg in tags.items():
        assert f"{name}.{cfg.tag}" == tagged
        assert tagged in timm.list_models(f"{name}*", pretrained=True)
        weights = get_weights(tagged)
        assert cfg.url == weights.source.pieces[0].url
        pinned = all(piece.digest != "unpinned" for piece in weights.source.pieces)
        assert pinned or isinstance(weights.source, ManualFile)  # which nothing fetches unasked
        assert weights.licence
        assert weights.training_data in cfg.description


def test_timms_tools(name):
    """Learning rates by layer go up from the stem; what is not there says so."""
    model = make(name)
    for coarse in (True, False):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sum(map(len, groups.values())) == len(list(model.parameters()))
        first = groups[0] + groups[1]  # a ViT's class token comes first
        assert any(model.pretrained_cfg["first_conv"] in one for one in first)
        assert "embedding" in groups[len(groups) - 1][0]
    assert len(groups) >= 5
    model.set_grad_checkpointing(False)
    with pytest.raises(NotImplementedError, match="has no gradient checkpointing"):
        model.set_grad_checkpointing()
    with pytest.raises(NotImplementedError, match="has no forward_intermediates"):
        model.forward_intermediates(images(model))
    with pytest.raises(ValueError, match="has no features_only; forward_features gives"):
        timm.create_model(name, features_only=True, **small(name))


@pytest.mark.parametrize("num_classes", [0, 5])
def test_local_dir(name, num_classes, tmp_path):
    """Saved as timm saves, read back by timm, and by create_fnet without the classifier."""
    model = make(name, num_classes=num_classes)
    save_for_hf(model, tmp_path, model_args=small(name), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(model)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        fnet = create_fnet(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert fnet.num_classes == 0
        assert fnet.num_features == model.num_features
        assert fnet.crop == model.crop
        embeddings = model.forward_head(model.forward_features(x), pre_logits=True)
        assert torch.equal(fnet(x), embeddings)


def test_copies_layouts_and_precisions(name):
    model = make(name)
    twin, x = copy.deepcopy(model), images(model)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(x)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(x), expected)
        twin = twin.to(memory_format=torch.channels_last)
        result = twin(x.to(memory_format=torch.channels_last))
    assert torch.cosine_similarity(half.float(), expected).min() > 0.99
    assert torch.allclose(result, expected, rtol=1e-3, atol=1e-4)


# One network of each kind: the others of a family are the same code, and `small` makes them alike
KINDS = ["sface", "mobilefacenet", "vgg_face", "iresnet50", "ir50", "ir_se50", "arcface_resnet18"]
KINDS += ["inception_resnet_v1", "edgeface_xxs", "convnext_atto_112", "vit_tiny_patch8_112"]


@pytest.mark.parametrize("name", KINDS)
def test_compiles_without_a_break(name):
    model = make(name)
    x = images(model)
    torch.compiler.reset()  # which counts what it compiled of other networks' forward
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("name", KINDS)
def test_exports_with_any_batch(name, suffix, tmp_path):
    model = make(name)
    made = export(model, tmp_path / f"net{suffix}")
    assert made.inputs == ("batch", 3, *model.img_size)
    x = images(model, batch=3)
    with torch.no_grad():
        expected = model(x)  # a thousand, with these batch norms
        assert (opened(made.path)(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_documented(name):
    entry_point = model_entrypoint(name)
    assert inspect.getdoc(entry_point)
    assert list(inspect.signature(entry_point).parameters) == ["pretrained", "kwargs"]
    assert issubclass(type(make(name)), FNet)


# --- families ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depths", "layers"),
    [
        ((0, 0, 0, 0), 4),
        ((0, 1, 2, 0), 10),
        ((1, 2, 4, 1), 20),
        ((2, 4, 8, 2), 36),
        ((3, 8, 16, 3), 64),
    ],
)
def test_sphereface_depths(depths, layers):
    """SphereFace, table 2: a network is called after the number of its convolutions."""
    with torch.device("meta"):
        model = SphereFace(depths=depths)
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    assert convolutions == layers
    assert model(torch.zeros(1, 3, 112, 96, device="meta")).shape == (1, 512)
    assert model.forward_features(torch.zeros(1, 3, 112, 96, device="meta")).shape == (1, 512, 7, 6)


@pytest.mark.parametrize(("layer", "width"), LAYERS.items())
def test_vgg_face_layers(layer, width):
    with torch.device("meta"):
        model = VGGFace(layer=layer)
    assert model.num_features == width
    assert model(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, width)
    assert list(LAYERS).index(layer) == sum("fc" in name for name, _ in model.named_modules()) - 1


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        (SphereFace, {"depths": (1, 2)}, "zip"),
        (VGGFace, {"layer": "fc77"}, "Did you mean 'fc7'"),
        (VGGFace, {"img_size": (16, 16)}, "at least 32x32"),
        (MobileFaceNet, {"act": "relu"}, "Did you mean 'relu6'"),
    ],
)
def test_options_are_checked(family, options, said):
    with pytest.raises(ValueError, match=said):
        family(**options)


def test_vgg_face_drops_out_in_training_only():
    model = VGGFace(img_size=(32, 32), layer="fc7")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


def test_vgg_face_loads_no_deeper_than_asked(tmp_path):
    """One file with all layers serves every `layer`; a missing one is still an error."""
    deep = timm.create_model("vgg_face", img_size=(32, 32), layer="fc7")
    path = tmp_path / "vgg.pth"
    torch.save(deep.state_dict(), path)
    overlay = {"file": str(path)}
    options = {"img_size": (32, 32), "pretrained": True, "pretrained_cfg_overlay": overlay}
    shallow = timm.create_model("vgg_face", layer="fc6", **options)
    assert torch.equal(shallow.embedding.fc6.weight, deep.embedding.fc6.weight)
    with pytest.raises(RuntimeError, match=r"embedding\.fc8"):
        timm.create_model("vgg_face", layer="fc8", **options)


def test_mobilefacenet_size():
    """The paper says 0.99 million parameters (table 1's caption and section 3)."""
    count = sum(parameter.numel() for parameter in MobileFaceNet().parameters())
    assert count == pytest.approx(0.99e6, rel=0.02)
