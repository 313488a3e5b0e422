"""The identity loss in Lightning: a child like any other, which is not trained and not saved."""

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idloss import IdentityPreservedLoss


class FaceSR(lightning.LightningModule):
    """An SRNet and what it is trained with; batches are `(lr, hr)`, RGB in [0, 1]."""

    def __init__(
        self, srnet: nn.Module, identity: IdentityPreservedLoss, weight: float = 0.5
    ) -> None:
        super().__init__()
        self.srnet = srnet
        # .train() leaves it in eval mode; parameters() and state_dict() have nothing of it
        self.identity = identity
        self.weight = weight

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """One step."""
        lr, hr = batch
        sr = self.srnet(lr)
        image, identity = F.l1_loss(sr, hr), self.identity(sr, hr)
        self.log_dict({"image": image, "identity": identity})
        total: Tensor = image + self.weight * identity
        return total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """All parameters, which are the SRNet's."""
        return torch.optim.Adam(self.parameters(), 1e-4)
