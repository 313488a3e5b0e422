"""The README's picture, of a miniature LFW."""

import argparse

import torch
from minilfw import mini_lfw
from PIL import Image

from idloss import create_fnet


def test_the_picture_is_small(example, tmp_path, monkeypatch, capsys):
    module = example("picture")
    torch.manual_seed(0)
    monkeypatch.setattr(module, "create_fnet", lambda name, pretrained: create_fnet(name))
    out = tmp_path / "faces.png"
    module.main(argparse.Namespace(lfw=mini_lfw(tmp_path), out=out, size="14x12", faces=2))
    picture = Image.open(out)
    assert picture.width == module.WIDTH
    assert picture.mode == "P"
    assert f"{out.stat().st_size:,} bytes" in capsys.readouterr().out
