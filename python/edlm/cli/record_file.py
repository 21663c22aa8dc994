"""A file made of records that is whole or not there; what is not finished can be completed, by any number of processes.

``FILE`` appears by one renaming: the records, one a line in order of their ``index``, or what is made of them. Beside it lies
``FILE.settings.json``: what it was made from; a file that says so itself has none. Until then there is the folder ``FILE.part``: the
settings, and ``R-of-N.jsonl``, what process R of N has appended so far, whole batches of records. A record is known by its index, so it
does not matter who wrote it, and what was written twice is the same.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeVar

from ..data.shards import replace_file
from .printing import short

if TYPE_CHECKING:
    from ..train.distributed import World

FORMAT = 1
T = TypeVar("T")
_WAIT = timedelta(days=30)  # for the slowest process
_PART = re.compile(r"\d+-of-\d+\.jsonl")
_SETTINGS, _LOCK, _WHOLE = "settings.json", ".lock", "whole.jsonl"


@dataclass(frozen=True)
class Kind:
    """Whose files they are, and how messages speak of them."""

    command: str  # the key of the format's number
    option: str  # by which the file is named
    records: str  # what a record is, in the plural
    describes_itself: bool = False  # the finished file is JSON with the settings in it


SAMPLES = Kind("edlm sample", "--out", "texts")
DOCUMENT = Kind("edlm eval", "--json", "records", describes_itself=True)


class RecordFile:
    """``total`` records; a context, at whose end others may have the name.

    ``shown`` is written beside the settings, and compared with nothing.
    """

    def __init__(self, path: str | Path, total: int, shown: Mapping[str, Any] | None = None, kind: Kind = SAMPLES) -> None:
        self.path, self.total, self.shown, self.kind = Path(path), total, dict(shown or {}), kind
        self.settings: dict[str, Any] = {}
        self.folder = self.path.with_name(self.path.name + ".part")
        self.sidecar = self.path if kind.describes_itself else self.path.with_name(self.path.name + ".settings.json")
        self._option, self._noun = kind.option, kind.records
        self._lock: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def begin(self, settings: Mapping[str, Any], resume: bool, free: Mapping[str, Any] | None = None) -> bool:
        """Claim the name, for one process of those that share the work. False: the file is there, complete.

        Args:
            settings: everything that shapes the records, plain values by the names of their options.
            resume: go on with what is there; where nothing is, begin.
            free: settings that an unfinished file may decide, and these values otherwise: they are in ``settings`` afterwards.

        Raises:
            ValueError: the name is taken, by a finished file or an unfinished one; or, to be resumed, by one of other settings.
        """
        self.settings = json.loads(json.dumps(settings))  # pairs become lists, as those that are read
        if not self.path.parent.is_dir():
            raise ValueError(
                f"{self._option}: expected a file in a folder that exists, got {self.path}; make {self.path.parent} first, or choose "
                "another"
            )
        if self.path.exists():
            self._check_finished(resume, free)
            return False
        if self.sidecar.exists() and self._read(self.sidecar) is None:
            raise ValueError(
                f"{self._option}: {self.sidecar} is wanted for the settings, and is there; choose another name, or remove it"
            )
        self._check_folder()
        self.folder.mkdir(exist_ok=True)
        self._take_lock()
        stored, found = self._read(self.folder / _SETTINGS), len(self.records())
        if stored is not None and found:
            if not resume:
                raise ValueError(
                    f"{self._option}: {self.folder} holds {found} of {stored[self._noun]} {self._noun}; --resume completes "
                    "them, or remove that folder"
                )
            self._check_same(stored, self.folder, free)
        else:  # nothing is lost where there is no record
            self._decide(free, {})
            replace_file(self.folder / _SETTINGS, self._description())
        return True

    def missing(self, batches: Iterable[tuple[int, range]]) -> list[int]:
        """Those of the batches (number, indices) of which a record is not there yet."""
        there = self.records().keys()
        return [number for number, indices in batches if not all(n in there for n in indices)]

    def part(self, rank: int, size: int) -> Part:
        return Part(self.folder / f"{rank}-of-{size}.jsonl")

    def records(self) -> dict[int, tuple[Path, int, int]]:
        """index -> (file, first byte, bytes) of every whole record. What a kill left of a line is none."""
        found = {}
        for path in sorted(p for p in self.folder.iterdir() if _PART.fullmatch(p.name)):
            begin = 0
            with path.open("rb") as stream:
                for line in stream:
                    index = _index(line)
                    if index is not None:
                        found[index] = (path, begin, len(line))
                    begin += len(line)
        return found

    def lines(self, indices: Iterable[int]) -> Iterator[bytes]:
        """The records of these indices, each a line; KeyError for one that is not there."""
        places, streams = self.records(), {}
        with ExitStack() as stack:
            for n in indices:
                path, begin, size = places[n]
                if path not in streams:
                    streams[path] = stack.enter_context(path.open("rb"))
                streams[path].seek(begin)
                yield streams[path].read(size)

    def finish(self, write: Callable[[Iterator[bytes], BinaryIO], object] | None = None) -> None:
        """Put the records in order, give the file its name, and clear up.

        ``write``: makes the file of the records, instead of one line of each.
        """
        places = self.records()
        absent = next((n for n in range(self.total) if n not in places), None)
        if absent is not None:
            raise ValueError(
                f"{self._option}: {self.folder}: expected {self.total} {self._noun}, got {len(places)}, not {absent}; --resume "
                "completes"
            )
        with (self.folder / _WHOLE).open("wb") as whole:
            (write or _join)(self.lines(range(self.total)), whole)
            whole.flush()
            os.fsync(whole.fileno())
        if not self.kind.describes_itself:
            replace_file(self.sidecar, self._description())
        if self.path.exists():
            raise ValueError(
                f"{self._option}: {self.path} has appeared meanwhile; move it away, and --resume puts this one in its place"
            )
        (self.folder / _WHOLE).rename(self.path)
        self._clear()

    def abandon(self) -> None:
        """Leave no folder behind in which there is no record."""
        if self.folder.is_dir() and not self.records():
            self._clear()

    # --- whose it is --------------------------------------------------------------------------------------------------------------

    def _check_finished(self, resume: bool, free: Mapping[str, Any] | None) -> None:
        if not resume or self.path.is_dir():
            raise ValueError(f"{self._option}: {self.path} is there, and is not overwritten; choose another name, or remove it")
        stored = self._read(self.sidecar)
        if stored is None:
            lacks = (
                f"and is no document of {self.kind.command}"
                if self.kind.describes_itself
                else f"without the {self.sidecar.name} of a file of {self.kind.command}"
            )
            raise ValueError(f"--resume: {self.path} is there {lacks}; choose another name, or remove it")
        self._check_same(stored, self.path, free)
        if self.folder.is_dir():  # killed after the renaming
            self._check_folder()
            self._clear()

    def _check_folder(self) -> None:
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise ValueError(
                f"{self._option}: {self.folder} is wanted for what is unfinished, and is a file; choose another name"
            )
        names = {p.name for p in self.folder.iterdir()} - {_LOCK}
        if names and self._read(self.folder / _SETTINGS) is None and not all(n.endswith(".partial") for n in names):
            raise ValueError(
                f"{self._option}: {self.folder} holds something else than unfinished {self._noun}; choose another name, or remove it"
            )

    def _check_same(self, stored: dict[str, Any], where: Path, free: Mapping[str, Any] | None) -> None:
        theirs = stored["settings"]
        self._decide(free, theirs)
        differ = [name for name in sorted(theirs.keys() | self.settings) if theirs.get(name) != self.settings.get(name)]
        if differ:
            said = "; ".join(f"{n}: {_shown(theirs.get(n))} there, {_shown(self.settings.get(n))} here" for n in differ)
            raise ValueError(f"--resume: {where} was begun with other arguments ({said}); repeat those, or choose another file")

    def _decide(self, free: Mapping[str, Any] | None, stored: Mapping[str, Any]) -> None:
        for name, value in (free or {}).items():
            self.settings.setdefault(name, stored.get(name, value))

    def _read(self, path: Path) -> dict[str, Any] | None:
        """None where there is nothing, or something else."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            ours = found[self.kind.command] == FORMAT and isinstance(found["settings"], dict)
            return found if ours and self._noun in found else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _description(self) -> bytes:
        plain = {self.kind.command: FORMAT, self._noun: self.total, **self.shown, "settings": self.settings}
        return (json.dumps(plain, indent=1) + "\n").encode()

    def _take_lock(self) -> None:
        """One run a file. The lock goes with its process at the latest, however that ends."""
        self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self._option}: {self.path} is being written by another process; wait for it, or choose another"
            ) from None

    def _clear(self) -> None:
        """Remove the folder, but nothing that is not ours."""
        for path in self.folder.iterdir():
            if _PART.fullmatch(path.name) or path.name in (_SETTINGS, _LOCK, _WHOLE) or path.name.endswith(".partial"):
                path.unlink()
        if not any(self.folder.iterdir()):
            shutil.rmtree(self.folder)


