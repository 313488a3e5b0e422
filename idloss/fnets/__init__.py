"""Face recognisers (FNets), one file per family; importing this registers them."""

import idloss.fnets.arcface_resnet
import idloss.fnets.inception_resnet
import idloss.fnets.ir_se
import idloss.fnets.timm_faces  # noqa: F401
from idloss.fnets.base import FNet
from idloss.fnets.iresnet import IResNet
from idloss.fnets.mobilefacenet import MobileFaceNet
from idloss.fnets.sphereface import SphereFace
from idloss.fnets.vggface import VGGFace

__all__ = ["FNet", "IResNet", "MobileFaceNet", "SphereFace", "VGGFace"]
