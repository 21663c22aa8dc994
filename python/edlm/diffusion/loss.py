"""The negative ELBO of the proposal: continuous time (what is trained) and T steps (what a T-step sampler is bounded by)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..ops import gather_log_probs, linear_log_probs
from ..protocols import Denoiser, offers_head
from .process import MaskedDiffusion, check_times, check_tokens, stratified_uniforms


class NelboLoss(NamedTuple):
    """One Monte Carlo term a sequence. ``nats.mean() / L`` is a training loss in nats per token."""

    nats: torch.Tensor  # float32 [B], weighted, differentiable; its mean estimates the NELBO of a sequence
    num_masked: torch.Tensor  # int64 [B], how many positions were scored
    times: torch.Tensor  # float64 [B]


def masked_nats(denoiser: Denoiser, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """-sum over masked i of log mu_i(x0_i | xt), differentiable: float32 [B], in nats.

    The softmax runs on masked rows alone and excludes the mask. Where the denoiser offers ``hidden`` and ``head``, its head runs
    on those rows alone as well; with an ``output_layer`` no logits are stored, in the backward neither. Sums over positions are
    float64.

    Args:
        x0: int64 [B, L] without masks. xt: x0 with some positions masked. t: floating [B], handed on as float32.
    """
    if bool((x0 == denoiser.mask_token_id).any()):
        raise ValueError(
            f"x0: expected data, got the mask ({denoiser.mask_token_id}) in it; no model gives the mask a probability, so drop it"
        )
    masked = xt == denoiser.mask_token_id
    t = t.to(torch.float32)
    layer = getattr(denoiser, "output_layer", None) if offers_head(denoiser) else None
    if layer is not None:
        rows = denoiser.hidden(xt, t)[masked]
        log_probs = linear_log_probs(rows, layer.weight, x0[masked], layer.bias, forbidden=denoiser.mask_token_id)
    elif offers_head(denoiser):
        rows = denoiser.head(denoiser.hidden(xt, t)[masked])
        log_probs = gather_log_probs(rows, x0[masked], forbidden=denoiser.mask_token_id)
    else:
        logits = denoiser(xt, t)
        if logits.dim() != 3 or logits.shape[:2] != xt.shape:
            raise ValueError(f"denoiser: expected logits [B, L, V] = [{xt.shape[0]}, {xt.shape[1]}, V], got {list(logits.shape)}")
        log_probs = gather_log_probs(logits[masked], x0[masked], forbidden=denoiser.mask_token_id)
    # Scattered back before summing: the order of a row's sum does not depend on its neighbours, nor on atomics.
    table = torch.zeros(xt.shape, dtype=torch.float64, device=xt.device).masked_scatter(masked, -log_probs.double())
    return table.sum(1).float()


def _first_seed(seed: int | torch.Tensor) -> int:
    if not isinstance(seed, torch.Tensor):
        return seed
    return int(seed.flatten()[0]) if seed.numel() else 0  # an empty batch draws nothing


def _check(denoiser: Denoiser, x0: torch.Tensor, diffusion: MaskedDiffusion) -> None:
    check_tokens("x0", x0)
    if denoiser.mask_token_id != diffusion.mask_token_id:
        raise ValueError(
            f"diffusion: expected the denoiser's mask_token_id {denoiser.mask_token_id}, got {diffusion.mask_token_id}"
        )


def nelbo_loss(
    denoiser: Denoiser,
    x0: torch.Tensor,
    diffusion: MaskedDiffusion,
    *,
    seed: int | torch.Tensor,
    offset: int | torch.Tensor = 0,
    times: float | torch.Tensor | None = None,
    t_min: float = 0.0,
) -> NelboLoss:
    """Continuous-time NELBO: E_t E_xt loss_weight(t) sum over masked i of -log mu_i(x0_i | xt), t uniform in (t_min, 1].

    With eps = 0 and t_min = 0 it is unbiased for the bound, which a perfect factorised denoiser brings to the entropy of the
    data. With eps > 0 the noisiest part of the integral is missing and it comes out lower; with t_min > 0 it is the mean over the
    rest of the times, which is no bound either. The weight at small t makes single terms large: train with t_min = 1e-3 for
    bounded ones; ``edlm.eval.nelbo`` has an estimator of finite variance.

    Args:
        denoiser: logits [B, L, V] of (xt, t), or hidden and head. x0: int64 [B, L] without masks.
        seed: an int s (row b is corrupted with s + b) or int64 [B]. offset: the training step.
        times: floating [B] or a number in (0, 1]; None draws them stratified over the batch.

    Returns:
        NelboLoss.

    Raises:
        ValueError: wrong shapes; masks in x0; times outside (0, 1]; a diffusion with another mask than the denoiser's.

    RNG: corruption as in ``MaskedDiffusion.q_sample``; times from Philox(seed of row 0; 0, 0, offset, TIME).
    Source: Sahoo et al., arXiv 2406.07524 (continuous-time NELBO).
    """
    _check(denoiser, x0, diffusion)
    batch = x0.shape[0]
    if times is None:
        first = offset.reshape(-1)[:1] if isinstance(offset, torch.Tensor) else offset
        t = diffusion.training_times(batch, seed=_first_seed(seed), offset=first, t_min=t_min, device=x0.device)
    else:
        t = check_times("times", times, batch, x0.device)
        if not bool((t > 0).all()):
            raise ValueError("times: expected times in (0, 1], got 0, where the weight is infinite; draw 1 - u with u in [0, 1)")
    xt = diffusion.q_sample(x0, t, seed=seed, offset=offset)
    nats = diffusion.schedule._loss_weight(t).float() * masked_nats(denoiser, x0, xt, t)
    return NelboLoss(nats, (xt == diffusion.mask_token_id).sum(1), t)


def step_weight(diffusion: MaskedDiffusion, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """(alpha(s) - alpha(t)) / (1 - alpha(t)): how likely a position masked at t opens before s. float64, 1 at s = 0."""
    mask_prob = diffusion.schedule._mask_prob
    return 1 - mask_prob(s) / mask_prob(t)


def discrete_nelbo(
    denoiser: Denoiser,
    x0: torch.Tensor,
    diffusion: MaskedDiffusion,
    steps: int,
    *,
    seed: int | torch.Tensor,
    offset: int = 0,
    all_steps: bool = False,
) -> NelboLoss:
    """T-step NELBO on the grid t_i = 1 - i/T: sum_i (alpha(t_{i+1}) - alpha(t_i)) / (1 - alpha(t_i)) E[sum over masked -log mu].

    It bounds the NLL of T-step ancestral sampling from the proposal, and falls to the continuous NELBO as T grows. Unbiased when
    eps = 0 (otherwise the prior term is missing).

    Args:
        steps: T >= 1. all_steps: False scores one step a row, weighted by T (rows stratified over the grid); True scores all T,
            with T denoiser calls, and ``times`` is then 1 and ``num_masked`` the total.
        The others are as in ``nelbo_loss``.

    RNG: one step: as ``nelbo_loss``, the grid index being floor(T v) of the stratified uniform v. All: step i corrupts with
    offset * T + i, which wraps at 2**32.
    """
    _check(denoiser, x0, diffusion)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected an int >= 1, got {steps!r}")
    batch, mask = x0.shape[0], diffusion.mask_token_id

    def term(index: torch.Tensor, step_offset: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        t, s = (steps - index).double() / steps, (steps - index - 1).double() / steps
        xt = diffusion.q_sample(x0, t, seed=seed, offset=step_offset)
        nats = step_weight(diffusion, t, s).float() * masked_nats(denoiser, x0, xt, t)
        return nats, (xt == mask).sum(1), t

    if not all_steps:
        v = stratified_uniforms(batch, seed=_first_seed(seed), offset=offset, device=x0.device)
        nats, num_masked, t = term((v * steps).long().clamp_max(steps - 1), offset)
        return NelboLoss(nats * steps, num_masked, t)
    terms = [term(torch.full((batch,), i, device=x0.device), offset * steps + i) for i in range(steps)]
    return NelboLoss(
        torch.stack([nats for nats, _, _ in terms]).sum(0),
        torch.stack([num_masked for _, num_masked, _ in terms]).sum(0),
        torch.ones(batch, dtype=torch.float64, device=x0.device),
    )
