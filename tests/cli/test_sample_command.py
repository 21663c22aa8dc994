"""edlm sample: that every option arrives, and what is printed; on models that nobody trained."""

from __future__ import annotations

import json
import re
import shlex
import sys

import pytest
import torch
from edlm import samplers
from edlm.cli.sample import EXAMPLES
from edlm.cli.sample_json import together
from edlm.data import CharTokenizer, tokenizer_from
from edlm.models import DiT
from untrained import save_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    save_models(folder)
    return folder


@pytest.fixture
def sample(edlm):
    """sample("dit", ...) -> (code, stdout, stderr)."""
    return lambda *arguments: edlm("sample", *arguments, "--device", "cpu")


@pytest.fixture
def spied(sample, monkeypatch):
    """The same -> the keyword arguments of each call of the sampler, which is really called."""
    calls = []

    def spy(name, real):
        def call(network, **options):
            calls.append({"sampler function": name} | options)
            return real(network, **options)

        monkeypatch.setattr(samplers, name, call)

    spy("generate", samplers.generate)
    spy("sample_autoregressive", samplers.sample_autoregressive)

    def run(*arguments):
        calls.clear()
        code, _, err = sample(*arguments)
        assert code == 0, err
        return list(calls)

    return run


SHORT = ("dit", "--num", 1, "--length", 6)
ENERGY = (*SHORT, "--energy", "ar")
REACHES = [
    (SHORT, ("--sampler", "first_hitting"), {"sampler": "first_hitting"}),
    (SHORT, ("--sampler", "left_to_right"), {"sampler": "left_to_right"}),
    (SHORT, ("--sampler", "remasking", "--remask-prob", 0.1), {"sampler": "remasking", "remask_prob": 0.1, "steps": 32}),
    (SHORT, ("--steps", 3), {"steps": 3}),
    (SHORT, ("--block-length", 3, "--context-length", 4), {"block_length": 3, "context_length": 4}),
    (SHORT, ("--temperature", 0.5), {"temperature": 0.5}),
    (SHORT, ("--top-k", 3), {"top_k": 3}),
    (SHORT, ("--top-p", 0.9), {"top_p": 0.9}),
    (SHORT, ("--min-p", 0.01), {"min_p": 0.01}),
    (SHORT, ("--stop", "x"), {"stop_token_id": 23}),
    (SHORT, ("--seed", 7), {"seed": 7, "batch_size": 1, "length": 6}),
    (ENERGY, ("--num-candidates", 3), {"num_candidates": 3}),
    (
        ENERGY,
        ("--num-candidates", "auto", "--ess-target", 2.5, "--max-candidates", 16),
        {"num_candidates": "auto", "ess_target": 2.5, "max_candidates": 16},
    ),
    (ENERGY, ("--window", 0.25, 1), {"window": (0.25, 1.0)}),
    (ENERGY, ("--window", "auto", "--window-ess", 0.5), {"window": "auto", "window_ess": 0.5}),
    (ENERGY, ("--energy-temperature", 2), {"energy_temperature": 2.0}),
    (ENERGY, ("--energy-batch-size", 4), {"energy_batch_size": 4}),
    (
        ENERGY,
        ("--num-particles", 3, "--resample-threshold", 0.25, "--resample-scheme", "residual"),
        {"num_particles": 3, "resample_threshold": 0.25, "resample_scheme": "residual"},
    ),
    (("ar", "--num", 1, "--length", 6), ("--top-k", 3, "--stop", "x"), {"top_k": 3, "stop_token_id": 23}),
    (SHORT, ("--history", "--json"), {"return_history": True}),
]


@pytest.mark.parametrize(("common", "options", "expected"), REACHES, ids=lambda value: str(value)[:40])
def test_an_option_reaches_the_sampler_and_nothing_else_does(spied, common, options, expected):
    (call,) = spied(*common, *options)
    assert {name: call[name] for name in expected} == expected
    base = {"sampler function", "batch_size", "length", "seed", "device", "on_step", "return_history", "progress"}
    base |= {"steps"} if expected.get("sampler") not in ("first_hitting", "left_to_right") and common[0] == "dit" else set()
    assert call.keys() == base | expected.keys() | ({"energy"} if common is ENERGY else set()) | (
        {"mask_token_id"} if common[0] == "ar" else set()
    )
    assert call["sampler function"] == ("sample_autoregressive" if common[0] == "ar" else "generate")
    assert call["return_history"] == ("--history" in options)


