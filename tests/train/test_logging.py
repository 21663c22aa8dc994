"""metrics.jsonl and the progress bar."""

from __future__ import annotations

import io
import json
import math

import pytest
from edlm.train import logging
from edlm.train.logging import Metrics, Progress


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_object_a_line_that_is_there_at_once(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl", resume_step=0)
    metrics.write(10, loss=1.5, lr=0.1)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 10, "loss": 1.5, "lr": 0.1}]
    metrics.write(20, valid_loss=2)
    assert lines(tmp_path / "metrics.jsonl")[1] == {"step": 20, "valid_loss": 2}


def test_numbers_that_are_not_finite_become_null(tmp_path):
    Metrics(tmp_path / "m", resume_step=0).write(1, a=math.nan, b=math.inf, c=-math.inf, d=0.0)
    assert "NaN" not in (tmp_path / "m").read_text() and "Infinity" not in (tmp_path / "m").read_text()
    assert lines(tmp_path / "m") == [{"step": 1, "a": None, "b": None, "c": None, "d": 0.0}]


@pytest.mark.parametrize(
    "torn",
    ["", '{"step": 20, "lo', '{"step"', "\0\0\0", "[1]", "7", '{"loss": 1}', '{"step": null}', '{"step": "3"}', "\udcff"],
)
def test_resuming_drops_what_came_after_and_half_a_line(tmp_path, torn):
    path = tmp_path / "m"
    metrics = Metrics(path, resume_step=0)
    for step in range(5, 30, 5):
        metrics.write(step, loss=1.0)
    with path.open("ab") as stream:
        stream.write(torn.encode("utf-8", "surrogateescape"))
    resumed = Metrics(path, resume_step=15)
    assert [line["step"] for line in lines(path)] == [5, 10, 15]
    resumed.write(20, loss=2.0)
    assert [line["step"] for line in lines(path)] == [5, 10, 15, 20]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_resuming_at_the_start_keeps_nothing(tmp_path):
    Metrics(tmp_path / "m", resume_step=0).write(1, loss=1.0)
    Metrics(tmp_path / "m", resume_step=0)
    assert (tmp_path / "m").read_text() == ""


def test_a_rewrite_that_fails_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "m"
    Metrics(path, resume_step=0).write(1, loss=1.0)

    def full(path, raw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logging, "replace_file", full)
    with pytest.raises(OSError, match="No space"):
        Metrics(path, resume_step=0)
    assert lines(path) == [{"step": 1, "loss": 1.0}]


def test_the_bar_shows_bits_and_speed(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    with Progress("denoiser", 2, 10, 100, show=True) as bar:
        bar.advance(math.log(2) * 3)
        bar.validated("2.500")
        bar.advance(math.log(2) * 4)
        assert bar.bar.n == 4
        bar.bar.refresh()
        assert 0 < bar.tokens_per_second < math.inf
    shown = stderr.getvalue()
    assert "denoiser" in shown and "4/10" in shown and "train 4.000 bits/char, valid 2.500" in shown


def test_no_bar_where_none_is_wanted(capsys):
    with Progress("denoiser", 0, 10, 100, show=False) as bar:
        bar.advance(1.0)
        assert 0 < bar.tokens_per_second < math.inf
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_the_bar_is_closed_when_the_run_fails(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with pytest.raises(FloatingPointError), Progress("denoiser", 0, 10, 100, show=True) as bar:
        raise FloatingPointError
    assert bar.bar.disable  # tqdm's sign of a closed bar
