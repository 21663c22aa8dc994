"""Diversity metrics at known values. Deterministic."""

from __future__ import annotations

import math

import pytest
import torch
from edlm.eval import distinct_n, unigram_entropy


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
    with pytest.raises(ValueError, match="tokens: expected int64"):
        unigram_entropy(tokens[0])


def test_distinct_n() -> None:
    tokens = torch.tensor([[1, 2, 1, 2], [1, 2, 3, 3]])
    assert distinct_n(tokens, 1) == 3 / 8
    assert distinct_n(tokens, 2) == 4 / 6  # 12 21 12 | 12 23 33; 21 across the rows does not count
    assert distinct_n(tokens, 4) == 1
    with pytest.raises(ValueError, match=r"n: expected an int in 1 .. L = 4"):
        distinct_n(tokens, 5)
