"""``edlm plot``: the curves of training runs, in one picture."""

from __future__ import annotations

import argparse
import sys

HELP = "draw the training curves of one or several runs into a picture"
EXAMPLES = """edlm plot runs/denoiser runs/ar --out curves.png   # training loss and validation, in bits
edlm plot runs/nce                                 # NCE loss beside 2 ln 2, accuracy beside 1/2
edlm plot runs/a runs/b --y loss --y grad_norm --x tokens --smooth 20 --title "two rates"
Takes matplotlib: pip install 'edlm-torch[plot]'."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its metrics.jsonl")
    parser.add_argument("--out", default="curves.png", help="picture: .png, .svg or .pdf (default: %(default)s)")
    parser.add_argument(
        "--y",
        action="append",
        default=[],
        metavar="KEY",
        help="what to draw, a panel each; may be repeated (default: what is usual)",
    )
    parser.add_argument("--x", choices=("step", "tokens", "seconds"), default="step", help="(default: %(default)s)")
    parser.add_argument(
        "--smooth", type=int, metavar="N", help="mean over N lines (default: about a 25th of a run's lines; 1: none)"
    )
    parser.add_argument("--title", help="over everything")


def run(options: argparse.Namespace) -> int:
    from ..train.plot import plot

    notes = plot(options.runs, options.out, y=options.y, x=options.x, window=options.smooth, title=options.title)
    for note in notes:
        print(f"edlm: {note}", file=sys.stderr)
    print(options.out)
    return 0
