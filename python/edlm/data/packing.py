"""From documents to a token folder, in several processes, in memory that does not grow with the corpus."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ..protocols import Tokenizer
from .shards import FORMAT, MANIFEST, SHARD, ShardWriter, Tokens, open_tokens, read_manifest, replace_file, write_manifest
from .text import parts
from .tokenizers import fingerprint, smallest_dtype

__all__ = ["Tokens", "open_tokens", "pack", "replace_file"]

PIECE = 1 << 20  # characters that a process gets at a time


def pack(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    source: str,
    workers: int = 1,
    shard_tokens: int = 1 << 28,
    progress: bool = False,
) -> Tokens:
    """Tokenise ``documents`` into ``folder``, in order, and open it.

    A tokenizer with an ``eos_token_id`` has it after every document, an empty one as well. One with a ``separator_id`` has that between
    two documents, and documents without a token leave no trace; it also lets long documents be cut at white space (tokenizers.py
    says what it promises for that). The ids do not depend on ``workers``; memory is a few megabytes a process, or what the longest
    document takes.

    A folder whose manifest names the same ``source``, tokenizer and format, and whose files are whole, is used as it is, and
    ``documents`` are not read. Another token folder of that name is replaced; whoever has it open goes on reading it. The new one is
    written under a temporary name beside it and renamed: the name never stands for half of the tokens.

    Args:
        tokenizer: with ``workers`` > 1 it must pickle. source: what identifies the text, such as ``Corpus.identity`` and the split.
        workers: processes that tokenise; 1 is this one. They are spawned: a script that calls this needs the usual
            ``if __name__ == "__main__"``.
        shard_tokens: tokens of a file; all but the last hold so many. progress: a bar on stderr.

    Raises:
        ValueError: there is no token; ids outside the vocabulary, or the mask; sizes below 1; the folder holds something else.
        OSError: the disk is full, or whatever else the disk says; nothing half-written is left.
    """
    if workers < 1 or shard_tokens < 1:
        raise ValueError(f"workers, shard_tokens: expected numbers >= 1, got {workers}, {shard_tokens}")
    folder = Path(folder).resolve()  # a link is written through, and "." has a name
    dtype = smallest_dtype(tokenizer.vocab_size)
    made_from = {
        "format": FORMAT,
        "source": source,
        "tokenizer": fingerprint(tokenizer),
        "vocab_size": tokenizer.vocab_size,
    }
    ready = _ready(folder, made_from)
    if ready is not None:
        return ready
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    with _temporary(folder) as temporary:
        writer, counts, begin = ShardWriter(temporary, dtype, shard_tokens), [0, 0], time.perf_counter()
        bar = tqdm(unit=" characters", unit_scale=True, desc=folder.name, disable=not progress, dynamic_ncols=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(bar)
            stack.callback(_quietly(writer.close))
            _, between = _separation(tokenizer)
            for characters, ids in _encoded(_pieces(documents, counts, cut=len(between) > 0), tokenizer, workers):
                if len(ids):
                    with _disk(folder, writer):
                        if writer.count:
                            writer.write(between)
                        writer.write(ids)
                bar.update(characters)
                bar.set_postfix_str(f"{writer.count / (time.perf_counter() - begin):.3g} tokens/s", refresh=False)
            if writer.count == 0:
                raise ValueError(
                    "text: expected at least one token, got none; is it empty, or in a script that the tokenizer drops?"
                )
            with _disk(folder, writer):
                writer.finish()
                write_manifest(
                    temporary,
                    {
                        "made_from": made_from,
                        "dtype": dtype.name,
                        "count": writer.count,
                        "documents": getattr(documents, "begun", counts[0]),  # a Corpus counts the parts of one as one
                        "characters": counts[1],
                        "shards": writer.shards,
                    },
                )
        _publish(temporary, folder)
    return open_tokens(folder, verify=False)  # they have been hashed while they were written


# --- tokens -----------------------------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    texts: list[str]
    characters: int


def _pieces(documents: Iterable[str], counts: list[int], *, cut: bool) -> Iterator[_Piece]:
    """Documents in groups of about ``PIECE`` characters. ``counts``: of documents and characters, kept up to date."""
    texts, characters, size = [], 0, 0
    for document in documents:
        counts[0] += 1
        counts[1] += len(document)
        for part in parts([document], PIECE) if cut and len(document) > PIECE else (document,):
            texts.append(part)
            characters += len(part)
            size += len(part) + 64  # a million empty documents are no small piece
            if size >= PIECE:
                yield _Piece(texts, characters)
                texts, characters, size = [], 0, 0
    if texts:
        yield _Piece(texts, characters)


def _encoded(pieces: Iterator[_Piece], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each piece's number of characters and its ids, in order; never more than a few pieces at a time in memory."""
    if workers == 1:
        for piece in pieces:
            yield piece.characters, _encode(piece.texts, tokenizer)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(tokenizer,))
    pending: deque[tuple[int, Future[np.ndarray]]] = deque()
    try:
        for piece in pieces:
            with _interrupts_wait():  # here processes are started
                future = pool.submit(_work, piece.texts)
            pending.append((piece.characters, future))
            if len(pending) > 2 * workers:
                characters, future = pending.popleft()
                yield characters, future.result()
        while pending:
            characters, future = pending.popleft()
            yield characters, future.result()
    except BrokenProcessPool:
        raise ChildProcessError(
            f"workers: expected {workers} processes that tokenise, and one of them was ended: by the system, for want of memory, or "
            'since the script that started it has no `if __name__ == "__main__"`; take fewer workers'
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C waits, unless another thread takes it. A process that is started meanwhile inherits the mask and never sees one, while
    it imports either: it would die with a traceback of its own, and the parent tells it when to end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _separation(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """What comes after every document, and what between two: one id or none."""
    end, between = getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "separator_id", None)
    ids = ([] if end is None else [end], [] if end is not None or between is None else [between])
    dtype = smallest_dtype(tokenizer.vocab_size)
    return np.array(ids[0], dtype=dtype), np.array(ids[1], dtype=dtype)


_of_this_process: Tokenizer | None = None


def _start(tokenizer: Tokenizer) -> None:
    """What a new process does first."""
    global _of_this_process
    _of_this_process = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's own threads would compete with the other processes


def _work(texts: list[str]) -> np.ndarray:
    assert _of_this_process is not None
    return _encode(texts, _of_this_process)


def _encode(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """The ids of some documents, what separates them included; no separator at either end."""
    dtype, mask = smallest_dtype(tokenizer.vocab_size), tokenizer.mask_token_id
    rows = tokenizer.encode_batch(texts) if hasattr(tokenizer, "encode_batch") else [tokenizer.encode(text) for text in texts]
    end, between = _separation(tokenizer)
    out: list[np.ndarray] = []
    for row in map(np.asarray, rows):
        if row.size:
            # Cast to the file's type, an id beyond it would quietly become another.
            low, high, masked = int(row.min()), int(row.max()), bool((row == mask).any())
            if low < 0 or high >= tokenizer.vocab_size or masked:
                raise ValueError(
                    f"tokenizer: expected ids in 0 .. {tokenizer.vocab_size - 1} without the mask {mask}, "
                    f"got {low} .. {high}{', the mask among them' if masked else ''}"
                )
            if out:
                out.append(between)
            out.append(row.astype(dtype))
        if end.size:
            out.append(end)
    return np.concatenate(out) if out else np.empty(0, dtype=dtype)


# --- the folder -------------------------------------------------------------------------------------------------------------------


def _ready(folder: Path, made_from: dict[str, Any]) -> Tokens | None:
    """The folder's tokens, where they are these and whole."""
    try:
        return open_tokens(folder) if _made_from(folder) == made_from else None
    except (OSError, ValueError):
        return None  # not whole: made anew


def _made_from(folder: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(folder)["made_from"]
    except (OSError, ValueError):
        return None


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    foreign = [folder.name] if not folder.is_dir() else [p.name for p in folder.iterdir() if not _ours(p)]
    if foreign:
        raise ValueError(
            f"folder: expected a new name or a token folder to replace, got {folder}, which holds other things "
            f"({foreign[0]}); choose another"
        )


def _ours(path: Path) -> bool:
    return path.is_file() and (path.name == MANIFEST or SHARD.fullmatch(path.name) is not None)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A locked folder beside ``folder``; the lock goes with the process, and by it ``_sweep`` knows what a kill left behind."""
    path = _partial(folder)
    path.mkdir()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left of this folder."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.partial")
    for path in folder.parent.iterdir():
        if (
            not name.fullmatch(path.name)
            or not path.is_dir()
            or not all(_ours(p) or p.suffix == ".partial" for p in path.iterdir())
        ):
            continue
        with contextlib.suppress(OSError):  # in use, or gone meanwhile
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _publish(temporary: Path, folder: Path) -> None:
    """Give the whole folder its name. A folder cannot replace a full one in one step, so the old one loses its name first."""
    if _ready(folder, read_manifest(temporary)["made_from"]) is not None:
        return  # another process was faster
    _check_replaceable(folder)  # again: writing took its time
    aside = _partial(folder)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    try:
        temporary.rename(folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _disk(folder: Path, writer: ShardWriter) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"tokens: {folder} could not be written after {writer.count} tokens: {error.strerror or error}; nothing of it is kept: "
            "free some space, or choose another disk",
        ) from error


def _quietly(call: Callable[[], None]) -> Callable[[], None]:
    def quiet() -> None:
        with contextlib.suppress(OSError):
            call()

    return quiet
