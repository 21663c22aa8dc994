"""Every op that reads logits, with random shapes, strides and values, against its reference. The same examples at every run."""

from __future__ import annotations

import math

import pytest
import torch
from edlm import ops
from edlm.ops.log_probs import _gather_backward_reference, _gather_reference
from edlm.ops.sampling import _sample_candidates_reference, _sample_categorical_reference
from hypothesis import given, settings
from hypothesis import strategies as st

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True, database=None)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZES = st.one_of(st.integers(1, 140), st.sampled_from([511, 512, 513, 600, 1025, 3000]))
KINDS = ["normal", "ties", "wide", "huge", "mostly -inf", "with NaN", "with +inf", "all -inf"]
TEMPERATURES = st.sampled_from([1.0, 0.0, 0.3, 0.7, 2.5, 1e-3, 1e3])


def values(kind, shape, dtype):
    x = torch.randn(shape) * 3
    if kind == "ties":
        x = x.round()
    if kind == "wide":
        x = x * 30
    if kind == "huge":
        x = x * (1e36 if dtype != torch.float16 else 1e3)
    if kind == "mostly -inf":
        x[torch.rand(shape) < 0.9] = -math.inf
    if kind == "all -inf":
        x[:] = -math.inf
    if kind in ("with NaN", "with +inf"):
        x.view(-1)[torch.randint(x.numel(), (1,))] = math.nan if kind == "with NaN" else math.inf
    return x.to(dtype)


def laid_out(x, layout):
    """The same values in another layout: contiguous, a slice of something larger at an odd address, axes swapped, V not innermost."""
    if layout == "slice":
        larger = torch.full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 5), math.nan, dtype=x.dtype)
        view = larger[..., 1:-1, 3:-2]
        view.copy_(x)
        return view
    if layout == "swapped":
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    if layout == "V outside":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


LAYOUTS = st.sampled_from(["plain", "slice", "swapped", "V outside"])
FILTERS = st.tuples(
    st.sampled_from([None, 1, 2, 7, 100]),
    st.sampled_from([None, 1e-6, 0.3, 0.9, 0.999, 1.0]),
    st.sampled_from([None, 0.0, 0.1, 1.0]),
)


def agrees(got, reference, temperature, filters):
    """Every token: a boundary within rounding of a uniform is rarer than one in the draws of all these examples, which are fixed."""
    tokens, log_probs, model, _ = reference
    if temperature == 1 and filters == (0, 1.0, 0.0):
        model = log_probs
    assert torch.equal(got.tokens, tokens)
    # x / T itself is a float64 number here and a float32 difference there: the tolerance is that of the logits' distances.
    tolerance = {"atol": 3e-6, "rtol": 1e-5}
    torch.testing.assert_close(got.log_probs, log_probs, **tolerance)
    torch.testing.assert_close(got.model_log_probs, model, **tolerance)


def as_op(temperature, filters):
    top_k, top_p, min_p = filters
    return (0, 1.0, 0.0) if temperature == 0 else (top_k or 0, 1.0 if top_p is None else top_p, min_p or 0.0)


@SETTINGS
@given(st.data())
def test_sample_categorical(data):
    n, vocab_size, k = data.draw(st.integers(0, 9)), data.draw(SIZES), data.draw(st.integers(1, 11))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    logits = values(data.draw(st.sampled_from(KINDS)) if n else "normal", (n, vocab_size), data.draw(DTYPES))
    temperature, filters = data.draw(TEMPERATURES), data.draw(FILTERS)
    forbidden = torch.randint(0, vocab_size, (data.draw(st.integers(0, 3)),))
    seed, position, offset = torch.randint(-(2**62), 2**62, (n,)), torch.randint(0, 2**20, (n,)), torch.randint(0, 99, (n,))
    top_k, top_p, min_p = filters
    reference = _sample_categorical_reference(
        logits, k, position, temperature, *as_op(temperature, filters), forbidden, seed, offset if n else torch.zeros(1).long()
    )

    def call():
        return ops.sample_categorical(
            laid_out(logits, data.draw(LAYOUTS)), k, position=position, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, forbidden=forbidden, seed=seed, offset=offset if n else 0,
        )  # fmt: skip

    code = int(reference[3])
    if code >= 0:
        with pytest.raises(ValueError, match=rf"in row {code // 4}\b"):
            call()
        return
    agrees(call(), reference, temperature, as_op(temperature, filters))


