"""Networks of others: tiny ones with drawn weights stand for the released files."""

import sys
import zipfile

import pytest
import torch
from nets import tiny_fnet
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from tinytraining import FIELDS, tiny_faces
from torch import nn

from idloss import HallucinationLoss, create_srnet, list_srnets
from idloss.evaluation.cache import digest_network
from idloss.srnets import Restorer
from idloss.srnets.foreign import _CALLS
from idloss.training import Recipe, open_trained, train


def faces(batch=2, size=(7, 6)):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def spandrel():
    return pytest.importorskip("spandrel", reason="pip install 'idloss[spandrel]'")


@pytest.fixture(scope="session")
def files(spandrel, tmp_path_factory):
    """A file for each way that a state dict is told apart, padded and called."""
    from spandrel.architectures.Compact import Compact
    from spandrel.architectures.DnCNN import DnCNN
    from spandrel.architectures.ESRGAN import ESRGAN
    from spandrel.architectures.SAFMN import SAFMN

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("spandrel")
    compact = {"num_feat": 8, "num_conv": 2}
    nets = {
        "compact.pth": Compact(num_in_ch=3, num_out_ch=3, upscale=2, **compact),
        "grey.pth": Compact(num_in_ch=1, num_out_ch=1, upscale=2, **compact),
        "unshuffled.safetensors": ESRGAN(
            in_nc=12, out_nc=3, num_filters=8, num_blocks=1, scale=4, shuffle_factor=2
        ),
        "safmn.pth": SAFMN(dim=8, n_blocks=1, upscaling_factor=4),
        "denoiser.pth": DnCNN(in_nc=3, out_nc=3, nc=8, nb=4),
    }
    for name, net in nets.items():
        if name.endswith("safetensors"):
            save_file(net.state_dict(), folder / name)
        else:
            torch.save({"params_ema": net.state_dict()}, folder / name)
    return folder


GOOD = ["compact.pth", "unshuffled.safetensors", "safmn.pth", "denoiser.pth"]


@pytest.mark.parametrize("name", GOOD)
def test_the_answer_is_spandrels_with_a_gradient(name, files, spandrel):
    srnet = create_srnet(f"spandrel:{files / name}")
    theirs = spandrel.ModelLoader().load_from_file(files / name)
    assert (srnet.scale, srnet.crop) == (theirs.scale, "sphereface")
    for size in ((7, 6), (16, 16), (2, 5)):
        x = faces(1, size)
        with torch.no_grad():
            found = srnet.eval()(x)
        torch.testing.assert_close(found.clamp(0, 1), theirs(x).clone(), atol=1e-6, rtol=0)
        assert found.shape == (1, 3, size[0] * srnet.scale, size[1] * srnet.scale)
    x = faces().requires_grad_()
    srnet.train()(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in srnet.parameters())


@pytest.mark.parametrize("name", GOOD[:2])
def test_it_trains_under_the_loss_and_spandrel_opens_what_is_saved(name, files, spandrel, tmp_path):
    recipe = Recipe(**FIELDS | {"iterations": 2, "srnet": f"spandrel:{files / name}"})
    criterion = HallucinationLoss(tiny_fnet(), crop="sphereface")
    trained = train(recipe, tmp_path, faces=tiny_faces(), criterion=criterion)
    before = create_srnet(recipe.srnet).eval()
    saved, x = tmp_path / "model" / "model.safetensors", faces(1, (16, 16))
    with torch.no_grad():
        assert (before(x) - trained(x)).abs().max() > 1e-3
        for opened in (open_trained(tmp_path), create_srnet(f"local-dir:{tmp_path}/model").eval()):
            torch.testing.assert_close(opened(x), trained(x), atol=1e-6, rtol=0)
            assert opened.crop == "sphereface"
        theirs = spandrel.ModelLoader().load_from_file(saved)
        torch.testing.assert_close(theirs(x).clone(), trained(x).clamp(0, 1), atol=1e-6, rtol=0)
    keys = {key.removeprefix("module.") for key in load_file(saved)}
    assert keys == theirs.model.state_dict().keys()


