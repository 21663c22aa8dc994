"""Reading text: its forms, its corruptions, its split."""

from __future__ import annotations

import gzip
import lzma
import os

import pytest
from edlm.data import CharTokenizer, bundled_text, corpora, documents, open_text, read_text, split, text

TEXT = "It is a truth universally acknowledged — naïve. " * 200


def test_plain_and_compressed(tmp_path):
    raw = TEXT.encode()
    for name, content in {"a.txt": raw, "a.xz": lzma.compress(raw), "a.gz": gzip.compress(raw), "none": raw}.items():
        (tmp_path / name).write_bytes(content)
        assert read_text(tmp_path / name) == TEXT
        assert read_text(str(tmp_path / name)) == TEXT


def test_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfabc\xef\xbb\xbf")
    assert read_text(tmp_path / "bom.txt") == "abc\ufeff"  # only in front is it a mark


def test_bundled():
    text = read_text("bundled")
    assert text == bundled_text()
    assert 1_900_000 < len(text) < 2_200_000
    where = [text.index(words) for words in ("truth universally acknowledged", "handsome, clever, and rich", "Kellynch Hall")]
    assert where == sorted(where)
    assert "Project Gutenberg" not in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"abc\xff\xfe", "expected UTF-8, got other bytes at 3"),
        ("cut.xz", lzma.compress(TEXT.encode())[:-20], "expected .xz data, got something else or a part of it"),
        ("no.xz", b"plain text", "expected .xz data"),
        ("empty.xz", b"", "expected .xz data"),
        ("cut.gz", gzip.compress(TEXT.encode())[:-12], "expected .gz data, got something else or a part of it"),
        ("no.gz", b"plain text", "expected .gz data"),
        ("flipped.gz", gzip.compress(TEXT.encode())[:-6] + b"\0" * 6, "expected .gz data"),
        ("bad.xz", lzma.compress(b"\xff"), "expected UTF-8"),
        ("empty.txt", b"", "expected text, got an empty file"),
        ("blank.txt", b" \n\t ", "expected text, got an empty file"),
        ("bom.txt", b"\xef\xbb\xbf", "expected text, got an empty file"),
        ("empty.gz", gzip.compress(b""), "expected text, got an empty file"),
    ],
)
def test_what_is_not_text(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^text: .*{name}: {message}"):
        read_text(tmp_path / name)


def test_what_is_not_a_file(tmp_path):
    with pytest.raises(ValueError, match="text: expected a file, got the folder"):
        read_text(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"text: expected a file or 'bundled', got .*missing\.txt, which does not exist"):
        read_text(tmp_path / "missing.txt")


@pytest.mark.parametrize("size", [0, 1, 19, 20, 1000, 1001, 999_983])
def test_split_loses_nothing_and_keeps_the_order(size):
    text = "".join(chr(97 + i % 26) for i in range(size))
    parts = split(text)
    assert parts.train + parts.valid + parts.test == text
    assert abs(len(parts.train) - 0.9 * size) <= 1
    assert abs(len(parts.valid) - 0.05 * size) <= 1
    assert abs(len(parts.test) - 0.05 * size) <= 2


# --- corpora ----------------------------------------------------------------------------------------------------------------------


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes({".xz": lzma.compress, ".gz": gzip.compress}.get(path.suffix, bytes)(content.encode()))
    return path


def parts_of(corpus):
    return [list(corpus.split(name)) for name in ("train", "valid", "test")]


def test_bundled_corpus():
    corpus = open_text("bundled")
    assert parts_of(corpus) == [[part] for part in split(bundled_text())]
    assert corpus.name == "bundled" and corpus.tokenizer_hint == "text8" and corpus.identity.startswith("bundled:")


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", ["a.txt", "a.xz", "a.gz", "a"])
def test_a_file_is_split_as_its_text_is(tmp_path, name, block, monkeypatch):
    """Characters of several bytes, in whatever blocks they are read."""
    monkeypatch.setattr(text, "_BLOCK", block)
    content = TEXT[:1003] + "\U0001d538 漢字"
    corpus = open_text(write(tmp_path / name, "\ufeff" + content))
    assert parts_of(corpus) == [[part] for part in split(content)]
    assert list(documents(tmp_path / name, "test")) == [split(content).test]


def test_a_folder_of_splits(tmp_path):
    for name, content in {
        "train.txt.xz": "one",
        "valid.txt": "two",
        "test.gz": "three",
        "README.md": "no",
        "notes.txt": "no",
    }.items():
        write(tmp_path / name, content)
    assert parts_of(open_text(tmp_path)) == [["one"], ["two"], ["three"]]
    (tmp_path / "test.gz").unlink()
    with pytest.raises(ValueError, match=r"text: expected test\.txt \(or \.xz, \.gz\) in .*, got train\.txt\.xz, valid\.txt"):
        list(open_text(tmp_path).split("test"))
    write(tmp_path / "train.txt", "x")
    with pytest.raises(ValueError, match=r"one file of the split train in .*, got train\.txt and train\.txt\.xz"):
        open_text(tmp_path)


def test_a_folder_of_documents(tmp_path):
    texts = {
        "b.txt": "b" * 100,
        "a/z.txt.gz": "z" * 20,
        "a/y.xz": "y" * 40,
        "empty.txt": "",
        "short.txt": "s",
        ".hidden.txt": "h",
        "p.pdf": "p",
    }
    for name, content in texts.items():
        write(tmp_path / name, content)
    assert parts_of(open_text(tmp_path)) == [["y" * 36, "z" * 18, "b" * 90], ["yy", "z", "b" * 5], ["yy", "z", "b" * 5, "s"]]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"text: expected files that end in \.txt, \.xz, \.gz in .*none, got none"):
        open_text(tmp_path / "none")


