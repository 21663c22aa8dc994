"""Bring your own networks: two classes and a function that fit edlm.protocols, and nothing of edlm but the loop.

The data is a Markov chain. The "network" is its exact factorised denoiser (each position's marginal, given the nearest observed
neighbours), and the energy comes from the chain itself. With few steps the denoiser alone opens many positions at once and
independently; the energy repairs that. Run: python examples/own_network.py
"""

from __future__ import annotations

import math

import torch
from edlm.samplers import generate

STATES, LENGTH, MASK = 6, 16, 6


class Chain:
    """x_i -> x_{i+1} moves to one of two neighbours, mostly. It scores sequences as a CausalLM would."""

    def __init__(self) -> None:
        p = torch.full((STATES, STATES), 0.01)
        for i in range(STATES):
            p[i, (i + 1) % STATES] += 0.6
            p[i, (i - 1) % STATES] += 0.35
        self.transition = p / p.sum(1, keepdim=True)
        self.powers = [torch.linalg.matrix_power(self.transition, n) for n in range(LENGTH + 1)]

    def log_probs(self, x0: torch.Tensor) -> torch.Tensor:
        """[N, L] -> [N, L]: log p(x_i | x_<i); the first token is uniform."""
        steps = self.transition.log()[x0[:, :-1], x0[:, 1:]]
        return torch.cat([torch.full_like(steps[:, :1], -math.log(STATES)), steps], 1)


class ChainDenoiser:
    """The Denoiser protocol: two attributes and a call. A trained network goes here."""

    mask_token_id, vocab_size = MASK, STATES + 1

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def __call__(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*xt.shape, self.vocab_size)  # the mask's column is ignored by the loop
        for b, row in enumerate(xt.tolist()):
            seen = [i for i, token in enumerate(row) if token != MASK]
            for i in range(len(row)):
                left = max((j for j in seen if j <= i), default=None)
                right = min((j for j in seen if j >= i), default=None)
                if left is not None:
                    logits[b, i, :STATES] += self.chain.powers[i - left][row[left]].log()
                if right is not None:
                    logits[b, i, :STATES] += self.chain.powers[right - i][:, row[right]].log()
        return logits


def main() -> None:
    chain = Chain()
    denoiser = ChainDenoiser(chain)

    def energy(x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        """The EnergyModel protocol, [B, K, L] -> [B, K]: -log p(x0) + log mu(x0 | xt). Low energy is good."""
        score = chain.log_probs(x0.flatten(0, 1)).view(x0.shape)
        return -score.sum(-1) + log_p.sum(-1)

    print("nats per sequence under the chain (its entropy is the best there is), 200 sequences each")
    rows = chain.transition
    entropy = math.log(STATES) - (LENGTH - 1) * float((rows * rows.log()).sum(1).mean())
    print(f"  entropy of the chain {entropy:8.2f}")
    for steps in (2, 4, 8):
        for name, options in (
            ("denoiser alone", {}),
            ("with the energy", {"energy": energy, "num_candidates": 32, "window": (0, 1)}),
        ):
            out = generate(denoiser, batch_size=200, length=LENGTH, steps=steps, seed=1, **options)
            nll = -chain.log_probs(out.tokens).sum(1)
            ess = out.ess[~out.ess.isnan()]
            extra = f", mean ESS {ess.mean():.1f} of 32" if ess.numel() else ""
            print(f"  {steps} steps, {name:16}{nll.mean():7.2f} +- {nll.std() / math.sqrt(len(nll)):.2f}{extra}")


if __name__ == "__main__":
    main()
