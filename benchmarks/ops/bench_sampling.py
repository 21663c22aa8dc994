"""sample_candidates against a read-only pass and against eager torch: python benchmarks/ops/bench_sampling.py [--json FILE]

Rows of logits stand for the masked rows of a decode step. `amax` reads every logit once: nothing that needs all can be faster.
Eager is what is written by hand: log_softmax, multinomial with replacement, gather. Gumbel is what research code runs: K times a
vocabulary of noise, in float32. Two inputs larger than the caches alternate, so that no variant finds its input there.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from edlm.ops import sample_candidates
from harness import as_dicts, interleave, machine, require_compiled, write_json


def eager(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs = torch.log_softmax(logits.float(), -1)
    tokens = torch.multinomial(log_probs.exp(), k, replacement=True)
    return tokens, log_probs.gather(-1, tokens)


def gumbel(logits: torch.Tensor, k: int) -> torch.Tensor:
    return torch.stack([(logits - torch.empty_like(logits).exponential_().log_()).argmax(-1) for _ in range(k)], 1)


def case(n: int, v: int, dtype: torch.dtype, repetitions: int, *, slow: bool) -> dict:
    inputs = [(2 * torch.randn(1, n, v + 1)).to(dtype) for _ in range(2)]
    xt = torch.full((1, n), v)
    variants = {"amax": lambda i: inputs[i % 2].amax(-1)}
    for k in (1, 8, 16):
        variants[f"sample_candidates K={k}"] = lambda i, k=k: sample_candidates(inputs[i % 2], xt, v, k, seed=i)
    if slow:
        variants["eager K=8"] = lambda i: eager(inputs[i % 2][0], 8)
    timings = interleave(variants, repetitions)
    if slow:  # by itself: it takes seconds, and leaves caches and clock in a state that no decode loop has
        timings |= interleave({"gumbel K=8": lambda i: gumbel(inputs[i % 2][0], 8)}, 3)
    return {"n": n, "v": v + 1, "dtype": str(dtype).removeprefix("torch."), "timings": as_dicts(timings)}


def report(result: dict) -> None:
    timings = {t["name"]: t for t in result["timings"]}
    floor = timings["amax"]["median"]
    print(f"\nN = {result['n']}, V = {result['v']}, {result['dtype']}")
    for t in timings.values():
        size = result["n"] * result["v"] * (4 if result["dtype"] == "float32" else 2)
        print(
            f"  {t['name']:<24}{t['median']:>10.2f} ms  [{t['low']:.2f}, {t['high']:.2f}]{t['median'] / floor:>8.1f} x amax"
            f"{size / t['median'] / 1e6:>8.1f} GB/s of logits"
        )
    k1, k8, k16 = (timings[f"sample_candidates K={k}"]["median"] for k in (1, 8, 16))
    print(f"  K = 16 takes {k16 / k1:.2f} times K = 1", end="")
    if "eager K=8" in timings:
        print(f"; eager takes {timings['eager K=8']['median'] / k8:.1f} times sample_candidates at K = 8", end="")
        print(f", Gumbel {timings['gumbel K=8']['median'] / k8:.0f} times", end="")
    print()


def markdown(document: dict) -> str:
    """The table for documents, from the JSON that a run wrote."""
    lines = [
        "| rows x V, dtype | amax, ms | K = 1 | K = 8 | K = 16 | eager, K = 8 | Gumbel, K = 8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in document["results"]:
        t = {x["name"]: x["median"] for x in result["timings"]}
        ours = [f"{t[f'sample_candidates K={k}']:.1f}" for k in (1, 8, 16)]
        k8 = t["sample_candidates K=8"]
        others = [f"{t[n]:.0f} ({t[n] / k8:.0f}x)" if n in t else "-" for n in ("eager K=8", "gumbel K=8")]
        lines.append(f"| {result['n']} x {result['v']}, {result['dtype']} | {t['amax']:.1f} | {' | '.join([*ours, *others])} |")
    m = document["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"{m['cpu']}, {m['threads']} threads, {m['isa']}, torch {m['torch']}, medians of one interleaved run, Gumbel beside it.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the results, with machine and versions")
    parser.add_argument("--markdown", metavar="FILE", help="print the table of such a file, and run nothing")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(json.loads(Path(arguments.markdown).read_text())))
        return
    require_compiled("sample_candidates")
    torch.manual_seed(0)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    cases = [(512, 50257), (256, 151935)] if not arguments.smoke else [(8, 500)]
    results = []
    for n, v in cases:
        for dtype in (torch.float32, torch.bfloat16):
            results.append(case(n, v, dtype, arguments.repetitions, slow=dtype == torch.float32))
            report(results[-1])
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
