"""Files from the Hugging Face Hub, through its own client, with our errors."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from idloss.weights import http
from idloss.weights.errors import (
    AccessDeniedError,
    NotFoundError,
    OfflineError,
    RateLimitedError,
    ServerError,
    TruncatedError,
    WeightsError,
)
from idloss.weights.store import Store, offline

# The root of the errors of the client's HTTP library: requests, httpx or httpx2, by its version.
_LIBRARY = HfHubHTTPError.__mro__[1].__module__.partition(".")[0]
_HTTP_ERROR: type[Exception] = [
    kind for kind in HfHubHTTPError.__mro__ if kind.__module__.partition(".")[0] == _LIBRARY
][-1]
# How httpx, requests and the client itself word a body that ends too soon; no class tells it.
_SHORT = re.compile("complete message body|IncompleteRead|Consistency check failed")


def hub_download(
    repo: str, filename: str, revision: str, store: Store, name: str, *, force: bool
) -> Path:
    """Path of a Hub file in the Hub's own cache, downloaded if it is not there.

    Args:
        repo: `owner/name`.
        filename: Path inside the repository.
        revision: Commit hash.
        store: The cache, which says where the Hub's own one is.
        name: Whose weights they are, for the errors.
        force: Download it even if it is there.

    Returns:
        The file, not yet verified.

    Raises:
        WeightsError: One of its children, by what went wrong.
    """
    what = f"{name}: {filename} of https://huggingface.co/{repo} at revision {revision}"

    def attempt() -> Path:
        try:
            return Path(
                hf_hub_download(
                    repo,
                    filename,
                    revision=revision,
                    cache_dir=store.hub_cache,
                    local_files_only=offline(),
                    force_download=force and not offline(),
                )
            )
        except (_HTTP_ERROR, LocalEntryNotFoundError, OSError, ValueError) as error:
            ours = _translate(what, repo, error)
            if _status(error) >= 500:  # all else the client itself has tried again
                raise http.RetriableError(ours) from error
            raise ours from error

    return http.with_retries(attempt)


def _status(error: BaseException) -> int:
    """The HTTP status behind one of the client's errors; 0 for none."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _translate(what: str, repo: str, error: Exception) -> WeightsError:
    """Our error for one of the client's; errors of this machine's disk are raised as they are."""
    # what the client could not do without the network, it says with the reason as the cause
    wrapped = isinstance(error, LocalEntryNotFoundError | ValueError)
    cause = (wrapped and error.__cause__) or error
    status = _status(cause)
    if isinstance(cause, GatedRepoError) or status in (401, 403):
        return AccessDeniedError(
            f"{what}: the Hub answered {status}: gated, private, or not there. Log in with "
            "`hf auth login` or set HF_TOKEN, and accept the terms, if there are any, at "
            f"https://huggingface.co/{repo}"
        )
    if status == 404:
        gone = (
            "the revision"
            if isinstance(cause, RevisionNotFoundError)
            else "the repository"
            if isinstance(cause, RepositoryNotFoundError)
            else "the file"
        )
        return NotFoundError(f"{what}: the Hub answered 404: {gone} is gone")
    if status == 429:
        return RateLimitedError(f"{what}: the Hub answers 429 (too many requests); wait a while")
    if status:
        return ServerError(f"{what}: the Hub answered {status}")
    if _SHORT.search(str(cause)):
        return TruncatedError(f"{what}: the Hub sent less than it announced ({cause})")
    if isinstance(cause, _HTTP_ERROR | ConnectionError) or wrapped:
        return OfflineError(f"{what}: the Hub was not reached ({type(cause).__name__}: {cause})")
    raise error
