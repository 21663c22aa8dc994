"""Diversity of samples. Print it beside every score: a judge's perplexity alone is lowered by repeating oneself, and diversity
alone is raised by noise.

``tokens`` is everywhere int64 [N, L], or a sequence of int64 [L_i] for texts of different lengths (special tokens removed before).
Texts too short to be measured are left out, with one warning that counts them.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch

from ..diffusion.process import check_tokens
from .estimate import Estimate


def unigram_entropy(tokens: torch.Tensor | Sequence[torch.Tensor]) -> Estimate:
    """-sum_v f_v log2 f_v of each sequence's own token frequencies f, in bits; mean and standard error over sequences.

    At most log2(min(L, V)); 0 for a sequence of one repeated token. Higher is more diverse, and short of uniform noise that is highest
    of all: the goal is the value of real text of the same length, with which it grows. Blind to order: a shuffled text has the same.

    Args:
        tokens: int64 [N, L] or int64 [L_i] each, any ids. Empty sequences are left out with a warning.

    Raises:
        ValueError: wrong shapes or dtypes; no token.
    """
    values = []
    for sequence in _texts(tokens):
        f = sequence.unique(return_counts=True)[1].double() / sequence.numel()
        values.append(0.0 - (f * f.log2()).sum())
    return Estimate.of(torch.stack(values), "bits")


def distinct_n(tokens: torch.Tensor | Sequence[torch.Tensor], n: int) -> float:
    """Distinct n-grams over all n-grams of the samples taken together, in (0, 1]. n-grams do not cross sequences.

    Higher is more diverse; uniform noise comes closest to 1. It falls with the number of samples and with their length: compare
    sets of one size.

    Args:
        tokens: int64 [N, L] or int64 [L_i] each. Sequences shorter than n have no n-gram and are left out with a warning.
        n: 1 <= n <= the longest sequence.

    Raises:
        ValueError: wrong shapes or dtypes; no sequence of n tokens.
    Source: Li et al., arXiv 1510.03055 (distinct-1 and distinct-2).
    """
    grams = torch.cat([sequence.unfold(0, n, 1) for sequence in _texts(tokens, n)])
    return len(grams.unique(dim=0)) / len(grams)


def repetition(tokens: torch.Tensor | Sequence[torch.Tensor], n: int) -> Estimate:
    """seq-rep-n: the share of a sequence's n-grams that it has had before; mean and standard error over sequences, in [0, 1).

        1 - distinct n-grams / all n-grams    of each sequence by itself.

    Lower repeats less; uniform noise is lowest, so the goal is the value of real text of the same length, with which it grows. A
    model that writes one text again and again is not found out here: ``self_bleu`` and ``distinct_n`` see that.

    Args:
        tokens: int64 [N, L] or int64 [L_i] each. Sequences shorter than n are left out with a warning.
        n: 1 <= n <= the longest sequence; 4 is usual.

    Raises:
        ValueError: wrong shapes or dtypes; no sequence of n tokens.
    Source: Welleck et al., arXiv 1908.04319.
    """
    shares = []
    for sequence in _texts(tokens, n):
        grams = sequence.unfold(0, n, 1)
        shares.append(1 - len(grams.unique(dim=0)) / len(grams))
    return Estimate.of(torch.tensor(shares, dtype=torch.float64), f"repeated {n}-grams")


def self_bleu(tokens: torch.Tensor | Sequence[torch.Tensor], *, n: int = 4, max_texts: int = 200) -> Estimate:
    """Self-BLEU-n: each text's BLEU with all the other texts as its references; mean and standard error over texts, in [0, 1].

        BLEU = min(1, exp(1 - r / c)) (prod_{k = 1 .. n} p_k)^(1 / n),    c the text's length, r the closest of the others',

    p_k being the share of its k-grams found in the others, each counted at most as often as the one text with most of it has it.
    Of a p_k without a match the numerator is 0.1 (sacrebleu's smoothing "floor", NLTK's method 1, which Texygen uses); a text without
    any match scores 0; one shorter than n is scored by the orders that it has (effective order).

    Lower is more diverse, and noise is lowest. 1 is the same text again and again. It rises with the number of references, that is
    of texts, and with a smaller vocabulary: compare sets of one size under one tokenizer. Texts share their references, so they are
    not independent and the standard error is only a rough one.

    Args:
        tokens: int64 [N, L] or int64 [L_i] each. Empty sequences are left out with a warning.
        n: the highest order, >= 1.
        max_texts: >= 2; the first so many texts are taken, both as texts and as references.

    Raises:
        ValueError: wrong shapes or dtypes; fewer than two texts; counts too small. ImportError: sacrebleu is not installed.

    Cost: the n-grams are counted once, not once for every pair.
    Source: Zhu et al., arXiv 1802.01886 (Texygen); BLEU by sacrebleu (Post, arXiv 1804.08771).
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise ImportError("self_bleu needs the package sacrebleu: pip install 'edlm-torch[metrics]'") from None
    for name, value, least in (("n", n, 1), ("max_texts", max_texts, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
    texts = [text.tolist() for text in _texts(tokens)[:max_texts]]
    if len(texts) < 2:
        raise ValueError("tokens: expected at least two texts, got one: there is nothing to compare it with; draw more samples")
    counts = [Counter(tuple(text[i : i + k]) for k in range(1, n + 1) for i in range(len(text) - k + 1)) for text in texts]
    most: dict[tuple[int, ...], list[int]] = defaultdict(lambda: [0, 0])  # of each n-gram: the two largest counts in a text
    for own in counts:
        for gram, count in own.items():
            most[gram] = sorted((*most[gram], count))[1:]
    values = []
    for i, (text, own) in enumerate(zip(texts, counts, strict=True)):
        correct = [0] * n
        for gram, count in own.items():
            second, first = most[gram]
            correct[len(gram) - 1] += min(count, second if count == first else first)  # the most that another text has
        total = [max(len(text) - k + 1, 0) for k in range(1, n + 1)]
        closest = min(
            (len(other) for j, other in enumerate(texts) if j != i), key=lambda length: (abs(length - len(text)), length)
        )
        score = BLEU.compute_bleu(
            correct, total, len(text), closest, smooth_method="floor", smooth_value=0.1, effective_order=True, max_ngram_order=n
        )
        values.append(min(score.score / 100, 1.0))  # rounding
    return Estimate.of(torch.tensor(values, dtype=torch.float64), f"self-BLEU-{n}")


def _texts(tokens: torch.Tensor | Sequence[torch.Tensor], n: int = 1) -> list[torch.Tensor]:
    """The sequences of at least n tokens, on the CPU; one warning for those left out, ValueError if that is all."""
    if isinstance(tokens, torch.Tensor):
        check_tokens("tokens", tokens)
    else:
        for i, text in enumerate(tokens):
            if not isinstance(text, torch.Tensor) or text.dtype != torch.int64 or text.dim() != 1:
                got = f"{text.dtype} {list(text.shape)}" if isinstance(text, torch.Tensor) else type(text).__name__
                raise ValueError(
                    f"tokens: expected int64 tokens [L_i] each, got {got} as number {i}; torch.tensor(ids) makes one"
                )
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n: expected an int >= 1, got {n!r}")
    longest = max(map(len, tokens), default=0)
    if longest == 0:
        raise ValueError(f"tokens: expected at least one token, got none in {len(tokens)} sequences")
    if n > longest:
        raise ValueError(f"n: expected an int in 1 .. L = {longest}, the length of the longest sequence, got {n}")
    texts = [text.cpu() for text in tokens if len(text) >= n]
    if len(texts) < len(tokens):
        warnings.warn(
            f"tokens: {len(tokens) - len(texts)} of {len(tokens)} sequences left out: less than {n} tokens", stacklevel=3
        )
    return texts
