"""Where weights come from, and where they are kept: each source brings one verified file."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from idloss.errors import import_extra, some_of
from idloss.weights.files import (
    NotAllowedError,
    NotAsPromisedError,
    NotFoundError,
    Piece,
    TryAgain,
    UnreachableError,
    WeightsError,
    download,
    file_sha256,
    is_stale,
    settle,
    with_retries,
)

logger = logging.getLogger(__name__)

GITHUB_RAW = "https://raw.githubusercontent.com"
"""Where GitHub serves files; the environment variable `IDLOSS_GITHUB_RAW` names a mirror."""

GITHUB_LIMIT = 100 << 20
"""GitHub takes no file of more than 100 MiB (docs.github.com, "About large files on GitHub")."""

_GONE = {"RevisionNotFoundError": "the revision", "RepositoryNotFoundError": "the repository"}


def offline() -> bool:
    """Whether the user forbids the network (`HF_HUB_OFFLINE`), at import time or by now."""
    asked = os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
    return bool(constants.HF_HUB_OFFLINE) or asked


def zoo_folder() -> Path:
    """Models and recipes that come with idloss: in the package, or in the checkout around it."""
    package = Path(__file__).resolve().parent.parent
    zoo = package / "zoo"
    return zoo if zoo.is_dir() else package.parent / "zoo"


def zoo_models() -> list[str]:
    """Names of the published models in the zoo, each the folder of one in the Hub's layout."""
    return sorted(path.parent.name for path in zoo_folder().glob("*/config.json"))


@dataclass(frozen=True)
class Cache:
    """The folders of a cache: `downloads/` as they came, `converted/` what was made of them."""

    root: Path
    hub: Path | None = None  # the Hub client's own cache; None for its default

    @classmethod
    def at(cls, cache_dir: str | os.PathLike[str] | None) -> Cache:
        """The cache in `cache_dir`, or the default one under `HF_HOME`."""
        if cache_dir is None:
            return cls(Path(constants.HF_HOME) / "idloss")
        return cls(Path(cache_dir) / "idloss", Path(cache_dir))

    def download_path(self, piece: Piece, name: str) -> Path:
        """Where a piece is kept as it came: under its hash, or its owner's name if it has none."""
        owner = name if piece.digest == "unpinned" else piece.digest.replace(":", "-")
        return self.root / "downloads" / f"{owner}-{piece.filename}"

    def converted_path(self, name: str, key: str) -> Path:
        """Where the safetensors of weights `name` are kept, made from what `key` stands for."""
        return self.root / "converted" / f"{name}-{key[:16]}.safetensors"

    def keep(self, piece: Piece, path: Path, name: str) -> None:
        """Copy a verified file into `downloads/`, in place of what is there."""
        target = self.download_path(piece, name)
        with self.scratch() as folder:
            copy = folder / piece.filename
            shutil.copyfile(path, copy)
            target.parent.mkdir(parents=True, exist_ok=True)
            settle(copy, target)

    def download(self, piece: Piece, name: str, *, force: bool = False) -> Path:
        """A piece in `downloads/`, brought by one process at a time; with `force` once more."""
        kept = self.download_path(piece, name)
        if offline():
            raise UnreachableError(
                f"{name}: {piece.filename} is not in the cache ({kept}), and HF_HUB_OFFLINE is set"
            )
        with self.lock(kept):
            # another process may have brought it while this one waited
            if force or not kept.exists() or piece.mismatch(kept):
                download(piece, kept, name)
        return kept

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """One process at a time for what is to be at `path`; the others wait."""
        lock = self.root / ".locks" / f"{path.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            yield

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for unfinished work, on the cache's own file system, gone afterwards."""
        parent = self.root / ".scratch"
        parent.mkdir(parents=True, exist_ok=True)
        for left in filter(is_stale, parent.iterdir()):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            yield Path(folder)


def _check_hex(what: str, value: str | None, digits: int) -> None:
    if value is not None and not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
        raise ValueError(f"{what} must be {digits} lower-case hex digits, got {value!r}")


