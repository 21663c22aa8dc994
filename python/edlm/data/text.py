"""Where text comes from: the package's own, a file, a folder, or a corpus of corpora.py.

The bundled text is Jane Austen's "Pride and Prejudice" (1813), "Emma" (1815) and "Persuasion" (1817), in this order, case and
punctuation kept: 2 MB, in the public domain everywhere. The texts are those of the R package janeaustenr 1.0.0.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from . import corpora

BUNDLED = "bundled"
SPLITS = ("train", "valid", "test")
_SUFFIXES = (".txt", ".xz", ".gz")
_SPLIT_NAMES = {*SPLITS, "val", "validation", "dev"}  # as data sets of others call theirs
_BLOCK = 1 << 20  # bytes read at a time
_WHITE = re.compile(r"\s")


class Splits(NamedTuple):
    train: str
    valid: str
    test: str


class Corpus:
    """A text and its splits, read as it is asked for.

    ``name``: the source it was opened by. ``tokenizer_hint``: "text8" or "bpe", what it is usually read with.
    """

    def __init__(
        self, name: str, identify: Callable[[], str], read: Callable[[str], Iterator[Iterable[str]]], tokenizer_hint: str
    ) -> None:
        self.name, self.tokenizer_hint, self._identify, self._read = name, tokenizer_hint, identify, read

    @cached_property
    def identity(self) -> str:
        """Changes when the text does: the sha256 of the contents of files, or which corpus in which revision. Reads the files."""
        return self._identify()

    def split(self, name: str, *, part: int | None = None) -> Iterator[str]:
        """The documents of split ``name`` ("train", "valid", "test"), in order, one at a time in memory.

        Args:
            part: hand out longer documents in parts of about so many characters, cut at white space, as if each were a document: for
                files that are too large for memory, under a tokenizer to which this makes no difference (text8).

        Raises:
            ValueError: no such split; bytes that are no UTF-8, or no .xz or .gz data.
        """
        if name not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {name!r}")
        if part is not None and part < 1:
            raise ValueError(f"part: expected a number of characters >= 1, got {part}")
        return _Documents(lambda: self._read(name), part)


class _Documents(Iterator[str]):
    """Documents, or the parts that they are cut into. ``begun``: the number of documents so far, however many parts each has."""

    def __init__(self, read: Callable[[], Iterator[Iterable[str]]], part: int | None) -> None:
        self._begun = [0]  # a list, for a generator that held this object would keep its file open until the next collection
        self._texts = _texts(read, part, self._begun)

    @property
    def begun(self) -> int:
        return self._begun[0]

    def __next__(self) -> str:
        return next(self._texts)


def _texts(read: Callable[[], Iterator[Iterable[str]]], part: int | None, begun: list[int]) -> Iterator[str]:
    for blocks in read():
        begun[0] += 1
        if part is None:
            yield blocks if isinstance(blocks, str) else "".join(blocks)
        else:
            yield from parts([blocks] if isinstance(blocks, str) else blocks, part)


def open_text(source: str | Path) -> Corpus:
    """A text by its source.

    - ``"bundled"``, or a name of corpora.py ("openwebtext"); a file or folder of that name is written ``./openwebtext``.
    - A UTF-8 file (.txt, .xz, .gz, or of any other ending, plain): one document, split 90 / 5 / 5 per cent, in order.
    - A folder with train.*, valid.* and test.* (.txt, .xz, .gz): these are the splits, one document each.
    - A folder of other .txt, .xz and .gz files, at any depth: each a document, in the order of their paths, each split 90 / 5 / 5.
      Files and folders whose names begin with a dot are left out.

    Raises:
        FileNotFoundError: no such file, and no known name. ValueError: an empty file, a pipe, a folder without text, or one whose
        files or folders deeper down are named after splits (``train/``, ``wiki.valid.txt``): cut 90 / 5 / 5 they would be mixed.
    """
    if source == BUNDLED:
        text = split(bundled_text())
        digest = hashlib.sha256("".join(text).encode()).hexdigest()
        return Corpus(BUNDLED, lambda: f"bundled:{digest}", lambda name: iter([getattr(text, name)]), "text8")
    if isinstance(source, str) and source in corpora.CORPORA:
        return Corpus(
            source,
            lambda: corpora.identity(source),
            lambda name: corpora.documents(source, name),
            corpora.CORPORA[source].tokenizer_hint,
        )
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"text: expected a file, a folder, {BUNDLED!r} or the name of a corpus, got {source}, which does not exist; "
            f"{corpora.nearest(str(source))}"
        )
    if path.is_dir():
        return _folder(path)
    if not path.is_file():  # it would have to be read several times
        raise ValueError(f"text: expected a file or a folder, got {source}, which is neither; write the text to a file first")
    with closing(_blocks(path)) as blocks:
        if not any(block.strip() for block in blocks):
            raise ValueError(f"text: {path}: expected text, got an empty file")
    return Corpus(str(source), lambda: f"file:{_sha256([path])}", lambda name: _shares([path], name), "text8")


def documents(source: str | Path, name: str = "train") -> Iterator[str]:
    """The documents of one split of ``source``. Raises as ``open_text``."""
    return open_text(source).split(name)


def bundled_text() -> str:
    """The text that comes with the package."""
    with resources.files("edlm.data").joinpath("austen.txt.xz").open("rb") as stream:
        return lzma.decompress(stream.read()).decode("utf-8")


def read_text(source: str | Path) -> str:
    """``"bundled"``, or a UTF-8 file: plain, ``.xz`` or ``.gz``; a byte order mark is dropped.

    Raises:
        FileNotFoundError: no such file. ValueError: not UTF-8, not what its ending says, or nothing but white space.
    """
    if source == BUNDLED:
        return bundled_text()
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"text: expected a file, got the folder {path}; name one of its files")
    if not path.exists():
        raise FileNotFoundError(f"text: expected a file or {BUNDLED!r}, got {path}, which does not exist")
    text = "".join(_blocks(path))
    if not text.strip():
        raise ValueError(f"text: {path}: expected text, got an empty file")
    return text


def split(text: str) -> Splits:
    """90 / 5 / 5 per cent, in order: what is validated and tested on comes after all that is trained on."""
    a, b = _borders(len(text))
    return Splits(text[:a], text[a:b], text[b:])


def parts(blocks: Iterable[str], size: int) -> Iterator[str]:
    """The text that ``blocks`` make up, in parts of at least ``size`` characters, each cut at a white space, which is dropped.

    Text without white space stays in one part; the last part is as long as it is.
    """
    rest = ""
    for block in blocks:
        text, begin = rest + block, 0
        while len(text) - begin > size and (white := _WHITE.search(text, begin + size)):
            yield text[begin : white.start()]
            begin = white.end()
        rest = text[begin:]
    if rest:
        yield rest


def _folder(folder: Path) -> Corpus:
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in _SUFFIXES and p.name.split(".")[0] in SPLITS)
    if not files:
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in _SUFFIXES and not _hidden(p, folder))
        if not files:
            raise ValueError(f"text: expected files that end in {', '.join(_SUFFIXES)} in {folder}, got none")
        if named := [p.relative_to(folder).as_posix() for p in files if _names_a_split(p, folder)]:
            raise ValueError(
                f"text: expected train.txt, valid.txt and test.txt in {folder}, got split names in {', '.join(named[:3])}"
                f"{', ...' if len(named) > 3 else ''}; name the files so, or build each folder by itself"
            )
        return Corpus(str(folder), lambda: f"folder:{_sha256(files)}", lambda name: _shares(files, name), "text8")
    of: dict[str, Path] = {}
    for file in files:
        name = file.name.split(".")[0]
        if name in of:
            raise ValueError(f"text: expected one file of the split {name} in {folder}, got {of[name].name} and {file.name}")
        of[name] = file

    def read(name: str) -> Iterator[Iterable[str]]:
        if name not in of:
            raise ValueError(f"text: expected {name}.txt (or .xz, .gz) in {folder}, got {', '.join(p.name for p in files)}")
        return iter([_blocks(of[name])])

    names = ",".join(of)
    return Corpus(str(folder), lambda: f"splits:{names}:{_sha256(files)}", read, "text8")


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _names_a_split(file: Path, folder: Path) -> bool:
    *folders, name = (part.lower() for part in file.relative_to(folder).parts)
    return not _SPLIT_NAMES.isdisjoint([*folders, *name.split(".")])


def _shares(files: list[Path], name: str) -> Iterator[Iterable[str]]:
    """Of each file its 90 or 5 per cent, where there are any. A file is read twice: once for its length."""
    for file in files:
        total = sum(len(block) for block in _blocks(file))
        a, b = _borders(total)
        begin, end = {"train": (0, a), "valid": (a, b), "test": (b, total)}[name]
        if end > begin:
            yield _between(_blocks(file), begin, end)


def _between(blocks: Iterator[str], begin: int, end: int) -> Iterator[str]:
    """Characters ``begin`` .. ``end`` - 1."""
    at = 0
    for block in blocks:
        if at >= end:
            return
        yield block[max(0, begin - at) : end - at]
        at += len(block)


def _borders(characters: int) -> tuple[int, int]:
    return int(0.9 * characters), int(0.95 * characters)


def _blocks(path: Path) -> Iterator[str]:
    """A file's text, a block at a time, without a byte order mark. Raises ValueError as ``read_text``."""
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    decoder, at, first = codecs.getincrementaldecoder("utf-8")(), 0, True
    try:
        with opener(path, "rb") as stream:
            while True:
                raw = stream.read(_BLOCK)
                held = len(decoder.getstate()[0])  # the beginning of a character that the last block ended in
                block = decoder.decode(raw, final=not raw)
                yield block.removeprefix("\ufeff") if first else block
                if not raw:
                    return
                at, first = at + len(raw), first and not block
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"text: {path}: expected {path.suffix} data, got something else or a part of it: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: {path}: expected UTF-8, got other bytes at {at - held + error.start}; convert it first"
        ) from None


def _sha256(files: list[Path]) -> str:
    """Of the contents of all files, and of where one ends."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()
