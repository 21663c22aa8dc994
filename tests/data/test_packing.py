"""Token files: what is stored, what is used again, and that nothing half-written or corrupt is ever taken for whole."""

from __future__ import annotations

import json

import numpy as np
import pytest
from edlm.data import CharTokenizer, normalize, open_tokens, pack, packing, replace_file

TEXT = "It is a truth universally acknowledged, that a single man in possession of 5 000 pounds must be in want of a wife."


class FakeTokenizer:
    """Character c becomes the id c * stride: large ids without a large text."""

    def __init__(self, vocab_size, stride=1, merges="a"):
        self.vocab_size, self.mask_token_id, self.stride, self.merges = vocab_size, vocab_size - 1, stride, merges
        self.calls = 0

    def encode(self, text):
        self.calls += 1
        return [ord(c) * self.stride for c in text]

    def decode(self, ids):
        return "".join(chr(i // self.stride) for i in ids)

    def description(self):
        return {"merges": self.merges}


def flip(path, at=10):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(bytes(raw))


def test_what_is_packed_is_what_is_read(tmp_path):
    path = tmp_path / "new" / "train.bin"
    tokens = pack(TEXT, CharTokenizer(), path)
    assert isinstance(tokens, np.memmap) and not tokens.flags.writeable
    assert CharTokenizer().decode(tokens) == normalize(TEXT)
    assert (open_tokens(path) == tokens).all()
    assert sorted(p.name for p in path.parent.iterdir()) == ["train.bin", "train.bin.json"]


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
    tokenizer = FakeTokenizer(vocab, stride)
    tokens = pack("hello", tokenizer, tmp_path / "t.bin")
    assert tokens.dtype == np.dtype(dtype)
    assert (tmp_path / "t.bin").stat().st_size == 5 * np.dtype(dtype).itemsize
    assert tokens.tolist() == [ord(c) * stride for c in "hello"]


def test_ids_that_would_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer: expected ids in 0 \.\. 299 without the mask 299, got 303 \.\. 333"):
        pack("hello", FakeTokenizer(300, 3), tmp_path / "t.bin")
    with pytest.raises(ValueError, match="the mask among them"):
        pack("abc", FakeTokenizer(ord("c") + 1), tmp_path / "t.bin")
    with pytest.raises(ValueError, match=r"vocab_size of at most 2\*\*32"):
        pack("abc", FakeTokenizer(2**32 + 1), tmp_path / "t.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "...", "漢字"])
def test_a_text_without_tokens(tmp_path, text):
    with pytest.raises(ValueError, match="text: expected at least one token, got none"):
        pack(text, CharTokenizer(), tmp_path / "t.bin")
    assert list(tmp_path.iterdir()) == []


def test_the_same_text_is_not_packed_twice(tmp_path):
    tokenizer, path = FakeTokenizer(300), tmp_path / "t.bin"
    pack("hello", tokenizer, path)
    before = path.stat().st_mtime_ns, path.stat().st_ino
    assert pack("hello", tokenizer, path).tolist() == [ord(c) for c in "hello"]
    assert tokenizer.calls == 1
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


@pytest.mark.parametrize("change", ["text", "vocabulary", "merges"])
def test_another_text_or_tokenizer_is_packed_anew(tmp_path, change):
    path = tmp_path / "t.bin"
    pack("hello", FakeTokenizer(300), path)
    text = "world" if change == "text" else "hello"
    other = FakeTokenizer(
        400 if change == "vocabulary" else 300, 2 if change != "text" else 1, "b" if change == "merges" else "a"
    )
    assert pack(text, other, path).tolist() == other.encode(text)


def test_tokens_in_use_outlive_their_file(tmp_path):
    """The file is replaced, not written over: a run that has it open goes on reading what it opened."""
    path = tmp_path / "t.bin"
    old = pack("hello", FakeTokenizer(300), path)
    pack("world", FakeTokenizer(300), path)
    assert old.tolist() == [ord(c) for c in "hello"]


def _edit(**values):
    def edit(bin_, manifest):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | values))

    return edit


CORRUPTIONS = {
    "a flipped bit": lambda bin_, manifest: flip(bin_),
    "cut short": lambda bin_, manifest: bin_.write_bytes(bin_.read_bytes()[:-1]),
    "longer": lambda bin_, manifest: bin_.write_bytes(bin_.read_bytes() + b"a"),
    "empty": lambda bin_, manifest: bin_.write_bytes(b""),
    "a manifest cut short": lambda bin_, manifest: manifest.write_text(manifest.read_text()[:-5]),
    "a manifest of zeros": lambda bin_, manifest: manifest.write_bytes(b"\0" * 100),
    "a manifest that is no table": lambda bin_, manifest: manifest.write_text("[]"),
    "a manifest that lacks a key": lambda bin_, manifest: manifest.write_text('{"dtype": "uint8"}'),
    "another count": _edit(count=5),
    "another type": _edit(dtype="int8"),
    "a wider type": _edit(dtype="uint16"),
    "no type": _edit(dtype=None),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corruption_is_refused_by_open_and_mended_by_pack(tmp_path, corruption):
    path = tmp_path / "t.bin"
    good = pack(TEXT, CharTokenizer(), path).tolist()
    CORRUPTIONS[corruption](path, tmp_path / "t.bin.json")
    with pytest.raises(ValueError, match=r"t\.bin.*corrupt.*remove it"):
        open_tokens(path)
    assert pack(TEXT, CharTokenizer(), path).tolist() == good
    assert open_tokens(path).tolist() == good


@pytest.mark.parametrize("gone", ["t.bin", "t.bin.json"])
def test_half_a_pair(tmp_path, gone):
    path = tmp_path / "t.bin"
    good = pack(TEXT, CharTokenizer(), path).tolist()
    (tmp_path / gone).unlink()
    with pytest.raises(FileNotFoundError, match=r"t\.bin: expected a token file and t\.bin\.json beside it"):
        open_tokens(path)
    assert pack(TEXT, CharTokenizer(), path).tolist() == good


def test_a_stop_between_the_two_files(tmp_path, monkeypatch):
    """The new tokens are there, the old manifest still is: not a pair, and made anew."""
    path, tokenizer = tmp_path / "t.bin", FakeTokenizer(300)
    pack("hello", tokenizer, path)
    real = packing.replace_file

    def stop(target, raw):
        if target.suffix == ".json":
            raise KeyboardInterrupt
        real(target, raw)

    monkeypatch.setattr(packing, "replace_file", stop)
    with pytest.raises(KeyboardInterrupt):
        pack("world", tokenizer, path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="corrupt token file"):
        open_tokens(path)
    for text in ("hello", "world"):
        assert pack(text, tokenizer, path).tolist() == tokenizer.encode(text)


def test_replacing_a_file_leaves_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a"
    replace_file(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
