"""``edlm.eval.nelbo`` and ``ar_nll`` against the same likelihoods by eager PyTorch (eager.py): sequences a second, and how far an
estimate scatters for the same number of calls.

The same networks with random weights for the times, the same text, the same rows a call. edlm runs the head on masked rows alone and
stores no logits; both give the same number, which is checked with every network that is timed. The scatter depends on what a network
predicts, so it is measured with a trained one, which comes with the sources. With it the time to an equal standard error is known: the
ratio of the times multiplied by the ratio of the variances.
--memory measures the peak beyond what the process held before (the weights), in fresh processes: see benchmarks/memory.py for how.
python benchmarks/evaluation/likelihood.py --help
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

if not __package__:  # run as a script: the checkout it lies in is the package that it belongs to
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "benchmarks.evaluation"

from edlm.data import CharTokenizer, open_text, windows
from edlm.diffusion import masked_nats
from edlm.eval import Estimate, ar_nll, nelbo
from edlm.models import DiT

from .. import memory
from ..harness import Variant
from ..session import Session
from ..training.step import Sizes, network
from . import eager

OPS = ("linear_log_probs",)
LARGEST = LARGEST_CUDA = 1 << 16  # of the session's pool of logits, which is not used here
NELBO, AR_NLL = KINDS = ("nelbo", "ar_nll")
EDLM, EAGER = WAYS = ("edlm", "eager")
TRAINED = "pd_mdlm"  # of examples/models


class Case(NamedTuple):
    """``sequences`` with ``draws`` each, ``batch`` rows a call; of ar_nll as many rows, each a sequence. ``vocab`` counts the mask."""

    vocab: int
    length: int
    sequences: int
    draws: int
    batch: int
    dim: int = 256
    layers: int = 4
    heads: int = 4

    @property
    def name(self) -> str:
        return f"V = {self.vocab}, L = {self.length}"

    @property
    def rows(self) -> int:
        return self.sequences * self.draws

    @property
    def sizes(self) -> Sizes:
        return Sizes("", self.batch, self.length, self.vocab, self.dim, self.layers, self.heads)


TEXT8 = Case(28, 256, sequences=4, draws=8, batch=32, dim=128, layers=6)  # of the trained network's shape
BPE = Case(50258, 128, sequences=2, draws=8, batch=8)
LONG = BPE._replace(length=256)
SMOKE = Case(101, 8, sequences=4, draws=2, batch=4, dim=16, layers=1, heads=2)


def load(kind: str, case: Case, device: torch.device | str = "cpu") -> tuple[nn.Module, torch.Tensor]:
    """(the network, the text). ``edlm.eval`` puts a network into eval mode; the other way does not."""
    model = network("DiT" if kind == NELBO else "CausalLM", case.sizes, device).eval()
    return model, torch.randint(case.vocab - 1, (case.sequences if kind == NELBO else case.rows, case.length), device=device)


def runs(kind: str, case: Case, model: nn.Module, x0: torch.Tensor) -> dict[str, Callable[[int], object]]:
    """The whole evaluation, both ways."""
    if kind == AR_NLL:
        return {
            EDLM: lambda _: ar_nll(model, x0, batch_size=case.batch),
            EAGER: lambda _: eager.ar_nll(model, x0, batch_size=case.batch).mean(),
        }
    times = partial(eager.draw_times, len(x0), case.draws, eager.T_MIN, x0.device)
    return {
        EDLM: lambda i: nelbo(model, x0, num_times=case.draws, seed=i * len(x0), batch_size=case.batch),
        EAGER: lambda _: eager.nelbo(model, x0, times(), batch_size=case.batch).mean(),
    }


@torch.no_grad()
def check(kind: str, model: nn.Module, x0: torch.Tensor) -> dict[str, object]:
    """The same numbers both ways, for each sequence (of nelbo: as masked): or the times would be of different jobs."""
    if kind == AR_NLL:
        ours, theirs = ar_nll(model, x0, batch_size=len(x0)).values, eager.ar_nll(model, x0, batch_size=len(x0)).double().cpu()
    else:
        t = eager.draw_times(1, len(x0), 0.1, x0.device)[0]
        xt = eager.corrupt(x0, t, model.mask_token_id)
        ours, theirs = masked_nats(model, x0, xt, t) / t, eager.weighted_nats(model, x0, xt, t)
    error = float(((ours - theirs).abs() / theirs.abs().clamp_min(1e-9)).max())
    return {"value": float(error < 1e-4), "detail": f"{error:.1e} apart, relative"}  # NaN fails


def timed(session: Session, kind: str, case: Case) -> None:
    model, x0 = load(kind, case, session.device)
    where = f"{kind}: {case.name}"
    session.check(f"{where}, the same numbers both ways", partial(check, kind, model, x0))
    calls = -(-case.rows // case.batch)
    size = calls * sum(p.nbytes for p in model.parameters())
    variants = [Variant(name, run, size, wall=True) for name, run in runs(kind, case, model, x0).items()]
    session.measure(where, variants, n=len(x0), v=case.vocab, dtype=None, budget_s=1 if session.smoke else 12)
    rows = {row["name"]: row for row in session.results if row["case"] == where}
    for name, row in rows.items():
        row |= {"draws": case.draws if kind == NELBO else None, "batch": case.batch}
        row["sequences_per_second"] = 1e3 * len(x0) / row["median"]
        row["over"] = {"name": EAGER, "value": rows[EAGER]["median"] / row["median"]}
        draws = f", {case.draws} draws each" if kind == NELBO else ""
        print(f"  {name:<44}{row['sequences_per_second']:>10.2f} sequences a second{draws}; {row['over']['value']:.2f}x eager")


# --- scatter ----------------------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Estimates of groups of ``members`` sequences, ``draws`` each. One member: eager's draws are stratified over the sequence's own;
    several: it has one draw a sequence, stratified over the group, as a batch of the research code has."""

    members: int
    draws: int
    groups: int
    repeats: int

    @property
    def name(self) -> str:
        what = "one sequence" if self.members == 1 else f"mean of {self.members} sequences"
        return f"{what}, {self.draws} draw{'s' if self.draws > 1 else ''}{'' if self.members == 1 else ' each'}"

    def times(self, device: torch.device) -> torch.Tensor:
        if self.members == 1:
            return eager.draw_times(self.groups * self.repeats, self.draws, eager.T_MIN, device)
        return eager.batch_times(self.groups * self.repeats, self.members, eager.T_MIN, device)


