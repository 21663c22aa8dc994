"""The command line. One file a command: HELP, EXAMPLES, add_arguments(parser), run(options) -> exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__

COMMANDS = ("demo", "train", "sample", "eval", "data", "plot", "convert", "bench", "info")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edlm",
        description="Energy-based diffusion language models: train, sample and evaluate, on compiled kernels.",
        epilog="edlm COMMAND --help has examples. Start with: edlm demo",
    )
    parser.add_argument("--version", action="version", version=f"edlm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = importlib.import_module(f".{name}", __name__)
        one = commands.add_parser(
            name,
            help=command.HELP,
            description=command.HELP[0].upper() + command.HELP[1:] + ".",
            epilog="examples:\n  " + command.EXAMPLES.replace("\n", "\n  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(one)
        one.set_defaults(run=command.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. A user's mistake is one line on stderr and code 2, never a traceback."""
    options = build_parser().parse_args(arguments)
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read has left, as head does. What is still buffered goes nowhere, so that Python does not complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (ValueError, OSError, FloatingPointError, OverflowError, MemoryError, ImportError) as error:
        print(f"edlm: error: {' '.join(line.strip() for line in str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
