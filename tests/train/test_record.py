"""What a run writes down: its lines, its samples, its sinks, and who writes them."""

from __future__ import annotations

import json

import pytest
from edlm.train import record, train
from tiny_run import tiny_config, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_keys_of_a_line(tmp_path, text):
    train(tiny_config("dit", text, steps=4, valid_every=2, log_every=2, logging={"samples": 3}), tmp_path / "run", progress=False)
    rows = lines(tmp_path / "run")
    speed = {"tokens_per_second", "eta_seconds", "seconds", "mfu"}
    valid = {"valid_loss", "valid_loss_stderr", "valid_bits", "valid_bits_stderr", "samples"}
    assert [row["step"] for row in rows] == [2, 4]
    assert all(row.keys() == {"step", "loss", "lr", "grad_norm"} | speed | valid for row in rows)
    assert rows[-1]["eta_seconds"] == 0 and 0 < rows[-1]["mfu"] < 1
    assert len(rows[0]["samples"]) == 3 and all(len(sample) == 16 for sample in rows[0]["samples"])
    assert rows[0]["samples"] != rows[1]["samples"]


def test_seconds_go_on_where_a_run_does(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert record._seconds(path) == 0
    path.write_text('{"step": 1, "seconds": 2.5}\n{"step": 2}\n{"step": 3, "sec')
    assert record._seconds(path) == 2.5


def test_tensorboard_beside_the_lines(tmp_path, text):
    pytest.importorskip("tensorboard", reason="a sink needs its package")
    train(tiny_config("dit", text, steps=4, logging={"sinks": ["tensorboard"]}), tmp_path / "run", progress=False)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*")) and len(lines(tmp_path / "run")) == 4


def test_an_autoregressive_model_has_samples_too(tmp_path, text):
    train(tiny_config("causal_lm", text, steps=2, valid_every=2, logging={"samples": 3}), tmp_path / "run", progress=False)
    (samples,) = [row["samples"] for row in lines(tmp_path / "run") if "samples" in row]
    assert len(samples) == 3 and all(len(sample) == 16 for sample in samples)
