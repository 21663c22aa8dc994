"""``edlm eval MODEL --decode``: how good and how different texts are that are decoded here and now."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import itertools
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..data import windows
from ..eval.documents import REAL_TEXT
from ..samplers import generate
from .decoder import check, flag, given, open_decoder, special_tokens
from .eval_document import NOTHING, ess_by_time, plain
from .eval_likelihood import names_of, tokens_of
from .judges import HeldOut
from .sample_json import own_tokens
from .text_batches import TextBatches


@dataclass(frozen=True)
class Texts:
    """Texts without special tokens, and what their diversity is counted in, int64 [L_i] each."""

    texts: list[str]
    tokens: list[torch.Tensor]

    @classmethod
    def of_tokens(cls, rows: Iterable[Sequence[int]], tokenizer: Any) -> Texts:
        """A text begins behind special tokens in front, and ends before the first end of text behind those."""
        special = {tokenizer.mask_token_id, *special_tokens(tokenizer).values()}
        end, own = getattr(tokenizer, "eos_token_id", None), []
        for row in rows:
            text = itertools.takewhile(lambda i: i != end, itertools.dropwhile(special.__contains__, row))
            own.append([i for i in text if i not in special])
        return cls([tokenizer.decode(row) for row in own], [torch.tensor(row, dtype=torch.int64) for row in own])

    @classmethod
    def of_characters(cls, texts: list[str]) -> Texts:
        return cls(texts, [torch.tensor([ord(c) for c in text], dtype=torch.int64) for text in texts])


class Scorer:
    """What is said of a set of texts: every judge's figures, their diversity, and, if asked for, MAUVE against ``reference``."""

    def __init__(
        self, options: argparse.Namespace, device: torch.device, reference: Sequence[str], held_out: HeldOut | None = None
    ) -> None:
        from .judges import open_judge

        self.specs, self.seed = options.judge, options.seed
        self.judges = [open_judge(spec, device, batch_size=options.batch_size, real=held_out) for spec in self.specs]
        names = [judge.name for judge in self.judges]
        if len(set(names)) < len(names):
            raise ValueError(f"--judge: expected judges of different names, got {', '.join(names)}; leave one out")
        self._features: tuple[Any, torch.Tensor] | None = None
        if options.mauve:
            featuring = next((judge for judge in self.judges if hasattr(judge, "features")), None)
            if featuring is None:
                raise ValueError(
                    f"--mauve: expected a judge that has features (hf:FOLDER, gguf:FILE, smollm2), got {', '.join(names)}; "
                    "name one, or leave it out"
                )
            try:
                self._features = featuring, featuring.features([text for text in reference if text])
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # every row says what there is to warn of
                    self._mauve(
                        self._features[1]
                    )  # too few texts, a seed too large, no package: known before anything is decoded
            except (ValueError, ImportError) as error:
                raise ValueError(f"--mauve: {error}") from error

    @property
    def settings(self) -> dict[str, Any]:
        """A judge of the same name may be another one: its identity says so."""
        identities = {spec: judge.identity for spec, judge in zip(self.specs, self.judges, strict=True)}
        return {"--judge": identities, "--mauve": self._features is not None}

    def _mauve(self, features: torch.Tensor) -> float:
        from ..eval import mauve

        return mauve(features, self._features[1], seed=self.seed)

    def row(self, of: Texts, *, is_reference: bool = False) -> tuple[dict[str, Any], list[str]]:
        """The part of a row that is about the texts, and what there is to warn of. Figures that do not exist are null."""
        from ..eval import distinct_n, repetition, self_bleu, unigram_entropy

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            kept = [i for i, text in enumerate(of.texts) if text]
            texts, tokens = [of.texts[i] for i in kept], [of.tokens[i] for i in kept]
            notes = []
            if len(kept) < len(of.texts):
                notes.append(f"{len(of.texts) - len(kept)} of {len(of.texts)} texts are empty without special tokens: left out")
            longest = max(map(len, tokens), default=0)
            judged = {judge.name: self._judged(judge, texts, len(of.texts) - len(texts), notes) for judge in self.judges}
            found = {
                "num_texts": len(of.texts),
                "length": max(1, longest),
                "judges": judged,
                "entropy": plain(unigram_entropy(tokens)) if tokens else NOTHING,
                "distinct": {str(n): distinct_n(tokens, n) if n <= longest else None for n in (1, 2, 4)},
                "repetition": {"4": plain(repetition(tokens, 4)) if longest >= 4 else NOTHING},
                "self_bleu": self._or_none(lambda: plain(self_bleu(tokens)), notes) if len(tokens) > 1 else None,
                "mauve": self._or_none(lambda: self._mauve(self._features[0].features(texts)), notes)
                if self._features and texts and not is_reference
                else None,
                "example": next(iter(texts), ""),
            }
        return found, notes + [str(warning.message) for warning in caught]

    def _judged(self, judge: Any, texts: list[str], empty: int, notes: list[str]) -> dict[str, Any]:
        from ..eval import generative_perplexity

        none = {"perplexity": NOTHING, "bits_per_token": NOTHING, "bits_per_character": NOTHING, "texts": 0, "left_out": None}
        if not texts:
            return none | {"skipped": empty, "reasons": {}}
        try:
            found = generative_perplexity(texts, judge)
        except ValueError as error:
            if not str(error).startswith("texts: "):
                raise
            notes.append(str(error).removeprefix("texts: "))
            return none | {"skipped": len(texts) + empty, "reasons": {}}
        units = {name: plain(getattr(found, name)) for name in ("perplexity", "bits_per_token", "bits_per_character")}
        counts = {"texts": found.texts, "skipped": found.skipped + empty, "reasons": found.reasons, "left_out": found.left_out}
        return units | counts

    @staticmethod
    def _or_none(measure: Callable[[], Any], notes: list[str]) -> Any:
        """None, and a note, where a package is missing, or the texts have no such figure."""
        try:
            return measure()
        except (ImportError, ValueError) as error:
            notes.append(str(error))
            return None


