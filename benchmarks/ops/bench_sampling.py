"""sample_candidates and sample_categorical: K draws a row with their log-probabilities, from one read of the logits.

Rows of logits stand for the masked rows of a decode step. Beside the floors: what is written by hand (log_softmax, multinomial with
replacement, gather), the same compiled, and what research code runs: K argmaxes over a vocabulary of Gumbel noise, in float32 and
in float64. What a GPU is asked lies in cuda_sampling.py. python benchmarks/ops/bench_sampling.py --help
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

if not __package__:  # run as a script: the checkout it lies in is the package that it belongs to
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "benchmarks.ops"

from edlm.ops import sample_candidates, sample_categorical

from ..claims import HAND, HAND_COMPILED
from ..harness import Variant, compiled
from ..session import Session

OPS = ("sample_candidates", "sample_categorical")
KS = (1, 8, 16)
HEADLINE = ((512, 50258), (256, 151936))
FILTERS = {
    "temperature 0.7": {"temperature": 0.7},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
}
LARGEST = 256 * 151936 * 4  # bytes of the largest input
LARGEST_CUDA = 8192 * 151936 * 4


def by_hand(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs = torch.log_softmax(logits.float(), -1)
    tokens = torch.multinomial(log_probs.exp(), k, replacement=True)
    return tokens, log_probs.gather(-1, tokens)


def gumbel(logits: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    """K times argmax(log p + Gumbel noise), as argmax(p / exponential noise): one logarithm less, as MDLM's code has it."""
    probs = logits.to(dtype).softmax(-1)
    return torch.stack([(probs / (1e-10 - (torch.rand_like(probs) + 1e-10).log())).argmax(-1) for _ in range(k)], 1)


def moved(n: int, v: int, k: int, dtype: torch.dtype) -> int:
    """The logits of the rows, once; a token and a log-probability a draw."""
    return n * v * dtype.itemsize + 12 * n * k


def candidates(
    session: Session, fresh: Callable, n: int, v: int, k: int, dtype: torch.dtype, name: str = "", **options: object
) -> Variant:
    xt, offset = torch.full((1, n), v - 1, device=session.device), session.offset

    def call(i: int) -> object:
        return sample_candidates(fresh(i).unsqueeze(0), xt, v - 1, k, seed=session.seed(i, 1), offset=offset, **options)

    return Variant(name or f"sample_candidates, K = {k}", call, moved(n, v, k, dtype), k)


def categorical(session: Session, fresh: Callable, n: int, v: int, k: int, dtype: torch.dtype) -> Variant:
    position, offset = session.positions(n), session.offset

    def call(i: int) -> object:
        return sample_categorical(fresh(i), k, position=position, seed=session.seed(i, n), offset=offset)

    return Variant(f"sample_categorical, K = {k}", call, moved(n, v, k, dtype), k)


