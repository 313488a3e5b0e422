"""The package that shows how others add to idloss, installed by pip and used by its names."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from textwrap import dedent

import pytest
import torch
from conftest import ROOT

USE = """
import torch, idloss
from idloss.cli import app
srnet = idloss.create_srnet("facekit_espcn")
loss = idloss.IdentityPreservedLoss("facekit_fnet", pretrained=False, distance="facekit_chord")
lr, hr = torch.rand(2, 3, 28, 28), torch.rand(2, 3, 112, 112)
loss(srnet(lr), hr).backward()
assert srnet.tail.weight.grad.abs().sum() > 0
assert loss.encoders[0].fnet_crop.name == "arcface"
app(["list", "facekit*", "--json"])
"""


def test_pip_installs_it_and_idloss_lists_it(tmp_path):
    # not find_spec("pip"): setuptools would take this process for pip's, and inductor fail in it
    there = {one.name for one in metadata.distributions()}
    for needed in ("pip", "setuptools"):
        if needed not in there:
            pytest.skip(f"{needed} is not installed here")
    source = shutil.copytree(ROOT / "examples" / "plugin", tmp_path / "source")
    words = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    install = [sys.executable, "-m", "pip", "install", *words, tmp_path / "site", source]
    subprocess.run(install, check=True)
    paths = os.pathsep.join((str(tmp_path / "site"), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", USE],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    fnet, srnet = json.loads(done.stdout)
    assert (fnet["name"], fnet["kind"], fnet["crop"]) == ("facekit_fnet", "FNet", "arcface")
    assert (srnet["name"], srnet["kind"]) == ("facekit_espcn", "SRNet")
    assert all(one["parameters"] and one["multiply_adds"] for one in (fnet, srnet))


FAMILY = """
import sys, torch, idloss, mini
idloss.weights.add("mini.faces", "mini.pth")
net = idloss.create_fnet("mini", pretrained=True)
given = torch.load("mini.pth")
assert all(torch.equal(value, given[name]) for name, value in net.state_dict().items())
sr = torch.rand(2, 3, 112, 112, requires_grad=True)
idloss.IdentityPreservedLoss("mini")(sr, torch.rand(2, 3, 112, 112)).backward()
assert sr.grad.any()
"""


def test_contributings_family_works_with_its_weights(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = dedent(re.search(r' +"""Mini: .*?(?=\n +```)', text, re.S).group())
    assert len(code.splitlines()) < 40
    sizes = {"0": (16, 3, 3, 3), "2": (16, 16, 3, 3), "4": (64, 784)}
    weights = {f"{layer}.weight": torch.randn(size) for layer, size in sizes.items()}
    weights |= {f"{layer}.bias": torch.randn(size[0]) for layer, size in sizes.items()}
    torch.save(weights | {"1.weight": torch.rand(1)}, tmp_path / "mini.pth")
    digest = hashlib.sha256((tmp_path / "mini.pth").read_bytes()).hexdigest()
    pinned = code.replace('sha256="0" * 64', f'sha256="{digest}"')
    assert pinned != code
    (tmp_path / "mini.py").write_text(pinned, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hub")}
    subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", FAMILY],
        env=environment,
        cwd=tmp_path,
        check=True,
    )
