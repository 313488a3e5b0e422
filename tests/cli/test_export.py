"""`idloss export`."""

import pytest
import torch
from timm.models import save_for_hf

from idloss import create_fnet

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def fnet(tmp_path_factory):
    """An FNet of few layers."""
    folder, few = tmp_path_factory.mktemp("small"), {"depths": (0, 1, 0, 0), "img_size": (56, 48)}
    torch.manual_seed(0)
    save_for_hf(create_fnet("sface", **few), folder, model_args=few)
    return f"local-dir:{folder}"


@pytest.mark.parametrize("words", [(), ("--encoder", "--crop", "sphereface", "--flip")])
def test_export_measures_what_int8_costs(words, command, lfw, fnet, tmp_path, capsys):
    file = tmp_path / "net.onnx"
    options = ("--precision", "int8", "--data", lfw, *words)
    assert not command("export", fnet, "--to", file, *options)
    told = capsys.readouterr().out
    assert f"{file}: ONNX of opset 18, int8, {file.stat().st_size:,} bytes" in told
    assert file.stat().st_size < 5.5e6  # of 20 MB
    assert "| torch " in told
    assert "| onnx-int8 " in told


def test_export_of_an_srnet(command, lfw, fnet, tmp_path, capsys):
    file = tmp_path / "net.onnx"
    options = ("--precision", "fp16", "--data", lfw, "--judge", fnet)
    assert not command("export", "edsr16_64", "--to", file, *options)
    told = capsys.readouterr().out
    assert "takes [batch, 3, height, width]" in told
    assert "14\N{MULTIPLICATION SIGN}12" in told
    assert "onnx-fp16" in told


def test_export_for_torch(command, tmp_path, capsys):
    assert not command("export", "bicubic", "--to", tmp_path / "net.pt2")
    assert "torch.export, fp32" in capsys.readouterr().out
    error = command("export", "bicubic", "--to", tmp_path / "net.pt2", "--encoder")
    assert error == "idloss: bicubic is an SRNet, and --encoder is for FNets"
    error = command("export", "bicubic", "--to", tmp_path / "x.onnx", "--precision", "int8")
    assert error.endswith("give faces= or --data")
