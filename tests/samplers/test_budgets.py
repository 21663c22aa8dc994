"""How energies are chunked changes no more than the last bits of matrix products; ``pytest -s`` prints the share of equal tokens."""

from __future__ import annotations

import pytest
import torch
from edlm.models import ARResidualEnergy, CausalLM, DiT, NCEEnergy
from edlm.models.causal_lm import CausalLMConfig
from edlm.models.dit import DiTConfig
from edlm.samplers import generate

SIZE = {"dim": 64, "num_layers": 3, "num_heads": 4}
VOCAB = 1000


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    model = DiT(DiTConfig(vocab_size=VOCAB, mask_token_id=VOCAB - 1, **SIZE)).eval()
    torch.nn.init.normal_(model.linear.weight, std=0.3)
    return model


def energy_of(kind, denoiser):
    torch.manual_seed(1)
    if kind == "nce":
        model = NCEEnergy.from_denoiser(denoiser)
        torch.nn.init.normal_(model.mlp[-1].weight, std=0.2)
        return model
    causal_lm = CausalLM(CausalLMConfig(vocab_size=VOCAB - 1, bos_token_id=VOCAB - 1, **SIZE))
    torch.nn.init.normal_(causal_lm.linear.weight, std=0.3)
    return ARResidualEnergy(causal_lm, kind == "coar", mask_token_id=VOCAB - 1)


@pytest.mark.parametrize("kind", ["ar", "coar", "nce"])
@pytest.mark.parametrize("block_length", [None, 16])
def test_share_of_equal_tokens(denoiser, kind, block_length):
    """From one sequence a chunk to all of them, and one candidate a call: 8 sequences of 48 tokens, K = 6, every step."""
    energy = energy_of(kind, denoiser)
    prompt = torch.full((8, 48), VOCAB - 1)
    prompt[:, :8] = torch.arange(8)
    common = {
        "prompt": prompt, "steps": 8, "energy": energy, "num_candidates": 6, "window": (0, 1), "seed": 5,
        "block_length": block_length,
    }  # fmt: skip
    whole = generate(denoiser, **common)
    assert (~whole.ess.isnan()).any() and float(whole.ess.nanmean()) < 5.9  # the energy has a say
    for max_bytes, rows in ((1, None), (1 << 20, None), (256 << 20, 7), (256 << 20, 1)):
        energy.max_bytes = max_bytes
        out = generate(denoiser, energy_batch_size=rows, **common)
        equal = float((out.tokens == whole.tokens).double().mean())
        print(
            f"{kind}, blocks of {block_length}: max_bytes {max_bytes}, energy_batch_size {rows}: {equal:.4f} of the tokens are equal"
        )
        assert equal > 0.95
    energy.max_bytes = 256 << 20
