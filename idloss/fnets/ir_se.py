"""IR and IR-SE: the IResNets of pSp and e4e (IR-SE50), AdaFace and CVLface (IR-18, 50 and 101).

They descend from TreB1eN/InsightFace_Pytorch; Kim et al., "AdaFace: Quality Adaptive Margin for
Face Recognition", CVPR 2022.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from idloss.fnets.base import ARCFACE_CFG, register_variants, released_names
from idloss.fnets.iresnet import DEPTHS, IResNet
from idloss.weights import HubFile, ManualFile, Weights, register_weights
from idloss.weights.loading import StateDict, count_indices, rename_keys, with_counters

IR: dict[str, Any] = {"drop_rate": 0.4, "subsample": True, "affine": False}
"""What sets AdaFace's networks apart from InsightFace's (mk-minchul/AdaFace, net.py)."""

IR_SE: dict[str, Any] = {"drop_rate": 0.6, "subsample": True, "inner_norm": False, "squeeze": True}
"""And IR-SE50's (eladrich/pixel2style2pixel, models/encoders and criteria/id_loss.py)."""

_TOP = {"stem.conv": "input_layer.0", "stem.norm": "input_layer.1", "stem.act": "input_layer.2"}
_TOP |= {
    "norm": "output_layer.0",
    "embedding": "output_layer.3",
    "embedding_norm": "output_layer.4",
}
_SHORTCUT = {"shortcut.0": "shortcut_layer.0", "shortcut.1": "shortcut_layer.1"}
_IR_BLOCK = ("norm1", "conv1", "norm2", "act", "conv2", "norm3")
_IR_SE_BLOCK = ("norm1", "conv1", "act", "conv2", "norm3", "se")


def ir_released(state_dict: StateDict) -> dict[str, Tensor]:
    """IR-18, 34, 50 or 101 of AdaFace (`model.`, BGR) or CVLface (`net.`, RGB) to `IResNet`.

    AdaFace's files hold a margin's head beside the network, which is left out.
    """
    bare = {
        key.removeprefix("model.").removeprefix("net."): value for key, value in state_dict.items()
    }
    return _adapted(bare, "AdaFace's IR", _IR_BLOCK, IR)


def ir_se_released(state_dict: StateDict) -> dict[str, Tensor]:
    """`model_ir_se50.pth` of TreB1eN/InsightFace_Pytorch, pSp and e4e to `IResNet`."""
    return _adapted(state_dict, "IR-SE50", _IR_SE_BLOCK, IR_SE)


def _adapted(
    state_dict: StateDict, kind: str, layers: tuple[str, ...], options: dict[str, Any]
) -> dict[str, Tensor]:
    """Rename the keys of a network whose blocks are numbered through, and their layers too."""
    count = count_indices(state_dict, r"^body\.(\d+)\.")
    by_blocks = {sum(depths): depths for depths in DEPTHS.values()}
    inner = _SHORTCUT | {layer: f"res_layer.{index}" for index, layer in enumerate(layers)}

    def theirs(layer: str) -> str:
        if not layer.startswith("blocks."):
            return _TOP[layer]
        _, index, name = layer.split(".", 2)
        head, _, rest = name.partition(".") if name.startswith("se.") else (name, "", "")
        return f"body.{index}.{inner[head]}" + (f".{rest}" if rest else "")

    depths = by_blocks.get(count, DEPTHS[50])
    names = released_names(lambda: IResNet(depths=depths, **options), theirs)
    return rename_keys(with_counters(state_dict), names, kind, dropped=("head.",))


def _adaface(repo: str, name: str, training_data: str, lfw: float) -> Weights:
    """A checkpoint of AdaFace's authors whose address is known and whose hash is not."""
    original = repo == "AdaFace"
    if original:
        source = ManualFile(
            filename=f"adaface_{name}.ckpt",
            url="https://github.com/mk-minchul/AdaFace#pretrained-models",
            how="Download it from the drive linked there. Where it is refused for the classes of "
            "Lightning in it, torch.save its 'state_dict' alone.",
        )
    else:
        source = ManualFile(
            filename="model.safetensors",
            url=f"https://huggingface.co/minchul/cvlface_adaface_{name}",
            how="Download it from 'Files and versions' there.",
        )
    return Weights(
        source=source,
        licence="mit",
        training_data=training_data,
        adapter=ir_released,
        description=f"AdaFace; its authors (mk-minchul/{repo}) report {lfw:.2f} % on LFW.",
        channel_order="bgr" if original else "rgb",
        lfw=lfw,
    )


default_cfgs = register_weights(
    {
        "ir_se50.arcface_ms1mv2": Weights(
            source=HubFile(
                repo="lithiumice/ArcFace_PyTorch",
                filename="InsightFace_Pytorch+model_ir_se50.pth",
                revision="086811ee76897fdfd94335ea4ff40ae074136022",
                sha256="a035c768259b98ab1ce0e646312f48b9e1e218197a0f80ac6765e88f8b6ddf28",
            ),
            licence="not stated for the weights; code MIT",
            training_data="MS1MV2 (faces_emore)",
            adapter=ir_se_released,
            description="ArcFace; the identity loss of pSp and e4e; its authors "
            "(TreB1eN/InsightFace_Pytorch) report 99.52 % on LFW.",
            cfg={
                "paper_name": "ArcFace: Additive Angular Margin Loss for Deep Face Recognition",
                "paper_ids": "arXiv:1801.07698",
            },
            lfw=99.52,
            size=175_367_323,
        ),
        "ir18.cvlface_adaface_webface4m": _adaface("CVLface", "ir18_webface4m", "WebFace4M", 99.58),
        "ir18.adaface_webface4m": _adaface("AdaFace", "ir18_webface4m", "WebFace4M", 99.53),
        "ir50.cvlface_adaface_ms1mv2": _adaface("CVLface", "ir50_ms1mv2", "MS1MV2", 99.85),
        "ir50.adaface_ms1mv2": _adaface("AdaFace", "ir50_ms1mv2", "MS1MV2", 99.82),
        "ir101.cvlface_adaface_webface12m": _adaface(
            "CVLface", "ir101_webface12m", "WebFace12M", 99.82
        ),
        "ir101.adaface_webface12m": _adaface("AdaFace", "ir101_webface12m", "WebFace12M", 99.82),
    },
    **ARCFACE_CFG,
    paper_name="AdaFace: Quality Adaptive Margin for Face Recognition",
    paper_ids="arXiv:2204.00964",
)


register_variants(
    IResNet,
    {
        "ir_se50": IR_SE,
        "ir18": {**IR, "depths": DEPTHS[18]},
        "ir50": {**IR, "depths": DEPTHS[50]},
        "ir101": {**IR, "depths": DEPTHS[100]},
    },
    crop="arcface",
    family=__name__,
)
