"""IDS among pyiqa's metrics, by pyiqa's habits: paths or tensors in, `lower_better` told.

    import pyiqa, pyiqa_identity

    ids = pyiqa.create_metric("ids", crop="ffhq")
    ids("restored.png", "reference.png"), ids.lower_better

With `as_loss=True, loss_weight=-1.0` it trains, too: a similarity is to grow.
"""

from typing import Any

from pyiqa.default_model_configs import DEFAULT_CONFIGS
from pyiqa.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from idloss import IdentitySimilarity


@ARCH_REGISTRY.register()
class IDS(nn.Module):
    """`IdentitySimilarity` of each picture, which keeps none and lets gradients through."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.distance = IdentitySimilarity(**options).distance

    def forward(self, target: Tensor, ref: Tensor) -> Tensor:
        """RGB `[B, 3, H, W]` in [0, 1], as pyiqa reads it; `[B]`."""
        similarity: Tensor = 1 - self.distance(target, ref)
        return similarity


DEFAULT_CONFIGS["ids"] = {
    "metric_opts": {"type": "IDS", "fnet": "mobilefacenet"},
    "metric_mode": "FR",
    "lower_better": False,
    "score_range": "-1, 1",
}
