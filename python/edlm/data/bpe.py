"""Byte-pair encoding, by the Hugging Face library ``tokenizers`` (the extra of that name): GPT-2's, or one of your own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .shards import replace_file
from .tokenizers import smallest_dtype, tokenizer_from

if TYPE_CHECKING:
    from types import ModuleType

END_OF_TEXT = "<|endoftext|>"
MASK = "[MASK]"  # how a mask is shown, and written in a prompt
_PART = 1 << 17  # characters that go through the library as one text
_BATCH = 1 << 20  # characters of a call, which Ctrl-C waits for: the library takes some 35 bytes each until it returns
# No token of the byte-level pattern goes on into a white space that follows something visible, and none looks back: what follows
# such a place is split as if the text began there.
_CUT = re.compile(r"(?<=[!-~])[ \n]")
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_MODEL = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


class BPETokenizer:
    """BPE entries, ids 0 .. n - 1, the end of text among them, and the mask, id n, shown as ``[MASK]``.

    For GPT-2: ``bos_token_id = eos_token_id = 50256``, ``mask_token_id = 50257``, ``vocab_size = 50258``.

    Args:
        document: the text of a ``tokenizer.json``. end_of_text: the entry that ends a document; by default ``<|endoftext|>``, or,
            in a tokenizer without it, its only special token.

    Raises:
        ValueError: not a BPE tokenizer, one that draws at random (dropout), one without that entry, or without a default for it.
        ImportError: ``tokenizers`` is not installed.
    """

    def __init__(self, document: str, *, end_of_text: str | None = None) -> None:
        library = _library()
        plain = _canonical(document)
        self._document = json.dumps(plain, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        try:
            self._tokenizer = library.Tokenizer.from_str(self._document)
        except Exception as error:  # the library's own errors are plain Exceptions
            raise ValueError(f"tokenizer: expected a whole tokenizer.json, got one that cannot be read: {error}") from None
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        entries = self._tokenizer.get_vocab(with_added_tokens=True)
        end_of_text = self.end_of_text = _end_of_text(entries, plain) if end_of_text is None else end_of_text
        if end_of_text not in entries:
            raise ValueError(
                f"end_of_text: expected one of the tokenizer's entries, got {end_of_text!r}; its special tokens are {_special(plain)}"
            )
        self.bos_token_id: int = entries[end_of_text]
        self.eos_token_id: int = entries[end_of_text]
        self.mask_token_id: int = max(entries.values()) + 1  # there may be holes
        self.vocab_size: int = self.mask_token_id + 1
        self._dtype = smallest_dtype(self.vocab_size)
        self._may_cut = (
            plain["pre_tokenizer"] is not None
            and _BYTE_LEVEL | plain["pre_tokenizer"] == _BYTE_LEVEL
            and plain["normalizer"] is None
            and all(token["special"] for token in plain["added_tokens"])
        )

    @classmethod
    def from_files(cls, vocab: str | Path, merges: str | Path, *, end_of_text: str = END_OF_TEXT) -> BPETokenizer:
        """GPT-2's two files: a table of entries (``vocab.json``, ``encoder.json``) and the merges (``merges.txt``, ``vocab.bpe``)."""
        try:
            entries = json.loads(Path(vocab).read_text(encoding="utf-8"))
            if not isinstance(entries, dict):
                raise ValueError("no table of entries")
            lines = Path(merges).read_text(encoding="utf-8").split("\n")  # not splitlines: some entries hold odd line ends
            pairs = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
            if any(len(pair) != 2 for pair in pairs):
                raise ValueError(f"a line of merges that is no pair: {next(pair for pair in pairs if len(pair) != 2)}")
        except ValueError as error:
            raise ValueError(f"tokenizer: expected GPT-2's files in {vocab} and {merges}, got something else: {error}") from None
        if end_of_text not in entries:
            raise ValueError(f"end_of_text: expected one of the entries of {vocab}, got {end_of_text!r}")
        return cls(_byte_level(entries, pairs, end_of_text), end_of_text=end_of_text)

    @classmethod
    def from_file(cls, tokenizer_json: str | Path, *, end_of_text: str | None = None) -> BPETokenizer:
        """A ``tokenizer.json``, the library's own format. Its post-processing, padding and truncation are left out.

        ``end_of_text``, and what is raised, are as for the class.
        """
        try:
            return cls(Path(tokenizer_json).read_text(encoding="utf-8"), end_of_text=end_of_text)
        except ValueError as error:  # UnicodeDecodeError is one
            raise ValueError(f"{tokenizer_json}: {error}") from None

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Byte-level BPE of these documents: 256 bytes, the most frequent merges, the end of text (id 0) and the mask.

        Args:
            vocab_size: of the result, the mask counted: at least 258. Memory grows with the number of different words.

        Raises:
            ValueError: less, or more than the text has merges for.
        """
        library = _library()
        if vocab_size < 258:
            raise ValueError(f"vocab_size: expected at least 258 (256 bytes, the end of text, the mask), got {vocab_size}")
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((part for text in documents for part in _parts(text)), trainer)
        model = json.loads(tokenizer.to_str())["model"]
        if len(model["vocab"]) + 1 < vocab_size:
            raise ValueError(
                f"vocab_size: expected at most {len(model['vocab']) + 1}, which is what the text has pairs for, got {vocab_size}; "
                "take more text or fewer entries"
            )
        return cls(_byte_level(model["vocab"], model["merges"], END_OF_TEXT))

    def encode(self, text: str) -> np.ndarray:
        """Ids [N] of the smallest unsigned type; never the mask, nor the end of text, even where ``text`` spells them."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` of each. A long text goes through the library in parts, cut where that does not change an id."""
        ids: list[np.ndarray] = []
        waiting: list[str] = []
        ends, characters = [], 0

        def flush() -> None:
            encodings = self._tokenizer.encode_batch_fast(waiting, add_special_tokens=False)
            ids.extend(np.array(encoding.ids, dtype=self._dtype) for encoding in encodings)
            waiting.clear()

        for text in texts:
            for part in _parts(text) if self._may_cut else (text,):
                waiting.append(part)
                characters += len(part)
                if characters >= _BATCH:
                    flush()
                    characters = 0
            ends.append(len(ids) + len(waiting))
        flush()
        return [
            ids[begin] if end - begin == 1 else np.concatenate(ids[begin:end])
            for begin, end in zip([0, *ends], ends, strict=False)
        ]

    def encode_prompt(self, text: str) -> np.ndarray:
        """As ``encode``, but ``[MASK]`` becomes the mask, with one space before it: an entry holds the space before its word."""
        pieces = re.split(r" ?\[MASK\]", text)
        encoded = self.encode_batch(pieces)
        mask = np.array([self.mask_token_id], dtype=self._dtype)
        return np.concatenate([encoded[0], *(array for piece in encoded[1:] for array in (mask, piece))])

    def decode(self, ids: Sequence[int]) -> str:
        """The text; each mask as ``[MASK]``, the end of text by its name, and bytes that are no UTF-8 as U+FFFD.

        Raises:
            ValueError: an id outside 0 .. ``vocab_size`` - 1.
        """
        runs: list[list[int]] = [[]]
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"ids: expected 0 .. {self.vocab_size - 1}, got {i}")
            if i == self.mask_token_id:
                runs.append([])
            else:
                runs[-1].append(i)
        return MASK.join(self._tokenizer.decode(run, skip_special_tokens=False) for run in runs)

    def description(self) -> dict[str, Any]:
        """Plain values that ``tokenizer_from`` turns back into this tokenizer: the whole of it, as text."""
        return {"kind": "bpe", "end_of_text": self.end_of_text, "tokenizer": self._document}

    def save(self, path: str | Path) -> None:
        """Write a ``tokenizer.json`` that ``from_file`` and the library read."""
        replace_file(Path(path), self._document.encode())

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[dict[str, Any]]]:
        return tokenizer_from, (self.description(),)


