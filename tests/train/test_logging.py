"""metrics.jsonl and the progress bar."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
import types

import pytest
from edlm.train import logging
from edlm.train.logging import Metrics, Progress, open_sinks
from edlm.train.throughput import Peak


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
    assert " left" in shown and "MFU" not in shown


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


# --- sinks ------------------------------------------------------------------------------------------------------------------------


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self, fails=False):
        self.lines, self.closed, self.fails = [], False, fails

    def write(self, step, values):
        self.lines.append((step, values))

    def close(self):
        self.closed = True
        if self.fails:
            raise OSError("full")


def test_sinks_get_finite_numbers_and_texts_after_the_file_does(tmp_path):
    sink = Kept()
    metrics = Metrics(tmp_path / "m", resume_step=0, sinks=[sink])
    metrics.write(10, loss=1.5, count=3, bad=math.nan, samples=["one", "two"], note="a text")
    assert lines(tmp_path / "m") == [
        {"step": 10, "loss": 1.5, "count": 3, "bad": None, "samples": ["one", "two"], "note": "a text"}
    ]
    assert sink.lines == [(10, {"loss": 1.5, "count": 3, "note": "a text", "samples/0": "one", "samples/1": "two"})]
    metrics.write(20, loss=math.inf)
    assert len(sink.lines) == 1, "there was nothing to tell it"
    metrics.close()
    assert sink.closed


def test_every_sink_is_closed_whatever_another_raises(tmp_path):
    sinks = [Kept(fails=True), Kept(fails=True), Kept()]
    with pytest.raises(OSError, match="full"):
        Metrics(tmp_path / "m", resume_step=0, sinks=sinks).close()
    assert all(sink.closed for sink in sinks)


def test_unknown_and_missing_sinks(tmp_path, monkeypatch):
    assert open_sinks((), tmp_path, {}, "run") == []
    for names in (("tensorbord",), ("wandb", "wandb")):
        with pytest.raises(ValueError, match="sinks: expected names among tensorboard, wandb, each once, got"):
            open_sinks(names, tmp_path, {}, "run")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(ValueError, match=rf"sinks: expected the package {name}.*pip install 'edlm-torch\[{name}\]'"):
            open_sinks((name,), tmp_path, {}, "run")
    assert list(tmp_path.iterdir()) == []


class FakeRun:
    def __init__(self, init):
        self.init, self.logged, self.finished = init, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """As much of wandb as is called. ``runs``: what was begun."""
    module = types.ModuleType("wandb")
    module.runs = []
    module.init = lambda **kwargs: module.runs.append(FakeRun(kwargs)) or module.runs[-1]
    module.Html = lambda text: ("html", text)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_goes_on_as_the_same_run(tmp_path, wandb):
    for step in (10, 20):
        (sink,) = open_sinks(("wandb",), tmp_path, {"steps": 30}, "denoiser")
        sink.write(step, {"loss": 1.5, "samples/0": "a < b"})
        sink.close()
    first, second = wandb.runs
    assert first.init == second.init and len(first.init["id"]) == 16
    assert first.init["resume"] == "allow" and first.init["name"] == "denoiser" and first.init["config"] == {"steps": 30}
    assert first.init["dir"] == str(tmp_path) and "mode" not in first.init, "offline is for the environment to say"
    assert first.init["id"] == (tmp_path / "wandb_id").read_text().strip()
    assert first.logged == [(10, {"loss": 1.5, "samples/0": ("html", "<pre>a &lt; b</pre>")})] and second.logged[0][0] == 20
    assert first.finished and second.finished
    other = tmp_path / "other"
    other.mkdir()
    open_sinks(("wandb",), other, {}, "denoiser")
    assert wandb.runs[2].init["id"] != first.init["id"]


def test_a_sink_that_cannot_be_opened_closes_those_before_it(tmp_path, wandb, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="tensorboard"):
        open_sinks(("wandb", "tensorboard"), tmp_path, {}, "run")
    assert wandb.runs[0].finished


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed: pip install tensorboard"
)
def test_tensorboard_shows_a_resumed_run_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def begin(resume_step, steps):
        sinks = open_sinks(("tensorboard",), tmp_path, {"optim": {"lr": 0.1}}, "run")
        metrics = Metrics(tmp_path / "metrics.jsonl", resume_step=resume_step, sinks=sinks)
        for step in steps:
            metrics.write(step, loss=float(step + 100 * resume_step), samples=["it was\n*not*"])
        metrics.close()

    begin(0, (5, 10, 15, 20))
    begin(10, (15, 20, 25))  # the process ended after step 20, its last checkpoint was that of step 10
    shown = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    assert [(e.step, e.value) for e in shown.Scalars("loss")] == [(5, 5), (10, 10), (15, 1015), (20, 1020), (25, 1025)]
    samples = shown.Tensors("samples/0/text_summary")
    assert {e.step for e in samples} == {5, 10, 15, 20, 25}  # this reader, unlike the server, purges scalars alone
    assert samples[0].tensor_proto.string_val[0] == b"    it was\n    *not*"
    assert b'"lr": 0.1' in shown.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [5, 10, 15, 20, 25]
    assert open_sinks(("tensorboard",), tmp_path, {}, "run")[0].close() is None, "nothing was written"


# --- rates ------------------------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(logging.time, "perf_counter", lambda: self.now)


def test_rates_are_of_the_last_seconds_and_leave_pauses_out(monkeypatch):
    clock = Clock(monkeypatch)
    with Progress("p", 5, 105, 50, show=False) as bar:
        assert math.isnan(bar.tokens_per_second) and math.isnan(bar.eta_seconds)
        for _ in range(10):
            clock.now += 4.0
            bar.advance(1.0)
        assert bar.tokens_per_second == pytest.approx(50 / 4)
        assert bar.eta_seconds == pytest.approx(90 * 4)
        with bar.paused():
            clock.now += 40.0
        clock.now += 4.0
        bar.advance(1.0)
        assert bar.tokens_per_second == pytest.approx(50 / 4), "a validation is no slow step"
        assert bar.eta_seconds == pytest.approx(89 * 4 * (1 + 40 / 44)), "but it takes time until the end"
        for _ in range(40):  # four times as fast now: half a minute later nothing is left of the past
            clock.now += 1.0
            bar.advance(1.0)
        assert bar.tokens_per_second == pytest.approx(50)
        assert bar.eta_seconds == pytest.approx(49 * (1 + 40 / 84))


def test_a_window_has_ten_steps_at_least_and_a_thousand_at_most(monkeypatch):
    clock = Clock(monkeypatch)
    bar = Progress("p", 0, 5000, 1, show=False)
    for seconds in (*[100.0] * 5, *[200.0] * 5):
        clock.now += seconds
        bar.advance(1.0)
    assert bar.tokens_per_second == pytest.approx(10 / 1500)
    for seconds in (*[1e-3] * 500, *[2e-3] * 1000):
        clock.now += seconds
        bar.advance(1.0)
    assert bar.tokens_per_second == pytest.approx(500)


def test_a_pause_that_fails_is_a_pause(monkeypatch):
    clock = Clock(monkeypatch)
    bar = Progress("p", 0, 10, 7, show=False)

    def fail():
        with bar.paused():
            clock.now += 9.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now += 1.0
    bar.advance(1.0)
    assert bar.tokens_per_second == pytest.approx(7)


def test_utilisation_and_units_are_shown_when_they_are_known(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    clock = Clock(monkeypatch)
    with Progress("nce", 0, 8000, 100, show=True, unit="nats", flops_per_token=3e6, peak=Peak(1e9, "a table")) as bar:
        clock.now += 1.0
        bar.advance(1.386)
        assert bar.mfu == pytest.approx(0.3)
        bar.bar.refresh()
    assert "train 1.386 nats, 0.1k tok/s, MFU 30.0 %, 2:13:19 left" in stderr.getvalue()
    assert Progress("p", 0, 10, 100, show=False, flops_per_token=1.0).mfu is None
