"""The command as the shell calls it, and what it is given."""

import pytest
import torch
from minilfw import mini_lfw
from timm.models import save_for_hf

from idloss import create_fnet, create_srnet
from idloss.cli import main


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Run `idloss WORDS...` as the shell does; gives the error's lines, or None."""
    monkeypatch.setattr("idloss.evaluation.run.HF_HOME", str(tmp_path / "hf"))

    def call(*words):
        monkeypatch.setattr("sys.argv", ["idloss", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code

    return call


@pytest.fixture(scope="session")
def lfw(tmp_path_factory):
    return mini_lfw(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def fnet(tmp_path_factory):
    """An FNet as a `local-dir:` name, with the weights it was drawn with."""
    folder = tmp_path_factory.mktemp("fnet")
    torch.manual_seed(0)
    save_for_hf(create_fnet("mobilefacenet"), folder)
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def networks(fnet, tmp_path_factory):
    """That FNet and an SRNet, labelled."""
    folder = tmp_path_factory.mktemp("srnet")
    torch.manual_seed(0)
    small = {"depth": 1, "width": 4}
    save_for_hf(create_srnet("edsr16_64", **small), folder, model_args=small)
    return f"f={fnet}", f"ours=local-dir:{folder}"
