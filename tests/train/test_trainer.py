"""``train``: what it learns, what it writes, what it refuses, and what it makes of a damaged folder."""

from __future__ import annotations

import json
import math
import shutil
import threading

import pytest
import torch
from edlm import checkpoint
from edlm.data import CharTokenizer, open_tokens, read_text, split, windows
from edlm.eval import ar_nll, nelbo
from edlm.models import CausalLM, DiT
from edlm.train import TrainConfig, run, train
from edlm.train.objectives import CausalObjective, DiffusionObjective
from tiny_run import CLOCKS, assert_same_weights, tiny_config, weights, write_text

KINDS = {"dit": DiT, "causal_lm": CausalLM}
OBJECTIVES = {"dit": DiffusionObjective, "causal_lm": CausalObjective}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    """One run of each kind that came to its end: read it, and copy it to change it."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        train(tiny_config(kind, text), folder / kind, progress=False)
    return folder


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines(out)]


class Stopped(Exception):
    pass


def stop_at(monkeypatch, kind, step):
    """Dies in step ``step``, before anything of it is kept."""
    real = OBJECTIVES[kind].terms

    def terms(self, rows, n):
        if n == step:
            raise Stopped
        return real(self, rows, n)

    monkeypatch.setattr(OBJECTIVES[kind], "terms", terms)


def interrupted(monkeypatch, tmp_path, text, kind, step, **changes):
    """A run that died at ``step`` and the configuration that goes on with it."""
    config = tiny_config(kind, text, **changes)
    with monkeypatch.context() as patch:
        stop_at(patch, kind, step)
        with pytest.raises(Stopped):
            train(config, tmp_path / "run", progress=False)
    return config, tmp_path / "run"


# --- a whole run ------------------------------------------------------------------------------------------------------------------


@kinds
def test_what_a_run_leaves(finished, kind):
    out = finished / kind
    assert {p.name for p in out.iterdir()} == {".lock", "config.json", "metrics.jsonl", "tokens", "checkpoints", "model"}
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step_00000028", "step_00000030"}
    model = KINDS[kind].from_pretrained(out / "model")
    assert model.tokenizer_description == CharTokenizer().description() and not model.training
    rows = lines(out)
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert [row["step"] for row in rows if "valid_loss" in row] == [10, 20, 30]
    assert all(row["loss"] > 0 and row["lr"] >= 0 and row["grad_norm"] > 0 and row["tokens_per_second"] > 0 for row in rows)
    assert rows[9]["valid_bits"] == pytest.approx(rows[9]["valid_loss"] / math.log(2))


@kinds
def test_the_average_is_exported_and_validated(finished, text, kind):
    """Not the raw weights: they differ from it by now, and so do their validations."""
    stored = checkpoint.load(finished / kind / "checkpoints" / "step_00000030").tensors
    exported = weights(finished / kind / "model")
    assert exported.keys() == stored["ema"].keys()
    assert all(torch.equal(exported[name], stored["ema"][name]) for name in exported)
    assert any(not torch.equal(exported[name], stored["model"][name]) for name in exported)

    held_out = windows(CharTokenizer().encode(split(read_text(text)).valid), 16, 8)
    model = KINDS[kind].from_pretrained(finished / kind / "model")
    seed = 1 << 62  # validation's own, for a run of seed 0: it shares no corruption with training
    score = (lambda m: nelbo(m, held_out, num_times=2, seed=seed).mean) if kind == "dit" else (lambda m: ar_nll(m, held_out).mean)
    assert lines(finished / kind)[-1]["valid_loss"] == pytest.approx(score(model), rel=1e-6)
    model.load_state_dict(stored["model"])
    assert lines(finished / kind)[-1]["valid_loss"] != pytest.approx(score(model), rel=1e-6)


@kinds
def test_training_is_with_dropout_and_validation_without(tmp_path, text, monkeypatch, kind):
    modes = {"terms": [], "validate": []}
    for name in modes:
        real = getattr(OBJECTIVES[kind], name)

        def spy(self, *rest, real=real, name=name):
            modes[name].append({m.training for m in self.model.modules()})
            return real(self, *rest)

        monkeypatch.setattr(OBJECTIVES[kind], name, spy)
    train(tiny_config(kind, text, steps=12), tmp_path / "run", progress=False)
    assert modes == {"terms": [{True}] * 12, "validate": [{False}] * 2}


@kinds
def test_a_run_is_a_function_of_its_configuration(tmp_path, finished, text, kind):
    again = train(tiny_config(kind, text), tmp_path / "again", progress=False)
    assert_same_weights(again, finished / kind / "model")
    assert losses(tmp_path / "again") == losses(finished / kind)
    other = train(tiny_config(kind, text, seed=1), tmp_path / "other", progress=False)
    with pytest.raises(AssertionError):
        assert_same_weights(other, again)


@kinds
def test_how_often_is_looked_does_not_change_what_is_learnt(tmp_path, finished, text, kind):
    changes = {"log_every": 4, "valid_every": 1, "checkpoint_every": 30, "valid_windows": 2}
    assert_same_weights(train(tiny_config(kind, text, **changes), tmp_path / "run", progress=False), finished / kind / "model")


@kinds
def test_a_repetitive_text_is_learnt(tmp_path, kind):
    """Each of its 5 characters is worth 1.6 nats by itself, and nothing next to another."""
    path = tmp_path / "text.txt"
    path.write_text("abcd " * 600)
    config = tiny_config(
        kind, path, steps=200, batch_size=16, valid_every=200, model={"dim": 32, "dropout": 0.0}, optim={"lr": 1e-2}
    )
    train(config, tmp_path / "run", progress=False)
    # Which of the 5 phases it is costs log(5) a window, 0.1 nats a token, whatever was learnt.
    assert lines(tmp_path / "run")[-1]["valid_loss"] < 0.5 * math.log(5)


# --- going on ---------------------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("step", [3, 14, 25])
def test_a_run_goes_on_to_the_same_weights(tmp_path, finished, text, monkeypatch, kind, step):
    """Before the first checkpoint, right at one, and between two."""
    config, out = interrupted(monkeypatch, tmp_path, text, kind, step)
    assert not (out / "model").exists()
    begun = []
    real = OBJECTIVES[kind].terms
    monkeypatch.setattr(OBJECTIVES[kind], "terms", lambda self, rows, n: begun.append(n) or real(self, rows, n))
    assert_same_weights(train(config, out, progress=False), finished / kind / "model")
    assert begun[0] == step // 7 * 7  # it did go on, rather than start again
    assert losses(out) == losses(finished / kind)


def test_a_finished_run_is_not_trained_again(tmp_path, finished, text, monkeypatch):
    out = shutil.copytree(finished / "dit", tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    stop_at(monkeypatch, "dit", 0)
    moved = write_text(tmp_path, name="elsewhere.txt")
    moved.unlink()  # not even its text is needed
    assert train(tiny_config("dit", text), out, progress=False) == out / "model"
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_kill_before_the_export(tmp_path, finished, text, monkeypatch):
    """The last checkpoint is there, the model is not: it is written, and no step is done."""
    out = shutil.copytree(finished / "dit", tmp_path / "run")
    shutil.rmtree(out / "model")
    stop_at(monkeypatch, "dit", 30)
    assert_same_weights(train(tiny_config("dit", text), out, progress=False), finished / "dit" / "model")
    assert losses(out) == losses(finished / "dit")


def test_another_thread_can_train(tmp_path, finished, text):
    """Signals can be taken by the main one alone: there it goes without Ctrl-C."""
    thread = threading.Thread(target=train, args=(tiny_config("dit", text), tmp_path / "run"), kwargs={"progress": False})
    thread.start()
    thread.join()
    assert_same_weights(tmp_path / "run" / "model", finished / "dit" / "model")


def test_leftovers_are_cleared(tmp_path, finished, text, monkeypatch):
    config, out = interrupted(monkeypatch, tmp_path, text, "dit", 20)
    left = [out / ".metrics.jsonl.0123abcd.partial", out / ".config.json.0123abcd.partial"]
    for path in left:
        path.write_bytes(b"half")
    half = shutil.copytree(out / "checkpoints" / "step_00000014", out / "checkpoints" / ".step_00000021.0123abcd.partial")
    (half / "manifest.json").unlink()
    mine = out / ".notes.partial"
    mine.write_text("the user's own")
    train(config, out, progress=False)
    assert not any(path.exists() for path in [*left, half]) and mine.exists()


# --- damage -----------------------------------------------------------------------------------------------------------------------


def _truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def _flip(folder):
    file = folder / "optimizer.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-20] ^= 4
    file.write_bytes(bytes(raw))


DAMAGE = {
    "truncated": _truncate,
    "flipped": _flip,
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_bytes(b""),
    "a file too few": lambda folder: (folder / "ema.safetensors").unlink(),
}


@pytest.mark.parametrize("keep", [2, 1])
@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_checkpoint_is_damaged(tmp_path, finished, text, monkeypatch, capsys, damage, keep):
    """It is named, the one before it is used, and it stands in nobody's way: neither its successor's nor the count's."""
    monkeypatch.setattr(run.shutil, "rmtree", lambda path, **options: None)  # a slow disk: more than ``keep`` are there
    config, out = interrupted(monkeypatch, tmp_path, text, "dit", 25, keep_checkpoints=keep)
    monkeypatch.undo()
    partial = next((out / "checkpoints").glob(".step_00000014.*"), None) or next((out / "checkpoints").glob("step_00000014"))
    partial.rename(out / "checkpoints" / "step_00000014")
    DAMAGE[damage](out / "checkpoints" / "step_00000021")
    capsys.readouterr()
    with monkeypatch.context() as patch:  # and then it dies once more, after the damaged one's successor
        stop_at(patch, "dit", 24)
        with pytest.raises(Stopped):
            train(config, out, progress=False)
    said = capsys.readouterr().err
    assert "step_00000021" in said and "going back to step 14" in said
    names = {p.name for p in (out / "checkpoints").iterdir()}
    assert "step_00000021" in names and sum(name.startswith("corrupt_step_00000021_") for name in names) == 1
    assert_same_weights(train(config, out, progress=False), finished / "dit" / "model")
    assert "corrupt" not in capsys.readouterr().err  # said once
    assert losses(out) == losses(finished / "dit")


