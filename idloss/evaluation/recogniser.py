"""From a crop to an embedding: degraded or not, restored, seen from both sides, recognised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from idloss.encoder import FaceEncoder, fold_batch_norm
from idloss.evaluation.protocols import Protocol, fuse_views, interpolate_probe, to_fnet_input
from idloss.geometry import convert_crop, get_template
from idloss.registry import create_fnet
from idloss.resample import to_float, to_uint8
from idloss.srnets import Interpolation

SR_CROP = "sphereface"
"""The crop that SR networks work on (paper, section 4.1): 112x96."""


class Recogniser:
    """An FNet made ready for many faces: on its device, frozen, batch norm folded.

    Args:
        fnet: As from `create_fnet`.
        protocol: How views are shown and fused.
        device: Where it is to run.
    """

    def __init__(self, fnet: nn.Module, protocol: Protocol, device: str) -> None:
        self.protocol = protocol
        net = create_fnet(fnet).to(device).eval().requires_grad_(False)
        quicker = fold_batch_norm(net, net.pretrained_cfg["input_size"])  # type: ignore[index, arg-type]
        if quicker is not net and torch.device(device).type == "cpu":
            quicker = quicker.to(memory_format=torch.channels_last)
        net = quicker
        # SR comes as the SR crop, HR as the FNet's own
        self.crop = str(net.crop or SR_CROP)
        self.of_sr, self.of_hr = (
            FaceEncoder(net, crop=crop, interpolation=protocol.up_mode).to(device)
            for crop in (SR_CROP, self.crop)
        )

    def full(self, crops: Tensor, template: str) -> Tensor:
        """Embed faces at full resolution.

        Args:
            crops: `[B, 3, H, W]`, uint8, in the geometry of a template.
            template: The template.

        Returns:
            Embeddings `[B, D]`, both views fused.
        """
        return self._fuse(self.of_hr(to_float(both_views(cut(crops, template, self.crop)))))

    def restored(self, shown: Tensor) -> Tensor:
        """Embed what came out of an SRNet.

        Args:
            shown: The SR crops and then those of the mirrored LR faces, `[2 B, 3, 112, 96]`.

        Returns:
            Embeddings `[B, D]`, both views fused.
        """
        return self._fuse(self.of_sr(shown))

    def _fuse(self, views: Tensor) -> Tensor:
        straight, mirrored = views.chunk(2)
        return fuse_views(straight, mirrored, self.protocol)


def super_resolve(srnet: nn.Module, probes: Tensor, protocol: Protocol) -> Tensor:
    """What the FNet is shown of LR probes.

    Args:
        srnet: SR network, or an `Interpolation`, which enlarges 8-bit images in one step.
        probes: LR probes `[B, 3, h, w]`, uint8.
        protocol: The protocol.

    Returns:
        RGB `[B, 3, 112, 96]` in [0, 1].
    """
    size = get_template(SR_CROP).size
    if isinstance(srnet, Interpolation):
        return interpolate_probe(probes, size, srnet.mode, protocol)
    return to_fnet_input(srnet(to_float(probes)), size, protocol)


def both_views(images: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` and then their mirror images, `[2 B, 3, H, W]`.

    The mirrored LR face is super-resolved on its own (as in the released code).
    """
    return torch.cat((images, images.flip(-1)))


def cut(canvas: Tensor, template: str, crop: str) -> Tensor:
    """One crop out of a wider one, 8-bit; no resampling between sphereface and arcface.

    Args:
        canvas: `[B, 3, H, W]`, uint8, in the geometry of `template`.
        template: Template of the canvas.
        crop: Template wanted.

    Returns:
        `[B, 3, H', W']`, uint8.
    """
    if template == crop:
        return canvas
    return to_uint8(convert_crop(to_float(canvas), template, crop))


@contextmanager
def evaluating(nets: Iterable[nn.Module], device: str) -> Iterator[None]:
    """Networks on their device in eval mode, without gradients and without TF32; then as before.

    TF32 keeps 10 bits: answers would depend on the device in the third digit.

    Args:
        nets: The networks; they stay on the device.
        device: Where they are to run.

    Yields:
        Nothing.
    """
    used = list(nets)
    modes = {module: module.training for net in used for module in net.modules()}
    # a tenth quicker for EDSR on a CPU; not so on a GPU without TF32
    on_cpu = torch.device(device).type == "cpu"
    for net in used:
        net.to(device).eval()
        net.to(memory_format=torch.channels_last if on_cpu else torch.preserve_format)
    try:
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        for net in used:
            net.to(memory_format=torch.contiguous_format)
        for module, mode in modes.items():
            module.training = mode
