"""Exported files: what they take, what they say of themselves, and when none is written."""

import sys

import pytest
import torch
from nets import TinySRNet, faces, opened, tiny_fnet
from torch import nn

from idloss import FaceEncoder, create_fnet
from idloss.export import Exported, export

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(
    ("interpolation", "crop", "suffix"),
    [("bicubic", "arcface", ".onnx"), ("bilinear", None, ".pt2")],
)
def test_an_encoder_takes_crops_of_any_size(suffix, interpolation, crop, tmp_path):
    """Smaller ones are enlarged, larger ones shrunk with antialiasing, as in torch."""
    encoder = FaceEncoder(tiny_fnet(), crop=crop, interpolation=interpolation, flip=True)
    made = export(encoder, tmp_path / f"encoder{suffix}")
    assert made.inputs == ("batch", 3, "height", "width")
    for batch, size in ((1, (7, 6)), (2, (14, 12)), (3, (28, 24)), (4, (120, 100)), (1, (9, 300))):
        x = faces(batch, size)
        with torch.no_grad():
            assert torch.allclose(opened(made.path)(x), encoder(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_fp16_is_half_the_size_and_takes_float32(suffix, tmp_path):
    model = tiny_fnet(num_features=20_000).eval()
    whole = export(model, tmp_path / f"whole{suffix}").path
    half = export(model, tmp_path / f"half{suffix}", precision="fp16").path
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    x = faces()
    with torch.no_grad():
        assert torch.cosine_similarity(opened(half)(x), model(x)).min() > 0.9999


def test_int8_is_set_by_faces(tmp_path):
    model = tiny_fnet(num_features=20_000).eval()
    made = export(model, tmp_path / "net.onnx", precision="int8", faces=faces(16))
    assert made.path.stat().st_size < 1.5 * 33 * 20_000
    x = faces(seed=1)
    with torch.no_grad():
        assert torch.cosine_similarity(opened(made.path)(x), model(x)).min() > 0.99


def test_a_file_says_what_it_takes(tmp_path):
    model = create_fnet("sface", depths=(0, 0, 0, 0), img_size=(32, 32))
    model.pretrained_cfg |= {"tag": "mine", "license": "cc-by-nc"}
    path = export(model, tmp_path / "net.onnx").path
    written = onnx.load(path)
    told = {entry.key: entry.value for entry in written.metadata_props}
    assert told["idloss.model"] == "sface.mine"
    assert told["idloss.mean"] == "0.5, 0.5, 0.5"
    assert told["idloss.crop"] == "sphereface"
    assert told["idloss.licence"] == "cc-by-nc"
    assert {one.domain: one.version for one in written.opset_import}[""] == 18
    assert Exported(path, model).num_features == 512
    assert [one.name for one in written.graph.input] == ["images"]


class Wanders(nn.Module):
    """Answers in another way each time."""

    pretrained_cfg = {"input_size": (3, 8, 8)}  # noqa: RUF012

    def forward(self, x):
        return x + torch.rand(3, 1, 1) if torch.compiler.is_exporting() else x


class Branches(nn.Module):
    def forward(self, x):
        return x if x.mean() > 0 else -x


def test_what_differs_from_torch_is_not_kept(tmp_path):
    with pytest.raises(RuntimeError, match=r"exported Wanders is .* away from torch, more than"):
        export(Wanders(), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("net", "name", "options", "said"),
    [
        (TinySRNet(), "net.pth", {}, r"a \.onnx or a \.pt2 file, got 'net\.pth'"),
        (TinySRNet(), "net.pt2", {"precision": "int8"}, r"int8 is for \.onnx files"),
        (TinySRNet(), "net.onnx", {"precision": "int8"}, "give faces="),
        (TinySRNet(), "net.onnx", {"precision": "fp61"}, "Did you mean 'fp16'"),
        (TinySRNet(), "net.onnx", {}, "does not say which images it takes: give size="),
        (Branches(), "net.onnx", {"size": (8, 8)}, "Branches cannot be exported: "),
    ],
)
def test_what_cannot_be_exported_is_told(net, name, options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        export(net, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"need .*: pip install 'idloss\[export\]'"):
        export(TinySRNet(), tmp_path / "net.onnx", size=(8, 8))
    assert export(TinySRNet(), tmp_path / "net.pt2", size=(8, 8)).error == 0
