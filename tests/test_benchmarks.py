"""The benchmarks run: a smoke of each, and the table that documents take from its JSON. No timing is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_bench_sampling(tmp_path):
    pytest.importorskip("edlm._build", reason="nothing is compiled")
    script, file = str(ROOT / "benchmarks" / "ops" / "bench_sampling.py"), tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, script, "--smoke", "--repetitions", "3", "--json", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    assert {"cpu", "threads", "torch", "edlm", "isa"} <= set(document["machine"])
    names = {timing["name"] for timing in document["results"][0]["timings"]}
    assert {"amax", "sample_candidates K=1", "sample_candidates K=16", "eager K=8", "gumbel K=8"} <= names
    assert all(t["low"] <= t["median"] <= t["high"] for result in document["results"] for t in result["timings"])
    table = subprocess.run([sys.executable, script, "--markdown", str(file)], capture_output=True, text=True, check=True).stdout
    assert "| 8 x 501, float32 |" in table


def test_committed_results_make_their_tables():
    for file in (ROOT / "benchmarks" / "results").rglob("*sampling*.json"):
        script = str(ROOT / "benchmarks" / "ops" / "bench_sampling.py")
        table = subprocess.run(
            [sys.executable, script, "--markdown", str(file)], capture_output=True, text=True, check=True
        ).stdout
        documents = [ROOT / "README.md", ROOT / "docs" / "measured_facts.md"]
        assert any(table.strip() in document.read_text() for document in documents), f"no document shows the table of {file.name}"
