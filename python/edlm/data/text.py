"""Where text comes from: the package's own, or a file.

The bundled text is Jane Austen's "Pride and Prejudice" (1813), "Emma" (1815) and "Persuasion" (1817), in this order, case and
punctuation kept: 2 MB, in the public domain everywhere. The texts are those of the R package janeaustenr 1.0.0.
"""

from __future__ import annotations

import gzip
import lzma
import zlib
from importlib import resources
from pathlib import Path
from typing import NamedTuple

BUNDLED = "bundled"


class Splits(NamedTuple):
    train: str
    valid: str
    test: str


def bundled_text() -> str:
    """The text that comes with the package."""
    with resources.files("edlm.data").joinpath("austen.txt.xz").open("rb") as stream:
        return lzma.decompress(stream.read()).decode("utf-8")


def read_text(source: str | Path) -> str:
    """``"bundled"``, or a UTF-8 file: plain, ``.xz`` or ``.gz``; a byte order mark is dropped.

    Raises:
        FileNotFoundError: no such file. ValueError: not UTF-8, not what its ending says, or nothing but white space.
    """
    if source == BUNDLED:
        return bundled_text()
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"text: expected a file, got the folder {path}; name one of its files")
    if not path.exists():
        raise FileNotFoundError(f"text: expected a file or {BUNDLED!r}, got {path}, which does not exist")
    raw = path.read_bytes()
    try:
        if path.suffix == ".xz":
            raw = lzma.decompress(raw)
        elif path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"text: {path}: expected {path.suffix} data, got something else or a part of it: {error}") from None
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {path}: expected UTF-8, got other bytes at {error.start}; convert it first") from None
    if not text.strip():
        raise ValueError(f"text: {path}: expected text, got an empty file")
    return text


def split(text: str) -> Splits:
    """90 / 5 / 5 per cent, in order: what is validated and tested on comes after all that is trained on."""
    a, b = int(0.9 * len(text)), int(0.95 * len(text))
    return Splits(text[:a], text[a:b], text[b:])
