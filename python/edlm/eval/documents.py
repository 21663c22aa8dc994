"""The JSON documents that ``edlm eval`` writes, read back and checked field by field."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
REAL_TEXT = "real text"  # the method of a row that is of held-out text
UNITS = ("bits_per_character", "bits_per_token", "nats_per_token", "perplexity")
MEASURES = {  # and what they are, in words
    "nelbo": "negative ELBO of the proposal alone, whatever the energy; in continuous time or of T steps.",
    "ar_nll": "negative log-likelihood of an autoregressive model.",
    "joint_nll": "negative log-likelihood of texts that are drawn in one step, T = 1; the draws of a smaller n are the first of a "
    "larger one.",
    "finite_step_elbo": "negative ELBO of T steps of the ideal energy model, not of a sampler with finitely many candidates.",
    "sampler_elbo": "negative ELBO of the sampler that picks one of n candidates in each of T steps (window 0 1); no log Z is needed.",
    "paper_joint": "the published perplexity formula.",
}
LOG_Z = (None, "exact", "lower", "upper_asymptotic")
FEW = 2.0  # an ESS below which log Z is the affair of one or two draws: see ``is_few``
LOW_ESS = 0.1  # the most sequences that may have so few
FEW_DRAWS = (
    "log Z rests on one or two draws: the figure may be off by any amount, on either side (hundreds of nats were seen), and its +- "
    "says nothing of that"
)
DIRECTIONS = {  # and what they say
    "exact": "the negative log-likelihood itself; its error is that of the choice of texts.",
    "upper bound": "at or above the negative log-likelihood, in expectation.",
    "below in expectation": "log Z from n draws is too low on average (Jensen), and so is this number: no upper bound.",
    "above for n large enough": "log Z estimated from above, which holds for n large enough (Deng et al., arXiv 2004.11714) and fails "
    "for few draws of heavy-tailed weights.",
    "no bound": "not known to be above or below the negative log-likelihood.",
}


@dataclass(frozen=True)
class Document:
    """One file. A row's fields that may be null are there, whether the file had them or not."""

    path: str
    kind: str  # "likelihood", "decoding" or "samples"
    label: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    seconds: float | None
    warnings: list[str]
    rows: list[dict[str, Any]]
    unit_of_diversity: str | None = None  # what entropy and n-grams are counted in: "tokens" or "characters"


@dataclass(frozen=True)
class _Field:
    words: str
    holds: Callable[[Any], bool]

    def or_null(self) -> _Field:
        return _Field(f"{self.words}, or null", lambda value: value is None or self.holds(value))


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _one_of(values: Iterable[str | None]) -> _Field:
    return _Field(f"one of {', '.join(map(json.dumps, values))}", lambda value: value in list(values))


def _map_of(field: _Field) -> _Field:
    return _Field(
        f"an object, each value {field.words}",
        lambda value: isinstance(value, dict) and all(map(field.holds, value.values())),
    )


def _fields(fields: Mapping[str, _Field]) -> _Field:
    return _Field(
        f"an object of {'; '.join(f'{key}: {field.words}' for key, field in fields.items())}",
        lambda value: isinstance(value, dict) and all(field.holds(value.get(key)) for key, field in fields.items()),
    )


_TEXT = _Field("a text", lambda value: isinstance(value, str))
_NUMBER = _Field("a finite number", _is_number)
_POSITIVE = _Field("a finite number > 0", lambda value: _is_number(value) and value > 0)
_COUNT = _Field("a whole number >= 0", _is_count)
_MANY = _Field("a whole number >= 1", lambda value: _is_count(value) and value > 0)
_OBJECT = _Field("an object", lambda value: isinstance(value, dict))
_LIST = _Field("a list", lambda value: isinstance(value, list))
_ESTIMATE = _Field(
    'an estimate, {"mean": a number or null, "stderr": a number or null}',
    lambda value: isinstance(value, dict) and all(k in value and _NUMBER.or_null().holds(value[k]) for k in ("mean", "stderr")),
)
_SHARE = _Field("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_JUDGE = _fields(
    dict.fromkeys(("perplexity", "bits_per_token", "bits_per_character"), _ESTIMATE)
    | {"skipped": _COUNT.or_null(), "left_out": _SHARE.or_null()}
)
_BIN = _fields({"t": _NUMBER, "mean": _NUMBER, "stderr": _NUMBER.or_null(), "count": _COUNT, "num_candidates": _NUMBER})

