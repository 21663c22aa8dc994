"""A run that takes a second or two: a text of random words, and a network of one layer with dropout."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from edlm import checkpoint
from edlm.config import from_dict
from edlm.train import TrainConfig

CLOCKS = {"tokens_per_second", "seconds", "eta_seconds", "mfu"}  # of a line of metrics.jsonl: not of what is computed
WORDS = ("the", "of", "and", "she", "was", "to", "it", "in", "her", "not", "very", "could", "mr", "miss", "anne", "letter")


def write_text(folder: Path, words: int = 2000, name: str = "text.txt", seed: int = 0) -> Path:
    path = folder / name
    path.write_text(" ".join(random.Random(seed).choices(WORDS, k=words)))
    return path


def tiny_values(kind: str, text: Path | str, **changes) -> dict:
    """As a TOML file would hold them; a change names a key of the top level or a whole table, of which the rest is kept."""
    values = {
        "model": {"kind": kind, "dim": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.2, "cond_dim": 8},
        "data": {"text": str(text), "length": 16},
        "optim": {"lr": 3e-3, "warmup_steps": 5, "decay": "cosine", "ema_decay": 0.9, "weight_decay": 0.01},
        "steps": 30,
        "batch_size": 4,
        "log_every": 1,
        "valid_every": 10,
        "valid_windows": 8,
        "checkpoint_every": 7,
    }
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(value, dict) and key in values else value
    return values


def tiny_config(kind: str, text: Path | str, **changes) -> TrainConfig:
    return from_dict(tiny_values(kind, text, **changes), TrainConfig)


def toml(values: dict) -> str:
    """Numbers, strings and one level of tables are all that a run's file has."""

    def lines(table: dict) -> list[str]:
        return [f"{k} = {v!r}".replace("'", '"') for k, v in table.items() if not isinstance(v, dict)]

    tables = [f"\n[{name}]\n" + "\n".join(lines(table)) for name, table in values.items() if isinstance(table, dict)]
    return "\n".join(lines(values)) + "\n" + "\n".join(tables) + "\n"


def weights(model_folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(model_folder).tensors["model"]


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
