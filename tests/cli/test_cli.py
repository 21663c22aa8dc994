"""The command line, end to end on two models that were trained for a few steps; and one line for every mistake."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from edlm import checkpoint
from edlm.cli import COMMANDS, build_parser, main
from edlm.models import CausalLM, CausalLMConfig
from tiny_run import assert_same_weights, tiny_values, toml, write_text

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """runs/dit and runs/ar, made by ``edlm train``; text.txt; bad/: what is not a model."""
    folder = tmp_path_factory.mktemp("cli")
    text = write_text(folder)
    for kind, run in (("dit", "dit"), ("causal_lm", "ar")):
        (folder / f"{run}.toml").write_text(toml(tiny_values(kind, text, steps=8)))
        arguments = ["train", str(folder / f"{run}.toml"), "--out", str(folder / "runs" / run), "--quiet", "--device", "cpu"]
        assert main(arguments) == 0
    nce = tiny_values("nce_energy", text, steps=4, nce={"proposal": str(folder / "runs" / "dit" / "model")})
    nce["model"] = {"kind": "nce_energy"}
    (folder / "nce.toml").write_text(toml(nce))
    assert main(["train", str(folder / "nce.toml"), "--out", str(folder / "runs" / "nce"), "--quiet", "--device", "cpu"]) == 0
    (folder / "empty.txt").write_text(" \n")
    (folder / "short.txt").write_text("short")
    shutil.copytree(folder / "runs" / "dit" / "model", folder / "corrupt")
    file = folder / "corrupt" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    bare = CausalLM(CausalLMConfig(vocab_size=27, bos_token_id=27, dim=16, num_layers=1, num_heads=2))
    bare.save_pretrained(folder / "bare")
    return folder


DIT, AR = "runs/dit/model", "runs/ar/model"

# --- help and information ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(capsys, command):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert done.value.code == 0
    assert f"usage: edlm {command}" in shown and "examples:" in shown and f"edlm {command}" in shown.split("examples:")[1]


def test_the_whole_has_help_too(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    shown = capsys.readouterr().out
    assert done.value.code == 0 and all(command in shown for command in COMMANDS)
    with pytest.raises(SystemExit) as done:
        main([])
    assert done.value.code == 2
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out.startswith("edlm 0.")


def test_examples_are_commands_that_parse():
    import shlex

    lines = [
        line
        for name in COMMANDS
        for line in importlib.import_module(f"edlm.cli.{name}").EXAMPLES.splitlines()
        if line.startswith("edlm ")
    ]
    assert len(lines) >= 9
    for line in lines:
        build_parser().parse_args(shlex.split(line, comments=True)[1:])


def test_info(edlm):
    code, out, _ = edlm("info")
    assert code == 0
    assert torch.__version__ in out and "sample_candidates" in out and "cuda" in out
    code, out, _ = edlm("info", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["torch"] == torch.__version__ and set(facts["ops"]["sample_candidates"]) == {"cpu", "cuda"}


# --- train ------------------------------------------------------------------------------------------------------------------------


def test_train_says_where_the_model_is_and_does_not_train_it_again(edlm):
    code, out, _ = edlm("train", "dit.toml", "--out", "runs/dit", "--quiet")
    assert (code, out) == (0, f"trained: {DIT}\n")


def test_set_overrides_and_quiet_is_quiet(edlm, folder):
    code, _, err = edlm("train", "dit.toml", "--out", "runs/other", "--set", "steps=3", "--set", "model.dim=8", "--device", "cpu")
    assert code == 0 and "train" in err and "bits/char" in err
    config = json.loads((folder / "runs" / "other" / "config.json").read_text())
    assert config["steps"] == 3 and config["model"]["dim"] == 8
    again = ("--set", "steps=3", "--set", "model.dim=8", "--quiet")
    code, _, err = edlm("train", "dit.toml", "--out", "runs/quiet", *again)
    assert (code, err) == (0, "")
    assert_same_weights(folder / "runs" / "quiet" / "model", folder / "runs" / "other" / "model")


# --- sample -----------------------------------------------------------------------------------------------------------------------


def test_sample(edlm):
    code, out, err = edlm("sample", DIT, "--num", 3, "--length", 15, "--steps", 4)
    assert code == 0
    texts = out.splitlines()
    assert len(texts) == 3 and all(len(text) == 15 and set(text) <= set("abcdefghijklmnopqrstuvwxyz ") for text in texts)
    assert err.startswith("# 4 denoiser calls, 0 energy calls; denoise ")
    assert edlm("sample", DIT, "--num", 3, "--length", 15, "--steps", 4)[1] == out
    assert edlm("sample", DIT, "--num", 3, "--length", 15, "--steps", 4, "--seed", 9)[1] != out
    # Text n uses seed * num + n: two seeds share none.
    assert edlm("sample", DIT, "--num", 1, "--length", 15, "--steps", 4, "--seed", 2)[1] == texts[2] + "\n"
    assert len(edlm("sample", DIT, "--num", 1, "--steps", 1)[1]) == 16 + 1  # as long as it was trained for


def test_sample_with_an_energy(edlm):
    common = ("sample", DIT, "--num", 2, "--length", 16, "--steps", 4, "--window", 0, 1, "--num-candidates", 4)
    code, out, err = edlm(*common, "--energy", AR)
    assert code == 0 and len(out.splitlines()) == 2
    assert err.startswith("# 4 denoiser calls, 4 energy calls, ESS ") and 1 <= float(err.split("ESS ")[1].split()[0]) <= 4
    assert edlm(*common, "--energy", AR)[1] == out
    # In coAR the energy is another one, and what is picked as well; the default window is the first fifth of the steps.
    by_energy = [edlm(*common, "--energy", AR, "--json", *more)[1] for more in ((), ("--carry-over",))]
    full, carried = (json.loads(text) for text in by_energy)
    assert full["ess"][0] == pytest.approx(carried["ess"][0], rel=1e-4)  # all is masked: the two are one
    assert full["ess"] != carried["ess"]
    assert json.loads(edlm("sample", DIT, "--length", 16, "--steps", 10, "--energy", AR, "--json")[1])["energy_nfe"] == 2


def test_sample_with_an_nce_energy(edlm):
    common = ("sample", DIT, "--num", 2, "--length", 16, "--steps", 4, "--window", 0, 1, "--num-candidates", 4)
    code, out, err = edlm(*common, "--energy", "runs/nce/model")
    assert code == 0 and len(out.splitlines()) == 2
    assert err.startswith("# 4 denoiser calls, 4 energy calls, ESS ") and 1 <= float(err.split("ESS ")[1].split()[0]) <= 4


def test_json_has_nulls_and_no_nan(edlm):
    arguments = ("--num", 2, "--length", 12, "--steps", 5, "--energy", AR, "--window", 0.5, 1)
    code, out, _ = edlm("sample", DIT, *arguments, "--json")

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    sample = json.loads(out, parse_constant=refuse)
    assert code == 0
    assert len(sample["texts"]) == 2 and all(len(row) == 12 for row in sample["tokens"])
    assert sample["nfe"] == 5 and sample["energy_nfe"] == 3
    flat = [x for row in sample["ess"] for x in row]
    assert None in flat and any(isinstance(x, float) and 1 <= x <= 8 for x in flat)
    assert set(sample["stage_seconds"]) == {"denoise", "propose", "energy", "select", "reverse"}
    assert sample["texts"] == edlm("sample", DIT, *arguments)[1].splitlines()


@pytest.mark.parametrize("more", [(), ("--energy", AR, "--window", "0", "1"), ("--sampler", "first_hitting")])
def test_a_prompt_keeps_what_it_gives(edlm, more):
    prompt = "She  was __ so__"
    code, out, _ = edlm("sample", DIT, "--prompt", prompt, "--num", 3, *more)
    assert code == 0 and len(out.splitlines()) == 3
    for text in out.splitlines():
        assert len(text) == len(prompt) and "_" not in text
        assert all(given in ("_", got) for given, got in zip(prompt.lower(), text, strict=True))


def test_first_hitting_and_filters(edlm):
    code, out, err = edlm(
        "sample", DIT, "--num", 1, "--length", 9, "--sampler", "first_hitting", "--energy", AR, "--window", 0, 1
    )
    assert code == 0 and len(out) == 10 and err.startswith("# 9 denoiser calls, 9 energy calls")
    greedy = ("sample", DIT, "--num", 1, "--length", 9, "--steps", 3)
    assert edlm(*greedy, "--temperature", 0)[1] == edlm(*greedy, "--top-k", 1)[1]
    assert edlm(*greedy, "--top-p", 0.5, "--min-p", 0.1, "--energy", AR, "--energy-temperature", 0)[0] == 0


# --- convert ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [DIT, AR, "runs/nce/model"])
def test_convert_halves_the_file_and_rounds_the_weights(edlm, folder, model):
    out = "half_" + model.split("/")[1]
    code, said, _ = edlm("convert", model, out)
    assert code == 0 and said.startswith(f"written: {out}, ") and "as bfloat16" in said
    before, after = (checkpoint.load(folder / path) for path in (model, out))
    assert (after.kind, after.meta) == (before.kind, before.meta)
    for name, weight in after.tensors["model"].items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, before.tensors["model"][name].bfloat16())
    sizes = [(folder / path / "model.safetensors").stat().st_size for path in (model, out)]
    assert sizes[1] < 0.7 * sizes[0]
    if model == DIT:
        assert edlm("sample", out, "--num", 1, "--length", 9, "--steps", 2)[0] == 0


# --- mistakes ---------------------------------------------------------------------------------------------------------------------

TRAIN = ("train", "dit.toml", "--out", "runs/new")
SAMPLE = ("sample", DIT, "--length", "8")
ENERGY = (*SAMPLE, "--energy", AR)
CHECKPOINT = "runs/dit/checkpoints/step_00000008"
MISTAKES = {
    "unknown key in the file": (
        ("train", "unknown.toml", "--out", "runs/new"),
        "unknown.toml: unknown key stepz; did you mean steps?",
    ),
    "not TOML": (("train", "broken.toml", "--out", "runs/new"), "broken.toml: expected TOML, got a syntax error"),
    "no such file": (("train", "missing.toml", "--out", "runs/new"), "missing.toml"),
    "unknown --set key": ((*TRAIN, "--set", "optim.learning=1"), "unknown key optim.learning"),
    "--set without a value": ((*TRAIN, "--set", "steps"), "--set: expected key=value"),
    "--set of another type": ((*TRAIN, "--set", "steps=many"), "steps: expected int, got 'many'"),
    "train on a bad device": ((*TRAIN, "--device", "gpu"), "--device: expected cpu, or cuda or cuda:N"),
    "another configuration": (
        ("train", "dit.toml", "--out", "runs/dit", "--set", "steps=9"),
        "another configuration (steps differ)",
    ),
    "train on a missing text": ((*TRAIN, "--set", "data.text=nowhere.txt"), "nowhere.txt, which does not exist"),
    "train on an empty text": ((*TRAIN, "--set", "data.text=empty.txt"), "empty.txt: expected text, got an empty file"),
    "train on a short text": (
        (*TRAIN, "--quiet", "--set", "data.text=short.txt"),
        "short.txt: valid: text: expected at least one",
    ),
    "train on an unknown dataset": ((*TRAIN, "--set", "data.text=openwebtxt"), "openwebtext"),
    "train with a tokenizer that is not there": (
        (*TRAIN, "--set", "data.tokenizer=gpt9"),
        "tokenizer: expected 'text8', a tokenizer.json",
    ),
    "train on tokens that are not there": (
        (*TRAIN, "--set", "data.tokens=nowhere"),
        "expected a token folder, got no such folder",
    ),
    "NCE without a proposal": (
        (*TRAIN, "--set", "model.kind=nce_energy"),
        "nce: expected a table [nce] with the proposal's folder",
    ),
    "carry-over with an NCE energy": (
        (*SAMPLE, "--energy", "runs/nce/model", "--carry-over"),
        "--carry-over: expected an autoregressive model as the energy, got runs/nce/model of kind 'nce_energy'",
    ),
    "convert a run": (("convert", "runs/dit", "runs/half"), "name runs/dit/model"),
    "convert a trainer's checkpoint": (("convert", CHECKPOINT, "runs/half"), "got a checkpoint of kind 'trainer'"),
    "convert onto a file": (("convert", DIT, "text.txt"), "out: expected the name of a new folder, got text.txt, which is there"),
    "convert onto a model": (("convert", DIT, AR), f"out: expected the name of a new folder, got {AR}, which is there"),
    "missing model": (("sample", "nowhere"), "nowhere: no such checkpoint"),
    "corrupt model": (("sample", "corrupt"), "corrupt checkpoint: model.safetensors: expected"),
    "an energy as a denoiser": (("sample", "runs/nce/model"), "expected a model (dit, causal_lm), got a checkpoint of kind 'nce"),
    "a denoiser as energy": (
        (*SAMPLE, "--energy", DIT),
        "--energy: expected a model of kind 'nce_energy' or 'causal_lm', got runs/dit/model of kind 'dit'",
    ),
    "a trainer's checkpoint as denoiser": (
        ("sample", CHECKPOINT),
        "got a checkpoint of kind 'trainer'; name its run's model folder",
    ),
    "a run as a model": (("sample", "runs/dit"), "expected a model's folder, got that of its run; name runs/dit/model"),
    "a run as an energy": ((*SAMPLE, "--energy", "runs/ar"), "name runs/ar/model"),
    "a file as a model": (("sample", "text.txt"), "expected a checkpoint folder, got a file"),
    "an energy without a tokenizer": ((*SAMPLE, "--energy", "bare"), "--energy: expected a model with the denoiser's tokenizer"),
    "a prompt without masks": (
        ("sample", DIT, "--prompt", "all is said"),
        "prompt: expected the mask (27) wherever text is wanted",
    ),
    "a prompt with other characters": (("sample", DIT, "--prompt", "it's _"), "prompt: expected a-z, spaces and _"),
    "an empty prompt": (("sample", DIT, "--prompt", ""), "prompt: expected the mask"),
    "a prompt and another length": (("sample", DIT, "--prompt", "a_", "--length", "5"), "length: the prompt has 2, got 5"),
    "steps 0": ((*SAMPLE, "--steps", "0"), "error: --steps: expected an int >= 1"),
    "steps of first-hitting": ((*SAMPLE, "--sampler", "first_hitting", "--steps", "4"), "steps: the first-hitting sampler"),
    "length 0": (("sample", DIT, "--length", "0"), "length: expected an int >= 1"),
    "num 0": ((*SAMPLE, "--num", "0"), "--num: expected a number >= 1, got 0"),
    "a window too wide": ((*ENERGY, "--window", "0", "1.5"), "window: expected 0 <= lo <= hi <= 1, got (0.0, 1.5)"),
    "a window below 0": ((*ENERGY, "--window", "-0.1", "1"), "window: expected 0 <= lo <= hi <= 1"),
    "a window the wrong way": ((*ENERGY, "--window", "1", "0"), "window: expected 0 <= lo <= hi <= 1"),
    "a window of nan": ((*ENERGY, "--window", "nan", "1"), "window: expected 0 <= lo <= hi <= 1"),
    "K 0": ((*ENERGY, "--num-candidates", "0"), "--num-candidates: expected an int >= 1, or auto, got 0"),
    "K without an energy": ((*SAMPLE, "--num-candidates", "4"), "4 candidates need an energy to choose by"),
    "carry-over without an energy": ((*SAMPLE, "--carry-over"), "--carry-over: it is a way to score with an energy, got none"),
    "a negative temperature": ((*SAMPLE, "--temperature", "-1"), "temperature"),
    "a negative energy temperature": ((*ENERGY, "--energy-temperature", "-1"), "--energy-temperature: expected a number >= 0"),
    "top-k 0": ((*SAMPLE, "--top-k", "0"), "top_k"),
    "top-p 2": ((*SAMPLE, "--top-p", "2"), "top_p"),
    "a seed of 70 bits": ((*SAMPLE, "--seed", str(2**70)), "seed: expected a 64-bit integer"),
    "a bad device": (
        (*SAMPLE, "--device", "gpu"),
        "--device: expected cpu, or cuda or cuda:N where there is such a GPU, got 'gpu'",
    ),
    "a device that does not compute": ((*SAMPLE, "--device", "meta"), "--device: "),
    "a GPU that is not there": ((*SAMPLE, "--device", "cuda:99"), "got 'cuda:99'"),
    "two rounds": (("bench", "ops", "--smoke", "--repetitions", "2"), "--repetitions: expected at least 3, for quartiles, got 2"),
    "tables of text": (
        ("bench", "ops", "--markdown", "short.txt"),
        "--markdown: short.txt: expected a file that --json wrote, got no JSON",
    ),
    "tables of nothing": (("bench", "ops", "--markdown", "no.json"), "no.json"),
    "results nowhere": (
        ("bench", "ops", "--smoke", "--json", "no/where.json"),
        "--json: expected a file in a folder that exists",
    ),
    "a demo of one text": (("demo", "--num", "1", "--out", "runs/new"), "num_samples: expected at least 2 texts"),
    "a demo without steps": (("demo", "--ar-steps", "0", "--out", "runs/new"), "steps: expected a number >= 1, got 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(edlm, folder, mistake):
    (folder / "unknown.toml").write_text("stepz = 3\n" + toml(tiny_values("dit", folder / "text.txt")))
    (folder / "broken.toml").write_text("steps = = 3\n")
    arguments, message = MISTAKES[mistake]
    code, out, err = edlm(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("edlm: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert message in err
    assert not (folder / "runs" / "new" / "config.json").exists()


def test_a_message_of_many_lines_becomes_one(edlm, folder):
    """torch's list of weights that do not fit, for example."""
    stored = checkpoint.load(folder / DIT)
    wrong = {name: tensor for name, tensor in stored.tensors["model"].items() if "norm" not in name}
    checkpoint.save(folder / "wrong", kind="dit", meta=stored.meta, tensors={"model": wrong})
    code, _, err = edlm("sample", "wrong")
    assert code == 2 and err.count("\n") == 1 and "expected the weights of its own configuration" in err