_DOCUMENT = {
    "kind": _one_of(("likelihood", "decoding", "samples")),
    "label": _TEXT,
    "settings": _OBJECT,
    "machine": _OBJECT,
    "seconds": _NUMBER.or_null(),
    "warnings": _Field("a list of texts", lambda value: isinstance(value, list) and all(map(_TEXT.holds, value))),
    "rows": _LIST,
    "unit_of_diversity": _TEXT.or_null(),
}
_LIKELIHOOD = {
    "text": _TEXT,
    "measure": _one_of(MEASURES),
    "steps": _MANY.or_null(),
    "num_candidates": _MANY.or_null(),
    "log_Z": _one_of(LOG_Z),
    "direction": _one_of(DIRECTIONS),
    **dict.fromkeys(UNITS, _ESTIMATE),
    "ess": _ESTIMATE.or_null(),
    "low_ess": _SHARE.or_null(),  # of the sequences, those whose ESS ``is_few``
    "sequences": _MANY,
    "length": _MANY,
}
_DECODING = {
    "method": _TEXT,
    "steps": _MANY.or_null(),
    "file": _TEXT.or_null(),
    "num_texts": _MANY,
    "length": _MANY,
    "nfe": _COUNT.or_null(),
    "energy_nfe": _COUNT.or_null(),
    "seconds": _POSITIVE.or_null(),
    "judges": _map_of(_JUDGE),
    "entropy": _ESTIMATE,
    "distinct": _map_of(_NUMBER.or_null()),
    "repetition": _map_of(_ESTIMATE),
    "self_bleu": _ESTIMATE.or_null(),
    "mauve": _NUMBER.or_null(),
    "ess": _Field("a list of bins of t", lambda value: isinstance(value, list) and all(map(_BIN.holds, value))).or_null(),
}
_ROWS = {"likelihood": _LIKELIHOOD, "decoding": _DECODING, "samples": _DECODING}
_ANEW = "write it anew with edlm eval --json"


def read_documents(paths: Sequence[str | Path]) -> list[Document]:
    """Documents in the order of their paths.

    Raises:
        ValueError: a file that cannot be read, is not whole, or is no document of this format, with the field that is amiss; the same
            row (label, measure, text ..., or label and steps) twice, with the files that have it. Every message names the file.
    """
    documents = [_read(str(path)) for path in paths]
    seen: dict[tuple[Any, ...], str] = {}
    for document in documents:
        for row in document.rows:
            if row.get("method") == REAL_TEXT:  # of one text, however many models were judged beside it
                continue
            key = _key(document, row)
            if key in seen:
                what = ", ".join(str(part) for part in key if part is not None)
                raise ValueError(
                    f"{document.path}: expected rows that no other document has, got {what}, which {seen[key]} has too; leave one of "
                    "them out, or write one anew with another --label"
                )
            seen[key] = document.path
    return documents


def _key(document: Document, row: dict[str, Any]) -> tuple[Any, ...]:
    if document.kind == "likelihood":
        n, steps = row["num_candidates"], row["steps"]
        named = (f"T = {steps}" if steps else None, f"n = {n}" if n else None, row["log_Z"] and f"log Z {row['log_Z']}")
        return document.label, row["measure"], *named, row["text"]
    return row["method"], row["file"], f"{row['steps']} steps" if row["steps"] else None


def _read(path: str) -> Document:
    try:
        plain = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise ValueError(f"{path}: expected a document of edlm eval --json, got {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got what is none, or not the whole of it ({error}); {_ANEW}") from None
    if not isinstance(plain, dict) or "edlm eval" not in plain:
        raise ValueError(f'{path}: expected a document of edlm eval --json, with "edlm eval": {FORMAT}, got none; {_ANEW}')
    if plain["edlm eval"] != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}, got {_short(plain['edlm eval'])}; {_ANEW} of this version")
    _check(path, "", plain, _DOCUMENT)
    if not plain["rows"]:
        raise ValueError(f"{path}: expected rows, got none; leave the file out, or {_ANEW}")
    fields = _ROWS[plain["kind"]]
    for i, row in enumerate(plain["rows"]):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: rows[{i}]: expected an object, got {_short(row)}; {_ANEW}")
        _check(path, f"rows[{i}].", row, fields)
    rows = [dict.fromkeys(fields) | row for row in plain["rows"]]
    return Document(path, **{key: plain.get(key) for key in _DOCUMENT if key != "rows"}, rows=rows)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, where a number that is not finite is null")