def test_batches_are_groups_of_texts_with_seeds_of_their_own(spied, sample):
    calls = spied("dit", "--num", 5, "--length", 6, "--batch-size", 2, "--seed", 3)
    assert [(call["batch_size"], call["seed"]) for call in calls] == [(2, 15), (2, 17), (1, 19)]
    assert len(spied("dit", "--num", 32, "--length", 2, "--steps", 1)) == 1
    assert len(spied("dit", "--num", 33, "--length", 2, "--steps", 1)) == 2


def test_an_autoregressive_model_is_sampled_from_left_to_right(sample):
    code, out, err = sample("ar", "--num", 3, "--length", 11)
    assert code == 0 and [len(text) for text in out.splitlines()] == [11] * 3 and err.startswith("# 11 model calls, 0 energy")
    prompt = "she was ____"
    code, out, _ = sample("ar", "--num", 2, "--prompt", prompt)
    assert code == 0 and all(text.startswith("she was ") and "_" not in text for text in out.splitlines())
    code, out, _ = sample("bpe_ar", "--num", 1, "--prompt", "she[MASK][MASK] very")
    assert code == 0 and out.startswith("she") and "[MASK]" not in out


DENOISERS_ONLY = {
    "--sampler": "left_to_right",
    "--steps": 4,
    "--remask-prob": 0.1,
    "--block-length": 4,
    "--context-length": 4,
    "--num-candidates": 2,
    "--num-particles": 2,
    "--energy": "ar",
}


@pytest.mark.parametrize("option", DENOISERS_ONLY)
def test_an_autoregressive_model_takes_no_option_of_denoisers(sample, option):
    code, out, err = sample("ar", option, DENOISERS_ONLY[option])
    assert (code, out) == (2, "") and err.startswith(f"edlm: error: {option}: it is for denoisers") and err.count("\n") == 1


# --- where texts end --------------------------------------------------------------------------------------------------------------


def test_a_text_ends_with_its_stop_token(sample):
    whole = sample("dit", "--num", 6, "--length", 30)[1].splitlines()
    code, out, _ = sample("dit", "--num", 6, "--length", 30, "--stop", "r")
    assert code == 0
    for text, full in zip(out.splitlines(), whole, strict=True):
        assert text == (full[: full.index("r") + 1] if "r" in full else full)
    plain = json.loads(sample("dit", "--num", 6, "--length", 30, "--stop", "r", "--json")[1])
    assert plain["texts"] == out.splitlines() and plain["lengths"] == [len(text) for text in plain["texts"]]
    assert [len(row) for row in plain["tokens"]] == plain["lengths"] and min(plain["lengths"]) < 30


def test_a_stop_token_by_text_by_name_and_by_id(spied):
    for text, token in ((" ", 26), ("17", 17), ("a", 0)):
        assert spied(*SHORT, "--stop", text)[0]["stop_token_id"] == token
    common = ("bpe", "--num", 1, "--length", 5, "--steps", 2)
    assert spied(*common, "--stop", "<|endoftext|>")[0]["stop_token_id"] == 0
    tokenizer = tokenizer_from(DiT.from_pretrained("bpe").tokenizer_description)
    word = max(range(257, tokenizer.mask_token_id), key=lambda i: len(tokenizer.decode([i])))
    assert spied(*common, "--stop", tokenizer.decode([word]))[0]["stop_token_id"] == word
    assert spied(*common, "--stop", "270")[0]["stop_token_id"] == 270
    (digit,) = tokenizer.encode("7").tolist()  # as it is written, where that is a token
    assert spied(*common, "--stop", "7")[0]["stop_token_id"] == digit != 7


