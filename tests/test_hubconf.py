"""torch.hub as a user calls it: from a directory that is not the repository's."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

OWN_WORDS = {
    "edsr16_64": "image loss alone",
    "edsr16_64_id": "identity loss",
    "edsr32_256": "image loss alone",
    "edsr32_256_id": "identity loss",
    "fnet": r"idloss\.create_fnet",
    "identity_preserved_loss": r"loss\(sr, hr\)",
    "mobilefacenet": "128-d",
    "sface": "the FNet the paper trains with",
    "srnet": r"idloss\.create_srnet",
    "vgg_face": "4096-d",
}
REPO = "someone/idloss:main"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A current directory that is not the repository's, and a hub that has it cached."""
    (tmp_path / "someone_idloss_main").symlink_to(ROOT, target_is_directory=True)
    (tmp_path / "trusted_list").write_text("someone_idloss")
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield
    torch.hub.set_dir(before)


def test_list_shows_these_names_alone():
    assert set(torch.hub.list(REPO, skip_validation=True)) == set(OWN_WORDS)


@pytest.mark.parametrize(("name", "words"), OWN_WORDS.items())
def test_help_is_of_each_its_own(name, words):
    shown = torch.hub.help(REPO, name, skip_validation=True)
    assert re.search(words, shown)
    assert "Args:" in shown


def test_load_srnet():
    net = torch.hub.load(str(ROOT), "edsr16_64", source="local", pretrained=False, depth=1, width=4)
    assert net(torch.rand(1, 3, 7, 6)).shape == (1, 3, 28, 24)


def test_load_loss():
    loss = torch.hub.load(
        str(ROOT), "identity_preserved_loss", "mobilefacenet", source="local", pretrained=False
    )
    assert loss.eval()(torch.rand(1, 3, 28, 28), torch.rand(1, 3, 112, 112)).ndim == 0


def test_works_without_an_install(tmp_path):
    """A hub checkout is not on sys.path: hubconf must find its own package."""
    code = (
        "import sys, torch; net = torch.hub.load(sys.argv[1], 'edsr16_64', source='local', "
        "pretrained=False, depth=1, width=4); print(type(net).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert done.stdout.strip() == "EDSR"


def test_what_comes_with_the_package_needs_no_network(monkeypatch):
    """Weights and all, and README's loss of three lines as well."""
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("the network was asked"))
    srnet = torch.hub.load(str(ROOT), "edsr16_64_id", source="local")
    hr = torch.rand(2, 3, 112, 96)
    sr = srnet(torch.rand(2, 3, 28, 24))
    code = (ROOT / "README.md").read_text("utf-8").split("```python\n")[1].partition("```")[0]
    exec(code, names := {"l1": torch.nn.L1Loss(), "sr": sr, "hr": hr})
    names["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in srnet.parameters())
    assert 0 < names["identity_loss"](hr, hr.flip(0)) < 2
