"""What a GPU is asked of sample_candidates and sample_categorical: every size of a decode step, filters, masks, and latency.

Nothing here is on the path of a CPU's run; a smoke of it runs there, for the tests.
"""

from __future__ import annotations

import torch

from .. import peers
from ..claims import GRAPH_CHECK, HAND, HAND_COMPILED
from ..device import graph_check
from ..harness import AMAX, Variant, compiled
from ..session import Session
from .bench_sampling import KS, by_hand, candidates, categorical, filters, gumbel, masked, moved

ROWS, VOCABULARIES = (1, 64, 1024, 8192), (27, 50257, 50258, 151936)
HEADLINE = ((1024, 50258), (1024, 151936))  # with what inductor compiles, which takes seconds for each shape
_MOST_CALLS = 1024  # of a graph


def decode_step(session: Session, n: int, v: int, dtype: torch.dtype) -> None:
    name = f"decode step: {n} x {v}"
    if not session.fits(name, n, v, dtype):
        return
    fresh, size = session.inputs.fresh(n, v, dtype), moved(n, v, 8, dtype)
    headline = (n, v) in HEADLINE and dtype == torch.bfloat16
    variants = session.floors(fresh, inductor=headline)
    variants += [candidates(session, fresh, n, v, k, dtype) for k in KS]
    variants += [categorical(session, fresh, n, v, 8, dtype), Variant(HAND, lambda i: by_hand(fresh(i), 8), size, 8)]
    if session.inductor and headline:
        fast = compiled(by_hand)
        variants.append(Variant(HAND_COMPILED, lambda i: fast(fresh(i), 8), size, 8))
    if (n, v, dtype) == (*HEADLINE[0], torch.float32):
        variants.append(Variant("Gumbel in float32, K = 8", lambda i: gumbel(fresh(i), 8, torch.float32), size, 8))
    flashinfer = peers.flashinfer()
    if isinstance(flashinfer, str):
        session.miss(name, dtype, "flashinfer", flashinfer)
    else:
        variants += [Variant(what, lambda i, draw=draw: draw(fresh(i)), size, 8) for what, draw in flashinfer.items()]
    session.measure(name, variants, n=n, v=v, dtype=dtype, inner=session.calls(size), budget_s=4.0)


def latency(session: Session, n: int, v: int, dtype: torch.dtype) -> None:
    """Few rows three ways: a caller who waits for each call, calls in a queue, and a graph, which is the device's part alone."""
    name = f"latency: {n} x {v}"
    fresh, size = session.inputs.fresh(n, v, dtype), moved(n, v, 8, dtype)
    ours = candidates(session, fresh, n, v, 8, dtype)
    # As many calls in the graph as it takes to read more than a cache holds, where so many are not too many.
    calls = 3 if session.smoke else min(_MOST_CALLS, max(50, session.inputs.bytes // (8 * size)))
    variants = [
        Variant(f"{ours.name}, a call and its end", ours.call, size, 8, wall=True),
        Variant(f"{HAND}, a call and its end", lambda i: by_hand(fresh(i), 8), size, 8, wall=True),
        Variant(f"{ours.name}, queued", ours.call, size, 8),
        *session.graph(name, ours, calls, dtype),
        *session.graph(name, Variant(AMAX, lambda i: fresh(i).amax(-1), n * v * dtype.itemsize), calls, dtype),
    ]
    session.measure(name, variants, n=n, v=v, dtype=dtype, inner=session.calls(size), budget_s=4.0)


def run(session: Session) -> None:
    session.check(GRAPH_CHECK, lambda: graph_check(session.device))
    if session.smoke:
        decode_step(session, 8, 501, torch.bfloat16)
        filters(session, 4, 101)
        masked(session, 20, 101)
        latency(session, 2, 101, torch.bfloat16)
        return
    half = torch.bfloat16
    for dtype in (half, torch.float32, *([torch.float16] if session.full else [])):
        for v in VOCABULARIES:
            for n in (*ROWS, *([65536] if v == 27 else [])):
                decode_step(session, n, v, dtype)
    for n, v in HEADLINE:
        filters(session, n, v, half)
    masked(session, 8192, 50258, half)
    for v in (27, 50258, 151936):
        for n in (1, 64):
            latency(session, n, v, half)
