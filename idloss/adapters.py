"""Published checkpoints to this package's state dicts: names, channel order, heads.

Every adapter is a pure function of a state dict. It lists the keys that a checkpoint of its kind
has; a key too many or too few is an error that names it, so that a wrong file is never half
loaded. BGR ends here: networks that took BGR get the input channels of their first convolution
reversed, and an SR network the output channels of its last one too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

StateDict = Mapping[str, Tensor]

_CONV = ("weight", "bias")
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

_PARALLEL = "module."  # what DataParallel puts before every key

_SPHEREFACE20 = (1, 2, 4, 1)  # residual units of the four stages
_VGG16 = (2, 2, 3, 3, 3)  # convolutions of the five blocks


def sface_released(state_dict: StateDict) -> dict[str, Tensor]:
    """`sface.pth` of johnnysclai/SR_LRFR, which takes BGR, to `SphereFace`.

    Args:
        state_dict: Keys `0.weight` ... `13.bias`: convolution, PReLU and residual units of each
            stage in turn, a flatten, and FC1.

    Returns:
        The state dict of `SphereFace`, taking RGB.

    Raises:
        ValueError: If keys are unknown or missing.
    """
    names: dict[str, str] = {}
    for stage, depth in enumerate(_SPHEREFACE20):
        ours = f"stages.{stage}"
        first = 3 * stage
        names |= _layer(f"{first}", f"{ours}.conv", _CONV)
        names |= _layer(f"{first + 1}", f"{ours}.act", ("weight",))
        for unit in range(depth):
            theirs = f"{first + 2}.{unit}.resblock"
            block = f"{ours}.blocks.{unit}"
            for index in (1, 2):
                convolution = 2 * (index - 1)
                names |= _layer(f"{theirs}.{convolution}", f"{block}.conv{index}", _CONV)
                names |= _layer(f"{theirs}.{convolution + 1}", f"{block}.act{index}", ("weight",))
    names |= _layer("13", "embedding", _CONV)
    adapted = _rename(state_dict, names, "SFace of johnnysclai/SR_LRFR")
    return _reverse_input(adapted, "stages.0.conv")


def sphereface_clcarwin(state_dict: StateDict) -> dict[str, Tensor]:
    """`sphere20a` of clcarwin/sphereface_pytorch and its kin, which take BGR, to `SphereFace`.

    Args:
        state_dict: Keys `conv1_1`, `relu1_1`, ... `fc5`, and the classifier `fc6`, which is left
            out.

    Returns:
        The state dict of `SphereFace`, taking RGB.

    Raises:
        ValueError: If keys are unknown or missing.
    """
    names: dict[str, str] = {}
    for stage, depth in enumerate(_SPHEREFACE20):
        layers = ["", *(f".blocks.{unit}" for unit in range(depth) for _ in (1, 2))]
        for index, place in enumerate(layers, start=1):
            # 1 opens the stage; then come the two layers of every unit, even and odd
            number = "" if index == 1 else str(1 + index % 2)
            ours = f"stages.{stage}{place}"
            names |= _layer(f"conv{stage + 1}_{index}", f"{ours}.conv{number}", _CONV)
            names |= _layer(f"relu{stage + 1}_{index}", f"{ours}.act{number}", ("weight",))
    names |= _layer("fc5", "embedding", _CONV)
    adapted = _rename(state_dict, names, "clcarwin's SphereFace-20", dropped=("fc6.",))
    return _reverse_input(adapted, "stages.0.conv")


def vgg_face_dag(state_dict: StateDict) -> dict[str, Tensor]:
    """`vgg_face_dag.pth` (pytorch-mcn), which takes RGB, to `VGGFace` with `layer="fc8"`.

    Args:
        state_dict: Keys `conv1_1.weight` ... `fc8.bias`.

    Returns:
        The state dict of `VGGFace` with all its layers.

    Raises:
        ValueError: If keys are unknown or missing.
    """
    return _rename(state_dict, _vgg_names("conv{}_{}"), "vgg_face_dag")


def vgg_face_prlz77(state_dict: StateDict) -> dict[str, Tensor]:
    """`VGG_16` of prlz77/vgg-face.pytorch, which takes BGR, to `VGGFace` with `layer="fc8"`.

    Args:
        state_dict: Keys `conv_1_1.weight` ... `fc8.bias`.

    Returns:
        The state dict of `VGGFace` with all its layers, taking RGB.

    Raises:
        ValueError: If keys are unknown or missing.
    """
    adapted = _rename(state_dict, _vgg_names("conv_{}_{}"), "prlz77's VGG-Face")
    return _reverse_input(adapted, "features.conv1_1")


def mobilefacenet_bubbliiiing(state_dict: StateDict) -> dict[str, Tensor]:
    """`arcface_mobilefacenet.pth` of bubbliiiing/arcface-pytorch to `MobileFaceNet`.

    Args:
        state_dict: Keys `arcface.conv1.conv.weight` ... `arcface.last_bn.bias`, and the classifier
            `head.weight`, which is left out.

    Returns:
        The state dict of `MobileFaceNet`.

    Raises:
        ValueError: If keys are unknown or missing.
    """
    names = _conv_norm_act("conv1", "stem") | _conv_norm_act("conv2_dw", "stem_depthwise")
    blocks = [
        "conv_23",
        *(f"conv_3.model.{index}" for index in range(4)),
        "conv_34",
        *(f"conv_4.model.{index}" for index in range(6)),
        "conv_45",
        *(f"conv_5.model.{index}" for index in range(2)),
    ]
    for index, block in enumerate(blocks):
        names |= _conv_norm_act(f"{block}.conv", f"blocks.{index}.expand")
        names |= _conv_norm_act(f"{block}.conv_dw", f"blocks.{index}.depthwise")
        names |= _layer(f"{block}.project.conv", f"blocks.{index}.project.conv", ("weight",))
        names |= _layer(f"{block}.project.bn", f"blocks.{index}.project.bn", _NORM)
    names |= _layer("sep", "expand.conv", ("weight",))
    names |= _layer("sep_bn", "expand.bn", _NORM)
    names |= _layer("prelu", "expand.act", ("weight",))
    names |= _layer("GDC_dw", "global_depthwise.conv", ("weight",))
    names |= _layer("GDC_bn", "global_depthwise.bn", _NORM)
    names |= _layer("features", "embedding", ("weight",))
    names |= _layer("last_bn", "embedding_norm", _NORM)
    names = {f"arcface.{theirs}": ours for theirs, ours in names.items()}
    adapted = _rename(state_dict, names, "bubbliiiing's MobileFaceNet", dropped=("head.",))
    return _linear_from_pointwise(adapted, "embedding")


def mobilefacenet_foamliu(state_dict: StateDict) -> dict[str, Tensor]:
    """`mobilefacenet.pt` of foamliu/MobileFaceNet to `MobileFaceNet` with ReLU6.

    Args:
        state_dict: Keys `conv1.0.weight` ... `bn.bias`.

    Returns:
        The state dict of `MobileFaceNet(act="relu6", separable_stem=True, embedding_bias=True)`.

    Raises:
        ValueError: If keys are unknown or missing.
    """
    pairs = [
        ("conv1.0", "conv1.1", "stem"),
        ("dw_conv.depthwise", "dw_conv.bn1", "stem_depthwise"),
        ("dw_conv.pointwise", "dw_conv.bn2", "stem_pointwise"),
        ("conv2.0", "conv2.1", "expand"),
        ("gdconv.depthwise", "gdconv.bn", "global_depthwise"),
    ]
    for index in range(15):
        theirs, ours = f"features.{index}.conv", f"blocks.{index}"
        pairs.append((f"{theirs}.0.0", f"{theirs}.0.1", f"{ours}.expand"))
        pairs.append((f"{theirs}.1.0", f"{theirs}.1.1", f"{ours}.depthwise"))
        pairs.append((f"{theirs}.2", f"{theirs}.3", f"{ours}.project"))
    names: dict[str, str] = {}
    for convolution, norm, ours in pairs:
        names |= _layer(convolution, f"{ours}.conv", ("weight",))
        names |= _layer(norm, f"{ours}.bn", _NORM)
    names |= _layer("conv3", "embedding", _CONV)
    names |= _layer("bn", "embedding_norm", _NORM)
    adapted = _rename(state_dict, names, "foamliu's MobileFaceNet")
    return _linear_from_pointwise(adapted, "embedding")


def edsr_released(state_dict: StateDict) -> dict[str, Tensor]:
    """An EDSR of johnnysclai/SR_LRFR, BGR in and out, to `EDSR`.

    Their [-1, 1] and our [0, 1] differ by what `EDSR` with `mean=0.5, std=0.5` does itself.

    Args:
        state_dict: Keys `conv1`, `res_blocks.i.residual.{0,2}`, `conv2`, `upsampler.i.conv`,
            `conv3`, of any depth and scale.

    Returns:
        The state dict of `EDSR`, RGB in and out.

    Raises:
        ValueError: If keys are unknown or missing.
    """
    names = _layer("conv1", "head", _CONV) | _layer("conv2", "body_end", _CONV)
    for block in range(_count(state_dict, r"res_blocks\.(\d+)\.")):
        names |= _layer(f"res_blocks.{block}.residual.0", f"body.{block}.conv1", _CONV)
        names |= _layer(f"res_blocks.{block}.residual.2", f"body.{block}.conv2", _CONV)
    for stage in range(_count(state_dict, r"upsampler\.(\d+)\.")):
        names |= _layer(f"upsampler.{stage}.conv", f"upsample.{stage}", _CONV)
    names |= _layer("conv3", "tail", _CONV)
    adapted = _rename(state_dict, names, "EDSR of johnnysclai/SR_LRFR")
    return _reverse_output(_reverse_input(adapted, "head"), "tail")


def edsr_official(state_dict: StateDict) -> dict[str, Tensor]:
    """An EDSR of sanghyun-son/EDSR-PyTorch (once thstkdgus35), scale 2, 4 or 8, to `EDSR`.

    Args:
        state_dict: Keys `head.0`, `body.i.body.{0,2}`, `body.N`, `tail.0.{0,2,..}`, `tail.1`, and
            the constants `sub_mean` and `add_mean`, which are arguments of ours and left out.

    Returns:
        The state dict of `EDSR`; build it with `mean=(0.4488, 0.4371, 0.4040)`, `std=1 / 255`,
        `tanh=False` and the `res_scale` of the checkpoint.

    Raises:
        ValueError: If keys are unknown or missing.
    """
    depth = _count(state_dict, r"body\.(\d+)\.body\.")
    names = _layer("head.0", "head", _CONV) | _layer(f"body.{depth}", "body_end", _CONV)
    for block in range(depth):
        names |= _layer(f"body.{block}.body.0", f"body.{block}.conv1", _CONV)
        names |= _layer(f"body.{block}.body.2", f"body.{block}.conv2", _CONV)
    # A pixel shuffle without weights sits between the convolutions of the up-sampler.
    for stage in range(_count(state_dict, r"tail\.0\.(\d+)\.")):
        names |= _layer(f"tail.0.{2 * stage}", f"upsample.{stage}", _CONV)
    names |= _layer("tail.1", "tail", _CONV)
    return _rename(state_dict, names, "EDSR of EDSR-PyTorch", dropped=("sub_mean.", "add_mean."))


def _layer(theirs: str, ours: str, entries: Iterable[str]) -> dict[str, str]:
    """Names of the entries of one layer, theirs to ours."""
    return {f"{theirs}.{entry}": f"{ours}.{entry}" for entry in entries}


def _conv_norm_act(theirs: str, ours: str) -> dict[str, str]:
    """Names of a convolution without bias, its batch norm and its PReLU."""
    return (
        _layer(f"{theirs}.conv", f"{ours}.conv", ("weight",))
        | _layer(f"{theirs}.bn", f"{ours}.bn", _NORM)
        | _layer(f"{theirs}.prelu", f"{ours}.act", ("weight",))
    )


def _vgg_names(pattern: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for block, depth in enumerate(_VGG16, start=1):
        for index in range(1, depth + 1):
            ours = f"features.conv{block}_{index}"
            names |= _layer(pattern.format(block, index), ours, _CONV)
    for layer in ("fc6", "fc7", "fc8"):
        names |= _layer(layer, f"embedding.{layer}", _CONV)
    return names


def _count(state_dict: StateDict, pattern: str) -> int:
    """How many different indices the pattern finds in the keys."""
    return len({match[1] for key in state_dict if (match := re.search(pattern, key))})


def _rename(
    state_dict: StateDict, names: Mapping[str, str], kind: str, *, dropped: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Rename every key, drop those that start with `dropped`, and refuse any other set of keys."""
    if state_dict and all(key.startswith(_PARALLEL) for key in state_dict):
        state_dict = {key.removeprefix(_PARALLEL): value for key, value in state_dict.items()}
    kept = {key for key in state_dict if not key.startswith(dropped)}
    unknown, missing = sorted(kept - names.keys()), sorted(names.keys() - kept)
    if unknown or missing:
        complaints = [
            f"{what}: {', '.join(keys[:5])}" + f" and {len(keys) - 5} more" * (len(keys) > 5)
            for what, keys in (("unknown keys", unknown), ("missing keys", missing))
            if keys
        ]
        raise ValueError(f"this is not a checkpoint of {kind}: {'; '.join(complaints)}")
    return {ours: state_dict[theirs] for theirs, ours in names.items()}


def _reverse_input(state_dict: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """Make a first convolution that takes BGR take RGB."""
    weight = f"{layer}.weight"
    return {**state_dict, weight: state_dict[weight].flip(1)}


def _reverse_output(state_dict: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """Make a last convolution that gives BGR give RGB."""
    flipped = {f"{layer}.{entry}": state_dict[f"{layer}.{entry}"].flip(0) for entry in _CONV}
    return {**state_dict, **flipped}


def _linear_from_pointwise(state_dict: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """A 1x1 convolution of a 1x1 map is a linear layer: `[D, C, 1, 1]` to `[D, C]`."""
    weight = f"{layer}.weight"
    return {**state_dict, weight: state_dict[weight].flatten(1)}
