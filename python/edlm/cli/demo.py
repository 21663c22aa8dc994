"""``edlm demo``: the whole method in a few minutes."""

from __future__ import annotations

import argparse

from .train import interruptible

HELP = "train two tiny models on real text, decode MDLM and EDLM side by side, and let a judge compare them"
EXAMPLES = """edlm demo                 # trains two tiny models in a few minutes, then decodes with both"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default="runs/demo", help="folder of the models (default: %(default)s); finished ones are used again"
    )
    parser.add_argument("--denoiser-steps", type=int, default=700, help="training steps of the denoiser (default: %(default)s)")
    parser.add_argument(
        "--ar-steps", type=int, default=400, help="training steps of the autoregressive model (default: %(default)s)"
    )
    parser.add_argument("--num", type=int, default=96, help="texts to decode each way (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the decoding (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    from ..demo import demo

    return interruptible(
        lambda: demo(
            options.out,
            denoiser_steps=options.denoiser_steps,
            ar_steps=options.ar_steps,
            num_samples=options.num,
            seed=options.seed,
        )
    )
