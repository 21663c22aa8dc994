"""The CUDA kernels under the emulator, beside the compiled CPU kernels: equal draws, any order of threads, and bytes counted.

What a GPU adds to this (its arithmetic, its speed, its memory order) is not here; docs/results.md says what has run where.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from edlm import ops
from edlm.ops import _library
from edlm.samplers import generate
from test_registration import everything

FORWARD, REVERSE, RANDOM = 0, 1, 2


@pytest.mark.parametrize(
    ("rows", "vocab_size", "k", "dtype", "temperature"),
    [
        (20_000, 27, 20, torch.bfloat16, 1.0),
        (400, 2000, 1000, torch.float32, 0.7),
        (400, 2000, 1000, torch.float16, 1.0),
        (8, 50258, 50_000, torch.float32, 1.0),
        (8, 50258, 50_000, torch.bfloat16, 0.7),
    ],
)
def test_draws_equal_the_cpus(rows, vocab_size, k, dtype, temperature, emulated_ops):
    """At least 99.999 % of 400 000 tokens, the others at boundaries within rounding of a uniform; log-probabilities to 2e-6."""
    if "cpu" not in _library.LOADED:
        pytest.skip("nothing is compiled for the CPU")
    logits = (torch.randn(rows, vocab_size) * 3).to(dtype)
    cpu = ops.sample_categorical(logits, k, seed=2, offset=7, temperature=temperature)
    with emulated_ops.installed():
        gpu = ops.sample_categorical(logits, k, seed=2, offset=7, temperature=temperature)
    equal = cpu.tokens == gpu.tokens
    assert (~equal).double().mean() <= 1e-5, int((~equal).sum())
    torch.testing.assert_close(gpu.log_probs[equal], cpu.log_probs[equal], atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(gpu.model_log_probs[equal], cpu.model_log_probs[equal], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("vocab_size", [450_000, 480_000, 524_288, 2_457_700])
def test_launches_near_the_limits_of_shared_memory(vocab_size, emulated_ops):
    """40 KiB of tiles and more must be asked for, which the emulator checks; from some 4700 tiles on they stay in memory."""
    logits, none = torch.randn(1, vocab_size), torch.empty(0, dtype=torch.int64)
    want = [ops.sample_categorical(logits, 3, seed=1, **options) for options in ({}, {"temperature": 0.7}, {"top_k": 5})]
    scores = ops.gather_log_probs(logits, want[0].tokens)
    running = torch.full((1, 3), -torch.inf, dtype=torch.float64)
    running[:, 1] = 0
    with emulated_ops.installed():
        for options, expected in zip(({}, {"temperature": 0.7}, {"top_k": 5}), want, strict=True):
            assert torch.equal(ops.sample_categorical(logits, 3, seed=1, **options).tokens, expected.tokens)
        torch.testing.assert_close(ops.gather_log_probs(logits, want[0].tokens), scores)
        if vocab_size <= 1 << 20:  # the widest chunk that linear_log_probs makes
            torch.ops.edlm.linear_fold(running, logits, want[0].tokens[:, 0].contiguous(), none)
            log_prob = running[:, 2] - running[:, 0] - running[:, 1].log()
            torch.testing.assert_close(log_prob.float(), scores[:, 0])
        else:
            with pytest.raises(RuntimeError, match="linear_fold: the GPU refused a kernel"):
                torch.ops.edlm.linear_fold(running, torch.randn(1, 2_500_000), want[0].tokens[:, 0].contiguous(), none)
            assert torch.equal(ops.sample_categorical(logits, 3, seed=1).tokens, want[0].tokens)  # nothing is left of that


def test_installed_is_what_runs(emulated_ops):
    """The emulator counts reads: without this, the other tests might test the CPU's kernels twice. Afterwards, the CPU's run again."""
    logits = torch.randn(2, 700)
    before = ops.sample_categorical(logits, 3, seed=0)
    with counted(emulated_ops) as bytes_read, emulated_ops.installed():
        ops.sample_categorical(logits, 3, seed=0)
    assert bytes_read["requested"] > 0
    with counted(emulated_ops) as bytes_read:
        after = ops.sample_categorical(logits, 3, seed=0)
    assert bytes_read["requested"] == 0 and torch.equal(before.tokens, after.tokens)


def test_the_order_of_threads_changes_nothing(emulated_ops):
    """Every op, in a step of the loop and with filters: the same bits forward, in reverse and in five random orders."""
    torch.manual_seed(1)
    arguments = torch.randn(3, 4, 9), torch.tensor([[8, 8, 1, 8]] * 3), torch.randn(12, 4), torch.randn(9, 4)
    logits = (torch.randn(9, 1300) * 2).round(decimals=1)

    def run():
        ancestors = [ops.resample(logits, scheme, seed=1) for scheme in ("systematic", "residual", "multinomial")]
        draws = [
            ops.sample_categorical(x, 9, seed=4, temperature=0.8, **options)
            for x in (logits[:1], logits)  # a row among several blocks, and a block a row
            for options in ({}, {"top_k": 30}, {"top_p": 0.7}, {"top_k": 90, "top_p": 0.8, "min_p": 0.05})
        ]
        return [*everything(*arguments), *ancestors, *(x for draw in draws for x in draw)]

    with emulated_ops.installed():
        emulated_ops.schedule(FORWARD)
        want = run()
        try:
            for order, seed in [(REVERSE, 1), *((RANDOM, seed) for seed in range(5))]:
                emulated_ops.schedule(order, seed)
                for got, expected in zip(run(), want, strict=True):
                    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        finally:
            emulated_ops.schedule(FORWARD)


class Network:
    """Logits that depend on the tokens beside a position, and none of whose rows depends on another row of the batch."""

    mask_token_id, vocab_size = 299, 300

    def __init__(self) -> None:
        self.table = torch.randn(300, 300) * 2

    def __call__(self, xt, t):
        return self.table[xt.roll(1, 1)] + t[:, None, None]


def test_generate(emulated_ops):
    """The whole loop, with an energy and a filter: the tokens that the CPU's kernels give."""
    network, pairs = Network(), torch.randn(300, 300)

    def energy(x0, xt, t, log_p):
        return pairs[x0[..., 1:], x0[..., :-1]].sum(-1)

    for options in ({}, {"energy": energy, "num_candidates": 5, "window": (0, 1)}, {"top_p": 0.8, "temperature": 0.9}):
        want = generate(network, batch_size=4, length=9, steps=5, seed=3, **options)
        with emulated_ops.installed():
            got = generate(network, batch_size=4, length=9, steps=5, seed=3, **options)
        assert torch.equal(got.tokens, want.tokens)
        torch.testing.assert_close(got.ess, want.ess, equal_nan=True)
        torch.testing.assert_close(got.log_Z, want.log_Z, equal_nan=True, atol=1e-5, rtol=1e-5)


