"""Likelihood numbers with their standard errors: the NELBO of a denoiser, the negative log-likelihood of a causal model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..diffusion import LogLinearSchedule, MaskedDiffusion, NoiseSchedule, masked_nats
from ..diffusion.loss import step_weight
from ..diffusion.process import check_tokens, corruption_uniforms
from ..ops import Purpose, philox_uniform
from ..ops._philox import expand_seed
from ..protocols import CausalLM, Denoiser, EnergyModel, offers_head
from ..samplers.arguments import check_denoiser, check_energy
from ..samplers.evaluating import evaluating
from .estimate import Estimate


def device_of(model: object, x0: torch.Tensor) -> torch.device:
    """That of a module's parameters; where it has none, or is no module, that of the data."""
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    return x0.device if parameter is None else parameter.device


def check_data(x0: torch.Tensor, **counts: int) -> None:
    check_tokens("x0", x0)
    if x0.numel() == 0:
        raise ValueError(f"x0: expected at least one token, got {list(x0.shape)}")
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an int >= 1, got {value!r}")


def _takes(call: object, count: int) -> bool:
    """Whether it can be called with so many arguments, as far as it says."""
    try:
        inspect.signature(call.forward if isinstance(call, torch.nn.Module) else call).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # a callable without a signature
        pass
    return True


def check_causal_lm(causal_lm: CausalLM) -> None:
    if not callable(getattr(causal_lm, "log_probs", None)):  # isinstance misses what a wrapper hands on
        raise ValueError(
            f"causal_lm: expected log_probs(x0 [N, L]) -> [N, L] (edlm.protocols.CausalLM), got {type(causal_lm).__name__}; "
            "edlm.eval.nelbo is for denoisers"
        )


def check_denoising(name: str, tokens: torch.Tensor, denoiser: Denoiser, *energy: EnergyModel) -> None:
    """Raises ValueError unless each is what ``generate`` takes in its place, and reads so many tokens ([N, L], called ``name``)."""
    if not _takes(denoiser.hidden if offers_head(denoiser) else denoiser, 2):
        raise ValueError(
            "denoiser: expected a callable xt, t -> logits, or hidden and head (edlm.protocols.Denoiser), got "
            f"{type(denoiser).__name__}; an energy comes behind the denoiser, and edlm.eval.ar_nll is for autoregressive models"
        )
    vocabulary = check_denoiser(denoiser)
    check_length(name, tokens, "denoiser", denoiser)
    for model in energy:
        check_energy(model, 1.0, *vocabulary)
        if not _takes(model, 4):
            raise ValueError(
                "energy: expected a callable x0, xt, t, log_p -> [B, K] (edlm.protocols.EnergyModel), got "
                f"{type(model).__name__}; a denoiser comes before its energy"
            )
        check_length(name, tokens, "energy", model)


def check_length(name: str, tokens: torch.Tensor, whose: str, network: object) -> None:
    most = getattr(network, "max_length", None)
    if most is not None and tokens.shape[1] > most:
        raise ValueError(
            f"{name}: expected at most {most} tokens a sequence (max_length of the {whose}), got {tokens.shape[1]}; cut the text into "
            "shorter sequences"
        )


def _scored(given: torch.Tensor | None, x0: torch.Tensor) -> torch.Tensor:
    """int64 [N] on x0's device: how many positions of each sequence are scored."""
    if given is None:
        return torch.full((len(x0),), x0.shape[1], device=x0.device)
    if not isinstance(given, torch.Tensor) or given.dtype != torch.bool or given.shape != x0.shape:
        got = f"{given.dtype} {list(given.shape)}" if isinstance(given, torch.Tensor) else type(given).__name__
        raise ValueError(f"given: expected bool [N, L] = {list(x0.shape)}, True where a position is not scored, got {got}")
    count = (~given).sum(1)
    if not bool((count > 0).all()):
        raise ValueError(
            f"given: expected a position to score in every sequence, got none in {int((count == 0).sum())} of {len(x0)}; leave them out"
        )
    return count.to(x0.device)


