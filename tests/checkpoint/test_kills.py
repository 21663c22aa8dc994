"""A kill at any moment, leftovers of one, and a reader beside a writer: a load gets the old checkpoint or the new one, whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
from edlm.checkpoint import clean, kind_of, load, native, save
from tiny_checkpoint import META, alone, same, snapshot, tensors


@pytest.fixture
def path(tmp_path):
    save(tmp_path / "deep" / "model", kind="dit", meta=META, tensors=tensors())
    return tmp_path / "deep" / "model"


def test_a_failure_between_the_two_renames_brings_the_old_one_back(path, monkeypatch):
    rename = type(path).rename

    def failing(self, target):
        if self.name.endswith(".partial") and not str(target).endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(path), "rename", failing)
    with pytest.raises(KeyboardInterrupt):
        save(path, kind="dit", meta={}, tensors=tensors(2.0))
    monkeypatch.undo()
    assert same(load(path).tensors, tensors()) and alone(path)


def test_a_leftover_previous_is_the_checkpoint(path):
    """Killed between the two renames: load reads it where it is, a save goes on from there, clean gives it its name back."""
    aside, partial = path.parent / ".model.previous", path.parent / ".model.0011aabb.partial"
    path.rename(aside)
    shutil.copytree(aside, partial)
    before = snapshot(path.parent)
    assert same(load(path, kind="dit").tensors, tensors()) and kind_of(path) == "dit"
    assert snapshot(path.parent) == before
    clean(path.parent)
    assert alone(path) and same(load(path).tensors, tensors())

    path.rename(aside)
    save(path, kind="dit", meta={}, tensors=tensors(2.0))
    assert alone(path) and same(load(path).tensors, tensors(2.0))


def test_a_writer_that_finishes_while_load_looks(path, monkeypatch):
    """The name was missing at the first look, and is there again when ``.previous`` has gone."""
    aside, stat = path.parent / ".model.previous", type(path).stat
    path.rename(aside)

    def finishing(self, **kwargs):
        if self == aside and not path.exists():
            os.rename(aside, path)
        return stat(self, **kwargs)

    monkeypatch.setattr(type(path), "stat", finishing)
    assert same(load(path).tensors, tensors())
    assert path.exists()


def test_a_leftover_previous_beside_the_new_one(path):
    shutil.copytree(path, path.parent / ".model.previous")
    save(path, kind="dit", meta={}, tensors=tensors(2.0))
    assert alone(path) and same(load(path).tensors, tensors(2.0))
    shutil.copytree(path, path.parent / ".model.previous")
    clean(path.parent)
    assert alone(path) and same(load(path).tensors, tensors(2.0))


def test_clean_touches_only_what_save_leaves(path):
    folder = path.parent
    half = folder / ".model.0011aabb.partial"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (half / ".tmpAbCdEf").write_bytes(b"safetensors' own")
    (folder / ".film.0011aabb.partial").mkdir()
    (folder / ".film.0011aabb.partial" / "film.mkv").write_text("somebody's download")
    (folder / ".photos.partial").mkdir()
    (folder / ".tokens.bin.0011aabb.partial").write_text("another room's")
    (folder / ".settings.previous").mkdir()
    before = snapshot(folder)
    clean(folder)
    assert {n for n in before if n not in snapshot(folder)} == {
        half.name,
        f"{half.name}/model.safetensors",
        f"{half.name}/.tmpAbCdEf",
    }
    clean(folder / "absent")


SAVES_FOREVER = """
import sys, torch
from edlm.checkpoint import save
step = int(sys.argv[2])
while True:
    step += 1
    save(sys.argv[1], kind="k", meta={"step": step}, tensors={s: {"x": torch.full((2000,), float(step))} for s in "ab"})
    print(step, flush=True)
"""


def whole(stored):
    """The step of a checkpoint of ``SAVES_FOREVER``; its parts are of one step."""
    step = stored.meta["step"]
    assert all((stored.tensors[s]["x"] == step).all() and len(stored.tensors[s]["x"]) == 2000 for s in "ab")
    return step


def start(path, step):
    process = subprocess.Popen([sys.executable, "-c", SAVES_FOREVER, str(path), str(step)], stdout=subprocess.PIPE, text=True)
    assert int(process.stdout.readline()) == step + 1
    return process


def test_sigkill_at_any_moment(tmp_path):
    """The child forks a saver again and again (imports are paid once) and kills it; each time load gets the last step or the next."""
    program = f"""
