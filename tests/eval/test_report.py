"""The page to the letter, of a tiny case; and the words without which its numbers would be misread."""

from __future__ import annotations

import re

import pytest
from edlm.eval.documents import read_documents
from edlm.eval.report import page
from eval_documents import curve, decoding, document, estimate, likelihood_row, plausible, real_text_row, texts_row, write


@pytest.fixture
def made(tmp_path, monkeypatch):
    """made(documents, ...) -> the page, of files 0.json, 1.json ... in this folder."""
    monkeypatch.chdir(tmp_path)

    def make(*plain, **options):
        write(tmp_path, {f"{i}.json": one for i, one in enumerate(plain)})
        return page(read_documents([f"{i}.json" for i in range(len(plain))]), **options)

    return make


def cells(text, first):
    """The cells of the table's rows that begin with ``first``, spaces around them left out."""
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(f"| {first} ")]


def column(text, head):
    """The column of that name, of the first table that has it."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("|") and f"| {head} " in line)
    where = [c.strip() for c in lines[at].strip("|").split("|")].index(head)
    found = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            return found
        found.append(line.strip("|").split("|")[where].strip())
    return found


def section(text, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)[1]


BASELINE = [(1, 1.0, 3.0, 6.0), (4, 4.0, 2.0, 6.02)]


def test_the_page_to_the_letter(made):
    likelihood = [
        likelihood_row("a", "ar_nll", 1.5, 0.01),
        likelihood_row("b", "ar_nll", 1.75, None),
        likelihood_row("a", "paper_joint", 1.25, 0.02, n=8, log_Z="lower", ess=1.5),
    ]
    real = texts_row("real text", None, {"j": (1.0, 0.1)}, 6.0, nfe=None, energy_nfe=None, self_bleu=None)
    own = texts_row("M|x", 4, {"j": (2.0, 0.1)}, 6.125, 12.0, self_bleu=None, mauve=0.5)
    own["judges"]["j"]["skipped"] = 3
    for row in (real, own):
        row["judges"]["j"]["perplexity"] = estimate(None)
    text = made(
        document("likelihood", "AR", likelihood),
        document("decoding", "M|x", [real, own], warnings=["one\nwarning"], seconds=None),
        unit="perplexity",
        pictures=["quality_vs_steps.png"],
    )
    assert text == EXPECTED


EXPECTED = r"""# Evaluation of AR; M\|x

Made by `edlm report`. ± is one standard error.

## What was read

| file   | kind       | model | machine                             | seconds |
|--------|------------|-------|-------------------------------------|---------|
| 0.json | likelihood | AR    | torch 2.13.0, device cpu, threads 2 | 12.3    |
| 1.json | decoding   | M\|x  | torch 2.13.0, device cpu, threads 2 | -       |

- 0.json: length 128; seed 0
- 1.json: length 128; seed 0
  - warning: one warning

## Likelihood

Perplexity of each text; low is good.

| model | measure         | T          | log Z | n   | is                    | a            | b      | ESS of n, of each text |
|-------|-----------------|------------|-------|-----|-----------------------|--------------|--------|------------------------|
| AR    | ar_nll          | -          | -     | -   | exact                 | 87.43 ± 2.61 | 184.18 | -                      |
| AR    | paper_joint (1) | continuous | lower | 8   | not to be trusted (2) | 41.50        | -      | 1.50 ± 0.10 / -        |

(1) paper_joint is no bound of anything: it weights the joint -log p(x0 | xt) by 1/t, while the ELBO in continuous time has the marginals of p(x0 | xt) alone. For carried-over AR energies it equals the AR NLL, of whatever model and data; for a perfect joint it lies below the entropy of the data. It is here to be compared with printed figures.

(2) log Z rests on one or two draws: the figure may be off by any amount, on either side (hundreds of nats were seen), and its ± says nothing of that and is left out.

What is counted per token compares only models of one tokenizer.

What is said of a perplexity holds of its logarithm: it is the exponential of a figure that is so.

- ar_nll: negative log-likelihood of an autoregressive model.
- paper_joint: the published perplexity formula.

- exact: the negative log-likelihood itself; its error is that of the choice of texts.

## Texts

Quality (judges; low is good) beside diversity (entropy, distinct, repetition, self-BLEU), as the one is bought with the other: a text that repeats itself pleases a judge. Real text is the mark, on both sides. Texts are number x tokens; distinct-n falls with their number. Seconds are of decoding them all. Entropies compare only what is counted in one tokenizer's tokens.

