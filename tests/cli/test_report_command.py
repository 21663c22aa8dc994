"""edlm report: a folder that is whole or not there, and every mistake in one line."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys

import pytest
from edlm.cli import report
from edlm.eval.documents import UNITS
from edlm.eval.equal_quality import ENTROPY_TOLERANCE
from eval_documents import plausible, write

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed: pip install matplotlib"
)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Names of documents in the present folder."""
    monkeypatch.chdir(tmp_path)
    return [path.name for path in write(tmp_path, plausible())]


@pytest.fixture
def edlm_report(capsys):
    def run(*arguments):
        parser = argparse.ArgumentParser()
        report.add_arguments(parser)
        code = report.run(parser.parse_args([str(a) for a in arguments]))
        return code, capsys.readouterr().out

    return run


def left_behind(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".json")


@needs_matplotlib
def test_a_page_and_the_pictures_that_it_shows(files, edlm_report, tmp_path, monkeypatch):
    monkeypatch.setattr("edlm.eval.plots.DPI", 20)
    assert edlm_report(*files, "--out", "new/report") == (0, f"{os.path.join('new', 'report', 'report.md')}\n")
    out = tmp_path / "new" / "report"
    page = (out / "report.md").read_text(encoding="utf-8")
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert len(pictures) == 5 and all(f"]({name})" in page for name in pictures)
    assert left_behind(tmp_path) == ["new"] and left_behind(tmp_path / "new") == ["report"]
    edlm_report(*files, "--out", "again")
    for path in out.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_without_pictures(files, edlm_report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"pip install 'edlm-torch\[plot\]', or --no-plots"):
        edlm_report(*files, "--out", "empty")
    edlm_report(*files, "--out", "empty", "--no-plots", "--unit", "perplexity", "--baseline", "EDLM-AR", "--entropy-tolerance", 1)
    assert left_behind(tmp_path / "empty") == ["report.md"]
    page = (tmp_path / "empty" / "report.md").read_text(encoding="utf-8")
    assert "Perplexity of each text" in page and "MDLM against EDLM-AR: slower" in page and "more than 1 bits" in page
    assert "![" not in page


def test_what_is_there_is_kept(files, edlm_report, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for name in ("full", "full/mine.txt", files[0]):
        with pytest.raises(ValueError, match=f"--out: expected a new or an empty folder, got {name}, which is there; remove it"):
            edlm_report(*files, "--out", name, "--no-plots")
    (tmp_path / "here").mkdir()
    os.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="--out: expected a new or an empty folder"):
        edlm_report(f"../{files[0]}", "--out", ".", "--no-plots")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine" and left_behind(tmp_path) == ["full", "here"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.json"], "none.json: expected a document of edlm eval --json, got No such file"),
        (["mdlm.json", "mdlm.json"], "mdlm.json: expected rows that no other document has"),
        (["mdlm_texts.json", "--baseline", "x"], "--baseline: expected a model of which there are texts"),
    ],
)
def test_a_mistake_leaves_nothing(files, edlm_report, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        edlm_report(*arguments, "--out", "report", "--no-plots")
    assert left_behind(tmp_path) == []


def test_a_disk_that_is_full_leaves_nothing(files, edlm_report, tmp_path, monkeypatch):
    def full(self, raw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="--out: report cannot be written: No space left on device; choose another name"):
        edlm_report(*files, "--out", "report", "--no-plots")
    assert left_behind(tmp_path) == []


def test_the_options_say_what_the_page_takes(edlm_report):
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    options = parser.parse_args(["a.json", "--out", "b"])
    assert report._UNITS == UNITS and options.entropy_tolerance == ENTROPY_TOLERANCE
