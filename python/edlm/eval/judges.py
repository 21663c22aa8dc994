"""Judges of generated text, each with a tokenizer of its own: what they return, and how texts become rows of tokens and scores.

All judges keep the same rules. A text is what a reader sees: special tokens that a sampler wrote are stripped before, and where a text
spells one ("<|endoftext|>") it is read as these characters. It is tokenised anew by the judge. Nothing is put behind it, and an end of
text is not scored. In front stands what the judge begins a text with, which each class names; with nothing in front, the first token
is read and not scored, and its characters do not count. A text longer than the judge's context is scored in consecutive pieces, each
of which begins anew. Padding is never scored. What a judge cannot read is not scored, and the reason is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from ..protocols import CausalLM, Tokenizer
from ..samplers.evaluating import evaluating
from .likelihood import check_causal_lm, device_of

_NOWHERE, _ELSEWHERE = "\uffff", "\ufdd0"  # no character: what a tokenizer makes of it, it makes of all that it does not know


@dataclass(frozen=True)
class Scores:
    """What a judge says of N texts: CPU tensors [N], 0 where a text was not scored.

    ``left_out`` is of what a judge cannot score (words that it does not know), for which it looks better: print the share. None where
    there is no such thing; a first token that is read and not scored is none either.
    """

    nats: torch.Tensor  # float64, -log p summed over the scored tokens
    tokens: torch.Tensor  # int64, the judge's own tokens that were scored
    characters: torch.Tensor  # int64, of the text, that the scored tokens cover
    reasons: tuple[str | None, ...]  # why a text was not scored; None where it was
    left_out: torch.Tensor | None = None  # int64, the judge's own tokens of scored texts that it could not score


@runtime_checkable
class Judge(Protocol):
    """Anything with a ``name``, as tables show it, and ``score(texts) -> Scores``."""

    name: str

    def score(self, texts: Sequence[str]) -> Scores: ...


@dataclass(frozen=True)
class Encoded:
    """A text in a judge's tokens."""

    ids: torch.Tensor  # int64 [L], L >= 1
    characters: torch.Tensor  # int64 [L], of the text, that each token adds


def check_texts(texts: Sequence[str]) -> None:
    """Raises ValueError unless this is a sequence of strings."""
    if isinstance(texts, str):
        raise ValueError("texts: expected a list of texts, got one str; put it into a list")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts: expected str, got {type(text).__name__} at {i}; decode tokens first")


def check_count(name: str, value: int) -> None:
    """Raises ValueError unless this is an int >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value!r}")


class LostCharacters:
    """Finds what a tokenizer does not know and does not raise for: what it drops, or replaces by an "unknown" token.

    Such a character could be replaced by one that does not exist, and the ids would be the same. Where a tokenizer makes no id of that,
    it drops what it does not know: then letters and digits count as lost, and the rest as normalised.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        self._encode = encode
        self._suspect: dict[str, bool] = {}  # by character: alone it may be lost, and yet be known inside a word

    def __call__(self, text: str) -> str | None:
        """The first character of ``text`` that is lost in it, or None."""
        if self._nowhere is None:
            return None
        for character in dict.fromkeys(text):
            if character not in self._suspect:
                counts = character.isalnum() or (bool(self._nowhere) and not character.isspace())
                self._suspect[character] = counts and self._ids(character) == self._nowhere
            other = _ELSEWHERE if character == _NOWHERE else _NOWHERE
            if self._suspect[character] and self._ids(text.replace(character, other)) == self._ids(text):
                return character
        return None

    def _ids(self, text: str) -> list[int]:
        return [int(i) for i in self._encode(text)]

    @cached_property
    def _nowhere(self) -> list[int] | None:
        """Ids of what no tokenizer knows; None where that raises: so will a text that holds something unknown."""
        try:
            return self._ids(_NOWHERE)
        except Exception:
            return None


