"""What ``generate`` says of arguments and networks that do not fit."""

from __future__ import annotations

import math

import pytest
import torch
from edlm.samplers import generate

# --- errors ----------------------------------------------------------------------------------------------------------------------

FULL = {"batch_size": 2, "length": 3, "steps": 2}
BAD = [
    ({"steps": 0}, r"steps: expected an int >= 1 .* got 0"),
    ({"steps": None}, r"steps: expected an int >= 1 .* got None"),
    ({"steps": 2**32 + 1}, r"steps: expected at most 2\*\*32"),
    ({"device": "foo"}, r"device: expected a torch device that is there, such as .* got 'foo'"),
    ({"sampler": "first_hitting"}, r"steps: the first-hitting sampler .* got 2"),
    ({"sampler": "ddim"}, r"sampler: expected one of ancestral, first_hitting, remasking, left_to_right, got 'ddim'"),
    ({"batch_size": 0}, r"batch_size: expected an int >= 1 where there is no prompt, got 0"),
    ({"length": None}, r"length: expected an int >= 1 where there is no prompt, got None"),
    ({"window": (0.2, 1.1)}, r"window: expected 0 <= lo <= hi <= 1, got \(0.2, 1.1\)"),
    ({"window": (0.9, 0.2)}, r"window: expected 0 <= lo <= hi <= 1"),
    ({"window": 0.2}, r"window: expected a pair \(lo, hi\), or 'auto', got 0.2"),
    ({"window": (math.nan, 1)}, r"window: expected 0 <= lo"),
    ({"num_candidates": 0}, r"num_candidates: expected an int >= 1, or auto, got 0"),
    ({"num_candidates": 4}, r"num_candidates: 4 candidates need an energy"),
    ({"temperature": -0.5}, r"temperature: expected a finite number >= 0 \(0 is greedy\), got -0.5"),
    ({"prompt": torch.zeros(2, 3, dtype=torch.int64)}, r"prompt: expected the mask \(3\) wherever text is wanted, got none"),
    ({"prompt": torch.tensor([[3, 3, 9]]), "batch_size": None}, r"prompt: expected ids in 0 .. 3, got 9"),
    ({"prompt": torch.tensor([3, 3])}, r"prompt: expected an int64 tensor \[B, L\], got torch.int64 \[2\]"),
    ({"prompt": torch.full((4, 3), 3)}, r"batch_size: the prompt has 4, got 2"),
    ({"seed": 0.5}, r"seed: expected an int"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(denoiser, change, message):
    with pytest.raises(ValueError, match=message):
        generate(denoiser, **(FULL | change))


def test_bad_networks(universe, denoiser, energy):
    with pytest.raises(ValueError, match=r"denoiser: expected an int attribute mask_token_id"):
        generate(lambda xt, t: xt, **FULL)

    class Wrong:
        mask_token_id, vocab_size = 3, 4

        def __call__(self, xt, t):
            return torch.zeros(*xt.shape, 5)

    with pytest.raises(ValueError, match=r"denoiser: expected logits \[B, L, V\] = \[2, 3, 4\], got \[2, 3, 5\]"):
        generate(Wrong(), **FULL)
    with pytest.raises(ValueError, match=r"energy: expected a floating tensor \[B, K\] = \[2, 8\], got torch.float32 \[2\]"):
        generate(denoiser, energy=lambda x0, xt, t, log_p: torch.zeros(2), window=(0, 1), **FULL)
    with pytest.raises(ValueError, match=r"energy: expected finite energies"):
        generate(denoiser, energy=lambda x0, xt, t, log_p: torch.full(x0.shape[:2], math.nan), window=(0, 1), **FULL)
    with pytest.raises(ValueError, match=r"energy_temperature: expected a number >= 0 .* got -1.0"):
        generate(denoiser, energy=energy, window=(0, 1), energy_temperature=-1.0, **FULL)
