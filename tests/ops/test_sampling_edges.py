"""sample_candidates and sample_categorical at the edges of their domain, and what they say of bad input."""

from __future__ import annotations

import math

import pytest
import torch
from edlm.ops import sample_candidates, sample_categorical
from exact import g_test

NO_IDS = torch.empty(0, dtype=torch.int64)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- edges -----------------------------------------------------------------------------------------------------------------------


def test_masked_positions_only(device):
    logits, mask = torch.randn(2, 5, 7, device=device), 6
    logits[..., mask] = 40.0  # the mask is never drawn, whatever its logit
    logits[0, 0] = math.nan
    xt = torch.tensor([[1, 6, 6, 0, 6], [6, 6, 2, 6, 5]], device=device)
    got = sample_candidates(logits, xt, mask, 50, seed=0)
    clean = (xt != mask)[:, None].expand(2, 50, 5)
    assert torch.equal(got.tokens[clean], xt[:, None].expand(2, 50, 5)[clean])
    assert (got.log_probs[clean] == 0).all()
    assert (got.tokens != mask).all()


def test_mask_column_may_hold_anything(device):
    logits = torch.randn(1, 3, 600, device=device)
    xt = torch.full((1, 3), 599, device=device)
    reference_draw = sample_candidates(logits, xt, 599, 4, seed=1)
    for value in (math.nan, math.inf, -math.inf, 1e30):
        logits[..., 599] = value
        assert same(sample_candidates(logits, xt, 599, 4, seed=1), reference_draw)


def test_one_finite_logit(device):
    for v, at in ((1, 0), (27, 26), (1500, 700)):
        logits = torch.full((1, v), -math.inf, device=device)
        logits[0, at] = -5.0
        got = sample_categorical(logits, 20, seed=0)
        assert (got.tokens == at).all() and (got.log_probs == 0).all()


def test_blocks_of_minus_infinity(device):
    logits = torch.randn(1, 3000, device=device)
    logits[0, 100:2900] = -math.inf
    for temperature in (1.0, 0.5):
        tokens = sample_categorical(logits, 5000, temperature=temperature, seed=0).tokens
        assert ((tokens < 100) | (tokens >= 2900)).all()


def test_greedy_takes_the_lowest_of_equals(device):
    logits = torch.zeros(1, 2000, device=device)
    logits[0, [700, 900, 1999]] = 3.0
    got = sample_categorical(logits, 3, temperature=0, seed=0)
    assert (got.tokens == 700).all() and (got.log_probs == 0).all()
    torch.testing.assert_close(got.model_log_probs.cpu(), torch.log_softmax(logits.cpu(), -1)[:, [700] * 3])


def test_extreme_temperatures(device):
    logits = torch.tensor([[0.0, 1.0, 0.5]], device=device)
    assert (sample_categorical(logits, 50, temperature=1e-40, seed=0).tokens == 1).all()
    logits = torch.tensor([[0.0, 1.0, 0.5, -math.inf]], device=device)
    for temperature in (1e6, 1e300):
        counts = torch.bincount(sample_categorical(logits, 30_000, temperature=temperature, seed=0).tokens[0].cpu(), minlength=4)
        assert g_test(counts.double(), torch.tensor([1, 1, 1, 0]) / 3) > 1e-6


def test_extreme_logits(device):
    """Near the ends of float32 the log-probabilities are those of the differences."""
    for value in (-3.4e38, 3.4e38, 1e30):
        got = sample_categorical(torch.full((1, 4), value, device=device), 50, temperature=0.7, seed=0)
        for log_probs in (got.log_probs, got.model_log_probs):
            torch.testing.assert_close(log_probs, torch.full_like(log_probs, -math.log(4)))


def test_draws_carry_no_gradient(device):
    """Whatever was passed: a gradient through draws would be one that depends on the filters. gather_log_probs has the real one."""
    logits, xt = torch.randn(2, 3, 9, device=device, requires_grad=True), torch.full((2, 3), 8, device=device)
    for options in ({}, {"temperature": 0.7}, {"top_k": 3}):
        draws = sample_candidates(logits, xt, 8, 2, seed=0, **options), sample_categorical(logits[0], 2, seed=0, **options)
        assert not any(x.requires_grad for draw in draws for x in draw)


def test_empty(device):
    got = sample_categorical(torch.empty(0, 5, device=device), 3, seed=0)
    assert got.tokens.shape == (0, 3)
    got = sample_candidates(
        torch.empty(0, 4, 5, device=device), torch.empty(0, 4, dtype=torch.int64, device=device), 4, 2, seed=0
    )
    assert got.tokens.shape == (0, 2, 4)
    got = sample_candidates(
        torch.empty(2, 0, 5, device=device), torch.empty(2, 0, dtype=torch.int64, device=device), 4, 2, seed=0
    )
    assert got.tokens.shape == (2, 2, 0)


# --- errors ----------------------------------------------------------------------------------------------------------------------

