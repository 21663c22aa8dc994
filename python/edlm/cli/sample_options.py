"""The options of ``edlm sample``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


def count_or_auto(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, or auto, got {text!r}") from None


class _Window(argparse.Action):
    """LO HI, or auto. As many values as there are: argparse itself would take what is behind them for the model, or not."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        given = list(values or ())
        if given == ["auto"]:
            setattr(namespace, self.dest, "auto")
            return
        try:
            low, high = map(float, given)
        except ValueError:
            many = len(given) > 2 or given[0] == "auto"
            got = f"{len(given)} values; put the model's folder before the options" if many else " ".join(given)
            raise argparse.ArgumentError(self, f"expected LO HI, or auto, got {got}") from None
        setattr(namespace, self.dest, (low, high))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # No default of the sampler's is repeated as a value here: what is not given is not passed on.
    parser.add_argument("model", help="folder of a trained denoiser, or of an autoregressive model")
    what = parser.add_argument_group("what to decode")
    prompt = what.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="text with _ (of a BPE: [MASK]) where text is wanted; otherwise all is generated")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a prompt a line, of any lengths")
    what.add_argument(
        "--num", "--num-texts", type=int, dest="num", help="how many texts, of each prompt of a file (default: 4; with a file: 1)"
    )
    what.add_argument("--length", type=int, help="tokens of each, without a prompt (default: 128, or the model's most)")
    what.add_argument("--stop", metavar="TOKEN", help="end a text with this token: as text, by its special name, or its id")
    what.add_argument("--batch-size", type=int, default=32, help="texts decoded at a time (default: %(default)s)")
    what.add_argument(
        "--seed",
        type=int,
        default=0,
        help="text n of N uses seed * N + n: with the same --num, two seeds share no text (default: %(default)s)",
    )
    order, energy = add_decoding(parser)
    order.add_argument("--steps", type=int, help="of the ancestral and the remasking sampler, in each block (default: 32)")
    energy.add_argument("--num-candidates", type=count_or_auto, metavar="K", help="a number, or auto (default: 8)")
    where = parser.add_argument_group("where to")
    where.add_argument("--out", metavar="FILE.jsonl", help="write a record a text; several processes of torchrun share the work")
    where.add_argument("--resume", action="store_true", help="complete the file that the same command has begun")
    where.add_argument("--json", action="store_true", help="print texts, tokens and all diagnostics as JSON")
    where.add_argument("--history", action="store_true", help="with --json: every state")
    where.add_argument("--html", metavar="FILE", help="write a page that replays the first batch")
    where.add_argument("--watch", action="store_true", help="show the texts while they are decoded (extra: view)")
    where.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    where.add_argument("--threads", type=int, help="CPU threads of a process, on which last bits depend (default: torch's)")


def add_decoding(parser: argparse.ArgumentParser, when: str = "") -> tuple[Any, Any]:
    """The options that ``edlm eval --decode`` has too. The groups of the order and of the energy, for those that differ there.

    ``when``: what the titles say of where they hold.
    """
    order = parser.add_argument_group(f"in which order (denoisers){when}")
    order.add_argument(
        "--sampler", choices=("ancestral", "first_hitting", "remasking", "left_to_right"), help="(default: ancestral)"
    )
    order.add_argument("--remask-prob", type=float, help="remasking: at most this a step (default: 0.02)")
    order.add_argument("--block-length", type=int, help="decode in blocks of so many tokens, from the left")
    order.add_argument("--context-length", type=int, help="tokens that the networks see at once (default: what they can)")
    energy = parser.add_argument_group(
        f"the energy (denoisers){when and f'{when}, but for --energy, --carry-over, --num-candidates'}"
    )
    energy.add_argument(
        "--energy", metavar="MODEL", help="folder of an NCE energy, or of an autoregressive model, whose residual is used"
    )
    energy.add_argument("--carry-over", action="store_true", help="score masked positions alone (EDLM-coAR)")
    energy.add_argument("--ess-target", type=float, help="auto candidates: as many as give this ESS (default: 4)")
    energy.add_argument("--max-candidates", type=int, help="auto candidates: at most so many (default: 32)")
    energy.add_argument(
        "--window", nargs="+", action=_Window, metavar=("LO", "HI"), help="energy iff LO < t <= HI; or auto (default: 0.8 1)"
    )
    energy.add_argument("--window-ess", type=float, help="auto window: ends at this ESS / K (default: 0.95)")
    energy.add_argument("--energy-temperature", type=float, help="0 picks the lowest energy (default: 1)")
    energy.add_argument("--energy-batch-size", type=int, help="completions scored at a time (default: all of a batch)")
    energy.add_argument("--num-particles", type=int, help="sequential Monte Carlo with so many a text (default: 1)")
    energy.add_argument("--resample-threshold", type=float, help="below this ESS / particles (default: 0.5)")
    energy.add_argument("--resample-scheme", help="systematic, stratified, residual, multinomial (default: systematic)")
    proposal = parser.add_argument_group(f"the proposal{when}")
    proposal.add_argument("--temperature", type=float, help="0 is greedy (default: 1)")
    proposal.add_argument("--top-k", type=int, help="keep the k most probable tokens")
    proposal.add_argument("--top-p", type=float, help="keep the most probable tokens up to this mass")
    proposal.add_argument("--min-p", type=float, help="keep tokens at least this likely, relative to the likeliest")
    return order, energy
