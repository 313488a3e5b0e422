"""A tiny model with released weights, registered with timm, for the tests of idloss.weights."""

import hashlib
import io

import safetensors.torch
import torch
from timm.models import PretrainedCfg, register_model
from torch import nn

from idloss import weights

COMMIT = "c0ffee" * 6 + "c0ff"
REPO = "somebody/something"
HUB_REPO = "someone/some-model"
NAME = "idloss_tiny.a"


def state_dict(prefix=""):
    """The tiny model's tensors, always the same ones."""
    generator = torch.Generator().manual_seed(7)
    shapes = {"conv.weight": (128, 3, 16, 16), "conv.bias": (128,)}
    shapes |= {"fc.weight": (5, 128), "fc.bias": (5,)}
    return {f"{prefix}{key}": torch.randn(*shapes[key], generator=generator) for key in shapes}


def saved(value, **options):
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def git_sha1(body):
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def sha256(body):
    return hashlib.sha256(body).hexdigest()


def blob(filename, body, **kwargs):
    """A file of REPO at COMMIT, pinned."""
    return weights.GitHubBlob(REPO, COMMIT, ((filename, git_sha1(body)),), **kwargs)


def strip_prefix(state_dict):
    """Adapter: the released layout has `net.` before every key."""
    if not all(key.startswith("net.") for key in state_dict):
        raise ValueError(f"unknown keys: {sorted(state_dict)}")
    return {key.removeprefix("net."): value for key, value in state_dict.items()}


RELEASED = saved(state_dict("net."))  # about 400 kB
TINY = weights.Weights(
    blob("models/tiny.pth", RELEASED),
    licence="mit",
    training_data="nothing at all",
    adapter=strip_prefix,
)
TINY_PATH = f"/{REPO}/{COMMIT}/models/tiny.pth"

default_cfgs = weights.register_weights({NAME: TINY}, num_classes=5, classifier="fc")
default_cfgs["idloss_tiny"].tags.append("untrained")
default_cfgs["idloss_tiny"].cfgs["untrained"] = PretrainedCfg(num_classes=5, classifier="fc")


class Tiny(nn.Module):
    def __init__(self, num_classes=5, in_chans=3, global_pool="avg"):
        super().__init__()
        self.num_classes = num_classes
        self.num_features = 128
        self.conv = nn.Conv2d(in_chans, 128, 16)
        self.fc = nn.Linear(128, num_classes)


@register_model
def idloss_tiny(pretrained=False, **kwargs):
    return weights.build_model(Tiny, "idloss_tiny", pretrained, **kwargs)


def assert_tiny(path):
    loaded = safetensors.torch.load_file(path)
    expected = state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def files_under(folder):
    """Everything but locks."""
    if not folder.exists():
        return []
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and ".locks" not in path.parts
    )
