"""The universe in which estimators are compared with enumeration: V = 3, L = 3, a correlated q, and models of it."""

from __future__ import annotations

import math

import pytest
import torch
from exact import TabularDenoiser, TabularEnergy, Universe, residual_energy


class KnownEnergy(TabularEnergy):
    """A tabular energy that offers ``log_Z``, by enumeration."""

    def __init__(self, universe, energy, denoiser_law):
        super().__init__(universe, energy)
        table = []
        for state in universe.states():
            mu = denoiser_law(state)
            table.append(math.log(float((mu * torch.exp(-energy(state)).nan_to_num(0.0))[mu > 0].sum())))
        self.log_Z_table = torch.tensor(table, dtype=torch.float64)

    def log_Z(self, xt):
        return self.log_Z_table[self.universe.state_index(xt)]


@pytest.fixture(scope="session")
def universe():
    return Universe(num_tokens=3, length=3, seed=0)


@pytest.fixture(scope="session")
def denoiser(universe):
    return TabularDenoiser(universe)


@pytest.fixture(scope="session")
def p_ar(universe):
    """p_AR = 0.6 q + 0.4 noise: near q, as the orderings of the bounds ask for."""
    return universe.autoregressive(0.4)


@pytest.fixture(scope="session")
def perfect(universe):
    """The energy with which mu exp(-E) is q(x0 | xt) itself, and Z = 1."""
    return KnownEnergy(universe, residual_energy(universe), universe.product)


@pytest.fixture(scope="session")
def rough(universe):
    """An energy with a Z of its own for every state, +inf where mu is 0."""
    generator = torch.Generator().manual_seed(7)
    table = {
        s: 0.8 * torch.randn(27, generator=generator, dtype=torch.float64) + 0.3 * i for i, s in enumerate(universe.states())
    }
    return TabularEnergy(universe, lambda s: torch.where(universe.product(s) > 0, table[s] % 3.0, math.inf))
