"""Noise-contrastive estimation of a residual energy: data against the proposal's own completions of the same xt."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..ops._philox import expand_offset, expand_seed
from ..protocols import Denoiser
from .completions import completions
from .loss import _check, _first_seed
from .process import MaskedDiffusion, check_times


class NceLoss(NamedTuple):
    """One term a sequence, and how well the energy tells it from proposals; float32, or float64 for float64 energies."""

    nats: torch.Tensor  # [B], differentiable; its mean is the training loss. 2 ln 2 where all energies are 0
    accuracy: torch.Tensor  # [B], no gradient: half the positive's and half the negatives' share of right decisions
    energy_gap: torch.Tensor  # [B], no gradient: mean E- minus E+, in nats; it rises as the energy learns


class NceBatch(NamedTuple):
    """What an energy is trained on: ``energy(*batch) -> [B, 1 + n]``, the first column being that of the data."""

    candidates: torch.Tensor  # int64 [B, 1 + n, L]: x0 itself, then n completions of xt ~ mu(. | xt)
    xt: torch.Tensor  # int64 [B, L] ~ q(xt | x0)
    t: torch.Tensor  # float32 [B], as the proposal saw it
    log_p: torch.Tensor  # float32 [B, 1 + n, L]: log mu of every candidate's token at masked positions, 0 elsewhere


def nce_loss(positive: torch.Tensor, negatives: torch.Tensor) -> NceLoss:
    """softplus(E+) + mean over n of softplus(-E-): the logistic loss of telling x0 ~ q(. | xt) from x0 ~ mu(. | xt) by sigmoid(-E).

    The optimum is E* = -log(q / mu), at which Z(xt) = E_mu[exp(-E*)] = 1, whatever n is: at a given (xt, x0) the expected loss is
    q softplus(E) + mu softplus(-E), its derivative q sigmoid(E) - mu sigmoid(-E), and this is 0 where exp(E) = mu / q. (A *sum* over
    the negatives would shift E* by log n.)

    Args:
        positive: floating [B], energies of the data. negatives: floating [B, n], n >= 1, energies of what the proposal drew for
            the same xt. Both are widened to float32 at least before anything is computed.

    Returns:
        NceLoss. Decisions are taken at the threshold 0 (right: E+ < 0, E- > 0; E = 0 counts half); since positive and negatives
        weigh the same, guessing has an accuracy of 0.5 whatever n is.

    Raises:
        ValueError: shapes that do not fit, or dtypes that are not floating.

    Source: Xu et al., arXiv 2410.21357, section 4; Gutmann and Hyvarinen, AISTATS 2010 (noise-contrastive estimation).
    """
    if positive.dim() != 1 or negatives.dim() != 2 or negatives.shape[0] != positive.shape[0] or negatives.shape[1] < 1:
        raise ValueError(
            f"positive, negatives: expected energies [B] and [B, n] with n >= 1, got {list(positive.shape)} and "
            f"{list(negatives.shape)}; of energies [B, 1 + n] they are energies[:, 0] and energies[:, 1:]"
        )
    for name, energy in (("positive", positive), ("negatives", negatives)):
        if not energy.is_floating_point():
            raise ValueError(f"{name}: expected floating energies, got {energy.dtype}")
    wide = torch.promote_types(torch.promote_types(positive.dtype, negatives.dtype), torch.float32)
    positive, negatives = positive.to(wide), negatives.to(wide)
    # softplus(x) = -logsigmoid(-x), which is right for every x, and so is its gradient: no log of a probability that has underflowed,
    # and no threshold above which softplus(x) is taken to be x.
    log_sigmoid = torch.nn.functional.logsigmoid
    nats = -log_sigmoid(-positive) - log_sigmoid(negatives).mean(1)
    with torch.no_grad():
        # sign is -1, 0, 1, so (1 + sign) / 2 is 0, 1/2, 1.
        accuracy = 0.5 + 0.25 * (negatives.sign().mean(1) - positive.sign())
        gap = negatives.mean(1) - positive
    return NceLoss(nats, accuracy, gap)


@torch.no_grad()
def nce_batch(
    proposal: Denoiser,
    x0: torch.Tensor,
    diffusion: MaskedDiffusion,
    *,
    num_negatives: int = 1,
    seed: int | torch.Tensor,
    offset: int | torch.Tensor = 0,
    times: float | torch.Tensor | None = None,
    t_min: float = 0.0,
) -> NceBatch:
    """Positives and negatives for ``nce_loss``: xt ~ q(xt | x0), and n completions of it from the frozen proposal, mu(. | xt).

    One call of the proposal. Its head, where it offers ``hidden`` and ``head``, and the draws run on masked rows alone, in chunks:
    nothing of size B x n x L x V is made. Nothing here carries a gradient.

    Args:
        proposal: the denoiser that decoding will use, in eval mode.
        x0: int64 [B, L] without masks. diffusion: with the proposal's mask.
        num_negatives: n >= 1 a sequence; they share xt and the proposal's call.
        seed: an int s (row b draws with s + b) or int64 [B]. offset: the training step.
        times: floating [B] or a number in [0, 1]; None draws them stratified over the batch in (t_min, 1].

    Returns:
        NceBatch.

    Raises:
        ValueError: wrong shapes; masks in x0; times outside [0, 1]; a diffusion with another mask than the proposal's; a proposal, or a
            part of one, in train mode (with dropout it would be another mu than the one that is sampled from).

    RNG: xt as in ``MaskedDiffusion.q_sample``, Philox(seed[b]; i, 0, offset, CORRUPT); negative k as candidate k of
    ``sample_candidates``, Philox(seed[b]; i, k, offset, TOKEN): streams of different purpose are independent. Times from Philox(seed of
    row 0; 0, 0, offset, TIME). With seeds and times given, a row depends on its own alone (but for the last bits of matrix products):
    a slice of a batch is the batch of the slices.
    Source: Xu et al., arXiv 2410.21357, section 4.
    """
    _check(proposal, x0, diffusion)
    mask, batch = diffusion.mask_token_id, x0.shape[0]
    if isinstance(num_negatives, bool) or not isinstance(num_negatives, int) or num_negatives < 1:
        raise ValueError(f"num_negatives: expected an int >= 1, got {num_negatives!r}")
    if bool((x0 == mask).any()):
        raise ValueError(f"x0: expected data, got the mask ({mask}) in it; no model gives the mask a probability, so drop it")
    parts = proposal.modules() if isinstance(proposal, torch.nn.Module) else [proposal]
    if any(getattr(part, "training", False) for part in parts):
        raise ValueError(
            "proposal: expected a network in eval mode, got one in train mode; call eval(): negatives come from mu itself"
        )
    seeds = expand_seed(seed, batch, x0.device)
    offsets = expand_offset("nce_batch", offset, batch, x0.device)
    if times is None:
        t = diffusion.training_times(batch, seed=_first_seed(seed), offset=offsets[:1], t_min=t_min, device=x0.device)
    else:
        t = check_times("times", times, batch, x0.device)
    xt = diffusion.q_sample(x0, t, seed=seeds, offset=offsets)
    t = t.to(torch.float32)

    candidates, log_p = completions(proposal, x0, xt, t, num_negatives, seeds=seeds, offsets=offsets)
    return NceBatch(candidates, xt, t, log_p)
