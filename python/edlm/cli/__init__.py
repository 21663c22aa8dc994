"""The command line. One file a command: HELP, EXAMPLES, add_arguments(parser), run(options) -> exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from .. import __version__

COMMANDS = ("demo", "train", "sample", "eval", "report", "data", "plot", "convert", "bench", "info")


class Parser(argparse.ArgumentParser):
    """Its mistakes are one line, as all others. Parsers of commands are of this class too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"edlm: error: {_line(message).removeprefix('argument ')}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
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
    with _warnings_of_one_line():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read has left, as head does. What is still buffered goes nowhere, so that Python does not complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        wanted = re.search(r"tried to allocate [\d.,]+ \w+", str(error), re.IGNORECASE)
        less = _LESS.get(options.command, "smaller batches, or shorter texts")
        _say("error", f"{options.command}: out of memory{f' ({wanted[0].lower()})' if wanted else ''}; take {less}")
        return 2
    except (ValueError, OSError, FloatingPointError, OverflowError, ImportError) as error:
        _say("error", str(error))
        return 2
    except KeyboardInterrupt:
        return 130


_LESS = {
    "sample": "fewer texts at a time (--batch-size), shorter ones, fewer candidates",
    "eval": "fewer at a time (--batch-size), shorter ones, fewer draws (--num-candidates)",
}


def _is_out_of_memory(error: BaseException) -> bool:
    """torch has a class for it on a GPU; on a CPU it is a RuntimeError like any other."""
    said = ("out of memory", "can't allocate memory", "DefaultCPUAllocator")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


@contextmanager
def _warnings_of_one_line() -> Iterator[None]:
    before = warnings.showwarning
    warnings.showwarning = lambda message, *place: _say("warning", str(message))
    try:
        yield
    finally:
        warnings.showwarning = before


def _say(kind: str, message: str) -> None:
    print(f"edlm: {kind}: {_line(message)}", file=sys.stderr)


def _line(message: str) -> str:
    return " ".join(line.strip() for line in message.splitlines())
