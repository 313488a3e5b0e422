"""Verification while a run goes on, and a sheet of pictures."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from idloss.data import EvaluationSet
from idloss.evaluation import HR, evaluate, write_sheets
from idloss.registry import create_srnet
from idloss.resample import Size

FACES = 5
"""On a sheet."""


class Verification:
    """Verifies pairs with the network as it is, protocol `paper`.

    Args:
        data: The pairs.
        fnet: The FNet that judges.
        sizes: Probe sizes, rows and columns.
        folder: Where the sheets go, a folder for each validation.
        device: Where the networks run.
    """

    def __init__(
        self,
        data: EvaluationSet,
        fnet: nn.Module,
        sizes: tuple[Size, ...],
        folder: Path,
        device: str,
    ) -> None:
        self.data = data
        self.fnet = fnet
        self.sizes = sizes
        self.folder = folder
        self.device = device

    def __call__(self, network: nn.Module, step: int) -> dict[str, float]:
        """Verify, and draw the first faces.

        Args:
            network: The SRNet.
            step: Number of the step that was completed last.

        Returns:
            Share of right answers by probe size, `"7x6"` and the like.
        """
        rates = verification_rates(self.data, self.fnet, network, self.sizes, self.device)
        shown = {"bicubic": create_srnet("bicubic"), "srnet": network}
        fnets = {"fnet": self.fnet}
        folder = self.folder / f"step-{step:06d}"
        write_sheets(folder, self.data, fnets, shown, self.sizes, count=FACES, device=self.device)
        del rates["HR"]  # of the FNet alone, and always the same
        return rates


def verification_rates(
    data: EvaluationSet, fnet: nn.Module, srnet: nn.Module, sizes: tuple[Size, ...], device: str
) -> dict[str, float]:
    """Verify pairs, protocol `paper`, without a trace on disk.

    Args:
        data: The pairs.
        fnet: The FNet that judges.
        srnet: The SRNet that restores the probes.
        sizes: Probe sizes, rows and columns.
        device: Where the networks run.

    Returns:
        Share of right answers by probe size, `"7x6"` and the like; `"HR"` is without degradation.
    """
    results = evaluate(
        data, {"fnet": fnet}, {"srnet": srnet}, sizes, device=device, cache=False, progress=False
    )
    return {
        "HR" if record.cell.srnet == HR else record.cell.size: record.estimate.value
        for record in results.records
        if record.metric == "accuracy"
    }
