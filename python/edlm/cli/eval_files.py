"""``edlm eval FILE``: how good and how different texts are that are read from files."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import torch

from ..data import open_text, tokenizer_from
from ..eval.documents import REAL_TEXT
from .eval_texts import Rows, Scorer, Texts

FILES = (".jsonl", ".txt")


class Samples(Rows):
    """A record a file; the first is of real text where ``--text`` names some."""

    kind = "samples"

    def __init__(self, options: argparse.Namespace, device: torch.device, label: str) -> None:
        self.options, self.label = options, label
        if len(set(options.paths)) < len(options.paths):
            raise ValueError(f"expected each file once, got {' '.join(options.paths)}")
        if len(options.text or ()) > 1:
            raise ValueError(f"--text: expected one file of real texts, got {' '.join(options.text)}")
        if options.mauve and not options.text:
            raise ValueError("--mauve: expected real texts to compare with, got none; give a file of them as --text")
        self.paths = [*(options.text or ()), *options.paths]
        read = [read_texts_of(path) for path in self.paths]
        tokenizers = [_tokenizer_of(path) if rows is not None else None for path, (_, rows) in zip(self.paths, read, strict=True)]
        known = tokenizers[0]
        if known is not None and all(t is not None and t.description() == known.description() for t in tokenizers):
            self.unit_of_diversity = "tokens"
            self.read = [_of_ids(path, rows, known) for path, (_, rows) in zip(self.paths, read, strict=True)]
        else:
            self.unit_of_diversity = "characters"
            self.read = [Texts.of_characters([_visible(text) for text in texts]) for texts, _ in read]
        self.scorer = Scorer(options, device, self.read[0].texts)
        self._counted = set()  # judges that have read what they score as real text
        if options.text:
            real = open_text(options.text[0]).identity
            self._counted = {judge.name for judge in self.scorer.judges if getattr(judge, "counted", None) == real}
        self.batches = [range(n, n + 1) for n in range(len(self.paths))]
        self.total = len(self.paths)

    @property
    def settings(self) -> dict[str, Any]:
        digests = {path: "sha256 " + hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in self.paths}
        return {"files": digests, "--text": self.options.text, **self.scorer.settings}

    def records(self, number: int) -> list[dict[str, Any]]:
        started, path = time.perf_counter(), self.paths[number]
        real = number == 0 and bool(self.options.text)
        row, notes = self.scorer.row(self.read[number], is_reference=real)
        if real:
            notes += [f"{name} has counted the real text: what it says of that is too good" for name in sorted(self._counted)]
        method = REAL_TEXT if real else self.label if len(self.options.paths) == 1 else Path(path).stem
        return [self._record(number, {"method": method, "file": path, **row}, path, notes, started)]


def _of_ids(path: str, rows: list[list[int]], tokenizer: Any) -> Texts:
    try:
        return Texts.of_tokens(rows, tokenizer)
    except ValueError as error:
        raise ValueError(f'{path}: "tokens": {error}; they are not those of the model that is named beside the file') from None


def read_texts_of(path: str) -> tuple[list[str], list[list[int]] | None]:
    """The texts of a file, and the tokens of each where every record has them. ValueError names the file, and the line."""
    if not path.endswith(FILES) or not Path(path).is_file():
        raise ValueError(f"{path}: expected a file of texts, {' or '.join(FILES)}, got something else, or no such file")
    try:
        lines = Path(path).read_text(encoding="utf-8").removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, got other bytes at {error.start}; convert it first") from None
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path}: expected texts, got an empty file")
    lines = lines[:-1] if lines[-1] == "" else lines
    if not path.endswith(".jsonl"):
        return lines, None
    texts, tokens = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(f'{path}, line {number}: expected a JSON object with a "text", got {line[:60]!r}')
        texts.append(record["text"])
        own = record.get("tokens")
        if own is not None and (not isinstance(own, list) or not all(type(i) is int for i in [*own, record.get("length", 0)])):
            raise ValueError(
                f'{path}, line {number}: expected "tokens" to be a list of ids, and their "length", got {line[:60]!r}'
            )
        tokens.append(None if own is None else own[: record.get("length", len(own))])
    return texts, None if None in tokens else tokens


def _tokenizer_of(path: str) -> Any:
    """That of the model which wrote the file, where its settings lie beside it and the model is still there; or None."""
    from .. import checkpoint
    from .sample import contents

    try:
        described = json.loads(Path(path + ".settings.json").read_text(encoding="utf-8"))
        if contents(described["model"]) != described["settings"]["model"]:
            return None
        return tokenizer_from(checkpoint.meta_of(described["model"])["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _visible(text: str) -> str:
    """Without the names of special tokens, of which the ids are not known here; and cut as ``Texts.of_tokens`` cuts."""
    from ..data.bpe import END_OF_TEXT, MASK

    return re.sub(f"^({re.escape(END_OF_TEXT)})+", "", text.replace(MASK, "")).partition(END_OF_TEXT)[0]
