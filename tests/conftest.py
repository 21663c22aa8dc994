"""Fixtures that every room uses. ``device`` runs an op's tests on each device that torch can use here."""

from __future__ import annotations

import pytest
import torch
from emulated import builder

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """torch's global generator only makes test inputs; no op of ours reads it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def build_emulated(tmp_path_factory: pytest.TempPathFactory):
    """Compiles CUDA sources against the emulator: see ``emulated.builder``."""
    return builder(tmp_path_factory.mktemp("emulated"))
