"""A checkpoint is a folder: safetensors files and a manifest with their sizes and checksums. A leaf: it knows tensors, no networks.

It is written under a temporary name beside its place, flushed to the disk, and renamed: whoever loads gets the old one or the new
one, whole, also while a writer is at work and after a kill at any moment. Reading verifies everything before a tensor is handed out,
and changes nothing on the disk. Nothing is ever unpickled.

``.NAME.<hex>.partial`` is being written or removed; ``.NAME.previous`` was NAME, and is whole: it is NAME where that is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

T = TypeVar("T")

FORMAT = 1
_MANIFEST = "manifest.json"
_NAMES, _SUFFIXES = (_MANIFEST, ".metadata"), (".safetensors", ".distcp")  # the second of each: sharded checkpoints
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")


@dataclass(frozen=True)
class Checkpoint:
    """``tensors``: file stem -> name -> tensor, on the CPU. ``meta``: what was stored beside them, plain JSON values."""

    kind: str
    meta: dict[str, Any]
    tensors: dict[str, dict[str, torch.Tensor]]


def save(path: str | Path, *, kind: str, meta: Mapping[str, Any], tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Write a checkpoint folder, in place of whatever checkpoint has that name.

    Args:
        kind: what it is ("dit", "trainer"): ``load`` refuses another.
        meta: plain JSON values. tensors: file stem -> name -> tensor; shared storage is written out.

    Raises:
        ValueError: ``path`` is something else than a checkpoint folder, or holds more than one: it is left alone; ``meta`` is not
        JSON; a stem is not a file's name. OSError: the disk's own. Whatever is raised, the checkpoint that was there still is.
    """
    for stem in tensors:
        if not stem or Path(stem).name != stem or stem.startswith("."):
            raise ValueError(f"tensors: expected file stems, such as 'model', for keys, got {stem!r}")
    with writing(path, kind=kind, meta=meta) as folder:
        for stem, group in tensors.items():
            file = folder / f"{stem}.safetensors"
            try:
                save_file({name: t.detach().cpu().contiguous().clone() for name, t in group.items()}, file)
            except SafetensorError as error:
                raise OSError(f"{file}: {error}") from error


