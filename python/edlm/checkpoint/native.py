"""A checkpoint is a folder: safetensors files and a manifest with their sizes and checksums. A leaf: it knows tensors, no networks.

It is written under a temporary name beside its place, flushed to the disk, and renamed: whoever looks sees the old folder or the new
one, whole. Reading verifies everything before a tensor is handed out. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

FORMAT = 1
_MANIFEST = "manifest.json"


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
        ValueError: ``path`` is something else than a checkpoint folder: it is left alone. OSError: the disk's own.
    """
    path = Path(path)
    if path.exists() and not _is_ours(path):
        raise ValueError(f"path: expected a new name or a checkpoint folder to replace, got {path}, which is neither; choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    temporary.mkdir()
    try:
        files = {}
        for stem, group in tensors.items():
            file = temporary / f"{stem}.safetensors"
            save_file({name: t.detach().cpu().contiguous().clone() for name, t in group.items()}, file)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            _flush(file)
        manifest = {"format": FORMAT, "kind": kind, "meta": meta, "files": files}
        body = json.dumps(manifest, indent=1, allow_nan=False)
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
    manifest = _manifest(path)
    if kind is not None and manifest["kind"] != kind:
        raise ValueError(f"{path}: expected a checkpoint of kind {kind!r}, got {manifest['kind']!r}")
    tensors = {}
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{path}: corrupt checkpoint: {name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise ValueError(f"{path}: corrupt checkpoint: {name}: expected {expected['bytes']} bytes, got {file.stat().st_size}")
        if _sha256(file) != expected["sha256"]:
            raise ValueError(f"{path}: corrupt checkpoint: {name} does not match its checksum")
        try:
            tensors[file.stem] = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{path}: corrupt checkpoint: {name}: {error}") from None
    return Checkpoint(manifest["kind"], manifest["meta"], tensors)


def kind_of(path: str | Path) -> str:
    """The kind of the checkpoint at ``path``, from its manifest alone. Raises as ``load``."""
    return _manifest(Path(path))["kind"]


def clean(folder: str | Path) -> None:
    """Put things right after a kill in the middle of ``save``: restore a folder that was moved aside, remove partial ones."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    for aside in folder.glob(".*.previous"):
        target = folder / aside.name.removeprefix(".").removesuffix(".previous")
        if target.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(target)
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    return path.is_dir() and ((path / _MANIFEST).is_file() or not any(path.iterdir()))


def _manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        clean(path.parent)  # a kill between the two renames of a replacement leaves the old one aside
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if not path.is_dir():
        raise ValueError(f"{path}: expected a checkpoint folder, got a file; pass the folder that save_pretrained wrote")
    file = path / _MANIFEST
    if not file.is_file():
        raise ValueError(f"{path}: expected a checkpoint folder, got one without {_MANIFEST}: half-written, or not of edlm")
    try:
        outer = json.loads(file.read_text(encoding="utf-8"))
        body = outer["manifest"]
        intact = _digest(body) == outer["sha256"]
        manifest = json.loads(body)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: corrupt checkpoint: {_MANIFEST} cannot be read") from None
    if not intact:
        raise ValueError(f"{path}: corrupt checkpoint: {_MANIFEST} does not match its checksum")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path}: expected checkpoint format {FORMAT}, got {manifest['format']}; a newer edlm wrote it: upgrade")
    return manifest


def _replace(temporary: Path, path: Path) -> None:
    """A folder cannot replace another in one step, so the old one steps aside first; ``clean`` brings it back after a kill."""
    aside = path.parent / f".{path.name}.previous"
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    temporary.rename(path)
    _flush(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


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