ONE_DRAW, MANY_DRAWS, BATCH = Spread(1, 1, 16, 64), Spread(1, 8, 16, 16), Spread(8, 1, 4, 32)


def spread(session: Session, what: str, denoiser: nn.Module, x0: torch.Tensor, found: Spread, like: Case) -> None:
    """Repeated estimates, both ways: their standard deviation given the text, in nats per token (the root of the variances' mean over
    the groups), and the ratio of the variances, with its standard error over the groups. ``like``: the case whose times tell what a
    call costs."""
    case, (members, draws, groups, repeats) = f"spread: {what}, {found.name}", found
    torch.manual_seed(0)
    again = x0[: groups * members].view(groups, 1, members, -1).expand(-1, repeats, -1, -1).reshape(-1, x0.shape[1])
    both = {
        EDLM: nelbo(denoiser, again, num_times=draws, batch_size=like.batch).values,
        EAGER: eager.nelbo(denoiser, again, found.times(x0.device), batch_size=like.batch).double().cpu(),
    }
    means = {name: values.view(groups, repeats, members).mean(2) for name, values in both.items()}
    variances = {name: values.var(1) for name, values in means.items()}
    ratio = Estimate.ratio(variances[EAGER], variances[EDLM], "x")
    medians = {row["name"]: row["median"] for row in session.results if row["case"] == f"{NELBO}: {like.name}"}
    rows = {}
    for name, values in means.items():
        variance = float(variances[name].mean())
        rows[name] = {"family": session.family, "case": case, "name": name, "n": groups * members, "v": denoiser.vocab_size}
        rows[name] |= {"k": None, "dtype": None, "threads": torch.get_num_threads(), **found._asdict()}
        rows[name] |= {"mean": float(values.mean()), "stderr": (variance / values.numel()) ** 0.5, "deviation": variance**0.5}
    rows[EAGER] |= {"variance_ratio": ratio.mean, "variance_ratio_stderr": ratio.stderr}
    rows[EAGER]["equal_error"] = ratio.mean * medians[EAGER] / medians[EDLM]
    session.results += rows.values()
    print(f"\n{session.family}, {case}")
    for name, row in rows.items():
        print(f"  {name:<44}{row['mean']:.4f} nats/token, standard deviation {row['deviation']:.4f}")
    print(
        f"  eager over edlm: variance, or calls for an equal error, {ratio.mean:.2f} +- {ratio.stderr:.2f}x; time for it "
        f"{rows[EAGER]['equal_error']:.2f}x",
        flush=True,
    )
    session.check(f"{case}: the same mean both ways", partial(_same_mean, rows))


