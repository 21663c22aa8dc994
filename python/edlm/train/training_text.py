"""What a run reads: the windows that it trains on, and those that it validates on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import Tokens, WindowDataset, fingerprint, open_text, open_tokenizer, open_tokens, pack, windows
from ..data.shards import read_manifest
from .configuration import DataSpec, TrainConfig
from .distributed import World


@dataclass(frozen=True)
class TrainingText:
    """``fingerprint`` stands for the tokens of both splits and the tokenizer; ``characters_per_token`` is that of
    the valid split, ends of text counting as tokens and as no characters."""

    tokenizer: Any
    dataset: WindowDataset
    held_out: torch.Tensor  # int64 [N, L]
    fingerprint: str
    characters_per_token: float

    @classmethod
    def open(cls, config: TrainConfig, folder: Path, world: World, *, progress: bool = False) -> TrainingText:
        """Tokens of ``data.tokens``, or of ``data.text`` into ``folder``: the first process makes and verifies them.

        Raises:
            ValueError: text too short, corrupt tokens, tokens of another tokenizer; as the data room says.
        """
        spec = config.data
        tokenizer = open_tokenizer(spec.tokenizer)
        frame = None
        if spec.blocks == "bos_eos":
            frame = (tokenizer.bos_token_id, getattr(tokenizer, "eos_token_id", None))
            if frame[1] is None:
                raise ValueError(
                    f"data.blocks: expected a tokenizer with an end of text for 'bos_eos', got {spec.tokenizer!r}; take 'plain'"
                )
        place = folder if spec.tokens is None else Path(spec.tokens)
        world.first(lambda: _made(spec, tokenizer, place, progress=progress))
        tokens = {name: open_tokens(place / name, verify=False) for name in ("train", "valid")}
        try:
            dataset = WindowDataset(tokens["train"], spec.length, config.batch_size, seed=config.seed, frame=frame)
            held_out = windows(tokens["valid"], spec.length, config.valid_windows, frame=frame)
        except ValueError as error:
            raise ValueError(
                f"data: {spec.tokens or spec.text}: {error} (of a file 90 % are trained on, the next 5 % validated on: it takes about "
                f"{20 * spec.length} characters for data.length = {spec.length})"
            ) from None
        both = "".join(t.fingerprint for t in tokens.values()) + fingerprint(tokenizer)
        characters = tokens["valid"].characters_per_token if hasattr(tokenizer, "eos_token_id") else 1.0
        characters *= 1.0 if frame is None else (spec.length - 2) / spec.length
        return cls(tokenizer, dataset, held_out, hashlib.sha256(both.encode()).hexdigest(), characters)


def _made(spec: DataSpec, tokenizer: Any, place: Path, *, progress: bool) -> None:
    """See that both splits are there and whole, making them where they come from text."""
    if spec.tokens is not None:
        for name in ("train", "valid"):
            _check_tokenizer(open_tokens(place / name), tokenizer, spec)
        return
    corpus = open_text(spec.text)
    # Tokens that a run has begun with are all that is left of a text that has changed: they are not replaced.
    begun = any((place.parent / "checkpoints").glob("step_*"))
    cut = 1 << 28 if hasattr(tokenizer, "separator_id") else None  # where it makes no difference, large files go in parts
    for name in ("train", "valid"):
        if begun and _source(place / name) not in (None, f"{corpus.identity}/{name}"):
            raise ValueError(
                f"data.text: expected the text that {place.parent} was trained on so far, got another under the same name; "
                "bring it back, or choose another folder"
            )
        try:
            pack(
                corpus.split(name, part=cut),
                tokenizer,
                place / name,
                source=f"{corpus.identity}/{name}",
                workers=spec.workers,
                progress=progress,
            )
        except ValueError as error:
            raise ValueError(f"data.text: {spec.text}: {name}: {error}") from None


def _source(folder: Path) -> str | None:
    """What a token folder says that it was made from; None where it says nothing."""
    try:
        return read_manifest(folder)["made_from"]["source"]
    except (OSError, ValueError):
        return None


def _check_tokenizer(tokens: Tokens, tokenizer: Any, spec: DataSpec) -> None:
    made_with = tokens.manifest["made_from"]["tokenizer"]
    if made_with != fingerprint(tokenizer):
        raise ValueError(
            f"data.tokenizer: expected the one that made {tokens.folder} (fingerprint {made_with}), got {spec.tokenizer!r} "
            f"({fingerprint(tokenizer)}); name that one, or build the tokens again"
        )
