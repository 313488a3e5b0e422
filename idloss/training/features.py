"""HR features of a whole set, computed once: of every crop and of its mirror image."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor

from idloss import __version__
from idloss.data import AlignedFaces, PackedFaces
from idloss.evaluation.cache import digest_network
from idloss.losses import IdentityPreservedLoss
from idloss.resample import to_float
from idloss.weights.files import written_whole

BATCH = 64


def stored_features(
    faces: AlignedFaces | PackedFaces,
    identity: IdentityPreservedLoss,
    *,
    device: torch.device,
    progress: bool = True,
) -> Tensor:
    """HR features, from beside prepared data where they were computed before.

    They are kept by a hash of the data, the FNets and how these are fed, so that other data or
    another FNet never meet features that are not theirs.

    Args:
        faces: The crops.
        identity: The loss that they are the targets of, on `device`.
        device: Where to compute.
        progress: Show a progress bar when it takes more than two seconds.

    Returns:
        float32 `[2, N, D]`, straight and mirrored, memory-mapped for prepared faces.
    """
    key = features_key(faces.content, identity) if isinstance(faces, PackedFaces) else None
    if not isinstance(faces, PackedFaces) or key is None:
        return torch.from_numpy(compute_features(faces, identity, device, progress=progress))
    path = faces.folder / f"features-{key}.npy"
    if not path.is_file():
        with written_whole(path) as temporary:
            found = compute_features(faces, identity, device, progress=progress, file=temporary)
            if isinstance(found, np.memmap):
                found.flush()
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def features_key(content: str, identity: IdentityPreservedLoss) -> str | None:
    """A name for features: what faces, what FNets, how fed.

    Args:
        content: Hash of the faces.
        identity: The loss.

    Returns:
        Sixteen hex digits; None where an FNet cannot be told from another.
    """
    parts: list[object] = [__version__, content, identity.value_range]
    for encoder in identity.encoders:
        fnet = digest_network(encoder.fnet)  # type: ignore[arg-type]
        if fnet is None:
            return None
        order = encoder.channel_order
        parts.append((fnet, encoder.crop, encoder.interpolation, encoder.flip, order))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@torch.inference_mode()
def compute_features(
    faces: AlignedFaces | PackedFaces,
    identity: IdentityPreservedLoss,
    device: torch.device,
    *,
    progress: bool = True,
    file: Path | None = None,
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Embed every crop and its mirror image.

    Args:
        faces: The crops.
        identity: The loss that they are the targets of, on `device`.
        device: Where to compute.
        progress: Show a progress bar when it takes more than two seconds.
        file: Where to put them, as an `.npy`; None for memory.

    Returns:
        float32 `[2, N, D]`, straight and mirrored.
    """
    shape = (2, len(faces), identity.num_features)
    features: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    if file is None:
        features = np.empty(shape, np.float32)
    else:
        features = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    bar = tqdm(total=len(faces), desc="HR features", unit="face", delay=2, disable=not progress)
    with bar:
        for places in torch.arange(len(faces)).split(BATCH):
            hr = to_float(faces.crops_at(places).to(device))
            both = identity.embed(torch.cat((hr, hr.flip(-1))))
            rows = slice(int(places[0]), int(places[-1]) + 1)
            features[:, rows] = both.float().cpu().numpy().reshape(2, len(places), -1)
            bar.update(len(places))
    return features
