"""Fixtures that every room uses. ``device`` runs an op's tests on each device that torch can use here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emulated import EmulatedOps, builder

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), "cuda-emulated"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device that torch has here; or the CPU while the CUDA kernels run on the emulator (skipped where that cannot be built)."""
    if request.param != "cuda-emulated":
        yield torch.device(request.param)
        return
    with request.getfixturevalue("emulated_ops").installed():
        yield torch.device("cpu")


@pytest.fixture
def is_emulated(request: pytest.FixtureRequest) -> bool:
    """Whether the present ``device`` is the emulator, on which a draw takes microseconds: tests of many draws make do with fewer."""
    return request.node.callspec.params.get("device") == "cuda-emulated"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """torch's global generator only makes test inputs; no op of ours reads it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def build_emulated(tmp_path_factory: pytest.TempPathFactory):
    """Compiles CUDA sources against the emulator: see ``emulated.builder``."""
    return builder(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def emulated_ops(build_emulated) -> EmulatedOps:
    return EmulatedOps(build_emulated)