class Source(ABC):
    """A place where weights come from; its children are frozen dataclasses."""

    @property
    @abstractmethod
    def pieces(self) -> tuple[Piece, ...]:
        """The files to be had, in order, each with its address and hash."""

    @property
    def origin_url(self) -> str:
        """A page that tells a person about the origin."""
        return self.pieces[0].url

    def get(self, piece: Piece, cache: Cache, name: str, *, force: bool) -> Path:
        """A local copy of one piece for `name`, from the origin; with `force` past its cache."""
        raise NotImplementedError

    def kept(self, cache: Cache, name: str) -> Path | None:
        """The first of the pieces if all are here, unread."""
        paths = [cache.download_path(piece, name) for piece in self.pieces]
        return paths[0] if all(path.exists() for path in paths) else None

    def fingerprint(self, cache: Cache, name: str) -> str:
        """What stands for the content, which is that of the kept file where no hash is pinned."""
        digests = []
        for piece in self.pieces:
            kept = cache.download_path(piece, name)
            known = piece.digest != "unpinned" or not kept.exists()
            digests.append(piece.digest if known else f"sha256:{file_sha256(kept)}")
        return "+".join(digests)

    def obtain(self, cache: Cache, name: str, *, force: bool = False) -> list[Path]:
        """Verified local copies of all pieces in order, from the cache where it has them."""
        paths = []
        for piece in self.pieces:
            kept = cache.download_path(piece, name)
            if kept.exists() and (not force or piece.digest == "unpinned"):
                wrong = piece.mismatch(kept)
                if wrong is None:
                    paths.append(kept)
                    continue
                logger.warning("%s: %s was damaged (%s) and is replaced", name, kept, wrong)
            try:
                paths.append(self.get(piece, cache, name, force=force))
            except WeightsError as error:
                raise type(error)(f"{error}\n{_by_hand(piece, name)}") from error
        return paths

    def assemble(self, paths: Sequence[Path], scratch: Path, name: str) -> Path:
        """The checkpoint that the pieces make; `scratch` is for what has to be unpacked."""
        del scratch, name
        (path,) = paths
        return path


def _by_hand(piece: Piece, name: str) -> str:
    """How a person gets one piece into the cache, for the end of an error message."""
    unset = "HF_HUB_OFFLINE forbids the network: unset it, or " if offline() else ""
    return (
        f"{unset}download it by hand where that is possible: {piece.url} ({piece.digest}), "
        f"and then run: idloss fetch {name} --file {piece.filename}"
    )


@dataclass(frozen=True)
class HubFile(Source):
    """A file on the Hugging Face Hub, which its own client fetches and keeps.

    Args:
        repo: `owner/name`.
        filename: Path inside the repository.
        revision: Commit hash; a branch is no pin.
        sha256: Of the file, in hex.
    """

    repo: str
    filename: str
    revision: str
    sha256: str

    def __post_init__(self) -> None:
        _check_hex("revision", self.revision, 40)
        _check_hex("sha256", self.sha256, 64)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The one file."""
        url = f"{self.origin_url}/resolve/{self.revision}/{quote(self.filename)}"
        return (Piece(PurePosixPath(self.filename).name, url, sha256=self.sha256),)

    @property
    def origin_url(self) -> str:
        """The repository's page."""
        return f"https://huggingface.co/{self.repo}"

    def kept(self, cache: Cache, name: str) -> Path | None:
        """The file in the Hub's cache, or brought by hand."""
        found = try_to_load_from_cache(self.repo, self.filename, cache.hub, self.revision)
        return Path(found) if isinstance(found, str) else super().kept(cache, name)

    def get(self, piece: Piece, cache: Cache, name: str, *, force: bool) -> Path:
        """The file in the Hub's cache; a damaged one there is downloaded once more."""
        path = self._ask(cache, name, force)
        if not force and not offline() and (wrong := piece.mismatch(path)):
            logger.warning("%s: %s in the Hub's cache is wrong (%s): once more", name, path, wrong)
            path = self._ask(cache, name, True)
        piece.verify(path, name)
        return path

    def _ask(self, cache: Cache, name: str, force: bool) -> Path:
        what = f"{name}: {self.filename} of {self.origin_url} at revision {self.revision}"
        return ask_hub(what, self.repo, self.filename, self.revision, cache.hub, force=force)


def ask_hub(
    what: str,
    repo: str,
    filename: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    *,
    force: bool = False,
) -> Path:
    """A file of the Hub in the Hub's cache, for `what`; with `force` downloaded again."""
    folder = None if cache_dir is None else str(cache_dir)
    options: dict[str, Any] = {"local_files_only": offline()}
    options["force_download"] = force and not offline()

    def attempt() -> Path:
        with hub_errors(what, repo):
            if not offline() and not try_to_load_from_cache(repo, filename, folder, revision):
                # asked once: the client would try for 35 s in silence
                get_hf_file_metadata(hf_hub_url(repo, filename, revision=revision))
            got = hf_hub_download(repo, filename, revision=revision, cache_dir=folder, **options)
            return Path(got)

    return with_retries(attempt)