def test_prompts_of_a_file_are_each_as_long_as_they_are(sample, spied, folder):
    prompts = ["she was ___ very", "_", "it  is_ to ________", "____"]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    for model, more in (("dit", ("--energy", "ar", "--window", 0, 1)), ("dit", ("--sampler", "first_hitting")), ("ar", ())):
        code, out, err = sample(model, "--prompt-file", "prompts.txt", "--batch-size", 3, "--num", 2, *more)
        assert code == 0, err
        texts = out.split("\n")[:-1]
        assert len(texts) == 8
        for text, prompt in zip(texts, [p for p in prompts for _ in range(2)], strict=True):
            assert len(text) == len(prompt)
            assert all(given in ("_", got) for given, got in zip(prompt, text, strict=True)) and "_" not in text
    calls = spied("dit", "--prompt-file", "prompts.txt", "--batch-size", 3, "--num", 2, "--seed", 1)
    assert [call["seed"] for call in calls] == [8, 11, 14]
    assert calls[0]["lengths"].tolist() == [16, 16, 1] and calls[0]["pad_token_id"] == 27
    # What stands beside a prompt does not change its text.
    alone = [sample("dit", "--prompt", p, "--num", 1, "--seed", n)[1] for n, p in enumerate(prompts)]
    assert sample("dit", "--prompt-file", "prompts.txt")[1] == "".join(alone)


def test_prompts_of_a_file_may_be_bpe_with_other_line_ends(sample, folder):
    (folder / "lines.txt").write_bytes(b"she was[MASK][MASK]\r\nvery[MASK] miss")
    code, out, err = sample("bpe", "--prompt-file", "lines.txt")
    assert code == 0, err
    assert out.startswith("she was") and "[MASK]" not in out and "\r" not in out


# --- JSON -------------------------------------------------------------------------------------------------------------------------


def test_json_has_all_that_there_is(sample):
    common = ("dit", "--num", 3, "--length", 8, "--steps", 4, "--energy", "ar", "--window", 0.5, 1)
    plain = json.loads(sample(*common, "--num-particles", 2, "--history", "--json")[1])
    assert plain.keys() == {
        "texts", "tokens", "lengths", "seeds", "nfe", "energy_nfe", "step_times", "num_candidates", "ess", "log_Z", "energy",
        "history", "particles", "stage_seconds",
    }  # fmt: skip
    steps = len(plain["step_times"])
    assert len(plain["history"]) == steps + 1 and len(plain["history"][0]) == 3 and plain["history"][-1] == plain["tokens"]
    assert set(plain["history"][0][0]) == {27} and plain["seeds"] == [0, 1, 2]
    assert plain["ess"][0] == [pytest.approx(x) for x in plain["ess"][0]] and None in plain["ess"][-1]
    assert {len(row) for name in ("ess", "log_Z", "energy", "num_candidates") for row in plain[name]} == {3}
    particles = plain["particles"]
    assert [len(row) for row in particles["log_weights"]] == [2, 2, 2] and len(particles["log_Z"]) == 3
    assert isinstance(particles["resampled"][0][0], bool) and len(particles["tokens"][0]) == 2
    bare = json.loads(sample(*SHORT, "--json")[1])
    assert bare["history"] is None and bare["particles"] is None and {x for row in bare["ess"] for x in row} == {None}


@pytest.mark.parametrize("more", [(), ("--energy", "ar", "--window", 0.3, 1, "--num-particles", 2)])
def test_batches_are_one_document(sample, more):
    """Networks of this size do not feel how many rows they are given."""
    common = ("dit", "--num", 5, "--length", 12, "--steps", 6, "--json", "--history", *more)
    one, many = (json.loads(sample(*common, "--batch-size", n)[1]) for n in (5, 2))
    assert many["texts"] == one["texts"] and many["lengths"] == one["lengths"] and many["seeds"] == one["seeds"]
    assert many["nfe"] > one["nfe"] and len(many["step_times"]) <= len(one["step_times"])
    for b in range(5):
        own = [[row[b] for row in plain["ess"] if row[b] is not None] for plain in (one, many)]
        assert own[0] == pytest.approx(own[1], rel=1e-4)
        assert [row[b] for row in many["history"]][-1] == one["history"][-1][b]


