"""What is drawn of which documents, with which labels; and that a picture is the same each time."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from edlm.eval import plots as module
from edlm.eval.documents import read_documents
from edlm.eval.plots import draw
from eval_documents import bounds, decoding, document, likelihood_row, plausible, real_text_row, texts_row, write

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed: pip install matplotlib"
)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """drawn(documents, ...) -> name -> figure, in a folder where its pictures are left."""
    figures, figure = [], module._figure

    def kept(*arguments):
        figures.append(figure(*arguments))
        return figures[-1]

    monkeypatch.setattr(module, "_figure", kept)
    monkeypatch.setattr(module, "DPI", 20)  # nobody looks at them

    def make(*plain):
        figures.clear()
        found = draw(read_documents(write(tmp_path, {f"{i}.json": one for i, one in enumerate(plain)})))
        for raw in found.values():
            assert raw.startswith(b"\x89PNG") and len(raw) > 1_000
        return dict(zip(found, figures, strict=True))

    return make


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def lines(axes, colour):
    return [line for line in axes.lines if line.get_color() == colour and len(line.get_xdata())]


@needs_matplotlib
def test_every_question_has_a_picture(drawn):
    found = drawn(*plausible().values())
    assert list(found) == [
        "quality_vs_steps.png",
        "quality_vs_seconds.png",
        "quality_vs_entropy.png",
        "ess_vs_t.png",
        "bounds_vs_n.png",
    ]
    for name in list(found)[:3]:
        assert [axes.get_title(loc="left") for axes in found[name].axes] == ["smollm2", "ngram"]
        assert {axes.get_ylabel() for axes in found[name].axes} == {"bits per character, low is good"}
        assert legend(found[name]) == ["MDLM", "EDLM-AR", "EDLM-NCE", "AR", "real text"]
    labels = [found[name].axes[0].get_xlabel() for name in found]
    assert labels == [
        "decoding steps (lines without marks: no steps)",
        "seconds a text",
        "unigram entropy of a text, bits (large marks: most steps)",
        "t (decoding goes from 1 to 0)",
        "draws n behind log Z (no error is known below an ESS of 5)",
    ]


@needs_matplotlib
def test_a_curve_is_a_label_with_its_errors(drawn):
    found = drawn(decoding("MDLM", gain=0.0), decoding("E", gain=0.5, energy=8, real=False))
    axes = found["quality_vs_steps.png"].axes[0]
    mdlm, energy = (container[0] for container in axes.containers)
    assert mdlm.get_color() != energy.get_color() and mdlm.get_marker() != energy.get_marker()
    assert mdlm.get_xdata().tolist() == [4, 8, 16, 32, 64, 128] and axes.get_xscale() == "log"
    assert mdlm.get_ydata()[0] == pytest.approx(2.2) and energy.get_ydata()[0] == pytest.approx(1.7)
    low, high = axes.containers[0][2][0].get_segments()[0][:, 1]
    assert (low, high) == (pytest.approx(2.17), pytest.approx(2.23))
    assert [tick for tick in axes.get_xticks()] == [4, 8, 16, 32, 64, 128] and axes.get_xlabel() == "decoding steps"
    (real,) = [line for line in axes.lines if line.get_color() == module._GREY]
    assert real.get_ydata()[0] == 1.12 and real.get_linestyle() == "--"
    seconds = found["quality_vs_seconds.png"].axes[0].containers[0][0].get_xdata()
    assert seconds[0] == pytest.approx((0.4 + 0.055 * 4) / 64)
    entropy = found["quality_vs_entropy.png"].axes[0]
    assert entropy.containers[0][0].get_xdata()[1] == pytest.approx(6.05) and entropy.containers[0].has_xerr
    assert 6.02 in [line.get_xdata()[0] for line in entropy.lines if line.get_color() == module._GREY]


@needs_matplotlib
def test_ess_beside_its_n(drawn):
    found = drawn(decoding("E", gain=0.5, energy=8, steps=(4, 1)), decoding("M", gain=0.0, steps=(4, 1)))
    figure = found["ess_vs_t.png"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["1 step", "4 steps"]
    assert legend(figure) == ["E", "n, the most there can be"]
    axes = figure.axes[0]
    assert axes.get_xlim()[0] > axes.get_xlim()[1] and axes.get_ylim()[0] == 0
    n = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [line.get_ydata()[0] for line in n] == [8.0]


@needs_matplotlib
def test_bounds_need_several_n(drawn):
    rows = bounds("E", "t", 1.5, 0.2)
    exact = likelihood_row("t", "joint_nll", 1.5, steps=1, log_Z="exact")
    paper = [likelihood_row("t", "paper_joint", 1.0, n=n, log_Z="lower") for n in (2, 4)]
    single = bounds("F", "t", 1.5, 0.2)[:1]
    found = drawn(document("likelihood", "F", single), document("likelihood", "E", [*rows, exact, *paper]))
    assert list(found) == ["bounds_vs_n.png"]
    (axes,) = found["bounds_vs_n.png"].axes
    assert axes.get_title(loc="left") == "t: joint NLL, T = 1"
    lower, upper = (container[0] for container in axes.containers)
    assert lower.get_xdata().tolist() == [1, 2, 4, 8, 16, 32, 64] and upper.get_xdata().tolist() == [2, 4, 8, 16, 32, 64]
    assert (lower.get_linestyle(), upper.get_linestyle()) == ("-", "--") and lower.get_color() == upper.get_color()
    assert lower.get_ydata()[-1] < 1.5 < upper.get_ydata()[-1]
    assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [1.5]
    assert legend(found["bounds_vs_n.png"]) == [
        "E",
        "log Z lower: below in expectation",
        "log Z upper, asymptotic: above for n large enough",
        "log Z exact",
        "hollow: not to be trusted",
    ]
    assert drawn(document("likelihood", "F", single)) == {}


@needs_matplotlib
def test_bounds_that_are_not_to_be_trusted_are_hollow(drawn):
    ess = {2: 1.9, 4: 1.9, 8: 5.0}
    rows = [likelihood_row("t", "joint_nll", 1 + n, steps=1, n=n, log_Z="lower", ess=of) for n, of in ess.items()]
    figure = drawn(document("likelihood", "E", rows))["bounds_vs_n.png"]
    axes = figure.axes[0]
    (hollow,) = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert hollow.get_xydata().tolist() == [[4, 5]] and hollow.get_linestyle() == "None"
    (curve,) = axes.containers
    assert hollow.get_zorder() > curve[0].get_zorder() and hollow.get_markeredgecolor() == curve[0].get_color()
    bars = [high - low for low, high in (segment[:, 1] for segment in curve[2][0].get_segments())]
    assert bars == [pytest.approx(0.02), pytest.approx(0.0), pytest.approx(0.02)], "the error of log Z is not in it"
    assert legend(figure)[-1] == "hollow: not to be trusted"
    trusted = drawn(document("likelihood", "E", [rows[0], rows[2]]))["bounds_vs_n.png"]
    assert "hollow" not in legend(trusted)[-1]


@needs_matplotlib
def test_bounds_that_coincide_are_both_seen(drawn):
    exact = likelihood_row("t", "joint_nll", 1.5, steps=1, log_Z="exact")
    of = {"A": bounds("A", "t", 1.5, 0.2), "B": bounds("B", "t", 1.5, 0.2), "C": bounds("C", "t", 1.6, 0.2)}
    axes = drawn(*(document("likelihood", label, [*rows, exact]) for label, rows in of.items()))["bounds_vs_n.png"].axes[0]
    lower = [container[0] for container in axes.containers][:3]
    assert lower[0].get_xydata().tolist() == lower[1].get_xydata().tolist()
    assert lower[0].get_linewidth() > lower[1].get_linewidth() == lower[2].get_linewidth()
    assert lower[0].get_markersize() > lower[1].get_markersize()
    known = [line.get_linewidth() for line in axes.lines if line.get_linestyle() == ":"]
    assert known == sorted(set(known), reverse=True) and len(known) == 3


@needs_matplotlib
def test_only_what_there_are_data_for(drawn):
    assert drawn(document("decoding", "A", [real_text_row()])) == {}
    plain = texts_row("A", None, {"j": (2.0, None)}, 6.0, file="a.jsonl")
    assert list(drawn(document("samples", "A", [plain]))) == ["quality_vs_entropy.png"]
    timed = texts_row("A", 4, {"j": (2.0, None)}, 6.0)
    unscored = texts_row("A", 8, {}, 6.0)
    found = drawn(document("decoding", "A", [timed, unscored]))
    assert list(found) == ["quality_vs_steps.png", "quality_vs_entropy.png"]
    assert found["quality_vs_steps.png"].axes[0].containers[0][0].get_xdata().tolist() == [4]


@needs_matplotlib
def test_more_labels_than_colours_can_be_told_apart(drawn):
    found = drawn(*(decoding(f"model {i}", gain=0.02 * i, steps=(4, 8)) for i in range(16)))
    handles = found["quality_vs_steps.png"].legends[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in handles}) == 17


@needs_matplotlib
def test_dollars_are_no_mathematics_and_long_names_are_wrapped(drawn):
    found = drawn(decoding("$\\frac{$", gain=0.0), decoding("a long name " * 10, gain=0.1))
    texts = found["quality_vs_steps.png"].legends[0].get_texts()
    assert not any(text.get_parse_math() for text in texts) and texts[0].get_text() == "$\\frac{$"
    assert max(len(line) for text in texts for line in text.get_text().splitlines()) <= 64


@needs_matplotlib
def test_the_same_bytes_each_time_and_no_date(tmp_path):
    few = {
        "a.json": decoding("A", gain=0.1, energy=4, steps=(4, 8)),
        "b.json": document("likelihood", "A", bounds("A", "t", 1.5, 0.2)),
    }
    paths = write(tmp_path, few)
    first, second = (draw(read_documents(paths)) for _ in range(2))
    assert first == second and len(first) == 5 and all(len(raw) > 10_000 for raw in first.values())
    assert not any(word in raw for raw in first.values() for word in (b"tEXt", b"tIME", b"Software"))


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    documents = read_documents(write(tmp_path, {"a.json": decoding("A", gain=0.0)}))
    with pytest.raises(ValueError, match=r"plots: expected matplotlib.*pip install 'edlm-torch\[plot\]', or --no-plots"):
        draw(documents)