class Rows:
    """Work whose records are rows, each with its warnings: one a batch."""

    first = 0
    unit_of_diversity: str

    def know(self, records: Sequence[dict[str, Any]]) -> None:
        """No record is needed for another."""

    def document(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        notes = [f"{record['named']}: {note}" for record in records for note in record["warnings"]]
        return {
            "seconds": sum(record["seconds"] for record in records),
            "warnings": list(dict.fromkeys(notes)),
            "rows": [record["row"] for record in records],
            "unit_of_diversity": self.unit_of_diversity,
        }

    def _record(self, index: int, row: dict[str, Any], named: str, notes: list[str], started: float) -> dict[str, Any]:
        return {"index": index, "row": row, "named": named, "warnings": notes, "seconds": time.perf_counter() - started}


# --- decoded here and now ---------------------------------------------------------------------------------------------------------


class Decoding(Rows):
    """Record 0 is of real text, the next ones of texts decoded in so many steps each, the same seeds for all."""

    kind = "decoding"

    def __init__(self, options: argparse.Namespace, device: torch.device, label: str) -> None:
        if options.num_candidates and len(options.num_candidates) > 1:
            shown = " ".join(map(str, options.num_candidates))
            raise ValueError(
                f"--num-candidates: expected one number of candidates for --decode, or auto, got {shown}; choose one"
            )
        ours = {"steps": None, "stop": None, "num_candidates": next(iter(options.num_candidates or ()), None)}
        self.options = argparse.Namespace(**{**vars(options), **ours})
        check(self.options)
        self.decoder, self.label = open_decoder(self.options, device), label
        self.steps = self._steps(options.decode)
        self.tokenizer, self.device = self.decoder.tokenizer, device
        most = None if options.block_length else getattr(self.decoder.network, "max_length", None)
        length = min(128, most or 128) if options.length is None else options.length
        self.texts = TextBatches(num=options.num_texts, batch_size=options.batch_size, seed=options.seed, length=length)
        self.real, counted = self._real(length)
        held_out = HeldOut(options.text[0], counted, self.real.texts) if self._counting else None
        self.scorer = Scorer(self.options, device, self.real.texts, held_out)
        self.unit_of_diversity = "tokens"
        self.batches = [range(n, n + 1) for n in range(1 + len(self.steps))]
        self.total, self._warm = len(self.batches), False

    def _steps(self, asked: list[int]) -> list[int | None]:
        """One row each. What has no grid has one row, without a number."""
        grid = not self.decoder.causal and self.options.sampler in (None, "ancestral", "remasking")
        if grid != bool(asked):
            what = (
                "numbers of steps, such as --decode 8 16 32"
                if grid
                else "no number, where every token is a step (an autoregressive model, or a sampler without a grid)"
            )
            raise ValueError(f"--decode: expected {what}, got {' '.join(map(str, asked)) or 'none'}")
        if any(steps < 1 for steps in asked):
            raise ValueError(f"--decode: expected numbers of steps >= 1, got {' '.join(map(str, asked))}")
        return list(dict.fromkeys(asked)) or [None]

    def _real(self, length: int) -> tuple[Texts, list[str]]:
        """The odd windows of the text, as many as are decoded, spread over it; and the even ones, for a judge that counts."""
        (source,) = self.options.text
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows = windows(tokens_of(source, self.options.split, self.tokenizer, folder), length)
                if len(rows) < 2:
                    raise ValueError(f"expected at least two windows of {length} tokens, got one; take more text or shorter ones")
            except ValueError as error:
                if source in str(error):
                    raise
                raise ValueError(f"--text: {source}: {str(error).removeprefix('text: ')}") from None
        odd = rows[1::2]
        count = min(self.texts.total, len(odd))
        index = torch.arange(count) * (len(odd) - 1) // max(1, count - 1)
        even = [piece for row in rows[0::2].tolist() for piece in self._pieces(row)] if self._counting else []
        return Texts.of_tokens(odd[index].tolist(), self.tokenizer), Texts.of_tokens(even, self.tokenizer).texts

    def _pieces(self, row: list[int]) -> list[list[int]]:
        """All that stands between ends of texts: a judge counts it all."""
        end = getattr(self.tokenizer, "eos_token_id", None)
        return [list(ids) for is_end, ids in itertools.groupby(row, lambda i: i == end) if not is_end]

    @property
    def _counting(self) -> bool:
        return any(spec.startswith("ngram:") for spec in self.options.judge)

    @property
    def settings(self) -> dict[str, Any]:
        (name,) = names_of(self.options.text, self.options.split).values()
        digest = hashlib.sha256(json.dumps(self.real.texts).encode()).hexdigest()
        shaping = {flag(key): value for key, value in self._defaults().items()}
        shaping |= {flag(key): value for key, value in given(self.options).items()}
        return {
            "--decode": self.steps,
            "--num-texts": self.texts.total,
            "--length": self.texts.length,
            "--text": {name: f"sha256 {digest}"},
            **self.scorer.settings,
            **shaping,
        }

    def _defaults(self) -> dict[str, Any]:
        """What texts and seconds depend on most, where it is left to the sampler."""
        names = ["temperature"] if self.decoder.causal else ["sampler", "temperature"]
        names += ["window", "energy_temperature"] if self.decoder.corrected else []
        parameters = inspect.signature(generate).parameters
        return {name: parameters[name].default for name in names} | ({"num_candidates": 8} if self.decoder.corrected else {})

    def records(self, number: int) -> list[dict[str, Any]]:
        started = time.perf_counter()
        if number == 0:
            row, notes = self.scorer.row(self.real, is_reference=True)
            if len(self.real.texts) < self.texts.total:
                notes.append(
                    f"{len(self.real.texts)} real texts beside {self.texts.total} decoded ones: distinct-n, self-BLEU and MAUVE depend "
                    "on their number; give a longer --text, or a smaller --num-texts"
                )
            row = {"method": REAL_TEXT, "steps": None, **row, "nfe": None, "energy_nfe": None, "seconds": None, "ess": None}
            return [self._record(0, row, REAL_TEXT, notes, started)]
        steps = self.steps[number - 1]
        took, tokens = self._decode(steps)
        row, notes = self.scorer.row(Texts.of_tokens(tokens, self.tokenizer))
        row = {"method": self.label, "steps": steps, **row, "length": self.texts.length, **took}
        return [self._record(number, row, self.label if steps is None else f"{steps} steps", notes, started)]

    def _decode(self, steps: int | None) -> tuple[dict[str, Any], list[list[int]]]:
        """All texts, and what that took: wall-clock of the sampler alone."""
        decoder = self.decoder
        if steps is not None:
            decoder = replace(decoder, options=decoder.options | {"steps": steps})
        self._warm_up(decoder, steps)
        tokens, seconds, effective, nfe, energy_nfe = [], 0.0, [], 0, 0
        for k in range(len(self.texts)):
            began = self._now()
            sample = decoder(**self.texts.arguments(k))
            seconds += self._now() - began
            tokens += own_tokens(sample)
            effective.append(sample)
            nfe, energy_nfe = max(nfe, sample.nfe), max(energy_nfe, sample.energy_nfe)
        took = {"nfe": nfe, "energy_nfe": energy_nfe, "seconds": seconds, "ess": ess_by_time(effective)}
        return took, tokens

    def _warm_up(self, decoder: Any, steps: int | None) -> None:
        """What a first call alone does (memory, threads, kernels) is not decoding: a few steps of a batch; without a grid, a text."""
        if self._warm:
            return
        arguments = self.texts.arguments(0)
        if steps is None:
            decoder(**arguments | {"batch_size": 1})
        else:
            replace(decoder, options=decoder.options | {"steps": 2})(**arguments)
        self._warm = True

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
