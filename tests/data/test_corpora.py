"""Named corpora: what is asked of the library, how splits are cut, and that a data set that has changed is noticed."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from edlm.data import corpora, open_text
from edlm.data.corpora import CORPORA, Part

datasets = pytest.importorskip("datasets", reason="the extra data is not installed")


def serve(monkeypatch, rows, column="text", iterable=True):
    """``load_dataset`` made on the spot; returns the list of calls."""
    calls = []

    def load_dataset(path, *, name=None, split=None, revision=None, streaming=False, **options):
        calls.append({"path": path, "name": name, "split": split, "revision": revision, "streaming": streaming} | options)
        if not iterable:
            return datasets.Dataset.from_list([{column: row} for row in rows])
        return datasets.IterableDataset.from_generator(lambda: ({column: row} for row in rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("name", CORPORA)
def test_what_is_asked_for(monkeypatch, name):
    corpus, row = CORPORA[name], "It 's <unk> , “ he said ” 1 @,@ 000 ( N )"
    for ours, part in corpus.parts.items():
        monkeypatch.setitem(CORPORA, name, replace(corpus, parts={ours: Part(split=part.split)}))
        calls = serve(monkeypatch, [row, "second"], corpus.column)
        detokenizer = corpus.detokenizer or (lambda text: text)
        opened = open_text(name)
        assert list(opened.split(ours)) == [detokenizer(row), detokenizer("second")]
        assert opened.tokenizer_hint == ("text8" if name == "text8" else "bpe")
        asked = {"path": corpus.path, "name": corpus.config, "split": part.split, "revision": corpus.revision, "streaming": True}
        assert calls == [asked | dict(corpus.options)]
    for ours in {"train", "valid", "test"} - set(corpus.parts):
        with pytest.raises(ValueError, match=f"split: expected one that {name} has"):
            list(open_text(name).split(ours))


def test_the_table_says():
    """What the published splits are, in numbers."""
    assert set(CORPORA) == {
        *("text8", "openwebtext", "lm1b", "wikitext2", "wikitext103", "ptb", "lambada", "ag_news"),
        *("scientific_papers_arxiv", "scientific_papers_pubmed"),
    }
    text8, web = CORPORA["text8"].parts, CORPORA["openwebtext"].parts
    assert [(p.first, p.last) for p in text8.values()] == [(0, 90_000_000), (90_000_000, 95_000_000), (95_000_000, 100_000_000)]
    assert web["train"].last == web["valid"].first == 7_913_769 and web["valid"].last - web["valid"].first == 100_000
    assert set(CORPORA["lambada"].parts) == {"valid", "test"} and "test" not in web


@pytest.mark.parametrize("iterable", [True, False])
def test_documents_from_the_end(monkeypatch, iterable):
    rows = [f"document {i}" for i in range(10)]
    serve(monkeypatch, rows, iterable=iterable)
    parts = {"train": Part(split="train", last=7), "valid": Part(split="train", first=7, last=10, total=10)}
    monkeypatch.setitem(CORPORA, "openwebtext", replace(CORPORA["openwebtext"], parts=parts))
    assert list(open_text("openwebtext").split("train")) == rows[:7]
    assert list(open_text("openwebtext").split("valid")) == rows[7:]


def test_characters(monkeypatch):
    """Rows of any length, also ones across a border."""
    text = "".join(chr(97 + i % 26) for i in range(100))
    parts = {
        "train": Part(split="train", last=90),
        "valid": Part(split="train", first=90, last=95),
        "test": Part(split="train", first=95, last=100, total=100),
    }
    monkeypatch.setitem(CORPORA, "text8", replace(CORPORA["text8"], parts=parts))
    for size in (1, 7, 93, 100):
        serve(monkeypatch, [text[i : i + size] for i in range(0, 100, size)])
        assert ["".join(open_text("text8").split(name)) for name in parts] == [text[:90], text[90:95], text[95:]]
    for wrong in (text[:97], text + "x"):
        serve(monkeypatch, [wrong])
        with pytest.raises(ValueError, match=r"expected (at least )?100 characters of text8, got"):
            list(open_text("text8").split("test"))


@pytest.mark.parametrize(
    ("count", "message"),
    [(9, "expected at least 10 rows of openwebtext, got 9"), (11, "expected 10 rows of openwebtext, got more")],
)
def test_a_data_set_that_has_changed(monkeypatch, count, message):
    serve(monkeypatch, ["x"] * count)
    parts = {"valid": Part(split="train", first=7, last=10, total=10), "train": Part(split="train", last=10)}
    monkeypatch.setitem(CORPORA, "openwebtext", replace(CORPORA["openwebtext"], parts=parts))
    with pytest.raises(ValueError, match=message):
        list(open_text("openwebtext").split("valid"))
    if count == 11:
        assert len(list(open_text("openwebtext").split("train"))) == 10
    serve(monkeypatch, ["x"], column="content")
    with pytest.raises(ValueError, match="expected text in the column 'text' of ag_news, got content"):
        list(open_text("ag_news").split("train"))


def test_nothing_is_read_before_it_is_asked_for(monkeypatch):
    calls, read = serve(monkeypatch, []), []

    def rows():
        for i in range(1000):
            read.append(i)
            yield {"text": "x"}

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: calls.append(k) or datasets.IterableDataset.from_generator(rows)
    )
    corpus = open_text("wikitext103")
    assert corpus.identity and calls == []
    stream = corpus.split("train")
    assert calls == [] and read == []
    next(stream)
    assert len(read) < 10


def test_identities_differ(monkeypatch):
    identities = {corpora.identity(name) for name in CORPORA}
    assert len(identities) == len(CORPORA)
    for change in ({"revision": "other"}, {"config": "other"}, {"version": 2}, {"path": "other"}):
        monkeypatch.setitem(CORPORA, "ptb", replace(CORPORA["ptb"], **change))
        assert corpora.identity("ptb") not in identities
        monkeypatch.undo()


def test_unknown_names():
    with pytest.raises(ValueError, match=r"corpus: expected a known name, got 'wikitext-103'; did you mean .*wikitext103"):
        corpora.documents("wikitext-103", "train")
    with pytest.raises(ValueError, match="the names are text8, openwebtext, "):
        corpora.identity("zzz")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'edlm-torch\[data\]'"):
        list(open_text("ptb").split("train"))


def test_without_a_network_another_way_is_named(monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ConnectionError, match=r"wikitext103: the hub cannot be reached \(Couldn't .*; try again with a network, or give a"
    ):
        corpora.documents("wikitext103", "test")
