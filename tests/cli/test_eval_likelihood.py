"""edlm eval MODEL: every figure is that of edlm.eval on the same windows, under its own name."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch
from edlm import eval as measures
from edlm.checkpoint import save
from edlm.cli.eval_document import show
from edlm.data import CharTokenizer, bundled_text, open_text, windows
from edlm.eval.documents import FEW_DRAWS, is_distrusted, read_documents
from edlm.models import ARResidualEnergy, CausalLM, CausalLMConfig, DiT
from tiny_run import write_text
from untrained import save_models

COMMON = ("--text", "text.txt", "--length", 16, "--windows", 10, "--batch-size", 4, "--device", "cpu")
ENERGY = ("--energy", "ar")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("likelihood")
    save_models(folder)
    write_text(folder)
    write_text(folder, 300, "second.txt", seed=1)
    (folder / "empty.txt").write_text(" \n")
    (folder / "short.txt").write_text("short")
    (folder / "run").mkdir()
    shutil.copytree(folder / "ar", folder / "run" / "model")
    bare = CausalLM(CausalLMConfig(vocab_size=27, bos_token_id=27, dim=16, num_layers=1, num_heads=2))
    bare.save_pretrained(folder / "bare")
    save(folder / "checkpoint", kind="trainer", meta={}, tensors={"model": {"x": torch.zeros(1)}})
    return folder


def x0_of(folder, name="text.txt", count=10):
    return windows(CharTokenizer().encode((folder / name).read_text()), 16, count)


def denoiser(folder):
    return DiT.from_pretrained(folder / "dit")


def assert_is(row, estimate, *, unit="nats_per_token"):
    """Chunks of 4 against batches of 64: last bits differ."""
    assert row[unit]["mean"] == pytest.approx(estimate.mean, rel=1e-6)
    known = math.isfinite(estimate.stderr)  # of log Z nothing is said below an ESS of 5
    assert row[unit]["stderr"] == (pytest.approx(estimate.stderr, rel=1e-6) if known else None)
    assert row["sequences"] == 10 and row["length"] == 16 and row["sequences_per_second"] > 0


# --- without an energy ------------------------------------------------------------------------------------------------------------


def test_an_autoregressive_model(document, folder):
    (row,) = document("ar", *COMMON)["rows"]
    nats = measures.ar_nll(CausalLM.from_pretrained(folder / "ar"), x0_of(folder))
    assert_is(row, nats)
    assert_is(row, nats.bits_per_token(), unit="bits_per_token")
    assert_is(row, nats.bits_per_character(), unit="bits_per_character")
    assert_is(row, nats.perplexity(), unit="perplexity")
    found = tuple(row[key] for key in ("text", "measure", "steps", "num_candidates", "log_Z", "direction", "ess"))
    assert found == ("text.txt", "ar_nll", None, None, None, "exact", None)


def test_nelbos(document, folder):
    """Sequence i has the seed 7 times 10 windows, plus i: two seeds share no draw."""
    rows = document("dit", *COMMON, "--steps", 4, 40, 4, "--num-times", 3, "--seed", 7)["rows"]
    assert [(row["measure"], row["steps"], row["direction"]) for row in rows] == [
        ("nelbo", steps, "upper bound") for steps in (None, 4, 40)
    ]  # 40 steps for 16 tokens are allowed
    for row in rows:
        assert_is(row, measures.nelbo(denoiser(folder), x0_of(folder), steps=row["steps"], num_times=3, seed=70))


def test_values_do_not_depend_on_other_texts_nor_on_how_many_are_asked_for(document):
    alone = document("dit", *COMMON)["rows"][0]
    both = document("dit", *COMMON[2:], "--text", "second.txt", "text.txt")
    assert [row["text"] for row in both["rows"]] == list(both["texts"]) == ["second.txt", "text.txt"]
    assert both["rows"][1]["nats_per_token"] == alone["nats_per_token"] != both["rows"][0]["nats_per_token"]
    smaller = document("dit", *COMMON, "--batch-size", 3)["rows"][0]
    assert smaller["nats_per_token"]["mean"] == pytest.approx(alone["nats_per_token"]["mean"], rel=1e-6)


def test_what_is_printed(edlm, document):
    plain = document("dit", *COMMON, *ENERGY, "--num-candidates", 4)
    code, out, _ = edlm("eval", "dit", *COMMON, *ENERGY, "--num-candidates", 4)
    assert code == 0 and out.startswith(
        "dit + ar: 10 of 521 windows of 16 tokens; bits/character, +- is one standard error over windows\n"
    )
    for row in plain["rows"]:
        bits = row["bits_per_character"]
        shown = f"{bits['mean']:.4f}" + ("" if bits["stderr"] is None else f" +- {bits['stderr']:.4f}")
        direction = "not to be trusted" if is_distrusted(row) else row["direction"]
        assert any(shown in line and direction in line for line in out.splitlines())
    entropy = plain["texts"]["text.txt"]["entropy"]
    assert f"unigram entropy of the text, bits: {entropy['mean']:.4f} +- {entropy['stderr']:.4f}" in out
    assert out.count("note: ") == len(plain["warnings"]) > 0
    for unit in ("nats/token", "bits/token", "perplexity"):
        shown = edlm("eval", "dit", *COMMON, "--unit", unit)[1]
        assert unit in shown and f"{plain['rows'][0][unit.replace('/', '_per_')]['mean']:.4f} +- " in shown


def test_a_table_of_texts(edlm):
    out = edlm("eval", "ar", *COMMON[2:], "--text", "text.txt", "second.txt", "--label", "a model")[1]
    head, columns, _, row, entropy = out.splitlines()
    assert head.startswith("a model: 10 of 521 windows of text.txt, 10 of 78 windows of second.txt of 16 tokens")
    assert columns.split() == ["direction", "text.txt", "second.txt", "sequences/s"]
    assert row.startswith("AR NLL  exact  ") and row.count(" +- ") == 2 and entropy.count(" +- ") == 2


def test_names_of_texts(document, folder):
    """A file is read whole; of a folder it is one split, whose text is that file's."""
    (folder / "splits").mkdir()
    for split, text in (("train", "not this " * 100), ("valid", "nor this " * 100)):
        (folder / "splits" / f"{split}.txt").write_text(text)
    shutil.copy(folder / "text.txt", folder / "splits" / "test.txt")
    shutil.copy(folder / "second.txt", folder / "splits" / "text.txt")
    rows = document("ar", *COMMON[2:], "--text", "text.txt", "splits", "bundled", "splits/text.txt")["rows"]
    assert [row["text"] for row in rows] == ["text.txt", "splits/test", "bundled/test", "splits/text.txt"]
    assert rows[0]["nats_per_token"] == rows[1]["nats_per_token"] != rows[3]["nats_per_token"]
    other = document("ar", *COMMON[2:], "--text", "splits", "--split", "valid")["rows"][0]
    assert other["text"] == "splits/valid" and other["nats_per_token"] != rows[0]["nats_per_token"]


