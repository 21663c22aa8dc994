"""What the ops, a training step, a decode and an evaluation promise, checked against results: every claim with its limit, the measured
value, and whether it is met.

Medians as they are: no tolerance, no rounding before the comparison. A claim that was not measured is listed as such. A CPU and a
GPU have claims of their own on the ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

HAND, HAND_COMPILED = "log_softmax + multinomial + gather, K = 8", "the same compiled, K = 8"
ROWS = ("512 x 50258", "256 x 151936")
DTYPES = ("float32", "bfloat16", "float16")
MEGABYTE = 1e6
FLASHINFER = ("flashinfer sampling_from_logits, 8 times", "flashinfer sampling_from_probs, 8 times")
DECODE = "V = 50258, L = 128, B = 1"
GRAPH_CHECK = "replays of a graph draw what eager calls draw, and afresh"


@dataclass(frozen=True)
class Verdict:
    family: str
    claim: str
    where: str
    value: float | None  # None: not measured
    sense: str  # "<=", "<" or ">="
    limit: float
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return {"<=": self.value <= self.limit, "<": self.value < self.limit, ">=": self.value >= self.limit}[self.sense]

    @property
    def word(self) -> str:
        return {True: "met", False: "NOT MET", None: "not measured"}[self.met]

    @property
    def measured(self) -> str:
        if self.value is None:
            return "-"
        digits = 0 if self.value >= 100 else 1 if self.value >= 10 else 2
        # Rounded away from its limit where rounding would make it look met, or the other way round.
        scale = 10**digits
        shown = round(self.value * scale) / scale
        if self.met != Verdict("", "", "", shown, self.sense, self.limit).met:
            shown = (math.ceil if self.value > shown else math.floor)(self.value * scale) / scale
            if shown == self.limit:
                return f"{self.value:.6g}{self.unit}"
        return f"{shown:.{digits}f}{self.unit}"

    @property
    def wanted(self) -> str:
        return f"{self.sense} {self.limit:g}{self.unit}"


class Medians:
    """Look-up by family, case, dtype and name; None where there is no such result."""

    def __init__(self, results: list[dict]) -> None:
        self.rows = {(r["family"], r["case"], r["dtype"], r["name"]): r for r in results}

    def get(self, family: str, case: str, dtype: str | None, name: str, key: str = "median") -> float | None:
        row = self.rows.get((family, case, dtype, name))
        return None if row is None else row[key]


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _smallest(*values: float | None) -> float | None:
    return min((v for v in values if v is not None), default=None)


def _sampling(m: Medians) -> Iterator[Verdict]:
    ops = ("sample_candidates", "sample_categorical")

    def time(rows: str, dtype: str, name: str) -> float | None:
        return m.get("sampling", f"decode step: {rows}", dtype, name)

    def every(
        claim: str, sense: str, limit: float, value: Callable[[str, str], float | None], dtype: str = ", float32"
    ) -> Iterator[Verdict]:
        for op in ops:
            for rows in ROWS:
                yield Verdict("sampling", f"{op}, K = 8: {claim}", f"{rows}{dtype}", value(op, rows), sense, limit)

    def k8(op: str, rows: str) -> float | None:
        return time(rows, "float32", f"{op}, K = 8")

    yield from every("time over amax", "<=", 2.2, lambda op, rows: _ratio(k8(op, rows), time(rows, "float32", "amax")))
    for op in ops:
        for rows in ROWS:
            for dtype in DTYPES:
                value = _ratio(time(rows, dtype, f"{op}, K = 16"), time(rows, dtype, f"{op}, K = 1"))
                if value is not None or dtype != "float16":  # float16 is a case of --full
                    yield Verdict("sampling", f"{op}: K = 16 over K = 1", f"{rows}, {dtype}", value, "<=", 1.15)
    by_hand = "log_softmax + multinomial + gather over it"
    yield from every(by_hand, ">=", 20, lambda op, rows: _ratio(time(rows, "float32", HAND), k8(op, rows)))

    def noise(rows: str) -> float | None:  # the faster of the two
        return _smallest(*(time(rows, "float32", f"Gumbel in {t}, K = 8") for t in ("float32", "float64")))

    yield from every(
        "8-fold Gumbel, the faster precision, over it", ">=", 100, lambda op, rows: _ratio(noise(rows), k8(op, rows))
    )
    yield from every(
        "bfloat16 over float32", "<=", 1, lambda op, rows: _ratio(time(rows, "bfloat16", f"{op}, K = 8"), k8(op, rows)), dtype=""
    )
    small = "65536 x 27"
    for op in ops:
        value = _ratio(time(small, "float32", HAND), k8(op, small))
        yield Verdict("sampling", f"{op}, K = 8: {HAND.rpartition(',')[0]} over it", f"{small}, float32", value, ">=", 5)
    one, two = (
        m.get("sampling", "threads: 1 x 151936", "float32", f"sample_candidates, K = 8, {t}") for t in ("1 thread", "2 threads")
    )
    claim = "sample_candidates, K = 8: two threads over one"
    yield Verdict("sampling", claim, "1 x 151936, float32", _ratio(two, one), "<", 1)


def _log_probs(m: Medians) -> Iterator[Verdict]:
    def time(case: str, name: str) -> float | None:
        return m.get("log_probs", case, "float32", name)

    for rows in ROWS:
        case, where = f"forward: {rows}", f"{rows}, float32"
        ours, amax, hand = (time(case, name) for name in ("gather_log_probs", "amax", "log_softmax + gather"))
        yield Verdict("log_probs", "gather_log_probs, forward: time over amax", where, _ratio(ours, amax), "<=", 2.2)
        yield Verdict("log_probs", "gather_log_probs, forward: log_softmax + gather over it", where, _ratio(hand, ours), ">=", 3)
        case = f"forward + backward: {rows}"
        value = _ratio(time(case, "F.cross_entropy"), time(case, "gather_log_probs"))
        yield Verdict("log_probs", "gather_log_probs, forward + backward: F.cross_entropy over it", where, value, ">=", 1.5)
    case = "peak memory: 4096 x 768 x 50258"
    for way, claim in (("forward", "forward: peak extra memory"), ("forward + backward", "backward: peak beyond the gradients")):
        extra, gradients = (
            m.get("log_probs", case, "float32", f"linear_log_probs, {way}", key) for key in ("extra_bytes", "gradient_bytes")
        )
        value = None if extra is None or gradients is None else (extra - gradients) / MEGABYTE
        yield Verdict("log_probs", f"linear_log_probs, {claim}", "4096 x 768 x 50258, float32", value, "<", 64, " MB")


def _importance(m: Medians) -> Iterator[Verdict]:
    for batch in (64, 1024):
        ours, hand = (
            m.get("importance", f"select: B = {batch}", "float32", f"{name}, K = 16")
            for name in ("select_candidate", "softmax + multinomial")
        )
        claim = "select_candidate, K = 16: time over softmax + multinomial"
        yield Verdict("importance", claim, f"B = {batch}", _ratio(ours, hand), "<", 1)
    names = ("reverse_step", "xt.clone()", "reverse_step, B = 1, L = 1")
    ours, clone, call = (m.get("importance", "reverse step: B = 64, L = 1024", None, name) for name in names)
    allowed = None if clone is None or call is None else 2 * clone + call
    claim = "reverse_step: time over (2 xt.clone() + the overhead of a call)"
    yield Verdict("importance", claim, "B = 64, L = 1024, K = 16", _ratio(ours, allowed), "<=", 1)


def _step(m: Medians) -> Iterator[Verdict]:
    """edlm's losses against all logits + F.cross_entropy. Memory where the vocabulary is large: with 28 tokens logits are nothing."""
    gpt2, text8 = "B = 8, L = 128, V = 50258 (GPT-2's tokens)", "B = 8, L = 256, V = 28 (text8)"
    names = ("edlm", "all logits + F.cross_entropy")
    for kind in ("DiT", "CausalLM"):
        for where in (gpt2, text8):
            ours, plain = (m.get("step", f"{kind}, time: {where}", "float32", name) for name in names)
            yield Verdict("step", f"{kind}, training step: time over plain PyTorch", where, _ratio(ours, plain), "<=", 1)
        ours, plain = (m.get("step", f"{kind}, peak memory: {gpt2}", "float32", name, "extra_bytes") for name in names)
        yield Verdict(
            "step", f"{kind}, training step: peak beyond the weights over plain PyTorch", gpt2, _ratio(ours, plain), "<", 1
        )


