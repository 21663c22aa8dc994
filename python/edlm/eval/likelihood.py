"""Likelihood numbers with their standard errors: the NELBO of a denoiser, the negative log-likelihood of a causal model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..diffusion import LogLinearSchedule, MaskedDiffusion, NoiseSchedule, masked_nats
from ..diffusion.loss import step_weight
from ..diffusion.process import check_tokens, corruption_uniforms
from ..ops import Purpose, philox_uniform
from ..ops._philox import expand_seed
from ..protocols import CausalLM, Denoiser


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over independent sequences and its standard error (NaN for one sequence)."""

    mean: float
    stderr: float
    count: int  # sequences
    unit: str = "nats/token"

    @classmethod
    def of(cls, values: torch.Tensor, unit: str) -> Estimate:
        """The mean of one value a sequence, [N]; stderr = s / sqrt(N) with the N - 1 form of s."""
        values = values.double()
        count = values.numel()
        if count == 0:
            raise ValueError("values: expected at least one sequence, got none")
        stderr = float(values.std()) / math.sqrt(count) if count > 1 else math.nan
        return cls(mean=float(values.mean()), stderr=stderr, count=count, unit=unit)

    def _scaled(self, factor: float, unit: str) -> Estimate:
        if self.unit != "nats/token":
            raise ValueError(f"unit: expected an estimate in nats/token to convert, got {self.unit}")
        return Estimate(mean=self.mean * factor, stderr=self.stderr * factor, count=self.count, unit=unit)

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
        value = math.exp(nats.mean) if nats.mean < 700 else math.inf
        return Estimate(mean=value, stderr=value * nats.stderr, count=self.count, unit="perplexity")

    def __str__(self) -> str:
        return f"{self.mean:.4f} +- {self.stderr:.4f} {self.unit} ({self.count} sequences)"


