"""PReLU for networks that are frozen more often than trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PReLU(nn.PReLU):
    """`torch.nn.PReLU`, quicker to go back through where its slopes are frozen.

    torch's own backward pass works out the gradient of the slopes whether anybody wants it or not:
    on a CPU that was a third of an identity loss. Values and gradients are the same to the last
    bit.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scale what is negative.

        Args:
            x: `[B, C, ...]`.

        Returns:
            The same shape.
        """
        if self.weight.requires_grad or not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        scaled: Tensor = _Frozen.apply(x, self.weight)
        return scaled


class _Frozen(torch.autograd.Function):
    """PReLU with a gradient for its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.prelu(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, weight = ctx.saved_tensors
        slopes = weight.to(grad.dtype).view(-1, *[1] * (x.ndim - 2))
        positive = torch.ops.aten.threshold_backward(grad, x, 0)  # the gradient where x is
        return torch.addcmul(positive, grad - positive, slopes), None
