"""Sizes by name, from one that trains in a minute on a laptop to the paper's."""

from __future__ import annotations

PRESETS: dict[str, dict[str, int | float]] = {
    "tiny": {"dim": 128, "num_layers": 3, "num_heads": 4, "dropout": 0.0},
    "mini": {"dim": 256, "num_layers": 6, "num_heads": 4, "dropout": 0.0},
    "medium": {"dim": 512, "num_layers": 8, "num_heads": 8, "dropout": 0.1},
    "small": {"dim": 768, "num_layers": 12, "num_heads": 12, "dropout": 0.1},  # the paper's: GPT-2 small's shape
}


def preset(name: str) -> dict[str, int | float]:
    """dim, num_layers, num_heads and dropout of a named size; a ValueError lists the names."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return dict(PRESETS[name])
