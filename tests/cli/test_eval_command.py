"""edlm eval --json: one document, whoever measures its parts and however often he is stopped; and which option is for what."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from edlm import eval as measures
from edlm.cli import main
from edlm.cli.record_file import Part, RecordFile
from edlm.eval.documents import read_documents
from edlm.train.distributed import World
from tiny_run import write_text
from untrained import save_models

TEXTS = ("--text", "text.txt", "second.txt", "--length", "12", "--windows", "11", "--batch-size", "3")
ARGUMENTS = [
    *("eval", "dit", "--energy", "ar", *TEXTS, "--steps", "4", "--num-candidates", "3", "5"),
    *("--device", "cpu", "--threads", "1"),
]
RECORDS = 2 + 22  # two estimates of log Z, and the sequences, in 1 + 1 + 4 + 4 batches


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models, two texts, and whole.json, which one process has written undisturbed."""
    folder = tmp_path_factory.mktemp("document")
    save_models(folder)
    write_text(folder)
    write_text(folder, 300, "second.txt", seed=1)
    (folder / "texts.jsonl").write_text('{"index": 0, "text": "she was not"}\n')
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main([*ARGUMENTS, "--json", "whole.json"]) == 0
    finally:
        os.chdir(before)
    return folder


def values(folder, name):
    """All of a document but what clocks and places have to do with."""
    plain = json.loads((folder / name).read_text())
    for key in ("seconds", "machine"):
        plain.pop(key)
    for row in plain["rows"]:
        assert row.pop("sequences_per_second") > 0
    return plain


def assert_complete(folder, name):
    assert values(folder, name) == values(folder, "whole.json")  # bit by bit
    assert [p.name for p in folder.iterdir() if p.name.startswith(name)] == [name]


def parts(folder, name):
    lines = [p.read_text().splitlines() for p in (folder / f"{name}.part").glob("*-of-*.jsonl")]
    return sorted(json.loads(line)["index"] for one in lines for line in one)


# --- the document -----------------------------------------------------------------------------------------------------------------


def test_the_document(folder, edlm):
    plain = json.loads((folder / "whole.json").read_text())
    (read,) = read_documents([folder / "whole.json"])
    assert (read.kind, read.label, len(read.rows)) == ("likelihood", "dit + ar", len(plain["rows"]))
    assert plain["machine"] == {"torch": torch.__version__, "device": "cpu", "threads": 1, "processes": 1}
    assert plain["records"] == RECORDS and plain["seconds"] > 0 and plain["model"] == "dit" and plain["energy"] == "ar"
    assert plain["settings"]["--length"] == 12 and plain["settings"]["model"].startswith("sha256 ")
    code, out, err = edlm(*ARGUMENTS, "--json")  # printed: the same, and nothing is written
    printed = json.loads(out)
    assert (code, err) == (0, "") and printed.keys() == plain.keys()
    for one, other in zip(printed["rows"], plain["rows"], strict=True):
        assert one | {"sequences_per_second": 0} == other | {"sequences_per_second": 0}
    table = edlm(*ARGUMENTS)[1]
    assert table.startswith("dit + ar: 11 of 695 windows of text.txt, 11 of 105 windows of second.txt of 12 tokens")
    assert not list(folder.glob("*.part")) and not list(folder.glob("*.settings.json"))


def test_a_table_stands_beside_the_file(folder, edlm):
    code, out, err = edlm(*ARGUMENTS, "--json", "beside.json")
    assert (code, err) == (0, "") and out.endswith("written: beside.json\n") and "joint NLL" in out
    code, again, _ = edlm(*ARGUMENTS, "--json", "beside.json", "--resume")
    assert code == 0 and again == out.replace("written: ", "complete already: ")
    assert_complete(folder, "beside.json")


def test_a_finished_document_is_resumed_by_doing_nothing(folder, edlm, monkeypatch):
    for name in ("nelbo", "log_partition_bounds"):
        monkeypatch.setattr(measures, name, None)
    assert edlm(*ARGUMENTS, "--json", "whole.json", "--resume")[0] == 0


# --- what is refused --------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_there_is_not_overwritten(folder, edlm):
    before = (folder / "whole.json").read_bytes()
    code, out, err = edlm(*ARGUMENTS, "--json", "whole.json")
    assert (code, out) == (2, "") and "--json: whole.json is there, and is not overwritten" in err
    assert (folder / "whole.json").read_bytes() == before
    for text in ("{}", "somebody's", '{"edlm eval": 1, "rows": []}'):
        (folder / "foreign.json").write_text(text)
        code, _, err = edlm(*ARGUMENTS, "--json", "foreign.json", "--resume")
        assert code == 2 and "--resume: foreign.json is there and is no document of edlm eval; choose another name" in err
        assert (folder / "foreign.json").read_text() == text


