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
_DTYPES = tuple(np.dtype(t) for t in (np.uint8, np.uint16, np.uint32))


def _dtype(vocab_size: int) -> np.dtype:
    for dtype in _DTYPES:
        if vocab_size <= np.iinfo(dtype).max + 1:
            return dtype
    raise ValueError(f"tokenizer: expected a vocab_size of at most 2**32, got {vocab_size}")


def pack(text: str, tokenizer: Tokenizer, path: str | Path) -> np.ndarray:
    """Tokenise ``text`` into ``path`` (``.bin``, with ``path + ".json"`` beside it) and return it memory-mapped.

    A file that already holds this very text under this vocabulary is used as it is. Both files appear by renaming; the manifest comes
    last and names the checksum of the other, so that a half-written pair is never taken for a whole one.

    Raises:
        ValueError: the text has no token; the tokenizer returns ids outside its vocabulary, or the mask.
    """
    path = Path(path)
    source = hashlib.sha256(text.encode()).hexdigest()
    # Two tokenizers of one class may differ, in their merges for example; where they can say how, it counts.
    described = tokenizer.description() if hasattr(tokenizer, "description") else type(tokenizer).__name__
    wanted = {"format": FORMAT, "source": source, "vocab_size": tokenizer.vocab_size, "tokenizer": described}
    try:
        if json.loads(_manifest(path).read_text())["made_from"] == wanted:
            return open_tokens(path)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not whole: made anew
    ids = np.asarray(tokenizer.encode(text))
    if ids.size == 0:
        raise ValueError("text: expected at least one token, got none; is it empty, or in a script that the tokenizer drops?")
    # Cast to the file's type, an id beyond it would quietly become another.
    if int(ids.min()) < 0 or int(ids.max()) >= tokenizer.vocab_size or (ids == tokenizer.mask_token_id).any():
        raise ValueError(
            f"tokenizer: expected ids in 0 .. {tokenizer.vocab_size - 1} without the mask {tokenizer.mask_token_id}, "
            f"got {int(ids.min())} .. {int(ids.max())}{', the mask among them' if (ids == tokenizer.mask_token_id).any() else ''}"
        )
    raw = ids.astype(_dtype(tokenizer.vocab_size)).tobytes()
    manifest = {
        "made_from": wanted,
        "dtype": _dtype(tokenizer.vocab_size).name,
        "count": int(ids.size),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, raw)
    replace_file(_manifest(path), json.dumps(manifest, indent=1).encode())
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
        dtype, count, expected = {d.name: d for d in _DTYPES}[manifest["dtype"]], manifest["count"], manifest["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{_manifest(path)}: corrupt manifest; remove it, and the tokens are made anew") from None
    with path.open("rb") as stream:
        whole = hashlib.file_digest(stream, "sha256").hexdigest() == expected and stream.tell() == count * dtype.itemsize
    if not whole:
        raise ValueError(f"{path}: corrupt token file: it does not match its manifest; remove it, and it is made anew")
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,))


def _manifest(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def replace_file(path: Path, raw: bytes) -> None:
    """Whoever looks at ``path``, after a kill or a power cut as well, sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
