"""Where weights come from: each source knows its pinned pieces and how they become one file."""

from __future__ import annotations

import logging
import lzma
import os
import re
import shutil
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from idloss.weights import http, hub
from idloss.weights.errors import (
    ArchiveError,
    ManualDownloadError,
    NotFoundError,
    OfflineError,
    WeightsError,
)
from idloss.weights.files import Piece, file_sha256
from idloss.weights.store import Store, offline
from idloss.weights.zoo import zoo_folder

logger = logging.getLogger(__name__)

GITHUB_RAW = "https://raw.githubusercontent.com"
"""Where GitHub serves files; the environment variable `IDLOSS_GITHUB_RAW` names a mirror."""


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

    @property
    def fingerprint(self) -> str:
        """What stands for the content; another one means other weights."""
        return "+".join(piece.digest for piece in self.pieces)

    @abstractmethod
    def get(self, piece: Piece, store: Store, name: str, *, force: bool) -> Path:
        """A verified local copy of one piece, from the origin.

        Args:
            piece: One of `pieces`.
            store: Where to keep it.
            name: Whose weights they are, for the errors.
            force: Get it from the origin even where the origin's own cache has it.
        """

    def obtain(self, store: Store, name: str, *, force: bool = False) -> list[Path]:
        """Verified local copies of all pieces, from the cache where it has them.

        Args:
            store: The cache.
            name: Whose weights they are, for the errors.
            force: Pass over what is in the cache.

        Returns:
            One path per piece, in order.

        Raises:
            WeightsError: One of its children; it says how to bring the file by hand.
        """
        paths = []
        for piece in self.pieces:
            kept = store.download_path(piece)
            if not force and kept.exists():
                wrong = piece.mismatch(kept)
                if wrong is None:
                    paths.append(kept)
                    continue
                logger.warning("%s: %s was damaged (%s) and is replaced", name, kept, wrong)
            try:
                paths.append(self.get(piece, store, name, force=force))
            except WeightsError as error:
                raise type(error)(f"{error}\n{self.by_hand(piece, name)}") from error
        return paths

    def by_hand(self, piece: Piece, name: str) -> str:
        """How a person gets one piece into the cache, for the end of an error message."""
        unset = "HF_HUB_OFFLINE forbids the network: unset it. Or " if offline() else "To "
        return (
            f"{unset}bring the file by hand: download\n    {piece.url}\n"
            f"({piece.digest}) where that is possible, and then\n"
            f'    python -c "from idloss import weights; '
            f'weights.add({name!r}, {piece.filename!r})"'
        )

    def assemble(self, paths: Sequence[Path], scratch: Path, name: str) -> Path:
        """The checkpoint that the pieces make.

        Args:
            paths: The pieces, in order.
            scratch: A folder for what has to be unpacked.
            name: Whose weights they are, for the errors.
        """
        del scratch, name
        (path,) = paths
        return path


@dataclass(frozen=True)
class HubFile(Source):
    """A file on the Hugging Face Hub, had through its own client and kept in its own cache.

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

    def get(self, piece: Piece, store: Store, name: str, *, force: bool) -> Path:
        """The file in the Hub's cache; a damaged one there is downloaded once more."""
        arguments = (self.repo, self.filename, self.revision, store, name)
        path = hub.hub_download(*arguments, force=force)
        if not force and not offline() and (wrong := piece.mismatch(path)):
            logger.warning("%s: %s in the Hub's cache is wrong (%s): once more", name, path, wrong)
            path = hub.hub_download(*arguments, force=True)
        piece.verify(path, name)
        return path


class _WebSource(Source):
    """A source whose pieces are had by plain HTTP."""

    def get(self, piece: Piece, store: Store, name: str, *, force: bool) -> Path:
        """The piece, downloaded into the cache by one process at a time."""
        kept = store.download_path(piece)
        if offline():
            raise OfflineError(
                f"{name}: {piece.filename} is not in the cache ({kept}), and HF_HUB_OFFLINE is set"
            )
        with store.lock(kept):
            # another process may have brought it while this one waited
            if force or not kept.exists() or piece.mismatch(kept):
                http.download(self._located(piece), kept, name)
        return kept

    def _located(self, piece: Piece) -> Piece:
        """The piece with the address to ask now."""
        return piece


