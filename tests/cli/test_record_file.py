"""edlm sample --out: bit by bit one file, whoever writes it, and however often he is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from edlm.cli import main
from edlm.cli.record_file import Part, RecordFile
from untrained import save_models

TEXTS = 61
COMMON = ("--length", "24", "--steps", "12", "--batch-size", "3", "--stop", "q", "--device", "cpu", "--threads", "1")
ENERGY = ("--energy", "ar", "--window", "0", "1", "--num-particles", "2", "--num-candidates", "3")
# torchrun would take --num for one of its own.
ARGUMENTS = ["sample", "dit", "--num-texts", str(TEXTS), *COMMON, *ENERGY]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models, and whole.jsonl, which one process has written undisturbed."""
    folder = tmp_path_factory.mktemp("file")
    save_models(folder)
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main([*ARGUMENTS, "--out", "whole.jsonl"]) == 0
    finally:
        os.chdir(before)
    return folder


def whole(folder):
    return (folder / "whole.jsonl").read_bytes()


def assert_complete(folder, name):
    """The very file, its settings, and nothing else."""
    assert (folder / name).read_bytes() == whole(folder)
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(name)) == [name, f"{name}.settings.json"]


def parts(folder, name):
    """Bytes of every part of an unfinished file."""
    return {p.name: p.read_bytes() for p in (folder / f"{name}.part").glob("*-of-*.jsonl")}


# --- what is written --------------------------------------------------------------------------------------------------------------


def test_a_record_a_line_in_order(folder, edlm):
    lines = whole(folder).decode("ascii").split("\n")
    assert lines.pop() == "" and len(lines) == TEXTS
    records = [json.loads(line) for line in lines]
    assert [r["index"] for r in records] == [r["seed"] for r in records] == list(range(TEXTS))
    for r in records:
        assert len(r["text"]) == len(r["tokens"]) == r["length"] <= 24 and "q" not in r["text"][:-1]
        assert (
            len(r["step_times"]) == len(r["ess"]) == len(r["energy"]) == len(r["log_Z"]) == len(r["num_candidates"]) == r["nfe"]
        )
        assert r["step_times"] == sorted(r["step_times"], reverse=True) and set(r["num_candidates"]) == {3}
        assert len(r["particles"]["log_weights"]) == 2 and len(r["particles"]["resampled"]) == r["nfe"]
    assert edlm(*ARGUMENTS)[1].splitlines() == [r["text"] for r in records]  # what is printed without --out
    plain = json.loads((folder / "whole.jsonl.settings.json").read_text())
    assert plain["texts"] == TEXTS and plain["model"] == "dit" and plain["settings"]["--num-candidates"] == 3


