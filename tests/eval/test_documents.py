"""What is read, what is refused, and that every refusal names the file and the field."""

from __future__ import annotations

import json

import pytest
import torch
from edlm.eval.documents import decodings, is_distrusted, is_few, judges, likelihoods, read_documents, real_texts
from eval_documents import decoding, document, estimate, likelihood_row, plausible, real_text_row, texts_row, write


def read(tmp_path, *plain):
    return read_documents(write(tmp_path, {f"{i}.json": one for i, one in enumerate(plain)}))


def small(**changes):
    return document("likelihood", "AR", [likelihood_row("t", "ar_nll", 1.5)]) | changes


def changed(field, value, kind="likelihood"):
    plain = small() if kind == "likelihood" else decoding("MDLM", gain=0, real=False)
    plain["rows"][0][field] = value
    return plain


def judge(**changes):
    return dict.fromkeys(("perplexity", "bits_per_token", "bits_per_character"), estimate(1.0)) | changes


def missing(field):
    plain = small()
    del plain["rows"][0][field]
    return plain


def test_every_kind_of_document_is_read(tmp_path):
    paths = write(tmp_path, plausible())
    documents = read_documents(paths)
    assert [d.path for d in documents] == [str(p) for p in paths]
    assert documents[2].label == "EDLM-AR" and documents[2].warnings == ["the ESS of n is 1.6 of 8 draws"]
    assert judges(documents) == ["smollm2", "ngram"] and len(real_texts(documents)) == 1
    assert {label: len(rows) for label, rows in decodings(documents).items()} == {"MDLM": 6, "EDLM-AR": 6, "EDLM-NCE": 6, "AR": 1}
    found = [(label, row["measure"]) for label, row in likelihoods(documents)]
    assert found[:3] == [("MDLM", "nelbo"), ("MDLM", "nelbo"), ("AR", "ar_nll")] and found[-1] == ("EDLM-NCE", "joint_nll")


def test_rows_come_in_order_of_steps_and_draws(tmp_path):
    rows = [texts_row("A", steps, {}, 6.0) for steps in (16, 4, 8)]
    bounds = [
        likelihood_row("t", "joint_nll", 1.0, steps=1, n=n, log_Z=z)
        for n, z in ((8, "lower"), (2, "upper_asymptotic"), (2, "lower"))
    ]
    documents = read(tmp_path, document("decoding", "A", rows), document("likelihood", "A", bounds))
    assert [row["steps"] for _, row in decodings(documents)["A"]] == [4, 8, 16]
    order = [(row["num_candidates"], row["log_Z"]) for _, row in likelihoods(documents)]
    assert order == [(2, "lower"), (2, "upper_asymptotic"), (8, "lower")]


def test_what_may_be_null_may_be_missing_and_unknown_fields_are_left_alone(tmp_path):
    row = texts_row("A", None, {}, 6.0, file="a.jsonl")
    for field in ("steps", "nfe", "energy_nfe", "seconds", "self_bleu", "mauve", "ess"):
        del row[field]
    plain = document("samples", "A", [row | {"later": 1}])
    del plain["seconds"]
    (one,) = read(tmp_path, plain)
    assert one.seconds is None and one.rows[0]["seconds"] is None and one.rows[0]["later"] == 1


def test_what_is_not_finite_is_null(tmp_path):
    (one,) = read(tmp_path, changed("perplexity", estimate(None, None)))
    assert one.rows[0]["perplexity"] == {"mean": None, "stderr": None}


def test_shares_and_counts_that_may_be_missing(tmp_path):
    for given in ({}, {"left_out": None, "skipped": None}, {"left_out": 1, "skipped": 3}):
        assert read(tmp_path, changed("judges", {"j": judge(**given)}, "decoding"))
    assert read(tmp_path, small())[0].rows[0]["low_ess"] is None


@pytest.mark.parametrize(
    ("ess", "n", "few"),
    [
        (1.0, 1, True),
        (1.79, 2, True),
        (1.9997, 2, False),
        (1.9997, 3, True),
        (1.9997, 64, True),
        (2.0, 3, False),
        (9.0, 64, False),
    ],
)
def test_few_draws(ess, n, few):
    """Two draws of a perfect proposal have an ESS of just below 2."""
    assert is_few(ess, n) is few
    assert is_few(torch.tensor([ess, 3.0], dtype=torch.float64), n).tolist() == [few, False]
    assert is_distrusted(likelihood_row("t", "joint_nll", 1.0, n=n, log_Z="lower", ess=ess, low_ess=None)) is few


def test_few_draws_of_how_many_is_not_known():
    row = likelihood_row("t", "joint_nll", 1.0, log_Z="lower", low_ess=None)
    assert is_distrusted(row | {"ess": estimate(1.9)}) and not is_distrusted(row | {"ess": estimate(2.0)})


def test_real_text_of_other_measurements_is_another_row(tmp_path):
    first, second = ([real_text_row()], [real_text_row(num_texts=32)])
    documents = read(tmp_path, document("decoding", "A", [*first, *first]), document("decoding", "B", second))
    assert [row["num_texts"] for _, row in real_texts(documents)] == [64, 32]


