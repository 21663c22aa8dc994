"""Packing: what is stored, what is used again, and that nothing half-written is ever taken for whole."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from edlm.data import CharTokenizer, bundled_text, normalize, open_text, open_tokens, pack, packing, shards, split
from edlm.data.tokenizers import fingerprint
from fake_tokenizers import DyingTokenizer, EndingTokenizer, FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

TEXT = "It is a truth universally acknowledged, that a single man in possession of 5 000 pounds must be in want of a wife."


def ords(*documents):
    return [ord(c) for c in "".join(documents)]


def test_what_is_packed_is_what_is_read(tmp_path):
    tokens = pack([TEXT], CharTokenizer(), tmp_path / "new" / "train", source="austen/train")
    assert tokens.dtype == np.uint8 and len(tokens) == len(normalize(TEXT))
    assert CharTokenizer().decode(tokens[:]) == normalize(TEXT)
    assert (open_tokens(tmp_path / "new" / "train")[:] == tokens[:]).all()
    assert sorted(p.name for p in (tmp_path / "new").rglob("*")) == ["00000.bin", "manifest.json", "train"]
    manifest = json.loads((tmp_path / "new" / "train" / "manifest.json").read_text())
    assert manifest["made_from"] == {
        "format": 2,
        "source": "austen/train",
        "tokenizer": fingerprint(CharTokenizer()),
        "vocab_size": 28,
    }
    assert (manifest["documents"], manifest["characters"], manifest["count"]) == (1, len(TEXT), len(tokens))
    assert tokens.manifest["dtype"] == "uint8"


def test_the_bundled_text_is_as_it_was(tmp_path):
    tokens = pack(open_text("bundled").split("train"), CharTokenizer(), tmp_path / "t", source="bundled")
    assert (tokens[:] == CharTokenizer().encode(split(bundled_text()).train)).all()


@pytest.mark.parametrize(
    ("vocab", "stride", "dtype"),
    [
        (28, 0, "uint8"),
        (256, 1, "uint8"),
        (257, 1, "uint16"),
        (300, 2, "uint16"),
        (65_536, 500, "uint16"),
        (70_000, 555, "uint32"),
    ],
)
def test_the_smallest_type_that_holds_the_vocabulary(tmp_path, vocab, stride, dtype):
    tokens = pack(["hello"], FakeTokenizer(vocab, stride), tmp_path / "t", source="s")
    assert tokens.dtype == np.dtype(dtype)
    assert (tmp_path / "t" / "00000.bin").stat().st_size == 5 * np.dtype(dtype).itemsize
    assert tokens[:].tolist() == [ord(c) * stride for c in "hello"]


def test_ids_that_would_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer: expected ids in 0 \.\. 299 without the mask 299, got 303 \.\. 333"):
        pack(["hello"], FakeTokenizer(300, 3), tmp_path / "t", source="s")
    with pytest.raises(ValueError, match="the mask among them"):
        pack(["x", "abc"], FakeTokenizer(ord("x") + 1), tmp_path / "t", source="s")
    with pytest.raises(ValueError, match=r"vocab_size of at most 2\*\*32"):
        pack(["abc"], FakeTokenizer(2**32 + 1), tmp_path / "t", source="s")
    for sizes in ({"workers": 0}, {"shard_tokens": 0}):
        with pytest.raises(ValueError, match="workers, shard_tokens: expected numbers >= 1"):
            pack(["abc"], CharTokenizer(), tmp_path / "t", source="s", **sizes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("documents", [[], [""], ["..."], ["漢字", "1"[:0]]])
def test_a_text_without_tokens(tmp_path, documents):
    with pytest.raises(ValueError, match="text: expected at least one token, got none"):
        pack(documents, CharTokenizer(), tmp_path / "t", source="s")
    assert list(tmp_path.iterdir()) == []


# --- documents --------------------------------------------------------------------------------------------------------------------


def test_what_separates_documents(tmp_path):
    documents = ["ab", "", "!?", "c"]
    text8 = pack(documents, CharTokenizer(), tmp_path / "a", source="s")
    assert CharTokenizer().decode(text8[:]) == "ab c"  # one space; those that are empty leave none
    ends = pack(documents, EndingTokenizer(300), tmp_path / "b", source="s")
    assert ends[:].tolist() == [*ords("ab"), 0, 0, *ords("!?"), 0, *ords("c"), 0]
    bare = pack(documents, FakeTokenizer(300), tmp_path / "c", source="s")
    assert bare[:].tolist() == ords(*documents)
    assert text8.manifest["documents"] == ends.manifest["documents"] == 4


WORDS = st.lists(st.text(alphabet="ab 1\n.漢\u00a0", max_size=30), max_size=8)


@settings(max_examples=60, deadline=None)
@given(documents=WORDS, piece=st.integers(1, 200))
def test_where_a_text_is_cut_changes_nothing(tmp_path_factory, documents, piece):
    """Pieces of any size, documents cut at white space among them: the text8 ids of all documents joined by spaces."""
    whole, folder = CharTokenizer().encode(" ".join(documents)), tmp_path_factory.mktemp("t")
    if not len(whole):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PIECE", piece)
        assert pack(documents, CharTokenizer(), folder / "t", source="s")[:].tolist() == whole.tolist()
        ends = pack(documents, EndingTokenizer(70_000), folder / "e", source="s", shard_tokens=7)
        assert ends[:].tolist() == [i for d in documents for i in (*ords(d), 0)]


def test_the_number_of_processes_changes_nothing(tmp_path, monkeypatch):
    """Two real ones; the documents are of uneven sizes, and the shards' borders fall inside of them."""
    monkeypatch.setattr(packing, "PIECE", 2000)
    random = np.random.default_rng(0)
    documents = ["".join(map(chr, random.integers(1, 120, size=n))) for n in random.integers(0, 900, size=100)]
    alone = pack(documents, EndingTokenizer(300), tmp_path / "1", source="s", shard_tokens=1000)
    together = pack(iter(documents), EndingTokenizer(300), tmp_path / "2", source="s", shard_tokens=1000, workers=2)
    assert alone[:].tolist() == [i for d in documents for i in (*ords(d), 0)]
    assert together.manifest == alone.manifest and together.fingerprint == alone.fingerprint
    assert len(alone.manifest["shards"]) == -(-len(alone) // 1000)


class NoPool:
    """ProcessPoolExecutor's place: nothing is done before somebody waits for it; it counts what waits."""

    waiting, most = 0, 0

    def __init__(self, workers, context, *, initializer, initargs):
        self.tokenizer = initargs[0]

    def submit(self, work, texts):
        NoPool.waiting += 1
        NoPool.most = max(NoPool.most, NoPool.waiting)
        future, tokenizer = Future(), self.tokenizer

        def result():
            NoPool.waiting -= 1
            return packing._encode(texts, tokenizer)

        future.result = result
        return future

    def shutdown(self, **_):
        pass


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_than_a_few_pieces_wait(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(packing, "PIECE", 100)
    monkeypatch.setattr(packing, "ProcessPoolExecutor", NoPool)
    monkeypatch.setattr(NoPool, "most", 0)
    written, ahead = [0], []
    real = shards.ShardWriter.write
    monkeypatch.setattr(shards.ShardWriter, "write", lambda self, ids: (written.__setitem__(0, self.count), real(self, ids))[1])

    def documents():
        for i in range(500):
            ahead.append(i * 50 - written[0])
            yield "x" * 50

    pack(documents(), FakeTokenizer(300), tmp_path / "t", source="s", workers=workers)
    assert NoPool.most == (2 * workers + 1 if workers > 1 else 0)
    assert max(ahead) <= 100 * (2 * workers + 3)


def test_a_process_that_is_killed(tmp_path):
    """Reported as such; nothing is left."""
    with pytest.raises(OSError, match=r"workers: .*one of them was ended.*take fewer workers"):
        pack(["abc"], DyingTokenizer(300), tmp_path / "t", source="s", workers=2)
    assert list(tmp_path.iterdir()) == []


# --- the folder -------------------------------------------------------------------------------------------------------------------


def test_the_same_text_is_not_packed_twice(tmp_path):
    tokenizer, folder = FakeTokenizer(300), tmp_path / "t"
    pack(["hello"], tokenizer, folder, source="s")
    before = folder.stat().st_ino, (folder / "00000.bin").stat().st_mtime_ns

    def never():
        raise AssertionError
        yield

    assert pack(never(), tokenizer, folder, source="s")[:].tolist() == ords("hello")
    assert tokenizer.calls == 1
    assert (folder.stat().st_ino, (folder / "00000.bin").stat().st_mtime_ns) == before


@pytest.mark.parametrize("change", ["source", "vocabulary", "merges", "format"])
def test_another_text_or_tokenizer_is_packed_anew(tmp_path, change, monkeypatch):
    folder = tmp_path / "t"
    old = pack(["hello", "you"], FakeTokenizer(300), folder, source="s", shard_tokens=3)
    if change == "format":
        monkeypatch.setattr(packing, "FORMAT", 3)
        monkeypatch.setattr(shards, "FORMAT", 3)
    other = FakeTokenizer(400 if change == "vocabulary" else 300, merges="b" if change == "merges" else "a")
    new = pack(["world"], other, folder, source="r" if change == "source" else "s")
    assert new[:].tolist() == ords("world")
    assert [p.name for p in tmp_path.iterdir()] == ["t"] and len(list(folder.iterdir())) == 2
    assert old[:].tolist() == ords("helloyou")  # whoever has it open goes on reading what he opened


@pytest.mark.parametrize("damage", ["flip", "no manifest", "no shard"])
def test_what_is_damaged_is_packed_anew(tmp_path, damage):
    folder = tmp_path / "t"
    pack([TEXT], CharTokenizer(), folder, source="s")
    if damage == "flip":
        raw = bytearray((folder / "00000.bin").read_bytes())
        raw[10] ^= 1
        (folder / "00000.bin").write_bytes(raw)
    else:
        (folder / ("manifest.json" if damage == "no manifest" else "00000.bin")).unlink()
    assert CharTokenizer().decode(pack([TEXT], CharTokenizer(), folder, source="s")[:]) == normalize(TEXT)


def test_what_is_no_token_folder_is_left_alone(tmp_path):
    for name, make in {
        "thesis": lambda p: p.mkdir() or (p / "thesis.tex").write_text("x"),
        "file": lambda p: p.write_text("x"),
        "nested": lambda p: (p / "00000.bin").mkdir(parents=True),
    }.items():
        make(tmp_path / name)
        with pytest.raises(ValueError, match="folder: expected a new name or a token folder to replace"):
            pack([TEXT], CharTokenizer(), tmp_path / name, source="s")
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "x"
    (tmp_path / "empty").mkdir()
    assert len(pack([TEXT], CharTokenizer(), tmp_path / "empty", source="s"))


@pytest.mark.parametrize("before", [False, True])
def test_a_full_disk(tmp_path, before):
    """A real refusal to write: no file may grow beyond 2**14 bytes."""
    folder = tmp_path / "t"
    if before:
        pack(["old"], FakeTokenizer(300), folder, source="old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, hard))
    try:
        with pytest.raises(OSError, match=r"tokens: .*t could not be written after .*nothing of it is kept.*free some space"):
            pack(["x" * 2**15], FakeTokenizer(300), folder, source="new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == (["t"] if before else [])
    if before:
        assert open_tokens(folder)[:].tolist() == ords("old")


def test_a_disk_that_is_full_at_the_very_end(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device; nothing of it is kept"):
        pack(["hello"], FakeTokenizer(300), tmp_path / "t", source="s")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_documents_is_theirs(tmp_path):
    def broken():
        yield "abc"
        raise OSError("no network")

    with pytest.raises(OSError, match=r"^no network$"):
        pack(broken(), FakeTokenizer(300), tmp_path / "t", source="s")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_half_folder(tmp_path):
    """What is left under a temporary name is removed by the next one; one that is being written is not."""
    program = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from edlm.data import pack
from fake_tokenizers import FakeTokenizer
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where tests run in a shell's background
def documents():
    yield "x" * 3_000_000
    os.kill(os.getpid(), signal.SIGKILL)
    yield "x"
pack(documents(), FakeTokenizer(300), sys.argv[1], source="s")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "t"), str(Path(__file__).parent)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".t.") and left.name.endswith(".partial") and any(left.iterdir())
    with packing._temporary((tmp_path / "t").resolve()) as alive:
        assert pack(["hello"], FakeTokenizer(300), tmp_path / "t", source="s")[:].tolist() == ords("hello")
        assert alive.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_an_interrupt_while_processes_start(tmp_path):
    """As Ctrl-C sends it, to all processes at once: those that are importing say nothing, and the parent ends them."""
    program = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[2])
from edlm.data import pack
from fake_tokenizers import FakeTokenizer
def documents():
    yield "x" * 3_000_000
    time.sleep(0.5)  # by now the new process has handlers of its own
    os.killpg(0, signal.SIGINT)
    yield "x"
try:
    pack(documents(), FakeTokenizer(300), sys.argv[1], source="s", workers=2)
except KeyboardInterrupt:
    sys.exit(130)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "t"), str(Path(__file__).parent)],
        check=False,
        capture_output=True,
        start_new_session=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (130, b"") and list(tmp_path.iterdir()) == []


