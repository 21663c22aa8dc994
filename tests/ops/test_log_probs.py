"""gather_log_probs and linear_log_probs: values against float64, gradients, dtypes, chunks, errors."""

from __future__ import annotations

import math

import pytest
import torch
from edlm.ops import _library, gather_log_probs, linear, linear_log_probs, log_probs


def expected_gather(logits, tokens, temperature=1.0, forbidden=None):
    x = logits.double() / temperature
    if forbidden is not None:
        x = x.index_fill(-1, torch.tensor(forbidden), -math.inf)
    full = torch.log_softmax(x, -1)
    return full.gather(-1, tokens if tokens.dim() == logits.dim() else tokens[..., None]).reshape(tokens.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 27, 513, 50258])
def test_gather(vocab_size, dtype, device):
    logits = (torch.randn(3, 2, vocab_size) * 3).to(dtype)
    for shape in ((3, 2), (3, 2, 4)):
        tokens = torch.randint(0, vocab_size, shape)
        for temperature in (1.0, 0.7):
            got = gather_log_probs(logits.to(device), tokens.to(device), temperature=temperature)
            assert got.dtype == torch.float32 and got.shape == tokens.shape and (got <= 0).all()
            torch.testing.assert_close(got.double().cpu(), expected_gather(logits, tokens, temperature), atol=4e-6, rtol=1e-6)


def test_gather_forbidden(device):
    logits = torch.randn(5, 9)
    tokens = torch.tensor([0, 8, 3, 4, 8])
    got = gather_log_probs(logits.to(device), tokens.to(device), forbidden=[8, 2]).cpu()
    assert (got[[1, 4]] == -math.inf).all()
    keep = [0, 2, 3]
    torch.testing.assert_close(got[keep].double(), expected_gather(logits, tokens, forbidden=[8, 2])[keep], atol=1e-6, rtol=0)


def test_gather_gradient(device):
    """Against autograd through log_softmax in float64; forbidden columns get none; K tokens a row add up, repeated ones included."""
    logits = torch.randn(4, 11, dtype=torch.float64)
    tokens = torch.tensor([[0, 0, 5], [1, 2, 3], [9, 9, 9], [4, 0, 7]])
    weight = torch.randn(4, 3, dtype=torch.float64)
    x = logits.clone().requires_grad_()
    (torch.log_softmax((x / 0.8).index_fill(-1, torch.tensor([10]), -math.inf), -1).gather(1, tokens) * weight).sum().backward()
    y = logits.float().to(device).requires_grad_()
    (gather_log_probs(y, tokens.to(device), temperature=0.8, forbidden=10) * weight.float().to(device)).sum().backward()
    torch.testing.assert_close(y.grad.cpu().double(), x.grad, atol=2e-6, rtol=1e-5)
    assert (y.grad[:, 10] == 0).all()


