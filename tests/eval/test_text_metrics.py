"""Diversity metrics at known values. Deterministic."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from edlm.eval import distinct_n, unigram_entropy
from edlm.eval.text_metrics import repetition, self_bleu

NOTHING = torch.zeros(0, dtype=torch.int64)


def ragged(*rows: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=torch.int64) for row in rows]


def test_unigram_entropy() -> None:
    tokens = torch.tensor([[7, 7, 7, 7], [0, 1, 2, 3], [5, 5, 9, 9], [1, 1, 1, 4]])
    quarter = 0.25 * 2 + 0.75 * math.log2(4 / 3)
    values = torch.tensor([0.0, 2.0, 1.0, quarter], dtype=torch.float64)
    got = unigram_entropy(tokens)
    assert got.mean == pytest.approx(float(values.mean()))
    assert got.stderr == pytest.approx(float(values.std()) / 2)
    assert got.unit == "bits"
    assert got.count == 4
    assert unigram_entropy(torch.arange(1024)[None]).mean == pytest.approx(10)
    assert unigram_entropy(ragged([7], [0, 1, 2, 3], [5, 9])).values.tolist() == pytest.approx([0, 2, 1])
    with pytest.raises(ValueError, match="tokens: expected int64"):
        unigram_entropy(tokens[0])


def test_distinct_n() -> None:
    tokens = torch.tensor([[1, 2, 1, 2], [1, 2, 3, 3]])
    assert distinct_n(tokens, 1) == 3 / 8
    assert distinct_n(tokens, 2) == 4 / 6  # 12 21 12 | 12 23 33; 21 across the rows does not count
    assert distinct_n(tokens, 4) == 1
    assert distinct_n(ragged([1, 2, 1], [1, 2]), 2) == 2 / 3
    with pytest.raises(ValueError, match=r"n: expected an int in 1 .. L = 4"):
        distinct_n(tokens, 5)


def test_repetition() -> None:
    # bigrams: 12 21 12 21 | 12 23 34 45 | 77 77 77 77
    tokens = torch.tensor([[1, 2, 1, 2, 1], [1, 2, 3, 4, 5], [7, 7, 7, 7, 7]])
    got = repetition(tokens, 2)
    assert got.values.tolist() == pytest.approx([1 / 2, 0, 3 / 4])
    assert got.stderr == pytest.approx(float(torch.tensor([0.5, 0, 0.75]).std()) / math.sqrt(3))
    assert got.unit == "repeated 2-grams"
    assert repetition(tokens[:1].expand(4, -1), 5).mean == 0  # among texts, nothing is repetition
    assert repetition(ragged([1, 1, 1], [1, 2]), 1).values.tolist() == pytest.approx([2 / 3, 0])


def test_texts_of_different_lengths() -> None:
    """What is too short is counted in one warning; what is left is measured as if it had been alone."""
    pytest.importorskip("sacrebleu", reason="the extra metrics is not installed")
    whole = ragged([1, 2, 1, 2], [3, 3, 3], [4, 5])
    for metric in (unigram_entropy, lambda t: repetition(t, 1), lambda t: distinct_n(t, 1), self_bleu):
        with pytest.warns(UserWarning, match="tokens: 2 of 5 sequences left out: less than 1 tokens") as caught:
            got = metric([NOTHING, *whole, NOTHING])
        assert len(caught) == 1
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert got == metric(whole)
            rows = torch.tensor([[1, 2, 3], [3, 2, 2]])
            assert metric(rows) == metric(list(rows))
        for empty in ([], [NOTHING, NOTHING], torch.zeros(3, 0, dtype=torch.int64)):
            with pytest.raises(ValueError, match="tokens: expected at least one token, got none"):
                metric(empty)
        with pytest.raises(ValueError, match=r"tokens: expected int64 tokens \[L_i\] each, got torch.float32 \[3\] as number 1"):
            metric([whole[0], torch.zeros(3)])
        with pytest.raises(ValueError, match="got list as number 0"):
            metric([[1, 2]])
    with pytest.warns(UserWarning, match="1 of 3 sequences left out: less than 3 tokens"):
        assert repetition(whole, 3).count == 2
    with pytest.warns(UserWarning, match="1 of 3 sequences left out: less than 3 tokens"):
        assert distinct_n(whole, 3) == 1
    for n in (0, 5, True, 2.0):
        for metric in (repetition, distinct_n):
            with pytest.raises(ValueError, match="n: expected an int"):
                metric(whole, n)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_self_bleu_is_that_of_sacrebleu(n: int) -> None:
    """Against sacrebleu itself with all others as references, on texts of few ids, so that clipping and smoothing matter."""
    bleu = pytest.importorskip("sacrebleu", reason="the extra metrics is not installed").metrics.BLEU(
        tokenize="none", smooth_method="floor", smooth_value=0.1, effective_order=True, max_ngram_order=n
    )
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 2, 3, 9, 20, 20, 31, 5, 12, 12]
    texts = [torch.randint(6 if i % 2 else 40, (length,), generator=generator) for i, length in enumerate(lengths)]
    words = [" ".join(map(str, text.tolist())) for text in texts]
    expected = [bleu.sentence_score(words[i], words[:i] + words[i + 1 :]).score / 100 for i in range(len(words))]
    assert len({round(value, 6) for value in expected}) > 5 or n == 1
    got = self_bleu(texts, n=n)
    assert got.values.tolist() == pytest.approx(expected, rel=1e-12)
    assert got.unit == f"self-BLEU-{n}"
    assert self_bleu(texts, n=n, max_texts=4) == self_bleu(texts[:4], n=n) != got


def test_self_bleu_by_hand() -> None:
    pytest.importorskip("sacrebleu", reason="the extra metrics is not installed")
    # 1 2 3 4 beside 1 2 3 5: matches 3 of 4, 2 of 3, 1 of 2, and none of 1, smoothed to 0.1.
    near = (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** (1 / 4)
    assert self_bleu(torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])).values.tolist() == pytest.approx([near, near])
    # 1 1 1 beside 1 and 1 1: at most two of its three 1s count, and of its two bigrams one; the closest reference has 2 tokens.
    # 1 beside the others: all of its one token, but shorter than the closest, 2. 1 1: as long as needed, for 1 and 3 are as close.
    got = self_bleu(ragged([1, 1, 1], [1], [1, 1]), n=2).values.tolist()
    assert got == pytest.approx([math.sqrt(2 / 3 * 1 / 2), math.exp(1 - 2), 1])
    same, apart = torch.arange(8).expand(3, -1), torch.arange(24).view(3, 8)
    assert self_bleu(same).mean == pytest.approx(1, abs=1e-12) and self_bleu(same).values.max() <= 1
    assert self_bleu(apart).values.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="tokens: expected at least two texts, got one"):
        self_bleu(same[:1])
    with pytest.raises(ValueError, match="max_texts: expected an int >= 2, got 1"):
        self_bleu(same, max_texts=1)
    with pytest.raises(ValueError, match="n: expected an int >= 1, got 0"):
        self_bleu(same, n=0)
