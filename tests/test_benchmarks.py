"""The benchmarks run: a smoke of every family, the tables and the verdict made from its JSON. No time is asserted."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import edlm.ops
import pytest
import torch
from edlm.benchmarks import memory, suite
from edlm.benchmarks.arguments import FAMILIES, SUITES, add_arguments
from edlm.benchmarks.claims import Verdict, verdicts
from edlm.benchmarks.decode import loop
from edlm.benchmarks.harness import Inputs, Variant, interleave
from edlm.benchmarks.tables import markdown, verdict_table
from edlm.benchmarks.training import loader, step
from edlm.cli import main

ROOT = Path(__file__).parent.parent
COMMITTED = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmarks") / "out.json"
    state = torch.get_rng_state()
    assert main(["bench", "ops", "--smoke", "--allow-reference", "--json", str(file)]) == 0
    torch.set_rng_state(state)
    return json.loads(file.read_text())


NAMES = {
    "sampling": {
        *(f"{op}, K = {k}" for op in ("sample_candidates", "sample_categorical") for k in (1, 8, 16)),
        *("amax", "log_softmax + multinomial + gather, K = 8", "Gumbel in float32, K = 8", "Gumbel in float64, K = 8"),
        *(f"sample_candidates, K = 8, {what}" for what in ("temperature 0.7", "top_k 50", "top_p 0.9", "min_p 0.05")),
        *(f"sample_candidates, K = 8, {what}" for what in ("10 % masked", "50 % masked", "1 thread", "2 threads")),
    },
    "log_probs": {
        *("amax", "gather_log_probs", "log_softmax + gather", "F.cross_entropy"),
        *("linear_log_probs", "logits + F.cross_entropy"),
    },
    "importance": {
        *("select_candidate, K = 16", "softmax + multinomial, K = 16", "softmax + cumsum + searchsorted"),
        *(f"resample, {scheme}" for scheme in ("systematic", "stratified", "multinomial", "residual")),
        *("reverse_step", "xt.clone()", "gather + torch.where", "reverse_step, B = 1, L = 1"),
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_times_what_it_names(document, family):
    rows = [row for row in document["results"] if row["family"] == family]
    assert NAMES[family] <= {row["name"] for row in rows}
    for row in rows:
        assert 0 < row["low"] <= row["median"] <= row["high"], row
        assert row["repetitions"] >= 3 and row["bytes"] > 0 and row["gb_per_s"] > 0 and row["n"] > 0
        assert (row["over_amax"] == 1) == (row["name"] == "amax") or row["over_amax"] is None
    # A case is looked up by these four: no two results may share them.
    keys = [(row["case"], row["dtype"], row["name"]) for row in rows]
    assert len(keys) == len(set(keys))


def test_a_file_says_where_its_numbers_come_from(document):
    assert document["format"] == 1 and document["seed"] == 0 and document["device"] == "cpu"
    assert document["command"] == "edlm bench ops --smoke --allow-reference"
    assert {"cpu", "cores", "threads", "isa", "caches", "transparent_huge_pages", "memory"} <= set(document["machine"])
    assert set(document["versions"]) == {"torch", "edlm", "python"}
    assert set(document["timed_ops"]) >= {"sample_candidates", "linear_log_probs_backward", "reverse_step"}
    assert set(document["ops"].values()) <= {"compiled", "reference"}


def test_tables_and_verdict(document):
    text = markdown(document, FAMILIES)
    for row in document["results"]:
        assert row["name"] in text and row["case"].partition(": ")[2] in text
    for verdict in verdicts(document["results"], FAMILIES):  # no size of a smoke is one that a claim is about
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {verdict.claim} | {verdict.wanted} |")]
        assert f"{verdict.where}: -" in line and line.endswith("| not measured |")
    assert document["machine"]["cpu"] in text and document["command"] in text
    alone = markdown(document, ["importance"])
    assert "reverse_step" in alone and "sample_candidates" not in alone.rpartition("\n\n")[0]


def test_a_script_of_the_checkout_runs_and_makes_its_table(tmp_path):
    script, file = str(ROOT / "benchmarks" / "ops" / "bench_importance.py"), tmp_path / "out.json"
    run = {"capture_output": True, "text": True, "check": False, "cwd": tmp_path}
    done = subprocess.run([sys.executable, script, "--smoke", "--allow-reference", "--json", str(file)], **run)
    assert done.returncode == 0, done.stderr
    assert {row["family"] for row in json.loads(file.read_text())["results"]} == {"importance"}
    done = subprocess.run([sys.executable, script, "--markdown", str(file)], **run)
    assert done.returncode == 0 and "| reverse_step |" in done.stdout, done.stderr


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.name)
def test_committed_results_make_their_tables(file):
    """Every part of what ``edlm bench SUITE --markdown FILE`` prints stands in a document, to the letter."""
    document = json.loads(file.read_text())
    assert document.get("format") == 1, f"{file.name} was written by an earlier suite: run it again, or remove it"
    shown = [(ROOT / name).read_text() for name in ("README.md", "docs/measured_facts.md")]
    suite = file.stem.rpartition("-")[2]
    blocks = markdown(document, SUITES[suite]).split("\n\n")
    assert suite != "ops" or blocks[0] in shown[0], f"README.md does not show the first table of {file.name}"
    for block in blocks:
        assert any(block in text for text in shown), f"no document shows this of {file.name}:\n{block}"


def test_references_are_refused_unless_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(edlm.ops, "backends", lambda: {"resample": {"cpu": "reference", "cuda": "reference"}})
    assert main(["bench", "ops", "--smoke", "--family", "importance"]) == 2
    error = capsys.readouterr().err
    assert "references of resample" in error and "--allow-reference" in error


def test_interleaving_gives_every_call_a_number_of_its_own():
    time = itertools.count()
    numbers = {"a": [], "b": []}
    before = []
    variants = [
        Variant("a", numbers["a"].append, before=lambda: before.append(len(numbers["a"]))),
        Variant("b", numbers["b"].append),
    ]
    timings = interleave(variants, 5, inner=2, clock=lambda: float(next(time)))
    assert sorted(numbers["a"] + numbers["b"]) == list(range(2 * 2 * 6)), "five rounds after one of warming up"
    assert before == [0, 2, 4, 6, 8, 10]
    assert all((t.low, t.median, t.high, t.repetitions) == (500, 500, 500, 5) for t in timings), "a second, over two calls"
    assert interleave(variants, 50, budget_s=0, clock=lambda: float(next(time)))[0].repetitions == 3
    with pytest.raises(ValueError, match="repetitions: expected at least 3"):
        interleave(variants, 2)
    whole, short = [], []
    interleave([Variant("slow", whole.append, warm_up=short.append)], 3, clock=lambda: float(next(time)))
    assert short == [0] and whole == [1, 2, 3]
    # A replay of ten calls is one call of a sample, and ten of its mean.
    (replay,) = interleave([Variant("graph", lambda i: None, ops=10)], 3, inner=7, clock=lambda: float(next(time)))
    assert replay.median == 100 and replay.queued is None


def test_inputs_are_random_and_their_neighbours_other_memory():
    inputs = Inputs(10_000, seed=0, smoke=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        fresh = inputs.fresh(7, 101, dtype)
        first, second, after = fresh(0), fresh(1), fresh(2)
        assert first.shape == (7, 101) and first.dtype == dtype and first.is_contiguous() and first.data_ptr() % 64 == 0
        assert abs(second.data_ptr() - first.data_ptr()) >= first.nbytes and second.data_ptr() != after.data_ptr()
        assert 1 < first.float().std() < 3 and not torch.equal(first, second)
    assert 2 * first.nbytes < Inputs(4 << 20, seed=0, smoke=False).bytes


@pytest.mark.skipif(not memory.measurable(), reason="no /proc/self/status")
def test_peak_memory_counts_the_gradients_and_what_lies_beyond():
    found = memory.measure("cross_entropy", backward=True, n=2000, d=0, v=5000)
    assert found["gradient_bytes"] == 4 * 2000 * 5000 and found["method"].startswith("Vm")
    # The gradient and the log-softmax that the backward needs, at least; and not the inputs.
    assert 1.9 < found["extra_bytes"] / found["gradient_bytes"] < 4


# --- claims -----------------------------------------------------------------------------------------------------------------------


def result(case, name, median, dtype="float32", family="sampling", **more):
    return {"family": family, "case": case, "name": name, "dtype": dtype, "median": median, **more}


def test_every_claim_is_listed_with_its_limit():
    wanted = {(v.claim.partition(":")[0], v.wanted) for v in verdicts([], FAMILIES)}
    for op in ("sample_candidates", "sample_categorical"):
        assert {(f"{op}, K = 8", w) for w in ("<= 2.2x", ">= 20x", ">= 100x", "<= 1x", ">= 5x")} | {(op, "<= 1.15x")} <= wanted
    assert {
        ("sample_candidates, K = 8", "< 1x"),
        ("gather_log_probs, forward", "<= 2.2x"),
        ("gather_log_probs, forward", ">= 3x"),
        ("gather_log_probs, forward + backward", ">= 1.5x"),
        ("linear_log_probs, forward", "< 64 MB"),
        ("linear_log_probs, backward", "< 64 MB"),
        ("select_candidate, K = 16", "< 1x"),
        ("reverse_step", "<= 1x"),
    } <= wanted
    assert all(v.met is None and v.word == "not measured" for v in verdicts([], FAMILIES))


def one(found, claim, where):
    (verdict,) = [v for v in found if v.claim.startswith(claim) and v.where.startswith(where)]
    return verdict


@pytest.mark.parametrize(("median", "met"), [(22.0, True), (22.001, False)])
def test_a_claim_on_amax(median, met):
    case = "decode step: 512 x 50258"
    found = verdicts([result(case, "amax", 10.0), result(case, "sample_candidates, K = 8", median)], ["sampling"])
    verdict = one(found, "sample_candidates, K = 8: time over amax", "512 x 50258")
    assert verdict.met is met and verdict.word == ("met" if met else "NOT MET")
    assert one(found, "sample_candidates, K = 8: time over amax", "256 x 151936").met is None


def test_the_verdict_shows_what_misses_a_claim():
    rows = []
    for where, median in (("512 x 50258", 21.0), ("256 x 151936", 23.0)):
        rows += [
            result(f"decode step: {where}", "amax", 10.0),
            result(f"decode step: {where}", "sample_candidates, K = 8", median),
        ]
    text = verdict_table(verdicts(rows, ["sampling"]))
    line = "512 x 50258, float32: 2.10x; 256 x 151936, float32: **2.30x** | **NOT MET** at 1 of 2 |"
    assert f"| sample_candidates, K = 8: time over amax | <= 2.2x | {line}" in text
    assert "\n1 of 2 measured claims are met; " in text


def test_noise_is_compared_by_the_faster_precision_and_a_reverse_step_pays_for_one_call():
    case = "decode step: 256 x 151936"
    rows = [result(case, f"Gumbel in {dtype}, K = 8", time) for dtype, time in (("float32", 90.0), ("float64", 200.0))]
    found = verdicts([*rows, result(case, "sample_categorical, K = 8", 1.0)], ["sampling"])
    assert one(found, "sample_categorical, K = 8: 8-fold Gumbel", "256 x 151936").value == 90
    case = "reverse step: B = 64, L = 1024"
    times = {"reverse_step": 26.0, "xt.clone()": 10.0, "reverse_step, B = 1, L = 1": 5.0}
    found = verdicts([result(case, n, t, dtype=None, family="importance") for n, t in times.items()], ["importance"])
    assert one(found, "reverse_step", "B = 64").value == 26 / 25 and not one(found, "reverse_step", "B = 64").met


def test_memory_of_a_backward_is_what_lies_beyond_the_gradients():
    case, name = "peak memory: 4096 x 768 x 50258", "linear_log_probs, forward"
    sizes = {name: (63_999_999, 0), f"{name} + backward": (200_000_000, 136_000_000)}
    rows = [{**result(case, n, None, family="log_probs"), "extra_bytes": e, "gradient_bytes": g} for n, (e, g) in sizes.items()]
    found = verdicts(rows, ["log_probs"])
    assert one(found, "linear_log_probs, forward", "4096").met is True
    assert one(found, "linear_log_probs, backward", "4096").met is False, "64 MB is not less than 64 MB"


@pytest.mark.parametrize(
    ("value", "sense", "limit", "shown"),
    [(2.2, "<=", 2.2, "2.20x"), (2.2001, "<=", 2.2, "2.21x"), (19.999, ">=", 20, "19.9x"), (151.2, ">=", 100, "151x")],
)
def test_rounding_never_makes_a_claim_look_met(value, sense, limit, shown):
    assert Verdict("", "", "", value, sense, limit).measured == shown


# --- a training step --------------------------------------------------------------------------------------------------------------


def suite_options(name, *words):
    parser = argparse.ArgumentParser()
    parser.add_argument("suite")
    add_arguments(parser)
    return parser.parse_args([name, *words])


def training_options(*words):
    return suite_options("training", *words)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    file = tmp_path_factory.mktemp("training") / "out.json"
    state = torch.get_rng_state()
    assert suite.run(training_options("--smoke", "--allow-reference", "--json", str(file))) == 0
    torch.set_rng_state(state)
    return json.loads(file.read_text())


def test_a_training_step_is_timed_both_ways_and_stands_beside_its_rows(training):
    assert training["command"] == "edlm bench training --smoke --allow-reference"
    found = {(row["family"], row["case"].partition(",")[0].partition(":")[0], row["name"]) for row in training["results"]}
    ways = (step.EDLM, step.PLAIN)
    assert found == {("step", kind, way) for kind in step.KINDS for way in ways} | {
        ("loader", "rows", loader.BATCH),
        ("loader", "rows", loader.STEP),
    }
    rows = {row["name"]: row for row in training["results"]}
    assert rows[loader.BATCH]["tokens_per_second"] == pytest.approx(1e3 * 16 / rows[loader.BATCH]["median"])
    text = markdown(training, SUITES["training"])
    assert step.PLAIN in text and loader.BATCH in text and "| not measured |" in text


def test_families_of_another_suite_are_refused():
    with pytest.raises(ValueError, match="--family: expected families of training \\(step, loader\\), got sampling"):
        suite.run(training_options("--family", "sampling"))
    assert suite.command(training_options("--family", "step", "--full")) == "edlm bench training --family step --full"


@pytest.mark.parametrize("kind", step.KINDS)
def test_both_ways_are_the_same_loss_and_gradient(kind):
    sizes = step.SMOKE
    model = step.network(kind, sizes)
    found = step.losses(kind, model, sizes)
    step.check(found, list(model.parameters()))
    with torch.no_grad():
        assert abs(float(found[step.EDLM](0)) - float(found[step.EDLM](1))) > 1e-4, "every step has other rows and other noise"
    with pytest.raises(RuntimeError, match="expected equal losses"):
        step.check(found | {step.EDLM: lambda i: 1.001 * found[step.EDLM](i)}, list(model.parameters()))
    with pytest.raises(RuntimeError, match="expected equal gradients"):
        step.check(
            found
            | {step.EDLM: lambda i: found[step.EDLM](i) + 1e-2 * (w := model.linear.weight).sum() - 1e-2 * w.detach().sum()},
            list(model.parameters()),
        )


@pytest.mark.skipif(not memory.measurable(), reason="no /proc/self/status")
def test_peak_memory_of_a_step_sees_the_logits():
    sizes = step.Sizes("test", 8, 64, 20_000, dim=16, layers=1, heads=2)
    ours, plain = (step.measure("CausalLM", name, sizes) for name in (step.EDLM, step.PLAIN))
    logits = 4 * 8 * 64 * 20_000
    assert plain["extra_bytes"] > 1.9 * logits > ours["extra_bytes"]
    assert ours["gradient_bytes"] == plain["gradient_bytes"] > 2 * 4 * 16 * 19_999


def test_claims_of_a_training_step():
    claims = verdicts([], SUITES["training"])
    assert [(v.claim.partition(",")[0], v.wanted) for v in claims] == [
        *[(kind, wanted) for kind in step.KINDS for wanted in ("<= 1x", "<= 1x", "< 1x")],
        ("WindowDataset.batch: time over a training step of the small DiT", "<= 1 %"),
    ]
    assert {v.where for v in claims} == {step.GPT2.case, step.TEXT8.case}
    case, names = f"DiT, time: {step.GPT2.case}", (step.EDLM, step.PLAIN)
    rows = [result(case, name, time, family="step") for name, time in zip(names, (9.0, 10.0), strict=True)]
    case = f"CausalLM, peak memory: {step.GPT2.case}"
    rows += [{**result(case, name, None, family="step"), "extra_bytes": size} for name, size in zip(names, (5, 5), strict=True)]
    case = f"rows: {step.TEXT8.case}"
    rows += [result(case, name, time, family="loader", dtype=None) for name, time in ((loader.BATCH, 1.0), (loader.STEP, 50.0))]
    for device in ("cpu", "cuda"):
        found = verdicts(rows, SUITES["training"], device)
        assert one(found, "DiT, training step: time", step.GPT2.case).met is True
        assert one(found, "CausalLM, training step: peak", step.GPT2.case).met is False, "as much is not less"
        assert one(found, "WindowDataset.batch", step.TEXT8.case).measured == "2.00 %"
        assert sum(v.met is None for v in found) == 4


# --- the decode loop --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoding(tmp_path_factory):
    file = tmp_path_factory.mktemp("decode") / "out.json"
    state = torch.get_rng_state()
    assert suite.run(suite_options("decode", "--smoke", "--allow-reference", "--json", str(file))) == 0
    torch.set_rng_state(state)
    return json.loads(file.read_text())


def test_a_decode_is_timed_beside_the_published_loop_and_the_networks_alone(decoding):
    assert decoding["command"] == "edlm bench decode --smoke --allow-reference"
    whole, part = (f"end to end: {case.name}" for case in (loop.SMOKE, loop.SMOKE._replace(steps=16)))
    loops = (loop.EDLM, loop.PUBLISHED, loop.ADAPTED)
    found = {(row["case"], row["name"]): row for row in decoding["results"]}
    assert set(found) == {(whole, name) for name in (*loops, loop.NETWORKS)} | {(part, n) for n in (*loops[:2], loop.NETWORKS)}
    for row in found.values():
        assert 0 < row["low"] <= row["median"] <= row["high"] and row["bytes"] > 0 and row["repetitions"] >= 3
        assert row["over"]["value"] == pytest.approx(row["median"] / found[row["case"], loop.EDLM]["median"])
        assert 0 < row["energy_nfe"] <= row["nfe"]
    assert found[part, loop.PUBLISHED]["note"] == "timed on 4 of 16 steps and scaled"
    assert [name for name, row in found if found[name, row]["note"]] == [part], "everything else is timed whole"
    stages = found[whole, loop.EDLM]["stage_seconds"]
    assert (
        set(stages) == {"denoise", "propose", "energy", "select", "reverse"} == set(found[whole, loop.ADAPTED]["stage_seconds"])
    )
    assert all(seconds > 0 for seconds in stages.values())
    assert 0.5 < 1e3 * sum(stages.values()) / found[whole, loop.EDLM]["median"] <= 1
    for (_, name), row in found.items():
        if name != loop.NETWORKS:  # the stages are parts of the very runs that the time is of
            assert 0 <= row["rest_seconds"] == pytest.approx(1e-3 * row["median"] - sum(row["stage_seconds"].values()))
    assert all(isinstance(found[case, loop.EDLM]["not_conclusive"], list) for case in (whole, part))
    assert [check["value"] for check in decoding["checks"]] == [1, 1]


def test_tables_of_a_decode(decoding):
    text = markdown(decoding, SUITES["decode"])
    assert "| end to end: s (times edlm) |" in text and "\\* timed on 4 of 16 steps and scaled" in text
    rows = {row["name"]: row for row in decoding["results"] if row["case"].endswith(" 8 steps")}
    calls = [f"{rows[name]['nfe']} + {rows[name]['energy_nfe']}" for name in (loop.EDLM, loop.PUBLISHED, loop.ADAPTED)]
    assert f"| {loop.SMOKE.name} | {' | '.join(calls)} |" in text
    assert f"| stages, s ({loop.SMOKE.name}) | {loop.EDLM} | {loop.PUBLISHED} | {loop.ADAPTED} |" in text
    assert "| everything else |" in text and "| not measured |" in text


def test_a_loop_that_breaks_its_promises_is_found(monkeypatch):
    def forgetful(case, recorder, prompt):
        tokens, nfe, energy_nfe = loop.check_ours(case, recorder, prompt)
        return tokens, nfe - 1, energy_nfe

    def careless(case, recorder, prompt):
        tokens, nfe, energy_nfe = loop.check_theirs(case, recorder, prompt)
        return torch.where(tokens == tokens[0, 0], case.vocab - 1, tokens), nfe, energy_nfe

    for broken in (forgetful, careless):
        assert loop.check(broken, loop.SMOKE, torch.device("cpu"))["value"] == 0


@pytest.mark.skipif(not memory.measurable(), reason="no /proc/self/status")
def test_peak_memory_of_a_decode_sees_the_published_tensors():
    case = loop.Case(vocab=20_000, length=32, k=16, steps=4, dim=16, layers=1, heads=2)
    ours, published = (loop.measure(name, case) for name in (loop.EDLM, loop.PUBLISHED))
    repeated = 4 * case.k * case.length * case.vocab
    assert published["extra_bytes"] > 2.9 * repeated > repeated > ours["extra_bytes"]
    assert published["method"].endswith("of one step inside the window and one outside")


def test_claims_of_a_decode():
    claims = verdicts([], SUITES["decode"])
    assert {v.wanted for v in claims} == {">= 5x", "<= 0.2x", "<= 128"} and all(v.met is None for v in claims)
    cases = {loop.HEADLINE, loop.LONG, *loop.SWEEP, loop.WHOLE_WINDOW, loop.HEADLINE._replace(k=0)}
    cases |= {loop.HEADLINE._replace(k=k) for k in loop.PEAKS}
    assert {v.where for v in claims} <= {case.name for case in cases}, "a claim about what is never measured"
    case = f"end to end: {loop.HEADLINE.name}"
    rows = [result(case, n, time, family="loop", dtype=None) for n, time in ((loop.EDLM, 1.0), (loop.PUBLISHED, 4.9))]
    case = f"peak memory: {loop.HEADLINE.name}"
    sizes = ((loop.EDLM, 10), (loop.PUBLISHED, 50))
    rows += [{**result(case, n, None, family="loop", dtype=None), "extra_bytes": size} for n, size in sizes]
    rows.append(result(f"end to end: {loop.LONG.name}", loop.EDLM, 1.0, family="loop", dtype=None, nfe=129))
    found = verdicts(rows, SUITES["decode"])
    assert one(found, "decode, end to end", loop.HEADLINE.name).met is False
    assert one(found, "decode: peak", loop.HEADLINE.name).met is True
    assert (
        one(found, "decode: calls", loop.LONG.name).measured == "129" and one(found, "decode: calls", loop.LONG.name).met is False
    )