def linear_case(n=13, d=6, v=17, dtype=torch.float32):
    return torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype), torch.randn(v).to(dtype), torch.randint(0, v - 1, (n,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("forbidden", [None, 16])
def test_linear(dtype, with_bias, forbidden, device):
    """Values and all three gradients against float64."""
    hidden, weight, bias, tokens = linear_case(dtype=dtype)
    ours = [x.to(device, copy=True).requires_grad_() for x in (hidden, weight, bias)]
    theirs = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    got = linear_log_probs(ours[0], ours[1], tokens.to(device), ours[2] if with_bias else None, forbidden=forbidden)
    logits = theirs[0] @ theirs[1].T + (theirs[2] if with_bias else 0)
    want = expected_gather(logits, tokens, forbidden=None if forbidden is None else [forbidden])
    torch.testing.assert_close(got.detach().double().cpu(), want.detach(), atol=1e-5, rtol=0)
    scale = torch.randn(len(tokens))
    (got * scale.to(device)).sum().backward()
    (want * scale).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for mine, exact in zip(ours[: 2 + with_bias], theirs, strict=False):
        assert mine.grad.dtype == dtype
        torch.testing.assert_close(mine.grad.double().cpu(), exact.grad, atol=tolerance, rtol=tolerance)


def test_a_common_shift_costs_no_precision(device):
    """Integers and a power of two: the shifted logits are exact, so the results must agree to the last bits."""
    logits, tokens = torch.randint(-9, 9, (20, 300), device=device).float(), torch.randint(0, 300, (20,), device=device)
    plain = gather_log_probs(logits, tokens)
    torch.testing.assert_close(gather_log_probs(logits + 2.0**14, tokens), plain, atol=1e-6, rtol=0)
    bias = torch.full((300,), 2.0**14, device=device)
    hidden, weight = torch.randint(-2, 3, (20, 4), device=device).float(), torch.randint(-2, 3, (300, 4), device=device).float()
    torch.testing.assert_close(
        linear_log_probs(hidden, weight, tokens, bias), linear_log_probs(hidden, weight, tokens), atol=1e-6, rtol=0
    )
    assert gather_log_probs(1e30 * logits, tokens, temperature=1e-10).isnan().sum() == 0


def test_products_stay_float32_under_autocast(device):
    hidden, weight, bias, tokens = (x.to(device) for x in linear_case(n=50, d=64, v=500))
    hidden.requires_grad_()
    plain = linear_log_probs(hidden, weight, tokens, bias)
    (grad,) = torch.autograd.grad(plain.sum(), hidden)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = linear_log_probs(hidden, weight, tokens, bias)
        (cast_grad,) = torch.autograd.grad(cast.sum(), hidden)
    assert torch.equal(cast, plain) and torch.equal(cast_grad, grad)


def test_linear_equals_gather_of_logits(device):
    hidden, weight, bias, tokens = (x.to(device) for x in linear_case())
    direct = gather_log_probs(hidden @ weight.T + bias, tokens)
    torch.testing.assert_close(linear_log_probs(hidden, weight, tokens, bias), direct, atol=1e-6, rtol=0)


def test_linear_finite_differences(device):
    hidden, weight, bias, tokens = (x.to(device) for x in linear_case(n=3, d=2, v=4))
    hidden.requires_grad_()
    linear_log_probs(hidden, weight, tokens, bias).sum().backward()
    for index in [(0, 0), (2, 1)]:
        step = 1e-2
        values = []
        for sign in (1, -1):
            moved = hidden.detach().clone()
            moved[index] += sign * step
            values.append(linear_log_probs(moved, weight, tokens, bias).double().sum())
        assert abs((values[0] - values[1]) / (2 * step) - hidden.grad[index]) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing_but_rounding(dtype, monkeypatch, device):
    """One chunk, and fifteen of seven rows by one tile: values and gradients."""
    hidden, weight, bias, tokens = (x.to(device) for x in linear_case(n=29, v=1300, dtype=dtype))
    logits = torch.randn(29, 1300, device=device)

    def everything():
        inputs = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        out = linear_log_probs(inputs[0], inputs[1], tokens, inputs[2], forbidden=[1299, 3])
        (out * torch.arange(29, device=device)).sum().backward()
        return out.detach(), *(x.grad.float() for x in inputs), gather_log_probs(logits, tokens)

    whole = everything()
    assert linear._chunk_shape(29, 1300, device) == (29, 1300)
    for module in (linear, log_probs):
        monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 7 * 512)
    monkeypatch.setattr(linear, "_CHUNK_BYTES_ON_CUDA", 4 * 7 * 512)
    monkeypatch.setattr(linear, "_CHUNK_ROWS", 7)
    assert linear._chunk_shape(29, 1300, device) == (7, 512)
    for chunked, one in zip(everything(), whole, strict=True):
        # Gradients are sums whose terms come to 400 in all: a rounding of that is 2e-5, and products round as memory lies.
        torch.testing.assert_close(chunked, one, atol=1e-4 if dtype == torch.float32 else 0.05, rtol=0)


def test_only_what_is_needed_is_computed(device):
    """A frozen weight gets no gradient, and costs none: the op returns an empty tensor for it."""
    hidden, weight, bias, tokens = (x.to(device) for x in linear_case())
    for needed in range(3):
        inputs = [x.detach().requires_grad_(i == needed) for i, x in enumerate((hidden, weight, bias))]
        linear_log_probs(inputs[0], inputs[1], tokens, inputs[2]).sum().backward()
        assert [x.grad is not None for x in inputs] == [i == needed for i in range(3)]
    stats = torch.zeros(13, 2, device=device)
    empty = torch.empty(0, dtype=torch.int64, device=device)
    grads = torch.ops.edlm.linear_log_probs_backward(
        torch.ones(13, device=device), hidden, weight, tokens, stats, bias, empty, [True, False, False]
    )
    assert [g.numel() for g in grads] == [hidden.numel(), 0, 0]


def test_linear_never_stores_all_logits():
    """No single operator allocates more than a chunk or two, by the profiler's account: N x V would be 64 MiB."""
    n, d, v = 2048, 16, 8192
    hidden, weight, tokens = torch.randn(n, d), torch.randn(v, d), torch.randint(0, v, (n,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_log_probs(hidden, weight, tokens)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 2 * linear._CHUNK_BYTES < n * v * 4


def test_forward_mode_is_refused(device):
    """It would drop the tangent and say nothing."""
    logits, tokens = torch.randn(3, 5, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    weight = torch.randn(4, 5, device=device)
    for call in (lambda x: gather_log_probs(x, tokens), lambda x: linear_log_probs(x, weight, tokens)):
        with pytest.raises(RuntimeError, match="log_probs: reverse-mode gradients only"):
            torch.func.jvp(call, (logits,), (torch.ones_like(logits),))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="reverse-mode gradients only"):
            call(torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits)))


def test_the_chunk_ops_check_their_callers():
    none = torch.zeros(0, dtype=torch.int64)
    if "cpu" not in _library.LOADED:
        pytest.skip("nothing is compiled")
    with pytest.raises(RuntimeError, match="chunk: expected at least one column"):
        torch.ops.edlm.linear_fold(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 0), torch.zeros(2).long(), none)