def ordered_masks(u: torch.Tensor, count: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """n = floor(v count) + 1 float64 [R], and the n-th smallest u of each row, float64 [R, 1]: where u <= that, n are masked.

    u: float64 [R, L], above 1 where a position is never masked; count: int64 [R], how many are not; v: float64 [R] in [0, 1].
    """
    rank = torch.minimum((v * count).long(), count - 1)
    return rank + 1.0, u.sort(1).values.gather(1, rank[:, None])


def _continuous(
    denoiser: Denoiser, x0: torch.Tensor, diffusion: MaskedDiffusion, u: torch.Tensor, count: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """One draw a row of the continuous NELBO, in nats [R]: see ``nelbo`` for why t is an order statistic."""
    most = 1 - diffusion.schedule.eps
    n, p = ordered_masks(u, count, v)  # p: the mask probability at which that many are masked
    t = diffusion.schedule._time_of_mask_prob(p[:, 0].clamp_max(most))
    xt = torch.where(u <= p, diffusion.mask_token_id, x0)
    return (p[:, 0] <= most) * masked_nats(denoiser, x0, xt, t).double() * (count / n)


def _stepwise(
    denoiser: Denoiser, x0: torch.Tensor, diffusion: MaskedDiffusion, u: torch.Tensor, v: torch.Tensor, steps: int
) -> torch.Tensor:
    """One draw a row of the T-step NELBO, in nats [R]: step floor(T v), weighted by T."""
    index = (v * steps).long().clamp_max(steps - 1)
    t, s = (steps - index).double() / steps, (steps - index - 1).double() / steps
    xt = torch.where(u < diffusion.schedule._mask_prob(t)[:, None], diffusion.mask_token_id, x0)
    return steps * step_weight(diffusion, t, s) * masked_nats(denoiser, x0, xt, t).double()


def nelbo(
    denoiser: Denoiser,
    x0: torch.Tensor,
    *,
    schedule: NoiseSchedule | None = None,
    steps: int | None = None,
    num_times: int = 1,
    given: torch.Tensor | None = None,
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
        given: bool [N, L] or None: positions that are never masked, and not scored. The figure is then a bound of -log p(the others |
            these), a token being one of the others, and L the number of them.
        seed: an int s (sequence i draws with s + i) or int64 [N]. Ints closer than N share draws among sequences: repeat with seeds N
            apart.
        batch_size: rows (sequence, draw) in one call. It does not change the draws.

    Returns:
        Estimate, its standard error over sequences, with one value a sequence. Sequences draw independently, so the error is honest for
        independent ones; neighbouring pieces of one text are not quite that.

    Raises:
        ValueError: no denoiser; wrong shapes; sequences longer than its ``max_length``; masks in x0; counts below 1; a sequence of
            which nothing is scored; log-probabilities that are NaN.

    RNG: draw k = 0, 1, ... of sequence i lies at (k + u) / num_times of the range of n, u from Philox(seed[i]; 0, 0, k, TIME), and
    masks with Philox(seed[i]; position, 0, k, CORRUPT).
    Source: Sahoo et al., arXiv 2406.07524 (continuous-time NELBO); the form over n: Ou et al., arXiv 2406.03736.
    """
    check_data(x0, num_times=num_times, batch_size=batch_size, **({} if steps is None else {"steps": steps}))
    check_denoising("x0", x0, denoiser)
    scored = _scored(given, x0)
    given = None if given is None else given.to(x0.device)
    diffusion = MaskedDiffusion(LogLinearSchedule(eps=0.0) if schedule is None else schedule, denoiser.mask_token_id)
    values = torch.empty(len(x0) * num_times, dtype=torch.float64)
    with torch.no_grad(), evaluating(denoiser):
        for rows in draws_of(x0, num_times, seed, batch_size, device_of(denoiser, x0)):
            u = rows.u
            if given is not None:
                u = u.masked_fill(given[rows.where].to(u.device), 2.0)
            if steps is None:
                nats = _continuous(denoiser, rows.x0, diffusion, u, scored[rows.where].to(u.device), rows.v)
            else:
                nats = _stepwise(denoiser, rows.x0, diffusion, u, rows.v, steps)
            values[rows.place] = nats.cpu()
            if bool(values[rows.place].isnan().any()):
                raise ValueError(
                    "denoiser: expected log-probabilities, got NaN, of logits that are NaN or +inf, or none of them finite; its "
                    "weights or its dtype are to blame"
                )
    return Estimate.of(values.view(len(x0), num_times).mean(1) / scored.cpu(), "nats/token")


class Draws(NamedTuple):
    """Rows of a Monte Carlo over (sequence, draw), R of them, on the model's device but for ``where``."""

    place: slice  # of the rows among all N x num_times
    where: torch.Tensor  # int64 [R] on the data's device: the sequence of each
    x0: torch.Tensor  # int64 [R, L]
    seeds: torch.Tensor  # int64 [R]
    draw: torch.Tensor  # int64 [R]: the number of the draw within its sequence
    u: torch.Tensor  # float64 [R, L]: the mask probability from which on each position is masked
    v: torch.Tensor  # float64 [R] in [0, 1]: of the draws of a sequence, one in each of num_times equal parts


def draws_of(
    x0: torch.Tensor, num_times: int, seed: int | torch.Tensor, batch_size: int, device: torch.device
) -> Iterator[Draws]:
    """The draws in batches. A draw depends on its sequence's seed and its own number, not on its batch."""
    seeds = expand_seed(seed, len(x0), device)
    for start in range(0, len(x0) * num_times, batch_size):
        row = torch.arange(start, min(start + batch_size, len(x0) * num_times), device=device)
        draw, sequence = row % num_times, row // num_times
        own = seeds[sequence]
        one, _ = philox_uniform(
            own, offset=draw, purpose=Purpose.TIME
        )  # of its own: one for all would add the errors of the parts up
        where = sequence.to(x0.device)
        u = corruption_uniforms(len(row), x0.shape[1], seed=own, offset=draw, device=device)
        yield Draws(slice(start, start + len(row)), where, x0[where].to(device), own, draw, u, (one + draw) / num_times)


def ar_nll(causal_lm: CausalLM, x0: torch.Tensor, *, given: torch.Tensor | None = None, batch_size: int = 64) -> Estimate:
    """-log p(x0) per token of a model that scores every token, in nats: exact for each sequence, standard error over sequences.

    It serves for data (the likelihood of an autoregressive model) and for samples (the score that a judge gives them).

    Args:
        causal_lm: ``log_probs(x0 [N, L]) -> [N, L]``. A torch module is put into eval mode, and its modes are restored.
        x0: int64 [N, L], moved to the module's device batch by batch. batch_size: sequences in one call.
        given: bool [N, L] or None: positions that are read and not scored, such as a prompt; a token is then one of the others.

    Returns:
        Estimate, with one value a sequence.

    Raises:
        ValueError: no such model; wrong shapes, of its answer as well; sequences longer than its ``max_length``; a sequence of which
            nothing is scored; a log-probability that is NaN or +inf.
    """
    check_data(x0, batch_size=batch_size)
    check_causal_lm(causal_lm)
    check_length("x0", x0, "causal_lm", causal_lm)
    scored, values = _scored(given, x0).cpu(), []
    with torch.no_grad(), evaluating(causal_lm):
        for index in torch.arange(len(x0), device=x0.device).split(batch_size):
            log_probs = scores_of(causal_lm, x0[index].to(device_of(causal_lm, x0))).double()
            if given is not None:
                log_probs = log_probs.masked_fill(given[index.to(given.device)].to(log_probs.device), 0.0)
            values.append(-log_probs.sum(1).cpu())
    return Estimate.of(torch.cat(values) / scored, "nats/token")


def scores_of(causal_lm: CausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """log p of every token, [N, L] as the tokens; ValueError where the model answers with something else."""
    log_probs = causal_lm.log_probs(tokens)
    if log_probs.shape != tokens.shape:
        raise ValueError(
            f"causal_lm: expected log_probs {list(tokens.shape)}, the first token's included, got {list(log_probs.shape)}"
        )
    if not bool((log_probs < math.inf).all()):
        got = "NaN" if bool(log_probs.isnan().any()) else "+inf"
        raise ValueError(f"causal_lm: expected log-probabilities, got {got}; its weights or its dtype are to blame")
    return log_probs
