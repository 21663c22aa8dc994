"""``edlm sample``: text from a trained denoiser."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from .models import device_named, model_folder, open_energy
from .printing import number

if TYPE_CHECKING:
    import torch

    from ..samplers import SampleOutput

HELP = "decode text from a trained denoiser, with or without an energy"
EXAMPLES = """edlm sample runs/denoiser/model --num 2 --length 128 --steps 32
edlm sample runs/denoiser/model --energy runs/ar/model --window 0 1 --num-candidates 16
edlm sample runs/denoiser/model --prompt "it is a truth ____________ acknowledged"
In a prompt _ is a character to be filled in; where the model reads a BPE, [MASK] is a token.
Low energy is good; ESS says how many of the K candidates count."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder of a trained denoiser")
    parser.add_argument(
        "--energy", metavar="MODEL", help="folder of an NCE energy, or of an autoregressive model, whose residual is used"
    )
    parser.add_argument("--carry-over", action="store_true", help="score masked positions alone (EDLM-coAR)")
    parser.add_argument("--prompt", help="text with _ (of a BPE: [MASK]) where text is wanted; otherwise all is generated")
    parser.add_argument("--num", type=int, default=4, help="how many texts (default: %(default)s)")
    parser.add_argument("--length", type=int, help="tokens of each, without a prompt (default: 128)")
    parser.add_argument("--sampler", choices=("ancestral", "first_hitting"), default="ancestral", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, help="ancestral steps (default: 32)")
    parser.add_argument("--num-candidates", type=int, help="K (default: 8 with an energy)")
    parser.add_argument("--window", type=float, nargs=2, metavar=("LO", "HI"), default=(0.8, 1.0), help="energy iff LO < t <= HI")
    parser.add_argument("--energy-temperature", type=float, default=1.0, help="0 picks the lowest energy (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the proposal; 0 is greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="keep the k most probable tokens")
    parser.add_argument("--top-p", type=float, help="keep the most probable tokens up to this mass")
    parser.add_argument("--min-p", type=float, help="keep tokens at least this likely, relative to the likeliest")
    parser.add_argument(
        "--seed", type=int, default=0, help="text n uses seed * num + n: two seeds share no text (default: %(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    parser.add_argument("--json", action="store_true", help="print texts, tokens and all diagnostics as JSON")


def run(options: argparse.Namespace) -> int:
    import torch

    from ..data import tokenizer_from
    from ..models import DiT
    from ..samplers import generate

    if options.carry_over and not options.energy:
        raise ValueError("--carry-over: it is a way to score with an energy, got none; give --energy as well, or leave it out")
    if options.num < 1:
        raise ValueError(f"--num: expected a number >= 1, got {options.num}")
    device = device_named(options.device)
    denoiser = DiT.from_pretrained(model_folder(options.model), device=device)
    tokenizer = tokenizer_from(denoiser.tokenizer_description)
    energy = None
    if options.energy:
        energy = open_energy(options.energy, denoiser, carry_over=options.carry_over, device=device)
    if options.prompt is None:
        shape: dict[str, Any] = {"batch_size": options.num, "length": 128 if options.length is None else options.length}
    else:
        ids = torch.from_numpy(tokenizer.encode_prompt(options.prompt).astype("int64"))
        shape = {"prompt": ids.repeat(options.num, 1), "length": options.length}
    steps = options.steps if options.steps is not None or options.sampler != "ancestral" else 32
    sample = generate(
        denoiser,
        **shape,
        steps=steps,
        energy=energy,
        num_candidates=options.num_candidates,
        window=tuple(options.window),
        energy_temperature=options.energy_temperature,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        sampler=options.sampler,
        seed=options.seed * options.num,
        device=device,
        progress=not options.json and sys.stderr.isatty(),
    )
    texts = [tokenizer.decode(row) for row in sample.tokens.tolist()]
    if options.json:
        print(json.dumps(_plain(sample, texts), allow_nan=False))
        return 0
    for text in texts:
        print(text)
    used = sample.ess[~sample.ess.isnan()]
    ess = f", ESS {float(used.mean()):.2f} on average" if used.numel() else ""
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in sample.stage_seconds.items() if value > 0)
    print(f"# {sample.nfe} denoiser calls, {sample.energy_nfe} energy calls{ess}; {seconds}", file=sys.stderr)
    return 0


def _plain(sample: SampleOutput, texts: list[str]) -> dict[str, Any]:
    """Everything as JSON values; NaN, where a sequence had no part in a step, becomes null."""

    def table(values: torch.Tensor) -> list[list[float | None]]:
        return [[number(x) for x in row] for row in values.tolist()]

    return {
        "texts": texts,
        "tokens": sample.tokens.tolist(),
        "nfe": sample.nfe,
        "energy_nfe": sample.energy_nfe,
        "step_times": table(sample.step_times),
        "ess": table(sample.ess),
        "log_Z": table(sample.log_Z),
        "stage_seconds": sample.stage_seconds,
    }
