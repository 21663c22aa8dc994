"""SUBS: the mask is never predicted, clean positions are carried over, the rest is a distribution. Deterministic."""

from __future__ import annotations

import math

import pytest
import torch
from edlm.diffusion import subs_log_probs
from edlm.ops import gather_log_probs
from exact import TabularDenoiser, Universe


def test_properties() -> None:
    torch.manual_seed(0)
    logits, mask = torch.randn(3, 4, 6) * 5, 2
    logits[..., mask] = 40.0  # a softmax before the exclusion would leave nothing to the rest
    xt = torch.tensor([[2, 0, 2, 5], [2, 2, 2, 2], [1, 3, 4, 0]])
    log_probs = subs_log_probs(logits, xt, mask)
    masked = xt == mask
    assert (log_probs[masked][:, mask] == -math.inf).all()
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3, 4))
    clean = log_probs[~masked]
    assert (clean.gather(1, xt[~masked][:, None]) == 0).all()
    assert (clean == -math.inf).sum() == clean.shape[0] * 5
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(log_probs[masked][:, others], logits[masked][:, others].log_softmax(-1))
    # the same numbers that the losses and the sampler read
    tokens = torch.tensor(others).expand(int(masked.sum()), 5)
    torch.testing.assert_close(gather_log_probs(logits[masked], tokens, forbidden=mask), log_probs[masked][:, others])


def test_perfect_denoiser() -> None:
    universe = Universe()
    denoiser = TabularDenoiser(universe)
    states = torch.tensor(universe.states())
    log_probs = subs_log_probs(denoiser(states, torch.ones(len(states))), states, universe.mask)
    expected = torch.stack([universe.marginals(state) for state in universe.states()])
    torch.testing.assert_close(log_probs.exp()[..., : universe.num_tokens].double(), expected, rtol=0, atol=1e-6)


def test_low_precision_and_errors() -> None:
    logits, xt = torch.randn(2, 3, 5), torch.full((2, 3), 4)
    assert subs_log_probs(logits.bfloat16(), xt, 4).dtype == torch.float32
    assert subs_log_probs(logits.double(), xt, 4).dtype == torch.float64
    with pytest.raises(ValueError, match=r"mask_token_id: expected an id in 0 \.\. 4, got 5"):
        subs_log_probs(logits, xt, 5)
    with pytest.raises(ValueError, match=r"xt: expected int64 \[2, 3\]"):
        subs_log_probs(logits, xt[:1], 4)
    with pytest.raises(ValueError, match="logits: expected"):
        subs_log_probs(logits[0], xt, 4)