WHOLE = json.dumps(small())
MISTAKES = {
    "empty": ("", "expected JSON, got what is none, or not the whole of it"),
    "words": ("perplexity 12", "expected JSON"),
    "truncated": (WHOLE[:-40], "expected JSON, got what is none, or not the whole of it"),
    "nan": (WHOLE.replace("12.3", "NaN"), "NaN, where a number that is not finite is null"),
    "deep": ("[" * 100_000, "expected JSON"),
    "list": ("[]", 'expected a document of edlm eval --json, with "edlm eval": 1, got none'),
    "another program's": ({"rows": []}, "expected a document of edlm eval --json"),
    "format": (small() | {"edlm eval": 2}, "expected format 1, got 2; write it anew with edlm eval --json of this version"),
    "kind": (small(kind="speed"), 'kind: expected one of "likelihood", "decoding", "samples", got "speed"'),
    "label": (small(label=None), "label: expected a text, got null"),
    "warnings": (small(warnings=[1]), r"warnings: expected a list of texts, got \[1\]"),
    "rows": (small(rows={}), "rows: expected a list"),
    "no rows": (small(rows=[]), "expected rows, got none; leave the file out"),
    "row": (small(rows=[3]), r"rows\[0\]: expected an object, got 3"),
    "field": (missing("length"), r"rows\[0\].length: expected a whole number >= 1, got none"),
    "measure": (changed("measure", "elbo"), r"rows\[0\].measure: expected one of \"nelbo\""),
    "direction": (changed("direction", "lower"), r"rows\[0\].direction: expected one of \"exact\", \"upper bound\""),
    "log_Z": (changed("log_Z", "upper"), r"rows\[0\].log_Z: expected one of null, \"exact\""),
    "steps": (changed("steps", 0), r"rows\[0\].steps: expected a whole number >= 1, or null, got 0"),
    "bool": (changed("num_candidates", True), r"rows\[0\].num_candidates: expected a whole number >= 1, or null, got true"),
    "estimate": (changed("bits_per_character", 1.5), r"rows\[0\].bits_per_character: expected an estimate.*got 1.5"),
    "stderr": (changed("ess", {"mean": 1.0}), r"rows\[0\].ess: expected an estimate"),
    "infinite": (WHOLE.replace("12.3", "1e999"), "seconds: expected a finite number, or null"),
    "huge": (WHOLE.replace("12.3", "1" + "0" * 400), "seconds: expected a finite number, or null"),
    "seconds": (changed("seconds", 0, "decoding"), r"rows\[0\].seconds: expected a finite number > 0, or null, got 0"),
    "judge": (
        changed("judges", {"j": {"perplexity": estimate(1.0)}}, "decoding"),
        r"rows\[0\].judges: expected an object, each value",
    ),
    "left out": (
        changed("judges", {"j": judge(left_out=1.2)}, "decoding"),
        r"rows\[0\].judges: .*left_out: a number from 0 to 1, or null",
    ),
    "skipped": (changed("judges", {"j": judge(skipped=-1)}, "decoding"), r".*skipped: a whole number >= 0, or null"),
    "low ess": (changed("low_ess", 1.5), r"rows\[0\].low_ess: expected a number from 0 to 1, or null, got 1.5"),
    "bins": (changed("ess", [{"t": 0.5}], "decoding"), r"rows\[0\].ess: expected a list of bins of t, or null"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_the_file(tmp_path, name):
    plain, message = MISTAKES[name]
    write(tmp_path, {"good.json": small(), "bad.json": plain})
    with pytest.raises(ValueError, match=f"^{tmp_path}/bad.json: .*{message}"):
        read_documents([tmp_path / "good.json", tmp_path / "bad.json"])


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{")
    for name, message in (("none.json", "No such file"), (".", "Is a directory"), ("bytes.json", "expected JSON")):
        with pytest.raises(ValueError, match=message) as raised:
            read_documents([tmp_path / name])
        assert str(raised.value).startswith(f"{tmp_path / name}: expected")


def test_the_same_row_twice_names_both_files(tmp_path):
    paths = write(tmp_path, {"a.json": small(), "b.json": small()})
    with pytest.raises(ValueError, match=f"{paths[1]}: .*got AR, ar_nll, t, which {paths[0]} has too; .*another --label"):
        read_documents(paths)
    texts = decoding("A", gain=0.0, steps=(4, 8))
    with pytest.raises(ValueError, match=r"1.json: .*got A, 4 steps, which .*0.json has too"):
        read(tmp_path, texts, texts)
    joint = document("likelihood", "A", [likelihood_row("t", "joint_nll", 1.0, steps=1, n=4, log_Z="lower")] * 2)
    with pytest.raises(ValueError, match=r"A, joint_nll, T = 1, n = 4, log Z lower, t, which .*0\.json has too"):
        read(tmp_path, joint)


def test_rows_that_differ_in_one_thing_are_not_the_same(tmp_path):
    rows = [likelihood_row("t", "joint_nll", 1.0, steps=1, n=4, log_Z="lower")]
    rows += [rows[0] | change for change in ({"text": "u"}, {"num_candidates": 2}, {"log_Z": "exact"}, {"steps": 2})]
    first, second = decoding("A", gain=0, steps=(4,)), decoding("A", gain=0, steps=(8,))
    assert len(read(tmp_path, document("likelihood", "A", rows), first, second, decoding("B", gain=0, steps=(4,)))) == 4
