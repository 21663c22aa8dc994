"""``edlm eval MODEL``: how likely texts are under a model: what is measured, by which batches, and the rows that come of it."""

from __future__ import annotations

import argparse
import hashlib
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import BPETokenizer, CharTokenizer, Tokens
from ..eval import Estimate
from ..eval.documents import is_few
from .decoder import flag
from .eval_document import notes_of, plain, units
from .models import load_any, open_energy

OF_ENERGY = ("joint_nll", "finite_step_elbo", "paper_joint")
DRAWING = ("nelbo", "finite_step_elbo", "paper_joint")  # of t, or of what is masked
NUM_CANDIDATES = {"joint_nll": 256, "finite_step_elbo": 16, "paper_joint": 16}
STEPS = 8  # of finite_step_elbo, where nobody says
BRACKETS = ("exact", "lower", "upper_asymptotic")
# What a figure is to -log p. The T-step ELBO from below is no bound: an upper bound of -log p is estimated from below.
_DIRECTIONS = {
    ("joint_nll", "exact"): "exact",
    ("joint_nll", "lower"): "below in expectation",
    ("joint_nll", "upper_asymptotic"): "above for n large enough",
    ("finite_step_elbo", "exact"): "exact",  # there is one for T = 1 alone
    ("finite_step_elbo", "lower"): "no bound",
    ("finite_step_elbo", "upper_asymptotic"): "above for n large enough",
    ("sampler_elbo", None): "upper bound",
    ("nelbo", None): "upper bound",
    ("ar_nll", None): "exact",
}


@dataclass(frozen=True)
class Job:
    """One call of a measure; ``key`` is its name in a record."""

    measure: str
    steps: int | None = None
    num_candidates: int | None = None

    @property
    def key(self) -> str:
        return "/".join(str(part) for part in (self.measure, self.steps, self.num_candidates))


@dataclass(frozen=True)
class Text:
    name: str
    x0: torch.Tensor  # int64 [N, L]
    available: int  # windows of the text, of which these are some
    characters_per_token: float


