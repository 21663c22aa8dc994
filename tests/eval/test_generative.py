"""Generative perplexity of a judge whose scores are given: figures by hand, skipped texts, what is refused. Deterministic."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from edlm.eval.generative import generative_perplexity
from edlm.eval.judges import Scores


class Table:
    """text -> (nats, tokens, characters), or a reason."""

    name = "table"

    def __init__(self, **rows):
        self.rows, self.left_out = rows, None

    def score(self, texts):
        rows = [self.rows[text] for text in texts]
        numbers = [(0, 0, 0) if isinstance(row, str) else row for row in rows]
        nats, tokens, characters = zip(*numbers, strict=True)
        reasons = tuple(row if isinstance(row, str) else None for row in rows)
        return Scores(
            torch.tensor(nats).double(), torch.tensor(tokens), torch.tensor(characters), reasons, left_out=self.left_out
        )


def test_by_hand():
    judge = Table(a=(6.0, 2, 9), b=(12.0, 6, 21))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = generative_perplexity(["a", "b"], judge)
    per_token = 18 / 8
    stderr = math.sqrt(((6 - 2 * per_token) ** 2 + (12 - 6 * per_token) ** 2) * 2) / 8
    assert got.perplexity.mean == pytest.approx(math.exp(per_token))
    assert got.perplexity.stderr == pytest.approx(math.exp(per_token) * stderr)
    assert got.bits_per_token.mean == pytest.approx(per_token / math.log(2))
    assert got.bits_per_token.stderr == pytest.approx(stderr / math.log(2))
    assert got.bits_per_character.mean == pytest.approx(18 / math.log(2) / 30)
    assert [got.perplexity.unit, got.bits_per_token.unit, got.bits_per_character.unit] == [
        "perplexity",
        "bits/token",
        "bits/character",
    ]
    assert (got.texts, got.skipped, got.reasons, got.left_out, got.perplexity.count) == (2, 0, {}, 0, 2)


def test_skipped_texts_are_counted_and_named():
    judge = Table(a=(6.0, 2, 9), b="no", c="empty", d=(1.0, 1, 1))
    judge.left_out = torch.tensor([1, 7, 0, 0, 0])
    with pytest.warns(UserWarning, match="table: 3 of 5 texts are not scored: 2 x empty; 1 x no$") as record:
        got = generative_perplexity(["a", "b", "c", "d", "c"], judge)
    assert len(record) == 1
    assert record[0].filename == __file__
    assert (got.texts, got.skipped, got.reasons) == (2, 3, {"empty": 2, "no": 1})
    assert list(got.reasons) == ["empty", "no"]
    assert got.bits_per_token.mean == pytest.approx(7 / 3 / math.log(2))
    assert got.perplexity.count == 2
    assert got.left_out == 1 / 4  # one of a's three; what was skipped does not count


def test_one_text_has_no_error():
    got = generative_perplexity(["a"], Table(a=(6.0, 2, 9)))
    assert got.perplexity.mean == pytest.approx(math.exp(3))
    assert math.isnan(got.perplexity.stderr)


def test_what_is_refused():
    with pytest.raises(ValueError, match="texts: expected at least one text, got none"):
        generative_perplexity([], Table())
    with pytest.raises(ValueError, match="texts: expected a list of texts, got one str"):
        generative_perplexity("a", Table())
    many = Table(a="1", b="2", c="3", d="4")
    with pytest.raises(
        ValueError, match=r"at least one that table can score, got 4 that it cannot: 1 x 1; 1 x 2; 1 x 3; \.\.\.$"
    ):
        generative_perplexity(["a", "b", "c", "d"], many)
    for bad in (math.inf, math.nan):
        judge = Table(a=(6.0, 2, 9), b=(bad, 6, 21))
        with pytest.raises(ValueError, match=rf"judge: expected finite scores of table, got {bad} nats for texts\[1\]; take"):
            generative_perplexity(["a", "b"], judge)
        with pytest.raises(ValueError, match=r"for texts\[1\] and 1 more; take"):
            generative_perplexity(["a", "b", "b"], judge)
    short = Table(a=(6.0, 2, 9))
    short.score = lambda texts, score=short.score: score(texts[:1])
    with pytest.raises(ValueError, match="judge: expected 2 scores of table, one a text, got"):
        generative_perplexity(["a", "a"], short)
