"""Backbones of timm with faces' weights: keys, EdgeFace's layers of low rank, and a real file."""

import pytest
import timm
import torch
from torch import nn

from idloss import create_fnet
from idloss.fnets.timm_faces import timm_face

BACKBONES = {
    "edgeface_xxs": ("edgenext_xx_small", None),
    "edgeface_xs": ("edgenext_x_small", 0.6),
    "edgeface_s": ("edgenext_small", 0.5),
    "edgeface_base": ("edgenext_base", None),
    "convnext_atto_112": ("convnext_atto", None),
    "convnext_nano_112": ("convnext_nano", None),
    "vit_tiny_patch8_112": ("vit_tiny_patch16_224", None),
    "vit_small_patch8_gap_112": ("vit_small_patch16_224", None),
}


def published(name):
    """The network that the file is loaded into where it was published: a model of timm's."""
    backbone, rank = BACKBONES[name]
    options = {"patch_size": 2} if name.startswith("convnext") else {}
    if name.startswith("vit"):  # config.json of gaunernst's repositories
        options = {"patch_size": 8, "img_size": 112}
    if "gap" in name:
        options |= {"class_token": False, "global_pool": "avg"}
    model = timm.create_model(backbone, num_classes=512, **options)
    for parent in [*model.modules()] if rank else []:  # otroshi/edgeface, backbones/timmfr.py
        for key, child in parent.named_children():
            if isinstance(child, nn.Linear) and "head" not in key:
                setattr(parent, key, LowRank(child, rank))
    return model


class LowRank(nn.Sequential):
    def __init__(self, linear, ratio):
        super().__init__()
        rank = max(2, int(min(linear.in_features, linear.out_features) * ratio))
        self.linear1 = nn.Linear(linear.in_features, rank, bias=False)
        self.linear2 = nn.Linear(rank, linear.out_features)


@pytest.mark.parametrize("name", BACKBONES)
def test_keys_of_the_released_file(name):
    with torch.device("meta"):
        released, model = published(name).state_dict(), create_fnet(name)
    adapted = timm_face(released)
    model.load_state_dict(adapted, assign=True)
    assert adapted["embedding.weight"].shape[0] == 512


def test_layers_of_low_rank_are_multiplied_out():
    theirs = published("edgeface_xs").eval()
    ours = create_fnet("edgeface_xs").eval()
    ours.load_state_dict(timm_face(theirs.state_dict()))
    x = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(x)
        assert (ours(x) - expected).norm() < 1e-5 * expected.norm()
    released = theirs.state_dict()
    del released["head.fc.linear2.weight"]
    with pytest.raises(KeyError, match=r"head\.fc\.linear2\.weight"):
        timm_face(released)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="no head"):
        timm_face({"stem.0.weight": torch.zeros(1)})


def test_a_real_edgeface(shared):
    """The copy in timm's layout gives, as a checkpoint of one's own, what timm makes of it."""
    folder = shared("weights/edgeface_xxs")
    x = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = create_fnet(f"local-dir:{folder}", pretrained=True).eval()(x)
        assert torch.equal(create_fnet("edgeface_xxs", checkpoint=folder).eval()(x), expected)
        backbone = create_fnet("timm/edgenext_xx_small", num_classes=512, checkpoint=folder)
        assert torch.equal(backbone.eval()(x), expected)
    with pytest.raises(RuntimeError, match=r"unexpected: head\.fc\.bias, head\.fc\.weight"):
        create_fnet("timm/edgenext_xx_small", checkpoint=folder)
