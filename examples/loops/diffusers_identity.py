"""The identity loss in a diffusion model's training step, as diffusers' scripts have it.

    identity = IdentityPreservedLoss(
        "mobilefacenet", crop="ffhq", value_range=(-1, 1), reduction="none"
    )

The faces are FFHQ crops of 512x512 in [-1, 1]: the loss cuts what its FNet takes out of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from idloss import IdentityPreservedLoss


def training_loss(
    unet: Any,
    vae: Any,
    scheduler: Any,
    identity: IdentityPreservedLoss,
    faces: Tensor,
    weight: float = 0.1,
) -> Tensor:
    """The usual loss on the noise, and identity on the faces that the prediction decodes to."""
    with torch.no_grad():
        latents = vae.encode(faces).latent_dist.sample() * vae.config.scaling_factor
    noise = torch.randn_like(latents)
    steps = torch.randint(len(scheduler.alphas_cumprod), (len(faces),), device=faces.device)
    predicted = unet(scheduler.add_noise(latents, noise, steps), steps).sample
    # the latents without the noise that was predicted
    signal = scheduler.alphas_cumprod.to(faces)[steps].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    denoised = (noisy - (1 - signal).sqrt() * predicted) / signal.sqrt()
    decoded = vae.decode(denoised / vae.config.scaling_factor).sample
    # where noise is most of the input, what comes out is nobody yet
    kept: Tensor = (signal.flatten() * identity(decoded, faces)).mean()
    return F.mse_loss(predicted, noise) + weight * kept
