"""A token folder: ids in the smallest unsigned type, in memory-mapped shards, with a manifest and checksums.

``00000.bin``, ``00001.bin``, ... hold the ids one after the other, in the byte order of the machine; ``manifest.json``, which is
written last, says what they were made from, how many there are, and the sha256 of each file and of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FORMAT = 2
MANIFEST = "manifest.json"
SHARD = re.compile(r"\d{5,}\.bin")
_DTYPES = {name: np.dtype(name) for name in ("uint8", "uint16", "uint32")}
_SEAL = "manifest_sha256"


class Tokens:
    """All ids of a token folder as one sequence: ``len(tokens)``, ``tokens[a:b]``; nothing is read before it is asked for.

    ``dtype``: of the ids. ``manifest``: what the folder's manifest says. ``fingerprint``: 16 hexadecimal digits that stand for the ids,
    their division into shards and the tokenizer.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.dtype = _DTYPES[manifest["dtype"]]
        shards = manifest["shards"]
        self._maps = [
            np.memmap(folder / s["file"], dtype=self.dtype, mode="r", shape=(s["count"],)).view(np.ndarray) for s in shards
        ]
        self._starts = np.cumsum([0, *(s["count"] for s in shards)])
        plain = json.dumps([manifest["dtype"], shards, manifest["made_from"]["tokenizer"]], sort_keys=True)
        self.fingerprint = hashlib.sha256(plain.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def characters_per_token(self) -> float:
        """Characters of the text that was read, for each id; separators and ends of text are ids and no characters."""
        return self.manifest["characters"] / max(1, len(self))

    def __getitem__(self, where: slice) -> np.ndarray:
        """Ids a .. b - 1, read-only where they lie in one shard (no copy). It costs O(b - a), and the search for a shard."""
        if not isinstance(where, slice) or where.step not in (None, 1):
            raise TypeError(f"tokens: expected a slice a:b without a step, got {where!r}")
        begin, end, _ = where.indices(len(self))
        if end <= begin:
            return np.empty(0, dtype=self.dtype)
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        last = int(np.searchsorted(self._starts, end, side="left")) - 1
        parts = [self._maps[i][max(0, begin - int(self._starts[i])) : end - int(self._starts[i])] for i in range(first, last + 1)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return _open_unverified, (self.folder,)


def open_tokens(folder: str | Path, *, verify: bool = True) -> Tokens:
    """The ids of a token folder, memory-mapped read-only.

    Args:
        verify: read every file once and compare its sha256 (some seconds a gigabyte); otherwise its size alone.

    Raises:
        FileNotFoundError: no such folder. ValueError: a file is missing, or does not match the manifest; the message names it.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    size = _DTYPES[manifest["dtype"]].itemsize
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        if not file.is_file():
            raise ValueError(f"{file}: expected a shard of {shard['count']} tokens, got no such file; {_remedy(folder)}")
        if (got := file.stat().st_size) != shard["count"] * size:
            raise ValueError(f"{file}: corrupt shard: expected {shard['count'] * size} bytes, got {got}; {_remedy(folder)}")
        if verify:
            with file.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != shard["sha256"]:
                    raise ValueError(f"{file}: corrupt shard: it does not match its checksum; {_remedy(folder)}")
    return Tokens(folder, manifest)


def _open_unverified(folder: Path) -> Tokens:
    return open_tokens(folder, verify=False)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, compared with its own checksum. Raises as ``open_tokens``."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: expected a token folder, got no such folder")
    file = folder / MANIFEST
    if not file.is_file():
        shards = folder.is_dir() and any(SHARD.fullmatch(path.name) for path in folder.iterdir())
        remedy = f"; {_remedy(folder)}" if shards else ""  # of something else nobody should be told to remove it
        raise ValueError(f"{folder}: expected a token folder, got one without {MANIFEST}, or a file{remedy}")
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError:
        raise ValueError(f"{file}: corrupt manifest: it cannot be read; {_remedy(folder)}") from None
    if not isinstance(manifest, dict) or not {_SEAL, "made_from"} <= manifest.keys():
        raise ValueError(f"{file}: expected a token folder, got the manifest of something else")
    if manifest.pop(_SEAL) != _digest(manifest):
        raise ValueError(f"{file}: corrupt manifest: it does not match its checksum; {_remedy(folder)}")
    if manifest["made_from"]["format"] != FORMAT:
        raise ValueError(f"{file}: expected format {FORMAT}, got {manifest['made_from']['format']}; {_remedy(folder)}")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Seal and write; by this the folder is whole."""
    replace_file(folder / MANIFEST, json.dumps(manifest | {_SEAL: _digest(manifest)}, indent=1).encode())


class ShardWriter:
    """Ids to ``00000.bin``, ``00001.bin``, ... in ``folder``, ``shard_tokens`` in each but the last. Raises the disk's OSErrors."""

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int) -> None:
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.shards: list[dict[str, Any]] = []  # those that are whole
        self.count = 0
        self._stream: BinaryIO | None = None
        self._in_shard = 0

    def write(self, ids: np.ndarray) -> None:
        """``ids``: [N] of ``dtype``."""
        while len(ids):
            if self._stream is None:
                self._stream, self._hash, self._in_shard = self._file().open("wb"), hashlib.sha256(), 0
            part, ids = np.split(ids, [self.shard_tokens - self._in_shard])
            raw = part.tobytes()
            self._stream.write(raw)
            self._hash.update(raw)
            self._in_shard += len(part)
            self.count += len(part)
            if self._in_shard == self.shard_tokens:
                self.finish()

    def finish(self) -> None:
        """Flush the shard that is open to the disk."""
        if self._stream is None:
            return
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.close()
        self.shards.append({"file": self._file().name, "count": self._in_shard, "sha256": self._hash.hexdigest()})

    def close(self) -> None:
        """Let go of the shard that is open, whole or not."""
        if self._stream is not None:
            stream, self._stream = self._stream, None
            stream.close()

    def _file(self) -> Path:
        return self.folder / f"{len(self.shards):05d}.bin"


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _remedy(folder: Path) -> str:
    return f"remove {folder} and build it again (edlm data build; a run makes its own anew)"


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