def _check(path: str, where: str, plain: dict[str, Any], fields: Mapping[str, _Field]) -> None:
    for key, field in fields.items():
        value = plain.get(key)
        if not field.holds(value):
            got = _short(value) if key in plain else "none"
            raise ValueError(f"{path}: {where}{key}: expected {field.words}, got {got}; {_ANEW}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:90]} ..."


# --- what the page and the plots ask of them ------------------------------------------------------------------------------------


def likelihoods(documents: Sequence[Document]) -> list[tuple[str, dict[str, Any]]]:
    """(label, row), in order of labels, measures, steps, draws and kinds of log Z."""
    found = [(document.label, row) for document in documents if document.kind == "likelihood" for row in document.rows]
    labels = list(dict.fromkeys(label for label, _ in found))

    def order(item: tuple[str, dict[str, Any]]) -> tuple[int, ...]:
        label, row = item
        ranks = list(MEASURES).index(row["measure"]), row["steps"] or 0, row["num_candidates"] or 0, LOG_Z.index(row["log_Z"])
        return labels.index(label), *ranks

    return sorted(found, key=order)


def decodings(documents: Sequence[Document]) -> dict[str, list[tuple[Document, dict[str, Any]]]]:
    """label -> rows of the model's texts, in order of steps (none first), each with the document that it came in."""
    found: dict[str, list[tuple[Document, dict[str, Any]]]] = {}
    for document in documents:
        for row in document.rows if document.kind != "likelihood" else ():
            if row["method"] != REAL_TEXT:
                found.setdefault(row["method"], []).append((document, row))
    return {label: sorted(rows, key=lambda item: item[1]["steps"] or 0) for label, rows in found.items()}


def real_texts(documents: Sequence[Document]) -> list[tuple[str, dict[str, Any]]]:
    """(path, row) of held-out text, each measured thing once, however many documents repeat it."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for document in documents:
        for row in document.rows:
            if row.get("method") == REAL_TEXT:
                measured = {key: row[key] for key in _MEASURED}
                found.setdefault(json.dumps(measured, sort_keys=True), (document.path, row))
    return list(found.values())


_MEASURED = ("num_texts", "length", "judges", "entropy", "distinct", "repetition", "self_bleu", "mauve")


def judges(documents: Sequence[Document]) -> list[str]:
    rows = [row for document in documents if document.kind != "likelihood" for row in document.rows]
    return list(dict.fromkeys(name for row in rows for name in row["judges"]))


def is_few(ess: Any, n: float) -> Any:
    """Whether an ESS of n draws says that log Z is the affair of one or two of them: ESS < min(FEW, 0.9 n).

    Two draws of nearly equal weights have an ESS just below 2 and are not few; one draw is, as its ESS of 1 says nothing.

    Args:
        ess: a number, or a floating tensor of any shape, compared element by element.
        n: draws behind it.
    """
    return ess < (min(FEW, 0.9 * n) if n > 1 else FEW)


def is_distrusted(row: Mapping[str, Any]) -> bool:
    """A likelihood whose log Z was estimated from draws of which next to none count, or that is of a probability above 1."""
    if row["log_Z"] not in ("lower", "upper_asymptotic"):
        return False
    ess, figure = row["ess"] and row["ess"]["mean"], row["nats_per_token"]["mean"]
    few = ess is not None and is_few(ess, row["num_candidates"] or math.inf)
    return few or (row["low_ess"] or 0) > LOW_ESS or (figure is not None and figure < 0)


def judge_identity(document: Document, row: Mapping[str, Any], judge: str) -> str | None:
    """What tells a judge from another of its name; None where the document does not say. Judges are in the order of the option."""
    given, names = document.settings.get("--judge"), list(row["judges"])
    if not isinstance(given, dict) or len(given) != len(names) or judge not in names:
        return None
    identity = list(given.values())[names.index(judge)]
    return None if identity is None else json.dumps(identity, sort_keys=True)


def digests(documents: Sequence[Document], *kinds: str) -> Iterator[tuple[str, frozenset[tuple[int, int]], str, str]]:
    """(text, (number, length) of its windows, digest, path) of documents of these kinds. A digest is of the windows that were taken."""
    for document in documents:
        of = document.settings.get("--text")
        for name, digest in of.items() if document.kind in kinds and isinstance(of, dict) else ():
            rows = [row for row in document.rows if row.get("text") == name or row.get("method") == REAL_TEXT]
            number = "sequences" if document.kind == "likelihood" else "num_texts"
            yield name, frozenset((row[number], row["length"]) for row in rows), str(digest), document.path


def machine_of(document: Document) -> str:
    return ", ".join(f"{key} {value}" for key, value in document.machine.items()) or "-"


def seconds_of_a_text(row: Mapping[str, Any]) -> float | None:
    return None if row["seconds"] is None else row["seconds"] / row["num_texts"]