def _loader(m: Medians) -> Iterator[Verdict]:
    where = "B = 8, L = 256, V = 28 (text8)"
    batch, step = (m.get("loader", f"rows: {where}", None, name) for name in ("WindowDataset.batch", "training step, DiT"))
    value = None if batch is None or step is None else 100 * batch / step
    yield Verdict("loader", "WindowDataset.batch: time over a training step of the small DiT", where, value, "<=", 1, " %")


def _loop(m: Medians) -> Iterator[Verdict]:
    """edlm.generate against the published loop: with its own energy, and with edlm's in its place."""
    settings = ("K = 8, w = 0.2, 64 steps", "K = 8, w = 1, 64 steps", "no energy, 64 steps")
    for where in (f"{DECODE}, {setting}" for setting in settings):
        ours, theirs = (m.get("loop", f"end to end: {where}", None, name) for name in ("edlm", "published loop"))
        yield Verdict("loop", "decode, end to end: published loop over edlm", where, _ratio(theirs, ours), ">=", 5)
    for k in (2, 8, 16):
        where = f"{DECODE}, K = {k}, w = 0.2, 64 steps"
        ours, theirs = (m.get("loop", f"peak memory: {where}", None, name, "extra_bytes") for name in ("edlm", "published loop"))
        value = _ratio(ours, theirs)
        yield Verdict("loop", "decode: peak beyond the weights over the published loop", where, value, "<=", 0.2)
    for setting in ("K = 8, w = 0.2, 1024 steps", "no energy, 1024 steps"):
        nfe = m.get("loop", f"end to end: {DECODE}, {setting}", None, "edlm", "nfe")
        yield Verdict("loop", "decode: calls of the denoiser", f"{DECODE}, {setting}", nfe, "<=", 128, "")


