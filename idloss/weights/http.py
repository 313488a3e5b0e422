"""Plain HTTP downloads that resume, retry, verify, and appear whole or not at all.

On urllib, as `torch.hub` is, so that proxies come from the environment. Neither `torch.hub`'s
own function (it does not resume) nor huggingface_hub's (private, no `If-Range`, no retry on 5xx,
another HTTP library with every major version) does what a 100 MB file on a slow line needs.
"""

from __future__ import annotations

import email.utils
import http.client
import logging
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub.utils.tqdm import tqdm

from idloss.weights.errors import (
    AccessDeniedError,
    NotFoundError,
    OfflineError,
    RateLimitedError,
    ServerError,
    TruncatedError,
    WeightsError,
)
from idloss.weights.files import Piece, settle

logger = logging.getLogger(__name__)

# Pauses in seconds between attempts that brought no new byte; one more failure is the last.
BACKOFF: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
# The longest Retry-After that is waited for, in seconds.
LONGEST_WAIT = 120.0
# Seconds without a byte before a connection counts as dead.
TIMEOUT = 20.0

_BLOCK = 1 << 16
_RETRIED = (408, 425, 429, 500, 502, 503, 504)


_Result = TypeVar("_Result")


class RetriableError(Exception):
    """An attempt failed in a way that another one may not.

    Args:
        error: What to raise if it was the last one.
        wait: Seconds that the host asks to wait.
        unreachable: No host was reached at all, which rarely heals within seconds.
    """

    def __init__(
        self, error: WeightsError, *, wait: float = 0.0, unreachable: bool = False
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.wait = wait
        self.unreachable = unreachable


def with_retries(attempt: Callable[[], _Result], reached: Callable[[], int] = lambda: 0) -> _Result:
    """Call `attempt` until it succeeds, or fails for good.

    Args:
        attempt: Raises `RetriableError` where another attempt may help.
        reached: How far the attempts have come, in bytes; one that comes further than all
            before it does not count as a failure.

    Returns:
        What `attempt` returns.

    Raises:
        WeightsError: That of the last attempt, after `BACKOFF` is used up.
    """
    furthest, failures = reached(), 0
    while True:
        outcome = _caught(attempt)
        if not isinstance(outcome, RetriableError):
            return outcome
        failures = 0 if reached() > furthest else failures + 1
        furthest = max(furthest, reached())
        allowed = min(1, len(BACKOFF)) if outcome.unreachable else len(BACKOFF)
        if failures > allowed or outcome.wait > LONGEST_WAIT:
            raise outcome.error from outcome.__cause__
        pause = max(outcome.wait, next(iter(BACKOFF[max(failures - 1, 0) :]), 0.0))
        logger.warning("%s; trying again in %.1f s", outcome, pause)
        time.sleep(pause)


def _caught(attempt: Callable[[], _Result]) -> _Result | RetriableError:
    try:
        return attempt()
    except RetriableError as failure:
        return failure


def download(piece: Piece, target: Path, name: str) -> None:
    """Download one file, verify it, and only then let it appear at `target`.

    What an earlier, interrupted download left in `target` + `.partial` is resumed with a `Range`
    request, guarded by `If-Range`. If the result has the wrong hash it is thrown away
    and the file is downloaded once more from its first byte.

    Args:
        piece: What to download, with the hash it must have.
        target: Where to put it. The caller holds a lock on it.
        name: Whose weights they are, for errors and the progress bar.

    Raises:
        WeightsError: One of its children, by what went wrong.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    resumed = _fill(piece, partial, name)
    if resumed and (wrong := piece.mismatch(partial)):
        logger.warning("%s: the resumed %s is wrong (%s): once more", name, piece.filename, wrong)
        _discard(partial)
        _fill(piece, partial, name)
    try:
        piece.verify(partial, name)
        settle(partial, target)
    finally:
        _discard(partial)


def _discard(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _tag_file(partial).unlink(missing_ok=True)


def _tag_file(partial: Path) -> Path:
    """Where the ETag of a partial file is kept, for `If-Range`."""
    return partial.with_name(f"{partial.name}.etag")


def _fill(piece: Piece, partial: Path, name: str) -> bool:
    """Bring `partial` to its full length; whether it was put together from several answers."""
    return with_retries(lambda: _attempt(piece, partial, name), lambda: _length(partial))


def _length(partial: Path) -> int:
    return partial.stat().st_size if partial.exists() else 0


def _attempt(piece: Piece, partial: Path, name: str) -> bool:
    """One request, from where `partial` ends; whether what was there before is part of it."""
    offset = _length(partial)
    tag_file = _tag_file(partial)
    headers = {"User-Agent": "idloss", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if tag_file.exists():
            headers["If-Range"] = tag_file.read_text()
    what = f"{name}: {piece.filename} from {piece.url}"
    total = got = None
    with _network_errors(what, nothing_left=offset > 0):
        request = urllib.request.Request(piece.url, headers=headers)
        # an opener of its own: the shared one keeps the proxies of the first call
        with urllib.request.build_opener().open(request, timeout=TIMEOUT) as response:
            if not _continues(response, offset):
                offset = 0
            _remember_tag(response, tag_file)
            announced = response.headers.get("Content-Length")
            total = offset + int(announced) if announced else None
            with partial.open("ab" if offset else "wb") as file:
                for block in _blocks(response, offset, total, piece.filename):
                    file.write(block)
                got = file.tell()
    if total is not None and got is not None and got < total:
        raise RetriableError(
            TruncatedError(f"{what}: the host announced {total:,} bytes and sent {got:,}")
        )
    return offset > 0


def _remember_tag(response: http.client.HTTPResponse, tag_file: Path) -> None:
    etag = response.headers.get("ETag", "")
    if etag.startswith('"'):  # a weak one (W/"...") may not be used with If-Range
        tag_file.write_text(etag)
    else:
        tag_file.unlink(missing_ok=True)


def _continues(response: http.client.HTTPResponse, offset: int) -> bool:
    """Whether the answer goes on where the partial file ends, and not from the beginning."""
    begin = response.headers.get("Content-Range", "").partition("-")[0]
    return response.status == 206 and begin == f"bytes {offset}"


def _blocks(
    response: http.client.HTTPResponse, offset: int, total: int | None, filename: str
) -> Iterator[bytes]:
    """The body piece by piece, with a progress bar where someone is looking (a terminal)."""
    with tqdm(
        total=total, initial=offset, desc=filename, unit="B", unit_scale=True, disable=None
    ) as bar:
        # read1 hands on what has arrived; read would lose it when the connection breaks
        while block := response.read1(_BLOCK):
            bar.update(len(block))
            yield block


@contextmanager
def _network_errors(what: str, *, nothing_left: bool) -> Iterator[None]:
    """Turn what urllib raises into our errors, those worth another attempt marked as such.

    With `nothing_left` a 416 is no error: the partial file may have all its bytes, and its hash
    is to decide.
    """
    try:
        yield
    except urllib.error.HTTPError as error:
        with error:
            if not (error.code == 416 and nothing_left):
                raise _refusal(what, error) from error
    except urllib.error.URLError as error:
        raise RetriableError(
            OfflineError(f"{what}: no connection ({error.reason})"),
            unreachable=not isinstance(error.reason, ConnectionResetError),
        ) from error
    except http.client.IncompleteRead as error:
        raise RetriableError(TruncatedError(f"{what}: the body broke off")) from error
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise RetriableError(
            OfflineError(f"{what}: the connection broke ({type(error).__name__}: {error})")
        ) from error


def _refusal(what: str, error: urllib.error.HTTPError) -> Exception:
    """Our error for an HTTP status."""
    answer = f"{what}: the host answered {error.code} {error.reason}"
    if error.code in (401, 403):
        return AccessDeniedError(answer)
    if error.code in (404, 410):
        return NotFoundError(answer)
    if error.code not in _RETRIED:
        return ServerError(answer)
    wait = _retry_after(error.headers.get("Retry-After"))
    kind = RateLimitedError if error.code == 429 else ServerError
    asked = f", and asks for a pause of {wait:.0f} s" if wait else ""
    return RetriableError(kind(answer + asked), wait=wait)


def _retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 for none."""
    if header is None:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0