@dataclass(frozen=True)
class UrlFile(_WebSource):
    """A file at an address.

    Args:
        url: `http(s)://...`.
        sha256: Of the file, in hex.
    """

    url: str
    sha256: str

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError(f"url must begin with http:// or https://, got {self.url!r}")
        _check_hex("sha256", self.sha256, 64)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The one file."""
        filename = PurePosixPath(unquote(urlsplit(self.url).path)).name or "download"
        return (Piece(filename, self.url, sha256=self.sha256),)


@dataclass(frozen=True)
class GitHubBlob(_WebSource):
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
            )
            for path, blob in self.parts
        )

    @property
    def origin_url(self) -> str:
        """The repository's page at that commit."""
        return f"https://github.com/{self.repo}/tree/{self.commit}"

    @property
    def fingerprint(self) -> str:
        """The parts' hashes, and which member is taken."""
        return super().fingerprint + (f"/{self.member}" if self.member else "")

    def _located(self, piece: Piece) -> Piece:
        mirror = os.environ.get("IDLOSS_GITHUB_RAW", GITHUB_RAW).rstrip("/")
        return Piece(
            piece.filename,
            piece.url.replace(GITHUB_RAW, mirror, 1),
            sha256=piece.sha256,
            git_sha1=piece.git_sha1,
        )

    def assemble(self, paths: Sequence[Path], scratch: Path, name: str) -> Path:
        """The parts joined, and the member unpacked."""
        if len(paths) == 1:
            joined = paths[0]
        else:
            joined = scratch / "joined"
            with joined.open("wb") as whole:
                for path in paths:
                    with path.open("rb") as part:
                        shutil.copyfileobj(part, whole)
        return _unpack_7z(joined, self.member, scratch, name) if self.member else joined


def _unpack_7z(archive: Path, member: str, folder: Path, name: str) -> Path:
    try:
        import py7zr
        import py7zr.exceptions
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name} is released as a 7z archive, and py7zr is not installed: "
            'pip install "idloss[released]"',
            name="py7zr",
        ) from error
    try:
        with py7zr.SevenZipFile(archive) as opened:
            held = opened.getnames()
            if member not in held:
                raise ArchiveError(f"{name}: no {member!r} in its 7z archive, only {held}")
            opened.extract(path=folder, targets=[member])
    except (
        py7zr.exceptions.ArchiveError,
        lzma.LZMAError,
        zlib.error,
        OSError,
        EOFError,
        ValueError,
    ) as error:
        raise ArchiveError(f"{name}: its 7z archive is broken: {error}") from error
    return folder / member


class _DiskSource(Source):
    """A source that is a file on this machine; it is never copied."""

    @property
    @abstractmethod
    def file(self) -> Path:
        """Where the file is to be."""

    def obtain(self, store: Store, name: str, *, force: bool = False) -> list[Path]:
        """The file itself."""
        (piece,) = self.pieces
        return [self.get(piece, store, name, force=force)]

    def get(self, piece: Piece, store: Store, name: str, *, force: bool) -> Path:
        """The file itself, verified."""
        del store, force
        if not self.file.is_file():
            raise NotFoundError(f"{name}: no file at {self.file}, where its weights are to be")
        piece.verify(self.file, name)
        return self.file


@dataclass(frozen=True)
class LocalFile(_DiskSource):
    """A file of the user's own.

    Args:
        path: The file; `~` is expanded.
        sha256: Of the file in hex; None to take it as it is.
    """

    path: str | os.PathLike[str]
    sha256: str | None = None

    def __post_init__(self) -> None:
        _check_hex("sha256", self.sha256, 64)

    @property
    def file(self) -> Path:
        """The path, absolute."""
        return Path(self.path).expanduser().absolute()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The one file."""
        return (Piece(self.file.name, self.file.as_uri(), sha256=self.sha256),)

    @property
    def fingerprint(self) -> str:
        """The pinned hash, or that of the file as it is now."""
        if self.sha256 or not self.file.is_file():
            return super().fingerprint
        return f"sha256:{file_sha256(self.file)}"


@dataclass(frozen=True)
class ZooFile(_DiskSource):
    """A `model.safetensors` that comes with idloss, in `zoo/<folder>`.

    Args:
        folder: The model's folder in the zoo.
        sha256: Of the file, in hex.
    """

    folder: str
    sha256: str

    def __post_init__(self) -> None:
        _check_hex("sha256", self.sha256, 64)

    @property
    def file(self) -> Path:
        """In the installed package, or else in the checkout around it."""
        return zoo_folder() / self.folder / "model.safetensors"

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The one file."""
        return (Piece(self.file.name, self.file.as_uri(), sha256=self.sha256),)


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

    def get(self, piece: Piece, store: Store, name: str, *, force: bool) -> Path:
        """Always an error: only a person can bring it."""
        del store, force
        raise ManualDownloadError(f"{name}: {piece.filename} has to be fetched by hand. {self.how}")