def test_together_pads_steps_and_columns():
    def output(batch, length, seed):
        prompt = torch.full((batch, length), 2)
        return samplers.generate(Uniform(), prompt=prompt, steps=9, seed=seed, return_history=True)

    class Uniform:
        mask_token_id, vocab_size = 2, 3

        def __call__(self, xt, t):
            return torch.zeros(*xt.shape, 3)

    parts = [output(2, 4, 0), output(1, 7, 5)]
    whole = together(parts, 2)
    assert whole.tokens.shape == (3, 7) and (whole.tokens[:2, 4:] == 2).all() and whole.lengths.tolist() == [4, 4, 7]
    steps = max(len(p.step_times) for p in parts)
    assert whole.history.shape == (steps + 1, 3, 7) and whole.ess.shape == whole.num_candidates.shape == (steps, 3)
    assert torch.equal(whole.history[-1], whole.tokens) and whole.nfe == sum(p.nfe for p in parts)
    for first, part in ((0, parts[0]), (2, parts[1])):
        mine = whole.step_times[:, first : first + len(part.tokens)]
        assert torch.equal(mine[: len(part.step_times)].nan_to_num(-1), part.step_times.nan_to_num(-1))
        assert mine[len(part.step_times) :].isnan().all()


# --- a page, and a live view ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["dit", "ar"])
def test_a_page_of_the_first_batch(sample, spied, folder, model):
    code, out, err = sample(model, "--num", 3, "--length", 9, "--batch-size", 2, "--html", "page.html")
    assert code == 0 and len(out.splitlines()) == 3 and "# written: page.html" in err
    page = (folder / "page.html").read_text()
    first, second, third = out.splitlines()
    assert first in page and second in page and third not in page and "model" in page
    calls = spied(model, "--num", 3, "--length", 9, "--batch-size", 2, "--html", "page.html")
    assert [call["return_history"] for call in calls] == [True, False]


def test_a_page_says_how_its_texts_were_made(sample, folder):
    more = ("--energy", "ar", "--carry-over", "--stop", "q", "--num", 1)
    assert sample("dit", "--length", 9, "--html", "page.html", *more)[0] == 0
    assert settings(folder / "page.html") == {
        "model": "dit", "energy": "ar", "carry_over": "True", "length": "9", "stop": "q", "seed": "0", "steps": "32",
    }  # fmt: skip
    assert sample("dit", "--prompt", "she ___", "--steps", 3, "--html", "page.html")[0] == 0
    assert settings(folder / "page.html") == {"model": "dit", "prompt": "she ___", "seed": "0", "steps": "3"}


def settings(page):
    rows = re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td></tr>', page.read_text())
    return dict(rows)


WATCHED = {
    "plain": (),
    "batches": ("--batch-size", 2),
    "particles": ("--energy", "ar", "--window", 0, 1, "--num-particles", 4),
    "a stop": ("--stop", "r"),
    "an autoregressive model": ("--stop", "r"),
    "lengths": ("--prompt-file", "lengths"),
    "all of it": ("--prompt-file", "lengths", "--stop", "r", "--energy", "ar", "--window", 0, 1, "--num-particles", 3),
}


@pytest.mark.parametrize("what", WATCHED)
def test_watching_changes_nothing_of_what_is_printed(sample, folder, monkeypatch, what):
    pytest.importorskip("rich")
    from edlm.view import Watch

    (folder / "lengths").write_text("she ___\n____________ was __\n__\n")
    length = () if "--prompt-file" in WATCHED[what] else ("--num", 3, "--length", 20)
    arguments = ("ar" if "auto" in what else "dit", *length, *WATCHED[what])
    plain = sample(*arguments)[1]
    seen, call = [], Watch.__call__
    monkeypatch.setattr(Watch, "__call__", lambda self, report: seen.append(report.number) or call(self, report))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    code, out, err = sample(*arguments, "--watch")
    assert code == 0, err
    assert seen.count(0) == (2 if what == "batches" else 1) and len(seen) > 1
    assert "step 1 of" in out and "\x1b[2K" in out  # it was shown, and has vanished
    assert out.endswith(plain) or what == "batches"
    assert screen(out) == plain.splitlines()


