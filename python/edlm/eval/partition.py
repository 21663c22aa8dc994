"""log Z of a residual energy from n draws of the proposal: what lies below it, what lies above it for n large enough, what is exact."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..diffusion.completions import completions
from ..diffusion.process import check_times, check_tokens
from ..ops._philox import expand_offset, expand_seed
from ..ops.importance import _leave_one_out
from ..protocols import Denoiser, EnergyModel
from ..samplers.evaluating import evaluating
from .likelihood import check_denoising, device_of


@dataclass(frozen=True, eq=False)
class PartitionBounds:
    """log Z(xt) = log E_mu[exp(-E)] of B states, from ``num_candidates`` draws each; float64 [B] in nats, on the CPU."""

    log_Z_lower: torch.Tensor
    log_Z_upper_asymptotic: torch.Tensor
    log_Z_exact: torch.Tensor  # NaN where the energy does not know it
    stderr: torch.Tensor  # of the estimates, to first order; NaN where nothing is known of it: see ``log_Z_stderr``
    ess: torch.Tensor  # of the n weights
    num_candidates: int


def log_Z_lower(energy: torch.Tensor) -> torch.Tensor:
    """T_n = log mean exp(-E), floating [..., n] -> float64 [...]: **below log Z in expectation** (Jensen), and rising to it with n.

    With few draws, or heavy-tailed weights, by many nats: n = 1 is the mean of -E.

    Args:
        energy: of n independent draws from the proposal, nats; +inf is a weight of 0.

    Raises:
        ValueError: no tensor; no draw; a NaN or -inf energy.
    """
    log_w = _log_weights(energy)
    return log_w.logsumexp(-1) - math.log(log_w.shape[-1])


def log_Z_upper_asymptotic(energy: torch.Tensor) -> torch.Tensor:
    """(2n - 1) T_n - 2 (n - 1) T_{n-1}, T_{n-1} averaged over leave-one-out subsets: **above log Z for n large enough** only.

    NOTE: how large depends on the tail of the weights, and no figure of a sample tells: with heavy-tailed ones it was below log Z in
    expectation at n = 2, 3 and 8. It is T_n plus twice the jackknife's correction of its bias.

    Args:
        energy: floating [..., n], n >= 2, of independent draws from the proposal, nats; +inf is a weight of 0.

    Returns:
        float64 [...]; +inf where the estimate rests on one draw whose absence leaves a weight of 0.

    Raises:
        ValueError: no tensor; n < 2; a NaN or -inf energy.

    Source: Xu et al., arXiv 2410.21357, Theorem 1; Deng et al., arXiv 2004.11714.
    """
    log_w = _log_weights(energy)
    n = log_w.shape[-1]
    if n < 2:
        raise ValueError(
            f"energy: expected at least 2 draws for the leave-one-out estimate of log Z, got {n}; draw more (num_candidates), or take "
            "log_Z_lower alone"
        )
    t_n = log_w.logsumexp(-1) - math.log(n)
    without = _leave_one_out(log_w.flatten(0, -2) if log_w.dim() > 1 else log_w[None]).mean(-1).view(t_n.shape)
    # As a correction of T_n, not as a difference of two large numbers; all weights 0 is -inf, not NaN.
    return torch.where(t_n == -math.inf, t_n, t_n + 2 * (n - 1) * (t_n - without))


def log_Z_stderr(ess: torch.Tensor, num_candidates: int) -> torch.Tensor:
    """sqrt((n / ESS - 1) / (n - 1)): the delta method's standard error of T_n, and to first order of the upper estimate.

    NaN below an ESS of 5. There the formula tends to 1 nat at most, whatever the truth: for trained models at an ESS of 1.2 of 16 the
    estimates were seen to scatter by 7 to 19 nats.
    """
    stderr = ((num_candidates / ess - 1).clamp_min(0) / max(1, num_candidates - 1)).sqrt()
    return stderr.masked_fill(ess < 5, math.nan)


def effective_size(energy: torch.Tensor) -> torch.Tensor:
    """Effective sample size of the weights exp(-E), floating [..., n] -> float64 [...] in 1 .. n; 1 where all weights are 0."""
    log_w = _log_weights(energy)
    log_w = torch.where((log_w == -math.inf).all(-1, keepdim=True), torch.eye(log_w.shape[-1])[0].log().double(), log_w)
    return torch.exp(2 * log_w.logsumexp(-1) - (2 * log_w).logsumexp(-1)).clamp(1, log_w.shape[-1])


def _log_weights(energy: torch.Tensor) -> torch.Tensor:
    tensor = isinstance(energy, torch.Tensor)
    if not tensor or energy.dim() < 1 or energy.shape[-1] < 1 or not energy.is_floating_point():
        got = f"{energy.dtype} {list(energy.shape)}" if tensor else f"{type(energy).__name__}; make it a tensor"
        raise ValueError(f"energy: expected floating [..., n] with n >= 1 draws, got {got}")
    wrong = energy.isnan() | (energy == -math.inf)
    if bool(wrong.any()):
        raise ValueError(
            f"energy: expected numbers above -inf, got {energy[wrong].flatten()[0].item()} in {int(wrong.sum())} of {energy.numel()}"
        )
    return -energy.detach().double().cpu()


def log_partition_bounds(
    denoiser: Denoiser,
    energy: EnergyModel,
    xt: torch.Tensor,
    t: float | torch.Tensor,
    *,
    num_candidates: int,
    seed: int | torch.Tensor = 0,
    offset: int | torch.Tensor = 0,
    energy_batch_size: int = 64,
) -> PartitionBounds:
    """log Z(xt) from below and, for n large enough, from above, with the effective sample size that says what they rest on.

    Args:
        denoiser, energy: as ``edlm.samplers.generate`` takes them. An energy may offer ``log_Z(xt) -> [B]``, NaN where it is not known.
        xt: int64 [B, L], with masks. t: a number or floating [B], the times that the networks are told.
        num_candidates: n >= 2 draws a state, all from one call of the denoiser.
        seed: an int s (state b draws with s + b) or int64 [B]. offset: the word "step" of the counter.
        energy_batch_size: completed sequences in one call of the energy.

    Raises:
        ValueError: other networks; shapes that do not fit; states longer than a ``max_length``; n < 2; energies that are NaN or -inf
            (with state and draw), or +inf for all draws of a state.

    RNG: draw k as candidate k of ``sample_candidates``: Philox(seed[b]; i, k, offset, TOKEN).
    Source: Xu et al., arXiv 2410.21357, Theorem 1.
    """
    check_tokens("xt", xt)
    check_num_candidates(num_candidates)
    check_denoising("xt", xt, denoiser, energy)
    xt = xt.to(device_of(denoiser, xt))
    t = check_times("t", t, len(xt), xt.device).float()
    seeds = expand_seed(seed, len(xt), xt.device)
    offsets = expand_offset("log_partition_bounds", offset, len(xt), xt.device)
    with torch.no_grad(), evaluating(denoiser, energy):
        filled = xt.masked_fill(xt == denoiser.mask_token_id, 0 if denoiser.mask_token_id else 1)  # its score is not asked for
        candidates, log_p = completions(denoiser, filled, xt, t, num_candidates, seeds=seeds, offsets=offsets)
        energies = energies_of(energy, candidates[:, 1:], xt, t, log_p[:, 1:], batch_size=energy_batch_size)
        check_possible(energies)
        exact = exact_log_Z(energy, xt)
    ess = effective_size(energies)
    return PartitionBounds(
        log_Z_lower=log_Z_lower(energies),
        log_Z_upper_asymptotic=log_Z_upper_asymptotic(energies),
        log_Z_exact=exact,
        stderr=log_Z_stderr(ess, num_candidates),
        ess=ess,
        num_candidates=num_candidates,
    )


def check_num_candidates(num_candidates: int) -> None:
    if isinstance(num_candidates, bool) or not isinstance(num_candidates, int) or num_candidates < 2:
        raise ValueError(
            f"num_candidates: expected an int >= 2 (the estimate from above leaves one out), got {num_candidates!r}; "
            "edlm.eval.log_Z_lower takes a single draw"
        )


def exact_log_Z(energy: EnergyModel, xt: torch.Tensor) -> torch.Tensor:
    """What the energy knows of log Z(xt): float64 [B] on the CPU, NaN where it is nothing."""
    known = getattr(energy, "log_Z", None)
    if not callable(known):
        return torch.full((len(xt),), math.nan, dtype=torch.float64)
    found = known(xt)
    if not isinstance(found, torch.Tensor) or found.shape != (len(xt),):
        got = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"energy: expected log_Z(xt) [B] = [{len(xt)}], NaN where it is not known, got {got}")
    return found.detach().double().cpu()


def check_possible(energies: torch.Tensor) -> None:
    """Raises ValueError where all draws [B, n] of a state have the weight 0: then nothing is known of its log Z."""
    impossible = (energies == math.inf).all(1)
    if bool(impossible.any()):
        raise ValueError(
            f"energy: expected a completion that is possible among {energies.shape[1]} of each state, got +inf for all of state "
            f"{int(impossible.long().argmax())} of the batch; draw more (num_candidates)"
        )


def energies_of(
    energy: EnergyModel, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor, log_p: torch.Tensor, *, batch_size: int
) -> torch.Tensor:
    """Energies of candidates [B, K, L] in calls of at most ``batch_size`` completed sequences: float64 [B, K], checked."""
    batch, k, _ = x0.shape
    columns = min(k, batch_size)
    rows = max(1, batch_size // max(1, columns))
    result = torch.empty(batch, k, dtype=torch.float64, device=x0.device)
    for b in range(0, batch, rows):
        for j in range(0, k, columns):
            part = slice(b, b + rows), slice(j, j + columns)
            answer = energy(x0[part], xt[part[0]], t[part[0]], log_p[part])
            expected = tuple(x0[part].shape[:2])
            if not isinstance(answer, torch.Tensor) or tuple(answer.shape) != expected:
                got = list(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
                raise ValueError(f"energy: expected energies [B, K] = {list(expected)}, got {got}")
            result[part] = answer.double()
    wrong = result.isnan() | (result == -math.inf)
    if bool(wrong.any()):
        b, j = wrong.nonzero()[0].tolist()
        why = "look at its weights, and for a dtype too narrow"
        if bool((log_p[b, j] == -math.inf).any()):
            why = "the denoiser gives a token of x0 the probability 0 there (log_p = -inf): look at its logits first"
        raise ValueError(
            f"energy: expected numbers above -inf, got {result[b, j].item()} for sequence {b}, candidate {j} of the batch; {why}"
        )
    return result
