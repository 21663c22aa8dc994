"""edlm eval --decode, and of files: the figures are those of edlm.eval for the very texts that edlm sample writes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from edlm.cli import main
from edlm.cli.eval_document import ess_by_time
from edlm.cli.eval_texts import Texts, _visible
from edlm.cli.judges import open_judge
from edlm.cli.record_file import Part
from edlm.data import BPETokenizer, CharTokenizer, bundled_text, tokenizer_from, windows
from edlm.eval import distinct_n, generative_perplexity, repetition, self_bleu, unigram_entropy
from edlm.eval.documents import read_documents
from edlm.models import CausalLM
from edlm.samplers import SampleOutput
from tiny_run import write_text
from untrained import save_models

CPU = torch.device("cpu")
JUDGE = ("--judge", "ngram:judge.txt", "--judge", "ngram:judge.txt:2")
DECODE = ("--num-texts", 7, "--length", 24, "--batch-size", 3, "--text", "text.txt", "--device", "cpu")
ENERGY = ("--energy", "ar", "--window", 0, 1, "--num-candidates", 3)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    save_models(folder)
    write_text(folder)
    write_text(folder, 500, "judge.txt", seed=1)
    (folder / "short.txt").write_text("she was not")
    (folder / "empty.txt").write_text("\n \n")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe")
    (folder / "lines.txt").write_text("she was not there\n\nanne had a letter in her hand\n")
    (folder / "damaged.jsonl").write_text('{"text": "she was"}\n{"text": 3}\n')
    (folder / "broken.jsonl").write_text('{"text": "she was"}\nshe was not\n')
    (folder / "ids.jsonl").write_text('{"text": "she was", "tokens": ["a"]}\n')
    return folder


@pytest.fixture
def document(edlm):
    def run(*arguments):
        code, out, err = edlm("eval", *arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


def plain(estimate):
    return {"mean": pytest.approx(estimate.mean), "stderr": pytest.approx(estimate.stderr)}


def assert_scores(row, texts, tokens):
    assert row["num_texts"] == len(texts)
    for name, spec in (("6-gram of judge.txt", "ngram:judge.txt"), ("2-gram of judge.txt", "ngram:judge.txt:2")):
        found = generative_perplexity(texts, open_judge(spec, torch.device("cpu")))
        for unit in ("perplexity", "bits_per_token", "bits_per_character"):
            assert row["judges"][name][unit] == plain(getattr(found, unit))
        assert (row["judges"][name]["texts"], row["judges"][name]["skipped"]) == (found.texts, found.skipped)
    assert row["entropy"] == plain(unigram_entropy(tokens)) and row["repetition"] == {"4": plain(repetition(tokens, 4))}
    assert row["distinct"] == {str(n): pytest.approx(distinct_n(tokens, n)) for n in (1, 2, 4)}
    pytest.importorskip("sacrebleu", reason="self-BLEU needs the extra metrics")
    assert row["self_bleu"] == plain(self_bleu(tokens))


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


def test_another_judge_of_the_same_name_is_refused(edlm, folder, tmp_path):
    write_text(folder, 300, "changing.txt", seed=2)
    arguments = ("eval", "lines.txt", "--judge", "ngram:changing.txt", "--judge", "ngram:judge.txt", "--json", "judged.json")
    assert edlm(*arguments)[0] == 0  # two n-gram models beside each other
    identities = json.loads((folder / "judged.json").read_text())["settings"]["--judge"]
    assert identities == {f"ngram:{t}": open_judge(f"ngram:{folder / t}", CPU).identity for t in ("changing.txt", "judge.txt")}
    assert edlm(*arguments, "--resume")[0] == 0
    write_text(folder, 300, "changing.txt", seed=3)
    code, _, err = edlm(*arguments, "--resume")
    assert code == 2 and "(--judge: {'ngram:changing.txt': 'sha256 " in err


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


def test_a_judge_that_has_counted_the_real_text(document, folder):
    said = "judge.txt: 6-gram of judge.txt has counted the real text: what it says of that is too good"
    assert said in document("lines.txt", "--judge", "ngram:judge.txt", "--text", "judge.txt")["warnings"]
    assert said not in document("lines.txt", "--judge", "ngram:judge.txt", "--text", "text.txt")["warnings"]
    assert said not in document("judge.txt", "--judge", "ngram:judge.txt")["warnings"]


class Featuring:
    """A judge with features, of which the texts are kept."""

    name, identity = "featuring", "of this test"

    def __init__(self):
        self.inner, self.seen = open_judge("ngram:judge.txt", torch.device("cpu")), []

    def score(self, texts):
        return self.inner.score(texts)

    def features(self, texts):
        self.seen.append(list(texts))
        return torch.stack([torch.tensor([float(len(text)), float(text.count("e"))]) for text in texts])


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


# --- read from files --------------------------------------------------------------------------------------------------------------


def write_records(path, rows, tokenizer, model="bpe"):
    """As edlm sample --out does."""
    from edlm.cli.sample import contents

    records = [
        {"index": i, "text": tokenizer.decode(row), "length": len(row), "tokens": [*row, 7, 7]} for i, row in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    settings = {"edlm sample": 1, "texts": len(rows), "model": model, "settings": {"model": contents(model)}}
    path.with_name(path.name + ".settings.json").write_text(json.dumps(settings))


def test_a_file_of_edlm_sample(edlm, document, folder):
    assert edlm("sample", "dit", *DECODE[:6], "--steps", 3, "--out", "sampled.jsonl")[0] == 0
    found = document("sampled.jsonl", *JUDGE)
    records = [json.loads(line) for line in (folder / "sampled.jsonl").read_text().splitlines()]
    (row,) = found["rows"]
    assert_scores(row, [r["text"] for r in records], [torch.tensor(r["tokens"]) for r in records])
    assert (found["kind"], found["label"], found["unit_of_diversity"]) == ("samples", "sampled", "tokens")
    assert (row["method"], row["file"], row["length"]) == ("sampled", "sampled.jsonl", 24) and "seconds" not in row
    again = document("sampled.jsonl", *JUDGE, "--text", "lines.txt")  # with characters beside them, in characters
    assert [row["method"] for row in again["rows"]] == ["real text", "sampled"] and again["unit_of_diversity"] == "characters"
    assert again["rows"][1]["judges"] == row["judges"]


def test_special_tokens_are_no_text(document, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    tokenizer = tokenizer_from(CausalLM.from_pretrained(folder / "bpe_ar").tokenizer_description)
    assert isinstance(tokenizer, BPETokenizer)
    end, words = tokenizer.eos_token_id, tokenizer.encode("she was not in her letter").tolist()
    write_records(folder / "ended.jsonl", [[*words, end], [end, end], words[3:], [tokenizer.mask_token_id]], tokenizer)
    found = document("ended.jsonl", *JUDGE)
    (row,) = found["rows"]
    texts = [tokenizer.decode(words), tokenizer.decode(words[3:])]
    assert found["unit_of_diversity"] == "tokens" and row["num_texts"] == 4 and row["length"] == len(words)
    judged = generative_perplexity(texts, open_judge("ngram:judge.txt", torch.device("cpu")))
    assert row["judges"]["6-gram of judge.txt"]["bits_per_character"] == plain(judged.bits_per_character)
    assert (row["judges"]["6-gram of judge.txt"]["texts"], row["judges"]["6-gram of judge.txt"]["skipped"]) == (2, 2)
    assert row["entropy"] == plain(unigram_entropy([torch.tensor(words), torch.tensor(words[3:])]))
    assert found["warnings"] == ["ended.jsonl: 2 of 4 texts are empty without special tokens: left out"]
    # Where the model is not there any more, the ends of texts are known by their name.
    (folder / "ended.jsonl.settings.json").unlink()
    again = document("ended.jsonl", *JUDGE)
    assert again["unit_of_diversity"] == "characters" and again["rows"][0]["judges"] == row["judges"]
    assert again["rows"][0]["entropy"] == plain(unigram_entropy(Texts.of_characters(texts).tokens))


def test_only_special_tokens(document, edlm, folder):
    (folder / "ends.jsonl").write_text('{"text": "<|endoftext|>"}\n{"text": ""}\n')
    found = document("ends.jsonl", *JUDGE)
    (row,) = found["rows"]
    nothing = {"mean": None, "stderr": None}
    assert row["entropy"] == row["judges"]["6-gram of judge.txt"]["perplexity"] == row["repetition"]["4"] == nothing
    assert (row["judges"]["6-gram of judge.txt"]["texts"], row["judges"]["6-gram of judge.txt"]["skipped"], row["self_bleu"]) == (
        0,
        2,
        None,
    )
    assert found["warnings"] == ["ends.jsonl: 2 of 2 texts are empty without special tokens: left out"]
    code, out, _ = edlm("eval", "ends.jsonl", *JUDGE)
    assert code == 0 and "nan" not in out.lower() and "note: ends.jsonl: 2 of 2 texts are empty" in out


def test_a_text_a_line(document, edlm, folder, tmp_path):
    found = document("lines.txt", "judge.txt", *JUDGE)
    texts = ["she was not there", "anne had a letter in her hand"]
    row, other = found["rows"]
    judged = generative_perplexity(texts, open_judge("ngram:judge.txt", torch.device("cpu")))
    assert row["judges"]["6-gram of judge.txt"]["perplexity"] == plain(judged.perplexity) and row["num_texts"] == 3
    assert [r["method"] for r in (row, other)] == ["lines", "judge"] and found["label"] == "lines, judge"
    assert edlm("eval", "lines.txt", "judge.txt", *JUDGE, "--json", "files.json")[0] == 0
    assert read_documents([folder / "files.json"])[0].rows[0]["file"] == "lines.txt"
    assert edlm("eval", "lines.txt", "judge.txt", *JUDGE, "--json", "files.json", "--resume")[1].endswith("already: files.json\n")


def test_mauve_of_files(document, monkeypatch):
    judge = Featuring()
    monkeypatch.setattr("edlm.cli.judges.open_judge", lambda spec, device, **more: judge)
    monkeypatch.setattr("edlm.eval.mauve", lambda p, q, seed: len(p) / len(q))
    real, row = document("lines.txt", "--judge", "x", "--text", "judge.txt", "--mauve")["rows"]
    assert (real["method"], real["file"], real["mauve"], row["mauve"]) == ("real text", "judge.txt", None, 2.0)


def test_a_judge_that_can_score_nothing_leaves_nulls(document, monkeypatch):
    def refusing(texts, judge):
        raise ValueError("texts: expected at least one that x can score, got 2 that it cannot: 2 x too short")

    monkeypatch.setattr("edlm.eval.generative_perplexity", refusing)
    found = document("lines.txt", *JUDGE)
    assert found["rows"][0]["judges"]["6-gram of judge.txt"]["perplexity"] == {"mean": None, "stderr": None}
    assert found["rows"][0]["judges"]["6-gram of judge.txt"]["skipped"] == 3
    assert "lines.txt: expected at least one that x can score, got 2 that it cannot: 2 x too short" in found["warnings"]


# --- mistakes ---------------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no judge": (("dit", "--decode", 4, *DECODE), "--judge: expected who is to score the texts, got none; give one or more of"),
    "no judge of files": (("lines.txt",), "--judge: expected who is to score the texts, got none"),
    "a denoiser as judge": (("dit", "--decode", 4, *DECODE, "--judge", "edlm:dit"), "got dit of kind 'dit'"),
    "no such judge": (("dit", "--decode", 4, *DECODE, "--judge", "nobody"), "--judge: expected a kind of judge"),
    "a judge twice": (
        ("lines.txt", *JUDGE[:2], *JUDGE[:2]),
        "--judge: expected judges of different names, got 6-gram of judge.txt, 6-gram of judge.txt",
    ),
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
    "no text of a judge": (("lines.txt", "--judge", "ngram:nowhere.txt"), "--judge: ngram:nowhere.txt: text: expected a file"),
    "0 texts": (("dit", "--decode", 4, *DECODE, *JUDGE, "--num-texts", 0), "--num-texts: expected a number >= 1, got 0"),
    "two K": (
        ("dit", "--decode", 4, *DECODE, *JUDGE, *ENERGY, "--num-candidates", 2, 4),
        "--num-candidates: expected one number of candidates for --decode, or auto, got 2 4",
    ),
    "K without an energy": (("dit", "--decode", 4, *DECODE, *JUDGE, "--num-candidates", 2), "2 candidates need an energy"),
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
    "too long": (("short", "--decode", 4, *DECODE, *JUDGE), "--length: the denoiser takes at most 5 tokens"),
    "an empty file": (("empty.txt", *JUDGE), "empty.txt: expected texts, got an empty file"),
    "bytes": (("bytes.txt", *JUDGE), "bytes.txt: expected UTF-8, got other bytes at 0"),
    "no text": (("damaged.jsonl", *JUDGE), 'damaged.jsonl, line 2: expected a JSON object with a "text", got \'{"text": 3}\''),
    "no JSON": (("broken.jsonl", *JUDGE), "broken.jsonl, line 2: expected a JSON object"),
    "no ids": (("ids.jsonl", *JUDGE), 'ids.jsonl, line 1: expected "tokens" to be a list of ids'),
    "a file twice": (("lines.txt", "lines.txt", *JUDGE), "expected each file once"),
    "MAUVE with nothing": (("lines.txt", *JUDGE, "--mauve"), "--mauve: expected real texts to compare with, got none"),
    "two files of real texts": (
        ("lines.txt", *JUDGE, "--text", "judge.txt", "text.txt"),
        "--text: expected one file of real texts",
    ),
    "missing real texts": (
        ("lines.txt", *JUDGE, "--text", "bundled"),
        "bundled: expected a file of texts, .jsonl or .txt, got something else, or no such file",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(edlm, mistake):
    arguments, message = MISTAKES[mistake]
    code, out, err = edlm("eval", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("edlm: error: ") and err.count("\n") == 1 and message in err


def test_real_text_of_a_bpe_has_no_special_tokens(document, folder):
    (folder / "austen.txt").write_text(bundled_text()[:4000])
    real, row = document("bpe", "--decode", 2, "--text", "austen.txt", "--length", 16, "--num-texts", 40, *JUDGE)["rows"]
    assert "<|endoftext|>" not in real["example"] and real["num_texts"] <= 40 and row["num_texts"] == 40