def screen(written):
    """What a terminal holds in the end: lines, without what was erased and coloured."""
    lines, row, column = [""], 0, 0
    for code, character in re.findall(r"\x1b\[([?\d;]*[A-Za-z])|([\s\S])", written):
        if code.endswith("A"):
            row -= int(code[:-1])
        elif code == "2K":
            lines[row] = ""
        elif code:
            assert code[-1] in "mhl", code
        elif character == "\r":
            column = 0
        elif character == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = (
                (lines[row].ljust(column) + character)
                if column >= len(lines[row])
                else (lines[row][:column] + character + lines[row][column + 1 :])
            )
            column += 1
    while lines and not lines[-1]:
        lines.pop()
    return lines


# --- the examples of the help -----------------------------------------------------------------------------------------------------

RENAMED = {"runs/denoiser/model": "dit", "runs/ar/model": "ar", "5000": "3", "1000": "24", "128": "16", "64": "8"}
LINES = [line for line in EXAMPLES.splitlines() if line.startswith("edlm ")]


def test_every_example_runs(sample, folder, monkeypatch):
    """In their order: one of them goes on from another. As they stand, but for the models' folders, and shorter."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert len(LINES) >= 10
    for line in LINES:
        if "--watch" in line:
            pytest.importorskip("rich")
        command, *arguments = shlex.split(line, comments=True)[1:]
        assert command == "sample"
        code, out, err = sample(*(RENAMED.get(word, word) for word in arguments))
        assert code == 0, f"{line}: {err}"
        assert out.strip() and "error" not in err
    assert (folder / "replay.html").is_file() and (folder / "texts.jsonl").is_file()


# --- mistakes ---------------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "a stop of several tokens": (
        ("dit", "--stop", "she"),
        "--stop: expected one token as text, or its id, got 'she', which is 3",
    ),
    "no stop": (("dit", "--stop", ""), "--stop: expected one token as text, or its id, got '', which is no tokens"),
    "a stop of several tokens, BPE": (
        ("bpe", "--stop", "zebra"),
        "--stop: expected one token as text, the name of a special one (<|endoftext|>), or its id, got 'zebra'",
    ),
    "a stop outside": (("dit", "--stop", "28"), "--stop: expected a token of the model's vocabulary, ids 0 .. 27, got '28'"),
    "a stop that is not written": (("dit", "--stop", "\u00e9"), "--stop: expected one token as text, or its id"),
    "the mask as a stop": (("dit", "--stop", "_"), "--stop: expected a token that can be drawn, got the mask ('_')"),
    "resume nothing": (("dit", "--resume"), "--resume: it is for a file, got none; give --out"),
    "a file nowhere": (("dit", "--out", "no/where.jsonl"), "--out: expected a file in a folder that exists, got no/where.jsonl"),
    "a page nowhere": (("dit", "--html", "no/where.html"), "--html: expected a file in a folder that exists, got no/where.html"),
    "a file and JSON": (("dit", "--out", "x.jsonl", "--json"), "--json: it shows what is decoded here and now, got --out"),
    "a file and a page": (("dit", "--out", "x.jsonl", "--html", "x.html"), "--html: it shows what is decoded here"),
    "history of nothing": (("dit", "--history"), "--history: it is a part of what --json prints"),
    "a watch without a terminal": (("dit", "--watch"), "--watch: expected a terminal on standard output"),
    "batches of 0": (("dit", "--batch-size", 0), "--batch-size: expected a number >= 1, got 0"),
    "no threads": (("dit", "--threads", 0), "--threads: expected a number >= 1, got 0"),
    "a window without an energy": (("dit", "--window", "0", "1"), "--window: it is about an energy, got none"),
    "an ESS target of a fixed K": (
        ("dit", "--energy", "ar", "--ess-target", "2"),
        "--ess-target: it is for --num-candidates auto",
    ),
    "an ESS of a fixed window": (("dit", "--energy", "ar", "--window-ess", "0.5"), "--window-ess: it is for --window auto"),
    "resampling of one": (("dit", "--energy", "ar", "--resample-scheme", "residual"), "--resample-scheme: it is for several"),
    "a scheme that is none": (
        ("dit", "--energy", "ar", "--num-particles", "2", "--resample-scheme", "best"),
        "error: --resample-scheme: expected one of",
    ),
    "particles without an energy": (("dit", "--num-particles", "2"), "error: --num-particles: 2 particles need an energy"),
    "auto without an energy": (("dit", "--num-candidates", "auto"), "error: --num-candidates: auto candidates need an energy"),
    "remasking of another sampler": (("dit", "--remask-prob", "0.1"), "error: --remask-prob: it is for the remasking sampler"),
    "more candidates than memory": (
        ("dit", "--energy", "ar", "--num-candidates", str(10**9)),
        f"error: --num-candidates: {10**9} candidates of 4 sequences",
    ),
    "an energy of another vocabulary": (
        ("dit", "--energy", "bpe_ar"),
        "--energy: expected a model with the denoiser's tokenizer",
    ),
    "particles of automatic candidates": (
        ("dit", "--energy", "ar", "--num-candidates", "auto", "--num-particles", "2"),
        "error: --num-candidates, --window: expected numbers with particles",
    ),
    "prompts longer than the model": (("short", "--prompt-file", "long"), "error: --prompt-file, --length: the denoiser takes"),
    "prompts that are not there": (
        ("dit", "--prompt-file", "none.txt"),
        "--prompt-file: none.txt: expected a file of prompts, got: No such file",
    ),
    "prompts in a folder": (
        ("dit", "--prompt-file", "dit"),
        "--prompt-file: dit: expected a file of prompts, got: Is a directory",
    ),
    "prompts that are not UTF-8": (("dit", "--prompt-file", "latin"), "--prompt-file: latin: expected UTF-8, got byte 0xe9 at 3"),
    "a page of no name": (("dit", "--html", ""), "--html: expected the name of a file, got an empty name; name a file, such as"),
    "a page that is this folder": (("dit", "--html", "."), "--html: expected the name of a file, got the folder ."),
    "a page that is a folder": (("dit", "--html", "ar"), "got the folder ar; name a file, such as ar/replay.html"),
    "a file of no name": (("dit", "--out", ""), "--out: expected the name of a file, got an empty name"),
    "a file that is this folder": (("dit", "--out", "."), "--out: expected the name of a file, got the folder ."),
    "too many threads": (("dit", "--threads", 100000), "--threads: expected a number in 1 .. "),
    "no prompts": (("dit", "--prompt-file", "empty"), "--prompt-file: empty: expected a prompt a line, got an empty file"),
    "a prompt without a mask": (("dit", "--prompt-file", "full"), "--prompt-file: full, line 2: prompt: expected _ wherever"),
    "a prompt with odd characters": (("dit", "--prompt-file", "odd"), "--prompt-file: odd, line 1: prompt: expected a-z"),
    "prompts and a length": (("dit", "--prompt-file", "full", "--length", "3"), "--length: the prompts of a file say how long"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(sample, folder, mistake, monkeypatch):
    (folder / "empty").write_text("")
    (folder / "full").write_text("a_\nbc\n")
    (folder / "odd").write_text("a_!\n")
    (folder / "long").write_text("_" * 9 + "\n")
    (folder / "latin").write_bytes("caf\u00e9_".encode("latin-1"))
    arguments, message = MISTAKES[mistake]
    if arguments[1] in ("--html", "--out"):
        monkeypatch.setattr(samplers, "generate", None)  # it is not reached
    code, out, err = sample(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("edlm: error: ") and err.count("\n") == 1 and message in err
    assert not list(folder.glob("*.part"))


def test_a_prompt_longer_than_the_denoiser_says_so(sample, folder):
    code, _, err = sample("short", "--prompt", "she ____")
    assert code == 2 and "the denoiser takes at most 5 tokens (max_length)" in err
    assert err.endswith("or decode in blocks: --block-length 2, --context-length 5\n")
    code, _, err = sample("short", "--length", 8, "--out", "long.jsonl")
    assert code == 2 and "max_length" in err and not list(folder.glob("long.jsonl*"))
    assert len(sample("short", "--num", 1)[1]) == 5 + 1  # what it can, if nobody says
    assert len(sample("dit", "--num", 1, "--steps", 1)[1]) == 128 + 1
    assert len(sample("short", "--num", 1, "--block-length", 4, "--steps", 1)[1]) == 128 + 1


def test_text8_tokens_are_what_the_tests_say():
    assert CharTokenizer().encode_prompt("x _a").tolist() == [23, 26, 27, 0]
