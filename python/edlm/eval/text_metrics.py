"""Diversity of samples. Print it beside every score: a judge's perplexity alone is lowered by repeating oneself."""

from __future__ import annotations

import torch

from ..diffusion.process import check_tokens
from .likelihood import Estimate


def unigram_entropy(tokens: torch.Tensor) -> Estimate:
    """-sum_v f_v log2 f_v of each sequence's own token frequencies f, in bits; mean and standard error over sequences.

    At most log2(min(L, V)); 0 for a sequence of one repeated token.

    Args:
        tokens: int64 [N, L], any ids.

    Raises:
        ValueError: wrong shapes or dtypes; no token.
    """
    check_tokens("tokens", tokens)
    if tokens.numel() == 0:
        raise ValueError(f"tokens: expected at least one token, got {list(tokens.shape)}")
    values = []
    for sequence in tokens.cpu():
        f = sequence.unique(return_counts=True)[1].double() / sequence.numel()
        values.append(-(f * f.log2()).sum())
    return Estimate.of(torch.stack(values), "bits")


def distinct_n(tokens: torch.Tensor, n: int) -> float:
    """Distinct n-grams over all n-grams of the samples taken together, in (0, 1]. It falls with the number of samples: compare
    sets of one size. n-grams do not cross sequences.

    Args:
        tokens: int64 [N, L] with L >= n >= 1.
    """
    check_tokens("tokens", tokens)
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= tokens.shape[1] or len(tokens) == 0:
        raise ValueError(
            f"n: expected an int in 1 .. L = {tokens.shape[1]} and at least one sequence, got {n!r}, {len(tokens)} sequences"
        )
    grams = tokens.cpu().unfold(1, n, 1).reshape(-1, n)
    return len(grams.unique(dim=0)) / len(grams)