@contextlib.contextmanager
def _evaluating(model: object) -> Iterator[torch.device | None]:
    """No gradients, dropout off, every submodule's mode put back. Gives the model's device, or None where it is no module."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    modes = [module.training for module in modules]
    if modules:
        modules[0].eval()
    try:
        with torch.no_grad():
            parameter = next(iter(modules[0].parameters()), None) if modules else None
            yield None if parameter is None else parameter.device
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training


def _check_data(x0: torch.Tensor, batch_size: int) -> None:
    check_tokens("x0", x0)
    if x0.numel() == 0:
        raise ValueError(f"x0: expected at least one token, got {list(x0.shape)}")
    _check_count("batch_size", batch_size)


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value!r}")


def _continuous(
    denoiser: Denoiser, x0: torch.Tensor, diffusion: MaskedDiffusion, seeds: torch.Tensor, draw: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """One draw a row of the continuous NELBO, in nats [R]: see ``nelbo`` for why t is an order statistic."""
    length = x0.shape[1]
    u = corruption_uniforms(len(x0), length, seed=seeds, offset=draw, device=x0.device)
    rank = (v * length).long().clamp_max(length - 1)  # num_masked - 1
    p = u.sort(1).values.gather(1, rank[:, None])  # the mask probability at which that many are masked
    inside = p[:, 0] <= 1 - diffusion.schedule.eps
    t = diffusion.schedule._time_of_mask_prob(p[:, 0].clamp_max(1 - diffusion.schedule.eps))
    xt = torch.where(u <= p, diffusion.mask_token_id, x0)
    return inside * masked_nats(denoiser, x0, xt, t).double() * (length / (rank + 1))


def _stepwise(
    denoiser: Denoiser,
    x0: torch.Tensor,
    diffusion: MaskedDiffusion,
    seeds: torch.Tensor,
    draw: torch.Tensor,
    v: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """One draw a row of the T-step NELBO, in nats [R]: step floor(T v), weighted by T."""
    index = (v * steps).long().clamp_max(steps - 1)
    t, s = (steps - index).double() / steps, (steps - index - 1).double() / steps
    xt = diffusion.q_sample(x0, t, seed=seeds, offset=draw)
    return steps * step_weight(diffusion, t, s) * masked_nats(denoiser, x0, xt, t).double()


def nelbo(
    denoiser: Denoiser,
    x0: torch.Tensor,
    *,
    schedule: NoiseSchedule | None = None,
    steps: int | None = None,
    num_times: int = 1,
    seed: int | torch.Tensor = 0,
    batch_size: int = 64,
) -> Estimate:
    """The NELBO of the proposal, an upper bound of -log p in expectation: nats per token, unbiased when eps = 0.

    Continuous time (``steps=None``) does not depend on the schedule while eps = 0. It is estimated as

        NELBO = L E_n E_{M : |M| = n} [ (1/n) sum over i in M of -log mu_i(x0_i | xt) ],    n uniform in 1 .. L,

    which is the integral of loss_weight(t) over t with t drawn, given that n positions are masked, from its own law: the n-th
    smallest of the positions' uniforms. A uniform t with weight 1/t has the same mean and a variance that diverges at t = 0; this
    one is finite. The denoiser sees the t that belongs to the draw. With eps > 0 the part of the integral beyond mask probability
    1 - eps is left out, and a perfect denoiser comes out below the entropy.

    ``steps=T`` is the T-step NELBO on the grid t_i = 1 - i/T, which bounds T-step sampling and does depend on the schedule.

    Args:
        denoiser: anything that fits the protocol. A torch module is put into eval mode, and its modes are restored.
        x0: int64 [N, L] without masks, moved to the module's device batch by batch.
        schedule: log-linear with eps = 0 if None.
        num_times: draws a sequence, stratified over n (or over the steps) within it.
        seed: an int s (sequence i draws with s + i) or int64 [N].
        batch_size: rows (sequence, draw) in one call. It does not change the draws.

    Returns:
        Estimate, its standard error over sequences. Sequences draw independently, so it is honest for independent ones;
        neighbouring pieces of one text are not quite that.

    Raises:
        ValueError: wrong shapes; masks in x0; counts below 1.

    RNG: Philox(seed[i]; 0, 0, 0, TIME) stratifies the draws k = 0, 1, ... of sequence i; draw k masks with
    Philox(seed[i]; position, 0, k, CORRUPT).
    Source: Sahoo et al., arXiv 2406.07524 (continuous-time NELBO); the form over n: Ou et al., arXiv 2406.03736.
    """
    _check_data(x0, batch_size)
    _check_count("num_times", num_times)
    if steps is not None:
        _check_count("steps", steps)
    diffusion = MaskedDiffusion(LogLinearSchedule(eps=0.0) if schedule is None else schedule, denoiser.mask_token_id)
    count, length = x0.shape
    values = torch.empty(count * num_times, dtype=torch.float64)
    with _evaluating(denoiser) as device:
        device = device or x0.device
        all_seeds = expand_seed(seed, count, device)
        for start in range(0, len(values), batch_size):
            row = torch.arange(start, min(start + batch_size, len(values)), device=device)
            draw, sequence = row % num_times, row // num_times
            seeds = all_seeds[sequence]
            u, _ = philox_uniform(seeds, purpose=Purpose.TIME)
            v = (u + draw) / num_times
            data = x0[sequence.to(x0.device)].to(device)
            if steps is None:
                nats = _continuous(denoiser, data, diffusion, seeds, draw, v)
            else:
                nats = _stepwise(denoiser, data, diffusion, seeds, draw, v, steps)
            values[start : start + batch_size] = nats.cpu()
    return Estimate.of(values.view(count, num_times).mean(1) / length, "nats/token")


def ar_nll(causal_lm: CausalLM, x0: torch.Tensor, *, batch_size: int = 64) -> Estimate:
    """-log p(x0) per token of a model that scores every token, in nats: exact for each sequence, standard error over sequences.

    It serves for data (the likelihood of an autoregressive model) and for samples (the score that a judge gives them).

    Args:
        causal_lm: ``log_probs(x0 [N, L]) -> [N, L]``. A torch module is put into eval mode, and its modes are restored.
        x0: int64 [N, L], moved to the module's device batch by batch. batch_size: sequences in one call.

    Raises:
        ValueError: wrong shapes, of the model's answer as well.
    """
    _check_data(x0, batch_size)
    values = []
    with _evaluating(causal_lm) as device:
        for tokens in x0.split(batch_size):
            log_probs = causal_lm.log_probs(tokens.to(device or x0.device))
            if log_probs.shape != tokens.shape:
                raise ValueError(
                    f"causal_lm: expected log_probs {list(tokens.shape)}, the first token's included, got {list(log_probs.shape)}"
                )
            values.append(-log_probs.double().mean(1).cpu())
    return Estimate.of(torch.cat(values), "nats/token")