def test_the_default_text_is_the_bundled_test_split(document, folder):
    plain = document("ar", "--windows", 3)
    x0 = windows(CharTokenizer().encode(open_text("bundled").split("test").__next__()), 128, 3)
    assert plain["rows"][0]["text"] == "bundled/test" and plain["rows"][0]["length"] == 128
    nats = measures.ar_nll(CausalLM.from_pretrained(folder / "ar"), x0).mean
    assert plain["rows"][0]["nats_per_token"]["mean"] == pytest.approx(nats, rel=1e-6)


def test_windows_are_as_long_as_the_model_reads(document):
    assert document("short", *COMMON[:2], "--windows", 4)["rows"][0]["length"] == 5


@pytest.mark.parametrize("blocks", ["plain", "bos_eos"])
def test_characters_of_a_bpe(document, folder, blocks):
    (folder / "austen.txt").write_text(bundled_text()[:3000])
    row = document("bpe_ar", *COMMON[2:], "--text", "austen.txt", "--blocks", blocks)["rows"][0]
    tokenizer = CausalLM.from_pretrained(folder / "bpe_ar").tokenizer_description
    from edlm.data import tokenizer_from

    tokens = len(tokenizer_from(tokenizer).encode((folder / "austen.txt").read_text())) + 1
    expected = 3000 / tokens * (14 / 16 if blocks == "bos_eos" else 1)
    assert row["characters_per_token"] == pytest.approx(expected)
    assert row["bits_per_character"]["mean"] == pytest.approx(row["bits_per_token"]["mean"] / expected)


