"""From a name to a verified safetensors file in our layout, made once and kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from idloss.weights.catalogue import Weights, adapter_version, full_name, get_weights
from idloss.weights.errors import AdapterError, HashMismatchError
from idloss.weights.files import (
    is_whole_safetensors,
    load_checkpoint,
    read_metadata,
    save_tensors,
)
from idloss.weights.store import Store

CacheDir = str | os.PathLike[str] | None


def fetch(name: str, *, cache_dir: CacheDir = None, force: bool = False) -> Path:
    """Get weights: download, verify, convert, each only if it was not done before.

    Args:
        name: `arch.tag`, or `arch` for its default tag.
        cache_dir: Folder to keep things in; None for `$HF_HOME/idloss`, and `HF_HUB_CACHE`
            for files of the Hub.
        force: Do all of it again.

    Returns:
        A safetensors file in the model's own layout.

    Raises:
        UnknownWeightsError: If the name is not known.
        OfflineError: If the file is not in the cache and cannot be downloaded.
        HashMismatchError: If what was downloaded is not what was pinned.
        WeightsError: One of its other children, by what went wrong.
        ImportError: If a 7z archive is to be opened and py7zr is not installed.
    """
    name = full_name(name)
    weights = get_weights(name)
    store = Store.at(cache_dir)
    target = store.converted_path(name, weights.key)
    if not force and _is_made(target, weights):
        return target
    with store.lock(target):
        if not force and _is_made(target, weights):  # by another process, meanwhile
            return target
        paths = weights.source.obtain(store, name, force=force)
        with store.scratch() as scratch:
            checkpoint = weights.source.assemble(paths, scratch, name)
            if weights.adapter is None and checkpoint in paths and is_whole_safetensors(checkpoint):
                return checkpoint  # it is what we would make of it
            _convert(checkpoint, weights, name, target)
    return target


def _is_made(target: Path, weights: Weights) -> bool:
    """Whether `target` is there, readable, and made from these weights."""
    return (read_metadata(target) or {}).get("idloss.key") == weights.key


def add(name: str, *paths: str | os.PathLike[str], cache_dir: CacheDir = None) -> Path:
    """Bring files that you downloaded by hand: they are verified, kept, and converted.

    Args:
        name: `arch.tag`, or `arch` for its default tag.
        paths: The file, or all its parts in any order, as they are at the origin. Parts
            left out are downloaded.
        cache_dir: As in `fetch`.

    Returns:
        A safetensors file in the model's own layout, which `fetch` returns from now on.

    Raises:
        HashMismatchError: If a file is none of those that are pinned; nothing is kept then.
        WeightsError: As in `fetch`.
    """
    name = full_name(name)
    source = get_weights(name).source
    store = Store.at(cache_dir)
    matched = []
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"{name}: there is no file {path} to add")
        wrong = {piece: piece.mismatch(path) for piece in source.pieces}
        piece = next((piece for piece, reason in wrong.items() if reason is None), None)
        if piece is None:
            reasons = "; ".join(f"as {piece.filename}: {why}" for piece, why in wrong.items())
            raise HashMismatchError(f"{name}: {path} is not the pinned file: {reasons}")
        matched.append((piece, path))
    for piece, path in matched:
        store.keep(piece, path)
    return fetch(name, cache_dir=cache_dir)


def convert(name: str, path: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Convert your own checkpoint in the released layout of a model, such as one you retrained.

    The result is for `create_fnet(arch, pretrained=True,
    pretrained_cfg_overlay={"file": target})`, which checks that it has every tensor.

    Args:
        name: Weights whose layout the checkpoint has, `arch.tag` or `arch`.
        path: The checkpoint; no hash is asked of it, and no code in it is run.
        target: The safetensors file to write.

    Returns:
        `target`.

    Raises:
        AdapterError: If the checkpoint has another layout.
        UnsafePickleError: If it wants to run code.
    """
    name = full_name(name)
    weights = get_weights(name)
    _convert(Path(path), weights, name, Path(target), origin=str(path))
    return Path(target)


def _convert(
    checkpoint: Path, weights: Weights, name: str, target: Path, origin: str | None = None
) -> None:
    released = load_checkpoint(checkpoint, name)
    tensors = released
    if weights.adapter is not None:
        try:
            tensors = dict(weights.adapter(released))
        except (KeyError, ValueError) as error:
            reason = error.args[0] if error.args else error
            raise AdapterError(
                f"{name}: {checkpoint.name} does not have the layout it was released with: {reason}"
            ) from error
    about = {
        "idloss.name": name,
        "source": origin or weights.source.pieces[0].url,
        "licence": weights.licence,
        "training_data": weights.training_data,
        "adapter": adapter_version(weights.adapter),
    }
    if origin is None:
        about |= {"idloss.key": weights.key, "source_hash": weights.source.fingerprint}
    save_tensors(tensors, target, about)


def describe(name: str, *, cache_dir: CacheDir = None) -> dict[str, Any]:
    """What is known of weights, for people: source, hash, licence, training data, size.

    Args:
        name: `arch.tag`, or `arch` for its default tag.
        cache_dir: As in `fetch`.

    Returns:
        Readable values by readable key; `size` and `cached` are None for what is not here yet.
        Nothing is downloaded.
    """
    name = full_name(name)
    weights = get_weights(name)
    target = Store.at(cache_dir).converted_path(name, weights.key)
    cached = target if _is_made(target, weights) else None
    pieces = weights.source.pieces
    return {
        "name": name,
        "description": weights.description,
        "source": [piece.url for piece in pieces],
        "hash": [piece.digest for piece in pieces],
        "origin": weights.source.origin_url,
        "licence": weights.licence,
        "training data": weights.training_data,
        "trained by": weights.trained_by,
        "adapter": adapter_version(weights.adapter).partition(":")[0],
        "cached": cached,
        "size": cached.stat().st_size if cached else None,
    }