CHANGED = {
    "seed": (("--seed", 1), "--seed: 0 there, 1 here"),
    "steps": (("--steps", 8), "--measures: ['nelbo', 'nelbo, T = 4', "),
    "n": (("--num-candidates", 4), "--measures: ["),
    "num_times": (("--num-times", 2), "--num-times: 1 there, 2 here"),
    "windows": (("--windows", 10), "--windows: 11 there, 10 here"),
    "length": (("--length", 13), "--length: 12 there, 13 here"),
    "batch_size": (("--batch-size", 4), "--batch-size: 3 there, 4 here"),
    "carry_over": (("--carry-over",), "--carry-over: False there, True here"),
    "threads": (("--threads", 2), "--threads: 1 there, 2 here"),
    "label": (("--label", "other"), "--label: not given there, other here"),
    "energy": (("--energy", "wider"), "--energy: sha256 "),
    "texts": (("--text", "text.txt"), "--text: {'text.txt': 'sha256 "),
}


@pytest.mark.parametrize("changed", CHANGED)
def test_other_arguments_are_refused_and_named(folder, edlm, changed):
    from edlm.data import CharTokenizer
    from untrained import save_ar

    if not (folder / "wider").exists():
        save_ar(folder / "wider", 27, CharTokenizer().description())
    more, message = CHANGED[changed]
    code, out, err = edlm(*ARGUMENTS, *more, "--json", "whole.json", "--resume")
    torch.set_num_threads(1)
    assert (code, out) == (2, "") and "--resume: whole.json was begun with other arguments (" in err and message in err


def test_another_text_of_that_name_is_refused(folder, edlm):
    write_text(folder, 200, "changing.txt", seed=3)
    arguments = ("eval", "ar", "--text", "changing.txt", "--length", 12, "--windows", 4, "--json", "changing.json")
    assert edlm(*arguments)[0] == 0
    write_text(folder, 200, "changing.txt", seed=4)
    assert "(--text: {'changing.txt': 'sha256 " in edlm(*arguments, "--resume")[2]


PLACES = {
    "nowhere": (("--json", "no/where.json"), "--json: expected a file in a folder that exists, got no/where.json"),
    "a folder": (("--json", "ar"), "--json: expected the name of a file, got ar"),
    "no name": (("--json", ""), "--json: expected the name of a file, got an empty name"),
    "resume nothing": (("--resume",), "--resume: it is for a file, got none; give --json FILE as well"),
    "resume what is printed": (("--resume", "--json"), "--resume: it is for a file, got none"),
}


@pytest.mark.parametrize("place", PLACES)
def test_places(refused, place):
    more, message = PLACES[place]
    assert message in refused(*ARGUMENTS, *more)