def test_a_text_of_another_kind_of_run(edlm, folder):
    (folder / "prompts.txt").write_text("she ___\n_____ was __\n_\n")
    code, out, err = edlm(
        "sample", "ar", "--prompt-file", "prompts.txt", "--num", 2, "--batch-size", 4, "--out", "prompted.jsonl"
    )
    assert (code, out) == (0, "written: prompted.jsonl, 6 texts\n") and err.startswith("# ") and err.count("\n") == 1
    records = [json.loads(line) for line in (folder / "prompted.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in records] == [p for p in ("she ___", "_____ was __", "_") for _ in range(2)]
    assert [len(r["text"]) for r in records] == [7, 7, 12, 12, 1, 1] and "ess" not in records[0]
    assert [r["nfe"] for r in records] == [3, 3, 7, 7, 1, 1]


# --- what is refused --------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_there_is_not_overwritten(edlm, folder):
    before = whole(folder)
    code, out, err = edlm(*ARGUMENTS, "--out", "whole.jsonl")
    assert (code, out) == (2, "") and "--out: whole.jsonl is there, and is not overwritten" in err and err.count("\n") == 1
    (folder / "foreign.jsonl").write_text("somebody's")
    code, _, err = edlm(*ARGUMENTS, "--out", "foreign.jsonl", "--resume")
    assert code == 2 and "foreign.jsonl is there without the foreign.jsonl.settings.json of a file of edlm sample" in err
    assert whole(folder) == before and (folder / "foreign.jsonl").read_text() == "somebody's"
    assert edlm(*ARGUMENTS, "--out", "dit")[0] == 2 and edlm(*ARGUMENTS, "--out", "dit", "--resume")[0] == 2


def test_a_finished_file_is_resumed_by_doing_nothing(edlm, folder, monkeypatch):
    monkeypatch.setattr("edlm.samplers.generate", None)
    assert edlm(*ARGUMENTS, "--out", "whole.jsonl", "--resume")[:2] == (0, f"complete already: whole.jsonl, {TEXTS} texts\n")
    assert_complete(folder, "whole.jsonl")


CHANGED = {
    "--num": (("--num", TEXTS + 1), f"--num: {TEXTS} there, {TEXTS + 1} here"),
    "--seed": (("--seed", 1), "--seed: 0 there, 1 here"),
    "--batch-size": (("--batch-size", 4), "--batch-size: 3 there, 4 here"),
    "--steps": (("--steps", 13), "--steps: 12 there, 13 here"),
    "--length": (("--length", 25), "--length: 24 there, 25 here"),
    "--stop": (("--stop", "z"), "--stop: q there, z here"),
    "--window": (("--window", "auto"), "--window: [0.0, 1.0] there, auto here"),
    "--num-particles": (("--num-particles", 3), "--num-particles: 2 there, 3 here"),
    "--carry-over": (("--carry-over",), "--carry-over: not given there, True here"),
    "--temperature": (("--temperature", 0.5), "--temperature: not given there, 0.5 here"),
    "--threads": (("--threads", 2), "--threads: 1 there, 2 here"),
    "--prompt": (("--prompt", "_" * 24), f"--prompt: not given there, {'_' * 24} here"),
}


@pytest.mark.parametrize("changed", CHANGED)
def test_other_arguments_are_refused_and_named(edlm, folder, changed):
    more, message = CHANGED[changed]
    code, out, err = edlm(*ARGUMENTS, *more, "--out", "whole.jsonl", "--resume")
    torch.set_num_threads(1)
    assert (code, out) == (2, "") and "--resume: whole.jsonl was begun with other arguments (" in err
    assert f"({message})" in err
    assert_complete(folder, "whole.jsonl")


def test_another_model_is_refused(edlm):
    arguments = ["other" if a == "dit" else a for a in ARGUMENTS]
    assert "(model: sha256 " in edlm(*arguments, "--out", "whole.jsonl", "--resume")[2]


def test_other_prompts_are_refused(edlm, folder):
    (folder / "asked.txt").write_text("she _\n")
    arguments = ("sample", "dit", "--prompt-file", "asked.txt", "--out", "asked.jsonl")
    assert edlm(*arguments)[0] == 0
    (folder / "asked.txt").write_text("she __\n")
    assert "(--prompt-file: sha256 " in edlm(*arguments, "--resume")[2]


# --- interruptions, in this process -----------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop_after(monkeypatch, batches, error=Stop):
    append, done = Part.append, []

    def appending(self, records):
        append(self, records)
        done.append(len(records))
        if len(done) == batches:
            raise error

    monkeypatch.setattr(Part, "append", appending)


@pytest.fixture
def unfinished(edlm, folder, monkeypatch, request):
    """NAME.part with four batches."""
    name = f"{request.node.name}.jsonl".replace("[", "_").replace("]", "")
    with monkeypatch.context() as patched:
        stop_after(patched, 4)
        with pytest.raises(Stop):
            main([*ARGUMENTS, "--out", name])
    assert not (folder / name).exists() and list(parts(folder, name)) == ["0-of-1.jsonl"]
    assert parts(folder, name)["0-of-1.jsonl"] == b"".join(whole(folder).splitlines(keepends=True)[:12])
    return name


def test_an_unfinished_file_is_refused_or_completed(unfinished, edlm, folder, monkeypatch):
    code, _, err = edlm(*ARGUMENTS, "--out", unfinished)
    assert code == 2 and f"{unfinished}.part holds 12 of {TEXTS} texts; --resume completes them" in err
    code, _, err = edlm(*ARGUMENTS, "--out", unfinished, "--resume", "--seed", 2)
    assert code == 2 and f"--resume: {unfinished}.part was begun with other arguments (--seed: 0 there, 2 here)" in err
    seeds, append = [], Part.append
    monkeypatch.setattr(Part, "append", lambda self, records: seeds.append(records[0]["seed"]) or append(self, records))
    assert edlm(*ARGUMENTS, "--out", unfinished, "--resume")[0] == 0
    assert seeds == list(range(12, TEXTS, 3))  # only what was missing
    assert_complete(folder, unfinished)


@pytest.mark.parametrize("left", [-1, 1, 400, 10])
def test_a_torn_line_is_dropped(unfinished, edlm, folder, left):
    """``left`` bytes of the next record, or all but its line's end."""
    part = folder / f"{unfinished}.part" / "0-of-1.jsonl"
    following = whole(folder).splitlines(keepends=True)[12]
    with part.open("ab") as stream:
        stream.write(following[:left])
    assert edlm(*ARGUMENTS, "--out", unfinished, "--resume")[0] == 0
    assert_complete(folder, unfinished)


def test_a_part_of_a_batch_and_damage_are_completed(unfinished, edlm, folder):
    """One record of three; zeros where a power cut left no data; another run's index; and a part by another number of processes."""
    place = folder / f"{unfinished}.part"
    lines = whole(folder).splitlines(keepends=True)
    (place / "0-of-1.jsonl").write_bytes(b"".join(lines[:1]) + b"\0" * 50 + b"\n" + lines[2] + b"[1]\n" + b'{"index": 99}\n')
    (place / "2-of-3.jsonl").write_bytes(lines[40] + lines[39] + lines[41] + lines[5] + lines[60][:-1])
    assert edlm(*ARGUMENTS, "--out", unfinished, "--resume")[0] == 0
    assert_complete(folder, unfinished)


def test_a_full_disk_leaves_whole_lines(edlm, folder, monkeypatch):
    write, done = os.write, []

    def filling(descriptor, data):
        if len(data) > 1000:
            done.append(len(data))
            if len(done) == 3:
                return write(descriptor, bytes(data)[:700])
            if len(done) > 3:
                raise OSError(28, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", filling)
        code, _, err = edlm(*ARGUMENTS, "--out", "full.jsonl")
    assert code == 2 and "No space left on device" in err
    assert parts(folder, "full.jsonl")["0-of-1.jsonl"] == b"".join(whole(folder).splitlines(keepends=True)[:6])
    assert edlm(*ARGUMENTS, "--out", "full.jsonl", "--resume")[0] == 0
    assert_complete(folder, "full.jsonl")


@pytest.mark.parametrize("last", range(9))
def test_a_stop_at_every_step_of_the_end(edlm, folder, monkeypatch, last, tmp_path):
    """Renaming, flushing and clearing up: whichever of them is the last that happens, --resume leads to the file."""
    from pathlib import Path

    name, left = f"end{last}.jsonl", iter(range(last))

    def dying(function):
        def call(*arguments, **options):
            if next(left, None) is None:
                raise Stop
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patched:
        finish = RecordFile.finish

        def finishing(self):
            for owner, function in ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (os, "fsync"), (os, "rmdir")):
                patched.setattr(owner, function, dying(getattr(owner, function)))
            finish(self)

        patched.setattr(RecordFile, "finish", finishing)
        with pytest.raises(Stop):
            main([*ARGUMENTS, "--out", name])
    if (folder / name).exists():
        assert (folder / name).read_bytes() == whole(folder)
    for stray in folder.glob(f".{name}*.partial"):
        stray.unlink()
    assert edlm(*ARGUMENTS, "--out", name, "--resume")[0] == 0
    assert_complete(folder, name)


def test_ctrl_c_says_how_to_go_on(edlm, folder, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 2, KeyboardInterrupt)
        code, out, err = edlm(*ARGUMENTS, "--out", "pressed.jsonl")
    assert (code, out) == (130, "") and "pressed.jsonl.part holds what is done: --resume goes on from there" in err
    assert edlm(*ARGUMENTS, "--out", "pressed.jsonl", "--resume")[0] == 0
    assert_complete(folder, "pressed.jsonl")


def test_nothing_decoded_claims_nothing(edlm, folder, monkeypatch):
    assert edlm(*ARGUMENTS, "--steps", "0", "--out", "later.jsonl")[0] == 2
    assert not list(folder.glob("later.jsonl*"))
    # A kill leaves the folder; other arguments may have it.
    with RecordFile(folder / "later.jsonl", 9) as file:
        assert file.begin({"--seed": 5}, False)
    assert (folder / "later.jsonl.part" / "settings.json").exists()
    assert edlm(*ARGUMENTS, "--out", "later.jsonl")[0] == 0
    assert_complete(folder, "later.jsonl")


def test_somebody_else_s_folder_is_left_alone(edlm, folder):
    place = folder / "mine.jsonl.part"
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    code, _, err = edlm(*ARGUMENTS, "--out", "mine.jsonl")
    assert code == 2 and "mine.jsonl.part holds something else" in err and (place / "notes.txt").read_text() == "mine"
    (folder / "odd.jsonl.settings.json").write_text("{}")
    assert "odd.jsonl.settings.json is wanted for the settings" in edlm(*ARGUMENTS, "--out", "odd.jsonl")[2]


def test_one_run_a_file(edlm, folder):
    with RecordFile(folder / "two.jsonl", 9) as file:
        assert file.begin({}, False)
        code, _, err = edlm(*ARGUMENTS, "--out", "two.jsonl")
        assert code == 2 and "two.jsonl is being written by another process" in err
    assert edlm(*ARGUMENTS, "--out", "two.jsonl")[0] == 0


def test_an_unfinished_file_decides_the_threads(edlm, folder, monkeypatch):
    """Last bits depend on them: whoever goes on takes as many as were taken."""
    arguments = ["sample", "dit", "--num", "6", "--batch-size", "3", "--length", "8", "--device", "cpu", "--out", "threads.jsonl"]
    torch.set_num_threads(2)
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(Stop):
            main(arguments)
    torch.set_num_threads(1)
    code, _, err = edlm(*arguments, "--resume", "--threads", "1")
    assert code == 2 and "(--threads: 2 there, 1 here)" in err
    assert edlm(*arguments, "--resume")[0] == 0 and torch.get_num_threads() == 2
    torch.set_num_threads(1)


# --- processes --------------------------------------------------------------------------------------------------------------------

KILLS = """
import os, random, signal, sys, time
import torch
from edlm.cli import main
import edlm.samplers, edlm.train, edlm.data, edlm.models, edlm.cli.record_file, edlm.cli.sample_json
torch.set_num_threads(1)
name, luck, kills, grown = sys.argv[1], random.Random(3), 0, []
part = name + ".part/0-of-1.jsonl"
for attempt in range(60):
    pid = os.fork()
    if pid == 0:
        os._exit(main([*sys.argv[2:], "--out", name, "--resume"]))
    time.sleep(luck.uniform(0.05, 0.4))
    os.kill(pid, signal.SIGKILL)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 or os.path.exists(name):
        break
    kills += 1
    grown.append(os.path.getsize(part) if os.path.exists(part) else 0)
print("kills", kills, "sizes", len(set(grown)), grown == sorted(grown))
"""


def test_sigkill_at_any_moment_again_and_again(folder):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, "killed.jsonl", *ARGUMENTS],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    kills = done.stdout.split("kills ")[-1].split()
    assert int(kills[0]) >= 3 and int(kills[2]) >= 2 and kills[3] == "True", done.stdout
    again = subprocess.run(
        [sys.executable, "-m", "edlm", *ARGUMENTS, "--out", "killed.jsonl", "--resume"], cwd=folder, check=False, timeout=120
    )
    assert again.returncode == 0
    assert_complete(folder, "killed.jsonl")


def until_begun(process, folder, name):
    for _ in range(60_000):
        if any(parts(folder, name).values()):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    raise AssertionError("nothing was written")


LONG = ["sample", "dit", "--num-texts", "4000", *COMMON, *ENERGY]  # nobody waits for its end


def test_sigint_leaves_whole_lines(folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "edlm", *LONG, "--out", "int.jsonl"], cwd=folder, stderr=subprocess.PIPE, text=True
    )
    until_begun(process, folder, "int.jsonl")
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "--resume goes on from there" in err
    (raw,) = parts(folder, "int.jsonl").values()
    lines = raw.split(b"\n")
    assert lines.pop() == b"" and [json.loads(line)["index"] for line in lines] == list(range(len(lines))) and len(lines) % 3 == 0


