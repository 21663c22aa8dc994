"""Does an energy help? Decode with the proposal alone, with the NCE energy, and with the autoregressive one, and let two judges score.

    python examples/compare_decoding.py                            # a small comparison, a minute on two cores
    python examples/compare_decoding.py --num 256 --steps 8 16 32 64 128 --length 256 --json results.json

The judges: the autoregressive model's negative log-likelihood (an independent judge of MDLM and of EDLM-NCE; EDLM-AR is what it prefers
by construction), and a 6-gram model counted on held-out text that no network has seen. Bits per character, +- one standard error over
texts. All methods share seeds, so that K = 1 would give the proposal's own texts; unigram entropy stands beside, for a low score can
be had by repeating what is likely.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from edlm.data import CharTokenizer, normalize, open_text, windows
from edlm.eval import NGramModel, ar_nll, distinct_n, unigram_entropy
from edlm.models import ARResidualEnergy, CausalLM, DiT, NCEEnergy
from edlm.samplers import generate

MODELS = Path(__file__).parent / "models"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of pd_mdlm, pd_ar and pd_nce")
    parser.add_argument(
        "--held-out",
        default="bundled",
        help="text for the 6-gram judge: its test split, on which nothing was trained (default: %(default)s)",
    )
    parser.add_argument("--num", type=int, default=16, help="texts of each kind")
    parser.add_argument("--length", type=int, default=64, help="characters of a text")
    parser.add_argument("--steps", type=int, nargs="+", default=[8])
    parser.add_argument("--num-candidates", type=int, default=8, help="K")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    options = parser.parse_args()

    denoiser = DiT.from_pretrained(options.models / "pd_mdlm")
    causal = CausalLM.from_pretrained(options.models / "pd_ar")
    energies = {
        "MDLM": None,
        "EDLM-NCE": NCEEnergy.from_pretrained(options.models / "pd_nce"),
        "EDLM-AR": ARResidualEnergy(causal, mask_token_id=denoiser.mask_token_id),
    }
    tokenizer = CharTokenizer()
    text = normalize(" ".join(open_text(options.held_out).split("test")))
    held_out = windows(tokenizer.encode(text), options.length)
    judge = NGramModel(held_out[0::2], vocab_size=tokenizer.vocab_size - 1)

    rows = [{"method": "real text", "steps": None} | scores(held_out[1::2][: options.num], causal, judge)]
    for steps in options.steps:
        for name, energy in energies.items():
            begin = time.perf_counter()
            sample = generate(
                denoiser,
                batch_size=options.num,
                length=options.length,
                steps=steps,
                energy=energy,
                num_candidates=None if energy is None else options.num_candidates,
                window=(0.0, 1.0),
                seed=options.seed,
            )
            ess = float(sample.ess.nanmean()) if energy is not None else None
            rows.append(
                {"method": name, "steps": steps}
                | scores(sample.tokens, causal, judge)
                | {"ess": ess, "seconds": time.perf_counter() - begin, "nfe": sample.nfe, "energy_nfe": sample.energy_nfe}
                | {"text": tokenizer.decode(sample.tokens[0].tolist())}
            )
    print(table(rows, options))
    if options.json is not None:
        settings = {"num": options.num, "length": options.length, "num_candidates": options.num_candidates, "seed": options.seed}
        options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


def scores(tokens: torch.Tensor, causal: CausalLM, judge: NGramModel) -> dict[str, float]:
    ar, ngram, entropy = ar_nll(causal, tokens).bits_per_token(), ar_nll(judge, tokens).bits_per_token(), unigram_entropy(tokens)
    return {
        "ar_bits": ar.mean,
        "ar_bits_stderr": ar.stderr,
        "ngram_bits": ngram.mean,
        "ngram_bits_stderr": ngram.stderr,
        "entropy_bits": entropy.mean,
        "distinct_4": float(distinct_n(tokens, 4)),
    }


def table(rows: list[dict], options: argparse.Namespace) -> str:
    head = ["steps", "method", "AR judge", "6-gram judge", "entropy", "distinct 4-grams", "ESS", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        ess, seconds = ("-" if row.get(key) is None else f"{row[key]:.1f}" for key in ("ess", "seconds"))
        cells = [
            "-" if row["steps"] is None else str(row["steps"]),
            row["method"],
            f"{row['ar_bits']:.3f} +- {row['ar_bits_stderr']:.3f}",
            f"{row['ngram_bits']:.3f} +- {row['ngram_bits_stderr']:.3f}",
            f"{row['entropy_bits']:.2f}",
            f"{row['distinct_4']:.2f}",
            ess,
            seconds,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(
        [f"{options.num} texts of {options.length} characters, K = {options.num_candidates}, bits per character:", "", *lines]
    )


if __name__ == "__main__":
    main()