def _library() -> ModuleType:
    try:
        import tokenizers
    except ImportError:
        raise ImportError("a BPE tokenizer needs the package tokenizers: pip install 'edlm-torch[tokenizers]'") from None
    return tokenizers


def _byte_level(entries: dict[str, int], merges: list[Any], end_of_text: str) -> str:
    """The document of a byte-level tokenizer, as GPT-2's is one."""
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{"id": entries[end_of_text], "content": end_of_text} | added],
            "pre_tokenizer": _BYTE_LEVEL,
            "decoder": _BYTE_LEVEL,
            "model": _MODEL | {"vocab": entries, "merges": merges},
        }
    )


def _canonical(document: str) -> dict[str, Any]:
    """The parts of a tokenizer.json that ids depend on, in one form for all versions of the library: descriptions can be compared."""
    try:
        plain = json.loads(document)
        model = plain["model"]
        merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]]
        kind = model.get("type", "BPE")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            "tokenizer: expected the JSON of a BPE tokenizer (model.vocab, model.merges), got something else"
        ) from None
    if kind != "BPE":
        raise ValueError(f"tokenizer: expected a model of type BPE, got {kind!r}")
    if model.get("dropout"):
        raise ValueError(f"tokenizer: expected one that always returns the same ids, got a dropout of {model['dropout']}")
    settings = {key: model.get(key) or default for key, default in _MODEL.items()}
    return {
        "version": plain.get("version", "1.0"),
        "truncation": None,
        "padding": None,
        "added_tokens": plain.get("added_tokens") or [],
        "normalizer": plain.get("normalizer"),
        "pre_tokenizer": plain.get("pre_tokenizer"),
        "post_processor": None,
        "decoder": plain.get("decoder"),
        "model": settings | {"vocab": model["vocab"], "merges": merges},
    }


def _special(plain: dict[str, Any]) -> list[str]:
    return [token["content"] for token in plain["added_tokens"] if token["special"]]


def _end_of_text(entries: dict[str, int], plain: dict[str, Any]) -> str:
    """What ends a document where nobody says."""
    special = _special(plain)
    if END_OF_TEXT in entries:
        return END_OF_TEXT
    if len(special) == 1 and special[0] != plain["model"]["unk_token"]:  # what text may become ends nothing
        return special[0]
    raise ValueError(
        f"end_of_text: expected the entry {END_OF_TEXT!r}, or one special token alone, got the special tokens {special}; leave "
        "that which ends a document alone in the file's added_tokens, or pass an entry to BPETokenizer.from_file as end_of_text="
    )


def _parts(text: str) -> Iterator[str]:
    """``text`` in parts of about ``_PART`` characters, white space at the beginning of the later one."""
    begin = 0
    while len(text) - begin > _PART and (cut := _CUT.search(text, begin + _PART)):
        yield text[begin : cut.start()]
        begin = cut.start()
    yield text[begin:]
