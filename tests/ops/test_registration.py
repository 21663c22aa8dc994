"""Schemas, fakes, autograd registrations (opcheck), torch.compile, inference mode, and what ``backends`` says."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from edlm import ops

N0 = torch.empty(0, dtype=torch.int64)
ZERO, SEEDS = torch.zeros(1, dtype=torch.int64), torch.arange(3)
LOGITS, XT = torch.randn(3, 4, 9), torch.tensor([[8, 8, 1, 8]] * 3)
TOKENS = torch.randint(0, 9, (6, 2))


def samples():
    """op -> argument tuples for opcheck."""
    grad = {"requires_grad": True}
    hidden, weight, bias = torch.randn(6, 4, **grad), torch.randn(9, 4, **grad), torch.randn(9, **grad)
    stats, tokens = torch.randn(6, 2), TOKENS[:, 0].contiguous()
    return {
        "sample_candidates": [
            (LOGITS, XT, 8, 2, None, 1.0, 0, 1.0, 0.0, SEEDS, ZERO),
            (LOGITS.bfloat16(), XT, 8, 2, XT > 0, 0.5, 0, 1.0, 0.0, SEEDS, SEEDS),
            (LOGITS.half(), XT, 8, 2, None, 1.0, 3, 0.9, 0.1, SEEDS, ZERO),
        ],
        "sample_categorical": [
            (LOGITS[0], 3, torch.arange(4), 1.0, 0, 1.0, 0.0, N0, torch.arange(4), ZERO),
            (LOGITS[0], 3, torch.arange(4), 0.0, 0, 1.0, 0.0, ZERO, torch.arange(4), ZERO),
        ],
        "gather_log_probs": [
            (torch.randn(2, 3, 9, **grad), TOKENS.view(2, 3, 2), 0.7, N0),
            (torch.randn(1, 6, 9), TOKENS[None], 1.0, torch.tensor([8])),
        ],
        "gather_log_probs_backward": [
            (torch.randn(2, 3, 2), torch.randn(2, 3, 9), TOKENS.view(2, 3, 2), torch.randn(2, 3, 2), 1.0, N0)
        ],
        "linear_log_probs": [(hidden, weight, tokens, bias, N0), (hidden, weight, tokens, None, N0)],
        "linear_log_probs_backward": [
            (torch.randn(6), hidden.detach(), weight.detach(), tokens, stats, None, N0, [True, False, False]),
            (torch.randn(6), hidden.detach(), weight.detach(), tokens, stats, bias.detach(), ZERO, [True, True, True]),
        ],
        "linear_cross_entropy": [
            (hidden, weight, tokens, torch.rand(6), bias, N0, [True, True, True]),
            (hidden.detach(), weight, tokens, torch.rand(6), None, ZERO, [False, True, False]),
        ],
        "linear_cross_entropy_backward": [
            (torch.tensor(2.0), torch.randn(6, 4), torch.randn(9, 4), torch.empty(0), hidden.detach(), weight.detach(), None)
        ],
        "linear_fold": [(torch.rand(6, 3, dtype=torch.float64), torch.randn(6, 4), tokens - 3, N0)],
        "linear_grad": [(torch.randn(6, 4), torch.randn(6), tokens - 3, stats, torch.tensor([2]))],
        "select_candidate": [
            (torch.randn(4, 3).T, 1.0, None, SEEDS, ZERO),
            (torch.randn(3, 4), 0.5, torch.randn(3, 4), SEEDS, SEEDS),
        ],
        "resample": [(torch.randn(3, 4), scheme, SEEDS, ZERO) for scheme in range(4)],
        "reverse_step": [(XT, XT[:, None].repeat(1, 2, 1), ZERO.expand(3).clone(), torch.rand(3, 4), torch.rand(3))],
    }


def test_every_op_is_checked():
    assert set(samples()) == set(ops.backends())


@pytest.mark.parametrize("name", sorted(samples()))
def test_opcheck(name):
    for arguments in samples()[name]:
        torch.library.opcheck(getattr(torch.ops.edlm, name).default, arguments)


def everything(logits, xt, hidden, weight):
    """A step of the loop and both scoring ops, as a user would write them."""
    drawn = ops.sample_candidates(logits, xt, 8, 4, temperature=0.9, top_p=0.95, seed=3, offset=2)
    rows = ops.sample_categorical(logits[0], 2, forbidden=8, seed=1)
    scored = ops.gather_log_probs(logits, drawn.tokens.transpose(1, 2))
    energy = ops.linear_log_probs(hidden, weight, xt.flatten()).view(xt.shape).sum(1, keepdim=True) - scored.clamp_min(-30).sum(1)
    picked = ops.select_candidate(energy, seed=5)
    ancestors = ops.resample(picked.log_weights, "stratified", seed=6)
    xs = ops.reverse_step(xt, drawn.tokens, picked.index, torch.full(xt.shape, 0.5), 0.25)
    return xs, rows.tokens, picked.ess, ancestors, scored


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    arguments = LOGITS, XT, torch.randn(12, 4), torch.randn(9, 4)
    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    for got, want in zip(compiled(*arguments), everything(*arguments), strict=True):
        torch.testing.assert_close(got, want)
    bad = LOGITS.clone()
    bad[1, 0, 0] = math.nan
    with pytest.raises(RuntimeError, match="sample_candidates: a row of the input is not valid"):
        compiled(bad, *arguments[1:])


def test_compile_with_a_temperature_that_varies():
    """A second value makes it symbolic: the checks must trace."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def draw(logits, xt, temperature):
        tokens = ops.sample_candidates(logits, xt, 8, 2, temperature=temperature, seed=1).tokens
        return tokens, ops.gather_log_probs(logits, tokens.transpose(1, 2), temperature=temperature)

    for temperature in (0.5, 0.7, 0.9):
        tokens, scores = draw(LOGITS, XT, temperature)
        want = ops.sample_candidates(LOGITS, XT, 8, 2, temperature=temperature, seed=1).tokens
        assert torch.equal(tokens, want)
        torch.testing.assert_close(scores, ops.gather_log_probs(LOGITS, want.transpose(1, 2), temperature=temperature))


