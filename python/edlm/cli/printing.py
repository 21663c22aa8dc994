"""How results are printed."""

from __future__ import annotations

import math


def number(x: float) -> float | None:
    """JSON has no numbers that are not finite."""
    return x if math.isfinite(x) else None


def short(value: object) -> str:
    """A tokenizer's description may hold a whole vocabulary."""
    text = str(value)
    return text if len(text) <= 80 else text[:60] + "..."