def _same_mean(rows: dict[str, dict]) -> dict[str, object]:
    """To 4.5 standard errors, and t_min: eager does not see the share of times below it."""
    apart, stderr = rows[EAGER]["mean"] - rows[EDLM]["mean"], (rows[EAGER]["stderr"] ** 2 + rows[EDLM]["stderr"] ** 2) ** 0.5
    allowed = 4.5 * stderr + eager.T_MIN * abs(rows[EDLM]["mean"])
    return {"value": float(abs(apart) < allowed), "detail": f"{apart:+.4f} +- {stderr:.4f} nats/token apart"}


def trained(device: torch.device) -> tuple[DiT, torch.Tensor] | None:
    """The trained denoiser and 32 windows of text that it has not seen; None where edlm is installed without the sources."""
    folder = Path(__file__).resolve().parents[2] / "examples" / "models" / TRAINED
    if not folder.is_dir():
        return None
    text = " ".join(open_text("bundled").split("test"))
    return DiT.from_pretrained(folder, device=device).eval(), windows(CharTokenizer().encode(text), TEXT8.length, 32).to(device)


def spreads(session: Session) -> None:
    if session.smoke:
        for found in (Spread(1, 2, 4, 16), Spread(2, 1, 2, 16)):
            spread(session, "random weights", *load(NELBO, SMOKE, session.device), found, SMOKE)
        return
    network_and_text = trained(session.device)
    if network_and_text is None:
        session.miss(f"spread: {TRAINED}", None, "every way", f"examples/models/{TRAINED} comes with the sources alone")
        return
    for found in (ONE_DRAW, MANY_DRAWS, BATCH) if session.full else (ONE_DRAW._replace(repeats=32),):
        spread(session, TRAINED, *network_and_text, found, TEXT8)


# --- memory -----------------------------------------------------------------------------------------------------------------------


def peak_memory(session: Session, kind: str, case: Case) -> None:
    rows = []
    for name in WAYS:
        row = {"family": session.family, "case": f"{kind}, peak memory: {case.name}", "name": name}
        row |= {"n": case.sequences, "v": case.vocab, "k": None, "dtype": None, "batch": case.batch}
        rows.append(row | {"threads": torch.get_num_threads()} | measure(kind, name, case, session.device.type))
    session.add(rows)


def measure(kind: str, name: str, case: Case, device: str = "cpu") -> dict[str, object]:
    """As ``memory.measure``: ``extra_bytes`` at the peak, ``gradient_bytes`` (0: nothing is kept), ``method``."""
    if device == "cuda":
        return _measure_on_gpu(kind, name, case)
    arguments = json.dumps([kind, name, case, torch.get_num_threads()])
    done = subprocess.run([sys.executable, "-P", __file__, "--one-peak", arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"peak memory of {kind}, {name}: the process that measures it failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _measure(kind: str, name: str, case: Case, threads: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    model, x0 = load(kind, case)
    run = runs(kind, case, model, x0)[name]
    memory._warm_up([torch.randn(64, case.dim), model.linear.weight.detach()])
    memory._trim()
    before = memory._status("VmRSS")
    peak, _, method = memory._peak(partial(run, 0))
    return {"extra_bytes": peak - before, "gradient_bytes": 0, "method": method}


def _measure_on_gpu(kind: str, name: str, case: Case) -> dict[str, object]:
    model, x0 = load(kind, case, "cuda")
    run = runs(kind, case, model, x0)[name]
    for _ in range(2):  # the library of the products keeps a workspace from its first call on
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(0)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    return {"extra_bytes": peak - before, "gradient_bytes": 0, "method": "max_memory_allocated, the second call"}


def run(session: Session) -> None:
    for case in (SMOKE,) if session.smoke else (TEXT8, BPE, LONG) if session.full else (TEXT8, BPE):
        for kind in KINDS:
            timed(session, kind, case)
    spreads(session)
    if session.memory and (session.cuda or memory.measurable()):
        for kind in KINDS:
            peak_memory(session, kind, SMOKE if session.smoke else BPE)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one-peak"]:
        kind, name, case, threads = json.loads(sys.argv[2])
        print(json.dumps(_measure(kind, name, Case(*case), threads)))
        sys.exit(0)
    from ..suite import script

    sys.exit(script("likelihood", __doc__))