def test_one_window_has_no_standard_error(edlm):
    code, out, _ = edlm("eval", "ar", *COMMON[:4], "--windows", 1, "--json")
    assert code == 0 and "NaN" not in out and json.loads(out)["rows"][0]["nats_per_token"]["stderr"] is None
    assert " +- " not in edlm("eval", "ar", *COMMON[:4], "--windows", 1)[1].splitlines()[3]


def test_what_is_impossible_is_null(edlm, folder, monkeypatch):
    """An infinite value makes the mean infinite; JSON has no such number."""
    values = torch.tensor([1.0, math.inf, 2.0, 1.0], dtype=torch.float64)
    monkeypatch.setattr(measures, "ar_nll", lambda model, x0, **more: measures.Estimate.of(values[: len(x0)], "nats/token"))
    assert edlm("eval", "ar", *COMMON, "--json", "inf.json")[0] == 0
    row = json.loads((folder / "inf.json").read_text())["rows"][0]
    assert row["nats_per_token"] == row["perplexity"] == {"mean": None, "stderr": None}


# --- with one ---------------------------------------------------------------------------------------------------------------------

BRACKETS = [("lower", "below in expectation"), ("upper_asymptotic", "above for n large enough")]


def energy_of(folder, carry_over=False):
    return ARResidualEnergy(CausalLM.from_pretrained(folder / "ar"), carry_over, mask_token_id=27)


def test_all_measures_by_name(document, folder, tmp_path):
    plain = document("dit", *COMMON, *ENERGY, "--steps", 3, "--num-candidates", 4, "--seed", 5)
    rows = {(row["measure"], row["steps"], row["log_Z"]): row for row in plain["rows"]}
    model, energy, x0 = denoiser(folder), energy_of(folder), x0_of(folder)
    given = {"num_candidates": 4, "seed": 50}  # 10 windows: sequence i has --seed 5 times 10, plus i
    for measure, steps, found, directions in (
        ("joint_nll", 1, measures.joint_nll(model, energy, x0, num_candidates=4, seed=5), dict(BRACKETS)),
        (
            "finite_step_elbo",
            3,
            measures.finite_step_elbo(model, energy, x0, steps=3, **given),
            {"lower": "no bound", "upper_asymptotic": "above for n large enough"},
        ),
        ("paper_joint", None, measures.paper_joint(model, energy, x0, **given), dict.fromkeys(dict(BRACKETS), "no bound")),
    ):
        for log_Z, direction in directions.items():
            row = rows.pop((measure, steps, log_Z))
            assert_is(row, getattr(found, log_Z))
            assert row["ess"]["mean"] == pytest.approx(found.ess.mean, rel=1e-6)
            assert (row["direction"], row["num_candidates"]) == (direction, 4)
    sampler, found = rows.pop(("sampler_elbo", 3, None)), measures.finite_step_elbo(model, energy, x0, steps=3, **given)
    assert_is(sampler, found.sampler)
    assert (sampler["direction"], sampler["num_candidates"], sampler["ess"]) == ("upper bound", 4, None)
    exact = rows.pop(("joint_nll", 1, "exact"))
    assert (exact["direction"], exact["num_candidates"], exact["ess"]) == ("exact", None, None)
    assert_is(exact, measures.ar_nll(energy.causal_lm, x0))  # T = 1 with this energy is the autoregressive model
    assert rows.pop(("nelbo", None, None))["direction"] == "upper bound" and rows.pop(("nelbo", 3, None))["steps"] == 3
    assert all(row["log_Z"] == "exact" for row in rows.values())  # of what else the energy knows
    (tmp_path / "document.json").write_text(json.dumps(plain))
    (read,) = read_documents([tmp_path / "document.json"])
    assert read.label == "dit + ar" and len(read.rows) == len(plain["rows"])


