"""Face recognisers (FNets), one file per family; importing this registers them."""

from idloss.fnets.base import FNet
from idloss.fnets.mobilefacenet import MobileFaceNet
from idloss.fnets.sphereface import SphereFace
from idloss.fnets.vggface import VGGFace

__all__ = ["FNet", "MobileFaceNet", "SphereFace", "VGGFace"]
