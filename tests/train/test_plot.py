"""What is read from runs, what is drawn of it, and every mistake that a caller can make."""

from __future__ import annotations

import importlib.util
import json
import math
import sys

import numpy as np
import pytest
from edlm.cli import main
from edlm.train import plot as module
from edlm.train.plot import names, plot, read_run, smooth

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed: pip install matplotlib"
)
CONFIG = {"batch_size": 4, "data": {"length": 16, "tokenizer": "text8"}}


def write_run(folder, lines, config=CONFIG):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def denoiser(folder, characters=1.0, **changes):
    lines = [{"step": s, "loss": math.log(2) * (2 + 1 / s), "lr": 0.1, "seconds": 36.0 * s} for s in range(1, 41)]
    lines[19] |= {"valid_loss": characters * 2 * math.log(2), "valid_bits": 2.0, "valid_bits_stderr": 0.1}
    lines.append({"step": 41, "valid_bits": 1.5, "valid_bits_stderr": None, "samples": ["a text"]})
    return write_run(folder, lines, **changes)


def nce(folder):
    lines = [{"step": s, "nce_loss": 1.3, "accuracy": 0.6, "energy_gap": 0.1, "valid_accuracy": 0.55} for s in range(1, 9)]
    return write_run(folder, lines)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    found, draw = [], module._draw

    def kept(*arguments):
        found.append(draw(*arguments))
        return found[-1]

    monkeypatch.setattr(module, "_draw", kept)
    return found


def test_reading_takes_folders_and_files_and_counts_what_is_damaged(tmp_path):
    lines = [{"step": 2, "loss": 1.0}, "{half", {"loss": 3}, "[1]", {"step": 1, "loss": None}, {"step": 3, "loss": 2.0}]
    folder = write_run(tmp_path / "a", [*lines, {"step": 3, "valid_bits": 4.0}], config=None)
    for path in (folder, folder / "metrics.jsonl"):
        run = read_run(path)
        assert [line["step"] for line in run.lines] == [1, 2, 3] and run.damaged == 3 and run.path == folder
        assert run.keys == ["loss", "valid_bits"] and run.config == {} and run.characters_per_token is None
        index, values = run.curve("loss")
        assert index.tolist() == [1, 2] and values.tolist() == [1.0, 2.0]
        assert run.lines[2] == {"step": 3, "loss": 2.0, "valid_bits": 4.0}


@pytest.mark.parametrize("step", ["Infinity", "NaN", "1" + "0" * 400, "null", "true"])
def test_a_step_that_is_no_number_is_a_damaged_line(tmp_path, step):
    run = read_run(write_run(tmp_path / "a", [{"step": 1, "loss": 1.0}, f'{{"step": {step}, "loss": 2.0}}']))
    assert [line["step"] for line in run.lines] == [1] and run.damaged == 1


@pytest.mark.parametrize("data", [None, [], "text8", {}])
def test_a_config_that_says_nothing_of_its_data(tmp_path, data):
    run = read_run(write_run(tmp_path / "a", [{"step": 1, "loss": 1.0}], config={"batch_size": 4, "data": data}))
    assert run.characters_per_token is None
    with pytest.raises(ValueError, match=r"--x: expected a config\.json"):
        run.x("tokens")


def test_axes(tmp_path):
    run = read_run(denoiser(tmp_path / "a"))
    assert run.x("step")[-1] == 41 and run.x("tokens")[-1] == 41 * 4 * 16
    assert run.x("seconds")[9] == pytest.approx(0.1) and run.x("seconds")[-1] == pytest.approx(0.4), (
        "a validation's line has none"
    )
    with pytest.raises(ValueError, match=r"--x: expected a config.json in .*b to count tokens by"):
        read_run(denoiser(tmp_path / "b", config=None)).x("tokens")
    with pytest.raises(ValueError, match="--x: expected seconds in the lines"):
        read_run(nce(tmp_path / "c")).x("seconds")


