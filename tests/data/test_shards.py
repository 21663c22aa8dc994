"""Token folders: slices across files, and that corruption is refused by name."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from edlm.data import CharTokenizer, open_tokens, pack, replace_file, shards
from fake_tokenizers import FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """The ids 0 .. 99 in shards of 7."""
    return pack(
        ["".join(map(chr, range(100)))], FakeTokenizer(300), tmp_path_factory.mktemp("t") / "t", source="s", shard_tokens=7
    )


def test_shards(tokens):
    assert [s["count"] for s in tokens.manifest["shards"]] == [7] * 14 + [2]
    assert [s["file"] for s in tokens.manifest["shards"]][:2] == ["00000.bin", "00001.bin"]
    assert len(tokens) == tokens.manifest["count"] == 100


@settings(max_examples=300, deadline=None)
@given(begin=st.none() | st.integers(-120, 120), end=st.none() | st.integers(-120, 120))
def test_slices_are_those_of_one_array(tokens, begin, end):
    got = tokens[begin:end]
    assert got.dtype == np.uint16 and type(got) is np.ndarray
    assert got.tolist() == list(range(100))[begin:end]


def test_a_slice_reads_only_what_it_needs(tokens):
    inside = tokens[8:13]
    assert not inside.flags.writeable and not inside.flags.owndata  # of the mapped file
    assert not tokens[7:14].flags.owndata  # from border to border
    for where in (3, slice(0, 10, 2), slice(10, 0, -1), [1, 2]):
        with pytest.raises(TypeError, match="tokens: expected a slice a:b without a step"):
            tokens[where]


def test_pickled_tokens_are_opened_again(tokens):
    raw = pickle.dumps(tokens)
    assert len(raw) < 1000
    assert pickle.loads(raw)[3:50].tolist() == list(range(3, 50))


def test_fingerprints(tmp_path):
    def make(name, text="hello", **keywords):
        return pack([text], FakeTokenizer(300, **keywords), tmp_path / name, source=name).fingerprint

    assert make("a") == make("b")
    assert len({make("a"), make("c", "hallo"), make("d", merges="b"), make("e", stride=2)}) == 4


def _edit(**values):
    def edit(folder):
        file = folder / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return edit


def _flip(folder):
    raw = bytearray((folder / "00001.bin").read_bytes())
    raw[5] ^= 1
    (folder / "00001.bin").write_bytes(raw)


SECOND = "00001.bin"
CORRUPTIONS = {
    "a flipped bit": (_flip, r"00001\.bin: corrupt shard: it does not match its checksum"),
    "cut short": (
        lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:-1]),
        "00001.bin: corrupt shard: expected 20 bytes, got 19",
    ),
    "longer": (
        lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes() + b"a"),
        "00001.bin: corrupt shard: expected 20 bytes, got 21",
    ),
    "empty": (lambda f: (f / SECOND).write_bytes(b""), "00001.bin: corrupt shard: expected 20 bytes, got 0"),
    "gone": (lambda f: (f / SECOND).unlink(), "00001.bin: expected a shard of 20 tokens, got no such file"),
    "two exchanged": (
        lambda f: [(f / SECOND).rename(f / "x"), (f / "00000.bin").rename(f / SECOND), (f / "x").rename(f / "00000.bin")],
        "00000.bin: corrupt shard: it does not match its checksum",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "expected a token folder, got one without manifest.json"),
    "a manifest cut short": (
        lambda f: (f / "manifest.json").write_text("{"),
        "manifest.json: corrupt manifest: it cannot be read",
    ),
    "a manifest of zeros": (lambda f: (f / "manifest.json").write_bytes(b"\0" * 99), "manifest.json: corrupt manifest"),
    "another count": (_edit(count=5), "manifest.json: corrupt manifest: it does not match its checksum"),
    "another type": (_edit(dtype="int8"), "manifest.json: corrupt manifest: it does not match its checksum"),
    "another source": (_edit(made_from={}), "manifest.json: corrupt manifest: it does not match its checksum"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corruption_is_refused_by_name_and_mended_by_pack(tmp_path, corruption):
    folder, text = tmp_path / "t", "it is a truth universally acknowledged that"
    good = pack([text], CharTokenizer(), folder, source="s", shard_tokens=20)[:].tolist()
    damage, message = CORRUPTIONS[corruption]
    damage(folder)
    with pytest.raises(
        ValueError, match=rf"{message}.*; remove .*t and build it again \(edlm data build; a run makes its own anew\)$"
    ):
        open_tokens(folder)
    assert pack([text], CharTokenizer(), folder, source="s", shard_tokens=20)[:].tolist() == good
    assert open_tokens(folder)[:].tolist() == good


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a token folder, got no such folder"):
        open_tokens(tmp_path / "t")
    (tmp_path / "f").write_text("x")
    (tmp_path / "d").mkdir()
    for name in "fd":
        with pytest.raises(ValueError, match=rf"{name}: expected a token folder, got one without manifest\.json, or a file$"):
            open_tokens(tmp_path / name)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"made_from": {"format": 2}}', '{"manifest_sha256": "a"}'])
def test_the_manifest_of_something_else(tmp_path, content):
    """It is somebody's: nothing is said of removing it."""
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json: expected a token folder, got the manifest of something else$"):
        open_tokens(tmp_path)


def test_without_verification_sizes_are_still_compared(tmp_path):
    folder = tmp_path / "t"
    pack(["hello " * 9], CharTokenizer(), folder, source="s", shard_tokens=20)
    _flip(folder)
    assert len(open_tokens(folder, verify=False)) == 53
    (folder / SECOND).write_bytes(b"abc")
    with pytest.raises(ValueError, match="expected 20 bytes, got 3"):
        open_tokens(folder, verify=False)


def test_a_newer_format(tmp_path, monkeypatch):
    pack(["hello"], CharTokenizer(), tmp_path / "t", source="s")
    monkeypatch.setattr(shards, "FORMAT", 3)
    with pytest.raises(ValueError, match=r"manifest\.json: expected format 3, got 2; remove"):
        open_tokens(tmp_path / "t")


def test_replacing_a_file_leaves_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a"
    replace_file(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
