"""A checkpoint of a few bytes, and how two are compared."""

from __future__ import annotations

import torch

META = {"step": 3, "names": ["a", "ü"], "none": None, "nested": {"x": 0.1}}


def tensors(value=1.0):
    return {
        "model": {"a.weight": torch.full((2, 3), value), "b": torch.tensor(7)},
        "optimizer.state": {"m": torch.arange(5, dtype=torch.bfloat16) * value},
    }


def same(a, b):
    """Names, dtypes, shapes and values, stem by stem."""
    if a.keys() != b.keys() or any(a[stem].keys() != b[stem].keys() for stem in a):
        return False
    return all(x.dtype == b[s][n].dtype and torch.equal(x, b[s][n]) for s in a for n, x in a[s].items())


def alone(path):
    """Nothing is left beside the checkpoint."""
    return [p.name for p in path.parent.iterdir()] == [path.name]


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
