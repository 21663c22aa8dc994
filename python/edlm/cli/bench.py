"""``edlm bench``: the benchmarks that lie beside the package."""

from __future__ import annotations

import argparse
import importlib

HELP = (
    "time ops, training steps, the decode loop or likelihoods against what others run, and say which performance claims are met"
)
EXAMPLES = """edlm bench ops                        # the headline cases of every family, about a minute
edlm bench ops --family sampling --full
edlm bench ops --full --json results.json
edlm bench ops --markdown results.json  # the tables and the verdict of that file
edlm bench training --full
edlm bench decode                     # the whole decode loop against the published one, about two minutes
edlm bench decode --full --json decode.json
edlm bench eval                       # likelihoods against eager evaluation, about a minute
Times are medians of interleaved rounds; those of the ops stand beside a read-only pass over the same logits."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", choices=("ops", "training", "decode", "eval"), help="what to time")
    # The suite lies beside the rooms: by name, and an editable installation that is older than it lacks it.
    try:
        importlib.import_module("edlm.benchmarks.arguments").add_arguments(parser)
    except ModuleNotFoundError:
        parser.add_argument("ignored", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    try:
        suite = importlib.import_module("edlm.benchmarks.suite")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("edlm.benchmarks"):
            raise
        raise ValueError(
            "bench: this installation has no benchmarks; install edlm again: pip install --no-build-isolation -e ."
        ) from None
    return suite.run(options)
