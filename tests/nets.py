"""Small networks for tests: an FNet with everything a frozen network must keep still."""

import collections

import pytest
import torch
from torch import nn


class TinyFNet(nn.Module):
    """Batch norm, dropout and a strided convolution, in a few thousand weights."""

    num_features = 16
    crop = "sphereface"

    def __init__(self, size=(28, 24), num_features=16):
        super().__init__()
        self.num_features = num_features
        self.pretrained_cfg = {
            "architecture": "tiny",
            "input_size": (3, *size),
            "mean": (0.4, 0.5, 0.6),
            "std": (0.5, 0.25, 0.3),
        }
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8 * 4, num_features)
        self.calls = collections.deque()  # no plain attribute, which would tell networks apart

    def forward(self, x):
        if not torch.compiler.is_compiling():
            self.calls.append(len(x))
        x = torch.relu(self.norm(self.conv(x)))
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.head(self.drop(x))


class TinySRNet(nn.Module):
    """Upscales by two, with batch norm, so that training mode shows."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12))
        self.up = nn.PixelShuffle(2)

    def forward(self, x):
        return torch.sigmoid(self.up(self.body(x)))


def faces(batch=4, size=(28, 24), seed=0):
    """Random images in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, *size, generator=generator)


def tiny_fnet(seed=0, **options):
    """A TinyFNet with seeded weights and batch-norm statistics that are not the initial ones."""
    torch.manual_seed(seed)
    net = TinyFNet(**options)
    with torch.no_grad():
        net.norm.running_mean.uniform_(-0.5, 0.5)
        net.norm.running_var.uniform_(0.5, 2)
    return net


def opened(path):
    """What an exported file computes, as a function; skips where onnxruntime is not installed."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
