"""select_candidate, resample and reverse_step: microseconds, where a call's own overhead counts.

Beside them: softmax + multinomial; systematic resampling by cumsum + searchsorted; a clone of xt, which is half of what a reverse
step must move, and torch.where + gather. The overhead of an op's call is that of reverse_step at B = 1, L = 1.
python benchmarks/ops/bench_importance.py --help
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

if not __package__:  # run as a script: the checkout it lies in is the package that it belongs to
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "benchmarks.ops"

from edlm.ops import resample, reverse_step, select_candidate

from ..harness import Variant
from ..session import Session

OPS = ("select_candidate", "resample", "reverse_step")
SCHEMES = ("systematic", "stratified", "multinomial", "residual")
SETS = 16  # inputs in turn
INNER = 50  # calls a sample
LARGEST = LARGEST_CUDA = 1 << 20


def systematic_by_hand(log_weights: torch.Tensor) -> torch.Tensor:
    batch, n = log_weights.shape
    device = log_weights.device
    points = (torch.arange(n, device=device) + torch.rand(batch, 1, device=device)) / n
    return torch.searchsorted(log_weights.softmax(-1).cumsum(-1), points).clamp_max(n - 1)


def inner(session: Session) -> int:
    return session.calls(1) if session.cuda else INNER


def select(session: Session, batch: int, k: int) -> None:
    energies = (2 * torch.randn(SETS, batch, k, generator=session.inputs.generator)).to(session.device)
    offset = session.offset

    def ours(i: int) -> object:
        return select_candidate(energies[i % SETS], seed=session.seed(i, batch), offset=offset)

    size = 4 * batch * (3 * k + 2) + 8 * batch  # energies; normalised weights and leave-one-out; ess and log Z; the index
    variants = [
        Variant(f"select_candidate, K = {k}", ours, size, k),
        Variant(f"softmax + multinomial, K = {k}", lambda i: torch.multinomial((-energies[i % SETS]).softmax(-1), 1), size, k),
    ]
    case = f"select: B = {batch}"
    variants += session.graph(case, variants[0], INNER)
    session.measure(case, variants, n=batch, v=None, dtype=torch.float32, inner=inner(session))


def resampling(session: Session, batch: int, n: int) -> None:
    log_weights = (2 * torch.randn(SETS, batch, n, generator=session.inputs.generator)).to(session.device)
    size, offset = 12 * batch * n, session.offset

    def ours(scheme: str, i: int) -> object:
        return resample(log_weights[i % SETS], scheme, seed=session.seed(i, batch), offset=offset)

    variants = [Variant(f"resample, {scheme}", partial(ours, scheme), size) for scheme in SCHEMES]
    variants.append(Variant("softmax + cumsum + searchsorted", lambda i: systematic_by_hand(log_weights[i % SETS]), size))
    session.measure(f"resample: B = {batch}, N = {n}", variants, n=n, v=None, dtype=torch.float32, inner=inner(session))


def reverse(session: Session, batch: int, length: int, k: int) -> None:
    """Half of the positions open. One token of one sequence beside it, in the same rounds: what a call itself costs.

    Two inputs in turn, which stay in a cache as what the steps before have just written does: candidates are K times as large as
    xt, and more of them would be cold where xt is not.
    """
    sets = 2
    generator = session.inputs.generator
    xt = torch.randint(50257, (sets, batch, length), generator=generator).to(session.device)
    x0 = torch.randint(50257, (sets, batch, k, length), generator=generator).to(session.device)
    index = torch.randint(k, (sets, batch), generator=generator).to(session.device)
    open_time = torch.rand(sets, batch, length, generator=generator, dtype=torch.float64).to(session.device)
    s = torch.full((1,), 0.5, dtype=torch.float64, device=session.device) if session.cuda else 0.5  # as Session.seed
    one = [t[:, :1, ..., :1].contiguous() for t in (xt, x0, open_time)]

    def by_hand(i: int) -> torch.Tensor:
        chosen = x0[i].gather(1, index[i][:, None, None].expand(-1, 1, length)).squeeze(1)
        return torch.where(open_time[i] >= 0.5, chosen, xt[i])

    def ours(i: int) -> torch.Tensor:
        return reverse_step(xt[i % sets], x0[i % sets], index[i % sets], open_time[i % sets], s)

    variants = [
        Variant("reverse_step", ours, 8 * batch * (4 * length + 1), k),
        Variant("xt.clone()", lambda i: xt[i % sets].clone(), 16 * batch * length),
        Variant("gather + torch.where", lambda i: by_hand(i % sets), 8 * batch * (4 * length + 1), k),
        Variant(
            "reverse_step, B = 1, L = 1",
            lambda i: reverse_step(one[0][i % sets], one[1][i % sets], index[i % sets, :1], one[2][i % sets], s),
            40,
            k,
        ),
    ]
    case = f"reverse step: B = {batch}, L = {length}"
    variants += session.graph(case, variants[0], INNER)
    session.measure(case, variants, n=batch, v=None, dtype=None, inner=inner(session))


def run(session: Session) -> None:
    if session.smoke:
        select(session, 4, 16)
        resampling(session, 2, 8)
        reverse(session, 2, 16, 4)
        return
    for batch in (1, 64, 1024) if session.full or session.cuda else (64, 1024):
        select(session, batch, 16)
    for n in (64, 1024):
        resampling(session, 16, n)
    reverse(session, 64, 1024, 16)
    if session.full:
        for k in (4, 64):
            select(session, 64, k)
        reverse(session, 1, 1024, 16)


if __name__ == "__main__":
    from ..suite import script

    sys.exit(script("importance", __doc__))