def test_what_is_said_is_kept_and_what_is_published_is_found(files, tmp_path):
    srnet = create_srnet(f"spandrel:{files / 'denoiser.pth'}", size=(32, 32), crop="arcface")
    assert srnet(faces()).shape == (2, 3, 32, 32)
    model_args, told = srnet._model_args, {"idloss": {"crop": srnet.crop}}
    save_for_hf(srnet, tmp_path, model_args=model_args, model_config=told)
    again = create_srnet(f"local-dir:{tmp_path}", pretrained=True)
    assert again.crop == "arcface"
    assert torch.equal(again(faces()), srnet(faces()))
    assert digest_network(srnet.eval(), (3, 7, 6)) is not None
    assert not [name for name in list_srnets() if "spandrel" in name]


def test_files_that_are_no_srnets_are_refused_by_name(files, tmp_path):
    (tmp_path / "page.pth").write_text("<html>")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "unknown.pth")
    torch.jit.trace(nn.Conv2d(3, 3, 1), faces()).save(tmp_path / "script.pt")
    for path, error, says in (
        (files / "grey.pth", ValueError, r"takes and gives \(1, 1\) channels"),
        (tmp_path / "page.pth", ValueError, "page.pth is no network that spandrel loads"),
        (tmp_path / "unknown.pth", ValueError, "unknown.pth is no .*UnsupportedModelError"),
        (tmp_path / "script.pt", ValueError, r"script\.pt .*TorchScript is a program: torch\.save"),
        (tmp_path / "no.pth", FileNotFoundError, "no.pth: there is no such file"),
    ):
        with pytest.raises(error, match=says):
            create_srnet(f"spandrel:{path}")
    with pytest.raises(TypeError, match="scale"):
        create_srnet(f"spandrel:{files / 'compact.pth'}", scale=8)


def test_what_a_file_makes_spandrel_build_is_bounded(files, tmp_path):
    """Its keys tell how many layers there are, and what zip packed may be a thousand times more."""
    tensors = torch.load(files / "compact.pth")["params_ema"]
    last = max(int(key.split(".")[1]) for key in tensors)
    odd = {
        key.replace(f"body.{last}.", f"body.{2 * 10**8 + last % 2}."): v
        for key, v in tensors.items()
    }
    torch.save(odd, tmp_path / "deep.pth")
    with (
        zipfile.ZipFile(files / "compact.pth") as plain,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.namelist():
            packed.writestr(entry, bytes(10**7) if "data/" in entry else plain.read(entry))
    for name, says in (("deep.pth", "asks for more than"), ("packed.pth", "would unpack to")):
        with pytest.raises(ValueError, match=says):
            create_srnet(f"spandrel:{tmp_path / name}")


def test_without_spandrel_the_way_to_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'idloss\[spandrel\]'"):
        create_srnet(f"spandrel:{tmp_path / 'any.pth'}")


class Pair(nn.Module):
    """Gives what it takes, and something else, as GFPGAN does; says what it took."""

    def forward(self, x, return_rgb=True, randomize_noise=True):
        self.took = x.detach()
        noise = torch.rand_like(x) if randomize_noise else 0
        return x + noise, [x] if return_rgb else []


def test_a_restorer_takes_and_gives_its_own_size_and_range():
    srnet = create_srnet(Restorer(Pair(), (32, 32), randomize_noise=False))
    assert srnet.crop == "ffhq"
    low = faces().requires_grad_()
    found = srnet(low)
    assert found.shape == (2, 3, 32, 32)
    assert -1 <= srnet.module.took.min() < -0.5
    exact = nn.functional.interpolate(low, (32, 32), mode="bilinear")
    torch.testing.assert_close(found, exact)
    found.sum().backward()
    assert low.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="Did you mean 'ffhq'"):
        Restorer(Pair(), crop="ffqh")


def test_gfpgan_is_asked_in_its_authors_range_and_answers_the_same_twice():
    net, x = Pair().eval(), faces()
    torch.testing.assert_close(_CALLS["GFPGAN"](net, x), x)
    torch.testing.assert_close(net.took, x * 2 - 1)
    assert (_CALLS["GFPGAN"](net.train(), x) - x).abs().max() > 0.1