def test_defaults_with_an_energy(document):
    rows = document("dit", *COMMON, "--windows", 2, *ENERGY)["rows"]
    found = {(row["measure"], row["steps"], row["num_candidates"]) for row in rows if row["log_Z"] != "exact"}
    assert found == {
        ("nelbo", None, None),
        ("joint_nll", 1, 256),
        ("finite_step_elbo", 8, 16),
        ("sampler_elbo", 8, 16),
        ("paper_joint", None, 16),
    }
    assert [row["measure"] for row in rows] == sorted(
        (row["measure"] for row in rows), key=[*dict.fromkeys(r["measure"] for r in rows)].index
    )


def test_the_bound_against_n(document, folder):
    plain = document("dit", *COMMON, *ENERGY, "--measures", "joint_nll", "--num-candidates", 2, 8, 2, 32)
    rows = plain["rows"]
    assert [(row["log_Z"], row["num_candidates"]) for row in rows] == [
        ("exact", None),
        *((log_Z, n) for n in (2, 8, 32) for log_Z, _ in BRACKETS),
    ]
    for row in rows[1:]:
        found = measures.joint_nll(denoiser(folder), energy_of(folder), x0_of(folder), num_candidates=row["num_candidates"])
        assert_is(row, getattr(found, row["log_Z"]))
    assert plain["warnings"][0].startswith("not to be trusted: joint NLL, T = 1, n = 2; ") and FEW_DRAWS in plain["warnings"][0]
    few = [float(row["ess"]["mean"] < min(2, 0.9 * row["num_candidates"])) for row in rows[1:]]
    assert [row["low_ess"] for row in rows] == [None, *few]


def test_a_share_of_states_of_low_ess_is_enough_to_distrust(edlm, document, monkeypatch):
    """The mean may hide it: 8 sequences of an ESS of 4, and 2 of 1."""
    found, ess = measures.paper_joint, torch.tensor([4.0] * 8 + [1.0] * 2, dtype=torch.float64)
    at = iter([*range(0, 10, 4)] * 2)

    def rigged(*arguments, **more):
        begin, real = next(at), found(*arguments, **more)
        here = measures.Estimate.of(ess[begin : begin + real.ess.count], "of n")
        return dataclasses.replace(real, ess=here)

    monkeypatch.setattr(measures, "paper_joint", rigged)
    arguments = ("dit", *COMMON, *ENERGY, "--measures", "paper_joint", "nelbo", "--num-candidates", 4)
    plain = document(*arguments)
    drawn = [row for row in plain["rows"] if row["log_Z"] in ("lower", "upper_asymptotic")]
    assert [(row["ess"]["mean"], row["low_ess"], row["direction"]) for row in drawn] == [(3.4, 0.2, "no bound")] * 2
    assert [row["low_ess"] for row in plain["rows"] if row["measure"] == "nelbo"] == [None]
    assert plain["warnings"][0] == f"not to be trusted: paper_joint, n = 4: {FEW_DRAWS}"
    lines = [line for line in edlm("eval", *arguments)[1].splitlines() if line.startswith("paper_joint, n")]
    assert len(lines) == 2 and all("not to be trusted" in line and "3.40 of 4 !" in line for line in lines)