@contextlib.contextmanager
def writing(path: str | Path, *, kind: str, meta: Mapping[str, Any]) -> Iterator[Path]:
    """A temporary folder to put a checkpoint's files into; when the block ends it is sealed with a manifest and takes its place.

    Raises as ``save``. An error inside the block leaves the checkpoint that was there.
    """
    path = Path(path).resolve()  # a link is written through, and "." has a name
    _check_replaceable(path)
    try:
        json.dumps(meta, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta: expected plain JSON values, nan and infinities excluded, got others: {error}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _partial(path)
    temporary.mkdir()
    try:
        yield temporary
        files = {}
        for file in sorted(temporary.iterdir()):
            file.chmod(temporary.stat().st_mode & 0o666)  # safetensors leaves it readable by its owner alone
            files[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            _flush(file)
        body = json.dumps({"format": FORMAT, "kind": kind, "meta": meta, "files": files}, indent=1, allow_nan=False)
        (temporary / _MANIFEST).write_text(json.dumps({"sha256": _digest(body), "manifest": body}), encoding="utf-8")
        _flush(temporary / _MANIFEST)
        _flush(temporary)
        _replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load(path: str | Path, *, kind: str | None = None) -> Checkpoint:
    """Read a checkpoint folder, verified against its checksums.

    Raises:
        FileNotFoundError: nothing has that name. ValueError: not a checkpoint, of another kind or a newer format, half-written or
        corrupt; the message says which file.
    """
    path = Path(path)

    def read(folder: Path) -> Checkpoint:
        manifest = _verified(folder, path, kind)
        tensors = {}
        for name in manifest["files"]:
            try:
                tensors[Path(name).stem] = load_file(folder / name)
            except (SafetensorError, RuntimeError) as error:  # torch's own, where a writer has just replaced the file
                raise ValueError(f"{path}: corrupt checkpoint: {name}: {error}") from None
        return Checkpoint(manifest["kind"], manifest["meta"], tensors)

    return _settled(path, read)


def verify(path: str | Path, *, kind: str | None = None) -> tuple[Path, dict[str, Any]]:
    """The folder that holds checkpoint ``path``, and its ``meta``; every file was compared with its checksum. Raises as ``load``."""
    path = Path(path)
    return _settled(path, lambda folder: (folder, _verified(folder, path, kind)["meta"]))


def _verified(folder: Path, path: Path, kind: str | None) -> dict[str, Any]:
    """The manifest, after each file was found to be what it says."""
    manifest = _manifest(folder, path)
    if kind is not None and manifest["kind"] != kind:
        raise ValueError(f"{path}: expected a checkpoint of kind {kind!r}, got {manifest['kind']!r}")
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{path}: corrupt checkpoint: {name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise ValueError(f"{path}: corrupt checkpoint: {name}: expected {expected['bytes']} bytes, got {file.stat().st_size}")
        if _sha256(file) != expected["sha256"]:
            raise ValueError(f"{path}: corrupt checkpoint: {name} does not match its checksum")
    return manifest


def kind_of(path: str | Path) -> str:
    """The kind of the checkpoint at ``path``, from its manifest alone. Raises as ``load``."""
    path = Path(path)
    return _settled(path, lambda folder: _manifest(folder, path)["kind"])


def meta_of(path: str | Path) -> dict[str, Any]:
    """What was stored beside the tensors, from the manifest alone. Raises as ``load``."""
    path = Path(path)
    return _settled(path, lambda folder: _manifest(folder, path)["meta"])


def clean(folder: str | Path) -> None:
    """Put things right after a kill in the middle of ``save``: restore a checkpoint that was moved aside, remove partial ones.

    For the one process that writes here, while it is not writing. Only what ``save`` leaves is touched.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    for aside in folder.glob(".*.previous"):
        if _is_checkpoint(aside):
            target = folder / aside.name.removeprefix(".").removesuffix(".previous")
            if target.exists():
                _discard(aside, target)
            else:
                aside.rename(target)
    for partial in folder.glob(".*.partial"):
        if _PARTIAL.fullmatch(partial.name) and _holds_nothing_else(partial, temporary=True):
            shutil.rmtree(partial, ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.parent / f".{path.name}.previous"


def _partial(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"


def _holds_nothing_else(path: Path, *, temporary: bool = False) -> bool:
    """A folder, no link, with nothing in it but a checkpoint's files: what may be removed without a loss.

    ``temporary``: files that safetensors was still writing count as such.
    """
    if path.is_symlink() or not path.is_dir():
        return False
    return all(
        p.is_file() and (p.name in _NAMES or p.suffix in _SUFFIXES or (temporary and p.name.startswith((".tmp", ".metadata."))))
        for p in path.iterdir()
    )


def _is_checkpoint(path: Path) -> bool:
    """One of ours, intact or not: others have a manifest.json too, so a look at how it begins."""
    if not _holds_nothing_else(path) or not (path / _MANIFEST).is_file():
        return False
    with (path / _MANIFEST).open("rb") as stream:
        return stream.read(12) == b'{"sha256": "'


def _check_replaceable(path: Path) -> None:
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty and not _is_checkpoint(path):
        raise ValueError(
            f"path: expected a new name or a checkpoint folder to replace, got {path}, which is neither or holds other files as well; "
            "choose another"
        )
    if _aside(path).exists() and not _is_checkpoint(_aside(path)):
        raise ValueError(f"path: {path} needs the name {_aside(path).name} beside it, which something else has; move that away")


def _standing(path: Path) -> tuple[Path, tuple[int, ...]]:
    """The folder that holds checkpoint ``path`` now, and what tells it from another of that name."""
    real = path.resolve()
    for folder in (real, _aside(real)) * 3:  # between two looks, a writer may move it either way
        try:
            status = folder.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return folder, (status.st_dev, status.st_ino, status.st_mtime_ns)
    raise FileNotFoundError(f"{path}: no such checkpoint")


def _settled(path: Path, read: Callable[[Path], T]) -> T:
    """``read`` the folder, once more where a writer replaced it meanwhile: an old manifest never meets new tensors."""
    while True:
        before = _standing(path)
        result, error = None, None
        try:
            result = read(before[0])
        except (OSError, ValueError) as caught:
            error = caught
        if _standing(path) == before:
            if error is not None:
                raise error
            return result


def _manifest(folder: Path, path: Path) -> dict[str, Any]:
    """The manifest in ``folder``; ``path`` is what the user calls it."""
    if not folder.is_dir():
        raise ValueError(f"{path}: expected a checkpoint folder, got a file; pass the folder that save_pretrained wrote")
    file = folder / _MANIFEST
    if not file.is_file():
        raise ValueError(f"{path}: expected a checkpoint folder, got one without {_MANIFEST}: half-written, or not of edlm")
    try:
        outer = json.loads(file.read_text(encoding="utf-8"))
        body = outer["manifest"]
        intact = _digest(body) == outer["sha256"]
        manifest = json.loads(body)
    except (json.JSONDecodeError, UnicodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: corrupt checkpoint: {_MANIFEST} cannot be read, or another program wrote it") from None
    if not intact:
        raise ValueError(f"{path}: corrupt checkpoint: {_MANIFEST} does not match its checksum")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path}: expected checkpoint format {FORMAT}, got {manifest['format']}; a newer edlm wrote it: upgrade")
    return manifest


def _replace(temporary: Path, path: Path) -> None:
    """A folder cannot replace a full one in one step, so the old one steps aside first: there ``load`` finds it after a kill."""
    aside = _aside(path)
    _check_replaceable(path)  # again: writing took its time
    try:
        if _is_checkpoint(path):
            _discard(aside, path)
            path.rename(aside)
        temporary.rename(path)
    except BaseException:
        if aside.exists() and not path.exists():
            aside.rename(path)
        raise
    _flush(path.parent)
    _discard(aside, path)


def _discard(aside: Path, path: Path) -> None:
    """Remove what stepped aside. It loses its name first: ``.previous`` is whole or not there."""
    if aside.exists():
        partial = _partial(path)
        aside.rename(partial)
        shutil.rmtree(partial, ignore_errors=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