WRONG_MODE = {
    ("dit", "--judge", "ngram:bundled"): "--judge: it is for --decode or files of texts, got it with the likelihood of texts",
    ("dit", "--num-texts", 4): "--num-texts: it is for --decode, got it with the likelihood of texts",
    ("dit", "--mauve"): "--mauve: it is for --decode or files of texts, got it with the likelihood of texts",
    ("dit", "--temperature", 0): "--temperature: it is for --decode, got it",
    (
        "dit",
        "--energy",
        "ar",
        "--window",
        0,
        1,
    ): "--window: it is for --decode, got it with the likelihood of texts; leave it out",
    ("dit", "--sampler", "remasking"): "--sampler: it is for --decode",
    ("dit", "--decode", 4, "--windows", 3): "--windows: it is for the likelihood of texts, got it with --decode",
    ("dit", "--decode", 4, "--steps", 3): "--steps: it is for the likelihood of texts, got it with --decode",
    ("dit", "--decode", 4, "--measures", "nelbo"): "--measures: it is for the likelihood of texts",
    ("dit", "--decode", 4, "--num-times", 3): "--num-times: it is for the likelihood of texts",
    ("dit", "--decode", 4, "--unit", "bits/token"): "--unit: it is for the likelihood of texts",
    ("dit", "--decode", 4, "--blocks", "plain"): "--blocks: it is for the likelihood of texts",
    ("texts.jsonl", "--decode", 4): "--decode: it is for --decode, got it with files of texts",
    ("texts.jsonl", "--energy", "ar"): "--energy: it is for the likelihood of texts or --decode, got it with files of texts",
    ("texts.jsonl", "--length", 4): "--length: it is for the likelihood of texts or --decode, got it with files of texts",
    ("texts.jsonl", "--split", "valid"): "--split: it is for",
    (
        "dit",
        "--text",
        "text.txt",
        "second.txt",
        "--split",
        "valid",
    ): "--split: files are read whole, got text.txt second.txt alone",
    (
        "dit",
        "--decode",
        4,
        "--judge",
        "x",
        "--text",
        "text.txt",
        "--split",
        "test",
    ): "--split: files are read whole, got text.txt",
    ("texts.jsonl", "text.txt", "--judge", "x", "--label", "mine"): "--label: several files are called by their names, got 2",
    ("dit", "--unit", "bits/token", "--json"): "--unit: it is of the table, got --json without FILE",
    ("texts.jsonl", "dit"): "expected a model's folder or files of texts, got both: dit and texts.jsonl",
    ("dit", "missing.jsonl"): "expected a model's folder or files of texts, got both: dit and missing.jsonl",
    ("missing.jsonl",): "missing.jsonl: expected a file of texts, got no such file",
    ("whole.json",): "whole.json: expected a model's folder, or texts in a file that ends in .jsonl or .txt",
}


@pytest.mark.parametrize("arguments", WRONG_MODE, ids=lambda arguments: " ".join(map(str, arguments)))
def test_an_option_of_another_kind_of_evaluation_is_not_ignored(refused, arguments):
    assert WRONG_MODE[arguments] in refused("eval", *arguments)


# --- interruptions ----------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("batches", [1, 2, 5, 9])
def test_what_was_interrupted_is_completed(folder, edlm, monkeypatch, batches):
    """Within log Z, behind it, within a text, within the other; and what is there is not measured again."""
    name = f"after{batches}.json"
    with monkeypatch.context() as patched:
        stop_after(patched, batches)
        with pytest.raises(Stop):
            main([*ARGUMENTS, "--json", name])
    there = parts(folder, name)
    assert not (folder / name).exists() and len(there) == (min(batches, 2) + 3 * max(0, batches - 2) - (batches > 5))
    code, _, err = edlm(*ARGUMENTS, "--json", name)
    assert code == 2 and f"--json: {name}.part holds {len(there)} of {RECORDS} records; --resume completes them" in err
    code, _, err = edlm(*ARGUMENTS, "--json", name, "--resume", "--seed", 2)
    assert code == 2 and "(--seed: 0 there, 2 here)" in err
    counted, bounds = [], measures.log_partition_bounds
    monkeypatch.setattr(measures, "log_partition_bounds", lambda *a, **k: counted.append(1) or bounds(*a, **k))
    made, append = [], Part.append
    monkeypatch.setattr(Part, "append", lambda self, records: made.extend(r["index"] for r in records) or append(self, records))
    assert edlm(*ARGUMENTS, "--json", name, "--resume")[0] == 0
    assert sorted(made) == [n for n in range(RECORDS) if n not in there] and len(counted) == max(0, 2 - batches)
    assert_complete(folder, name)


@pytest.mark.parametrize("last", range(6))
def test_a_stop_at_every_step_of_the_end(folder, edlm, monkeypatch, last):
    name, left = f"end{last}.json", iter(range(last))

    def dying(function):
        def call(*arguments, **options):
            if next(left, None) is None:
                raise Stop
            return function(*arguments, **options)

        return call

    finish = RecordFile.finish
    with monkeypatch.context() as patched:

        def finishing(self, write):
            for owner, function in ((Path, "rename"), (Path, "unlink"), (os, "fsync"), (os, "rmdir")):
                patched.setattr(owner, function, dying(getattr(owner, function)))
            finish(self, write)

        patched.setattr(RecordFile, "finish", finishing)
        with pytest.raises(Stop):
            main([*ARGUMENTS, "--json", name])
    if (folder / name).exists():
        assert values(folder, name) == values(folder, "whole.json")
    assert edlm(*ARGUMENTS, "--json", name, "--resume")[0] == 0
    assert_complete(folder, name)