# --- bytes ------------------------------------------------------------------------------------------------------------------------


class counted:
    """with counted(ops) as bytes: bytes["requested"] by kernels' reads of logits, bytes["distinct"] of memory, in sectors of 32."""

    def __init__(self, emulated_ops) -> None:
        self.count, self.bytes = emulated_ops.library.emulator_count, {}

    def __enter__(self) -> dict[str, int]:
        self.count(1, None, None)
        return self.bytes

    def __exit__(self, *exception: object) -> None:
        requested, distinct = ctypes.c_uint64(), ctypes.c_uint64()
        self.count(0, ctypes.byref(requested), ctypes.byref(distinct))
        self.bytes.update(requested=requested.value, distinct=distinct.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [50258, 151936])
@pytest.mark.parametrize("k", [1, 16])
@pytest.mark.parametrize("rows", [2, 20])
def test_one_read_of_the_logits(rows, k, vocab_size, dtype, emulated_ops):
    """Rows of 151936 begin at a multiple of 16 bytes: every byte is asked for once, and 64 columns again a draw. Rows of 50258 do
    not: their loads overlap, which the first cache level sees; from memory, sectors come once. Whether a row is split or not."""
    size = dtype.itemsize
    logits = torch.randn(rows, vocab_size).to(dtype)
    with counted(emulated_ops) as read, emulated_ops.installed():
        ops.sample_categorical(logits, k, seed=1)
    once, again = (
        rows * vocab_size * size,
        rows * max(k, 2) * 80 * size,
    )  # a warp makes two draws at a time, of 64 columns and 16 looks at one
    assert once * 0.99 <= read["distinct"] <= once + 32 * rows
    overlap = 1 if vocab_size * size % 16 == 0 else 2
    assert once * 0.99 <= read["requested"] <= overlap * once + again
    assert (overlap * once + again) / once <= overlap * 1.1