def hub_file(
    what: str, hub_id: str, filename: str | None, cache_dir: str | os.PathLike[str] | None
) -> Path:
    """The weights of `owner/name` or `owner/name@revision`; safetensors, if there are some."""
    repo, _, revision = hub_id.partition("@")
    missing = (NotFoundError, UnreachableError) if offline() else (NotFoundError,)
    if filename is None:
        with suppress(*missing):
            return ask_hub(what, repo, "model.safetensors", revision or None, cache_dir)
    return ask_hub(what, repo, filename or "pytorch_model.bin", revision or None, cache_dir)


def reach_hub(what: str, repo: str, cache_dir: str | os.PathLike[str] | None) -> None:
    """See that the Hub answers, unless something of `repo` is in the cache."""
    try:
        folder = None if cache_dir is None else str(cache_dir)
        snapshot_download(repo, cache_dir=folder, local_files_only=True)
    except LocalEntryNotFoundError:
        with suppress(NotFoundError):  # it did answer
            ask_hub(what, repo, "config.json", None, cache_dir)


@contextmanager
def hub_errors(what: str, repo: str) -> Iterator[None]:
    """Turn what the Hub's client raises, whatever its HTTP library, into our errors."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        if isinstance(error, HFValidationError):
            raise NotFoundError(f"{what}: {repo!r} is no name of a repository") from error
        # what the client could not do without the network, it says with the reason as the cause
        wrapped = isinstance(error, LocalEntryNotFoundError | ValueError) and error.__cause__
        cause = wrapped or error
        status = int(getattr(getattr(cause, "response", None), "status_code", None) or 0)
        if isinstance(cause, GatedRepoError) or status in (401, 403):
            raise NotAllowedError(
                f"{what}: the Hub answered {status}: gated, private, or not there. Log in with "
                "`hf auth login` or set HF_TOKEN, and accept the terms, if there are any, at "
                f"https://huggingface.co/{repo}"
            ) from error
        if status == 404:
            gone = _GONE.get(type(cause).__name__, "the file")
            raise NotFoundError(f"{what}: the Hub answered 404: {gone} is gone") from error
        if status:
            ours = UnreachableError(f"{what}: the Hub answered {status}")
            raise (TryAgain(ours) if status >= 500 else ours) from error
        network = isinstance(cause, ConnectionError | TimeoutError | LocalEntryNotFoundError)
        if isinstance(cause, OSError) and cause.errno is not None and not network:
            raise  # this machine's disk
        reason = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
        raise UnreachableError(f"{what}: the Hub was not reached ({reason})") from error


@dataclass(frozen=True)
class GitHubBlob(Source):
    """A file in a GitHub repository, perhaps cut into parts, perhaps packed as 7z.

    Args:
        repo: `owner/name`.
        commit: Commit hash.
        parts: `(path, git blob SHA-1)` of the file, or of its parts in the order in which their
            bytes are joined. `git ls-tree COMMIT PATH` prints the SHA-1.
        member: If the joined file is a 7z archive: the name of the checkpoint in it.
        sha256: Of the file in hex, where known and not cut into parts.
    """

    repo: str
    commit: str
    parts: tuple[tuple[str, str], ...]
    member: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        _check_hex("commit", self.commit, 40)
        _check_hex("sha256", self.sha256, 64)
        if not self.parts or (self.sha256 and len(self.parts) > 1):
            raise ValueError("parts must name a file; with sha256, exactly one")
        for path, blob in self.parts:
            _check_hex(f"git blob SHA-1 of {path}", blob, 40)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The parts."""
        return tuple(
            Piece(
                PurePosixPath(path).name,
                f"{GITHUB_RAW}/{self.repo}/{self.commit}/{quote(path)}",
                sha256=self.sha256,
                git_sha1=blob,
                limit=GITHUB_LIMIT,
            )
            for path, blob in self.parts
        )

    @property
    def origin_url(self) -> str:
        """The repository's page at that commit."""
        return f"https://github.com/{self.repo}/tree/{self.commit}"

    def fingerprint(self, cache: Cache, name: str) -> str:
        """The parts' hashes, and which member is taken."""
        return super().fingerprint(cache, name) + (f"/{self.member}" if self.member else "")

    def get(self, piece: Piece, cache: Cache, name: str, *, force: bool) -> Path:
        """The piece, downloaded into the cache."""
        mirror = os.environ.get("IDLOSS_GITHUB_RAW", GITHUB_RAW).rstrip("/")
        mirrored = replace(piece, url=piece.url.replace(GITHUB_RAW, mirror, 1))
        return cache.download(mirrored, name, force=force)

    def assemble(self, paths: Sequence[Path], scratch: Path, name: str) -> Path:
        """The parts joined, and the member unpacked."""
        joined = paths[0]
        if len(paths) > 1:
            joined = scratch / "joined"
            with joined.open("wb") as whole:
                for path in paths:
                    with path.open("rb") as part:
                        shutil.copyfileobj(part, whole)
        return _unpack_7z(joined, self.member, scratch, name) if self.member else joined


