"""``edlm.generate`` against the published decode loop (published.py), end to end: seconds, calls of the networks, peak memory.

The same small networks for both: a DiT and a CausalLM of 4 layers of 256 with random weights. Beside them the networks alone: the calls
that edlm made, recorded and made again with the same inputs, so that what a loop adds is visible. A published loop of minutes is timed
on a part of its steps, in a stretch in the middle of the window and one in the middle of the rest, and scaled; never the headline case.
Each stretch begins with what the step before it has cached or not.
--memory measures the peak beyond what the process held before (the weights), in fresh processes: see benchmarks/memory.py for how.
python benchmarks/decode/loop.py --help
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

if not __package__:  # run as a script: the checkout it lies in is the package that it belongs to
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "benchmarks.decode"

from edlm.models import ARResidualEnergy
from edlm.samplers import SampleOutput, generate

from .. import memory
from ..harness import Variant
from ..session import Session
from ..training.step import Sizes, network
from .published import Adapted, AutoregressiveResidual, Decoded, decode
from .recorder import Recorder

OPS = ("sample_categorical", "linear_log_probs", "select_candidate", "reverse_step")
LARGEST = LARGEST_CUDA = 1 << 16  # of the session's pool of logits, which is not used here
EDLM, NETWORKS, PUBLISHED, ADAPTED = "edlm", "networks alone", "published loop", "published loop, edlm's energy"
VOCABULARY = 50258  # GPT-2's tokens and the mask
PEAKS = (2, 8, 16)  # candidates
MOST_SPREAD = 1.5  # upper over lower quartile,
MOST_NETWORKS = 1.2  # and the networks alone over edlm: beyond them times are not conclusive


class Case(NamedTuple):
    """A decode. ``vocab`` counts the mask, the last id; ``k`` 0: no energy. ``part``: the published loop runs so many steps of it."""

    vocab: int = VOCABULARY
    length: int = 128
    batch: int = 1
    k: int = 8
    steps: int = 64
    low: float = 0.8  # the window is (low, 1]
    part: int | None = None
    dim: int = 256
    layers: int = 4
    heads: int = 4

    @property
    def name(self) -> str:
        energy = f"K = {self.k}, w = {1 - self.low:.3g}" if self.k else "no energy"
        return f"V = {self.vocab}, L = {self.length}, B = {self.batch}, {energy}, {self.steps} steps"

    @property
    def sizes(self) -> Sizes:
        return Sizes("", self.batch, self.length, self.vocab, self.dim, self.layers, self.heads)

    @property
    def window(self) -> tuple[float, float]:
        return self.low, 1.0


HEADLINE = Case()
WHOLE_WINDOW = Case(low=0.0, part=32)
LONG = Case(k=0, steps=1024)
SMOKE = Case(vocab=101, length=8, batch=2, k=2, steps=8, dim=16, layers=1, heads=2)
SWEEP = (
    Case(k=2, part=16),
    Case(k=16, part=16),
    Case(steps=16),
    Case(steps=256, part=64),
    Case(steps=1024, part=128),
    Case(batch=4, steps=16, part=8),
    Case(length=512, steps=16, part=8),
)
TEXT8 = (Case(vocab=28, length=256), Case(vocab=28, length=256, batch=8, part=16))


class Networks(NamedTuple):
    denoiser: nn.Module
    causal_lm: nn.Module

    @property
    def energy(self) -> ARResidualEnergy:
        return ARResidualEnergy(self.causal_lm, mask_token_id=self.denoiser.mask_token_id)


def networks(case: Case, device: torch.device | str = "cpu") -> Networks:
    """In eval mode, as ``generate`` puts them: the published loop does not."""
    return Networks(*(network(kind, case.sizes, device).eval() for kind in ("DiT", "CausalLM")))


def masked(case: Case, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.full((case.batch, case.length), case.vocab - 1, dtype=torch.int64, device=device)


def ours(case: Case, denoiser: object, energy: object, seed: int, device: torch.device | str = "cpu") -> SampleOutput:
    energy = energy if case.k else None
    return generate(
        denoiser,
        batch_size=case.batch,
        length=case.length,
        steps=case.steps,
        energy=energy,
        num_candidates=case.k or None,
        window=case.window,
        seed=seed,
        device=device,
    )


def stretches(case: Case) -> list[range]:
    """The steps that a part of the published loop runs: as many inside the window and outside as are there, in proportion."""
    found = []
    for _, group in groupby(range(case.steps), key=lambda i: bool(case.k) and case.low < (case.steps - i) / case.steps):
        steps = list(group)
        count = min(len(steps), max(1, round(case.part * len(steps) / case.steps)))
        first = steps[0] + (len(steps) - count) // 2
        found.append(range(first, first + count))
    return found


class Theirs:
    """The published loop, whole or, of a case with a part, in stretches."""

    def __init__(self, case: Case, found: Networks, adapted: bool, device: torch.device | str = "cpu") -> None:
        self.case, self.denoiser, self.start = case, found.denoiser, masked(case, device)
        energy = Adapted(found.energy, case.batch) if adapted else AutoregressiveResidual(found.causal_lm)
        self.arguments = {"energy": energy if case.k else None, "num_candidates": case.k or 1, "window": case.window}
        self.parts = [range(case.steps)] if case.part is None else stretches(case)
        self.starts: list[torch.Tensor | Decoded] = [self._masked_before(only[0]) for only in self.parts]

    def _masked_before(self, step: int) -> torch.Tensor:
        """As many positions masked as there would be."""
        tokens = torch.randint(self.case.vocab - 1, self.start.shape, device=self.start.device)
        return torch.where(torch.rand(self.start.shape, device=self.start.device) < step / self.case.steps, tokens, self.start)

    def _decode(self, start: torch.Tensor | Decoded, only: Sequence[int]) -> Decoded:
        return decode(self.denoiser, start, self.case.steps, only=only, **self.arguments)

    def prepare(self) -> None:
        """The step ahead of each stretch, untimed: it leaves a prediction behind or not, as often as in the whole loop. Without it
        every stretch would begin with a call of the networks, and scaling would multiply that."""
        self.starts = [
            self._decode(self._masked_before(only[0] - 1), [only[0] - 1]) if only[0] else self.start for only in self.parts
        ]

    def __call__(self, number: int = 0) -> list[Decoded]:
        """torch's generator goes on by itself: the number of a call changes nothing."""
        return [self._decode(start, only) for start, only in zip(self.starts, self.parts, strict=True)]


