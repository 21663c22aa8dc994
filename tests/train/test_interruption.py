"""Killed at any moment, and stopped by Ctrl-C: called again, a run ends with the weights of one that nobody touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from edlm.cli import main
from edlm.train import train
from edlm.train.objectives import DiffusionObjective
from tiny_run import CLOCKS, assert_same_weights, tiny_config, tiny_values, toml, write_text

TESTS = Path(__file__).parent.parent
STEPS = 90
CHANGES = {"steps": STEPS, "checkpoint_every": 3, "valid_every": 30, "keep_checkpoints": 2}

# Starting python and torch takes seconds, so one process starts and forks: before any of torch's threads exist, and again and again.
DRIVER = """
import os, random, shutil, signal, sys, time
sys.path.insert(0, {tests!r})
import torch
from pathlib import Path
from edlm.train import train
from tiny_run import tiny_config

kind, text, folder, changes = {kind!r}, {text!r}, Path({folder!r}), {changes!r}

torch.set_num_threads(1)  # no thread is ever started, so that forking is safe
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports a good deal, once for all the processes

def attempt(name, doom=None):
    '''One process that trains; doom(pid) may kill it, or it kills itself. What waitpid says.'''
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if callable(doom):
                doom()
            train(tiny_config(kind, text, **changes), folder / name, progress=False)
            code = 0
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    if isinstance(doom, float):
        time.sleep(doom)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def at_call(owner, name, n, after):
    '''Dies at the n-th call of owner.name, before it or after it: inside the writing of a file or checkpoint.'''
    def doom():
        real, calls = getattr(owner, name), 0
        def dying(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == n and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **options)
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        setattr(owner, name, dying)
    return doom

def reached():
    found = sorted(p.name for p in (folder / "killed" / "checkpoints").glob("step_*"))
    return found[-1] if found else "nothing"

begin = time.perf_counter()
assert attempt("whole") == 0
seconds = time.perf_counter() - begin
luck = random.Random({seed})
dooms = [at_call(os, "fsync", n, after) for n, after in ((1, False), (3, True), (6, False), (8, True), (10, False), (17, True))]
dooms += [at_call(Path, "rename", n, after) for n, after in ((1, False), (2, True), (3, False), (4, False), (4, True))]
dooms += [at_call(shutil, "rmtree", n, False) for n in (1, 2)]
dooms += [luck.uniform(0.02, 0.2) * seconds for _ in range(6)]
luck.shuffle(dooms)
killed = 0
for doom in dooms:
    code = attempt("killed", doom)
    assert code in (0, -signal.SIGKILL), code
    killed += code != 0
    print(code, reached(), doom if isinstance(doom, float) else "inside a write", flush=True)
assert attempt("killed") == 0
print("killed", killed)
"""


def losses(out):
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in (out / "metrics.jsonl").open()]


@pytest.mark.parametrize("kind", ["dit", "causal_lm"])
def test_sigkill_again_and_again(tmp_path, kind):
    """A seeded mixture: in the middle of writes, chosen by the call, and at moments that the clock chooses."""
    text = str(write_text(tmp_path))
    program = DRIVER.format(tests=str(TESTS), kind=kind, text=text, folder=str(tmp_path), changes=CHANGES, seed=3)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    # 19 attempts; fewer die where a busy machine took long for the run that the clock is set by.
    assert int(done.stdout.split()[-1]) >= 5, done.stdout
    assert done.stderr == "", "a kill leaves nothing corrupt to be told of"
    assert_same_weights(tmp_path / "killed" / "model", tmp_path / "whole" / "model")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    steps = [row["step"] for row in losses(tmp_path / "killed")]
    assert steps == list(range(1, STEPS + 1))
    names = {p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert names == {f"step_{STEPS - 3:08d}", f"step_{STEPS:08d}"}
    left = {p.name for p in (tmp_path / "killed").iterdir()}
    assert left == {".lock", "config.json", "metrics.jsonl", "tokens", "checkpoints", "model"}


@pytest.fixture
def command(tmp_path):
    """The arguments of ``edlm train``, on a run long enough to be stopped; and a process that runs them."""
    values = tiny_values("dit", write_text(tmp_path), steps=400, checkpoint_every=200, valid_every=400)
    (tmp_path / "run.toml").write_text(toml(values))
    arguments = ["train", str(tmp_path / "run.toml"), "--quiet", "--device", "cpu", "--out"]
    program = "import sys, torch; torch.set_num_threads(1); from edlm.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield arguments, process
    if process.poll() is None:
        process.kill()
    process.communicate()


def wait_for_steps(folder, count, process):
    for _ in range(6000):
        if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"no {count} steps within a minute")


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path, command):
    arguments, process = command
    wait_for_steps(tmp_path / "run", 5, process)
    # Meanwhile the folder belongs to that process.
    with pytest.raises(ValueError, match="is in use by another training process; wait for it, or choose another folder"):
        train(tiny_config("dit", tmp_path / "text.txt"), tmp_path / "run", progress=False)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Ctrl-C: finishing this step and saving" in said and "Traceback" not in said
    saved = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(saved) == 1
    step = int(saved[0].removeprefix("step_"))
    assert 5 <= step < 400 and f"edlm: stopped at step {step} of 400; the same command goes on from there" in said
    assert not (tmp_path / "run" / "model").exists()

    assert main([*arguments, str(tmp_path / "run")]) == 0
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    assert_same_weights(tmp_path / "run" / "model", tmp_path / "whole" / "model")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_second_ctrl_c_is_python_s_own(tmp_path, monkeypatch):
    """It stops at once; nothing is half-written, and the handler that was there before is there again."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where tests run in a shell's background
    before = signal.getsignal(signal.SIGINT)
    real = DiffusionObjective.terms

    def terms(self, rows, step):
        if step == 10:
            os.kill(os.getpid(), signal.SIGINT)
            while signal.getsignal(signal.SIGINT) is not before:  # another thread may have got it: two at once would be one
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        return real(self, rows, step)

    config = tiny_config("dit", write_text(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionObjective, "terms", terms)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", progress=False)
    assert signal.signal(signal.SIGINT, found) is before
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000007"]
    assert_same_weights(train(config, tmp_path / "run", progress=False), train(config, tmp_path / "whole", progress=False))


def test_ctrl_c_in_the_last_step_changes_nothing(tmp_path, monkeypatch):
    real = DiffusionObjective.terms

    def terms(self, rows, step):
        if step == 29:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, rows, step)

    monkeypatch.setattr(DiffusionObjective, "terms", terms)
    model = train(tiny_config("dit", write_text(tmp_path)), tmp_path / "run", progress=False)
    assert model.exists()
