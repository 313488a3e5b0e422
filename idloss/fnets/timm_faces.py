"""Backbones of timm trained on faces: EdgeFace, and gaunernst's ViTs and ConvNeXts.

George et al., "EdgeFace: Efficient Face Recognition Model for Edge Devices", IEEE T-BIOM 2024;
github.com/gau-nernst/timm-face.
"""

from __future__ import annotations

from typing import Any

import timm
from torch import Tensor, nn

from idloss.fnets.base import ARCFACE_CFG, FNet, register_variants
from idloss.weights import GitHubBlob, HubFile, ManualFile, Weights, register_weights
from idloss.weights.loading import StateDict


class TimmFace(FNet):
    """A backbone of timm whose pooled features a linear layer takes to the embedding."""

    nested = 1

    def __init__(
        self,
        backbone: str,
        num_classes: int = 0,
        in_chans: int = 3,
        img_size: tuple[int, int] = (112, 112),
        num_features: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(num_features, num_classes, in_chans, grid=None, img_size=img_size)
        if backbone.startswith("vit"):  # whose tokens are as many as the image has patches
            options["img_size"] = self.img_size
        options |= {"num_classes": 0, "in_chans": in_chans}
        trunk: Any = timm.create_model(backbone, **options)
        self.trunk: Any = trunk
        self.embedding = nn.Linear(trunk.num_features, num_features)
        self._build_classifier()

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised RGB `[B, 3, 112, 112]` to `[B, C, h, w]`, or a ViT's `[B, tokens, C]`."""
        features: Tensor = self.trunk.forward_features(x)
        return features

    def forward_embedding(self, x: Tensor) -> Tensor:
        """Map or tokens to embeddings `[B, 512]`."""
        embedding: Tensor = self.embedding(self.trunk.forward_head(x, pre_logits=True))
        return embedding


def timm_face(state_dict: StateDict) -> dict[str, Tensor]:
    """A backbone of timm with plain keys, the head of which is the embedding, to `TimmFace`.

    Where EdgeFace has two linear layers of low rank (`linear1`, `linear2`) in place of one, they
    are multiplied out.
    """
    merged = dict(state_dict)
    for key in state_dict:
        layer, found, _ = key.partition(".linear1.weight")
        if found:
            down, up = merged.pop(key), merged.pop(f"{layer}.linear2.weight")
            merged[f"{layer}.weight"] = (up.double() @ down.double()).to(up.dtype)
            merged[f"{layer}.bias"] = merged.pop(f"{layer}.linear2.bias")
    head = "head.fc." if "head.fc.weight" in merged else "head."
    if f"{head}weight" not in merged:
        raise ValueError("this is not a backbone of timm with a face's embedding: no head")
    return {
        f"embedding.{key.removeprefix(head)}" if key.startswith(head) else f"trunk.{key}": value
        for key, value in merged.items()
    }


def _edgeface(filename: str, git_sha1: str, lfw: float, training_data: str) -> Weights:
    return Weights(
        source=GitHubBlob(
            # a copy of the checkpoints that Idiap keeps at gitlab.idiap.ch, with git's own hashes
            repo="yayoimizuha/face_recognition_train",
            commit="3e631e35bf207a09aa2af79239961cfb14248c0a",
            parts=((f"checkpoints/{filename}.pt", git_sha1),),
        ),
        licence="cc-by-nc-sa-4.0",
        training_data=training_data,
        adapter=timm_face,
        trained_by="George et al. (Idiap Research Institute).",
        description=f"CosFace; its authors (otroshi/edgeface) report {lfw:.2f} % on LFW.",
        cfg={
            "paper_name": "EdgeFace: Efficient Face Recognition Model for Edge Devices",
            "paper_ids": "arXiv:2307.01838",
        },
        lfw=lfw,
    )


def _gaunernst(repo: str, lfw: float, pinned: tuple[str, str] | None = None) -> Weights:
    """Weights of one of gaunernst's repositories, `pinned` by revision and hash where seen."""
    url = f"https://huggingface.co/gaunernst/{repo}"
    how = "Download it from 'Files and versions' there."
    return Weights(
        source=HubFile(f"gaunernst/{repo}", "model.safetensors", *pinned)
        if pinned
        else ManualFile("model.safetensors", url, how),
        licence="none given: download from the origin, do not redistribute",
        training_data="MS1MV3 (MS1M-RetinaFace)",
        adapter=timm_face,
        description=f"CosFace; its author (gau-nernst/timm-face) reports {lfw:.2f} % on LFW.",
        lfw=lfw,
    )


_WEBFACE = "WebFace260M (a part of it)"

default_cfgs = register_weights(
    {
        "edgeface_xxs.idiap": _edgeface(
            "edgeface_xxs", "9cd55d480a4e60c3ccb8d0e33730b89c6932c6f0", 99.57, _WEBFACE
        ),
        "edgeface_xs.idiap": _edgeface(
            "edgeface_xs_gamma_06", "af5f8c5cf75e8b90d82d08f7a07ee10677327bfd", 99.73, "WebFace12M"
        ),
        "edgeface_s.idiap": _edgeface(
            "edgeface_s_gamma_05", "07346953c3045297a5a9bddfb6a173fd27c4398e", 99.78, "WebFace12M"
        ),
        "edgeface_base.idiap": _edgeface(
            "edgeface_base", "913d1d769d57a5251953afbe45b6dc59bf06f21a", 99.83, _WEBFACE
        ),
        "convnext_atto_112.cosface_ms1mv3": _gaunernst("convnext_atto.cosface_ms1mv3", 99.68),
        "convnext_nano_112.cosface_ms1mv3": _gaunernst(
            "convnext_nano.cosface_ms1mv3",
            99.67,
            (
                "15cc9c75b6709d8bd79260c7683d21e45611396d",
                "84b9c79a590ed445a7a0f8f0b1d31df1182ae0c8063fd96b71fff65c126906c8",
            ),
        ),
    },
    **{**ARCFACE_CFG, "first_conv": "trunk.stem.0"},
) | register_weights(
    {
        "vit_tiny_patch8_112.cosface_ms1mv3": _gaunernst(
            "vit_tiny_patch8_112.cosface_ms1mv3", 99.77
        ),
        "vit_small_patch8_gap_112.cosface_ms1mv3": _gaunernst(
            "vit_small_patch8_gap_112.cosface_ms1mv3", 99.78
        ),
    },
    **{**ARCFACE_CFG, "first_conv": "trunk.patch_embed.proj"},
)

register_variants(
    TimmFace,
    {
        "edgeface_xxs": {"backbone": "edgenext_xx_small"},
        "edgeface_xs": {"backbone": "edgenext_x_small"},
        "edgeface_s": {"backbone": "edgenext_small"},
        "edgeface_base": {"backbone": "edgenext_base"},
        "convnext_atto_112": {"backbone": "convnext_atto", "patch_size": 2},
        "convnext_nano_112": {"backbone": "convnext_nano", "patch_size": 2},
        "vit_tiny_patch8_112": {"backbone": "vit_tiny_patch16_224", "patch_size": 8},
        "vit_small_patch8_gap_112": {
            "backbone": "vit_small_patch16_224",
            "patch_size": 8,
            "class_token": False,
            "global_pool": "avg",
        },
    },
    crop="arcface",
    family=__name__,
)