class Told(NamedTuple):
    """What one run tells of itself; ``seconds``, as whoever waits for it sees them, tell which run the median is of."""

    seconds: float
    nfe: int
    energy_nfe: int
    stage_seconds: dict[str, float]


class Runs:
    """A loop as a variant, which keeps what every run told of itself."""

    def __init__(self, run: Callable[[int], list[SampleOutput | Decoded]]) -> None:
        self.run, self.told = run, []

    def __call__(self, number: int) -> None:
        begin = time.perf_counter()
        parts = self.run(number)
        if parts[0].tokens.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        stages = {stage: sum(part.stage_seconds[stage] for part in parts) for stage in parts[0].stage_seconds}
        self.told.append(Told(seconds, sum(part.nfe for part in parts), sum(part.energy_nfe for part in parts), stages))

    def figures(self, factor: float, timed: int) -> dict[str, object]:
        """Of the last ``timed`` runs, those that the time is of: a warm-up and a trial came before. Medians of the calls; the stages
        of the run whose time is the median (of an even number the mean of the two in the middle, as the median is)."""
        told = sorted(self.told[-timed:], key=lambda run: run.seconds)
        middle = told[(len(told) - 1) // 2 : len(told) // 2 + 1]
        return {
            "nfe": round(factor * statistics.median(run.nfe for run in told)),
            "energy_nfe": round(factor * statistics.median(run.energy_nfe for run in told)),
            "stage_seconds": {
                stage: factor * statistics.mean(run.stage_seconds[stage] for run in middle) for stage in told[0].stage_seconds
            },
        }


def doubts(rows: dict[str, dict]) -> list[str]:
    """Why the times of a case (rows by name) are not conclusive: signs that the machine did something else meanwhile. Stretches of
    a loop differ by what they happen to call, so that their spread is none."""
    found = [
        f"the quartiles of {name} are {row['high'] / row['low']:.2f}x apart"
        for name, row in rows.items()
        if not row["note"] and row["high"] > MOST_SPREAD * row["low"]
    ]
    if NETWORKS in rows and rows[NETWORKS]["median"] > MOST_NETWORKS * rows[EDLM]["median"]:
        found.append(f"{NETWORKS} took {rows[NETWORKS]['median'] / rows[EDLM]['median']:.2f}x the loop that contains them")
    return found


def timed(session: Session, case: Case, names: tuple[str, ...]) -> None:
    device, found = session.device, networks(case, session.device)
    energy, recorder = found.energy, Recorder(found.denoiser, found.energy)
    ours(case, recorder, recorder.energy, 0, device)
    size = recorder.bytes(found.denoiser, found.causal_lm)
    runs = {EDLM: Runs(lambda i: [ours(case, found.denoiser, energy, i, device)])}
    for name in (PUBLISHED, ADAPTED):
        if name in names:
            runs[name] = Runs(Theirs(case, found, name == ADAPTED, device))
    # What a loop of seconds is warmed up with: a step inside the window and one outside.
    short = Theirs(case._replace(part=1), found, False, device)

    def variant(name: str) -> Variant:
        if name == EDLM:
            return Variant(name, runs[name], size, case.k or None, wall=True)
        before = None if case.part is None else runs[name].run.prepare
        return Variant(name, runs[name], size, case.k or None, before=before, wall=True, warm_up=short)

    variants = [variant(name) for name in runs if name == EDLM or case.part is None]
    if NETWORKS in names:
        variants.append(Variant(NETWORKS, lambda _: recorder.replay(), size, case.k or None, wall=True))
    part = sum(map(len, stretches(case))) if case.part else case.steps
    apart = [(variant(name), part) for name in runs if name != EDLM and case.part is not None]
    session.measure(
        f"end to end: {case.name}",
        variants,
        n=case.steps,
        v=case.vocab,
        dtype=None,
        budget_s=1 if session.smoke else 10,  # more than three rounds of what takes no second only
        apart=apart,
        unit="steps",
    )
    rows = {row["name"]: row for row in session.results if row["case"] == f"end to end: {case.name}"}
    for name, row in rows.items():
        row["over"] = {"name": EDLM, "value": row["median"] / rows[EDLM]["median"]}
        if name in runs:
            row |= runs[name].figures(case.steps / part if name != EDLM else 1, row["repetitions"])
            row["rest_seconds"] = 1e-3 * row["median"] - sum(row["stage_seconds"].values())
            stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in row["stage_seconds"].items())
            stages += f", everything else {row['rest_seconds']:.2f} s"
            calls = f"denoiser {row['nfe']} calls, energy {row['energy_nfe']}"
            print(f"  {name:<44}{row['over']['value']:>8.2f}x edlm; {calls}; {stages}", flush=True)
        else:
            row |= {"nfe": recorder.nfe, "energy_nfe": recorder.energy_nfe}
    rows[EDLM]["not_conclusive"] = doubts(rows)
    for doubt in rows[EDLM]["not_conclusive"]:
        print(f"  NOT CONCLUSIVE: {doubt}", flush=True)