def test_at_one_step_the_exact_figure_is_one_row_whatever_n(document):
    arguments = ("dit", *COMMON, *ENERGY, "--measures", "sampler_elbo", "--steps", 1, "--num-candidates", 4, 8)
    exact, *samplers = document(*arguments)["rows"]
    assert (exact["measure"], exact["log_Z"], exact["direction"]) == ("finite_step_elbo", "exact", "exact")
    assert (exact["num_candidates"], exact["ess"], exact["low_ess"]) == (None, None, None)
    assert [(row["measure"], row["num_candidates"]) for row in samplers] == [("sampler_elbo", 4), ("sampler_elbo", 8)]


def test_a_figure_that_one_text_lacks_is_a_dash(document):
    plain = document("dit", *COMMON[2:], "--text", "text.txt", "second.txt", *ENERGY, "--measures", "joint_nll")
    plain["rows"] = [row for row in plain["rows"] if (row["text"], row["log_Z"]) != ("second.txt", "exact")]
    line = next(line for line in show(plain, "nats/token").splitlines() if "  exact  " in line)
    assert line.startswith("joint NLL, T = 1  ") and line.split()[-3:-1] == ["-", "-"] and line.count("+-") == 1


def test_an_exact_figure_is_said_to_be_the_autoregressive_models(document):
    said = "joint NLL, exact: with an autoregressive energy this is the likelihood of that model itself, and says nothing of decoding"
    assert said in document("dit", *COMMON, *ENERGY, "--measures", "joint_nll")["warnings"]
    assert not any("exact: " in note for note in document("dit", *COMMON, *ENERGY, "--measures", "finite_step_elbo")["warnings"])


@pytest.mark.parametrize("blocks", ["plain", "bos_eos"])
def test_how_many_windows_there_are(document, folder, blocks):
    (folder / "many.txt").write_text(bundled_text()[:3000])
    few, every = (
        document("bpe_ar", "--text", "many.txt", "--length", 16, "--blocks", blocks, "--windows", n)["texts"]["many.txt"]
        for n in (3, 10_000)
    )
    assert few["sequences"] == 3 and few["windows_available"] == every["windows_available"] == every["sequences"] > 3


def test_carry_over(document, folder):
    plain = document("dit", *COMMON, *ENERGY, "--carry-over", "--measures", "paper_joint", "joint_nll", "--num-candidates", 4)
    exact = {row["measure"]: row for row in plain["rows"] if row["log_Z"] == "exact"}
    nats = measures.ar_nll(CausalLM.from_pretrained(folder / "ar"), x0_of(folder))
    assert_is(exact["joint_nll"], nats)  # Z = 1
    assert exact["paper_joint"]["direction"] == "no bound" and plain["label"] == "dit + ar (carry-over)"
    assert any(note.startswith("paper_joint: no bound") for note in plain["warnings"])
    assert list(dict.fromkeys(row["measure"] for row in plain["rows"])) == ["paper_joint", "joint_nll"]


def test_energies_that_are_nan(refused, monkeypatch, folder):
    def broken(x0, xt, t, log_p):
        return torch.full(x0.shape[:2], math.nan)

    monkeypatch.setattr("edlm.cli.eval_likelihood.open_energy", lambda *path, **options: broken)
    for measure in ("joint_nll", "finite_step_elbo", "paper_joint"):
        err = refused("eval", "dit", *COMMON, *ENERGY, "--measures", measure, "--json", "nan.json")
        assert "--energy: expected numbers above -inf, got nan" in err
        assert not list(folder.glob("nan.json*"))


