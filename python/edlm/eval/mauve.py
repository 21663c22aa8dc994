"""MAUVE: how far two sets of texts are from each other in the eyes of a language model."""

from __future__ import annotations

import warnings

import torch

_FEWEST = 20  # two buckets of ten
_FEW = 100


def mauve(features_p: torch.Tensor, features_q: torch.Tensor, *, seed: int) -> float:
    """The MAUVE score of two sets of texts, in (0, 1]: 1 where they fall into the same clusters equally often.

    The features of both sets are scaled to length 1, reduced by PCA (90 % of the variance) and put into

        max(2, round(min(N_p, N_q) / 10))

    buckets by k-means; the score is the area under the curve of exp(-5 KL(Q | R)) and exp(-5 KL(P | R)), R = w P + (1 - w) Q, of
    the two histograms. It is all the package mauve-text's own choice, as in the paper.

    Higher is better: closer to the real text Q. It sees a set that is fluent but too much alike as well as one that is diverse but
    odd. It is gamed by copying training text, and sees of a text what the features hold, length and topic before grammar.

    The score depends on N, on the model and the position that the features come from, on the texts' lengths and on k-means' draws:
    compare scores of one N, one featuriser and one seed, and look at several seeds. None is comparable with a published one, which
    is of GPT-2 large and, in the paper, 5000 texts a side; with some hundred texts a score of the same two laws varies by several
    hundredths and lies below 1. The score of real text against other real text of the same N is the value to aim for.

    With some tens of texts there are a few clusters, into which sets that differ fall alike: the score is close to 1 whatever the
    texts, unless they have nothing in common.

    Args:
        features_p, features_q: floating [N_p, D] and [N_q, D], one row a text (the last hidden state of a language model), of at
            least 20 texts each. P is commonly the model's, Q the real text; the score is the same the other way round, up to
            k-means.
        seed: of PCA and k-means, 0 <= seed < 2**31 - 2.

    Raises:
        ValueError: other shapes or dtypes, too few texts, features that are not finite. ImportError: mauve-text is not installed.

    Warns below 100 texts in either set.
    Below 39 texts a bucket, which is always, k-means (faiss) says so on stderr: nothing is wrong.
    Source: Pillutla et al., arXiv 2102.01454.
    """
    for name, features in (("features_p", features_p), ("features_q", features_q)):
        if not isinstance(features, torch.Tensor) or not features.is_floating_point() or features.dim() != 2:
            got = f"{features.dtype} {list(features.shape)}" if isinstance(features, torch.Tensor) else type(features).__name__
            raise ValueError(f"{name}: expected floating [N, D], one row a text, got {got}")
        if len(features) < _FEWEST:
            raise ValueError(f"{name}: expected at least {_FEWEST} texts (some thousand for a steady score), got {len(features)}")
        if not bool(features.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got some that are not")
    if features_p.shape[1] != features_q.shape[1] or features_p.shape[1] == 0:
        raise ValueError(
            f"features_p, features_q: expected the same D >= 1, of one model, got {features_p.shape[1]} and {features_q.shape[1]}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31 - 2:
        raise ValueError(f"seed: expected an int in 0 .. 2**31 - 3, got {seed!r}")
    try:
        from mauve import compute_mauve
    except ImportError:
        raise ImportError("mauve needs the package mauve-text: pip install 'edlm-torch[metrics]'") from None
    if (fewest := min(len(features_p), len(features_q))) < _FEW:
        warnings.warn(
            f"mauve: {fewest} texts are few: their clusters are few too, and the score is close to 1 whatever the texts; take at least "
            f"{_FEW}, better some thousand, a side",
            stacklevel=2,
        )
    p, q = (features.detach().cpu().float().numpy() for features in (features_p, features_q))
    found = compute_mauve(p_features=p, q_features=q, seed=seed)
    if (found.p_hist == found.q_hist).all():
        return 1.0  # where rounding leaves the whole curve in one point, the package makes an area of 3/4 of it
    return min(float(found.mauve), 1.0)