def score_encoded(
    encoded: Sequence[Encoded | str],
    log_probs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    batch_size: int,
    piece: int | None,
    skip: int = 0,
) -> Scores:
    """Scores of tokenised texts: cut into pieces, sorted by length, padded on the right, summed in float64.

    Args:
        encoded: a text's tokens, or the reason why there are none.
        log_probs: of int64 [B, L], padded with 0, and of bool [B, L], True at tokens: float32 [B, L] in nats, 0 in the
            first ``skip`` columns and whatever at padding.
        batch_size: rows of a call. piece: tokens of a piece at most, or None for any number.
        skip: 1 where the first token of a piece cannot be scored, else 0.
    """
    count = len(encoded)
    reasons = [text if isinstance(text, str) else None for text in encoded]
    nats = torch.zeros(count, dtype=torch.float64)
    tokens, characters = (torch.zeros(count, dtype=torch.int64) for _ in range(2))
    rows: list[tuple[int, torch.Tensor]] = []
    for i, text in enumerate(encoded):
        if isinstance(text, str):
            continue
        size = piece or len(text.ids)
        parts = [*zip(text.ids.split(size), text.characters.split(size), strict=True)]
        tokens[i] = sum(len(ids) - skip for ids, _ in parts)
        if tokens[i] == 0:
            reasons[i] = "one token, with nothing in front of it"
            continue
        characters[i] = sum(int(added[skip:].sum()) for _, added in parts)
        rows += [(i, ids) for ids, _ in parts if len(ids) > skip]
    rows.sort(key=lambda row: len(row[1]))
    for begin in range(0, len(rows), batch_size):
        batch = [ids for _, ids in rows[begin : begin + batch_size]]
        padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        lengths = torch.tensor([len(ids) for ids in batch])
        real = torch.arange(padded.shape[1]) < lengths[:, None]
        scored = log_probs(padded, real)
        if scored.shape != padded.shape:
            raise ValueError(f"log_probs: expected {list(padded.shape)}, one for every token, got {list(scored.shape)}")
        sums = scored.cpu().double().masked_fill(~real, 0).sum(1)  # masked_fill: 0 times a NaN is none
        nats.index_add_(0, torch.tensor([i for i, _ in rows[begin : begin + batch_size]]), -sums)
    return Scores(nats, tokens, characters, tuple(reasons))


class TokenJudge:
    """A causal model and its tokenizer: ours, an n-gram model, or whatever fits the protocols. Every token is scored.

    In front stands what ``log_probs`` itself puts there: a CausalLM's BOS; an n-gram model has none and uses its shorter orders.

    A tokenizer may normalise: text8's lowers the case, spells out digits and makes everything else a space. What is scored, and what
    ``characters`` counts, is what it makes of a text. But a text is not scored where the tokenizer raises, where it drops a letter or
    digit, or replaces anything by an "unknown" token.

    Args:
        causal_lm: ``log_probs(int64 [B, L]) -> float32 [B, L]``. A module stays on its device; it is put into eval mode for each
            call, and its modes are put back.
        tokenizer: the one that it was trained with. name: as tables show it.
        batch_size: texts, or pieces, in one call.
        max_length: tokens of a piece at most; by default the model's own ``max_length``, or any number where it has none.

    Raises:
        ValueError: a model without ``log_probs``; counts below 1.
    """

    def __init__(
        self,
        causal_lm: CausalLM,
        tokenizer: Tokenizer,
        *,
        name: str,
        batch_size: int = 64,
        max_length: int | None = None,
    ) -> None:
        check_causal_lm(causal_lm)
        check_count("batch_size", batch_size)
        self.max_length = getattr(causal_lm, "max_length", None) if max_length is None else max_length
        if self.max_length is not None:
            check_count("max_length", self.max_length)
        self.causal_lm, self.tokenizer, self.name, self.batch_size = causal_lm, tokenizer, name, batch_size
        self._lost = LostCharacters(tokenizer.encode)

    def score(self, texts: Sequence[str]) -> Scores:
        """Scores of N texts. Raises ValueError for what is no list of texts; what the model raises goes through."""
        check_texts(texts)
        with torch.no_grad(), evaluating(self.causal_lm):
            return score_encoded(
                [self._encode(text) for text in texts],
                lambda ids, real: self.causal_lm.log_probs(ids.to(device_of(self.causal_lm, ids))),
                batch_size=self.batch_size,
                piece=self.max_length,
            )

    def _encode(self, text: str) -> Encoded | str:
        if not text:
            return "empty"
        try:
            ids = self.tokenizer.encode(text)
            lost = self._lost(text)
            characters = len(self.tokenizer.decode(ids))
        except Exception as error:  # tokenizers raise what they like, libraries plain Exceptions
            return f"cannot be encoded: {error}"
        if lost is not None:
            return f"cannot be encoded: {lost!r}"
        if len(ids) == 0:
            return "nothing that the tokenizer keeps"
        added = torch.zeros(len(ids), dtype=torch.int64)
        added[-1] = characters  # all of them are scored, whatever the pieces
        return Encoded(torch.from_numpy(np.asarray(ids, dtype=np.int64)), added)