# --- mistakes ---------------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "one draw": (("dit", *COMMON, *ENERGY, "--num-candidates", 1), "expected at least 2 draws for log Z, got 1; take more"),
    "auto draws": (
        ("dit", *COMMON, *ENERGY, "--num-candidates", "auto"),
        "expected numbers of draws, got auto, which is for --decode",
    ),
    "draws of nothing": (
        ("dit", *COMMON, "--num-candidates", 4),
        "--num-candidates: it is for joint_nll, finite_step_elbo, paper_",
    ),
    "an energy of nothing": (
        ("ar", *COMMON, *ENERGY),
        "--energy: it corrects a denoiser (a model of kind dit), got ar of kind 'causal_lm'",
    ),
    "a denoiser as energy": (
        ("dit", *COMMON, "--energy", "other"),
        "--energy: expected a model of kind 'nce_energy' or 'causal_lm'",
    ),
    "another tokenizer": (("dit", *COMMON, "--energy", "bpe_ar"), "--energy: expected a model with the denoiser's tokenizer"),
    "carry-over of nothing": (("dit", *COMMON, "--carry-over"), "--carry-over: it is a way to score with an energy, got none"),
    "a measure of an energy": (
        ("dit", *COMMON, "--measures", "joint_nll"),
        "--measures: expected nelbo of this model (kind 'dit'), got joint_nll; give --energy as well",
    ),
    "a measure of another kind": (
        ("ar", *COMMON, "--measures", "nelbo"),
        "--measures: expected ar_nll of this model (kind 'causal_lm')",
    ),
    "steps of a causal model": (("ar", *COMMON, "--steps", 4), "--steps: only a denoiser has a T-step bound, got a causal_lm"),
    "draws of a causal model": (("ar", *COMMON, "--num-times", 4), "--num-times: only a denoiser has draws to average"),
    "steps of no measure": (
        ("dit", *COMMON, *ENERGY, "--measures", "joint_nll", "--steps", 4),
        "--steps: it is for nelbo, finite_step_elbo, got --measures joint_nll",
    ),
    "an energy that no measure uses": (
        ("dit", *COMMON, *ENERGY, "--measures", "nelbo"),
        "--energy: it is for joint_nll, finite_step_elbo, paper_joint, got --measures nelbo; leave it out",
    ),
    "draws of t of no measure": (
        ("dit", *COMMON, *ENERGY, "--measures", "joint_nll", "--num-times", 2),
        "--num-times: it is for nelbo, finite_step_elbo, paper_joint, got --measures joint_nll; leave it out",
    ),
    "0 steps": (("dit", *COMMON, "--steps", 0), "--steps: expected an int >= 1, got 0"),
    "0 windows": (("dit", "--windows", 0), "--length, --windows: expected numbers >= 1, got 128, 0"),
    "0 at a time": (("dit", *COMMON, "--batch-size", 0), "--batch-size: expected a number >= 1, got 0"),
    "0 draws of t": (("dit", *COMMON, "--num-times", 0), "--num-times: expected a number >= 1, got 0"),
    "blocks of text8": (("ar", *COMMON, "--blocks", "bos_eos"), "--blocks: expected a model whose tokenizer has"),
    "an empty text": (("dit", "--text", "text.txt", "empty.txt"), "--text: empty.txt: expected text, got an empty file"),
    "a short text": (
        ("dit", "--text", "text.txt", "short.txt"),
        "--text: short.txt: expected at least 128 tokens for one window",
    ),
    "a missing text": (
        ("dit", "--text", "nowhere.txt"),
        "--text: expected a file, a folder, 'bundled' or the name of a corpus, got nowhere.txt, which",
    ),
    "a text twice": (("dit", "--text", "text.txt", "text.txt"), "--text: expected each text once"),
    "a missing model": (("nowhere",), "nowhere: no such checkpoint"),
    "a run": (("run",), "expected a model's folder, got that of its run; name run/model"),
    "a trainer's checkpoint": (("checkpoint",), "got a checkpoint of kind 'trainer'; name its run's model folder"),
    "no tokenizer": (("bare",), "tokenizer: the model was saved without one"),
    "two models": (("dit", "ar"), "expected the folder of one model, got dit ar"),
    "a seed of 70 bits": (("dit", *COMMON, "--seed", 2**70), "seed: expected a 64-bit integer"),
    "a bad device": (("dit", *COMMON, "--device", "gpu"), "--device: expected cpu, or cuda or cuda:N"),
    "windows longer than the model reads": (
        ("short", *COMMON),
        "--length: expected at most 5, which is what the model reads, got 16",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(refused, mistake):
    arguments, message = MISTAKES[mistake]
    assert message in refused("eval", *arguments)