def test_every_checkpoint_is_damaged(tmp_path, finished, text, monkeypatch):
    """No kill does that. It is said, and nothing is touched; who moves them away gets the same weights from the beginning."""
    config, out = interrupted(monkeypatch, tmp_path, text, "dit", 25)
    for folder in (out / "checkpoints").iterdir():
        _flip(folder)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(
        ValueError, match=r"expected a whole checkpoint in .*, got 2 corrupt ones .*step_00000021.*move that folder"
    ):
        train(config, out, progress=False)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    (out / "checkpoints").rename(out / "damaged")
    assert_same_weights(train(config, out, progress=False), finished / "dit" / "model")
    assert losses(out) == losses(finished / "dit")


def test_the_finished_model_is_damaged(tmp_path, finished, text):
    out = shutil.copytree(finished / "dit", tmp_path / "run")
    _truncate(out / "model")
    with pytest.raises(ValueError, match=r"model: corrupt checkpoint: model\.safetensors: .*move it away, and the same command"):
        train(tiny_config("dit", text), out, progress=False)
    (out / "model").rename(out / "damaged")
    assert_same_weights(train(tiny_config("dit", text), out, progress=False), finished / "dit" / "model")


def test_damaged_tokens_are_made_anew(tmp_path, finished, text, monkeypatch):
    config, out = interrupted(monkeypatch, tmp_path, text, "dit", 20)
    shard = out / "tokens" / "train" / "00000.bin"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:50] + b"\0" * 500 + raw[550:])
    assert_same_weights(train(config, out, progress=False), finished / "dit" / "model")