ARGPARSE = [
    (["fly"], "COMMAND: invalid choice: 'fly'"),
    ([], "the following arguments are required: COMMAND"),
    (["bench"], "the following arguments are required"),
    (["bench", "fly"], "suite: invalid choice: 'fly'"),
    (["bench", "ops", "--quick", "--full"], ""),
    (["sample", "x", "--sampler", "best"], "--sampler: invalid choice: 'best'"),
    (["sample", "x", "--num", "many"], "invalid int value: 'many'; see edlm sample --help"),
    (["sample", "x", "--num-candidates", "some"], "--num-candidates: expected a number, or auto, got 'some'"),
    (["train", "x.toml"], "the following arguments are required: --out; see edlm train --help"),
    (["data", "build", "x"], "the following arguments are required: --tokenizer, --out; see edlm data build --help"),
    (
        ["sample", "--energy", "ar", "--window", "0", "1", "dit"],
        "--window: expected LO HI, or auto, got 3 values; put the model's folder before the options",
    ),
    (["sample", "--window", "auto", "dit"], "--window: expected LO HI, or auto, got 2 values; put the model's folder before"),
    (["sample", "dit", "--window", "0.5"], "--window: expected LO HI, or auto, got 0.5"),
    (["sample", "dit", "--window", "all", "1"], "--window: expected LO HI, or auto, got all 1"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGPARSE, ids=lambda value: " ".join(value)[:40])
def test_what_does_not_parse_is_one_line_too(capsys, arguments, message):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    captured = capsys.readouterr()
    assert (done.value.code, captured.out) == (2, "")
    assert captured.err.startswith("edlm: error: ") and captured.err.count("\n") == 1 and message in captured.err


ALLOCATIONS = {
    "cpu": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes."
        ),
        " (tried to allocate 400 bytes)",
    ),
    "gpu": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\n a total"),
        " (tried to allocate 2.00 gib)",
    ),
    "python": (MemoryError(), ""),
}