def fill(file: RecordFile, world: World, todo: list[int], work: Callable[[list[int]], T]) -> T:
    """What ``work`` makes of this process's share of the batches ``todo``, once all processes have done theirs."""
    wait = _waiting(world)
    try:
        done = work(todo[world.rank :: world.size])
    except BaseException as stop:
        if world.size == 1:
            file.abandon()
        if isinstance(stop, KeyboardInterrupt) and world.rank == 0 and file.folder.is_dir():
            print(f"edlm: interrupted; {file.folder} holds what is done: --resume goes on from there", file=sys.stderr)
        raise
    wait()
    return done


def _waiting(world: World) -> Callable[[], object]:
    """What returns once all processes have called it. One that ends before takes the others with it, and torchrun all of them."""
    if world.size == 1:
        return lambda: None
    import torch.distributed as dist

    # The group of the world would give up after minutes; shares take as long as they take.
    group = dist.new_group(backend="gloo", timeout=_WAIT)

    def wait() -> None:
        try:
            dist.barrier(group=group)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ChildProcessError(f"another process has ended ({reason}); what is done is kept: --resume goes on") from None

    return wait


class Part:
    """What one process appends to."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        # A line that was torn by a kill would become one with the next.
        with path.open("rb") as stream:
            os.ftruncate(self._file, sum(len(line) for line in stream if line.endswith(b"\n")))

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """All of them, in one write; or none, where the disk is full or somebody presses Ctrl-C."""
        rest = memoryview(b"".join(json.dumps(record, allow_nan=False).encode() + b"\n" for record in records))
        size = os.fstat(self._file).st_size
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except BaseException:
            os.ftruncate(self._file, size)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)


def _join(lines: Iterable[bytes], whole: BinaryIO) -> None:
    whole.writelines(lines)


def _index(line: bytes) -> int | None:
    if not line.endswith(b"\n"):
        return None
    try:
        index = json.loads(line)["index"]
    except (ValueError, KeyError, TypeError):
        return None
    return index if isinstance(index, int) and index >= 0 else None


def _shown(value: Any) -> str:
    return "not given" if value is None else short(value)
