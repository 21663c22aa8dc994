"""edlm eval --decode: the figures are those of edlm.eval for the very texts that edlm sample writes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from edlm.cli import main
from edlm.cli.eval_document import ess_by_time
from edlm.cli.eval_files import _visible
from edlm.cli.eval_texts import Texts
from edlm.cli.record_file import Part
from edlm.data import CharTokenizer, bundled_text, tokenizer_from, windows
from edlm.eval.documents import read_documents
from edlm.models import CausalLM
from edlm.samplers import SampleOutput
from text_scores import DECODE, JUDGE, Featuring, assert_scores, write_models_and_texts

ENERGY = ("--energy", "ar", "--window", 0, 1, "--num-candidates", 3)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_models_and_texts(folder)
    (folder / "short.txt").write_text("she was not")
    (folder / "few.txt").write_text("she was not in her letter then and anne was there " * 6)
    (folder / "empty.txt").write_text("\n \n")
    return folder


# --- decoded here and now ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ENERGY, ("--sampler", "remasking", "--top-k", 5)], ids=["proposal", "energy", "other"])
def test_texts_are_those_of_edlm_sample(edlm, document, folder, more, tmp_path):
    found = document("dit", "--decode", 2, 5, *DECODE, *JUDGE, *more, "--seed", 3)
    real, *rows = found["rows"]
    assert found["kind"] == "decoding" and [row["steps"] for row in rows] == [2, 5] and found["warnings"] == []
    for row in rows:
        edlm(
            "sample", "dit", "--steps", row["steps"], *DECODE[:6], *more, "--seed", 3, "--out", tmp_path / f"{row['steps']}.jsonl"
        )
        records = [json.loads(line) for line in (tmp_path / f"{row['steps']}.jsonl").read_text().splitlines()]
        assert_scores(row, [r["text"] for r in records], [torch.tensor(r["tokens"]) for r in records])
        assert row["example"] == records[0]["text"] and row["method"] == found["label"] == "dit" + " + ar" * (more is ENERGY)
        assert (row["nfe"], row["energy_nfe"]) == (row["steps"], row["steps"] if more is ENERGY else 0)
        assert row["seconds"] > 0 and row["length"] == 24 and row["mauve"] is None
        if more is ENERGY:
            ess = [(t, e) for r in records for t, e in zip(r["step_times"], r["ess"], strict=True)]
            assert [b["t"] for b in row["ess"]] == sorted({(math.ceil(t * 10 - 1e-9) - 0.5) / 10 for t, _ in ess})
            assert sum(b["count"] for b in row["ess"]) == len(ess) and {b["num_candidates"] for b in row["ess"]} == {3}
            mean = sum(b["count"] * b["mean"] for b in row["ess"]) / len(ess)
            assert mean == pytest.approx(sum(e for _, e in ess) / len(ess))
        else:
            assert row["ess"] is None
    odd = windows(CharTokenizer().encode((folder / "text.txt").read_text()), 24)[1::2]
    rows = [odd[i * (len(odd) - 1) // 6] for i in range(7)]
    assert_scores(real, [CharTokenizer().decode(row.tolist()) for row in rows], rows)
    assert (real["method"], real["steps"], real["seconds"], real["nfe"]) == ("real text", None, None, None)
    (tmp_path / "document.json").write_text(json.dumps(found))
    assert len(read_documents([tmp_path / "document.json"])[0].rows) == 3


@pytest.mark.parametrize(
    ("model", "more"), [("ar", ()), ("dit", ("--sampler", "first_hitting")), ("dit", ("--sampler", "left_to_right"))]
)
def test_what_has_no_number_of_steps(document, edlm, model, more):
    row = document(model, "--decode", *DECODE, *JUDGE, *more)["rows"][1]
    texts = edlm("sample", model, *DECODE[:6], *more)[1].splitlines()
    assert (row["steps"], row["nfe"], row["energy_nfe"], row["example"]) == (None, 24, 0, texts[0])
    assert row["method"] == model and row["ess"] is None and row["seconds"] > 0


def test_what_was_left_to_the_sampler_is_in_the_document(document):
    """Documents are compared by their settings: one that spells a default out is not another one."""
    plain = document("dit", "--decode", 2, "--num-texts", 1, "--length", 24, "--text", "text.txt", *JUDGE[:2], "--energy", "ar")
    spelled = ("--batch-size", 32, "--num-candidates", 8, "--window", 0.8, 1, "--sampler", "ancestral", "--temperature", 1)
    other = document(
        "dit", "--decode", 2, "--num-texts", 1, "--length", 24, "--text", "text.txt", *JUDGE[:2], "--energy", "ar", *spelled
    )
    assert plain["settings"] == other["settings"]
    assert plain["settings"]["--batch-size"] == 32 and plain["settings"]["--window"] == [0.8, 1.0]
    causal = document("ar", "--decode", "--num-texts", 1, "--length", 24, "--text", "text.txt", *JUDGE[:2])["settings"]
    assert causal["--temperature"] == 1 and "--sampler" not in causal and "--window" not in causal


def test_fewer_real_texts_are_noted(document):
    said = "real text: 6 real texts beside 7 decoded ones: distinct-n, self-BLEU and MAUVE depend on their number"
    short = ("--text", "few.txt", "--num-texts", 7, "--length", 24)
    assert [note[: len(said)] for note in document("dit", "--decode", 2, *short, *JUDGE)["warnings"]] == [said]


def test_what_is_printed(edlm):
    code, out, _ = edlm("eval", "dit", "--decode", 2, *DECODE, *JUDGE, *ENERGY, "--label", "mine")
    lines = out.splitlines()
    assert code == 0 and lines[0] == "mine: 7 texts of 24 tokens; +- is one standard error over texts"
    assert (
        "6-gram of judge.txt: perplexity" in lines[1]
        and "2-gram of judge.txt: bits/character" in lines[1]
        and "self-BLEU" in lines[6]
    )
    assert lines[3].startswith("real text  -") and lines[4].startswith("mine       2")
    assert "after a call of a few steps to warm up" in out and "diversity: of tokens; entropy in bits" in out


def test_the_first_call_is_not_timed(edlm, monkeypatch):
    from edlm import samplers

    calls, generate = [], samplers.generate
    monkeypatch.setattr(samplers, "generate", lambda *a, **k: calls.append((k["steps"], k["seed"])) or generate(*a, **k))
    assert edlm("eval", "dit", "--decode", 4, 6, *DECODE, *JUDGE)[0] == 0
    assert calls == [(2, 0), *((steps, seed) for steps in (4, 6) for seed in (0, 3, 6))]  # 7 texts in batches of 3


def test_ess_of_each_tenth_of_t():
    """A t of the grid that is off by an ulp belongs to its bin; errors are over texts."""
    nan = math.nan
    times = torch.tensor([[1.0, 1.0], [0.1 * 3, 0.3], [0.05, nan]], dtype=torch.float64)
    ess = torch.tensor([[2.0, 4.0], [1.0, 3.0], [nan, nan]])
    sample = SampleOutput(
        tokens=torch.zeros(2, 3, dtype=torch.int64),
        lengths=torch.tensor([3, 3]),
        nfe=3,
        energy_nfe=2,
        ess=ess,
        log_Z=ess,
        energy=ess,
        num_candidates=torch.tensor([[4, 8], [4, 4], [0, 0]]),
        step_times=times,
        history=None,
    )
    third, last = ess_by_time([sample, sample])
    assert third == {"t": 0.25, "mean": 2.0, "stderr": pytest.approx(1 / math.sqrt(3)), "count": 4, "num_candidates": 4.0}
    assert last["t"] == 0.95 and last["mean"] == 3.0 and last["num_candidates"] == 6.0


def test_a_counted_judge_does_not_know_the_real_text(edlm, monkeypatch, folder):
    """It is given the even windows where the odd ones are what is scored."""
    from edlm.cli import judges

    seen, opened = [], judges.open_judge
    monkeypatch.setattr(judges, "open_judge", lambda *a, **k: seen.append(k["real"]) or opened(*a, **k))
    assert edlm("eval", "dit", "--decode", 2, *DECODE, "--judge", "ngram:text.txt")[0] == 0
    rows = windows(CharTokenizer().encode((folder / "text.txt").read_text()), 24)
    assert seen[0].counted == [CharTokenizer().decode(row.tolist()) for row in rows[0::2]]
    assert set(seen[0].scored) <= {CharTokenizer().decode(row.tolist()) for row in rows[1::2]} and len(seen[0].scored) == 7


def test_a_text_ends_where_it_ends(folder):
    """Also where the same token stands in front of it; what a judge counts is all of it."""
    tokenizer = tokenizer_from(CausalLM.from_pretrained(folder / "bpe_ar").tokenizer_description)
    end, mask = tokenizer.eos_token_id, tokenizer.mask_token_id
    one, two = (tokenizer.encode(text).tolist() for text in ("she was not", "in her letter"))
    rows = [[*one, end, *two], [end, *one, end, *two], [end, mask, *two, mask], [end, end]]
    found = Texts.of_tokens(rows, tokenizer)
    first, second = tokenizer.decode(one), tokenizer.decode(two)
    assert found.texts == [first, first, second, ""] and [row.tolist() for row in found.tokens] == [one, one, two, []]
    assert [_visible(tokenizer.decode(row)) for row in rows] == found.texts


def test_a_judge_counts_what_is_behind_an_end(edlm, monkeypatch, folder):
    from edlm.cli import judges

    seen, opened = [], judges.open_judge
    monkeypatch.setattr(judges, "open_judge", lambda *a, **k: seen.append(k["real"]) or opened(*a, **k))
    tokenizer = tokenizer_from(CausalLM.from_pretrained(folder / "bpe_ar").tokenizer_description)
    row = [*tokenizer.encode("she was not").tolist(), tokenizer.eos_token_id, *tokenizer.encode("in her letter").tolist()]
    table = torch.tensor([row] * 4)
    monkeypatch.setattr("edlm.cli.eval_texts.windows", lambda tokens, length: table)
    assert edlm("eval", "bpe", "--decode", 2, *DECODE, "--judge", "ngram:text.txt")[0] == 0
    assert len(seen[0].counted) == 4 and seen[0].scored == seen[0].counted[::2]


def test_mauve_is_of_decoded_texts_and_real_ones(document, monkeypatch):
    judge, calls = Featuring(), []
    monkeypatch.setattr("edlm.cli.judges.open_judge", lambda spec, device, **more: judge)
    monkeypatch.setattr("edlm.eval.mauve", lambda p, q, seed: calls.append((len(p), len(q), seed)) or 0.25)
    real, row = document("dit", "--decode", 2, *DECODE, "--judge", "x", "--mauve", "--seed", 5)["rows"]
    assert (real["mauve"], row["mauve"]) == (None, 0.25)
    assert calls == [(7, 7, 5), (7, 7, 5)] and judge.seen[1][0] == row["example"] and judge.seen[0][0] == real["example"]


def test_mauve_is_refused_before_anything_is_decoded(edlm, monkeypatch):
    monkeypatch.setattr("edlm.samplers.generate", None)
    code, _, err = edlm("eval", "dit", "--decode", 2, *DECODE, *JUDGE, "--mauve")
    assert (
        code == 2
        and "--mauve: expected a judge that has features (hf:FOLDER, gguf:FILE, smollm2), got 6-gram of judge.txt, 2-gram of judge.txt"
        in err
    )
    monkeypatch.setattr("edlm.cli.judges.open_judge", lambda spec, device, **more: Featuring())
    code, _, err = edlm("eval", "dit", "--decode", 2, *DECODE, "--judge", "x", "--mauve")
    assert code == 2 and "edlm: error: --mauve: " in err and "expected at least 20 texts" in err


def test_without_sacrebleu_there_is_a_note(document, monkeypatch):
    def missing(tokens):
        raise ImportError("self_bleu needs the package sacrebleu: pip install 'edlm-torch[metrics]'")

    monkeypatch.setattr("edlm.eval.self_bleu", missing)
    found = document("dit", "--decode", 2, *DECODE, *JUDGE)
    assert [row["self_bleu"] for row in found["rows"]] == [None, None]
    assert "2 steps: self_bleu needs the package sacrebleu: pip install 'edlm-torch[metrics]'" in found["warnings"]


def test_rows_that_are_there_are_not_decoded_again(edlm, folder, monkeypatch):
    arguments = ["eval", "dit", "--decode", "2", "3", "5", *map(str, DECODE), *JUDGE, *map(str, ENERGY), "--json"]
    append, done = Part.append, []
    monkeypatch.chdir(folder)
    with monkeypatch.context() as patched:

        def stopping(self, records):
            append(self, records)
            done.append(records)
            if len(done) == 3:
                raise KeyboardInterrupt

        patched.setattr(Part, "append", stopping)
        assert main([*arguments, "rows.json"]) == 130
    from edlm import samplers

    calls, generate = [], samplers.generate
    monkeypatch.setattr(samplers, "generate", lambda *a, **k: calls.append(k["steps"]) or generate(*a, **k))
    assert edlm(*arguments, "rows.json", "--resume", "--num-texts", 8)[0] == 2
    assert edlm(*arguments, "rows.json", "--resume")[0] == 0 and set(calls) == {2, 5}  # two steps: to warm up
    assert edlm(*arguments, "calm.json")[0] == 0
    assert [rows(folder, name) for name in ("rows.json",)] == [rows(folder, "calm.json")]
    assert not list(folder.glob("rows.json.*"))


def rows(folder, name):
    return [row | {"seconds": None} for row in json.loads((folder / name).read_text())["rows"]]


# --- mistakes ---------------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no judge": (("dit", "--decode", 4, *DECODE), "--judge: expected who is to score the texts, got none; give one or more of"),
    "a denoiser as judge": (("dit", "--decode", 4, *DECODE, "--judge", "edlm:dit"), "got dit of kind 'dit'"),
    "no such judge": (("dit", "--decode", 4, *DECODE, "--judge", "nobody"), "--judge: expected a kind of judge"),
    "a grid without steps": (
        ("dit", "--decode", *DECODE, *JUDGE),
        "--decode: expected numbers of steps, such as --decode 8 16 32, got",
    ),
    "steps of a causal model": (
        ("ar", "--decode", 8, *DECODE, *JUDGE),
        "--decode: expected no number, where every token is a step",
    ),
    "steps of first-hitting": (
        ("dit", "--decode", 8, *DECODE, *JUDGE, "--sampler", "first_hitting"),
        "--decode: expected no number, where every token is a step (an autoregressive model, or a sampler without a grid), got 8",
    ),
    "0 steps": (("dit", "--decode", 4, 0, *DECODE, *JUDGE), "--decode: expected numbers of steps >= 1, got 4 0"),
    "more steps than can be counted": (("dit", "--decode", 2**33, *DECODE, *JUDGE), "error: --decode: expected at most 2**32"),
    "0 texts": (("dit", "--decode", 4, *DECODE, *JUDGE, "--num-texts", 0), "--num-texts: expected a number >= 1, got 0"),
    "two K": (
        ("dit", "--decode", 4, *DECODE, *JUDGE, *ENERGY, "--num-candidates", 2, 4),
        "--num-candidates: expected one number of candidates for --decode, or auto, got 2 4",
    ),
    "K without an energy": (
        ("dit", "--decode", 4, *DECODE, *JUDGE, "--num-candidates", 2),
        "--num-candidates: 2 candidates need an energy to choose by, got no --energy; give one",
    ),
    "K of a causal model": (("ar", "--decode", *DECODE, *JUDGE, "--num-candidates", 2), "--num-candidates: it is for denoisers"),
    "an energy of a causal model": (("ar", "--decode", *DECODE, *JUDGE, *ENERGY), "--energy: it is for denoisers"),
    "a window of nothing": (
        ("dit", "--decode", 4, *DECODE, *JUDGE, "--window", 0, 1),
        "--window: it is about an energy, got none",
    ),
    "two real texts": (
        ("dit", "--decode", 4, *JUDGE, "--text", "text.txt", "judge.txt"),
        "--text: expected one text to compare with",
    ),
    "a short real text": (
        ("dit", "--decode", 4, *JUDGE, "--text", "short.txt"),
        "--text: short.txt: expected at least 128 tokens",
    ),
    "a real text of one window": (
        ("dit", "--decode", 4, *JUDGE, "--text", "short.txt", "--length", 8),
        "--text: short.txt: expected at least two windows of 8 tokens, got one",
    ),
    "an empty real text": (("dit", "--decode", 4, *JUDGE, "--text", "empty.txt"), "empty.txt: expected text, got an empty file"),
    "too long": (("short", "--decode", 4, *DECODE, *JUDGE), "error: --length: the denoiser takes at most 5 tokens"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(refused, mistake):
    arguments, message = MISTAKES[mistake]
    assert message in refused("eval", *arguments)


def test_real_text_of_a_bpe_has_no_special_tokens(document, folder):
    (folder / "austen.txt").write_text(bundled_text()[:4000])
    real, row = document("bpe", "--decode", 2, "--text", "austen.txt", "--length", 16, "--num-texts", 40, *JUDGE)["rows"]
    assert "<|endoftext|>" not in real["example"] and real["num_texts"] <= 40 and row["num_texts"] == 40
