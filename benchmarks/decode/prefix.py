"""What it saves to run the tokens before the first mask once and not K times: ``python benchmarks/decode/prefix.py``."""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from edlm.models import ARResidualEnergy, CausalLM
from edlm.models.causal_lm import CausalLMConfig


class Scorer:
    """A model without its cache: an energy has nothing to share then, and runs every candidate from its start."""

    def __init__(self, model: CausalLM) -> None:
        self.log_probs, self.vocab_size = model.log_probs, model.vocab_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    vocab, batch, k, length = 50257, 4, 8, 128
    model = CausalLM(CausalLMConfig(vocab_size=vocab, bos_token_id=vocab, dim=256, num_layers=4, num_heads=4)).eval()
    tokens = torch.randint(vocab, (batch, 1, length)).expand(batch, k, length).clone()
    print("| masked | energy | every candidate from its start, ms | prefix once, ms | ratio |")
    print("|---|---|---|---|---|")
    for first in (0, 64, 96):
        masked = torch.zeros(batch, length, dtype=torch.bool)
        masked[:, first:] = True
        x0 = tokens.clone()
        x0[..., first:] = torch.randint(vocab, (batch, k, length - first))
        xt = torch.where(masked, vocab, x0[:, 0])
        log_p = torch.zeros(batch, k, length)
        for name, carry_over in (("AR", False), ("coAR", True)):
            energy = ARResidualEnergy(model, carry_over, mask_token_id=vocab)
            # In chunks of the same size; the two take turns.
            plain = ARResidualEnergy(Scorer(model), carry_over, mask_token_id=vocab, bytes_per_token=energy.bytes_per_token)
            ways = {
                way: lambda e=e, x=x0, z=xt, lp=log_p, m=masked: e.score(x, z, None, lp, masked=m)
                for way, e in (("plain", plain), ("once", energy))
            }
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            with torch.no_grad():
                torch.testing.assert_close(ways["plain"](), ways["once"](), atol=1e-3, rtol=1e-5)
                for _ in range(options.rounds):
                    for way, call in ways.items():
                        start = time.perf_counter()
                        call()
                        seconds[way].append(time.perf_counter() - start)
            apart, once = (1000 * statistics.median(seconds[way]) for way in ("plain", "once"))
            where = f"the last {length - first} of {length}" if first else "all"
            print(f"| {where} | {name} | {apart:.0f} | {once:.0f} | {apart / once:.2f} |", flush=True)


if __name__ == "__main__":
    main()
