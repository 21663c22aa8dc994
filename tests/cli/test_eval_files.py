"""edlm eval of files: the figures are those of edlm.eval for the texts in them."""

from __future__ import annotations

import json

import pytest
import torch
from edlm.cli.eval_texts import Texts
from edlm.cli.judges import open_judge
from edlm.data import BPETokenizer, CharTokenizer, tokenizer_from
from edlm.eval import generative_perplexity, unigram_entropy
from edlm.eval.documents import read_documents
from edlm.models import CausalLM
from text_scores import DECODE, JUDGE, Featuring, assert_scores, plain, write_models_and_texts
from tiny_run import write_text

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_models_and_texts(folder)
    (folder / "empty.txt").write_text("\n \n")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe")
    (folder / "lines.txt").write_text("she was not there\n\nanne had a letter in her hand\n")
    (folder / "damaged.jsonl").write_text('{"text": "she was"}\n{"text": 3}\n')
    (folder / "broken.jsonl").write_text('{"text": "she was"}\nshe was not\n')
    write_records(folder / "foreign.jsonl", [[1, 2]], CharTokenizer(), model=str(folder / "dit"))
    (folder / "foreign.jsonl").write_text((folder / "foreign.jsonl").read_text().replace("[1, 2", "[1, 999"))
    (folder / "ids.jsonl").write_text('{"text": "she was", "tokens": ["a"]}\n')
    return folder


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


def test_another_judge_of_the_same_name_is_refused(edlm, folder, tmp_path):
    write_text(folder, 300, "changing.txt", seed=2)
    arguments = ("eval", "lines.txt", "--judge", "ngram:changing.txt", "--judge", "ngram:judge.txt", "--json", "judged.json")
    assert edlm(*arguments)[0] == 0  # two n-gram models beside each other
    identities = json.loads((folder / "judged.json").read_text())["settings"]["--judge"]
    assert identities == {
        f"ngram:{t}": open_judge(f"ngram:{folder / t}", torch.device("cpu")).identity for t in ("changing.txt", "judge.txt")
    }
    assert edlm(*arguments, "--resume")[0] == 0
    write_text(folder, 300, "changing.txt", seed=3)
    code, _, err = edlm(*arguments, "--resume")
    assert code == 2 and "(--judge: {'ngram:changing.txt': 'sha256 " in err


def test_a_judge_that_has_counted_the_real_text(document, folder):
    said = "judge.txt: 6-gram of judge.txt has counted the real text: what it says of that is too good"
    assert said in document("lines.txt", "--judge", "ngram:judge.txt", "--text", "judge.txt")["warnings"]
    assert said not in document("lines.txt", "--judge", "ngram:judge.txt", "--text", "text.txt")["warnings"]
    assert said not in document("judge.txt", "--judge", "ngram:judge.txt")["warnings"]


# --- mistakes ---------------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no judge of files": (("lines.txt",), "--judge: expected who is to score the texts, got none"),
    "a judge twice": (
        ("lines.txt", *JUDGE[:2], *JUDGE[:2]),
        "--judge: expected judges of different names, got 6-gram of judge.txt, 6-gram of judge.txt",
    ),
    "no text of a judge": (("lines.txt", "--judge", "ngram:nowhere.txt"), "--judge: ngram:nowhere.txt: text: expected a file"),
    "an empty file": (("empty.txt", *JUDGE), "empty.txt: expected texts, got an empty file"),
    "bytes": (("bytes.txt", *JUDGE), "bytes.txt: expected UTF-8, got other bytes at 0"),
    "no text": (("damaged.jsonl", *JUDGE), 'damaged.jsonl, line 2: expected a JSON object with a "text", got \'{"text": 3}\''),
    "no JSON": (("broken.jsonl", *JUDGE), "broken.jsonl, line 2: expected a JSON object"),
    "ids of another model": (("foreign.jsonl", *JUDGE), 'foreign.jsonl: "tokens": ids: expected 0 .. 27, got 999; they are not'),
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
def test_a_mistake_is_one_line_and_code_2(refused, mistake):
    arguments, message = MISTAKES[mistake]
    assert message in refused("eval", *arguments)