@pytest.mark.parametrize("where", ALLOCATIONS)
def test_out_of_memory_is_a_line_and_what_to_do(edlm, monkeypatch, where):
    error, wanted = ALLOCATIONS[where]

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("edlm.samplers.generate", fail)
    code, out, err = edlm(*SAMPLE)
    assert (code, out) == (2, "") and err == (
        f"edlm: error: sample: out of memory{wanted}; take fewer texts at a time (--batch-size), shorter ones, fewer candidates\n"
    )


def test_what_torch_itself_cannot_allocate(edlm, monkeypatch):
    monkeypatch.setattr("edlm.samplers.generate", lambda *arguments, **options: torch.empty(1 << 58, dtype=torch.uint8))
    code, _, err = edlm(*SAMPLE)
    assert code == 2 and err.startswith("edlm: error: sample: out of memory (tried to allocate") and err.count("\n") == 1


def test_other_errors_of_torch_are_not_hidden(edlm, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr("edlm.samplers.generate", fail)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        edlm(*SAMPLE)


def test_a_warning_is_one_line(edlm, monkeypatch):
    from edlm import samplers

    real, before = samplers.generate, warnings.showwarning

    def warning(*arguments, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("weights of one\n  candidate", stacklevel=1)
        return real(*arguments, **options)

    monkeypatch.setattr(samplers, "generate", warning)
    code, _, err = edlm(*SAMPLE, "--num", 1, "--steps", 1)
    assert code == 0 and err.splitlines()[0] == "edlm: warning: weights of one candidate"
    assert warnings.showwarning is before


def test_ctrl_c_is_130(edlm, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("edlm.samplers.generate", interrupt)
    assert edlm(*SAMPLE)[0] == 130


def test_a_reader_that_left(folder):
    """As in ``edlm sample ... | head -1``: no traceback, and no complaint at the end."""
    read, write = os.pipe()
    os.close(read)
    program = "import sys; from edlm.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "info"], stdout=write, stderr=subprocess.PIPE, text=True, check=False, cwd=folder
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
