"""``edlm data``: what it writes, what it prints, and its mistakes in one line."""

from __future__ import annotations

import argparse
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from edlm import data as room
from edlm.cli import data
from edlm.data import CharTokenizer, bundled_text, open_tokens, split

TEXT = bundled_text()[:30_000]


def run(*arguments):
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    return data.run(parser.parse_args([str(a) for a in arguments]))


def rows(captured):
    return [line.split() for line in captured.out.splitlines()]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return path


def test_build_and_info(tmp_path, text, capsys):
    out = tmp_path / "out"
    assert run("build", text, "--tokenizer", "text8", "--out", out, "--workers", 1, "--shard-tokens", 9000) == 0
    for name, part in split(TEXT)._asdict().items():
        assert (open_tokens(out / name)[:] == CharTokenizer().encode(part)).all()
    header, *lines = rows(capsys.readouterr())
    assert header == ["split", "documents", "characters", "tokens", "tokens/s"]
    count = f"{len(open_tokens(out / 'train')):,}"
    assert lines[0][:4] == ["train", "1", "27,000", count] and [line[0] for line in lines] == ["train", "valid", "test"]
    assert run("info", out) == 0
    header, *lines = rows(capsys.readouterr())
    assert lines[0][:7] == ["train", "1", "27,000", count, "uint8", "3", "28"] and len(lines) == 3
    assert run("info", out / "test") == 0
    assert rows(capsys.readouterr())[1][0] == "test"


def test_some_splits_and_the_cut(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr(data, "_PART", 500)
    assert run("build", text, "--tokenizer", "text8", "--out", tmp_path / "o", "--workers", 1, "--splits", "valid") == 0
    assert rows(capsys.readouterr())[1][:2] == ["valid", "1"]  # it was cut in three
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["valid"]
    assert (open_tokens(tmp_path / "o" / "valid")[:] == CharTokenizer().encode(split(TEXT).valid)).all()


def test_a_tokenizer_of_ones_own(tmp_path, text, capsys):
    pytest.importorskip("tokenizers", reason="the extra tokenizers is not installed")
    assert run("tokenizer", text, "--vocab-size", 400, "--out", tmp_path / "t.json") == 0
    assert "400 entries" in capsys.readouterr().out
    assert run("build", text, "--tokenizer", tmp_path / "t.json", "--out", tmp_path / "o", "--workers", 1) == 0
    tokenizer = room.open_tokenizer(tmp_path / "t.json")
    tokens = open_tokens(tmp_path / "o" / "test")
    assert tokens.dtype == np.uint16 and tokenizer.decode(tokens[:-1]) == split(TEXT).test
    assert int(tokens[-1:][0]) == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="--out: expected the name of a file in a folder that is there"):
        run("tokenizer", text, "--vocab-size", 400, "--out", tmp_path / "missing" / "t.json")


def test_mistakes(tmp_path, text):
    for arguments, message in (
        (("build", text, "--tokenizer", "gpt9", "--out", tmp_path / "o"), "tokenizer: expected 'text8', a tokenizer.json"),
        (("build", "openwebtxt", "--tokenizer", "text8", "--out", tmp_path / "o"), "did you mean openwebtext"),
        (("build", text, "--tokenizer", "text8", "--out", tmp_path / "o", "--workers", 0), "workers, shard_tokens"),
        (("info", tmp_path / "x"), "expected a token folder, or a folder of them"),
        (("info", tmp_path), "expected a token folder, or train, valid, test in it"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            run(*arguments)


def test_an_out_that_is_a_file(tmp_path, text):
    for out in (text, text / "o"):
        for command in (("build", text, "--tokenizer", "text8"), ("fetch",)):
            with pytest.raises(
                ValueError, match=rf"^--out: expected a folder, or a new name for one, got {out}, where {text} is a"
            ):
                run(*command, "--out", out)
    assert text.read_text() == TEXT


def test_a_tokenizer_on_a_full_disk(tmp_path, text, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    trained = type("Trained", (), {"save": full})()
    monkeypatch.setattr(room, "BPETokenizer", SimpleNamespace(train=lambda documents, size: trained))
    with pytest.raises(OSError, match=r"--out: .*t\.json could not be written: No space left on device; nothing of it is kept"):
        run("tokenizer", text, "--vocab-size", 400, "--out", tmp_path / "t.json")


def test_an_extra_that_is_missing(tmp_path, text, monkeypatch):
    """One line, as any other mistake; an import that fails for another reason is a fault, and stays one."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'edlm-torch\[tokenizers\]'"):
        run("tokenizer", text, "--vocab-size", 400, "--out", tmp_path / "t.json")
    monkeypatch.setattr(data, "_info", lambda options: __import__("no_such_module"))
    with pytest.raises(ImportError, match="no_such_module"):
        run("info", tmp_path)


def test_fetch(tmp_path, monkeypatch, capsys):
    calls = []
    fake = SimpleNamespace(build=lambda out, **keywords: calls.append((out, keywords)) or out)
    monkeypatch.setattr(room, "public_domain", fake, raising=False)
    monkeypatch.setitem(sys.modules, "edlm.data.public_domain", fake)
    assert run("fetch", "--out", tmp_path / "pd") == 0
    assert calls == [(tmp_path / "pd", {"cache": None, "mirrors": {}, "progress": True})]
    assert run("fetch", "--out", tmp_path / "pd", "--cache", tmp_path / "c", "--mirror", "https://a/", "http://b/") == 0
    assert calls[1][1] == {"cache": tmp_path / "c", "mirrors": {"https://a/": "http://b/"}, "progress": True}
    assert f"edlm data build {tmp_path / 'pd'}" in capsys.readouterr().out
