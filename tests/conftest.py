"""Fixtures that every room uses. ``device`` runs an op's tests on each device that torch can use here."""

from __future__ import annotations

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """torch's global generator only makes test inputs; no op of ours reads it."""
    torch.manual_seed(0)
