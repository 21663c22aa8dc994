"""Token files: ids in the smallest unsigned type, memory-mapped, with a manifest and a checksum."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path

import numpy as np

from ..protocols import Tokenizer

FORMAT = 1


def _dtype(vocab_size: int) -> np.dtype:
    return next(np.dtype(t) for t in (np.uint8, np.uint16, np.uint32) if vocab_size <= np.iinfo(t).max + 1)


def pack(text: str, tokenizer: Tokenizer, path: str | Path) -> np.ndarray:
    """Tokenise ``text`` into ``path`` (``.bin``, with ``path + ".json"`` beside it) and return it memory-mapped.

    A file that already holds this very text under this vocabulary is used as it is. Both files appear by renaming; the manifest comes
    last and names the checksum of the other, so that a half-written pair is never taken for a whole one.

    Raises:
        ValueError: the text has no token.
    """
    path = Path(path)
    source = hashlib.sha256(text.encode()).hexdigest()
    wanted = {"format": FORMAT, "source": source, "vocab_size": tokenizer.vocab_size, "tokenizer": type(tokenizer).__name__}
    try:
        if json.loads(_manifest(path).read_text())["made_from"] == wanted:
            return open_tokens(path)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not whole: made anew
    ids = np.asarray(tokenizer.encode(text))
    if ids.size == 0:
        raise ValueError("text: expected at least one token, got none; is it empty, or in a script that the tokenizer drops?")
    raw = ids.astype(_dtype(tokenizer.vocab_size)).tobytes()
    manifest = {
        "made_from": wanted,
        "dtype": _dtype(tokenizer.vocab_size).name,
        "count": int(ids.size),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, raw)
    _write(_manifest(path), json.dumps(manifest, indent=1).encode())
    return open_tokens(path)


def open_tokens(path: str | Path) -> np.ndarray:
    """The ids of a token file, memory-mapped read-only.

    Raises:
        FileNotFoundError: no such file. ValueError: it does not match its manifest: half-written or corrupt.
    """
    path = Path(path)
    if not path.exists() or not _manifest(path).exists():
        raise FileNotFoundError(f"{path}: expected a token file and {_manifest(path).name} beside it")
    try:
        manifest = json.loads(_manifest(path).read_text())
        dtype, count, expected = np.dtype(manifest["dtype"]), manifest["count"], manifest["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{_manifest(path)}: corrupt manifest; remove it, and the tokens are made anew") from None
    with path.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != expected:
            raise ValueError(f"{path}: corrupt token file: it does not match its checksum; remove it, and it is made anew")
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,))


def _manifest(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write(path: Path, raw: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
