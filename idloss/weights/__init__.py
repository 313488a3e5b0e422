"""Where weights come from: pinned, verified, converted once to safetensors, loaded strictly.

`fetch(name)` goes from a name to a file, `build_model` from a name to a model. The rest
is for those who add weights: describe them with `Weights` and one of the sources, and
`register_weights` them.
"""

from idloss.weights.build import build_model
from idloss.weights.cache import add, convert, describe, fetch
from idloss.weights.catalogue import (
    Adapter,
    Weights,
    get_weights,
    load_before_lookup,
    register_weights,
)
from idloss.weights.errors import (
    AccessDeniedError,
    AdapterError,
    ArchiveError,
    HashMismatchError,
    ManualDownloadError,
    MissingKeysError,
    NotFoundError,
    OfflineError,
    RateLimitedError,
    ServerError,
    TruncatedError,
    UnknownWeightsError,
    UnreadableFileError,
    UnsafePickleError,
    WeightsError,
)
from idloss.weights.sources import (
    GitHubBlob,
    HubFile,
    LocalFile,
    ManualFile,
    Source,
    UrlFile,
    ZooFile,
)

__all__ = [
    "AccessDeniedError",
    "Adapter",
    "AdapterError",
    "ArchiveError",
    "GitHubBlob",
    "HashMismatchError",
    "HubFile",
    "LocalFile",
    "ManualDownloadError",
    "ManualFile",
    "MissingKeysError",
    "NotFoundError",
    "OfflineError",
    "RateLimitedError",
    "ServerError",
    "Source",
    "TruncatedError",
    "UnknownWeightsError",
    "UnreadableFileError",
    "UnsafePickleError",
    "UrlFile",
    "Weights",
    "WeightsError",
    "ZooFile",
    "add",
    "build_model",
    "convert",
    "describe",
    "fetch",
    "get_weights",
    "load_before_lookup",
    "register_weights",
]
