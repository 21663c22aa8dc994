"""The tiny universe of the samplers' tests, its perfect denoiser and its perfect energy."""

from __future__ import annotations

import pytest
from exact import TabularDenoiser, TabularEnergy, Universe, residual_energy


@pytest.fixture(scope="module")
def universe():
    return Universe()


@pytest.fixture(scope="module")
def denoiser(universe):
    return TabularDenoiser(universe)


@pytest.fixture(scope="module")
def energy(universe):
    return TabularEnergy(universe, residual_energy(universe))
