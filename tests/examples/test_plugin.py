"""The package that shows how others add to idloss, installed by pip and used by its names."""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
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