def test_an_interrupt_is_not_lost():
    """One that comes while a process is started is raised right afterwards."""
    waited, found = [], signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where tests run in the background

    def start():
        with packing._interrupts_wait():
            signal.raise_signal(signal.SIGINT)
            waited.append(True)

    with pytest.raises(KeyboardInterrupt):
        start()
    signal.signal(signal.SIGINT, found)
    assert waited and signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_two_at_a_time(tmp_path, monkeypatch):
    """The second to finish finds the first one's folder: it is these tokens, and stays."""
    folder, real = tmp_path / "t", packing._publish

    def slow(temporary, target):
        monkeypatch.setattr(packing, "_publish", real)
        first = pack(["hello"], FakeTokenizer(300), folder, source="s")
        inode.append(os.stat(first.folder).st_ino)
        real(temporary, target)

    inode = []
    monkeypatch.setattr(packing, "_publish", slow)
    assert pack(["hello"], FakeTokenizer(300), folder, source="s")[:].tolist() == ords("hello")
    assert [folder.stat().st_ino] == inode and [p.name for p in tmp_path.iterdir()] == ["t"]


def test_progress_counts_characters(tmp_path, capsys):
    pack([TEXT] * 3, CharTokenizer(), tmp_path / "train", source="s", progress=True)
    shown = capsys.readouterr().err
    assert "train: " in shown and f"{3 * len(TEXT)} characters" in shown and "tokens/s" in shown