def case(session: Session, label: str, n: int, v: int, dtype: torch.dtype, *, hand: bool, noise: bool) -> None:
    """Both ops at every K beside the floors; with the baselines by hand and, apart, with Gumbel noise."""
    fresh = session.inputs.fresh(n, v, dtype)
    variants = session.floors(fresh)
    for k in KS:
        variants += [candidates(session, fresh, n, v, k, dtype), categorical(session, fresh, n, v, k, dtype)]
    size = moved(n, v, 8, dtype)
    if hand:
        variants.append(Variant(HAND, lambda i: by_hand(fresh(i), 8), size, 8))
        if session.inductor:
            fast = compiled(by_hand)
            fast(fresh(0), 8)
            variants.append(Variant(HAND_COMPILED, lambda i: fast(fresh(i), 8), size, 8))
    apart = []
    if noise:
        for kind in (torch.float32, torch.float64):
            # Seconds a call: a part of the rows stands for all, which caches favour if anything. --full times all in float32.
            rows = n if session.smoke or (session.full and kind == torch.float32) else min(n, max(1, (1 << 21) // v))
            bits = str(kind).removeprefix("torch.")
            call = Variant(f"Gumbel in {bits}, K = 8", lambda i, r=rows, t=kind: gumbel(fresh(i)[:r], 8, t), size, 8)
            apart.append((call, rows))
    session.measure(f"{label}: {n} x {v}", variants, n=n, v=v, dtype=dtype, apart=apart)


def filters(session: Session, n: int, v: int, dtype: torch.dtype = torch.float32) -> None:
    fresh = session.inputs.fresh(n, v, dtype)
    variants = [*session.floors(fresh, inductor=not session.cuda), candidates(session, fresh, n, v, 8, dtype)]
    for name, options in FILTERS.items():
        variants.append(candidates(session, fresh, n, v, 8, dtype, f"sample_candidates, K = 8, {name}", **options))
    calls = session.calls(moved(n, v, 8, dtype))
    session.measure(f"temperature and filters: {n} x {v}", variants, n=n, v=v, dtype=dtype, inner=calls)


def masked(session: Session, length: int, v: int, dtype: torch.dtype = torch.float32) -> None:
    """Clean rows are not read: the cost should follow the masked ones."""
    fresh, offset = session.inputs.fresh(length, v, dtype), session.offset
    variants = []
    for percent in (10, 50, 100):
        n = max(1, length * percent // 100)
        xt = torch.zeros(1, length, dtype=torch.int64)
        xt[0, torch.randperm(length, generator=session.inputs.generator)[:n]] = v - 1
        xt = xt.to(session.device)

        def call(i: int, xt: torch.Tensor = xt) -> object:
            return sample_candidates(fresh(i).unsqueeze(0), xt, v - 1, 8, seed=session.seed(i, 1), offset=offset)

        size = moved(n, v, 8, dtype) + 12 * 8 * (length - n)
        variants.append(Variant(f"sample_candidates, K = 8, {percent} % masked", call, size, 8))
    calls = session.calls(moved(length, v, 8, dtype))
    session.measure(f"rows that are masked: {length} x {v}", variants, n=length, v=v, dtype=dtype, inner=calls)


def threads(session: Session, v: int) -> None:
    """One row, which only its columns can share among threads."""
    fresh = session.inputs.fresh(1, v, torch.float32)
    most = torch.get_num_threads()
    xt = torch.full((1, 1), v - 1)

    def team(count: int) -> Callable[[], object]:
        def before() -> None:  # the first call after a change starts the threads
            torch.set_num_threads(count)
            sample_candidates(fresh(0).unsqueeze(0), xt, v - 1, 8, seed=0)

        return before

    variants = [
        Variant(
            f"sample_candidates, K = 8, {count} thread{'s' * (count > 1)}",
            lambda i: sample_candidates(fresh(i).unsqueeze(0), xt, v - 1, 8, seed=i),
            moved(1, v, 8, torch.float32),
            8,
            threads=count,
            before=team(count),
        )
        for count in (1, 2)
    ]
    try:
        session.measure(f"threads: 1 x {v}", variants, n=1, v=v, dtype=torch.float32, inner=20)
    finally:
        torch.set_num_threads(most)


def run(session: Session) -> None:
    if session.cuda:
        from . import cuda_sampling

        cuda_sampling.run(session)
        return
    if session.smoke:
        for dtype in (torch.float32, torch.bfloat16):
            case(session, "decode step", 8, 501, dtype, hand=True, noise=dtype == torch.float32)
        filters(session, 4, 101)
        masked(session, 20, 101)
        threads(session, 1001)
        return
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if session.full else (torch.float32, torch.bfloat16)
    for n, v in HEADLINE:
        for dtype in dtypes:
            single = dtype == torch.float32
            case(session, "decode step", n, v, dtype, hand=single or session.full, noise=single)
    case(session, "decode step", 65536, 27, torch.float32, hand=True, noise=session.full)
    filters(session, *HEADLINE[0])
    masked(session, *HEADLINE[0])
    threads(session, 151936)
    if session.full:
        for dtype in dtypes:
            for v in (27, 4096, 50257, 50258, 151936):
                for n in (1, 64, 256 if v == 151936 else 512):
                    if (n, v) not in HEADLINE:
                        case(session, "sweep", n, v, dtype, hand=True, noise=False)
            if dtype != torch.float32:
                case(session, "sweep", 65536, 27, dtype, hand=True, noise=False)


if __name__ == "__main__":
    from ..suite import script

    sys.exit(script("sampling", __doc__))
