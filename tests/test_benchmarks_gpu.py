"""The part of the benchmarks that a GPU runs, as far as a CPU can stand for one: timing, cases, claims, checks, the script."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import edlm.ops
import pytest
import torch
from edlm.benchmarks import device as gpu
from edlm.benchmarks import gpu_check, peers
from edlm.benchmarks.arguments import FAMILIES
from edlm.benchmarks.claims import FLASHINFER, GRAPH_CHECK, HAND, verdicts
from edlm.benchmarks.harness import Inputs, Variant, interleave, references
from edlm.benchmarks.session import COPY, Session
from edlm.benchmarks.tables import console, markdown
from edlm.cli import build_parser, main

ROOT = Path(__file__).parent.parent
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Stream:
    """A host and a device in seconds: what the events of a stream would say."""

    def __init__(self):
        self.host = self.device = 0.0

    def clock(self):
        return self.host

    def launch(self, takes, busy):
        self.host += takes
        self.device = max(self.device, self.host) + busy

    def wait(self):
        self.host = max(self.host, self.device)

    def event(self):
        marks = []
        return types.SimpleNamespace(
            mark=marks,
            record=lambda: marks.append(max(self.device, self.host)),
            query=lambda: marks[-1] <= self.host,
            synchronize=lambda: self.wait(),
            elapsed_time=lambda other: 1e3 * (other.mark[-1] - marks[-1]),
        )

    def timer(self):
        return gpu.DeviceTimer(lambda cycles: self.launch(1e-6, 1e-9 * cycles), self.event, self.wait, self.clock)


def test_events_time_the_device_where_the_host_is_ahead():
    stream = Stream()
    variants = [
        Variant("kernel", lambda i: stream.launch(20e-6, 3e-6)),
        Variant("waits", lambda i: (stream.launch(20e-6, 3e-6), stream.wait())),
        Variant("a call and its end", lambda i: stream.launch(20e-6, 3e-6), wall=True),
    ]
    kernel, waits, wall = interleave(variants, 4, inner=5, timer=stream.timer(), clock=stream.clock)
    assert kernel.median == pytest.approx(3e-3) and kernel.queued == 1
    assert waits.median == pytest.approx(22e-3, rel=0.3) and waits.queued == 0
    assert wall.median == pytest.approx(23e-3) and wall.queued is None


class Pretended(Session):
    cuda = True  # every branch of a GPU, on a CPU


@pytest.fixture
def pretend(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(edlm.ops, "deferred_checks", contextlib.nullcontext, raising=False)

    def captured(calls):
        given = [call() for call in calls]

        def replay():
            for old, call in zip(given, calls, strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(call())

        return replay, given

    monkeypatch.setattr(gpu, "captured", captured)
    return lambda family: Pretended(family, "smoke", 3, Inputs(1 << 16, 0, True), False, False, lambda rows: None)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_cases_for_a_gpu(pretend, family):
    session = pretend(family)
    session.copy()
    importlib.import_module(f"edlm.benchmarks.ops.bench_{family}").run(session)
    names = {row["name"] for row in session.results}
    wanted = {
        "sampling": {HAND, "sample_candidates, K = 8, 10 % masked", "sample_candidates, K = 8, graph", "amax, graph"},
        "log_probs": {"gather_log_probs", "log_softmax + gather", "F.cross_entropy", "linear_log_probs"},
        "importance": {"select_candidate, K = 16, graph", "reverse_step, graph"},
    }
    assert wanted[family] | {COPY} <= names
    assert all(row["of_copy"] > 0 for row in session.results) and session.results[0]["of_copy"] == 1
    assert {row["reason"] for row in session.missing} <= {"not installed"}
    keys = [(row["case"], row["dtype"], row["name"]) for row in session.results]
    assert len(keys) == len(set(keys)) and console(session.results)
    if family == "sampling":
        assert [(c["name"], c["value"]) for c in session.checks] == [(GRAPH_CHECK, 1)]


def test_what_fails_costs_one_result(pretend, capsys):
    def broken(i):
        raise RuntimeError("no such kernel\nand more")

    session = pretend("sampling")
    session.measure("case", [Variant("a", lambda i: None, 8), Variant("b", broken, 8)], n=1, v=1, dtype=torch.float32)
    assert [row["name"] for row in session.results] == ["a"]
    assert session.missing[0]["name"] == "b" and session.missing[0]["reason"] == "failed: RuntimeError: no such kernel"
    assert "no such kernel" in capsys.readouterr().out
    assert not session.fits("case", 1 << 20, 100, torch.float32) and session.missing[1]["reason"].startswith("does not fit")


def test_a_graph_that_repeats_itself_is_found(pretend):
    def stale(calls):
        given = [call() for call in calls]
        return (lambda: None), given

    found = gpu.graph_check(torch.device("cpu"), n=8, v=100, capture=stale)
    assert found["value"] == 0 and "0.000 differ" in found["detail"]


def test_peers_are_what_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert peers.flashinfer() == peers.liger() == "not installed"
    fake = types.ModuleType("flashinfer.sampling")
    monkeypatch.setitem(sys.modules, "flashinfer", types.ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", fake)
    assert peers.flashinfer().startswith("failed: ImportError")
    fake.sampling_from_logits = fake.sampling_from_probs = lambda x: x.argmax(-1)
    assert {name: len(draw(torch.randn(2, 5))) for name, draw in peers.flashinfer().items()} == dict.fromkeys(FLASHINFER, 8)


def test_the_device_is_part_of_the_command(monkeypatch, capsys):
    suite = importlib.import_module("edlm.benchmarks.suite")
    options = build_parser().parse_args(["bench", "ops", "--device", "cuda", "--full"])
    assert suite.command(options) == "edlm bench ops --device cuda --full"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "ops", "--device", "cuda"]) == 2
    assert "--device: expected cpu, or cuda where torch can use a GPU" in capsys.readouterr().err
    monkeypatch.setattr(edlm.ops, "backends", lambda: {"resample": {"cpu": "compiled", "cuda": "reference"}})
    assert references(["resample"], "cuda") == ["resample"] and references(["resample"]) == []


def test_clocks_are_those_of_the_gpu_that_was_asked_for():
    text = "GPU-aa, 580.1, 345, 2619, 1980, 2619, 700.00, 30\nGPU-bb, 580.1, 1980, 2619, 1980, 2619, 700.00, 45\n"
    assert gpu.parse_smi(text, "bb")["clocks.sm"] == "1980" and gpu.parse_smi(text, None)["clocks.sm"] == "345"
    assert gpu.parse_smi("NVIDIA-SMI has failed\n", "bb") == {}


def test_claims_of_a_gpu():
    rows = []
    for dtype in ("bfloat16", "float32"):
        times = {"sample_candidates, K = 1": 100.0, "sample_candidates, K = 8": 102.0, "sample_candidates, K = 16": 105.0}
        times |= {HAND: 510.0, FLASHINFER[0]: 300.0, FLASHINFER[1]: 101.0}
        rows += [result("decode step: 8192 x 50258", name, time, dtype, of_copy=85 / time) for name, time in times.items()]
    found = verdicts(rows, FAMILIES, "cuda", [{"family": "sampling", "name": GRAPH_CHECK, "value": 1.0}])
    assert {(v.claim, v.wanted) for v in verdicts(rows, ["sampling"], "cuda")} == {(v.claim, v.wanted) for v in found}
    where = "8192 x 50258, bfloat16"
    assert one(found, "sample_candidates, K = 8: of the bandwidth of a copy", where).met is False
    assert one(found, "sample_candidates: K = 16 over K = 1", where).met is True
    assert one(found, f"sample_candidates, K = 8: {HAND.rpartition(',')[0]}", where).value == 5
    assert one(found, "sample_candidates, K = 8: time over flashinfer", where).value == 102 / 101
    assert one(found, GRAPH_CHECK, "sample_categorical").met is True
    assert sum(v.met is None for v in found) == 3 + 3 * 6


def result(case, name, median, dtype, of_copy):
    return {"family": "sampling", "case": case, "name": name, "dtype": dtype, "median": median, "of_copy": of_copy}


def one(found, claim, where):
    (verdict,) = [v for v in found if v.claim.startswith(claim) and v.where.startswith(where)]
    return verdict


def test_tables_of_a_gpu(tmp_path):
    assert (
        main(["bench", "ops", "--smoke", "--allow-reference", "--family", "log_probs", "--json", str(tmp_path / "out.json")]) == 0
    )
    document = json.loads((tmp_path / "out.json").read_text())
    shown = {
        "name": "NVIDIA X",
        "capability": "9.0",
        "memory_bytes": 80 << 30,
        "l2_bytes": 50 << 20,
        "driver": "1",
        "cuda": "13.0",
    }
    rows = [{**row, "of_copy": 0.871, "queued": 0.0} for row in document["results"]]
    missing = [
        {"family": "log_probs", "case": f"linear: {i}", "dtype": None, "name": "Liger", "reason": "none"} for i in range(5)
    ]
    fake = {**document, "device": "cuda", "results": rows, "missing": missing, "checks": []}
    fake["machine"] = {**document["machine"], "gpu": {**shown, "clocks": {"clocks.sm": "1980"}}}
    text = markdown(fake, FAMILIES)
    assert "; 87 %)" in text and "Not timed: Liger: none (5 cases)." in text and "NVIDIA X (capability 9.0, 81920 MiB" in text
    assert "87.1 %" in console(rows[:3]) and "host-bound" in console(rows[:3])


def test_the_check_of_a_gpu_passes_on_a_cpu_and_sees_differences(monkeypatch, capsys):
    assert gpu_check.compare(torch.device("cpu"), every=3) == 0
    count, total = (int(word) for word in capsys.readouterr().out.split()[:3:2])
    assert count == total >= 60
    with monkeypatch.context() as patched:
        patched.setattr(edlm.ops, "reverse_step", lambda *_: 1 / 0)
        assert gpu_check.compare(torch.device("cpu"), every=3) == 2
        assert "ZeroDivisionError" in capsys.readouterr().out
    tokens, numbers = torch.arange(3000), torch.zeros(3000)
    assert gpu_check.difference((tokens, numbers), (tokens, numbers + 1e-3)) == "3000 of 3000 numbers differ, by up to 1.00e-03"
    other = tokens.clone()
    other[:3] += 1
    assert gpu_check.difference((other, numbers), (tokens, numbers)) is None
    other[:4] += 1
    assert gpu_check.difference((other, numbers), (tokens, numbers)) == "4 of 3000 integers differ"
    assert gpu_check.difference((numbers,), (numbers[None],)) is not None
    assert gpu_check.difference((numbers * torch.nan,), (numbers,)) is not None


def test_the_script_for_a_gpu(tmp_path):
    script = ROOT / "benchmarks" / "gpu.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", script], check=False).returncode == 0
    # A Python that stands for one with a GPU: it builds, its tests run too long, its benchmark fails.
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/bash
case "$*" in
  "- "*) exec {sys.executable} "$@" ;;
  *get_device_name*) echo "NVIDIA X 80GB" ;;
  *get_device_capability*) echo 90 ;;
  *"bench ops"*) echo Verdict; exit 3 ;;
  *"-m pytest"*) sleep 60 ;;
  *find_spec*) echo "${{PYTHONPATH%%:*}}${{ELSEWHERE-/edlm}}" ;;
esac
"""
    )
    python.chmod(0o755)
    settings = {
        "PYTHON": str(python),
        "OUT": str(tmp_path / "out"),
        "TESTS_S": "1",
        "STEPS": "build check bench tests",
        "ARCH": "",
    }
    done = subprocess.run([script], env=os.environ | settings, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(step["name"], step["status"], step["note"]) for step in summary["steps"]] == [
        ("build", "passed", ""),
        ("check", "passed", ""),
        ("bench", "failed", "exit status 3"),
        ("tests", "failed", "stopped after 1 s"),
    ]
    assert summary["gpu"] == "NVIDIA X 80GB" and summary["versions"]["torch"] == torch.__version__
    assert "CMAKE_CUDA_ARCHITECTURES=90" in (tmp_path / "out" / "build.log").read_text()
    assert "| bench | failed |" in (tmp_path / "out" / "summary.md").read_text()
    settings |= {"STEPS": "build", "ELSEWHERE": "/old/edlm"}
    done = subprocess.run([script], env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "gpu-site/old/edlm, not at" in done.stdout
    settings |= {"PYTHON": "false"}
    assert subprocess.run([script], env=os.environ | settings, capture_output=True, check=False).returncode == 2


@with_gpu
def test_a_smoke_on_a_gpu(tmp_path):
    file = tmp_path / "out.json"
    assert main(["bench", "ops", "--smoke", "--allow-reference", "--device", "cuda", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["device"] == "cuda" and document["machine"]["gpu"]["name"] == torch.cuda.get_device_name()
    assert {row["family"] for row in document["results"]} == set(FAMILIES) and document["checks"][0]["value"] == 1
    assert markdown(document, FAMILIES)