import os, random, signal, sys, time
import torch
from edlm.checkpoint import load, save
torch.set_num_threads(1)
path, rng, step = sys.argv[1], random.Random(0), 0
save(path, kind="k", meta={{"step": 0}}, tensors={{s: {{"x": torch.zeros(2000)}} for s in "ab"}})
seen = {{"whole": 0, "aside": 0, "partial": 0}}
for _ in range(150):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)
        sys.argv[2:] = [str(step)]
        exec({SAVES_FOREVER!r}, {{}})
    os.close(write)
    with os.fdopen(read) as told:
        acknowledged = int(told.readline())
        time.sleep(rng.random() * 0.02)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for line in told.read().split("\\n")[:-1]:
            acknowledged = int(line)
    stored = load(path, kind="k")
    step = stored.meta["step"]
    assert step in (acknowledged, acknowledged + 1), (step, acknowledged)
    assert all((stored.tensors[s]["x"] == step).all() for s in "ab")
    names = os.listdir(os.path.dirname(path))
    seen["whole"] += 1
    seen["aside"] += any(n.endswith(".previous") for n in names)
    seen["partial"] += any(n.endswith(".partial") for n in names)
print(seen)
"""
    path = tmp_path / "c"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.replace("'", '"'))
    assert seen["whole"] == 150
    assert seen["partial"] > 10, "the kills did not hit the writing"
    step = whole(load(path))
    clean(tmp_path)
    assert whole(load(path)) == step and alone(path)


def test_a_reader_beside_a_writer(tmp_path):
    """No pause in which there is no checkpoint, and no mixture of two."""
    path = tmp_path / "c"
    writer = start(path, 0)
    drain = threading.Thread(target=writer.stdout.read, daemon=True)
    drain.start()
    try:
        steps = []
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            steps.append(whole(load(path, kind="k")))
            assert kind_of(path) == "k"
    finally:
        writer.kill()
        writer.wait()
        drain.join()
        writer.stdout.close()
    assert steps == sorted(steps) and len(set(steps)) > 10


def dying(function, left):
    """The function, until ``left`` is used up; then the process ends there and then."""

    def call(*args, **kwargs):
        if next(left, None) is None:
            os._exit(9)
        return function(*args, **kwargs)

    return call


def test_a_kill_at_every_step_of_a_replacement(path):
    """Every renaming, flush and removal in turn is the last thing that a writer does."""
    place = path.parent
    for last in range(30):
        folder = place.parent / f"at{last}"
        shutil.copytree(place, folder)
        child = os.fork()
        if child == 0:
            left = iter(range(last))
            for owner, name in ((type(path), "rename"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (native, "save_file")):
                setattr(owner, name, dying(getattr(owner, name), left))
            code = 1
            try:
                save(folder / "model", kind="dit", meta=META, tensors=tensors(2.0))
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        stored = load(folder / "model").tensors
        assert same(stored, tensors()) or same(stored, tensors(2.0))
        clean(folder)
        assert alone(folder / "model")
        assert same(load(folder / "model").tensors, stored)
        if code == 0:
            break
    assert code == 0 and last >= 8 and same(stored, tensors(2.0))


def test_everything_is_on_the_disk_before_it_has_its_name(path, monkeypatch):
    """What no kill shows, but a power cut would: files, then their folder, then the name, then the name's folder, then the old goes."""
    events, fsync, rename = [], os.fsync, type(path).rename

    def flushing(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        events.append((status.st_ino, status.st_size))

    def renaming(self, target):
        events.append(f"{self.name} -> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(type(path), "rename", renaming)
    save(path, kind="dit", meta=META, tensors=tensors(2.0))
    monkeypatch.undo()

    named = next(i for i, event in enumerate(events) if str(event).endswith(".partial -> model"))
    gone = next(i for i, event in enumerate(events) if str(event).startswith(".model.previous -> "))
    files = {(p.stat().st_ino, p.stat().st_size) for p in path.iterdir()}  # whole when they were flushed
    assert len(files) == 3 and files <= set(events[:named])
    flushed = [event[0] if isinstance(event, tuple) else None for event in events]
    assert path.stat().st_ino in flushed[max(events.index(file) for file in files) + 1 : named]
    assert path.parent.stat().st_ino in flushed[named + 1 : gone]
