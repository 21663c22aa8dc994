"""deferred_checks: what ops report is read later, and says then what the op would have said."""

from __future__ import annotations

import math

import pytest
import torch
from edlm.ops import (
    deferred_checks,
    gather_log_probs,
    resample,
    reverse_step,
    sample_candidates,
    sample_categorical,
    select_candidate,
)


def spoilt(rows, columns, row):
    x = torch.randn(rows, columns)
    x[row] = math.nan
    return x


def test_nothing_is_said_before_the_end(device):
    """And what is bad has ids in range meanwhile: token 0, log-probability NaN."""
    logits = spoilt(4, 700, 2).to(device)
    with pytest.raises(ValueError, match=r"sample_categorical: logits: .* in row 2;"), deferred_checks():
        got = sample_categorical(logits, 3, seed=0)
        assert (got.tokens[2] == 0).all() and got.log_probs[2].isnan().all()
        assert (got.log_probs[[0, 1, 3]] <= 0).all()


def test_the_first_call_speaks(device):
    weights, energy = spoilt(3, 5, 1).to(device), spoilt(3, 5, 0).to(device)
    with pytest.raises(ValueError, match=r"resample: log_weights: .* in row 1"), deferred_checks():
        resample(weights, seed=0)
        select_candidate(energy, seed=0)


def test_status(device):
    """The codes of all calls: a row, and for draws 4 * row + what is wrong with it."""
    logits = torch.randn(3, 4, 9, device=device)
    xt = torch.full((3, 4), 8, device=device)
    xt[1, 2] = 11
    index = torch.tensor([0, 0, 5], device=device)
    with pytest.raises(ValueError, match=r"xt: expected ids in 0 .. 8"), deferred_checks() as reports:
        drawn = sample_candidates(logits, xt, 8, 2, seed=0)
        assert drawn.tokens.min() >= 0 and drawn.tokens.max() < 9
        xs = reverse_step(xt.clamp_max(8), drawn.tokens, index, torch.ones(3, 4, device=device), 0.5)
        assert torch.equal(xs[2], drawn.tokens[2, 1])  # an index that is out of range is clamped
        scores = gather_log_probs(logits, torch.full((3, 4), 20, device=device))
        assert scores.isnan().all()
        gather_log_probs(logits, drawn.tokens.transpose(1, 2))
        assert reports.status().tolist() == [4 * 6 + 2, 2, 0, -1]


def test_reports_keep_no_inputs_alive(device):
    """A loop of a thousand steps must not hold a thousand steps' energies."""
    import gc
    import weakref

    with deferred_checks():
        inputs = [
            torch.zeros(2, 3, device=device),
            torch.zeros(2, 3, device=device),
            torch.zeros(2, dtype=torch.int64, device=device),
        ]
        select_candidate(inputs[0], log_correction=inputs[1], seed=0)
        gather_log_probs(inputs[0], inputs[2])
        alive = [weakref.ref(x) for x in inputs]
        inputs.clear()
        gc.collect()
        assert not any(ref() is not None for ref in alive)


def test_good_rows_pass(device):
    with deferred_checks() as reports:
        assert reports.status().shape == (0,)
        sample_categorical(torch.randn(2, 9, device=device), 3, seed=0)
    assert reports.status().tolist() == [-1]


def test_the_blocks_own_error_wins(device):
    with pytest.raises(KeyError, match="mine"), deferred_checks():
        sample_categorical(spoilt(1, 9, 0).to(device), 1, seed=0)
        raise KeyError("mine")


def test_disabled_and_outside(device):
    logits = spoilt(1, 9, 0).to(device)
    with deferred_checks(enabled=False) as reports, pytest.raises(ValueError, match="in row 0"):
        sample_categorical(logits, 1, seed=0)
    assert reports.status().numel() == 0
    with deferred_checks():
        pass
    with pytest.raises(ValueError, match="in row 0"):
        sample_categorical(logits, 1, seed=0)


def test_inner_ones_are_their_own(device):
    logits = spoilt(1, 9, 0).to(device)
    with deferred_checks() as outer:
        with pytest.raises(ValueError, match="in row 0"), deferred_checks():
            sample_categorical(logits, 1, seed=0)
        sample_categorical(torch.randn(2, 9, device=device), 3, seed=0)
    assert outer.status().tolist() == [-1]
