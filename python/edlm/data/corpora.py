"""Named corpora, streamed by the Hugging Face library ``datasets`` (the extra ``data``): nothing is read before it is asked for."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import detokenize

if TYPE_CHECKING:
    from types import ModuleType

_CONVERTED = "refs/convert/parquet"  # the hub's own copy of data sets that came as a program, which ``datasets`` no longer runs


@dataclass(frozen=True, kw_only=True)
class Part:
    """``split`` of the data set, or rows ``first`` .. ``last`` - 1 of it (characters, where the corpus is cut by characters).

    ``total``: how many the split has, for a part that is counted from its end: the part that reaches it checks the number.
    """

    split: str
    first: int = 0
    last: int | None = None
    total: int | None = None


@dataclass(frozen=True, kw_only=True)
class HubCorpus:
    """One line of the table: what to ask ``datasets.load_dataset`` for, and what to do with a row.

    ``parts``: ours to theirs; a split that is not there is missing. ``version`` rises when our handling changes the text.
    """

    path: str
    parts: Mapping[str, Part]
    config: str | None = None
    revision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    column: str = "text"
    detokenizer: Callable[[str], str] | None = None
    by_characters: bool = False
    tokenizer_hint: str = "bpe"
    version: int = 1


def _whole(train: str | None, valid: str | None, test: str | None) -> dict[str, Part]:
    return {name: Part(split=split) for name, split in (("train", train), ("valid", valid), ("test", test)) if split is not None}


def _parquet(config: str, *splits: str) -> dict[str, Any]:
    return {"data_files": {split: f"{config}/{split}/*.parquet" for split in splits}}


_STANDARD = _whole("train", "validation", "test")
_OPENWEBTEXT_ROWS = 8_013_769

CORPORA: dict[str, HubCorpus] = {
    # Matt Mahoney's file: 100 million characters in one line, of which 90, 5 and 5 million are trained, validated and tested on.
    "text8": HubCorpus(
        path="text",
        options={"data_files": {"train": "http://mattmahoney.net/dc/text8.zip"}, "sample_by": "document"},
        parts={
            "train": Part(split="train", last=90_000_000),
            "valid": Part(split="train", first=90_000_000, last=95_000_000),
            "test": Part(split="train", first=95_000_000, last=100_000_000, total=100_000_000),
        },
        by_characters=True,
        tokenizer_hint="text8",
    ),
    # It has no splits of its own. The last 100 000 documents are validated on, and there is no test split.
    "openwebtext": HubCorpus(
        path="Skylion007/openwebtext",
        parts={
            "train": Part(split="train", last=_OPENWEBTEXT_ROWS - 100_000),
            "valid": Part(split="train", first=_OPENWEBTEXT_ROWS - 100_000, last=_OPENWEBTEXT_ROWS, total=_OPENWEBTEXT_ROWS),
        },
    ),
    # Here and below, a data set without a validation split has its test split for both.
    "lm1b": HubCorpus(
        path="billion-word-benchmark/lm1b",
        revision=_CONVERTED,
        options=_parquet("plain_text", "train", "test"),
        parts=_whole("train", "test", "test"),
        detokenizer=detokenize.lm1b,
    ),
    "wikitext2": HubCorpus(
        path="Salesforce/wikitext", config="wikitext-2-raw-v1", parts=_STANDARD, detokenizer=detokenize.wikitext
    ),
    "wikitext103": HubCorpus(
        path="Salesforce/wikitext", config="wikitext-103-raw-v1", parts=_STANDARD, detokenizer=detokenize.wikitext
    ),
    "ptb": HubCorpus(
        path="ptb-text-only/ptb_text_only",
        revision=_CONVERTED,
        options=_parquet("penn_treebank", "train", "validation", "test"),
        parts=_STANDARD,
        column="sentence",
        detokenizer=detokenize.ptb,
    ),
    # The file that GPT-2 was tested on.
    "lambada": HubCorpus(
        path="json",
        options={"data_files": {"test": "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"}},
        parts=_whole(None, "test", "test"),
        detokenizer=detokenize.lambada,
    ),
    "ag_news": HubCorpus(path="fancyzhx/ag_news", parts=_whole("train", "test", "test"), detokenizer=detokenize.ag_news),
    # The papers of scientific_papers (Cohan et al., 2018), from a copy that is no program.
    "scientific_papers_arxiv": HubCorpus(
        path="ccdv/arxiv-summarization",
        config="document",
        parts=_STANDARD,
        column="article",
        detokenizer=detokenize.scientific_papers,
    ),
    "scientific_papers_pubmed": HubCorpus(
        path="ccdv/pubmed-summarization",
        config="document",
        parts=_STANDARD,
        column="article",
        detokenizer=detokenize.scientific_papers,
    ),
}


def identity(name: str) -> str:
    """What the corpus is: its name, place, configuration, revision, and the version of our handling. Nothing is downloaded for it."""
    corpus = _corpus(name)
    plain = [corpus.path, corpus.config, corpus.revision, corpus.options, corpus.version]
    return f"corpus:{name}:{json.dumps(plain, sort_keys=True)}"


def documents(name: str, split: str) -> Iterator[str]:
    """The documents of a split ("train", "valid", "test") as they arrive, detokenised.

    Raises:
        ValueError: an unknown name, a split that the corpus does not have, or rows that are not as the table says (another number of
        them, no such column). ImportError: ``datasets`` is not installed. OSError, or the library's own: the hub cannot be reached.
    """
    corpus = _corpus(name)
    if split not in corpus.parts:
        raise ValueError(f"split: expected one that {name} has ({', '.join(corpus.parts)}), got {split!r}")
    part = corpus.parts[split]
    library = _library()
    try:
        stream = library.load_dataset(
            corpus.path, name=corpus.config, split=part.split, revision=corpus.revision, streaming=True, **corpus.options
        )
    except ConnectionError as error:
        raise ConnectionError(
            f"{name}: the hub cannot be reached ({error}); try again with a network, or give a file or a folder of texts"
        ) from error
    cut = _characters if corpus.by_characters else _rows
    detokenizer = corpus.detokenizer or (lambda text: text)
    return map(detokenizer, cut(name, stream, corpus.column, part))


def nearest(name: str) -> str:
    """What somebody who wrote ``name`` may have meant, as a sentence for a message."""
    near = difflib.get_close_matches(name.lower(), CORPORA, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"the names are {', '.join(CORPORA)}"


def _corpus(name: str) -> HubCorpus:
    if name not in CORPORA:
        raise ValueError(f"corpus: expected a known name, got {name!r}; {nearest(name)}")
    return CORPORA[name]


def _library() -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise ImportError("a named corpus needs the package datasets: pip install 'edlm-torch[data]'") from None
    return datasets


def _rows(name: str, stream: Any, column: str, part: Part) -> Iterator[str]:
    """Rows ``first`` .. ``last`` - 1. One more is looked for where the part is to reach the end."""
    if part.first:
        stream = stream.skip(part.first)
    at = part.first
    for row in stream:
        if at == part.last:
            if part.total is None:
                return
            raise ValueError(
                f"corpus: expected {part.total} rows of {name}, got more; the data set has changed: do not use this split"
            )
        yield _text(name, row, column)
        at += 1
    _check_reached(name, "rows", at, part)


def _characters(name: str, stream: Any, column: str, part: Part) -> Iterator[str]:
    """Characters ``first`` .. ``last`` - 1 of all rows, one after the other."""
    at = 0
    for row in stream:
        text = _text(name, row, column)
        if part.last is not None and at >= part.last:
            if part.total is None:
                return
        elif piece := text[max(0, part.first - at) : None if part.last is None else part.last - at]:
            yield piece
        at += len(text)
    if part.total is not None and at > part.total:
        raise ValueError(
            f"corpus: expected {part.total} characters of {name}, got {at}; the data set has changed: do not use this split"
        )
    _check_reached(name, "characters", at, part)


def _check_reached(name: str, what: str, at: int, part: Part) -> None:
    if part.last is not None and at < part.last:
        raise ValueError(
            f"corpus: expected at least {part.last} {what} of {name}, got {at}; the data set has changed, or the download was cut short"
        )


def _text(name: str, row: Mapping[str, Any], column: str) -> str:
    if column not in row or not isinstance(row[column], str):
        raise ValueError(
            f"corpus: expected text in the column {column!r} of {name}, got {', '.join(row)}; the data set has changed"
        )
    return row[column]
