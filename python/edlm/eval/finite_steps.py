"""The negative ELBO of decoding in T steps with an energy: what opens in a step is scored together, what stays masked is summed out."""

from __future__ import annotations

import math

import torch

from ..diffusion import LogLinearSchedule, NoiseSchedule
from ..diffusion.completions import completions
from ..ops.importance import _leave_one_out
from ..protocols import Denoiser, EnergyModel
from ..samplers.evaluating import evaluating
from .joint import EnergyEstimate, check_no_masks, estimate_of
from .likelihood import check_data, check_denoising, device_of, draws_of, ordered_masks
from .partition import (
    check_num_candidates,
    check_possible,
    effective_size,
    energies_of,
    exact_log_Z,
    log_Z_lower,
    log_Z_upper_asymptotic,
)


def finite_step_elbo(
    denoiser: Denoiser,
    energy: EnergyModel,
    x0: torch.Tensor,
    *,
    steps: int,
    num_candidates: int = 16,
    num_times: int = 1,
    schedule: NoiseSchedule | None = None,
    seed: int | torch.Tensor = 0,
    batch_size: int = 16,
    energy_batch_size: int = 64,
) -> EnergyEstimate:
    """The T-step negative ELBO of the ideal corrected model, nats per token: the sum over steps of E[-log p(x0^S | xt)].

    S are the positions that open in a step t -> s, and p(x^S | xt) = mu(x^S | xt) E_rest[exp(-E)] / Z(xt), the expectation over what
    mu draws at the positions that stay masked. T = 1 is ``joint_nll``; without an energy it is ``nelbo(..., steps=T)``.

    ``sampler`` is about decoding by ``generate`` with K = n candidates: the ancestral sampler on this grid and schedule, the energy in
    every step (window (0, 1)), both temperatures 1, no filters, blocks or particles. One of K is picked, so what opens has the law,
    with w = exp(-E),

        p_K(x^S | xt) = mu(x^S | xt) E[K w_1 / (w_1 + .. + w_K)],    candidate 1 having x^S at S, all else being drawn from mu,

    and the estimate is -log mu minus the log of a mean of K such terms, each candidate in turn having x0 at S: an **upper bound in
    expectation, at any K** (Jensen). It improves on the proposal by log K a step at most, as the sampler does.

    A draw is an opening set: each position's uniform says in which step it opens. One position is chosen, its step is scored and
    weighted by L / |S|: so no call is spent on a step in which nothing opens, however large T is. The n completions that estimate Z
    serve E_rest too, with x0 put in at S: the errors of the two logs then mostly cancel.

    Both logs are of means of n weights, hence biased: ``lower`` takes Z from below and E_rest from above, ``upper_asymptotic``
    the other way round, so each holds for n large enough only. Where the energy knows log Z(xt), that is used in both.
    ``exact`` is given where nothing is estimated: for T = 1 and an energy that knows log Z.

    Args:
        denoiser, energy: as ``edlm.samplers.generate`` takes them. x0: int64 [N, L] without masks.
        steps: T >= 1 on the grid t_i = 1 - i/T; it may be larger than L.
        num_candidates: n >= 2 completions of each xt. num_times: draws a sequence, stratified over the positions in order of opening.
        schedule: with eps = 0; log-linear if None.
        seed: an int s (sequence i draws with s + i) or int64 [N]. Ints closer than N share draws among sequences: repeat with seeds N
            apart.
        batch_size: rows (sequence, draw) in one call of the denoiser.
        energy_batch_size: completed sequences in one call of the energy; each row has up to 2 n + 1.

    Returns:
        EnergyEstimate, standard errors over sequences. ``ess`` is the mean over draws of the smaller of two: that of the n weights of Z
        and that of the n of E_rest, whether log Z is known or not. It says nothing of ``exact``.

    Raises:
        ValueError: other networks; wrong shapes; sequences longer than a ``max_length``; masks in x0; n < 2; a schedule with
            eps > 0 (a part of the bound would be missing); energies that are NaN or -inf.

    RNG: draw k = 0, 1, ... of sequence i takes the position of rank L (k + u) / num_times, u from Philox(seed[i]; 0, 0, k, TIME);
    positions open by Philox(seed[i]; position, 0, k, CORRUPT) and are completed with Philox(seed[i]; position, j, k, TOKEN).
    """
    check_data(x0, steps=steps, num_times=num_times, batch_size=batch_size, energy_batch_size=energy_batch_size)
    check_num_candidates(num_candidates)
    check_denoising("x0", x0, denoiser, energy)
    check_no_masks(denoiser, x0)
    schedule = LogLinearSchedule(eps=0.0) if schedule is None else schedule
    if schedule.eps > 0:
        raise ValueError(
            f"schedule: expected one with eps = 0, got {schedule!r}, which leaves the noisiest part of the bound out; "
            "edlm.diffusion.evaluation_schedule gives the one that ends at 0"
        )
    grid = schedule._mask_prob(torch.arange(steps + 1, dtype=torch.float64) / steps)
    table = []
    with torch.no_grad(), evaluating(denoiser, energy):
        for rows in draws_of(x0, num_times, seed, batch_size, device_of(denoiser, x0)):
            count = torch.full_like(rows.draw, x0.shape[1])
            _, p = ordered_masks(rows.u, count, rows.v)
            edges = grid.to(p.device)
            step = torch.searchsorted(edges, p[:, 0], right=True).clamp(1, steps)  # from step / T to (step - 1) / T
            masked, stays = rows.u < edges[step][:, None], rows.u < edges[step - 1][:, None]
            opens = masked & ~stays
            xt, t = torch.where(masked, denoiser.mask_token_id, rows.x0), (step / steps).float()
            candidates, log_p = completions(denoiser, rows.x0, xt, t, num_candidates, seeds=rows.seeds, offsets=rows.draw)
            energies = energies_of(energy, candidates, xt, t, log_p, batch_size=energy_batch_size).cpu()
            check_possible(energies[:, 1:])
            rest = energies[:, :1].expand(-1, num_candidates).clone()  # where nothing stays masked, x0 itself is all of it
            partly = stays.any(1)
            if bool(partly.any()):
                x, lp, s = candidates[partly], log_p[partly], opens[partly][:, None]
                x, lp = torch.where(s, x[:, :1], x)[:, 1:], torch.where(s, lp[:, :1], lp)[:, 1:]
                rest[partly.cpu()] = energies_of(energy, x, xt[partly], t[partly], lp, batch_size=energy_batch_size).cpu()
            ess = torch.minimum(effective_size(energies[:, 1:]), effective_size(rest))
            log_ratio = _log_ratio(energies[:, 1:], rest, exact_log_Z(energy, xt), one_step=steps == 1)
            # Given what is masked and how many of it open, S is any of them: -log mu has the same mean over all masked ones as over S.
            proposed = -log_p[:, 0].double().sum(1) / masked.sum(1)
            per_token = proposed.cpu()[:, None] - log_ratio / opens.sum(1).cpu()[:, None]
            table.append(torch.cat([per_token[:, :3], ess[:, None], per_token[:, 3:]], 1))
    return estimate_of(torch.cat(table), len(x0), num_candidates)


def _log_ratio(energies: torch.Tensor, rest: torch.Tensor, exact: torch.Tensor, *, one_step: bool) -> torch.Tensor:
    """log p(x0^S | xt) - log mu(x0^S | xt), float64 [R, 4]: from above, from below, exact (or NaN), and of the sampler, from below.

    energies, rest: [R, n], of completions, and of those with x0 at S. one_step: no position ever stays masked.
    """
    known = ~exact.isnan()
    below = torch.where(known, exact, log_Z_lower(energies))
    above = torch.where(known, exact, log_Z_upper_asymptotic(energies))
    rest_below, rest_above = log_Z_lower(rest), log_Z_upper_asymptotic(rest)
    others = _leave_one_out(-energies) + math.log(energies.shape[1] - 1)  # log of the sum of the other weights
    # A candidate that is impossible is not picked, even where the others are impossible too.
    picked = (-rest - torch.logaddexp(-rest, others)).masked_fill(rest == math.inf, -math.inf).logsumexp(1)
    # Of later steps some rows happen to leave nothing masked: those alone would be a biased choice.
    exactly = rest_below - exact if one_step else torch.full_like(exact, math.nan)
    return torch.stack([rest_above - below, rest_below - above, exactly, picked], 1)
