"""idloss: face super-resolution that keeps the person."""

__version__ = "0.1.0"  # first: those imported below have it too

from idloss import fnets, srnets  # registers their models with timm
from idloss.create import create_fnet, create_srnet
from idloss.detection import create_detector
from idloss.encoder import FaceEncoder
from idloss.geometry import Template, register_template
from idloss.losses import (
    HallucinationLoss,
    IdentityPreservedLoss,
    register_distance,
    register_image_loss,
)
from idloss.metrics import IdentitySimilarity, identity_similarity
from idloss.pipeline import FacePipeline
from idloss.registry import list_fnets, list_srnets, register_fnet, register_srnet

__all__ = [
    "FaceEncoder",
    "FacePipeline",
    "HallucinationLoss",
    "IdentityPreservedLoss",
    "IdentitySimilarity",
    "Template",
    "create_detector",
    "create_fnet",
    "create_srnet",
    "fnets",
    "identity_similarity",
    "list_fnets",
    "list_srnets",
    "register_distance",
    "register_fnet",
    "register_image_loss",
    "register_srnet",
    "register_template",
    "srnets",
]