def test_empty(device):
    assert gather_log_probs(torch.empty(0, 5, device=device), torch.empty(0, dtype=torch.int64, device=device)).shape == (0,)
    empty = torch.empty(0, dtype=torch.int64, device=device)
    assert linear_log_probs(torch.empty(0, 3, device=device), torch.randn(5, 3, device=device), empty).shape == (0,)


LOGITS, IDS = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
BAD_GATHER = [
    ({"tokens": torch.tensor([0, 5])}, r"tokens: expected ids in 0 .. 4, got \[5\] in row 1"),
    ({"tokens": torch.tensor([-1, 0])}, r"tokens: expected ids in 0 .. 4, got \[-1\] in row 0"),
    ({"tokens": IDS.int()}, r"tokens: expected a torch.int64 tensor of shape \[2\], got torch.int32"),
    (
        {"tokens": torch.zeros(3, dtype=torch.int64)},
        r"tokens: expected a torch.int64 tensor of shape \[2\], got torch.int64 \[3\]",
    ),
    ({"tokens": [0, 0]}, r"tokens: expected an int64 tensor, got list"),
    ({"logits": LOGITS.double()}, r"logits: expected a float32, bfloat16 or float16 tensor \[..., V\], got torch.float64"),
    ({"temperature": 0.0}, r"temperature: expected a positive, finite number, got 0.0"),
    ({"temperature": -1.0}, r"temperature: expected a positive, finite number, got -1.0"),
    ({"temperature": None}, r"temperature: expected a number, got NoneType"),
    ({"logits": torch.zeros(2, 3000), "tokens": torch.full((2, 3000), -1)}, r"got \[-1, -1, .* \.\.\. 3000 in all\] in row 0$"),
    ({"forbidden": 7}, r"forbidden: expected ids in 0 .. 4, got 7"),
]


@pytest.mark.parametrize(("change", "message"), BAD_GATHER)
def test_gather_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        gather_log_probs(**({"logits": LOGITS, "tokens": IDS} | change))


HIDDEN, WEIGHT = torch.zeros(2, 3), torch.zeros(5, 3)
BAD_LINEAR = [
    ({"hidden": None}, r"hidden: expected a float32, bfloat16 or float16 tensor \[N, D\], got NoneType"),
    (
        {"weight": torch.zeros(5, 3).double()},
        r"weight: expected a float32, bfloat16 or float16 tensor \[V, D\], got torch.float64",
    ),
    ({"bias": torch.zeros(5).long()}, r"bias: expected a float32, bfloat16 or float16 tensor \[V\], got torch.int64"),
    ({"forbidden": 1.5}, r"forbidden: expected ids in 0 .. 4, got 1.5"),
    ({"hidden": torch.zeros(2, 3, 1)}, r"hidden: expected the shape \[N, D\], got \[2, 3, 1\]"),
    ({"weight": torch.zeros(5, 4)}, r"weight: expected the shape \[V, D\] with V >= 1 and D = 3, got \[5, 4\]"),
    ({"tokens": torch.tensor([0, 9])}, r"tokens: expected ids in 0 .. 4, got 9 in row 1"),
    ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens: expected a torch.int64 tensor of shape \[2\]"),
    ({"bias": torch.zeros(4)}, r"bias: expected a torch.float32 tensor of shape \[5\], got torch.float32 \[4\]"),
]


@pytest.mark.parametrize(("change", "message"), BAD_LINEAR)
def test_linear_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        linear_log_probs(**({"hidden": HIDDEN, "weight": WEIGHT, "tokens": IDS} | change))
