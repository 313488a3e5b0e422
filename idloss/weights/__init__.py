"""Where weights come from: pinned, verified, converted once to safetensors, loaded strictly.

`fetch(name)` goes from a name to a file, `build_model` from a name to a model. The rest
is for those who add weights: describe them with `Weights` and one of the sources, and
`register_weights` them.
"""

from idloss.weights.files import (
    NotAllowedError,
    NotAsPromisedError,
    NotFoundError,
    UnreachableError,
    WeightsError,
)
from idloss.weights.loading import (
    Weights,
    add,
    build_model,
    describe,
    fetch,
    register_weights,
)
from idloss.weights.sources import GitHubBlob, HubFile, ManualFile, WebFile

__all__ = [
    "GitHubBlob",
    "HubFile",
    "ManualFile",
    "NotAllowedError",
    "NotAsPromisedError",
    "NotFoundError",
    "UnreachableError",
    "WebFile",
    "Weights",
    "WeightsError",
    "add",
    "build_model",
    "describe",
    "fetch",
    "register_weights",
]
