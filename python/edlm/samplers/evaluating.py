"""Networks as they are to be sampled from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def evaluating(*networks: object) -> Iterator[None]:
    """Dropout off while sampling: a proposal in train mode is another proposal. The mode found is restored, part by part."""
    training = [m for n in networks if isinstance(n, torch.nn.Module) for m in n.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
