"""The loss in other people's training loops; those that are not installed are skipped, by name."""

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from nets import TinySRNet, faces, tiny_fnet
from torch import nn
from torch.utils.data import DataLoader

from idloss import IdentityPreservedLoss
from idloss.metrics import identity_similarity


@pytest.fixture
def loop(example, monkeypatch):
    """`loop("lightning")` is that example; skips where the framework is not installed."""
    monkeypatch.setitem(sys.modules, "torchvision.transforms.functional_tensor", None)
    monkeypatch.delitem(sys.modules, "torchvision.transforms.functional_tensor")

    def load(name):
        if name != "diffusers" and not find_spec(name):
            pytest.skip(f"{name} is not installed here")
        return example(f"loops/{name}_identity")

    return load


def test_basicsr_trains_with_it_by_its_name(loop, monkeypatch, tmp_path):
    """A step of BasicSR's own model, from options as a file has them."""
    example = loop("basicsr")
    from basicsr.models import build_model

    monkeypatch.setattr(
        example,
        "IdentityPreservedLoss",
        lambda name, **options: IdentityPreservedLoss(tiny_fnet(), **options),
    )
    options = {
        "is_train": True,
        "num_gpu": 0,
        "dist": False,
        "model_type": "SRModel",
        "scale": 4,
        "network_g": {"type": "MSRResNet", "num_feat": 4, "num_block": 1, "upscale": 4},
        "path": {},
        "train": {
            "optim_g": {"type": "Adam", "lr": 1e-3},
            "scheduler": {"type": "MultiStepLR", "milestones": [9], "gamma": 0.5},
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0},
            "perceptual_opt": {"type": "IdentityLoss", "loss_weight": 0.5, "crop": "sphereface"},
        },
    }
    model = build_model(options)
    before = [parameter.clone() for parameter in model.net_g.parameters()]
    model.feed_data({"lq": faces(2, (7, 6)), "gt": faces(2, (28, 24), seed=1)})
    model.optimize_parameters(1)
    log = model.get_current_log()
    assert log["l_pix"] > 0
    assert 0 < log["l_percep"] < 1
    assert any(not torch.equal(a, b) for a, b in zip(before, model.net_g.parameters(), strict=True))
    assert not model.cri_perceptual.state_dict()


def test_lightning_trains_saves_and_moves_the_srnet_alone(loop, tmp_path):
    example = loop("lightning")
    import lightning

    identity = IdentityPreservedLoss(tiny_fnet(), crop="sphereface")
    module = example.FaceSR(TinySRNet(), identity)
    batches = [(faces(4, (14, 12), seed=step), faces(4, seed=step + 9)) for step in range(3)]
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert trainer.global_step == 3
    assert 0 < trainer.callback_metrics["identity"] < 2
    (saved,) = tmp_path.rglob("*.ckpt")
    state = torch.load(saved, weights_only=False)["state_dict"]
    assert state
    assert all(key.startswith("srnet.") for key in state)
    assert not any(module.training for module in identity.encoders[0].fnet.modules())


@pytest.fixture(params=["stand-in", "pyiqa"])
def create_metric(request, monkeypatch):
    """pyiqa's own, or one that builds from the same two tables and calls as it does."""
    if request.param == "pyiqa":
        return pytest.importorskip("pyiqa").create_metric
    configs, known = {}, {}

    def register():
        return lambda arch: known.setdefault(arch.__name__, arch)

    parts = {"": {}, ".utils": {}, ".default_model_configs": {"DEFAULT_CONFIGS": configs}}
    parts[".utils.registry"] = {"ARCH_REGISTRY": SimpleNamespace(register=register)}
    for name, held in parts.items():
        monkeypatch.setitem(sys.modules, f"pyiqa{name}", SimpleNamespace(**held))

    class Metric(nn.Module):
        def __init__(self, name, as_loss=False, device=None, **options):
            super().__init__()
            options = {**configs[name]["metric_opts"], **options}
            self.net = known[options.pop("type")](**options).to(device).eval()
            self.lower_better, self.as_loss = configs[name]["lower_better"], as_loss

        def forward(self, target, ref):
            with torch.set_grad_enabled(self.as_loss):
                values = self.net(target, ref)
            return values.mean() if self.as_loss else values

    return Metric


def test_pyiqa_makes_the_metric_by_its_name(create_metric, example):
    example("loops/pyiqa_identity")
    fnet, sr, hr = tiny_fnet(), faces(2).requires_grad_(), faces(2, seed=1)
    options = {"fnet": fnet, "crop": "sphereface", "device": "cpu"}
    ids = create_metric("ids", **options)
    expected = identity_similarity(sr.detach(), hr, fnet=fnet, crop="sphereface")
    torch.testing.assert_close(ids(sr, hr), expected)
    assert not ids.lower_better
    assert not ids(sr, hr).requires_grad
    create_metric("ids", as_loss=True, **options)(sr, hr).backward()
    assert sr.grad.abs().sum() > 0


class StandIn(nn.Module):
    """A VAE of eight pixels to a latent, or a network of noise, with diffusers' habits."""

    config = SimpleNamespace(scaling_factor=0.5)

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 4, 8, stride=8)
        self.up = nn.ConvTranspose2d(4, 3, 8, stride=8)
        self.noise = nn.Conv2d(4, 4, 3, padding=1)

    def encode(self, x):
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: self.down(x)))

    def decode(self, latents):
        return SimpleNamespace(sample=self.up(latents).tanh())

    def forward(self, noisy, steps):
        return SimpleNamespace(sample=self.noise(noisy))


class StandInScheduler:
    alphas_cumprod = torch.linspace(0.99, 0.5, 20)

    def add_noise(self, latents, noise, steps):
        signal = self.alphas_cumprod[steps].view(-1, 1, 1, 1)
        return signal.sqrt() * latents + (1 - signal).sqrt() * noise


def stand_ins():
    return StandIn(), StandIn(), StandInScheduler()


def diffusers_own():
    diffusers = pytest.importorskip("diffusers")
    blocks = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **blocks,
    )
    unet = diffusers.UNet2DModel(
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
        **blocks,
    )
    return unet, vae, diffusers.DDPMScheduler()


@pytest.mark.parametrize("networks", [stand_ins, diffusers_own])
def test_gradients_reach_a_diffusion_model_through_decoded_faces(loop, networks):
    """At 512x512: what is decoded is cut to the FNet's 28x24 from the ffhq crop."""
    torch.manual_seed(0)
    unet, vae, scheduler = networks()
    vae.requires_grad_(False)
    identity = IdentityPreservedLoss(
        tiny_fnet(), crop="ffhq", value_range=(-1, 1), reduction="none"
    )
    pictures = faces(1, (512, 512)) * 2 - 1
    gradients = []
    for weight in (0.0, 1.0):
        torch.manual_seed(1)
        unet.zero_grad()
        loss = loop("diffusers").training_loss(unet, vae, scheduler, identity, pictures, weight)
        loss.backward()
        gradients.append([p.grad.clone() for p in unet.parameters() if p.grad is not None])
    assert gradients[1]
    assert any(not torch.allclose(a, b) for a, b in zip(*gradients, strict=True))
