"""What decodes: a network from its folder, its tokenizer, and the options that were given."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..samplers import SampleOutput
from .models import load_any, open_energy

SHARED = ("temperature", "top_k", "top_p", "min_p")
# Of denoisers alone, by the names that ``generate`` has for them too.
ORDER = ("sampler", "steps", "remask_prob", "block_length", "context_length")
CORRECTION = (
    "num_candidates",
    "ess_target",
    "max_candidates",
    "window",
    "window_ess",
    "energy_temperature",
    "energy_batch_size",
    "num_particles",
    "resample_threshold",
    "resample_scheme",
)
# What would be ignored without something else: (option, the other one, what it has to be).
_MEANINGLESS = (
    ("ess_target", "num_candidates", "auto"),
    ("max_candidates", "num_candidates", "auto"),
    ("window_ess", "window", "auto"),
)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def by_flags(message: str, options: argparse.Namespace) -> str:
    """What the sampler says of its arguments, by the names that they have on the command line."""
    flags = {name: flag(name) for name in vars(options).keys() - {"model", "command", "run"}}
    flags["stop_token_id"] = "--stop"
    if getattr(options, "decode", None) is not None:  # of edlm eval, where it says the steps, and nobody gives a prompt
        flags["steps"] = "--decode"
        message = message.removeprefix("prompt, ")
    if options.prompt_file is not None:
        flags["prompt"] = "--prompt-file"
    names, colon, rest = message.partition(": ")
    if not colon:
        return message
    rest = re.sub(r"\b(\w+)=(\d+)\b", lambda m: f"{flags[m[1]]} {m[2]}" if m[1] in flags else m[0], rest)  # what to give instead
    rest = rest.replace("energy=None; pass one", "no --energy; give one").replace("energy=None", "no --energy")
    return ", ".join(flags.get(name, name) for name in names.split(", ")) + colon + rest


@contextmanager
def errors_by_flags(options: argparse.Namespace) -> Iterator[None]:
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        shown = by_flags(str(error), options)
        if shown == str(error):
            raise
        raise (ValueError if isinstance(error, ValueError) else FileNotFoundError)(shown) from None


@dataclass(frozen=True)
class Decoder:
    """A denoiser, or an autoregressive model, ready to be called for batches."""

    network: Any
    tokenizer: Any
    options: dict[str, Any]  # what every call is given
    device: torch.device
    causal: bool

    @property
    def mask_token_id(self) -> int:
        return self.tokenizer.mask_token_id

    @property
    def corrected(self) -> bool:
        return self.options.get("energy") is not None

    def __call__(self, **batch: Any) -> SampleOutput:
        from .. import samplers

        if self.causal:
            return samplers.sample_autoregressive(
                self.network, mask_token_id=self.mask_token_id, device=self.device, **self.options, **batch
            )
        return samplers.generate(self.network, device=self.device, **self.options, **batch)


def check(options: argparse.Namespace) -> None:
    """Options that do not fit each other, whatever the model."""
    if options.carry_over and not options.energy:
        raise ValueError("--carry-over: it is a way to score with an energy, got none; give --energy as well, or leave it out")
    for name, other, value in _MEANINGLESS:
        if getattr(options, name) is not None and getattr(options, other) != value:
            raise ValueError(f"{flag(name)}: it is for {flag(other)} {value}, got {getattr(options, other)}; leave it out")
    for name in ("window", "energy_temperature", "energy_batch_size"):
        if getattr(options, name) is not None and not options.energy:
            raise ValueError(f"{flag(name)}: it is about an energy, got none; give --energy as well, or leave it out")
    for name in ("resample_threshold", "resample_scheme"):
        if getattr(options, name) is not None and (options.num_particles or 1) <= 1:
            raise ValueError(f"{flag(name)}: it is for several particles, got none; give --num-particles, or leave it out")


def given(options: argparse.Namespace) -> dict[str, Any]:
    """What shapes the texts, of the options of both kinds of models: those that were given."""
    found = {name: getattr(options, name) for name in (*ORDER, *CORRECTION, *SHARED)}
    return {name: value for name, value in found.items() if value is not None}


def open_decoder(options: argparse.Namespace, device: torch.device) -> Decoder:
    from ..data import tokenizer_from

    network = load_any(options.model, device)
    tokenizer = tokenizer_from(network.tokenizer_description)
    causal, passed = network.kind == "causal_lm", given(options)
    if causal:
        wrong = [name for name in ("energy", "carry_over") if getattr(options, name)]
        wrong += [name for name in (*ORDER, *CORRECTION) if name in passed]
        if wrong:
            raise ValueError(
                f"{flag(wrong[0])}: it is for denoisers (models of kind dit), got {options.model} of kind 'causal_lm', which writes "
                "from left to right; leave it out"
            )
    else:
        if passed.get("sampler", "ancestral") in ("ancestral", "remasking"):
            passed.setdefault("steps", 32)
        if options.energy:
            passed["energy"] = open_energy(options.energy, network, carry_over=options.carry_over, device=device)
    if options.stop is not None:
        passed["stop_token_id"] = stop_token(options.stop, tokenizer, network.vocab_size)
    return Decoder(network, tokenizer, passed, device, causal)


def stop_token(text: str, tokenizer: Any, size: int) -> int:
    """The id of one token: a special one by its name, one of text as it is written, any by its number."""
    special = special_tokens(tokenizer)
    if text in special:
        ids = [special[text]]
    else:
        try:
            ids = tokenizer.encode_prompt(text).tolist()  # encode would drop a space at the end
        except ValueError:  # characters that the tokenizer does not have
            ids = []
        if len(ids) != 1 and text.isascii() and text.isdigit():
            ids = [int(text)]
    if len(ids) != 1:
        names = f", the name of a special one ({', '.join(special)})" if special else ""
        raise ValueError(
            f"--stop: expected one token as text{names}, or its id, got {text!r}, which is {len(ids) or 'no'} tokens"
        )
    if ids[0] == tokenizer.mask_token_id:
        raise ValueError(f"--stop: expected a token that can be drawn, got the mask ({text!r})")
    if not 0 <= ids[0] < size:
        raise ValueError(f"--stop: expected a token of the model's vocabulary, ids 0 .. {size - 1}, got {text!r}, outside of it")
    return ids[0]


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Names of special tokens, which a text never becomes."""
    document = tokenizer.description().get("tokenizer")
    found = {} if document is None else {t["content"]: t["id"] for t in json.loads(document)["added_tokens"] if t["special"]}
    return {tokenizer.end_of_text: tokenizer.eos_token_id} | found if hasattr(tokenizer, "end_of_text") else found
