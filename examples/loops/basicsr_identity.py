"""The identity loss in BasicSR: `python basicsr_identity.py -opt OPTIONS.yml`.

In the options stands:

    train:
      pixel_opt: {type: L1Loss, loss_weight: 1.0}
      perceptual_opt: {type: IdentityLoss, loss_weight: 0.5, fnet: mobilefacenet, crop: ffhq}

BasicSR 1.4.2 imports torchvision.transforms.functional_tensor, which torchvision 0.17 removed. What
it wants of it is in torchvision.transforms.functional, put in its place here before BasicSR is
imported. From Python 3.12 on it needs setuptools too, for distutils.
"""

import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.transforms import functional

from idloss import IdentityPreservedLoss

sys.modules.setdefault("torchvision.transforms.functional_tensor", functional)
from basicsr.utils.registry import LOSS_REGISTRY  # noqa: E402


@LOSS_REGISTRY.register()
class IdentityLoss(nn.Module):
    """What BasicSR calls a perceptual loss: it gives two terms, of which the second may be None."""

    def __init__(
        self, loss_weight: float = 1.0, fnet: str = "mobilefacenet", **options: Any
    ) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.identity = IdentityPreservedLoss(fnet, **options)

    def forward(self, sr: Tensor, hr: Tensor) -> tuple[Tensor, None]:
        """RGB `[B, 3, H, W]` in [0, 1], as BasicSR's data sets give it."""
        return self.loss_weight * self.identity(sr, hr), None


if __name__ == "__main__":
    from basicsr.train import train_pipeline

    train_pipeline(Path(__file__).parent)
