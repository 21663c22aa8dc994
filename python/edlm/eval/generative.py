"""Generative perplexity: how likely a judge finds texts that something else wrote."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .estimate import Estimate
from .judges import Judge, Scores, check_texts


@dataclass(frozen=True)
class GenerativePerplexity:
    """A judge's figures for a set of texts, their standard errors over texts; ``texts`` were scored, ``skipped`` were not."""

    perplexity: Estimate
    bits_per_token: Estimate  # the judge's own tokens: not comparable between judges
    bits_per_character: Estimate
    texts: int
    skipped: int
    reasons: dict[str, int]  # why texts were skipped, the most frequent first
    left_out: float = 0.0  # share of the scored texts' tokens that the judge could not score; it makes the figures look better


def generative_perplexity(texts: Sequence[str], judge: Judge) -> GenerativePerplexity:
    """exp(sum of nats / sum of tokens) over the texts that the judge can score, and the same in bits per token and character.

    A text counts by its length; the standard errors are the delta method's for ratios of sums over independent texts. Low values can
    be had by repeating what is likely: print the texts' entropy beside them, and the same figures for real text of the same length.
    Bits per character stand beside perplexity because a token of garbage is short: shuffled characters have a lower perplexity than
    shuffled words, and more bits per character.

    Args:
        texts: N strings without special tokens.
        judge: see ``edlm.eval.judges`` for how texts are tokenised and scored.

    Raises:
        ValueError: no text; none that the judge can score; a judge whose scores are not finite. The last is not skipped: a text that
            a judge finds impossible must not make the samples look better by dropping out.

    Warns once, with the reasons, where texts were skipped.

    Source: as a figure for samples of diffusion models, with GPT-2 large as the judge: Lou et al., arXiv 2310.16834; Sahoo et al.,
    arXiv 2406.07524.
    """
    check_texts(texts)
    if len(texts) == 0:
        raise ValueError("texts: expected at least one text, got none")
    scores = judge.score(texts)
    _check_scores(judge.name, scores, len(texts))
    reasons = dict(Counter(reason for reason in scores.reasons if reason is not None).most_common())
    skipped = sum(reasons.values())
    summary = "; ".join(f"{number} x {reason}" for reason, number in [*reasons.items()][:3]) + (
        "; ..." if len(reasons) > 3 else ""
    )
    if skipped == len(texts):
        raise ValueError(f"texts: expected at least one that {judge.name} can score, got {len(texts)} that it cannot: {summary}")
    if skipped:
        warnings.warn(f"{judge.name}: {skipped} of {len(texts)} texts are not scored: {summary}", stacklevel=2)
    scored = [i for i, reason in enumerate(scores.reasons) if reason is None]
    nats, tokens, characters = (x[scored] for x in (scores.nats, scores.tokens, scores.characters))
    per_token = Estimate.ratio(nats, tokens, "nats/token")
    left_out = 0 if scores.left_out is None else int(scores.left_out[scored].sum())
    return GenerativePerplexity(
        perplexity=per_token.perplexity(),
        bits_per_token=per_token.bits_per_token(),
        bits_per_character=Estimate.ratio(nats / math.log(2), characters, "bits/character"),
        texts=len(scored),
        skipped=skipped,
        reasons=reasons,
        left_out=left_out / (left_out + int(tokens.sum())),
    )


def _check_scores(name: str, scores: Scores, count: int) -> None:
    sizes = [len(x) for x in (scores.nats, scores.tokens, scores.characters, scores.reasons)]
    if sizes != [count] * 4:
        raise ValueError(
            f"judge: expected {count} scores of {name}, one a text, got {sizes} nats, tokens, characters and reasons"
        )
    bad = (~scores.nats.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"judge: expected finite scores of {name}, got {float(scores.nats[bad[0]])} nats for texts[{bad[0]}]"
            f"{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}; take a judge that finds no text impossible, in float32"
        )
