"""The options of the suites: shared by ``edlm bench`` and the scripts, and light, for ``edlm --help`` reads them."""

from __future__ import annotations

import argparse

FAMILIES = ("sampling", "log_probs", "importance")  # of ops
SUITES = {"ops": FAMILIES, "training": ("step", "loader"), "decode": ("loop",), "eval": ("likelihood",)}
DEVICES = ("cpu", "cuda")


def add_arguments(parser: argparse.ArgumentParser, families: bool = True) -> None:
    if families:
        parser.add_argument(
            "--family",
            action="append",
            choices=[family for suite in SUITES.values() for family in suite],
            help="only this family of the suite; may be repeated (default: all of it)",
        )
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", dest="effort", action="store_const", const="quick", help="the headline cases (the default)")
    effort.add_argument("--full", dest="effort", action="store_const", const="full", help="every sweep, and peak memory: minutes")
    effort.add_argument("--smoke", dest="effort", action="store_const", const="smoke", help="tiny sizes, to see that it runs")
    parser.set_defaults(effort="quick")
    parser.add_argument(
        "--device", choices=DEVICES, default="cpu", help="where the inputs lie and the ops run (default: %(default)s)"
    )
    parser.add_argument("--memory", action="store_true", help="peak memory too, in fresh processes (part of --full)")
    parser.add_argument("--repetitions", type=int, metavar="N", help="rounds of each case, at least 3 (default: 15; smoke: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write every result, with machine, versions and command")
    parser.add_argument("--markdown", metavar="FILE", help="print the tables of a file that --json wrote, and time nothing")
    parser.add_argument(
        "--allow-reference", action="store_true", help="time pure-torch references too, where no kernel was compiled"
    )
