"""``edlm bench eval``: the eager estimators that it compares with, against enumeration and edlm; results, tables and claims.

A benchmark against something wrong would be worth nothing. Monte Carlo tests fix their seeds and allow 4.5 standard errors: a correct
program fails each with probability 7e-6. No time is asserted.
"""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from edlm.benchmarks import memory, suite
from edlm.benchmarks.arguments import SUITES
from edlm.benchmarks.claims import verdicts
from edlm.benchmarks.evaluation import eager, likelihood
from edlm.benchmarks.tables import markdown
from edlm.cli import main
from edlm.eval import Estimate, ar_nll
from exact import TabularDenoiser, Universe

UNIVERSE = Universe()
LENGTH, MASK = UNIVERSE.length, UNIVERSE.mask


def data(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return UNIVERSE.sequences[torch.multinomial(UNIVERSE.q, count, replacement=True, generator=generator)]


def weighted(t):
    """Enumerated: E over data and masks of (1/t) sum over masked i of -log mu_i(x0_i | xt), each position masked with probability t."""
    total = 0.0
    for x0, q in zip(UNIVERSE.sequences.tolist(), UNIVERSE.q.tolist(), strict=True):
        for masked in itertools.product((False, True), repeat=LENGTH):
            marginals = UNIVERSE.marginals(tuple(MASK if m else x for m, x in zip(masked, x0, strict=True)))
            nats = -sum(float(marginals[i, x0[i]].log()) for i in range(LENGTH) if masked[i])
            total += q * t ** (sum(masked) - 1) * (1 - t) ** (LENGTH - sum(masked)) * nats if any(masked) else 0.0
    return total


@pytest.mark.parametrize(("draws", "t_min"), [(1, eager.T_MIN), (4, eager.T_MIN), (4, 0.4)])
def test_eager_nelbo_is_what_enumeration_says(draws, t_min):
    """The mean over t in [t_min, 1] by Simpson's rule, exact here: a polynomial of degree L - 1 = 2."""
    expected = (weighted(t_min) + 4 * weighted((1 + t_min) / 2) + weighted(1.0)) / 6
    if t_min == eager.T_MIN:
        assert expected == pytest.approx(UNIVERSE.entropy(), rel=1e-3), (
            "a perfect denoiser reaches the entropy, but for t < t_min"
        )
    torch.manual_seed(3)
    times = eager.draw_times(60_000, draws, t_min, torch.device("cpu"))
    values = eager.nelbo(TabularDenoiser(UNIVERSE), data(60_000), times, batch_size=10_000)
    estimate = Estimate.of(LENGTH * values, "nats")
    assert abs(estimate.mean - expected) < 4.5 * estimate.stderr < 0.15


def test_eager_times_are_uniform_and_share_the_interval():
    torch.manual_seed(0)
    t = eager.draw_times(2000, 4, 0.2, torch.device("cpu"))
    quarter = (t - 0.2) / 0.8
    assert ((quarter * 4 - torch.arange(4)).clamp(0, 1) == quarter * 4 - torch.arange(4)).all()
    assert abs(float((quarter * 4).frac().mean()) - 0.5) < 4.5 / (12 * 8000) ** 0.5
    t = eager.batch_times(2000, 4, 0.2, torch.device("cpu"))
    quarter = (t.view(2000, 4) - 0.2) / 0.2
    assert (quarter.floor().sort(1).values == torch.arange(4)).all(), "a batch has one of each"
    # Every row is uniform over all of it: its place in the batch tells nothing.
    assert ((quarter.mean(0) - 2).abs() < 4.5 * (16 / 12 / 2000) ** 0.5).all()


@pytest.mark.parametrize("kind", likelihood.KINDS)
def test_both_ways_are_the_same_numbers(kind, monkeypatch):
    case = likelihood.SMOKE._replace(sequences=16, length=24)
    model, x0 = likelihood.load(kind, case)
    assert likelihood.check(kind, model, x0)["value"] == 1
    name = {"nelbo": "weighted_nats", "ar_nll": "ar_nll"}[kind]
    right = getattr(eager, name)
    monkeypatch.setattr(eager, name, lambda *a, **k: 1.001 * right(*a, **k))
    assert likelihood.check(kind, model, x0)["value"] == 0
    monkeypatch.setattr(eager, name, lambda *a, **k: torch.nan * right(*a, **k))
    assert likelihood.check(kind, model, x0)["value"] == 0


def test_eager_batches_keep_the_order_of_sequences():
    model, x0 = likelihood.load(likelihood.AR_NLL, likelihood.SMOKE)
    values = eager.ar_nll(model, x0, batch_size=3)
    assert values.tolist() == pytest.approx(ar_nll(model, x0).values.tolist(), rel=1e-5) and values.std() > 1e-3

    class Clock:  # -log mu is 1 in sequences of 0, 2 in those of 1: 1/t is the only noise
        mask_token_id, vocab_size = 2, 3

        def __call__(self, xt, t):
            ones = (xt == 1).any(1, keepdim=True)
            p = torch.where(ones, -2.0, -1.0).exp().expand(xt.shape)
            return torch.stack([torch.where(ones, 1 - p, p), torch.where(ones, p, 1 - p), torch.full_like(p, 9.0)], 2).log()

    torch.manual_seed(0)
    x0 = torch.arange(2).repeat(4)[:, None].expand(8, 400)
    values = eager.nelbo(Clock(), x0, eager.draw_times(8, 16, 0.1, x0.device), batch_size=7)
    assert ((values - 1 - torch.arange(2).repeat(4)).abs() < 0.3).all()


def test_both_ways_call_the_network_for_as_many_rows(monkeypatch):
    """The comparison is at equal numbers of calls."""
    case = likelihood.SMOKE
    for kind in likelihood.KINDS:
        model, x0 = likelihood.load(kind, case)
        rows, hidden = [], model.hidden

        def counted(x, *more, rows=rows, hidden=hidden):
            rows.append(len(x))
            return hidden(x, *more)

        monkeypatch.setattr(model, "hidden", counted)
        for run in likelihood.runs(kind, case, model, x0).values():
            run(0)
        assert rows == 2 * (case.rows // case.batch) * [case.batch]


# --- the suite --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    file = tmp_path_factory.mktemp("evaluation") / "out.json"
    state = torch.get_rng_state()
    assert main(["bench", "eval", "--smoke", "--allow-reference", "--json", str(file)]) == 0
    torch.set_rng_state(state)
    return json.loads(file.read_text())


def test_rates_and_spreads_are_those_of_the_rows(document):
    assert document["command"] == "edlm bench eval --smoke --allow-reference"
    rows = {(row["case"], row["name"]): row for row in document["results"]}
    timed = [f"{kind}: {likelihood.SMOKE.name}" for kind in likelihood.KINDS]
    spreads = [f"spread: random weights, {what}" for what in ("one sequence, 2 draws", "mean of 2 sequences, 1 draw each")]
    assert set(rows) == set(itertools.product([*timed, *spreads], likelihood.WAYS))
    for case in timed:
        ours, theirs = (rows[case, name] for name in likelihood.WAYS)
        assert ours["sequences_per_second"] == pytest.approx(1e3 * ours["n"] / ours["median"]) and theirs["over"]["value"] == 1
        assert ours["over"]["value"] == pytest.approx(theirs["median"] / ours["median"])
    assert [rows[case, "edlm"]["n"] for case in timed] == [likelihood.SMOKE.sequences, likelihood.SMOKE.rows]
    medians = [rows[timed[0], name]["median"] for name in likelihood.WAYS]
    for spread in spreads:
        ours, theirs = (rows[spread, name] for name in likelihood.WAYS)
        ratio = theirs["deviation"] ** 2 / ours["deviation"] ** 2
        assert theirs["variance_ratio"] == pytest.approx(ratio) and ratio > 1, "all tokens cost about the same: 1/t scatters more"
        assert theirs["equal_error"] == pytest.approx(ratio * medians[1] / medians[0])
    assert [check["value"] for check in document["checks"]] == [1, 1, 1, 1]


def test_tables(document, tmp_path, capsys):
    file = tmp_path / "2026-01-01-eval.json"
    file.write_text(json.dumps(document))
    assert main(["bench", "eval", "--markdown", str(file)]) == 0
    text = capsys.readouterr().out
    assert text.rstrip("\n") == markdown(document, SUITES["eval"])
    name = likelihood.SMOKE.name
    assert f"| nelbo: sequences a second, 2 draws each (times eager) | {name} |" in text
    assert f"| ar_nll: sequences a second (times eager) | {name} |" in text
    rows = {(row["case"], row["name"]): row for row in document["results"]}
    spread = "spread: random weights, one sequence, 2 draws"
    (line,) = [line for line in text.splitlines() if line.startswith("| random weights, one sequence, 2 draws |")]
    last = rows[spread, "eager"]
    cells = [f"{rows[spread, name]['mean']:.4f} ({rows[spread, name]['deviation']:.4f})" for name in likelihood.WAYS]
    cells += [f"{last['variance_ratio']:.2f} +- {last['variance_ratio_stderr']:.2f}", f"{last['equal_error']:.2f}"]
    assert line == f"| {spread.removeprefix('spread: ')} | {' | '.join(cells)} |"


def test_means_that_differ_are_found():
    rows = {name: {"mean": 1.5, "stderr": 0.01} for name in likelihood.WAYS}
    assert likelihood._same_mean(rows)["value"] == 1
    rows["eager"] = {"mean": 1.6, "stderr": 0.01}
    assert likelihood._same_mean(rows)["value"] == 0


@pytest.mark.parametrize("found", [likelihood.Spread(1, 2, 4, 16), likelihood.Spread(2, 1, 2, 16)])
def test_a_spread_is_that_of_one_text(found):
    """Tokens 0 cost 1 nat, tokens 1 cost 2, wherever: texts differ by almost a nat, repeated estimates of one hardly."""

    class Unigram:
        mask_token_id, vocab_size = 2, 3

        def __call__(self, xt, t):
            return torch.tensor([-1.0, -2.0, 9.0]).expand(*xt.shape, 3).clone()

    class Session:
        family, results = "likelihood", [{"case": "nelbo: V = 101, L = 8", "name": n, "median": 1.0} for n in likelihood.WAYS]

        def check(self, name, run):
            assert run()["value"] == 1

    x0 = (torch.arange(4) // found.members % 2)[:, None].repeat(1, 64)
    x0[:, 0] = 1 - x0[:, 0]
    session = Session()
    likelihood.spread(session, "unigram", Unigram(), x0, found, likelihood.SMOKE)
    ours = next(row for row in session.results if row["name"] == "edlm" and "deviation" in row)
    assert ours["deviation"] < 0.2 and ours["n"] == 4


def test_a_spread_without_the_sources_is_missed_and_said(monkeypatch):
    missed = []

    class Session:
        smoke, full, device = False, False, torch.device("cpu")

        def miss(self, *what):
            missed.append(what)

    monkeypatch.setattr(likelihood, "TRAINED", "no_such_model")
    likelihood.spreads(Session())
    assert missed == [("spread: no_such_model", None, "every way", "examples/models/no_such_model comes with the sources alone")]


@pytest.mark.skipif(not memory.measurable(), reason="no /proc/self/status")
def test_peak_memory_sees_the_logits():
    case = likelihood.Case(20_000, 64, sequences=4, draws=2, batch=8, dim=16, layers=1, heads=2)
    ours, theirs = (likelihood.measure(likelihood.NELBO, name, case) for name in likelihood.WAYS)
    logits = 4 * case.batch * case.length * case.vocab
    assert theirs["extra_bytes"] > 1.9 * logits > logits > ours["extra_bytes"]


def test_claims_are_about_what_is_measured():
    claims = verdicts([], SUITES["eval"])
    assert {v.wanted for v in claims} == {">= 1.5x", ">= 1.2x", "<= 0.2x", ">= 1x"} and all(v.met is None for v in claims)
    spreads = {f"{likelihood.TRAINED}, {s.name}" for s in (likelihood.ONE_DRAW, likelihood.MANY_DRAWS, likelihood.BATCH)}
    assert {v.where for v in claims} == {likelihood.BPE.name, likelihood.LONG.name} | spreads
    plain = {"family": "likelihood", "dtype": None}
    rows = []
    for kind in likelihood.KINDS:
        for name, time, size in (("edlm", 10.0, 1), ("eager", 14.0, 5)):
            rows.append(plain | {"case": f"{kind}: {likelihood.BPE.name}", "name": name, "median": time})
            rows.append(plain | {"case": f"{kind}, peak memory: {likelihood.BPE.name}", "name": name, "extra_bytes": size})
    many = f"{likelihood.TRAINED}, {likelihood.MANY_DRAWS.name}"
    rows.append(plain | {"case": f"spread: {many}", "name": "eager", "equal_error": 0.9})
    found = {(v.claim, v.where): v for v in verdicts(rows, SUITES["eval"])}
    bpe = likelihood.BPE.name
    assert found["eval.nelbo: time of eager over it", bpe].met is False
    assert found["eval.ar_nll: time of eager over it", bpe].measured == "1.40x"
    assert found["eval.nelbo: peak beyond the weights over eager", bpe].met is True
    assert found["eval.nelbo: time of eager over it at equal standard errors", many].met is False
    assert sum(v.met is None for v in found.values()) == 4


def test_the_suite_runs_by_its_name():
    assert suite._module("likelihood") == ".evaluation.likelihood"
