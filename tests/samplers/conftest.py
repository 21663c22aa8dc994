"""The tiny universe of the samplers' tests, its perfect denoiser and its perfect energy."""

from __future__ import annotations

import math

import pytest
import torch
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


@pytest.fixture(scope="module")
def rough():
    """A universe of four sequences, its denoiser, and an energy (of the state) whose Z is not 1 and differs between states."""
    universe = Universe(num_tokens=2, length=2, seed=3)
    generator = torch.Generator().manual_seed(1)
    table = {xt: 1.2 * torch.randn(4, generator=generator, dtype=torch.float64) for xt in universe.states()}

    def energy(xt):
        return torch.where(universe.product(xt) > 0, table[xt], math.inf)

    return universe, TabularDenoiser(universe), energy