class Likelihood:
    """Sequences are measured in chunks, the same whoever shares them; before them log Z of the masked state, which all need.

    Records 0 .. len(log_Z) - 1 are those of log Z, one for each number of draws; behind them comes one for each sequence.
    """

    kind = "likelihood"

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.model = load_any(options.model, device)
        self.energy = None
        if options.energy:
            if self.model.kind != "dit":
                raise ValueError(
                    f"--energy: it corrects a denoiser (a model of kind dit), got {options.model} of kind {self.model.kind!r}; "
                    "leave it out"
                )
            self.energy = open_energy(options.energy, self.model, carry_over=options.carry_over, device=device)
        self.jobs = jobs_of(options, self.model.kind, self.energy is not None)
        limits = [most for most in (getattr(net, "max_length", None) for net in (self.model, self.energy)) if most is not None]
        length = min([128, *limits]) if options.length is None else options.length
        if length > min([length, *limits]):
            raise ValueError(f"--length: expected at most {min(limits)}, which is what the model reads, got {length}; take less")
        self.texts = read_texts(options, self.model.tokenizer_description, length)
        self.seed, self.num_times, self.length, self.device = options.seed, options.num_times or 1, length, device
        self.batch_size = options.batch_size
        self.log_Z: dict[int, Any] = {}  # n -> (PartitionBounds, seconds)
        self._draws = [job.num_candidates for job in self.jobs if job.measure == "joint_nll"]
        self.batches = [range(n, n + 1) for n in range(len(self._draws))]
        self.first, self._chunks = len(self.batches), [(0, 0, 0)] * len(self.batches)
        at, size = self.first, self.batch_size
        for number, text in enumerate(self.texts):
            for begin in range(0, len(text.x0), size):
                end = min(begin + size, len(text.x0))
                self.batches.append(range(at, at + end - begin))
                self._chunks.append((number, begin, end))
                at += end - begin
        self.total = at

    @property
    def settings(self) -> dict[str, Any]:
        def digest(text: Text) -> str:
            return "sha256 " + hashlib.sha256(text.x0.numpy().tobytes()).hexdigest()

        def called(job: Job) -> str:
            steps = "" if job.steps is None else f", T = {job.steps}"
            return job.measure + steps + ("" if job.num_candidates is None else f", n = {job.num_candidates}")

        return {
            "--text": {text.name: digest(text) for text in self.texts},
            "--length": self.length,
            "--measures": list(map(called, self.jobs)),
            "--num-times": self.num_times,
        }

    def records(self, number: int) -> list[dict[str, Any]]:
        if number < self.first:
            found = [self._log_Z_record(number)]
            self.know(found)
            return found
        text, begin, end = self._chunks[number]
        x0, name = self.texts[text].x0[begin:end], self.texts[text].name
        values: list[dict[str, Any]] = [{} for _ in range(begin, end)]
        seconds = {}
        for job in self.jobs:
            started = time.perf_counter()
            columns = self._measure(job, x0, self.seed * len(self.texts[text].x0) + begin)
            seconds[job.key] = (time.perf_counter() - started) / len(x0)
            for i, value in enumerate(values):
                value[job.key] = {column: _written(column_values[i]) for column, column_values in columns.items()}
        return [
            {"index": index, "text": name, "sequence": begin + i, "values": value, "seconds": seconds}
            for i, (index, value) in enumerate(zip(self.batches[number], values, strict=True))
        ]

    def know(self, records: Sequence[dict[str, Any]]) -> None:
        """The records of the first batches, which the others need."""
        from ..eval import PartitionBounds

        for record in records:
            fields = {key: torch.tensor([float(x)], dtype=torch.float64) for key, x in record["log_Z"].items()}
            n = record["num_candidates"]
            self.log_Z[n] = PartitionBounds(**fields, num_candidates=n), record["seconds"]

    def _log_Z_record(self, index: int) -> dict[str, Any]:
        from ..eval import log_partition_bounds

        n, started = self._draws[index], time.perf_counter()
        masked = torch.full((1, self.length), self.model.mask_token_id, device=self.device)
        bounds = log_partition_bounds(
            self.model, self.energy, masked, 1.0, num_candidates=n, seed=self.seed, energy_batch_size=self.batch_size
        )
        names = ("log_Z_lower", "log_Z_upper_asymptotic", "log_Z_exact", "stderr", "ess")
        fields = {name: _written(float(getattr(bounds, name)[0])) for name in names}
        return {"index": index, "num_candidates": n, "log_Z": fields, "seconds": time.perf_counter() - started}

    def _measure(self, job: Job, x0: torch.Tensor, seed: int) -> dict[str, list[float]]:
        """Columns of values, one a sequence."""
        from .. import eval as measures

        size = self.batch_size
        if job.measure == "ar_nll":
            return {"value": measures.ar_nll(self.model, x0, batch_size=size).values.tolist()}
        given: dict[str, Any] = {"num_times": self.num_times, "seed": seed, "batch_size": size}
        if job.measure == "nelbo":
            return {"value": measures.nelbo(self.model, x0, steps=job.steps, **given).values.tolist()}
        if job.measure == "joint_nll":
            log_Z, _ = self.log_Z[job.num_candidates]
            found = measures.joint_nll(self.model, self.energy, x0, log_Z=log_Z, batch_size=size)
        else:
            given["num_candidates"] = job.num_candidates
            if job.measure == "finite_step_elbo":
                found = measures.finite_step_elbo(self.model, self.energy, x0, steps=job.steps, **given)
            else:
                found = measures.paper_joint(self.model, self.energy, x0, **given)
        columns = {name: getattr(found, name).values.tolist() for name in BRACKETS if getattr(found, name) is not None}
        if job.measure != "joint_nll":  # whose ESS is that of its one log Z
            columns["ess"] = found.ess.values.tolist()
        if found.sampler is not None:
            columns["sampler"] = found.sampler.values.tolist()
        return columns

    def document(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        from ..eval import unigram_entropy

        self.know(records[: self.first])
        of: dict[str, list[dict[str, Any]]] = {text.name: [] for text in self.texts}
        for record in records[self.first :]:
            of[record["text"]].append(record)
        rows = [row for text in self.texts for job in self.jobs for row in self._rows(text, job, of[text.name])]
        texts = {
            text.name: {
                "sequences": len(text.x0),
                "windows_available": text.available,
                "characters_per_token": text.characters_per_token,
                "entropy": plain(unigram_entropy(text.x0)),
            }
            for text in self.texts
        }
        seconds = sum(s for _, s in self.log_Z.values())
        seconds += sum(s for record in records[self.first :] for s in record["seconds"].values())
        return {"seconds": seconds, "warnings": notes_of(rows), "rows": rows, "texts": texts}

    def _rows(self, text: Text, job: Job, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        def column(name: str) -> torch.Tensor | None:
            """None unless every sequence has a value."""
            found = [record["values"][job.key].get(name) for record in records]
            return None if None in found else torch.tensor([float(x) for x in found], dtype=torch.float64)

        bounds, drawing = self.log_Z.get(job.num_candidates, (None, 0.0)) if job.measure == "joint_nll" else (None, 0.0)
        seconds = sum(record["seconds"][job.key] for record in records)
        each = None if bounds is None else bounds.ess
        if job.measure in OF_ENERGY and bounds is None:
            each = column("ess")
        rows = []
        wanted = [(job.measure, log_Z) for log_Z in (BRACKETS if job.measure in OF_ENERGY else (None,))]
        if job.measure == "finite_step_elbo":
            if column("exact") is not None:  # the other two are the same number
                wanted = wanted[:1]
            wanted.append(("sampler_elbo", None))
        for measure, log_Z in wanted:
            values = column("sampler" if measure == "sampler_elbo" else log_Z or "value")
            known = log_Z == "exact"  # nothing was drawn for it: one row, whatever the n
            if values is None or (
                known and job != next(j for j in self.jobs if (j.measure, j.steps) == (job.measure, job.steps))
            ):
                continue
            drawn = None if known or measure == "sampler_elbo" else each
            shared = 0.0 if bounds is None or known else float(bounds.stderr[0]) / self.length
            few = None if drawn is None else float(is_few(drawn, job.num_candidates).double().mean())
            rows.append(
                {
                    "text": text.name,
                    "measure": measure,
                    "steps": 1 if job.measure == "joint_nll" else job.steps,
                    "num_candidates": None if known else job.num_candidates,
                    "log_Z": log_Z,
                    "direction": _DIRECTIONS.get((measure, log_Z), "no bound"),
                    **units(Estimate.of(values, "nats/token", shared_stderr=shared), text.characters_per_token),
                    "ess": None if drawn is None else plain(Estimate.of(drawn, "of n")),
                    "low_ess": few,
                    "sequences": len(records),
                    "length": self.length,
                    "characters_per_token": text.characters_per_token,
                    "sequences_per_second": len(records) / (seconds if known else seconds + drawing),
                }
            )
        return rows


def _written(x: float) -> float | str:
    """As JSON has it, and ``float`` reads it."""
    return x if math.isfinite(x) else str(x)


def jobs_of(options: argparse.Namespace, kind: str, with_energy: bool) -> list[Job]:
    """What is measured of a model. Raises ValueError where an option does not fit it."""
    possible = ("ar_nll",) if kind == "causal_lm" else ("nelbo", *OF_ENERGY) if with_energy else ("nelbo",)
    asked = options.measures or possible
    measures = list(dict.fromkeys("finite_step_elbo" if measure == "sampler_elbo" else measure for measure in asked))
    for measure in measures:
        if measure not in possible:
            lacks = "; give --energy as well" if measure in OF_ENERGY and kind == "dit" else ""
            raise ValueError(f"--measures: expected {', '.join(possible)} of this model (kind {kind!r}), got {measure}{lacks}")
    if kind == "causal_lm" and (options.steps or options.num_times):
        name = "steps" if options.steps else "num_times"
        has = "has a T-step bound" if options.steps else "has draws to average"
        raise ValueError(f"{flag(name)}: only a denoiser {has}, got a {kind}")
    if options.num_times and not set(DRAWING) & set(measures):
        raise ValueError(f"--num-times: it is for {', '.join(DRAWING)}, got --measures {' '.join(measures)}; leave it out")
    counts, several = options.num_candidates, set(OF_ENERGY) & set(measures)
    if counts and not several:
        raise ValueError(f"--num-candidates: it is for {', '.join(OF_ENERGY)}, got none of them; leave it out, or give --energy")
    if with_energy and not several:
        raise ValueError(f"--energy: it is for {', '.join(OF_ENERGY)}, got --measures {' '.join(measures)}; leave it out")
    if "auto" in (counts or ()):
        raise ValueError("--num-candidates: expected numbers of draws, got auto, which is for --decode")
    if min(counts or (2,)) < 2:
        raise ValueError(f"--num-candidates: expected at least 2 draws for log Z, got {min(counts)}; take more")
    if options.steps and not {"nelbo", "finite_step_elbo"} & set(measures):
        raise ValueError(f"--steps: it is for nelbo, finite_step_elbo, got --measures {' '.join(measures)}; leave it out")
    jobs = []
    for measure in measures:
        drawn = list(dict.fromkeys(counts or [NUM_CANDIDATES[measure]])) if measure in OF_ENERGY else [None]
        steps: list[int | None] = [None]
        if measure == "finite_step_elbo":
            steps = list(dict.fromkeys(options.steps or [STEPS]))
        elif measure == "nelbo":
            steps += dict.fromkeys(options.steps or ())
        jobs += [Job(measure, t, n) for t in steps for n in drawn]
    return jobs


# --- texts ------------------------------------------------------------------------------------------------------------------------


def read_texts(options: argparse.Namespace, described: dict[str, Any] | None, length: int) -> list[Text]:
    """The windows of every text, under the model's tokenizer."""
    from ..data import tokenizer_from, windows

    tokenizer = tokenizer_from(described)
    frame, ends = None, hasattr(tokenizer, "eos_token_id")
    if options.blocks == "bos_eos":
        if not ends:
            raise ValueError("--blocks: expected a model whose tokenizer has an end of text for bos_eos, got text8")
        frame = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    found = []
    for source, name in names_of(options.text, options.split).items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                tokens = tokens_of(source, options.split, tokenizer, folder)
                x0 = windows(tokens, length, options.windows, frame=frame)
            except ValueError as error:
                if source in str(error):
                    raise
                raise ValueError(f"--text: {source}: {str(error).removeprefix('text: ')}") from None
            characters = tokens.characters_per_token if ends else 1.0
            inner = length if frame is None else length - 2
            found.append(Text(name, x0, len(tokens) // inner, characters * inner / length))
    return found


def names_of(sources: Sequence[str], split: str) -> dict[str, str]:
    """How each source is called in a table: shortly, unless two would be called the same."""

    def short(source: str) -> str:
        if is_file(source):
            return Path(source).name
        return f"{Path(source).name if Path(source).is_dir() else source}/{split}"

    names = [short(source) for source in sources]
    if len(set(sources)) < len(sources):
        raise ValueError(f"--text: expected each text once, got {' '.join(sources)}")
    return {source: name if names.count(name) == 1 else source for source, name in zip(sources, names, strict=True)}


def is_file(source: str) -> bool:
    from ..data.corpora import CORPORA
    from ..data.text import BUNDLED

    return source != BUNDLED and source not in CORPORA and Path(source).is_file()


def tokens_of(source: str, split: str, tokenizer: CharTokenizer | BPETokenizer, folder: str) -> Tokens:
    """The tokens of a text as training would make them, in ``folder``. A file is one document, whatever the split."""
    from ..data import open_text, pack, read_text

    documents = [read_text(source)] if is_file(source) else open_text(source).split(split)
    return pack(documents, tokenizer, Path(folder) / "tokens", source=source)