def torchrun(folder, *program, arguments=ARGUMENTS):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, *(program or ("-m", "edlm")), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_two_processes_write_the_file_of_one(folder):
    process = torchrun(folder, arguments=[*ARGUMENTS, "--out", "both.jsonl"])
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out == f"written: both.jsonl, {TEXTS} texts\n" and err.count("denoiser calls") == 1
    assert_complete(folder, "both.jsonl")


def test_two_processes_need_a_file(folder):
    process = torchrun(folder, arguments=["sample", "dit", "--length", "8"])
    out, err = process.communicate(timeout=240)
    assert process.returncode != 0 and out == ""
    assert err.count("--out: expected a file where 2 processes share the work, got none; give --out FILE.jsonl") == 1


def test_two_processes_complete_what_one_began(unfinished, edlm, folder):
    process = torchrun(folder, arguments=[*ARGUMENTS, "--out", unfinished, "--resume"])
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert_complete(folder, unfinished)


FAILS = """
import os, signal, sys
from edlm.cli import main, record_file
how, append, done = sys.argv.pop(1), record_file.Part.append, []

def failing(self, records):
    append(self, records)
    done.append(records)
    if os.environ["RANK"] == "1" and len(done) == 2:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(28, "No space left on device")

record_file.Part.append = failing
sys.exit(main())
"""


@pytest.mark.parametrize("how", ["kill", "error"])
def test_what_one_of_two_leaves_is_completed_by_one_alone(edlm, folder, how):
    """And the other one does not wait for it."""
    (folder / "fails.py").write_text(FAILS)
    name = f"{how}_of_two.jsonl"
    began = time.monotonic()
    process = torchrun(folder, "fails.py", how, arguments=[*ARGUMENTS, "--out", name])
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0 and time.monotonic() - began < 120
    assert ("No space left on device" in err) == (how == "error")
    assert "Traceback" not in err.split("ChildFailedError")[0].split("torch/distributed/elastic")[0]
    assert not (folder / name).exists()
    assert parts(folder, name)["1-of-2.jsonl"] == b"".join(
        line for n, line in enumerate(whole(folder).splitlines(keepends=True)) if n // 3 in (1, 3)
    )
    assert edlm(*ARGUMENTS, "--out", name, "--resume")[0] == 0
    assert_complete(folder, name)