@dataclass(frozen=True)
class WebFile(Source):
    """A file at an address of its own, such as one of a GitHub release.

    Args:
        url: Where it is.
        sha256: Of the file, in hex.
        page: What tells a person about it; None for `url`.
    """

    url: str
    sha256: str
    page: str | None = None

    def __post_init__(self) -> None:
        _check_hex("sha256", self.sha256, 64)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The one file."""
        return (Piece(PurePosixPath(urlsplit(self.url).path).name, self.url, sha256=self.sha256),)

    @property
    def origin_url(self) -> str:
        """The page about it."""
        return self.page or self.url

    def get(self, piece: Piece, cache: Cache, name: str, *, force: bool) -> Path:
        """The file, downloaded into the cache."""
        return cache.download(piece, name, force=force)


def _unpack_7z(archive: Path, member: str, folder: Path, name: str) -> Path:
    py7zr = import_extra("py7zr", "released", f"{name} is released as a 7z archive, which needs")
    try:
        with py7zr.SevenZipFile(archive) as opened:
            held = opened.getnames()
            if member in held:
                opened.extract(path=folder, targets=[member])
    # a damaged archive may raise whatever it likes
    except Exception as error:
        raise NotAsPromisedError(f"{name}: its 7z archive is broken: {error}") from error
    if member not in held:
        raise NotAsPromisedError(f"{name}: no {member!r} in its 7z archive, only {some_of(held)}")
    return folder / member


@dataclass(frozen=True)
class ZooFile(Source):
    """A `model.safetensors` that comes with idloss, in `zoo/<folder>`; it is never copied."""

    folder: str
    sha256: str

    def __post_init__(self) -> None:
        _check_hex("sha256", self.sha256, 64)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The one file; its address is the same on every machine."""
        filename = "model.safetensors"
        return (Piece(filename, f"zoo:{self.folder}/{filename}", sha256=self.sha256),)

    @property
    def path(self) -> Path:
        """Where it is."""
        return zoo_folder() / self.folder / "model.safetensors"

    def kept(self, cache: Cache, name: str) -> Path | None:
        """The file itself."""
        del cache, name
        return self.path if self.path.is_file() else None

    def obtain(self, cache: Cache, name: str, *, force: bool = False) -> list[Path]:
        """The file itself, verified."""
        del cache, force
        (piece,), path = self.pieces, self.path
        if not path.is_file():
            raise NotFoundError(f"{name}: no file at {path}, where its weights are to be")
        piece.verify(path, name)
        return [path]


@dataclass(frozen=True)
class ManualFile(Source):
    """A file that a person has to bring: its host wants a login or a form, or is gone.

    Args:
        filename: Its name.
        url: Where a person finds it.
        how: What to do there, in a sentence.
        sha256: Of the file in hex; None where it could not be learnt, and then only the
            keys and shapes of its tensors are checked.
    """

    filename: str
    url: str
    how: str
    sha256: str | None = None

    def __post_init__(self) -> None:
        _check_hex("sha256", self.sha256, 64)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The one file."""
        return (Piece(self.filename, self.url, sha256=self.sha256),)

    def get(self, piece: Piece, cache: Cache, name: str, *, force: bool) -> Path:
        """Always an error: only a person can bring it."""
        del cache, force
        raise NotFoundError(f"{name}: {piece.filename} has to be fetched by hand. {self.how}")
