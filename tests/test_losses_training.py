"""Training with the loss: the paper's six golden steps, and every way people wrap a network."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nets import TinySRNet, faces, tiny_fnet
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from idloss import HallucinationLoss
from idloss.resample import resize, to_float
from idloss.srnets import EDSR
from idloss.srnets.edsr import edsr_released

STEPS = 4


def test_golden_training_steps(golden, released_edsr, sface_seeded):
    """Six Adam steps of the released training: losses before each, weights after the last."""
    srnet = EDSR(depth=2, width=16)
    srnet.load_state_dict(edsr_released(released_edsr("edsr_2_16")))
    criterion = HallucinationLoss(sface_seeded, weight=0.5, crop="sphereface")
    optimizer = torch.optim.Adam(srnet.parameters(), lr=1e-4)
    hr = torch.from_numpy(golden["aligned_bgr"]).permute(0, 3, 1, 2).flip(1).contiguous()
    losses = []
    for factor in golden["train_factors"].tolist():
        lr = resize(hr, (112 // factor, 96 // factor))
        total, parts = criterion(srnet(to_float(lr)), to_float(hr))
        losses.append((parts["image"].item(), parts["identity"].item()))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    image, identity = np.array(losses).T
    np.testing.assert_allclose(image, golden["train_loss_image"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(identity, golden["train_loss_id"], atol=1e-4, rtol=0)

    expected = edsr_released(released_edsr("train_final"))
    state = srnet.state_dict()
    assert state.keys() == expected.keys()
    difference = torch.cat([(state[key] - expected[key]).abs().flatten() for key in state])
    assert difference.mean() < 1e-6


class Trainer(nn.Module):
    """What Lightning and its like do: the loss is a child of the module that trains."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.srnet = TinySRNet()
        self.criterion = HallucinationLoss(tiny_fnet(), weight=0.5)

    def forward(self, lr, hr):
        return self.criterion(self.srnet(lr), hr)[0]


def batches(batch=4):
    return [
        (faces(batch, (14, 12), seed=step), faces(batch, (28, 24), seed=100 + step))
        for step in range(STEPS)
    ]


def train(step, parameters, autocast=False):
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    losses = []
    for lr, hr in batches():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = step(lr, hr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def plain():
    """Losses and final SR weights of bare training, the loss outside any parent."""
    owner = Trainer()
    srnet, criterion = owner.srnet.train(), owner.criterion
    losses = train(lambda lr, hr: criterion(srnet(lr), hr)[0], srnet.parameters())
    assert losses[-1] < losses[0]
    return losses, srnet.state_dict()


def assert_same(trained, plain, **tolerance):
    losses, state = trained
    np.testing.assert_allclose(losses, plain[0], **tolerance)
    for key, value in plain[1].items():
        torch.testing.assert_close(state[key], value, atol=1e-5, rtol=1e-4)


def reloaded(owner):
    file = io.BytesIO()
    torch.save(owner.state_dict(), file)
    file.seek(0)
    for parameter in owner.parameters():
        nn.init.zeros_(parameter)
    owner.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return owner


@pytest.mark.parametrize("how", ["under a parent", "reloaded", "deep-copied", "compiled"])
def test_training_takes_the_same_course(plain, how):
    handled = {"reloaded": reloaded, "deep-copied": copy.deepcopy}.get(how, lambda owner: owner)
    owner = handled(Trainer()).train()
    step = torch.compile(owner, fullgraph=True) if how == "compiled" else owner
    losses = train(step, owner.parameters())
    rtol = 1e-4 if how == "compiled" else 1e-6
    assert_same((losses, owner.srnet.state_dict()), plain, rtol=rtol)


def test_under_bfloat16_autocast(plain):
    """Eight bits of mantissa: the same course to 1 %, and the total stays float32."""
    owner = Trainer().train()
    losses = train(owner, owner.parameters(), autocast=True)
    np.testing.assert_allclose(losses, plain[0], rtol=1e-2)
    lr, hr = batches()[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert owner(lr, hr).dtype == torch.float32


def _worker(rank, folder):
    """One of two processes; each sees the whole batch, so that batch norm sees what one does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    trained = []
    for wrapped in ("srnet", "owner"):
        owner = Trainer().train()
        step = DistributedDataParallel(owner if wrapped == "owner" else owner.srnet)
        if wrapped == "srnet":
            step = lambda lr, hr, net=step, loss=owner.criterion: loss(net(lr), hr)[0]  # noqa: E731
        trained.append((train(step, owner.parameters()), owner.srnet.state_dict()))
    torch.save(trained, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ddp_over_two_processes(plain, tmp_path):
    """Around the SR network alone, and around what owns the loss as well."""
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        for trained in torch.load(tmp_path / f"{rank}.pt", weights_only=True):
            assert_same(trained, plain, rtol=1e-5)