# --- what both loops must do -------------------------------------------------------------------------------------------------------


def check(run: Callable[[Case, Recorder, torch.Tensor], tuple[torch.Tensor, int, int]], case: Case, device: torch.device) -> dict:
    """The share of decodes without a mask, with valid tokens, with the prompt kept and with as many calls as are told."""
    found, generator, good, count = networks(case, device), torch.Generator().manual_seed(0), 0, 4
    for _ in range(count):
        prompt = torch.randint(case.vocab - 1, (case.batch, case.length), generator=generator)
        prompt[torch.rand(prompt.shape, generator=generator) < 0.7] = case.vocab - 1
        prompt[:, 0] = case.vocab - 1
        prompt = prompt.to(device)
        recorder = Recorder(found.denoiser, found.energy)
        tokens, nfe, energy_nfe = run(case, recorder, prompt)
        given = prompt != case.vocab - 1
        valid = bool(((tokens >= 0) & (tokens < case.vocab - 1)).all()) and torch.equal(tokens[given], prompt[given])
        good += valid and (nfe, energy_nfe) == (recorder.nfe, recorder.energy_nfe)
    return {"value": good / count, "detail": f"{good} of {count} decodes"}


def check_ours(case: Case, recorder: Recorder, prompt: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    out = generate(recorder, prompt=prompt, steps=case.steps, energy=recorder.energy, num_candidates=case.k, window=case.window)
    return out.tokens, out.nfe, out.energy_nfe


def check_theirs(case: Case, recorder: Recorder, prompt: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    energy = Adapted(recorder.energy, case.batch)
    out = decode(recorder, prompt, case.steps, energy=energy, num_candidates=case.k, window=case.window)
    return out.tokens, out.nfe, out.energy_nfe


# --- memory -----------------------------------------------------------------------------------------------------------------------


def peak_memory(session: Session, case: Case, names: tuple[str, ...]) -> None:
    rows = []
    for name in names:
        row = {"family": session.family, "case": f"peak memory: {case.name}", "name": name}
        row |= {"n": case.steps, "v": case.vocab, "k": case.k or None, "dtype": None}
        rows.append(row | {"threads": torch.get_num_threads()} | measure(name, case, session.device.type))
    session.add(rows)


def measure(name: str, case: Case, device: str = "cpu") -> dict[str, object]:
    """As ``memory.measure``: ``extra_bytes`` at the peak, ``gradient_bytes`` (0: nothing is kept), ``method``."""
    if device == "cuda":
        return _measure_on_gpu(name, case)
    arguments = json.dumps([name, case, torch.get_num_threads()])
    done = subprocess.run([sys.executable, "-P", __file__, "--one-peak", arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"peak memory of {name}: the process that measures it failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _run_of(name: str, case: Case, device: str) -> tuple[Networks, Callable[[], object], str]:
    """The whole decode of edlm; of the published loop a step inside the window and one outside, which hold all that it ever holds."""
    found = networks(case, device)
    if name == EDLM:
        return found, partial(ours, case, found.denoiser, found.energy, 0, device), ""
    return found, Theirs(case._replace(part=1), found, name == ADAPTED, device), ", of one step inside the window and one outside"


def _measure(name: str, case: Case, threads: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    found, run, what = _run_of(name, case, "cpu")
    memory._warm_up([torch.randn(64, case.dim), found.denoiser.linear.weight.detach()])
    memory._trim()
    before = memory._status("VmRSS")
    peak, _, method = memory._peak(run)
    return {"extra_bytes": peak - before, "gradient_bytes": 0, "method": method + what}


def _measure_on_gpu(name: str, case: Case) -> dict[str, object]:
    found, run, what = _run_of(name, case, "cuda")
    for _ in range(2):  # the library of the products keeps a workspace from its first call on
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    del found
    return {"extra_bytes": peak - before, "gradient_bytes": 0, "method": "max_memory_allocated, the second call" + what}


def run(session: Session) -> None:
    for name, runs in ((EDLM, check_ours), (PUBLISHED, check_theirs)):
        what = f"{name}: valid tokens, no mask left, the prompt kept, calls as counted"
        session.check(what, partial(check, runs, SMOKE, session.device))
    every = (EDLM, NETWORKS, PUBLISHED, ADAPTED)
    headline = SMOKE if session.smoke else HEADLINE
    timed(session, headline, every if session.full or session.smoke else every[:3])
    if session.smoke:
        timed(session, SMOKE._replace(steps=16, part=4), every[:3])
    elif session.full:
        for case in (WHOLE_WINDOW, HEADLINE._replace(k=0), *TEXT8):
            timed(session, case, every[:3])
        for case in (*SWEEP, LONG._replace(part=128)):
            timed(session, case, (EDLM, PUBLISHED))
    else:
        timed(session, LONG, (EDLM,))
    if session.memory and (session.cuda or memory.measurable()):
        for k in (SMOKE.k,) if session.smoke else PEAKS:
            peak_memory(session, headline._replace(k=k), (EDLM, PUBLISHED, ADAPTED))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one-peak"]:
        name, case, threads = json.loads(sys.argv[2])
        print(json.dumps(_measure(name, Case(*case), threads)))
        sys.exit(0)
    from ..suite import script

    sys.exit(script("loop", __doc__))