def test_a_checkpoint_of_another_network(tmp_path, text, monkeypatch):
    config, out = interrupted(monkeypatch, tmp_path, text, "dit", 20)
    (tmp_path / "other").mkdir()
    _, other = interrupted(monkeypatch, tmp_path / "other", text, "causal_lm", 20)
    shutil.rmtree(out / "checkpoints")
    shutil.copytree(other / "checkpoints", out / "checkpoints")
    with pytest.raises(ValueError, match=r"step_00000014: expected a checkpoint of this configuration's model, got another"):
        train(config, out, progress=False)


# --- what is refused --------------------------------------------------------------------------------------------------------------


def test_another_configuration_in_the_same_folder(tmp_path, finished, text):
    out = shutil.copytree(finished / "dit", tmp_path / "run")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    changed = tiny_config("dit", text, steps=40, optim={"lr": 1e-2}, model={"dim": 32})
    with pytest.raises(ValueError, match=r"holds a run of another configuration \(model\.dim, optim\.lr, steps differ\)"):
        train(changed, out, progress=False)
    with pytest.raises(ValueError, match=r"\(model\.kind differ\)"):
        train(tiny_config("causal_lm", text), out, progress=False)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("content", ["{", "[]", "\0\0"])
def test_an_unreadable_configuration(tmp_path, text, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: expected the run's configuration, got something unreadable"):
        train(tiny_config("dit", text), tmp_path, progress=False)
    assert (tmp_path / "config.json").read_text() == content


@pytest.mark.parametrize("name", ["model", "checkpoints", "metrics.jsonl"])
def test_a_folder_of_something_else(tmp_path, finished, text, name):
    out = tmp_path / "run"
    out.mkdir()
    if name == "metrics.jsonl":
        (out / name).write_text('{"step": 5}\n')
    else:
        shutil.copytree(finished / "causal_lm" / "model", out / name)
    with pytest.raises(ValueError, match=f"holds {name} without a config.json: not a run of edlm"):
        train(tiny_config("causal_lm", text), out, progress=False)
    assert name != "metrics.jsonl" or (out / name).read_text() == '{"step": 5}\n'


def test_a_file_in_the_place_of_the_folder(tmp_path, text):
    with pytest.raises(ValueError, match="out: expected a folder, got the file"):
        train(tiny_config("dit", text), text, progress=False)


def test_a_text_that_changed_between_two_calls(tmp_path, finished, monkeypatch):
    text = write_text(tmp_path)
    config, out = interrupted(monkeypatch, tmp_path, text, "dit", 20)
    kept = text.read_bytes()
    write_text(tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"data\.text: expected the text that .* was trained on so far, got another"):
        train(config, out, progress=False)
    # Nor are the tokens touched: they are all that is left of the text, if nobody has it any more.
    assert "made_from" in json.loads((out / "tokens" / "train" / "manifest.json").read_text())
    assert open_tokens(out / "tokens" / "train")[:50].tolist() == CharTokenizer().encode(kept.decode())[:50].tolist()
    text.write_bytes(kept)
    assert_same_weights(train(config, out, progress=False), finished / "dit" / "model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected text, got an empty file"),
        ("... 漢字 ...", "expected at least one token, got none"),
        ("too short", "valid: text: expected at least one token, got none"),
        ("some words " * 20, "expected at least 16 tokens for one window of length 16, got 10;.*it takes about 320 characters"),
    ],
)
def test_a_text_that_will_not_do_claims_no_folder(tmp_path, finished, text, content, message):
    bad = tmp_path / "bad.txt"
    bad.write_text(content)
    with pytest.raises(ValueError, match=message):
        train(tiny_config("dit", bad), tmp_path / "run", progress=False)
    with pytest.raises(FileNotFoundError, match="text: expected a file, a folder, 'bundled' or"):
        train(tiny_config("dit", tmp_path / "missing.txt"), tmp_path / "run", progress=False)
    assert_same_weights(train(tiny_config("dit", text), tmp_path / "run", progress=False), finished / "dit" / "model")


@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(tmp_path, finished, text, monkeypatch, kind, bad):
    real = OBJECTIVES[kind].terms

    def terms(self, rows, step):
        value = real(self, rows, step)
        return value + bad if step == 17 else value  # its gradient is finite

    with monkeypatch.context() as patch:
        patch.setattr(OBJECTIVES[kind], "terms", terms)
        with pytest.raises(
            FloatingPointError,
            match=r"step 17: the loss is not finite; lower optim.lr.*the last good checkpoint is .*step_00000014",
        ):
            train(tiny_config(kind, text), tmp_path / "run", progress=False)
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"step_00000007", "step_00000014"}
    assert [row["step"] for row in lines(tmp_path / "run")][-1] == 17
    assert_same_weights(train(tiny_config(kind, text), tmp_path / "run", progress=False), finished / kind / "model")


def test_the_configuration_is_checked_before_the_folder(tmp_path, text):
    config = tiny_config("dit", text, model={"num_heads": 5})
    with pytest.raises(ValueError, match="num_heads: expected a divisor of dim 16"):
        train(config, tmp_path / "run", progress=False)
    assert isinstance(config, TrainConfig) and not (tmp_path / "run" / "config.json").exists()