def test_masked_rows_are_not_read(emulated_ops):
    logits, xt = torch.randn(4, 25, 1000), torch.zeros(4, 25, dtype=torch.int64)
    xt[1, 3:8] = 999
    with counted(emulated_ops) as read, emulated_ops.installed():
        ops.sample_candidates(logits, xt, 999, 4, seed=0)
    assert 5 * 4000 * 0.99 <= read["distinct"] <= 5 * (4000 + 32)


def test_log_probs_read_once(emulated_ops):
    logits, tokens = torch.randn(10, 50256).bfloat16(), torch.randint(0, 50256, (10, 3))
    with counted(emulated_ops) as read, emulated_ops.installed():
        ops.gather_log_probs(logits, tokens)
    assert 0.99 * logits.nbytes <= read["requested"] <= 1.01 * logits.nbytes


# --- what bindings say ------------------------------------------------------------------------------------------------------------


def test_reports_are_readable(emulated_ops):
    """The status is a tensor of the device: the smallest code, or -1; what is bad has ids in range."""
    op, none = torch.ops.edlm_emulated, torch.empty(0, dtype=torch.int64)
    zero = torch.zeros(1, dtype=torch.int64)
    for rows, vocab_size in ((3, 20), (3, 3000), (40, 3000)):
        logits = torch.randn(rows, vocab_size)
        for bad, code in ((float("nan"), 0), (float("inf"), 0), (float("-inf"), 1)):
            x = logits.clone()
            x[1:] = bad
            for proposal in ((1.0, 0, 1.0, 0.0), (0.5, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (1.0, 5, 0.9, 0.1)):
                tokens, log_probs, _, invalid = op.sample_categorical(
                    x, 4, torch.zeros(rows, dtype=torch.int64), *proposal, none, torch.arange(rows), zero
                )
                assert invalid.tolist() == [4 + code]
                assert (tokens[1:] == 0).all() and log_probs[1:].isnan().all() and not log_probs[:1].isnan().any()


def test_too_large_for_a_grid(emulated_ops):
    """Refused before anything runs. No memory is touched."""
    huge = torch.empty(2**31, dtype=torch.bfloat16).view(1, 1, -1)
    with pytest.raises(
        RuntimeError, match=r"gather_log_probs: expected at most 2\^31 - 1 rows of at most .* got 1 rows of 2147483648"
    ):
        torch.ops.edlm_emulated.gather_log_probs(
            huge, torch.zeros(1, 1, 1, dtype=torch.int64), 1.0, torch.empty(0, dtype=torch.int64)
        )


def test_bindings_check_their_callers(emulated_ops):
    zeros, none = torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"position: expected a contiguous tensor .* shape \[4\]"):
        torch.ops.edlm_emulated.sample_categorical(torch.zeros(4, 5), 1, zeros, 1.0, 0, 1.0, 0.0, none, torch.arange(4), zeros)
    with pytest.raises(RuntimeError, match=r"resample: scheme: expected 0 .. 3, got 7"):
        torch.ops.edlm_emulated.resample(torch.zeros(2, 3), 7, torch.arange(2), zeros)
