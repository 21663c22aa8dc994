"""Text to ids. ``CharTokenizer`` is text8's: a to z and the space, everything else spelled out or blank. bpe.py has the other kind.

What packing asks of a tokenizer besides the protocol, all of it optional: ``eos_token_id``, put after every document; or
``separator_id``, put between two documents, with the promise that ``encode(a + white space + b)`` is encode(a), the separator,
encode(b); ``encode_batch``; ``description()``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..protocols import Tokenizer

if TYPE_CHECKING:
    from .bpe import BPETokenizer

TEXT8 = "text8"
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FILES = (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe"))  # GPT-2's two, under either of their names


def normalize(text: str) -> str:
    """Text8 style: lower case, digits spelled out, anything but a-z a space, runs of spaces one space, none at the ends."""
    spelled = re.sub(r"[0-9]", lambda digit: f" {_DIGITS[int(digit[0])]} ", text.lower())
    return re.sub(r"[^a-z]+", " ", spelled).strip()


def smallest_dtype(vocab_size: int) -> np.dtype:
    """uint8, uint16 or uint32: the first that holds the ids 0 .. ``vocab_size`` - 1. Raises ValueError beyond 2**32 of them."""
    for dtype in map(np.dtype, (np.uint8, np.uint16, np.uint32)):
        if vocab_size <= np.iinfo(dtype).max + 1:
            return dtype
    raise ValueError(f"tokenizer: expected a vocab_size of at most 2**32, got {vocab_size}")


class CharTokenizer:
    """27 characters, ids 0 .. 26 (a .. z, then the space), and the mask, 27, shown as ``_``."""

    mask_token_id = 27
    vocab_size = 28
    bos_token_id = 27  # for a causal model: the mask's id, which no text holds
    separator_id = 26
    _SYMBOLS = "abcdefghijklmnopqrstuvwxyz _"

    def encode(self, text: str) -> np.ndarray:
        """uint8 ids of the normalised text."""
        codes = np.frombuffer(normalize(text).encode("ascii"), dtype=np.uint8)
        return np.where(codes == ord(" "), 26, codes - ord("a")).astype(np.uint8)

    def encode_prompt(self, text: str) -> np.ndarray:
        """As ``encode``, but ``_`` becomes the mask and spaces are kept as they are: one id a character.

        Raises:
            ValueError: a character that is neither a-z, space nor ``_`` (upper case is lowered first).
        """
        lowered = text.lower()
        for i, character in enumerate(lowered):
            if character not in self._SYMBOLS:
                raise ValueError(f"prompt: expected a-z, spaces and _ (the mask), got {character!r} at position {i}")
        return np.array([self._SYMBOLS.index(c) for c in lowered], dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        """Raises ValueError for an id outside 0 .. 27."""
        out = []
        for i in ids:
            if not 0 <= int(i) < self.vocab_size:
                raise ValueError(f"ids: expected 0 .. {self.vocab_size - 1}, got {int(i)}")
            out.append(self._SYMBOLS[int(i)])
        return "".join(out)

    def description(self) -> dict[str, Any]:
        """Plain values that ``tokenizer_from`` turns back into this tokenizer; stored with a model."""
        return {"kind": TEXT8}


def tokenizer_from(description: Mapping[str, Any] | None) -> CharTokenizer | BPETokenizer:
    """The tokenizer that ``description()`` described.

    Raises:
        ValueError: there is none, or it is of a kind that this version does not know. ImportError: it needs an extra.
    """
    if description is None:
        raise ValueError("tokenizer: the model was saved without one; pass tokenizer= to save_pretrained")
    kind = description.get("kind")
    if kind == TEXT8:
        return CharTokenizer()
    if kind == "bpe":
        from .bpe import BPETokenizer

        return BPETokenizer(description["tokenizer"], end_of_text=description["end_of_text"])
    raise ValueError(f"tokenizer: expected the kind 'text8' or 'bpe', got {kind!r}")


def fingerprint(tokenizer: Tokenizer) -> str:
    """16 hexadecimal digits of the sha256 of what the tokenizer says of itself: its ``description()``, its size and its mask.

    One without ``description()`` is known by the name of its class: two of one class that differ should describe themselves.
    """
    described = tokenizer.description() if hasattr(tokenizer, "description") else f"{type(tokenizer).__qualname__}"
    plain = json.dumps([described, tokenizer.vocab_size, tokenizer.mask_token_id], sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def open_tokenizer(spec: str | Path) -> CharTokenizer | BPETokenizer:
    """``"text8"``; a ``tokenizer.json``; or a folder with one, or with GPT-2's vocab.json and merges.txt (encoder.json, vocab.bpe).

    Raises:
        FileNotFoundError, ValueError: no such thing, or something else; the message says what was expected.
    """
    if str(spec) == TEXT8:
        return CharTokenizer()
    path = Path(spec)
    if not path.exists():
        raise FileNotFoundError(f"tokenizer: expected {TEXT8!r}, a tokenizer.json or a folder with one, got {path}: no such file")
    from .bpe import BPETokenizer

    if not path.is_dir():
        return BPETokenizer.from_file(path)
    if (path / "tokenizer.json").exists():
        return BPETokenizer.from_file(path / "tokenizer.json")
    found = [next((path / name for name in names if (path / name).exists()), None) for names in _FILES]
    if None in found:
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"tokenizer: expected in {path} a tokenizer.json, or vocab.json (or encoder.json) and merges.txt (or vocab.bpe), "
            f"got {inside}"
        )
    return BPETokenizer.from_files(*found)
