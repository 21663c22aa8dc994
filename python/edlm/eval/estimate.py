"""A number with its standard error and its unit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over independent sequences and its standard error (NaN for one sequence).

    ``values`` are what it is the mean of, one a sequence, where they were kept: two models' figures on the same sequences are best
    compared by ``Estimate.of(a.values - b.values, a.unit)``, whose error is that of the difference. At one seed the figures share
    their draws as well: good for differences, while errors of figures at one seed do not add in quadrature.
    """

    mean: float
    stderr: float
    count: int  # sequences
    unit: str = "nats/token"
    values: torch.Tensor | None = field(default=None, repr=False, compare=False)  # float64 [count] on the CPU, in the unit

    @classmethod
    def of(cls, values: torch.Tensor, unit: str, *, shared_stderr: float = 0.0) -> Estimate:
        """The mean of one value a sequence, [N]; stderr = s / sqrt(N) with the N - 1 form of s.

        ``shared_stderr``: of something estimated that is in all values alike, so that their spread does not show it; added in
        quadrature.
        """
        values = values.detach().double().cpu()
        count = values.numel()
        if count == 0:
            raise ValueError("values: expected at least one sequence, got none")
        # An infinite value (what a model holds impossible) makes the mean infinite, and its error undefined.
        stderr = float(values.std()) / math.sqrt(count) if count > 1 else math.nan
        return cls(mean=float(values.mean()), stderr=math.hypot(stderr, shared_stderr), count=count, unit=unit, values=values)

    @classmethod
    def ratio(cls, numerator: torch.Tensor, denominator: torch.Tensor, unit: str) -> Estimate:
        """sum of numerators / sum of denominators, [N] each: nats of texts of different lengths by their tokens or characters.

        The standard error is the delta method's, sqrt(sum (a_i - r b_i)^2 N / (N - 1)) / sum b_i; with equal denominators it is
        ``of(numerator / denominator)``. The ratio of sums is biased by O(1 / N).
        """
        a, b = numerator.detach().double().cpu(), denominator.detach().double().cpu()
        count, total = a.numel(), float(b.sum())
        if count == 0 or a.shape != b.shape or not total > 0:
            raise ValueError(
                f"numerator, denominator: expected [N] each with N >= 1 and a denominator of sum > 0, got {list(a.shape)}, "
                f"{list(b.shape)} of sum {total}"
            )
        mean = float(a.sum()) / total
        spread = float((a - mean * b).square().sum())
        stderr = math.sqrt(spread * count / (count - 1)) / total if count > 1 else math.nan
        return cls(mean=mean, stderr=stderr, count=count, unit=unit)

    def _scaled(self, factor: float, unit: str) -> Estimate:
        if self.unit != "nats/token":
            raise ValueError(f"unit: expected an estimate in nats/token to convert, got {self.unit}")
        values = None if self.values is None else self.values * factor
        return Estimate(mean=self.mean * factor, stderr=self.stderr * factor, count=self.count, unit=unit, values=values)

    def bits_per_token(self) -> Estimate:
        return self._scaled(1 / math.log(2), "bits/token")

    def bits_per_character(self, characters_per_token: float = 1.0) -> Estimate:
        """Bits per character of the text; ``characters_per_token`` is 1 for a character tokenizer, else measured on that text."""
        if not characters_per_token > 0:
            raise ValueError(
                f"characters_per_token: expected a number > 0 (characters / tokens of the text), got {characters_per_token}"
            )
        return self._scaled(1 / (math.log(2) * characters_per_token), "bits/character")

    def perplexity(self) -> Estimate:
        """exp(nats per token); its standard error to first order. Of a NELBO it is an upper bound in expectation."""
        nats = self._scaled(1.0, "nats/token")
        value = math.inf if nats.mean >= 700 else math.exp(nats.mean)
        return Estimate(mean=value, stderr=value * nats.stderr, count=self.count, unit="perplexity")

    def __str__(self) -> str:
        error = "" if math.isnan(self.stderr) else f" +- {self.stderr:.4f}"  # nothing is known of one sequence's
        return f"{self.mean:.4f}{error} {self.unit} ({self.count} sequence{'' if self.count == 1 else 's'})"
