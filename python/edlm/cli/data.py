"""``edlm data``."""

from __future__ import annotations

import argparse

HELP = "to come"
EXAMPLES = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(options: argparse.Namespace) -> int:
    raise ValueError(f"{options.command}: to come")