@pytest.mark.parametrize(
    "name", ["train/a.txt", "en/Valid/b.txt", "test/c.xz", "wiki.train.txt", "validation.txt", "x/y.dev.gz", "val.txt"]
)
def test_splits_in_another_form_are_not_mixed(tmp_path, name):
    write(tmp_path / "a.txt", TEXT)
    write(tmp_path / "training" / "my train.txt", TEXT)  # no name of a split
    assert len(parts_of(open_text(tmp_path))[0]) == 2
    write(tmp_path / name, TEXT)
    with pytest.raises(
        ValueError, match=rf"^text: expected train\.txt, valid\.txt and test\.txt in .*, got split names in {name}; "
    ):
        open_text(tmp_path)


def test_hidden_folders_are_not_read(tmp_path):
    for name in (".git/a.txt", "a/.ipynb_checkpoints/b.txt", "a/.c.txt", ".train/d.txt"):
        write(tmp_path / ".hidden" / "books" / name, "hidden")  # where the folder itself lies makes no difference
    write(tmp_path / ".hidden" / "books" / "a" / "b.txt", "b" * 100)
    assert parts_of(open_text(tmp_path / ".hidden" / "books")) == [["b" * 90], ["b" * 5], ["b" * 5]]


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opened, it would wait for ever
    with pytest.raises(
        ValueError, match=r"^text: expected a file or a folder, got .*pipe, which is neither; write the text to a"
    ):
        open_text(tmp_path / "pipe")


def test_parts_of_one_document_are_one_document(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.txt", TEXT)
    write(tmp_path / "empty.txt", "")
    for part in (None, 100):
        found = open_text(tmp_path).split("train", part=part)
        assert found.begun == 0
        assert len(list(found)) == (2 if part is None else 164) and found.begun == 2


@pytest.mark.parametrize("kind", ["file", "splits", "folder"])
def test_an_identity_changes_when_the_text_does(tmp_path, kind):
    names = {"file": ["a.txt"], "splits": ["train.txt", "valid.txt"], "folder": ["a.txt", "b.txt"]}[kind]
    for name in names:
        write(tmp_path / name, name * 50)
    source = tmp_path / "a.txt" if kind == "file" else tmp_path
    before = open_text(source).identity
    assert before == open_text(source).identity and before.startswith(kind)
    write(tmp_path / names[-1], names[-1] * 50 + "!")
    assert open_text(source).identity != before


def test_a_text_moved_between_files_is_another(tmp_path):
    for folder, contents in {"1": ("ab", "c"), "2": ("a", "bc")}.items():
        for name, content in zip("xy", contents, strict=True):
            write(tmp_path / folder / f"{name}.txt", content)
    assert open_text(tmp_path / "1").identity != open_text(tmp_path / "2").identity


@pytest.mark.parametrize("size", [1, 50, 1000, 10**6])
def test_parts_of_a_long_document(tmp_path, size, monkeypatch):
    """For text8 they make no difference; none is much longer than was asked for, and only white space is lost."""
    monkeypatch.setattr(text, "_BLOCK", 64)
    corpus, whole = open_text(write(tmp_path / "a.txt", TEXT)), split(TEXT).train
    pieces = list(corpus.split("train", part=size))
    assert "".join(pieces).replace(" ", "") == whole.replace(" ", "")
    assert all(size <= len(piece) <= size + 20 for piece in pieces[:-1]) and len(pieces[-1]) <= size + 20
    encode = CharTokenizer().encode
    assert b"\x1a".join(ids.tobytes() for piece in pieces if len(ids := encode(piece))) == encode(whole).tobytes()
    with pytest.raises(ValueError, match="part: expected a number of characters >= 1, got 0"):
        corpus.split("train", part=0)


def test_sources_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"'bundled' or the name of a corpus, got openwebtxt, .*did you mean openwebtext\?"
    ):
        open_text("openwebtxt")
    with pytest.raises(FileNotFoundError, match="which does not exist; the names are text8, openwebtext"):
        open_text(tmp_path / "x")
    with pytest.raises(ValueError, match=r"blank\.txt: expected text, got an empty file"):
        open_text(write(tmp_path / "blank.txt", " \n"))
    with pytest.raises(ValueError, match="split: expected one of train, valid, test, got 'validation'"):
        open_text("bundled").split("validation")
    (tmp_path / "bad.txt").write_bytes(b"abc" * 9 + b"\xff\xfe")
    monkeypatch.setattr(text, "_BLOCK", 4)
    with pytest.raises(ValueError, match=r"bad\.txt: expected UTF-8, got other bytes at 27"):
        list(open_text(tmp_path / "bad.txt").split("train"))
    (tmp_path / "bad.txt").write_bytes(b"abc\xe6(abc")  # the beginning of a character, at the end of a block
    with pytest.raises(ValueError, match=r"bad\.txt: expected UTF-8, got other bytes at 3"):
        read_text(tmp_path / "bad.txt")


def test_a_name_goes_before_a_path_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "ptb", "a file")
    assert open_text("ptb").identity == corpora.identity("ptb")
    assert open_text("./ptb").identity.startswith("file:")
