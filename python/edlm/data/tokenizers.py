"""Text to ids. ``CharTokenizer`` is text8's: a to z and the space, everything else spelled out or blank."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def normalize(text: str) -> str:
    """Text8 style: lower case, digits spelled out, anything but a-z a space, runs of spaces one space, none at the ends."""
    spelled = re.sub(r"[0-9]", lambda digit: f" {_DIGITS[int(digit[0])]} ", text.lower())
    return re.sub(r"[^a-z]+", " ", spelled).strip()


class CharTokenizer:
    """27 characters, ids 0 .. 26 (a .. z, then the space), and the mask, 27, shown as ``_``."""

    mask_token_id = 27
    vocab_size = 28
    bos_token_id = 27  # for a causal model: the mask's id, which no text holds
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
        return {"kind": "text8"}


def tokenizer_from(description: Mapping[str, Any] | None) -> CharTokenizer:
    """The tokenizer that ``description()`` described.

    Raises:
        ValueError: there is none, or it is of a kind that this version does not know.
    """
    if description is None:
        raise ValueError("tokenizer: the model was saved without one; pass tokenizer= to save_pretrained")
    if description.get("kind") != "text8":
        raise ValueError(f"tokenizer: expected the kind 'text8', got {description.get('kind')!r}")
    return CharTokenizer()
