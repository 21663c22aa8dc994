"""Reading text: its forms, its corruptions, its split."""

from __future__ import annotations

import gzip
import lzma

import pytest
from edlm.data import bundled_text, read_text, split

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