def test_ctrl_c_says_how_to_go_on(folder, edlm, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 4, KeyboardInterrupt)
        code, out, err = edlm(*ARGUMENTS, "--json", "pressed.json")
    assert (code, out) == (130, "") and "pressed.json.part holds what is done: --resume goes on from there" in err
    assert edlm(*ARGUMENTS, "--json", "pressed.json", "--resume")[0] == 0
    assert_complete(folder, "pressed.json")


# --- processes --------------------------------------------------------------------------------------------------------------------


def torchrun(folder, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "edlm", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_two_processes_complete_what_one_began_and_write_the_same(folder, monkeypatch):
    with monkeypatch.context() as patched:
        patched.chdir(folder)
        stop_after(patched, 3)
        with pytest.raises(Stop):
            main([*ARGUMENTS, "--json", "both.json"])
    done = torchrun(folder, *ARGUMENTS, "--json", "both.json", "--resume")
    assert done.returncode == 0 and done.stdout.endswith("written: both.json\n"), done.stderr
    assert done.stdout.count("dit + ar: 11 of 695 windows") == 1  # by the first process
    assert json.loads((folder / "both.json").read_text())["machine"]["processes"] == 2
    assert_complete(folder, "both.json")


def test_two_processes_need_a_file(edlm, monkeypatch):
    for rank in (0, 1):
        world = World(rank, 2, torch.device("cpu"))
        monkeypatch.setattr("edlm.train.distributed.joined", lambda device, world=world: contextlib.nullcontext(world))
        for more in ((), ("--json",)):
            code, out, err = edlm("eval", "ar", *more)
            assert (code, out) == (2, "")
            assert err.count("--json: expected a file where 2 processes share the work, got none") == (rank == 0)


def test_the_other_processes_fail_where_the_first_refuses(edlm, monkeypatch):
    class Refused(World):
        def first(self, call):
            raise ValueError("--json: what the first process says")

    for rank, said in ((0, "edlm: error: --json: what the first process says\n"), (1, "")):
        world = Refused(rank, 2, torch.device("cpu"))
        monkeypatch.setattr("edlm.train.distributed.joined", lambda device, world=world: contextlib.nullcontext(world))
        assert edlm(*ARGUMENTS, "--json", "refused.json") == (2, "", said)


def test_seconds_of_two_processes_are_told_from_those_of_one(folder, edlm):
    arguments = ["eval", "dit", "--decode", "2", "3", *("--num-texts", "2", "--length", "12", "--text", "text.txt")]
    arguments += ["--judge", "ngram:second.txt", "--device", "cpu", "--threads", "1", "--json", "shared.json"]
    done = torchrun(folder, *arguments)
    assert done.returncode == 0 and "note: seconds: rows were timed while other processes computed" in done.stdout, done.stderr
    settings = json.loads((folder / "shared.json").read_text())["settings"]
    assert (settings["--label"], settings["--device"], settings["processes"]) == ("dit", "cpu", 2)
    assert "(processes: 2 there, 1 here)" in edlm(*arguments, "--resume")[2]
    assert "(--label: dit there, mine here; " in edlm(*arguments, "--resume", "--label", "mine")[2]


def test_sigkill_leaves_what_is_done(folder, edlm):
    arguments = ["30" if a == "11" else a for a in ARGUMENTS]
    process = subprocess.Popen([sys.executable, "-m", "edlm", *arguments, "--json", "killed.json"], cwd=folder)
    for _ in range(60_000):
        if (folder / "killed.json.part" / "0-of-1.jsonl").exists() and len(parts_so_far(folder)) > 8:
            break
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    found = parts_so_far(folder)
    assert not (folder / "killed.json").exists() and found == list(range(len(found))) and len(found) < 62
    assert edlm(*arguments, "--json", "killed.json", "--resume")[0] == 0 and edlm(*arguments, "--json", "calm.json")[0] == 0
    assert values(folder, "killed.json") == values(folder, "calm.json")


def parts_so_far(folder):
    """Indices of whole lines; the last one may be half-written at any moment."""
    lines = (folder / "killed.json.part" / "0-of-1.jsonl").read_bytes().split(b"\n")
    return [json.loads(line)["index"] for line in lines[:-1]]


def test_help_says_what_is_for_decoding(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    out = capsys.readouterr().out
    assert "in which order (denoisers), with --decode:" in out and "the proposal, with --decode:" in out
    assert "the energy (denoisers), with --decode, but for --energy, --carry-over, --num-candidates:" in out
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    assert "--decode" not in capsys.readouterr().out


def test_help_does_not_wait_for_torch():
    program = "import sys; from edlm.cli import build_parser; build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
