"""What can go wrong between a name and its weights, one class for each remedy."""

from __future__ import annotations


class WeightsError(RuntimeError):
    """Weights could not be had, or are not what they should be; the parent of all errors here."""


class UnknownWeightsError(WeightsError):
    """No weights are registered under that name."""


class OfflineError(WeightsError):
    """A file is not in the cache, and there is no network (or `HF_HUB_OFFLINE` forbids it)."""


class ManualDownloadError(WeightsError):
    """The host hands the file to people only, and nobody has brought it yet."""


class AccessDeniedError(WeightsError):
    """The host answered 401 or 403: gated, private, or the token is wrong."""


class NotFoundError(WeightsError):
    """The host answered 404 or 410: repository, revision or file are gone."""


class RateLimitedError(WeightsError):
    """The host still answers 429 after the retries, or asks for a longer pause than we wait."""


class ServerError(WeightsError):
    """The host still fails (5xx, or an answer that makes no sense) after the retries."""


class TruncatedError(WeightsError):
    """The host announces more bytes than it sends, again and again."""


class HashMismatchError(WeightsError):
    """A file is not the one that was pinned."""


class ArchiveError(WeightsError):
    """A 7z archive is broken, or lacks the member that was to be in it."""


class UnsafePickleError(WeightsError):
    """A checkpoint wants to run code while it is read."""


class UnreadableFileError(WeightsError):
    """A file is no checkpoint that PyTorch or safetensors can read."""


class AdapterError(WeightsError):
    """A checkpoint does not have the layout that its adapter expects."""


class MissingKeysError(WeightsError):
    """A state dict does not have exactly the tensors that the model has."""
