"""How results are printed."""

from __future__ import annotations

import math


def number(x: float) -> float | None:
    """JSON has no numbers that are not finite."""
    return x if math.isfinite(x) else None