@SETTINGS
@given(st.data())
def test_sample_candidates(data):
    batch, length = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 5))
    vocab_size, k = data.draw(SIZES), data.draw(st.integers(1, 11))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    kind = data.draw(st.sampled_from(KINDS)) if batch * length else "normal"
    logits = values(kind, (batch, length, vocab_size), data.draw(DTYPES))
    mask = data.draw(st.integers(0, vocab_size - 1))
    xt = torch.randint(0, vocab_size, (batch, length))
    xt[torch.rand(batch, length) < 0.6] = mask
    if data.draw(st.integers(0, 9)) == 0 and batch * length:
        xt[-1, -1] = data.draw(st.sampled_from([-1, vocab_size, 2**40]))
    active = (torch.rand(batch, length) < 0.7) if data.draw(st.booleans()) else None
    temperature, filters = data.draw(TEMPERATURES), data.draw(FILTERS)
    seed, offset = torch.randint(-(2**62), 2**62, (batch,)), torch.randint(0, 99, (1,))
    top_k, top_p, min_p = filters
    reference = _sample_candidates_reference(logits, xt, mask, k, active, temperature, *as_op(temperature, filters), seed, offset)

    def call():
        return ops.sample_candidates(
            laid_out(logits, data.draw(LAYOUTS)), xt, mask, k, active=active, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, seed=seed, offset=offset,
        )  # fmt: skip

    code = int(reference[3])
    if code >= 0:
        with pytest.raises(ValueError, match=f"sequence {code // 4 // length}, position {code // 4 % length}"):
            call()
        return
    agrees(call(), reference, temperature, as_op(temperature, filters))


@SETTINGS
@given(st.data())
def test_gather_log_probs(data):
    batch, length = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 5))
    vocab_size, k = data.draw(SIZES), data.draw(st.integers(0, 7))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    dtype, kind = data.draw(DTYPES), data.draw(st.sampled_from(KINDS)) if batch * length else "normal"
    logits = values(kind, (batch, length, vocab_size), dtype)
    tokens = torch.randint(0, vocab_size, (batch, length, k))
    temperature = data.draw(st.sampled_from([1.0, 0.3, 2.5]))
    forbidden = torch.randint(0, vocab_size, (data.draw(st.integers(0, 3)),))
    want, stats, _ = _gather_reference(logits, tokens, temperature, forbidden)
    x = laid_out(logits, data.draw(LAYOUTS)).requires_grad_()
    got = ops.gather_log_probs(x, tokens, temperature=temperature, forbidden=forbidden)
    torch.testing.assert_close(got, want, atol=4e-6, rtol=2e-6, equal_nan=True)
    if kind in ("normal", "ties", "wide"):
        grad = torch.randn(got.shape) * (torch.rand(batch, length, 1) < 0.6)
        got.backward(grad)
        expected = _gather_backward_reference(grad, logits, tokens, stats, temperature, forbidden)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
        torch.testing.assert_close(x.grad, expected, atol=tolerance / 10, rtol=tolerance)


@SETTINGS
@given(st.data())
def test_linear_log_probs(data):
    n, dim, vocab_size = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 12)), data.draw(SIZES)
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(DTYPES)
    hidden, weight = torch.randn(n, dim).to(dtype), torch.randn(vocab_size, dim).to(dtype)
    bias = torch.randn(vocab_size).to(dtype) if data.draw(st.booleans()) else None
    forbidden, tokens = torch.randint(0, vocab_size, (data.draw(st.integers(0, 3)),)), torch.randint(0, vocab_size, (n,))
    if data.draw(st.booleans()):  # not contiguous
        hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    want = torch.log_softmax(logits.index_fill(1, forbidden, -math.inf), -1).gather(1, tokens[:, None]).squeeze(1)
    got = ops.linear_log_probs(hidden, weight, tokens, bias, forbidden=forbidden)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5, equal_nan=True)


@SETTINGS
@given(st.data())
def test_ids_out_of_range(data):
    n, vocab_size = data.draw(st.integers(1, 9)), data.draw(SIZES)
    tokens = torch.randint(0, vocab_size, (n, 3))
    row = data.draw(st.integers(0, n - 1))
    tokens[row, data.draw(st.integers(0, 2))] = data.draw(st.sampled_from([-1, vocab_size, 2**40, -(2**40)]))
    with pytest.raises(ValueError, match=rf"tokens: expected ids in 0 .. {vocab_size - 1}, got .* in row {row}"):
        ops.gather_log_probs(torch.randn(n, vocab_size), tokens)