def _likelihood(m: Medians) -> Iterator[Verdict]:
    """edlm.eval against eager evaluation: time where the vocabulary is large, and what a call is worth where a network is trained."""
    bpe, long = "V = 50258, L = 128", "V = 50258, L = 256"
    for kind, limit in (("nelbo", 1.5), ("ar_nll", 1.2)):
        for where in (bpe, long):
            ours, theirs = (m.get("likelihood", f"{kind}: {where}", None, name) for name in ("edlm", "eager"))
            yield Verdict("likelihood", f"eval.{kind}: time of eager over it", where, _ratio(theirs, ours), ">=", limit)
        ours, theirs = (m.get("likelihood", f"{kind}, peak memory: {bpe}", None, n, "extra_bytes") for n in ("edlm", "eager"))
        yield Verdict("likelihood", f"eval.{kind}: peak beyond the weights over eager", bpe, _ratio(ours, theirs), "<=", 0.2)
    for where in ("one sequence, 1 draw", "one sequence, 8 draws", "mean of 8 sequences, 1 draw each"):
        where = f"pd_mdlm, {where}"
        value = m.get("likelihood", f"spread: {where}", None, "eager", "equal_error")
        yield Verdict("likelihood", "eval.nelbo: time of eager over it at equal standard errors", where, value, ">=", 1)


# --- on a GPU ---------------------------------------------------------------------------------------------------------------------

_LARGE = ("1024 x 50258", "8192 x 50258", "1024 x 151936", "8192 x 151936")
_GPU_DTYPES = ("bfloat16", "float32")


def _cuda_sampling(m: Medians, checks: list[dict]) -> Iterator[Verdict]:
    op = "sample_candidates"

    def time(rows: str, dtype: str, name: str, key: str = "median") -> float | None:
        return m.get("sampling", f"decode step: {rows}", dtype, name, key)

    for rows in _LARGE:
        share = time(rows, "bfloat16", f"{op}, K = 8", "of_copy")
        value = None if share is None else 100 * share
        yield Verdict("sampling", f"{op}, K = 8: of the bandwidth of a copy", f"{rows}, bfloat16", value, ">=", 85, " %")
    for rows in _LARGE:
        for dtype in _GPU_DTYPES:
            value = _ratio(time(rows, dtype, f"{op}, K = 16"), time(rows, dtype, f"{op}, K = 1"))
            yield Verdict("sampling", f"{op}: K = 16 over K = 1", f"{rows}, {dtype}", value, "<=", 1.05)
    for rows in _LARGE:
        for dtype in _GPU_DTYPES:
            value = _ratio(time(rows, dtype, HAND), time(rows, dtype, f"{op}, K = 8"))
            yield Verdict("sampling", f"{op}, K = 8: {HAND.rpartition(',')[0]} over it", f"{rows}, {dtype}", value, ">=", 5)
    for rows in _LARGE:
        for dtype in _GPU_DTYPES:
            best = _smallest(*(time(rows, dtype, name) for name in FLASHINFER))
            value = _ratio(time(rows, dtype, f"{op}, K = 8"), best)
            yield Verdict(
                "sampling", f"{op}, K = 8: time over flashinfer 8 times, the faster way", f"{rows}, {dtype}", value, "<", 1
            )
    drawn = next((c["value"] for c in checks if c["family"] == "sampling" and c["name"] == GRAPH_CHECK), None)
    value = None if drawn is None else 100 * drawn
    yield Verdict("sampling", GRAPH_CHECK, "sample_categorical, 64 x 50258, K = 8", value, ">=", 100, " %")


def _nothing(m: Medians) -> Iterator[Verdict]:
    return iter(())


def verdicts(results: list[dict], families: list[str], device: str = "cpu", checks: list[dict] | None = None) -> list[Verdict]:
    medians = Medians(results)
    judges = {"sampling": _sampling, "log_probs": _log_probs, "importance": _importance, "step": _step, "loader": _loader}
    judges |= {"loop": _loop, "likelihood": _likelihood}
    if device == "cuda":
        judges |= {"sampling": lambda m: _cuda_sampling(m, checks or []), "log_probs": _nothing, "importance": _nothing}
    return [verdict for family in families for verdict in judges[family](medians)]


def judge(document: dict, families: list[str]) -> list[Verdict]:
    """Of a file: one that does not name its device was measured on a CPU."""
    return verdicts(document["results"], families, document.get("device", "cpu"), document.get("checks"))