def test_smoothing_keeps_lines_straight_and_means_the_end():
    ramp = np.arange(20.0)
    np.testing.assert_allclose(smooth(ramp, 5)[:18], ramp[:18])
    np.testing.assert_allclose(smooth(ramp, 5)[-1], (17 + 18 + 19) / 3)
    np.testing.assert_allclose(smooth(ramp, 1), ramp)
    np.testing.assert_allclose(smooth(np.array([1.0, 5.0]), 99), [1.0, 3.0])
    noisy = np.random.default_rng(0).normal(size=2000)
    assert smooth(noisy, 101)[60:].std() < 0.2


def test_legends_are_as_short_as_they_can_be(tmp_path):
    assert names([tmp_path / "x" / "ar", tmp_path / "x" / "dit"]) == ["ar", "dit"]
    assert names([tmp_path / "x" / "ar", tmp_path / "y" / "ar"]) == ["x/ar", "y/ar"]
    assert names([tmp_path / "ar", tmp_path / "ar"]) == ["ar (1)", "ar (2)"]


@needs_matplotlib
def test_usual_panels_in_bits(tmp_path, figures):
    out = tmp_path / "curves.png"
    assert plot([denoiser(tmp_path / "x" / "run"), denoiser(tmp_path / "y" / "run")], out, title="both") == []
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000
    training, validation = figures[0].axes
    assert training.get_ylabel() == validation.get_ylabel() == "bits per character"
    assert training.get_xlabel() == "training steps" and figures[0].get_suptitle() == "both"
    raw = training.lines[0].get_ydata()
    assert raw[0] == pytest.approx(3.0) and raw[-1] == pytest.approx(2 + 1 / 40)
    marks, _, (bars,) = validation.containers[0]
    assert marks.get_xdata().tolist() == [20, 41] and marks.get_ydata().tolist() == [2.0, 1.5]
    first, second = (segment[:, 1] for segment in bars.get_segments())
    np.testing.assert_allclose(first, [1.9, 2.1])
    np.testing.assert_allclose(second, [1.5, 1.5], err_msg="no error is known there")
    assert [t.get_text() for t in figures[0].legends[0].get_texts()] == ["x/run", "y/run"]
    colours = {handle.get_color() for handle in figures[0].legends[0].get_lines()}
    assert len(colours) == 2


@needs_matplotlib
def test_dollars_are_no_mathematics(tmp_path, figures):
    name = r"$\frac{$"
    run = write_run(tmp_path / name.replace("\\", ""), [{"step": s, r"$\x$": 1.0} for s in (1, 2)])
    plot([run], tmp_path / "a.png", y=[r"$\x$"], title=name)
    (axes,) = figures[0].axes
    texts = [figures[0]._suptitle, axes.yaxis.label, axes._left_title, *figures[0].legends[0].get_texts()]
    assert [t.get_text() for t in texts] == [name, r"$\x$", r"$\x$", "$frac{$"]
    assert not any(t.get_parse_math() for t in texts)


@needs_matplotlib
def test_nce_has_its_levels(tmp_path, figures):
    plot([nce(tmp_path / "nce")], tmp_path / "a.png")
    loss, accuracy = figures[0].axes
    assert 2 * math.log(2) in [line.get_ydata()[0] for line in loss.lines]
    assert 0.5 in [line.get_ydata()[0] for line in accuracy.lines]
    assert "nats" in loss.get_ylabel() and accuracy.get_title(loc="left") == "Accuracy, validation as dots"
    assert loss.get_title(loc="left") == "NCE loss"
    assert accuracy.containers[0][0].get_ydata().tolist() == [0.55] * 8


@needs_matplotlib
def test_chosen_keys_and_tokens_that_are_no_characters(tmp_path, figures):
    bpe = {"batch_size": 4, "data": {"length": 16, "tokenizer": "gpt2"}}
    lines = [{"step": s, "loss": 5.0, "lr": 0.1} for s in (1, 2)]
    runs = [write_run(tmp_path / "a", lines, config=bpe), nce(tmp_path / "b")]
    notes = plot(runs, tmp_path / "a.svg", y=["loss", "lr"], x="tokens", window=1)
    assert notes == ["b: nothing of it is drawn; it has nce_loss, accuracy, energy_gap, valid_accuracy"]
    loss, rate = figures[0].axes
    assert loss.get_ylabel() == "bits per token" and rate.get_ylabel() == "learning rate"
    assert len(loss.lines) == 1, "without smoothing there is no thin line behind"
    assert loss.lines[0].get_xdata()[0] == 64 and "<svg" in (tmp_path / "a.svg").read_text()


