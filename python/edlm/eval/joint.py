"""What an energy makes of the likelihood of whole sequences: the joint law p(x0 | xt) = mu exp(-E) / Z, its log Z in brackets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..diffusion.completions import completions
from ..protocols import Denoiser, EnergyModel
from ..samplers.evaluating import evaluating
from .estimate import Estimate
from .likelihood import check_data, check_denoising, device_of, draws_of, ordered_masks
from .partition import (
    PartitionBounds,
    check_num_candidates,
    check_possible,
    effective_size,
    energies_of,
    exact_log_Z,
    log_partition_bounds,
    log_Z_lower,
    log_Z_upper_asymptotic,
)


@dataclass(frozen=True, kw_only=True)
class EnergyEstimate:
    """A negative log-likelihood of which log Z is a part that is only estimated: with it from below, from above, and exact if known.

    ``lower`` is below the figure in expectation and ``upper_asymptotic`` above it for n large enough; neither holds for one sample.
    Where ``ess`` is near 1 each log Z rests on one draw of n: the two then say little, and may both lie on one side by many nats.
    """

    lower: Estimate
    upper_asymptotic: Estimate
    exact: Estimate | None  # where the energy knows its log Z for all states that came up
    sampler: Estimate | None = None  # of ``finite_step_elbo`` alone: an upper bound, for the sampler with K = n candidates
    ess: Estimate  # effective sample size of n weights, unit "of n"
    num_candidates: int  # n


def joint_nll(
    denoiser: Denoiser,
    energy: EnergyModel,
    x0: torch.Tensor,
    *,
    num_candidates: int = 256,
    log_Z: PartitionBounds | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> EnergyEstimate:
    """-log p(x0) of the corrected model that decodes in one step (T = 1): -log mu(x0 | m) + E(x0, m, 1) + log Z(m), nats per token.

    m is the fully masked state, one for all sequences, so its log Z is estimated once, from all n draws.

    Args:
        denoiser, energy: as ``edlm.samplers.generate`` takes them.
        x0: int64 [N, L] without masks.
        num_candidates: n >= 2 draws for log Z(m).
        log_Z: of m ([1, L], t = 1), where ``log_partition_bounds`` was called before; n is then its own.
        seed: of the draws: an int. batch_size: completed sequences in one call.

    Returns:
        EnergyEstimate; standard errors over sequences, with that of log Z where it is estimated. ``exact`` for the AR energies: there
        the figure is the autoregressive model's own likelihood.

    Raises:
        ValueError: other networks; wrong shapes; sequences longer than a ``max_length``; masks in x0; n < 2; energies that are
            NaN or -inf.

    RNG: Philox(seed; i, k, 0, TOKEN).
    Source: Xu et al., arXiv 2410.21357, section 4 and Theorem 1.
    """
    check_data(x0, batch_size=batch_size)
    check_denoising("x0", x0, denoiser, energy)
    check_no_masks(denoiser, x0)
    if log_Z is not None and log_Z.log_Z_lower.shape != (1,):
        raise ValueError(
            f"log_Z: expected that of one state, the fully masked one, got {list(log_Z.log_Z_lower.shape)} states; call "
            "log_partition_bounds with xt [1, L]"
        )
    length, device = x0.shape[1], device_of(denoiser, x0)
    if log_Z is None:
        masked = torch.full((1, length), denoiser.mask_token_id, device=device)
        log_Z = log_partition_bounds(
            denoiser, energy, masked, 1.0, num_candidates=num_candidates, seed=seed, energy_batch_size=batch_size
        )
    values = []
    with torch.no_grad(), evaluating(denoiser, energy):
        for part in x0.split(batch_size):
            data = part.to(device)
            xt, t = torch.full_like(data, denoiser.mask_token_id), torch.ones(len(data), device=device)
            nothing = torch.zeros(len(data), dtype=torch.int64, device=device)  # nothing is drawn
            candidates, log_p = completions(denoiser, data, xt, t, 0, seeds=nothing, offsets=nothing)
            nats = energies_of(energy, candidates, xt, t, log_p, batch_size=batch_size)[:, 0] - log_p[:, 0].double().sum(1)
            values.append(nats.cpu())
    nats, error = torch.cat(values), float(log_Z.stderr[0]) / length

    def of(shift: torch.Tensor, shared: float) -> Estimate:
        return Estimate.of((nats + shift) / length, "nats/token", shared_stderr=shared)

    return EnergyEstimate(
        lower=of(log_Z.log_Z_lower, error),
        upper_asymptotic=of(log_Z.log_Z_upper_asymptotic, error),
        exact=None if bool(log_Z.log_Z_exact.isnan().any()) else of(log_Z.log_Z_exact, 0.0),
        ess=Estimate.of(log_Z.ess, "of n"),
        num_candidates=log_Z.num_candidates,
    )


def paper_joint(
    denoiser: Denoiser,
    energy: EnergyModel,
    x0: torch.Tensor,
    *,
    num_candidates: int = 16,
    num_times: int = 1,
    seed: int | torch.Tensor = 0,
    batch_size: int = 16,
    energy_batch_size: int = 64,
) -> EnergyEstimate:
    """The figure by which the paper reports perplexities: E_t (1/t) [-log p(x0 | xt)], nats per token. **It is no bound.**

    In continuous time positions open one at a time, so only the marginals of p(x0 | xt) enter the ELBO of decoding, and not the
    joint that stands here. With the carry-over energy the figure is the autoregressive model's likelihood, for any such model and any
    data; with a perfect joint it lies below the entropy of the data. It is here to be compared with what is in print, and
    -log p = -log mu + E + log Z is estimated with log Z(xt) from n draws.

    Args:
        denoiser, energy: as ``edlm.samplers.generate`` takes them. x0: int64 [N, L] without masks.
        num_candidates: n >= 2 draws for the log Z of each xt. num_times: draws of xt a sequence, stratified over how many are masked.
        seed: an int s (sequence i draws with s + i) or int64 [N]. Ints closer than N share draws among sequences: repeat with seeds N
            apart.
        batch_size: rows (sequence, draw) in one call of the denoiser.
        energy_batch_size: completed sequences in one call of the energy; each row has n + 1.

    Returns:
        EnergyEstimate, standard errors over sequences.

    Raises:
        ValueError: other networks; wrong shapes; sequences longer than a ``max_length``; masks in x0; n < 2; energies that are
            NaN or -inf.

    RNG: xt of draw k as ``nelbo``; its completions Philox(seed[i]; position, j, k, TOKEN).
    Source: Xu et al., arXiv 2410.21357, section 4; what it is not: docs/algorithms.md, section 10.
    """
    check_data(x0, num_times=num_times, batch_size=batch_size, energy_batch_size=energy_batch_size)
    check_num_candidates(num_candidates)
    check_denoising("x0", x0, denoiser, energy)
    check_no_masks(denoiser, x0)
    length, table = x0.shape[1], []
    with torch.no_grad(), evaluating(denoiser, energy):
        for rows in draws_of(x0, num_times, seed, batch_size, device_of(denoiser, x0)):
            count = torch.full_like(rows.draw, length)
            num_masked, p = ordered_masks(rows.u, count, rows.v)
            t = p[:, 0].float()  # log-linear with eps = 0: t is the mask probability
            xt = torch.where(rows.u <= p, denoiser.mask_token_id, rows.x0)
            candidates, log_p = completions(denoiser, rows.x0, xt, t, num_candidates, seeds=rows.seeds, offsets=rows.draw)
            energies = energies_of(energy, candidates, xt, t, log_p, batch_size=energy_batch_size)
            check_possible(energies[:, 1:])
            nats = (energies[:, 0] - log_p[:, 0].double().sum(1)).cpu()
            others = energies[:, 1:].cpu()
            log_Z = torch.stack([log_Z_lower(others), log_Z_upper_asymptotic(others), exact_log_Z(energy, xt)], 1)
            joint = (nats[:, None] + log_Z) / num_masked.cpu()[:, None]
            table.append(torch.cat([joint, effective_size(others)[:, None]], 1))
    return estimate_of(torch.cat(table), len(x0), num_candidates)


def estimate_of(table: torch.Tensor, count: int, num_candidates: int) -> EnergyEstimate:
    """From one row a draw, [N x num_times, 4 or 5]: log Z from below, from above, exact (NaN where unknown), the ESS, the sampler."""
    lower, upper, exact, ess, *sampler = table.view(count, -1, table.shape[1]).mean(1).unbind(1)
    return EnergyEstimate(
        lower=Estimate.of(lower, "nats/token"),
        upper_asymptotic=Estimate.of(upper, "nats/token"),
        exact=None if bool(exact.isnan().any()) else Estimate.of(exact, "nats/token"),
        sampler=Estimate.of(sampler[0], "nats/token") if sampler else None,
        ess=Estimate.of(ess, "of n"),
        num_candidates=num_candidates,
    )


def check_no_masks(denoiser: Denoiser, x0: torch.Tensor) -> None:
    mask = denoiser.mask_token_id
    if bool((x0 == mask).any()):
        raise ValueError(f"x0: expected data, got the mask ({mask}) in it; no model gives the mask a probability, so drop it")
