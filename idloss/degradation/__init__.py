"""From HR to LR: what is drawn for a batch, and what is done to its faces."""

from idloss.degradation.base import Degradation
from idloss.degradation.bicubic import BicubicDegradation
from idloss.degradation.draws import BatchDraw, draw_batch, mirror, sizes_of
from idloss.degradation.names import DEGRADATIONS, get_degradation
from idloss.degradation.real_world import RealWorldDegradation

__all__ = [
    "DEGRADATIONS",
    "BatchDraw",
    "BicubicDegradation",
    "Degradation",
    "RealWorldDegradation",
    "draw_batch",
    "get_degradation",
    "mirror",
    "sizes_of",
]