def test_inference_mode():
    arguments = LOGITS, XT, torch.randn(12, 4), torch.randn(9, 4)
    with torch.inference_mode():
        inside = everything(*arguments)
    for got, want in zip(inside, everything(*arguments), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", sorted(samples()))
def test_nothing_is_allocated_but_outputs(name):
    """Where a kernel is compiled: what torch hands out during a call is what the call returns, to the byte."""
    if ops.backends()[name]["cpu"] != "compiled" or name.startswith(("linear_log_probs", "linear_cross_entropy")):
        pytest.skip("a reference, or an op made of others: it has buffers")
    op = getattr(torch.ops.edlm, name).default
    for arguments in samples()[name]:
        arguments = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
        op(*arguments)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            out = op(*arguments)
        outputs = () if out is None else out if isinstance(out, tuple) else (out,)
        wanted = sum(x.untyped_storage().nbytes() for x in outputs)
        taken = sum(e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0)
        assert taken == wanted


def test_second_order_is_refused():
    hidden = torch.randn(2, 3, requires_grad=True)
    value = ops.linear_log_probs(hidden, torch.randn(5, 3), torch.tensor([1, 2])).sum()
    (first,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_log_probs: first-order gradients only"):
        torch.autograd.grad(first.sum(), hidden)


def test_backends_report_what_runs():
    kinds = ops.backends()
    assert {"sample_candidates", "sample_categorical", "gather_log_probs", "reverse_step"} <= set(kinds)
    assert all(set(kind) == {"cpu", "cuda"} and set(kind.values()) <= {"compiled", "reference"} for kind in kinds.values())
    pytest.importorskip("edlm._build", reason="nothing is compiled")
    assert {kind["cpu"] for kind in kinds.values()} == {"compiled"}


def test_references_alone_work_with_one_warning():
    """Without the compiled part: one warning that says what to do, and the same tokens."""
    # The loader looks for _C.so beside the package: hide it by name.
    program = """
import warnings, pathlib
is_file = pathlib.Path.is_file
pathlib.Path.is_file = lambda self: False if self.name == "_C.so" else is_file(self)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    from edlm import ops
    import torch
    torch.manual_seed(0)
    x = torch.randn(5, 700)
    tokens = ops.sample_categorical(x, 8, seed=1).tokens
ours = [str(w.message) for w in seen if "edlm" in str(w.message)]
assert len(ours) == 1 and "no compiled kernels" in ours[0] and "pip install" in ours[0], ours
assert ops.backends()["sample_categorical"]["cpu"] == "reference"
print(tokens.tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    assert ops.sample_categorical(torch.randn(5, 700), 8, seed=1).tokens.tolist() == json.loads(done.stdout)
