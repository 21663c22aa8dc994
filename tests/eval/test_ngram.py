"""The n-gram judge: a proper distribution in every context, Witten-Bell by hand, real text above shuffled. Fixed seeds."""

from __future__ import annotations

import inspect
import math
import textwrap
import time

import numpy as np
import pytest
import torch
from edlm.eval import NGramModel, ar_nll


def english() -> torch.Tensor:
    """Prose that every Python has: the docstrings of a few modules, lower-case letters and spaces, ids 0 .. 26."""
    text = " ".join(
        inspect.getdoc(m) or "" for m in (textwrap, inspect, math, torch.optim.Adam, torch.nn.Linear, np.einsum, np.pad)
    )
    letters = [ord(c) - 96 if "a" <= c <= "z" else 0 for c in text.lower()]
    return torch.tensor([c for i, c in enumerate(letters) if c or (i and letters[i - 1])])


def test_every_context_sums_to_one() -> None:
    rng = np.random.default_rng(0)
    vocab = 5
    text = rng.choice(vocab - 1, 400, p=[0.6, 0.25, 0.1, 0.05])  # id 4 never occurs
    model = NGramModel(text, vocab, order=4)
    contexts = rng.integers(0, vocab, (60, 6))
    contexts[:20] = [text[i : i + 6] for i in range(20)]  # contexts that were seen, beside many that were not
    for length in (0, 1, 2, 6):
        rows = np.concatenate([np.repeat(contexts[:, :length], vocab, 0), np.tile(np.arange(vocab), 60)[:, None]], 1)
        last = model.log_probs(torch.from_numpy(rows))[:, -1].double().exp().reshape(60, vocab)
        torch.testing.assert_close(last.sum(1), torch.ones(60, dtype=torch.float64), rtol=0, atol=1e-6)
        assert (last > 0).all()


def test_by_hand() -> None:
    """Text 0 0 1 0, V = 3. Unigrams: 3 and 1, T = 2. After 0: 0 once, 1 once, T = 2. After 1: 0 once, T = 1. After 2: none."""
    model = NGramModel(torch.tensor([0, 0, 1, 0]), 3, order=2)
    p1 = [(3 + 2 / 3) / 6, (1 + 2 / 3) / 6, (2 / 3) / 6]
    after0 = [(1 + 2 * p1[0]) / 4, (1 + 2 * p1[1]) / 4, 2 * p1[2] / 4]
    after1 = [(1 + p1[0]) / 2, p1[1] / 2, p1[2] / 2]
    rows = torch.tensor([[0, 1, 2, 2], [1, 0, 0, 1]])
    expected = torch.tensor([[p1[0], after0[1], after1[2], p1[2]], [p1[1], after1[0], after0[0], after0[1]]])
    got = model.log_probs(rows)
    assert got.dtype == torch.float32
    assert got.shape == rows.shape
    torch.testing.assert_close(got, expected.log())
    torch.testing.assert_close(model.log_probs(rows[:, :1]), expected[:, :1].log())


def test_sequences_do_not_run_into_each_other() -> None:
    apart = NGramModel(torch.tensor([[0, 1], [2, 0]]), 3, order=2)
    joined = NGramModel(torch.tensor([0, 1, 2, 0]), 3, order=2)
    row = torch.tensor([[1, 2]])
    assert apart.log_probs(row)[0, 1] < joined.log_probs(row)[0, 1]


def test_real_text_above_shuffled() -> None:
    text = english()
    assert len(text) > 10_000
    split = len(text) * 4 // 5 // 64 * 64
    model = NGramModel(text[:split], 27, order=5)
    real = text[split : split + (len(text) - split) // 64 * 64].view(-1, 64)
    shuffled = real.flatten()[torch.randperm(real.numel(), generator=torch.Generator().manual_seed(0))].view(-1, 64)
    a, b = ar_nll(model, real), ar_nll(model, shuffled)
    assert a.mean + 6 * math.hypot(a.stderr, b.stderr) < b.mean
    lower = ar_nll(NGramModel(text[:split], 27, order=1), real)
    assert a.mean + 6 * math.hypot(a.stderr, lower.stderr) < lower.mean < math.log(27)


def test_a_million_tokens_in_seconds() -> None:
    tokens = np.random.default_rng(0).integers(0, 27, 1_000_000)
    start = time.perf_counter()
    model = NGramModel(tokens, 27, order=6)
    assert time.perf_counter() - start < 20  # about 0.5 s on one free core
    assert ar_nll(model, torch.from_numpy(tokens[:2560]).view(10, 256)).mean < math.log(27)


def test_short_texts_and_errors() -> None:
    model = NGramModel(torch.tensor([1]), 2, order=3)  # no bigram at all
    torch.testing.assert_close(model.log_probs(torch.tensor([[1, 1, 0]])).exp(), torch.tensor([[0.75, 0.75, 0.25]]))
    assert model.log_probs(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4)
    with pytest.raises(ValueError, match=r"tokens: expected ids in 0 .. 1, got 0 .. 2"):
        model.log_probs(torch.tensor([[0, 2]]))
    with pytest.raises(ValueError, match="order: expected"):
        NGramModel(torch.tensor([1]), 50257, order=5)
    for order in (2.5, 0, True):
        with pytest.raises(ValueError, match=f"order: expected an int >= 1, got {order}"):
            NGramModel(torch.tensor([1]), 5, order=order)
    with pytest.raises(ValueError, match="vocab_size: expected an int >= 1, got 0"):
        NGramModel(torch.tensor([1]), 0)
    with pytest.raises(ValueError, match="at least one token"):
        NGramModel(torch.zeros(0, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match="expected integers"):
        NGramModel(torch.rand(5), 5)
