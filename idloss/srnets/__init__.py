"""Super-resolution networks (SRNets), one file per family; importing this registers them."""

from idloss.srnets.edsr import EDSR
from idloss.srnets.foreign import Restorer, SpandrelNetwork
from idloss.srnets.interpolation import Interpolation

__all__ = ["EDSR", "Interpolation", "Restorer", "SpandrelNetwork"]