LOGITS, XT = torch.zeros(2, 3, 5), torch.full((2, 3), 4)
BAD = [
    ({"logits": LOGITS[0]}, r"logits: expected the shape \[B, L, V\], got \[3, 5\]"),
    ({"logits": LOGITS.long()}, r"logits: expected a float32, bfloat16 or float16 tensor .* got torch.int64"),
    ({"logits": torch.zeros(2, 3, 0)}, r"logits: expected a vocabulary of at least one column"),
    ({"xt": XT[:1]}, r"xt: expected a torch.int64 tensor of shape \[2, 3\], got torch.int64 \[1, 3\]"),
    ({"xt": XT.int()}, r"xt: .* got torch.int32"),
    ({"xt": torch.tensor([[4, 4, 4], [4, 7, 4]])}, r"xt: expected ids in 0 .. 4, got one outside in sequence 1, position 1"),
    ({"xt": torch.tensor([[4, -1, 4], [4, 4, 4]])}, r"xt: expected ids in 0 .. 4, got one outside in sequence 0, position 1"),
    ({"mask_token_id": 5}, r"mask_token_id: expected an id in 0 .. 4, got 5"),
    ({"num_candidates": 0}, r"num_candidates: expected an integer >= 1, got 0"),
    ({"num_candidates": 2.0}, r"num_candidates: expected an integer >= 1, got 2.0"),
    ({"temperature": -1.0}, r"temperature: expected a finite number >= 0 \(0 is greedy\), got -1.0"),
    ({"temperature": math.nan}, r"temperature: .* got nan"),
    ({"temperature": math.inf}, r"temperature: .* got inf"),
    ({"top_k": 0}, r"top_k: expected an integer >= 1 or None, got 0"),
    ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\] or None, got 0.0"),
    ({"min_p": 1.5}, r"min_p: expected a number in \[0, 1\] or None, got 1.5"),
    ({"active": torch.ones(2, 3)}, r"active: expected a torch.bool tensor of shape \[2, 3\], got torch.float32"),
    ({"seed": torch.zeros(3, dtype=torch.int64)}, r"seed: expected an int or an int64 tensor of shape \[2\]"),
    ({"offset": torch.zeros(3, dtype=torch.int64)}, r"offset: expected an int or an int64 tensor"),
    ({"logits": LOGITS.clone().index_fill_(1, torch.tensor([2]), math.nan)}, r"got NaN or \+inf in sequence 0, position 2"),
    ({"logits": LOGITS.clone().index_fill_(1, torch.tensor([1]), math.inf)}, r"got NaN or \+inf in sequence 0, position 1"),
    ({"logits": torch.full((2, 3, 5), -math.inf)}, r"expected a finite logit besides the forbidden ids"),
    ({"logits": torch.zeros(2, 3, 5, device="meta")}, r"xt: expected on meta, beside the other tensors, got cpu"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change, message):
    arguments = {"logits": LOGITS, "xt": XT, "mask_token_id": 4, "num_candidates": 2, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        sample_candidates(**arguments)


@pytest.mark.parametrize("at", [0, 511, 512, 1400])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bad_logit_is_found_wherever_it_is(at, value, dtype, device):
    logits = torch.randn(3, 1401).to(dtype)
    logits[1, at] = value
    for temperature in (1.0, 0.7, 0.0):
        with pytest.raises(ValueError, match=r"logits: .* in row 1;"):
            sample_categorical(logits.to(device), 2, temperature=temperature, seed=0)


def test_bad_forbidden():
    with pytest.raises(ValueError, match=r"forbidden: expected ids in 0 .. 4, got 9"):
        sample_categorical(torch.zeros(1, 5), forbidden=[9], seed=0)
    with pytest.raises(ValueError, match=r"expected a finite logit besides the forbidden ids, got none in row 0"):
        sample_categorical(torch.zeros(1, 2), forbidden=[0, 1], seed=0)


def test_bad_forbidden_tensor():
    for ids in ([-1], [5]):
        with pytest.raises(ValueError, match=rf"forbidden: expected ids in 0 .. 4, got {ids[0]}"):
            sample_categorical(torch.zeros(1, 5), forbidden=torch.tensor(ids), seed=0)


@pytest.mark.parametrize("position", [1.5, True, None])
def test_bad_position(position):
    with pytest.raises(ValueError, match="position: expected an int or an int64 tensor"):
        sample_categorical(torch.zeros(2, 5), position=position, seed=0)


def test_the_op_itself_checks_its_callers():
    """Who calls torch.ops.edlm.* directly gets an error too, never a wild read."""
    zeros = torch.zeros(1, dtype=torch.int64)
    if __import__("edlm").ops.backends()["sample_categorical"]["cpu"] != "compiled":
        pytest.skip("nothing is compiled")
    with pytest.raises(RuntimeError, match=r"position: expected a contiguous tensor .* shape \[4\]"):
        torch.ops.edlm.sample_categorical(torch.zeros(4, 5), 1, zeros, 1.0, 0, 1.0, 0.0, NO_IDS, torch.arange(4), zeros)
