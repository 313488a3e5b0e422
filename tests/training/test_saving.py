"""What a run saves opens again, whoever built the network, and tells of the run."""

import json

import pytest
import torch
from nets import TinyFNet, TinySRNet, tiny_fnet
from timm.models import build_model_with_cfg
from tinytraining import FIELDS, tiny_edsr, tiny_faces, tiny_run, weights
from torch import nn

from idloss import HallucinationLoss, create_srnet, register_srnet
from idloss.data import draw_faces
from idloss.training import FNetRecipe, Recipe, load_recipe, open_trained, train, train_fnet

LR = torch.rand(2, 3, 7, 6, generator=torch.Generator().manual_seed(1))


class Tied(nn.Module):
    """Two convolutions that share their weight, as an autoencoder's may."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.two.weight = self.one.weight

    def forward(self, x):
        return torch.sigmoid(self.two(self.one(x)))


class Transposed(nn.Module):
    """A weight that lies in memory in another order."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.eye(3).repeat(1, 2)[:, ::2].t() + 0.1)

    def forward(self, x):
        return torch.einsum("oc,bchw->bohw", self.mix, x)


class Adapter(nn.Module):
    """What LoRA does: the network inside is frozen, and speaks for what is around it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.added = nn.Conv2d(3, 3, 1, bias=False)
        self.pretrained_cfg = base.pretrained_cfg

    def forward(self, x):
        return self.added(self.base(x)) + self.base(x)


def normed():
    """The old weight norm, whose weights are made of others and cannot be copied."""
    net = TinySRNet()
    nn.utils.weight_norm(net.body[0])
    return net


class Remembering(TinySRNet):
    """Keeps its last output, with its graph."""

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(
    "build",
    [
        TinySRNet,
        Tied,
        Transposed,
        lambda: Adapter(tiny_edsr()),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)),
        normed,
        Remembering,
    ],
    ids=["own", "tied", "transposed", "LoRA", "parametrised", "weight norm", "remembering"],
)
@pytest.mark.parametrize("ema", [None, 0.9])
def test_networks_of_ones_own_train_are_judged_save_and_open(tmp_path, build, ema, monkeypatch):
    seen = []

    def judge(network, step):
        seen.append((step, network.training))
        return {"figure": network(LR).mean().item()}

    monkeypatch.setattr("idloss.training.runs._validation", lambda *_: judge)
    fields = {"iterations": 2, "channels_last": False, "ema": ema, "identity_weight": 0}
    trained = tiny_run(tmp_path, srnet=build(), **fields)
    opened = open_trained(tmp_path, build())
    torch.testing.assert_close(opened(LR), trained.eval()(LR))
    assert seen == [(2, False)]
    with pytest.raises(ValueError, match="is not registered: build one and give it to"):
        open_trained(tmp_path / "model")


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, lambda net: torch.compile(nn.DataParallel(net))],
    ids=["DataParallel", "compiled", "both"],
)
def test_what_is_wrapped_is_saved_as_it_is_without(tmp_path, wrap):
    tiny_run(tmp_path / "plain", srnet=tiny_edsr(), iterations=1)
    tiny_run(tmp_path / "wrapped", srnet=wrap(tiny_edsr()), iterations=1)
    expected, found = weights(tmp_path / "plain"), weights(tmp_path / "wrapped")
    assert all(found[key].equal(value) for key, value in expected.items())
    assert open_trained(tmp_path / "wrapped").scale == 4


def test_settings_that_weights_do_not_show_come_back(tmp_path):
    trained = tiny_run(tmp_path, srnet=tiny_edsr(scale=2), iterations=1)
    opened = create_srnet(f"local-dir:{tmp_path}/model", pretrained=True)
    torch.testing.assert_close(opened(LR), trained(LR))


class PlugIn(TinySRNet):
    num_classes = num_features = 0

    def __init__(self, **_):
        super().__init__()


@register_srnet
def plugged_in(pretrained=False, **kwargs):
    cfg = kwargs.pop("pretrained_cfg", None) or {"input_size": (3, 7, 6)}
    return build_model_with_cfg(PlugIn, "plugged_in", pretrained, pretrained_cfg=cfg, **kwargs)


def test_a_plug_in_opens_by_the_registry(tmp_path):
    trained = tiny_run(tmp_path, srnet=create_srnet("plugged_in"), iterations=1)
    opened = create_srnet(f"local-dir:{tmp_path}/model", pretrained=True).eval()
    assert isinstance(opened, PlugIn)
    torch.testing.assert_close(opened(LR), trained(LR))


def test_what_cannot_be_saved_is_refused_before_the_first_step(tmp_path):
    class Secretive(TinySRNet):
        def get_extra_state(self):
            return {"not": "a tensor"}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ValueError, match="Secretive cannot be saved"):
        tiny_run(tmp_path, srnet=Secretive())
    assert not (tmp_path / "training.csv").exists()
    assert not list(tmp_path.glob("model*"))


def test_a_saved_network_tells_its_own_run(tmp_path):
    """Not that of the weights in the zoo under the same name."""
    recipe = Recipe(**FIELDS | {"iterations": 1}, srnet_options={"depth": 1, "width": 8})
    criterion = HallucinationLoss(tiny_fnet(), weight=0.25, crop="sphereface")
    trained = train(recipe, tmp_path, faces=tiny_faces(), criterion=criterion)
    text = (tmp_path / "model" / "config.json").read_text()
    for lie in ("celeba_aaf", "LFW", "zoo", "file://", "research"):
        assert lie not in text
    told = json.loads(text)["idloss"]
    assert told["recipe"]["iterations"] == 1
    assert len(told["data"]["sha256"]) == 64
    assert (told["data"]["faces"], told["data"]["identities"]) == (20, 10)
    assert told["given"] == {"criterion": "idloss.losses.HallucinationLoss"}
    assert "identity_weight" not in told["recipe"]  # the criterion given had its own
    assert "data" not in told["recipe"]
    assert "began_with" not in told
    opened = create_srnet(f"local-dir:{tmp_path}/model", pretrained=True)
    assert not opened.pretrained_cfg.get("tag")
    assert opened(LR).equal(trained(LR))


def test_what_a_network_that_was_given_began_with_is_told(tmp_path):
    tiny_run(tmp_path, srnet=create_srnet("edsr16_64", pretrained=True), iterations=1, batch_size=2)
    told = json.loads((tmp_path / "model" / "config.json").read_text())["idloss"]
    assert told["began_with"]["tag"] == "celeba_aaf"
    assert "research" in told["began_with"]["license"]


def test_faces_that_a_recipe_excludes_are_left_out_of_those_given(tmp_path):
    """Ten people with two faces each."""
    tiny_run(tmp_path, iterations=1, exclude=("0", "3.jpg"))
    told = json.loads((tmp_path / "model" / "config.json").read_text())["idloss"]
    assert (told["data"]["faces"], told["data"]["identities"]) == (17, 9)


def test_an_fnet_that_no_gradient_reaches_is_refused_at_the_first_step(tmp_path):
    """The margin learns on, and the loss falls."""

    class Cut(TinyFNet):
        def forward(self, x):
            return super().forward(x).detach()

    recipe = FNetRecipe(**FIELDS | {"iterations": 2, "margin": "cosface"})
    with pytest.raises(ValueError, match="no gradient reaches the weights of Cut"):
        train_fnet(recipe, tmp_path, faces=tiny_faces(), fnet=Cut())
    assert not (tmp_path / "training.csv").exists()


def test_a_network_without_a_copy_has_no_moving_average(tmp_path):
    fnet = tiny_fnet()
    fnet.remembered = fnet(torch.rand(2, 3, 28, 24))
    recipe = FNetRecipe(**FIELDS | {"iterations": 2, "margin": "cosface", "ema": 0.9})
    with pytest.raises(ValueError, match=r"ema needs a copy of TinyFNet.*: unset ema"):
        train_fnet(recipe, tmp_path, faces=tiny_faces(), fnet=fnet)


@pytest.mark.parametrize("own", [False, True])
def test_a_run_follows_the_crop_of_the_srnet_and_saves_it(own, tmp_path):
    """Crops, LR sizes, FNet and picture sheets are those of 112x112; 112x96 takes its word."""
    faces = draw_faces(2, 4, size=(112, 112), crop="arcface")
    fnet = tiny_fnet(size=(112, 112))
    fnet.crop = "arcface"
    criterion = HallucinationLoss(fnet, crop="arcface")
    options = {"depth": 1, "width": 4, "crop": "arcface"}
    srnet = create_srnet(TinySRNet(), crop="arcface") if own else None
    recipe = Recipe(**FIELDS | {"iterations": 1, "factors": (8,)}, srnet_options=options)
    assert (recipe.crop, recipe.lr_sizes()) == ("arcface", ((14, 14),))
    if own:
        recipe = Recipe(**FIELDS | {"iterations": 1, "factors": (8,)})
        assert (recipe.crop, recipe.lr_sizes()) == ("sphereface", ((14, 12),))
    train(recipe, tmp_path, faces=faces, criterion=criterion, srnet=srnet)
    assert load_recipe(tmp_path / "recipe.yaml").crop == "arcface"
    assert open_trained(tmp_path, TinySRNet() if own else None).crop == "arcface"
    if not own:
        name = f"local-dir:{tmp_path}/model"
        assert create_srnet(name, pretrained=True).crop == "arcface"
        again = Recipe(**FIELDS | {"iterations": 1, "factors": (8,), "srnet": name})
        train(again, tmp_path / "again", faces=faces, criterion=criterion)
        said = Recipe(**again.model_dump() | {"crop": "sphereface", "identity_weight": 0})
        with pytest.raises(ValueError, match=r"aligned to 'arcface'.*crop=sphereface"):
            train(said, tmp_path / "said", faces=faces)


def test_an_fnet_of_ones_own(tmp_path):
    recipe = FNetRecipe(**FIELDS | {"iterations": 1, "margin": "cosface"})
    trained = train_fnet(recipe, tmp_path, faces=tiny_faces(), fnet=tiny_fnet())
    opened = open_trained(tmp_path, TinyFNet())
    images = torch.rand(2, 3, 28, 24)
    torch.testing.assert_close(opened(images), trained(images))


def test_damaged_and_foreign_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no saved network"):
        open_trained(tmp_path)
    tiny_run(tmp_path, srnet=TinySRNet(), iterations=1)
    with pytest.raises(ValueError, match=r"are of a nets\.TinySRNet and do not fit"):
        open_trained(tmp_path, Tied())
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=str(tmp_path)):
        open_trained(tmp_path, TinySRNet())
    (tmp_path / "model" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is not that of a trained network"):
        open_trained(tmp_path, TinySRNet())


# devices


def test_processes_that_do_not_join_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("idloss.training.engine.Accelerator", _Lone)
    with pytest.raises(ValueError, match="2 processes were started and on cpu they do not join"):
        tiny_run(tmp_path)


class _Lone:
    num_processes = 1
    device = torch.device("cpu")

    def __init__(self, **_):
        pass


def test_a_device_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="cuda:1"):
        tiny_run(tmp_path, device="cuda:1")
