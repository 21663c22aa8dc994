"""linear_cross_entropy: value and gradients against float64, chunks, row weights, dtypes, errors."""

from __future__ import annotations

import math

import pytest
import torch
from edlm.ops import cross_entropy, linear_cross_entropy, linear_log_probs


def case(n=13, d=6, v=17, dtype=torch.float32):
    hidden, weight, bias = torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype), torch.randn(v).to(dtype)
    return hidden, weight, bias, torch.randint(0, v - 1, (n,)), torch.rand(n) + 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("forbidden", [None, 16])
def test_against_float64(dtype, with_bias, forbidden, device):
    hidden, weight, bias, tokens, row_weight = case(dtype=dtype)
    ours = [x.to(device, copy=True).requires_grad_() for x in (hidden, weight, bias)]
    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    got = linear_cross_entropy(
        ours[0], ours[1], tokens.to(device), row_weight.to(device), ours[2] if with_bias else None, forbidden=forbidden
    )
    logits = exact[0] @ exact[1].T + (exact[2] if with_bias else 0)
    if forbidden is not None:
        logits = logits.index_fill(1, torch.tensor([forbidden]), -math.inf)
    want = -(logits.log_softmax(1).gather(1, tokens[:, None])[:, 0] * row_weight).sum()
    assert got.dtype == torch.float32 and got.shape == ()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    # Scaled and added to, as a loss is.
    (3 * got + 1).backward()
    (3 * want + 1).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for mine, other in zip(ours[: 2 + with_bias], exact, strict=False):
        assert mine.grad.dtype == dtype
        torch.testing.assert_close(mine.grad.double().cpu(), other.grad, atol=tolerance, rtol=tolerance)


def test_it_is_a_sum_of_log_probs(device):
    hidden, weight, bias, tokens, row_weight = (x.to(device) for x in case())
    rows = linear_log_probs(hidden, weight, tokens, bias)
    assert linear_cross_entropy(hidden, weight, tokens, None, bias).item() == pytest.approx(-rows.double().sum().item(), rel=1e-6)
    weighted = linear_cross_entropy(hidden, weight, tokens, row_weight, bias)
    assert weighted.item() == pytest.approx(-(rows.double() * row_weight).sum().item(), rel=1e-6)


def test_chunks_change_nothing_but_rounding(monkeypatch, device):
    hidden, weight, bias, tokens, row_weight = (x.to(device) for x in case(n=29, v=1300))

    def everything():
        inputs = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        loss = linear_cross_entropy(inputs[0], inputs[1], tokens, row_weight, inputs[2], forbidden=[1299, 3])
        loss.backward()
        return loss.detach(), *(x.grad for x in inputs)

    whole = everything()
    assert cross_entropy._chunk_rows(29, 1300) == 29
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", 4 * 1300 * 4)
    assert cross_entropy._chunk_rows(29, 1300) == 4
    for chunked, one in zip(everything(), whole, strict=True):
        torch.testing.assert_close(chunked, one, atol=1e-4, rtol=1e-5)
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", 1)
    assert cross_entropy._chunk_rows(29, 1300) == 1  # one row, whatever it takes


def test_only_what_is_needed_is_computed(device):
    hidden, weight, bias, tokens, row_weight = (x.to(device) for x in case())
    for needed in range(3):
        inputs = [x.detach().requires_grad_(i == needed) for i, x in enumerate((hidden, weight, bias))]
        linear_cross_entropy(inputs[0], inputs[1], tokens, row_weight, inputs[2]).backward()
        assert [x.grad is not None for x in inputs] == [i == needed for i in range(3)]
    empty = torch.empty(0, dtype=torch.int64, device=device)
    _, *grads, _ = torch.ops.edlm.linear_cross_entropy(hidden, weight, tokens, row_weight, bias, empty, [False, False, False])
    assert [g.numel() for g in grads] == [0, 0, 0]
    with torch.no_grad():
        assert not linear_cross_entropy(hidden.requires_grad_(), weight, tokens).requires_grad


def test_two_losses_of_one_graph_add_their_gradients(device):
    """The saved gradients are scaled, never changed: a graph that is kept can be walked again."""
    hidden, weight, _, tokens, _ = (x.to(device) for x in case())
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, tokens)
    (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, hidden)
    torch.testing.assert_close(twice, 2 * once)


def test_rows_of_weight_0_and_impossible_tokens(device):
    hidden, weight, bias, tokens, row_weight = (x.to(device) for x in case())
    tokens[3] = 16
    hidden.requires_grad_()
    assert linear_cross_entropy(hidden, weight, tokens, row_weight, bias, forbidden=16).item() == math.inf
    row_weight[3] = 0
    loss = linear_cross_entropy(hidden, weight, tokens, row_weight, bias, forbidden=16)
    loss.backward()
    assert math.isfinite(loss.item()) and (hidden.grad[3] == 0).all() and (hidden.grad[2] != 0).any()
    bad = hidden.detach().clone()
    bad[0, 0] = math.nan
    assert math.isnan(linear_cross_entropy(bad, weight, tokens, row_weight, bias, forbidden=16).item())


def test_products_stay_float32_under_autocast(device):
    hidden, weight, _, tokens, _ = (x.to(device) for x in case(n=50, d=64, v=500))
    hidden.requires_grad_()
    plain = linear_cross_entropy(hidden, weight, tokens)
    (grad,) = torch.autograd.grad(plain, hidden)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = linear_cross_entropy(hidden, weight, tokens)
        (cast_grad,) = torch.autograd.grad(cast, hidden)
    assert torch.equal(cast, plain) and torch.equal(cast_grad, grad)


def test_empty(device):
    empty = torch.empty(0, dtype=torch.int64, device=device)
    loss = linear_cross_entropy(torch.empty(0, 3, device=device, requires_grad=True), torch.randn(5, 3, device=device), empty)
    assert loss.item() == 0
    loss.backward()


def test_no_second_gradients():
    hidden, weight, _, tokens, _ = case()
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden.requires_grad_(), weight, tokens), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: first-order gradients only"):
        grad.sum().backward()


HIDDEN, WEIGHT, IDS = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(3)}, r"hidden: expected the shape \[N, D\], got \[3\]"),
        ({"weight": torch.randn(5, 3)}, r"weight: expected the shape \[V, D\] with V >= 1 and D = 4, got \[5, 3\]"),
        ({"tokens": torch.tensor([0, 1])}, "tokens: expected"),
        ({"tokens": torch.tensor([0, 1, 5])}, r"tokens: expected ids in 0 \.\. 4, got 5 in row 2"),
        ({"row_weight": torch.ones(2)}, "row_weight: expected"),
        ({"row_weight": torch.ones(3).double()}, "row_weight: expected"),
        ({"row_weight": torch.ones(3, requires_grad=True)}, "row_weight: expected one without a gradient"),
        ({"bias": torch.randn(4)}, "bias: expected"),
        ({"forbidden": 5}, "forbidden: expected"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(**({"hidden": HIDDEN, "weight": WEIGHT, "tokens": IDS} | change))