@needs_matplotlib
def test_a_validation_says_how_many_characters_a_token_has(tmp_path, figures):
    plot([denoiser(tmp_path / "a", characters=4.0, config=None)], tmp_path / "a.png")
    training, validation = figures[0].axes
    assert training.get_ylabel() == validation.get_ylabel() == "bits per character"
    assert training.lines[0].get_ydata()[0] == pytest.approx(3.0 / 4)
    assert validation.containers[0][0].get_ydata()[0] == 2.0


@needs_matplotlib
def test_a_wild_batch_leaves_the_rest_readable(tmp_path, figures):
    lines = [{"step": s, "loss": 1e4 if s == 500 else 1.5 + 0.1 * (s % 2)} for s in range(1, 1001)]
    plot([write_run(tmp_path / "a", lines)], tmp_path / "a.png", window=1)
    assert figures[0].axes[0].get_ylim()[1] > 1e4, "drawn by itself it is the curve"
    lines = [{"step": s, "loss": 20.0 if s == 500 else 1.5 + 0.1 * (s % 2)} for s in range(1, 1001)]
    plot([write_run(tmp_path / "b", lines)], tmp_path / "b.png")
    assert figures[1].axes[0].get_ylim()[1] < 6


def test_mistakes(tmp_path, capsys):
    good, out = denoiser(tmp_path / "runs" / "a"), tmp_path / "a.png"
    empty = write_run(tmp_path / "empty", [])
    torn = write_run(tmp_path / "torn", ["{", "{"])
    for runs, options, message in (
        ([tmp_path / "none"], {}, r"run: expected the folder of a run.*which is not there"),
        ([tmp_path / "runs"], {}, r"run: expected a metrics.jsonl in .*runs, got none; its folders a have one"),
        ([empty], {}, "run: expected lines of metrics in .*, got none"),
        ([torn], {}, "got 2 damaged ones"),
        ([], {}, "runs: expected at least one"),
        ([good], {"y": ["los"]}, r"--y: expected keys that the runs have \(loss, lr, seconds, .*\), got los"),
        ([good], {"x": "time"}, "--x: expected one of step, tokens, seconds, got 'time'"),
        ([good], {"window": 0}, "--smooth: expected a number of lines >= 1, got 0"),
        ([write_run(tmp_path / "lr", [{"step": 1, "lr": 1.0}])], {}, "--y: expected runs with loss or nce_loss, got lr"),
    ):
        with pytest.raises(ValueError, match=message):
            plot(runs, out, **options)
    with pytest.raises(ValueError, match=r"--out: expected a name that ends in .png, .svg, .pdf, got .*a.gif"):
        plot([good], tmp_path / "a.gif")
    assert not out.exists()
    assert main(["plot", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "edlm: error: run: expected" in capsys.readouterr().err


@needs_matplotlib
def test_a_place_that_cannot_be_written_to(tmp_path):
    good = denoiser(tmp_path / "a")
    with pytest.raises(OSError, match=r"--out: .*no/a.png cannot be written"):
        plot([good], tmp_path / "no" / "a.png")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ValueError, match=r"plot: expected matplotlib.*pip install 'edlm-torch\[plot\]'"):
        plot([denoiser(tmp_path / "a")], tmp_path / "a.png")


@needs_matplotlib
def test_the_command(tmp_path, capsys):
    run = write_run(tmp_path / "a", [{"step": 1, "loss": 1.0}, "{", {"step": 2, "loss": 0.9}])
    out = tmp_path / "c.png"
    assert main(["plot", str(run), "--out", str(out), "--y", "loss", "--smooth", "3", "--title", "T"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(out) and "1 damaged lines left out" in said.err and out.exists()
