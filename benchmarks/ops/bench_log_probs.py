"""gather_log_probs and linear_log_probs: log-probabilities of given tokens, and their gradients.

gather_log_probs stands beside the floors, log_softmax + gather (by hand and compiled) and, with its backward, F.cross_entropy on
the same rows. linear_log_probs stands beside all logits at once + F.cross_entropy and, on a GPU, Liger's kernel where it is
installed. --memory measures peak memory: see benchmarks/memory.py for how. python benchmarks/ops/bench_log_probs.py --help
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

if not __package__:  # run as a script: the checkout it lies in is the package that it belongs to
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "benchmarks.ops"

from edlm.ops import gather_log_probs, linear_log_probs

from .. import memory, peers
from ..harness import Variant, compiled
from ..session import Session

OPS = ("gather_log_probs", "gather_log_probs_backward", "linear_log_probs", "linear_log_probs_backward")
HEADLINE = ((512, 50258), (256, 151936))
LINEAR = (512, 768, 50258)  # N, D, V
LINEAR_MEMORY = (4096, 768, 50258)
LARGEST = 256 * 151936 * 4  # bytes of the largest input
CUDA = ((1024, 50258), (8192, 50258), (1024, 151936))
LARGEST_CUDA = 8192 * 50258 * 4


def by_hand(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def fresh_tokens(session: Session, n: int, v: int) -> Callable[[int], torch.Tensor]:
    tokens = torch.randint(v, (8, n), generator=session.inputs.generator).to(session.device)
    return lambda i: tokens[i % 8]


def forward(session: Session, n: int, v: int, dtype: torch.dtype) -> None:
    fresh, tokens = session.inputs.fresh(n, v, dtype), fresh_tokens(session, n, v)
    size = n * v * dtype.itemsize + 12 * n
    headline = not session.cuda or ((n, v), dtype) == (CUDA[0], torch.bfloat16)  # compiling takes seconds for each shape
    variants = [
        *session.floors(fresh, inductor=headline),
        Variant("gather_log_probs", lambda i: gather_log_probs(fresh(i), tokens(i)), size),
        Variant("log_softmax + gather", lambda i: by_hand(fresh(i), tokens(i)), size),
    ]
    if session.cuda:
        variants.append(Variant("F.cross_entropy", lambda i: cross_entropy(fresh(i), tokens(i), reduction="none"), size))
    if session.inductor and headline:
        fast = compiled(by_hand)
        if not session.cuda:
            fast(fresh(0), tokens(0))
        variants.append(Variant("log_softmax + gather, compiled", lambda i: fast(fresh(i), tokens(i)), size))
    session.measure(f"forward: {n} x {v}", variants, n=n, v=v, dtype=dtype, inner=session.calls(size))


def forward_backward(session: Session, n: int, v: int, dtype: torch.dtype) -> None:
    fresh, tokens = session.inputs.fresh(n, v, dtype), fresh_tokens(session, n, v)
    size = 3 * n * v * dtype.itemsize + 12 * n  # read once each way; the gradient is written

    def gradient(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[int], torch.Tensor]:
        def call(i: int) -> torch.Tensor:
            logits = fresh(i).detach().requires_grad_()
            return torch.autograd.grad(loss(logits, tokens(i)), logits)[0]

        return call

    variants = [
        *session.floors(fresh, inductor=not session.cuda),
        Variant("gather_log_probs", gradient(lambda x, y: -gather_log_probs(x, y).mean()), size),
        Variant("F.cross_entropy", gradient(cross_entropy), size),
    ]
    if session.cuda:
        variants.append(Variant("log_softmax + gather", gradient(lambda x, y: -by_hand(x, y).mean()), size))
    session.measure(f"forward + backward: {n} x {v}", variants, n=n, v=v, dtype=dtype, inner=session.calls(size))


def linear(session: Session, n: int, d: int, v: int, dtype: torch.dtype = torch.float32) -> None:
    generator = session.inputs.generator
    hidden = [torch.randn(n, d, generator=generator).to(session.device, dtype) for _ in range(4)]
    weight = (torch.randn(v, d, generator=generator) / d**0.5).to(session.device, dtype)
    tokens = fresh_tokens(session, n, v)
    losses = {
        "linear_log_probs": lambda x, w, y: -linear_log_probs(x, w, y).mean(),
        "logits + F.cross_entropy": lambda x, w, y: cross_entropy(x @ w.t(), y),
    }
    if session.cuda:
        liger = peers.liger()
        if isinstance(liger, str):
            session.miss(f"linear: {n} x {d} x {v}", dtype, peers.LIGER, liger)
        else:
            losses[peers.LIGER] = liger
    reads = dtype.itemsize * (n * d + v * d)

    def value(loss: Callable, i: int) -> torch.Tensor:
        with torch.no_grad():
            return loss(hidden[i % 4], weight, tokens(i))

    def gradients(loss: Callable, i: int) -> tuple[torch.Tensor, ...]:
        leaves = hidden[i % 4].detach().requires_grad_(), weight.detach().requires_grad_()
        return torch.autograd.grad(loss(*leaves, tokens(i)), leaves)

    for label, call, size in (("forward", value, reads + 12 * n), ("forward + backward", gradients, 3 * reads + 12 * n)):
        variants = [Variant(name, lambda i, c=call, loss=loss: c(loss, i), size) for name, loss in losses.items()]
        session.measure(f"linear, {label}: {n} x {d} x {v}", variants, n=n, v=v, dtype=dtype, budget_s=6.0)


def peak_memory(session: Session, gather: tuple[int, int], linear: tuple[int, int, int]) -> None:
    for calls, (n, d, v) in (
        (("gather_log_probs", "log_softmax + gather", "cross_entropy"), (gather[0], 0, gather[1])),
        (("linear_log_probs", "logits + cross_entropy"), linear),
    ):
        rows = []
        for call in calls:
            for way in ("forward", "forward + backward"):
                row = {
                    "family": session.family,
                    "case": f"peak memory: {n}{f' x {d}' if d else ''} x {v}",
                    "name": f"{call}, {way}",
                }
                row |= {"n": n, "v": v, "k": None, "d": d or None, "dtype": "float32", "threads": torch.get_num_threads()}
                rows.append(row | memory.measure(call, backward=way != "forward", n=n, d=d, v=v, device=session.device.type))
        session.add(rows)


def on_cuda(session: Session) -> None:
    for n, v in CUDA:
        for dtype in (torch.bfloat16, torch.float32, *([torch.float16] if session.full else [])):
            if session.fits(f"forward: {n} x {v}", n, v, dtype):
                forward(session, n, v, dtype)
                forward_backward(session, n, v, dtype)
    for dtype in (torch.bfloat16, torch.float32):
        linear(session, *LINEAR_MEMORY, dtype)
    if session.full:
        linear(session, 4096, 2048, 151936, torch.bfloat16)
    if session.memory:
        peak_memory(session, CUDA[0], LINEAR_MEMORY)


def run(session: Session) -> None:
    if session.smoke:
        forward(session, 8, 501, torch.float32)
        forward_backward(session, 8, 501, torch.float32)
        linear(session, 8, 16, 101)
        return
    if session.cuda:
        on_cuda(session)
        return
    for n, v in HEADLINE:
        for dtype in (torch.float32, torch.bfloat16, torch.float16) if session.full else (torch.float32,):
            forward(session, n, v, dtype)
            forward_backward(session, n, v, dtype)
    if session.full:
        for n, v in ((1, 151936), (64, 50258), (65536, 27)):
            forward(session, n, v, torch.float32)
    linear(session, *LINEAR)
    if session.memory and memory.measurable():
        peak_memory(session, HEADLINE[0], LINEAR_MEMORY)


if __name__ == "__main__":
    from ..suite import script

    sys.exit(script("log_probs", __doc__))
