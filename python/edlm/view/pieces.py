"""What a single token looks like. A token may be part of a word, or part of a character, or nothing that can be shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_LONGEST_JOIN = 6  # tokens: a character has at most four bytes, and its neighbours may share a token with it
REPLACEMENT = "\ufffd"  # what decoders give for bytes that are no character


def printable(text: str) -> str:
    """``text`` with its control characters visible, newlines and tabs kept: a NUL is U+2400, and no escape reaches a terminal.

    What has no picture (C1 controls, lone surrogates, which UTF-8 cannot hold) becomes U+FFFD.
    """
    return _UNPRINTABLE.sub(_picture, text)


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else REPLACEMENT


class Pieces(dict[int, str]):
    """Token id -> its printable text, decoded at first use.

    Decoders of the sentencepiece kind drop the space before a text's first word, so the text is that of a token after another.
    """

    def __init__(self, decode: Decode) -> None:
        super().__init__()
        self.decode = decode

    def __missing__(self, token: int) -> str:
        alone, twice = self.decode([token]), self.decode([token, token])
        if not isinstance(alone, str) or not isinstance(twice, str):
            raise ValueError(f"decode: expected the text of a list of token ids as a str, got {type(alone).__name__}")
        inside = twice[len(alone) :] if twice.startswith(alone) else ""
        self[token] = printable(inside or alone)
        return self[token]

    def text(self, tokens: Sequence[int], mask_token_id: int, hole: str = "\u2581") -> str:
        """The printable text of ``tokens``, decoded as a whole; each mask that is left is a ``hole``."""
        out: list[str] = []
        run: list[int] = []
        for token in [*tokens, mask_token_id]:
            if token != mask_token_id:
                run.append(token)
                continue
            out += [printable(self.decode(run)) if run else "", hole]
            run = []
        return "".join(out[:-1])

    def joins(self, tokens: Sequence[int], mask_token_id: int) -> list[tuple[int, int, str]]:
        """(first position, number of positions, text) where neighbours are characters together and none of them alone."""
        found, i = [], 0
        while i < len(tokens):
            step = 1
            if tokens[i] != mask_token_id and REPLACEMENT in self[tokens[i]]:
                for n in range(2, min(_LONGEST_JOIN, len(tokens) - i) + 1):
                    run = list(tokens[i : i + n])
                    if mask_token_id in run:
                        break
                    text = printable(self.decode(run))
                    if REPLACEMENT not in text:
                        found.append((i, n, text))
                        step = n
                        break
            i += step
        return found
