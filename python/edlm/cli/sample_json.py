"""Samples as plain values: one document of everything, or one record a text. What is not finite becomes null."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..samplers import Particles, SampleOutput
from .printing import number

TABLES = ("ess", "log_Z", "energy")


def table(values: torch.Tensor) -> list[Any]:
    """Nested lists of a floating tensor of any shape."""

    def plain(value: Any) -> Any:
        return [plain(x) for x in value] if isinstance(value, list) else number(value)

    return plain(values.tolist())


def own_tokens(sample: SampleOutput) -> list[list[int]]:
    """The tokens of each sequence, up to its own end."""
    return [row[:length] for row, length in zip(sample.tokens.tolist(), sample.lengths.tolist(), strict=True)]


def records(
    sample: SampleOutput, *, indices: Sequence[int], seeds: Sequence[int], texts: Sequence[str], corrected: bool
) -> list[dict[str, Any]]:
    """One a text, of which every value is the text's own: those of a batch, or of a process, have no place there.

    Lists have an entry for each step in which the text had a part; ``nfe`` counts them, in the denoiser calls that it shared.
    """
    sample_tokens, times = own_tokens(sample), sample.step_times.cpu()
    columns = {name: getattr(sample, name).cpu() for name in (*TABLES, "num_candidates")}
    particles = sample.particles
    found = []
    for b, (index, seed, text, tokens) in enumerate(zip(indices, seeds, texts, sample_tokens, strict=True)):
        own = ~times[:, b].isnan()
        one = {"index": index, "seed": seed, "text": text, "length": len(tokens), "tokens": tokens}
        one |= {"nfe": int(own.sum()), "step_times": table(times[own, b])}
        if corrected:
            one["num_candidates"] = columns["num_candidates"][own, b].tolist()
            one |= {name: table(columns[name][own, b]) for name in TABLES}
        if particles is not None:
            one["particles"] = {
                "log_weights": table(particles.log_weights[b]),
                "log_Z": number(float(particles.log_Z[b])),
                "ess": table(particles.ess.cpu()[own, b]),
                "resampled": particles.resampled.cpu()[own, b].tolist(),
            }
        found.append(one)
    return found


def document(sample: SampleOutput, texts: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Everything; tables are [S][B], as those of SampleOutput."""
    particles = sample.particles
    return {
        "texts": list(texts),
        "tokens": own_tokens(sample),
        "lengths": sample.lengths.tolist(),
        "seeds": list(seeds),
        "nfe": sample.nfe,
        "energy_nfe": sample.energy_nfe,
        "step_times": table(sample.step_times),
        "num_candidates": sample.num_candidates.tolist(),
        **{name: table(getattr(sample, name)) for name in TABLES},
        "history": None if sample.history is None else sample.history.tolist(),
        "particles": None
        if particles is None
        else {
            "tokens": particles.tokens.tolist(),
            "log_weights": table(particles.log_weights),
            "log_Z": table(particles.log_Z),
            "ess": table(particles.ess),
            "resampled": particles.resampled.tolist(),
        },
        "stage_seconds": sample.stage_seconds,
    }


def together(samples: Sequence[SampleOutput], padding: int) -> SampleOutput:
    """Batches as one: tables as long as the longest, sequences padded with the id ``padding``, what was counted added up."""
    if len(samples) == 1:
        return samples[0]
    steps, width = max(len(s.step_times) for s in samples), max(s.tokens.shape[1] for s in samples)

    def rows(of: list[torch.Tensor], fill: float | bool) -> torch.Tensor:
        return torch.cat([torch.cat([x, x.new_full((steps - len(x), *x.shape[1:]), fill)]) for x in of], 1)

    def wide(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=padding)

    history = None
    if all(s.history is not None for s in samples):  # a batch that is done stays as it is
        states = [wide(s.history) for s in samples]
        history = torch.cat([torch.cat([h, h[-1:].expand(steps + 1 - len(h), -1, -1)]) for h in states], 1)
    particles = None
    parts = [s.particles for s in samples if s.particles is not None]
    if parts:
        particles = Particles(
            tokens=torch.cat([wide(p.tokens) for p in parts]),
            log_weights=torch.cat([p.log_weights for p in parts]),
            log_Z=torch.cat([p.log_Z for p in parts]),
            ess=rows([p.ess for p in parts], math.nan),
            resampled=rows([p.resampled for p in parts], False),
        )
    return SampleOutput(
        tokens=torch.cat([wide(s.tokens) for s in samples]),
        lengths=torch.cat([s.lengths for s in samples]),
        nfe=sum(s.nfe for s in samples),
        energy_nfe=sum(s.energy_nfe for s in samples),
        **{name: rows([getattr(s, name) for s in samples], math.nan) for name in (*TABLES, "step_times")},
        num_candidates=rows([s.num_candidates for s in samples], 0),
        history=history,
        particles=particles,
        stage_seconds={name: sum(s.stage_seconds[name] for s in samples) for name in samples[0].stage_seconds},
    )