| texts of  | steps | texts    | j, bits per character | entropy, bits | distinct-1 | distinct-2 | distinct-4 | repetition-4  | MAUVE | NFE | energy NFE | seconds |
|-----------|-------|----------|-----------------------|---------------|------------|------------|------------|---------------|-------|-----|------------|---------|
| real text | -     | 64 x 128 | 1.000 ± 0.100         | 6.000 ± 0.020 | 0.310      | 0.740      | 0.980      | 0.012 ± 0.002 | -     | -   | -          | -       |
| M\|x      | 4     | 64 x 128 | 2.000 ± 0.100 (1)     | 6.125 ± 0.020 | 0.310      | 0.740      | 0.980      | 0.012 ± 0.002 | 0.500 | 4   | 0          | 12      |

(1) j could not score 3 of the 64 texts.

![Quality against decoding steps](quality_vs_steps.png)
"""  # noqa: E501


def test_real_text_comes_once_and_first(made):
    text = made(*plausible().values())
    rows = [line for line in section(text, "Texts").splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| real text ") and text.count("| real text ") == 1
    other = made(decoding("A", gain=0), document("decoding", "B", [real_text_row(num_texts=32)]))
    assert [row[0] for row in cells(other, "real text of")] == ["real text of 0.json", "real text of 1.json"]


def test_quality_and_diversity_and_what_they_cost_side_by_side(made):
    text = section(made(*plausible().values()), "Texts")
    (head,) = cells(text, "texts of")
    assert head[:7] == [
        "texts of",
        "steps",
        "texts",
        "smollm2, bits per character",
        "smollm2, perplexity",
        "ngram, bits per character",
        "ngram, perplexity",
    ]
    assert head[7:] == [
        "entropy, bits",
        "distinct-1",
        "distinct-2",
        "distinct-4",
        "repetition-4",
        "self-BLEU",
        "NFE",
        "energy NFE",
        "seconds",
    ]
    first = cells(text, "EDLM-AR")[0]
    assert first[1:4] == ["4", "64 x 128", "1.750 ± 0.030"] and first[7:9] == ["6.090 ± 0.020", "0.310"]
    assert first[-3:] == ["4", "2", "0.837"]
    assert [row[1] for row in cells(text, "MDLM")] == ["4", "8", "16", "32", "64", "128"]


def test_words_that_a_judge_leaves_out_are_said(made):
    """A judge that skips the words that it does not know is pleased by texts of such words."""
    lossy = texts_row("A", 4, {"j": (2.0, 0.1), "k": (2.0, 0.1)}, 6.0)
    lossy["judges"]["j"]["left_out"] = 0.4321
    plain = texts_row("A", 8, {"j": (1.9, 0.1), "k": (2.0, 0.1)}, 6.0)
    plain["judges"]["j"]["left_out"] = 0.0
    text = made(document("decoding", "A", [lossy, plain]))
    assert column(text, "j, left out") == ["43.2 % (1)", "-"]
    assert "k, left out" not in text
    assert "(1) j leaves out words that it does not know; what is left looks better for it." in text


def test_every_direction_and_measure_is_explained_and_log_Z_is_named(made):
    text = section(made(*plausible().values()), "Likelihood")
    for word in ("nelbo", "ar_nll", "joint_nll", "finite_step_elbo", "paper_joint", "exact", "upper bound", "no bound"):
        assert f"\n- {word}: " in text
    rows = cells(text, "EDLM-AR")
    found = {(row[1], row[3]): row[5] for row in rows}
    assert found["joint_nll", "lower"] == "below in expectation"
    assert found["joint_nll", "upper, asymptotic"] == "above for n large enough"
    few = made(document("likelihood", "AR", [likelihood_row("t", "ar_nll", 1.0)]))
    assert "- nelbo" not in few and "no bound" not in few and "ESS" not in few and "tokenizer" not in few


def test_paper_joint_is_never_without_its_warning(made):
    warning = "paper_joint is no bound of anything"
    for direction in ("no bound", "upper bound"):
        row = likelihood_row("t", "paper_joint", 1.0, direction=direction)
        text = made(document("likelihood", "E", [row, likelihood_row("t", "nelbo", 2.0)]))
        assert f"\n(1) {warning}" in text and column(text, "measure") == ["nelbo", "paper_joint (1)"]
    assert warning not in made(document("likelihood", "E", [likelihood_row("t", "nelbo", 2.0)]))


@pytest.mark.parametrize(
    ("log_Z", "bits", "ess", "low_ess", "trusted"),
    [
        ("lower", 1.0, 1.99, None, False),
        ("upper_asymptotic", 1.0, 1.99, 0.0, False),
        ("lower", 1.0, 2.0, 0.1, True),
        ("upper_asymptotic", 1.0, 9.0, 0.11, False),
        ("lower", -0.1, 9.0, None, False),
        ("lower", 1.0, None, None, True),
        ("exact", -0.1, None, None, True),  # no draw is behind it
    ],
)
def test_a_worthless_log_Z_is_no_result(made, log_Z, bits, ess, low_ess, trusted):
    row = likelihood_row("t", "joint_nll", bits, 0.01, steps=1, n=4, log_Z=log_Z, ess=ess, low_ess=low_ess)
    text = made(document("likelihood", "E", [row]))
    assert column(text, "is") == [row["direction"] if trusted else "not to be trusted (1)"]
    assert column(text, "t") == [f"{bits:.4f} ± 0.0100" if trusted else f"{bits:.4f}"]  # the error of log Z is not in it
    assert ("(1) log Z rests on one or two draws: the figure may be off by any amount" in text) != trusted
    assert (f"- {row['direction']}: " in text) == trusted


def test_a_log_Z_is_worthless_for_its_text_alone(made):
    rows = [likelihood_row(text, "joint_nll", 1.0, steps=1, n=4, log_Z="lower", ess=ess) for text, ess in (("t", 1), ("u", 3))]
    text = made(document("likelihood", "E", rows))
    assert column(text, "is") == ["not to be trusted (1)", "below in expectation"]
    assert column(text, "u") == ["-", "1.0000 ± 0.0100"] and column(text, "t") == ["1.0000", "-"]


def test_an_ess_that_is_too_small_looks_so(made):
    ess = (1.9997, 1.15, 2.3, None)
    rows = [likelihood_row("t", "joint_nll", 1.0, n=n, log_Z="lower", ess=of) for n, of in enumerate(ess, 4)]
    text = made(document("likelihood", "E", rows))
    assert column(text, "ESS of n") == ["1.99 ± 0.10", "1.15 ± 0.10", "2.30 ± 0.10", "-"]


def test_what_is_known_has_no_draws(made):
    rows = [likelihood_row("t", "joint_nll", 1.0, steps=1, n=8, log_Z=log_Z, ess=3) for log_Z in ("exact", "lower")]
    text = made(document("likelihood", "E", rows))
    assert column(text, "n") == ["-", "8"] and column(text, "ESS of n") == ["-", "3.00 ± 0.10"]
    alone = made(document("likelihood", "E", rows[:1]))
    assert "ESS" not in alone and "| n " not in alone


def test_whose_likelihood_it_is_is_said(made):
    joint = [likelihood_row("t", "joint_nll", 1.0, steps=1, log_Z=z, n=n, ess=n) for z, n in (("exact", None), ("lower", 8))]
    text = made(document("likelihood", "E", [likelihood_row("t", "nelbo", 2.0), *joint], energy="an energy"))
    assert column(text, "measure") == ["nelbo", "joint_nll (1)", "joint_nll"]
    assert "T = 1; the draws of a smaller n are the first of a larger one." in text
    assert "(1) With an autoregressive energy this is the likelihood of that model itself, and says nothing of decoding." in text
    assert "- nelbo: negative ELBO of the proposal alone, whatever the energy" in text
    steps = [likelihood_row("t", "finite_step_elbo", 1.0, steps=1, log_Z=log_Z) for log_Z in ("exact", "lower")]
    assert column(made(document("likelihood", "E", steps)), "measure") == ["finite_step_elbo (1)", "finite_step_elbo"]


def test_settings_that_all_share_come_once_and_digests_are_short(made):
    sha, other = "sha256 " + "0123456789ab" + "c" * 52, "sha256 " + "d" * 64
    shared = {"--seed": 0, "--mauve": False, "--text": {"t": sha}, "--decode": [8, None]}
    words = " ".join(["word"] * 60)
    plain = [curve(label, BASELINE, settings=shared | {"model": of}) for label, of in (("A", sha), ("B", other), ("C", words))]
    text = made(*plain, document("likelihood", "D", [likelihood_row("t", "nelbo", 1.0)], settings=shared), baseline="A")
    said = "--seed 0; --mauve no; --text t (sha256 0123456789ab); --decode 8, none"
    assert f"- every document of kind decoding: {said}\n- 0.json: model sha256 0123456789ab\n" in text
    assert "- 1.json: model sha256 dddddddddddd\n" in text and f"- 3.json: {said}\n" in text
    assert "\n  word word" in text and max(len(line) for line in text.splitlines() if "word" in line) <= 130
    assert "\n- 0.json: model" in text and "- every document of kind likelihood" not in text
    alike = made(curve("A", BASELINE), curve("B", BASELINE, warnings=["w"]), baseline="A")
    assert "- every document of kind decoding: length 128; seed 0\n- 1.json: no other settings\n  - warning: w\n" in alike


def test_other_contents_of_a_text_are_said(made):
    row = [likelihood_row("t", "nelbo", 1.0)]
    plain = [
        document("likelihood", label, row, settings={"--text": {"t": sha}}) for label, sha in (("A", "1"), ("B", "2"), ("C", "1"))
    ]
    decoded = curve("D", BASELINE, settings={"--text": {"t": "3"}})
    text = made(*plain, decoded)
    assert "The text t is not the same in 0.json, 2.json and in 1.json." in section(text, "Likelihood")
    assert "not the same" not in section(text, "Texts")  # other windows are taken for them
    assert "not the same" not in made(plain[0], plain[2])
    again = made(decoded, curve("E", BASELINE, settings={"--text": {"t": "4"}}), baseline="D")
    assert "The text t is not the same in 0.json and in 1.json." in section(again, "Texts")


@pytest.mark.parametrize(
    ("unit", "cell"),
    [
        ("bits_per_character", "1.0000 ± 0.0100"),
        ("bits_per_token", "4.3000 ± 0.0430"),
        ("nats_per_token", "2.9805 ± 0.0298"),
        ("perplexity", "19.70 ± 0.59"),
    ],
)
def test_units(made, unit, cell):
    text = made(document("likelihood", "E", [likelihood_row("t", "nelbo", 1.0)]), unit=unit)
    assert column(text, "t") == [cell] and f"{unit.replace('_', ' ').capitalize()} of each text" in text
    assert ("only models of one tokenizer" in text) == (unit != "bits_per_character")
    assert ("a perplexity holds of its logarithm" in text) == (unit == "perplexity")


def test_other_windows_of_a_text_are_said(made):
    rows = [likelihood_row("t", "nelbo", 1.0), likelihood_row("u", "nelbo", 1.0)]
    other = [likelihood_row("t", "nelbo", 1.0, length=64), likelihood_row("u", "nelbo", 1.0)]
    plain = [
        document("likelihood", label, of, settings={"--text": {"t": label, "u": digest}})
        for label, of, digest in (("A", rows, "1"), ("B", other, "1"), ("C", other, "2"))
    ]
    text = made(*plain[:2])
    assert "Not the same windows of t: 512 of 128 tokens: A; 512 of 64 tokens: B." in text and "windows of u" not in text
    assert "The text" not in text, "a digest is of the windows"
    text = made(*plain)
    assert "The text t is not the same in 1.json and in 2.json." in text
    assert "The text u is not the same in 0.json, 1.json and in 2.json." in text
    fewer = [row | {"sequences": 64} for row in rows]
    assert "The text" not in made(plain[0], document("likelihood", "D", fewer, settings={"--text": {"t": "D"}}))
    real = [real_text_row(), real_text_row(num_texts=32)]
    decoded = [document("decoding", str(i), [row], settings={"--text": {"t": i}}) for i, row in enumerate(real)]
    assert "The text" not in made(*decoded)


def test_files_of_samples_alone(made):
    rows = [texts_row("A", None, {"j": (2.0, 0.1)}, 6.0, file=f"{n}.jsonl", nfe=None, energy_nfe=None) for n in "xy"]
    for row in rows:
        del row["steps"]
    text = made(document("samples", "A", rows, unit_of_diversity="characters"))
    assert [row[0] for row in cells(text, "A,")] == ["A, x.jsonl", "A, y.jsonl"]
    assert "Speed" not in text and "Likelihood" not in text and "several units" not in text
    other = made(document("samples", "A", rows, unit_of_diversity="characters"), curve("B", BASELINE, unit_of_diversity="tokens"))
    assert "counted in several units: characters in 0.json; tokens in 1.json." in other


def test_speed_by_hand(made):
    faster = [(1, 1.0, 2.5, 6.0), (2, 1.6, 2.0, 6.1), (4, 3.0, 1.9, 6.0)]
    base, model = curve("B", BASELINE, 0.01), curve("E", faster, 0.01)
    model["rows"][0]["energy_nfe"] = 1
    text = section(made(base, model), "Speed at equal quality")
    assert "- E against B: ratio 2.00 at 1 of 3 points; at 1 of 3 points its score is better than the baseline's best.\n" in text
    assert [row[1:] for row in cells(text, "E")] == [
        ["1", "2.500 ± 0.010", "1", "2", "6.000", "6.010", "2.00 (1.97 to 2.03)"],  # 2 * 4 ** -+ sqrt(0.00015)
        ["2", "2.000 ± 0.010", "1.6", "4", "6.100", "6.020", "entropy 0.080 bits above"],
        ["4", "1.900 ± 0.010", "3", "-", "6.000", "-", "the baseline never reaches this score"],
    ]
    wide = section(made(base, model, entropy_tolerance=0.1), "Speed at equal quality")
    assert "ratio 2.00 to 2.50 at 2 of 3 points; at 1" in wide and "more than 0.1 bits" in wide
    turned = section(made(base, model, baseline="E"), "Speed at equal quality")
    assert "B against E: slower at every score that can be compared, no ratio: entropy 0.080 bits below (1)." in turned


def test_all_models_of_a_judge_are_in_one_table(made):
    models = [curve(label, BASELINE) for label in ("B", "C", "D")]
    for i, model in enumerate(models):
        for row in model["rows"]:
            row["judges"]["k"] = row["judges"]["j"]
            row["length"] = 256 if i == 2 else 128
    text = section(made(*models, curve("E", BASELINE), baseline="B"), "Speed at equal quality")
    assert text.count("| model ") == 2 and [row[0] for row in cells(text, "C")] == ["C"] * 4
    first, second = text.split("### ")[1:]
    assert [line[:15] for line in first.splitlines() if line.startswith("- ")] == [
        "- C against B: ",
        "- E against B: ",
        "- D against B: ",
    ]
    assert "- D against B: not compared, as texts have 128 and 256 tokens.\n" in first
    assert "- E against B: not compared, as E has no seconds or no score.\n" in second


def test_other_judges_of_one_name_are_said(made):
    a, b, c = (curve(label, BASELINE, settings={"--judge": {label: sha}}) for label, sha in (("A", "1"), ("B", "2"), ("C", "1")))
    text = made(a, b, c, baseline="A")
    assert "The judge j is not the same in 0.json, 2.json and in 1.json." in section(text, "Texts")
    assert (
        "- B against A: not compared, as j is not the same judge in 0.json, 1.json.\n" in text and "- C against A: ratio" in text
    )
    assert "not the same" not in made(a, c, baseline="A")


def test_a_baseline_is_chosen_where_it_is_clear(made):
    model = curve("E", BASELINE)
    assert "no model is the baseline by itself, of several (B, E); choose one with --baseline." in made(
        curve("B", BASELINE), model
    )
    for row in model["rows"]:
        row["energy_nfe"] = 3
    assert "E against B: ratio 1.00 at 2 of 2 points." in made(curve("B", BASELINE), model)
    assert "as every one has an energy, or one point alone; choose" in made(model, curve("B", BASELINE[:1]))
    assert "Speed" not in made(model)


def test_the_same_page_each_time(made):
    plain = list(plausible().values())
    assert made(*plain) == made(*plain)


def test_what_is_not_finite_is_said(made):
    row = likelihood_row("t", "nelbo", 1.0, bits_per_character=estimate(None))
    assert column(made(document("likelihood", "A", [row])), "t") == ["not finite"]


def test_mistakes(made):
    text = curve("B", BASELINE)
    for options, message in (
        ({"unit": "nats"}, "--unit: expected one of bits_per_character, .*, got 'nats'"),
        ({"baseline": "C"}, r"--baseline: expected a model of which there are texts \(B\), got 'C'"),
        ({"entropy_tolerance": -1.0}, r"--entropy-tolerance: expected bits >= 0, got -1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            made(text, **options)
    with pytest.raises(ValueError, match="documents: expected at least one, got none"):
        page([])
