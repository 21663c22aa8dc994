"""sample_candidates and sample_categorical: agreement with the float64 reference, laws, invariance, edges, errors.

Statistical tests have a fixed seed and a false-alarm rate of 1e-6 each.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from edlm.ops import sample_candidates, sample_categorical
from edlm.ops._philox import expand_seed
from edlm.ops.sampling import _sample_candidates_reference, _sample_categorical_reference
from exact import g_test

NO_IDS = torch.empty(0, dtype=torch.int64)
EDGES = [1, 2, 27, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1025, 50257, 151643]


def reference(logits, num_samples, *, temperature=1.0, forbidden=NO_IDS, seed=0, position=0, offset=0, filters=(0, 1.0, 0.0)):
    n = logits.shape[0]
    return _sample_categorical_reference(
        logits.cpu(),
        num_samples,
        torch.full((n,), position),
        temperature,
        *filters,
        forbidden,
        expand_seed(seed, n),
        torch.tensor([offset]),
    )


# --- agreement -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", EDGES)
def test_agrees_with_reference(vocab_size, dtype, device):
    """Tokens equal the float64 reference's but where a boundary lies within rounding; log-probs within 2e-6."""
    logits = (torch.randn(6, vocab_size) * 3).to(dtype)
    forbidden = torch.tensor([vocab_size - 1]) if vocab_size > 1 else NO_IDS
    for temperature in (1.0, 0.7, 0.0):
        got = sample_categorical(
            logits.to(device), 32, temperature=temperature, forbidden=forbidden.to(device), seed=5, offset=2, position=3
        )
        tokens, log_probs, model, invalid = reference(
            logits, 32, temperature=temperature, forbidden=forbidden, seed=5, offset=2, position=3
        )
        assert int(invalid) == -1
        same = got.tokens.cpu() == tokens
        assert (~same).sum() <= 1
        torch.testing.assert_close(got.log_probs.cpu()[same], log_probs[same], atol=2e-6, rtol=0)
        expected = log_probs if temperature == 1 else model
        torch.testing.assert_close(got.model_log_probs.cpu()[same], expected[same], atol=2e-6, rtol=0)
        assert got.log_probs.max() <= 0 and got.model_log_probs.max() <= 0


def test_share_of_equal_tokens(device):
    """At most 1e-5 of 400 000 draws may differ from the reference (the share that rounding explains is near 1e-7)."""
    logits = torch.randn(100, 2000) * 2
    got = sample_categorical(logits.to(device), 4000, seed=1).tokens.cpu()
    assert (got != reference(logits, 4000, seed=1)[0]).double().mean() <= 1e-5


def test_log_probs_equal_float64_softmax(device):
    logits = torch.randn(8, 50258) * 4
    got = sample_categorical(logits.to(device), 64, seed=0)
    expected = torch.log_softmax(logits.double(), -1).gather(1, got.tokens.cpu())
    torch.testing.assert_close(got.log_probs.double().cpu(), expected, atol=1.5e-6, rtol=0)


def test_log_probs_have_no_bias_at_a_temperature(device):
    """1 / T is not a float32, and only inside a tile is it rounded to one: the mean error of the log-probabilities is below 1e-7."""
    logits = torch.randn(1, 50258) * 4
    for temperature in (0.7, 0.83, 1.3):
        got = sample_categorical(logits.to(device), 20_000, temperature=temperature, seed=0)
        expected = torch.log_softmax(logits.double() / temperature, -1)[0][got.tokens.cpu()]
        assert abs((got.log_probs.double().cpu() - expected).mean()) < 1e-7


def test_candidates_agree_with_reference(device):
    logits, mask = torch.randn(3, 7, 100) * 2, 50
    xt = torch.randint(0, 100, (3, 7))
    xt[torch.rand(3, 7) < 0.6] = mask
    active = torch.rand(3, 7) < 0.7
    seed, offset = torch.tensor([4, 99, -3]), torch.tensor([7, 8, 9])
    for temperature in (1.0, 1.3, 0.0):
        got = sample_candidates(
            logits.to(device), xt.to(device), mask, 5, active=active.to(device), temperature=temperature, seed=seed, offset=offset
        )
        want = _sample_candidates_reference(logits, xt, mask, 5, active, temperature, 0, 1.0, 0.0, seed, offset)
        assert torch.equal(got.tokens.cpu(), want[0])
        torch.testing.assert_close(got.log_probs.cpu(), want[1], atol=2e-6, rtol=0)
        torch.testing.assert_close(got.model_log_probs.cpu(), want[2] if temperature != 1 else want[1], atol=2e-6, rtol=0)


@pytest.mark.parametrize("isa", ["baseline", "x86_64_v3", "x86_64_v4"])
def test_every_instruction_set(isa, tmp_path):
    """Each compiled variant against the reference, in a process of its own (the choice is made once)."""
    build = pytest.importorskip("edlm._build", reason="nothing is compiled")
    names = build.info()["cpu_isa_compiled"]
    if isa not in names or names.index(isa) > names.index(build.info()["cpu_isa_used"]):
        pytest.skip(f"{isa} is not compiled in, or this processor does not run it")
    program = """
import torch, edlm._build
from test_sampling import reference
from edlm.ops import sample_categorical
assert edlm._build.info()["cpu_isa_used"] == %r
torch.manual_seed(0)
for v in (27, 513, 5000):
    for dtype in (torch.float32, torch.bfloat16):
        for temperature in (1.0, 0.5, 0.0):
            x = (torch.randn(40, v) * 3).to(dtype)
            x[:, 1] = float("-inf")
            got = sample_categorical(x, 100, temperature=temperature, seed=3)
            tokens, log_probs, _, _ = reference(x, 100, temperature=temperature, seed=3)
            same = got.tokens == tokens
            assert (~same).sum() <= 1, (v, dtype, temperature, int((~same).sum()))
            assert (got.log_probs - log_probs)[same].abs().max() < 2e-6
"""
    environment = {**os.environ, "EDLM_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program % isa], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_instruction_set_is_named():
    pytest.importorskip("edlm._build", reason="nothing is compiled")
    environment = {**os.environ, "EDLM_CPU_ISA": "z80"}
    done = subprocess.run(
        [sys.executable, "-c", "import edlm._build as b; b.info()"], env=environment, capture_output=True, text=True, check=False
    )
    assert "EDLM_CPU_ISA: expected one of" in done.stderr and "z80" in done.stderr


# --- laws ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [50258, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_law_in_bins_of_probability(vocab_size, dtype, device, is_emulated):
    """Two million draws from Zipf-like logits, in log-spaced bins of probability, tail included: the G-test sees every decade."""
    n = 200_000 if is_emulated else 2_000_000
    ranks = torch.arange(1, vocab_size + 1).double()
    logits = (-1.1 * ranks.log())[torch.randperm(vocab_size)].to(dtype)[None]
    p = torch.softmax(logits.double(), -1)[0]
    draws = sample_categorical(logits.to(device), n, seed=11).tokens[0].cpu()
    bins = (-p.log2()).floor().long()
    expected = torch.zeros(int(bins.max()) + 1, dtype=torch.float64).index_add_(0, bins, p)
    counts = torch.bincount(bins[draws], minlength=len(expected)).double()
    assert (expected > 0).sum() >= 12
    assert g_test(counts, expected) > 1e-6
    # And inside the bins: the mean of -log p is the entropy (five standard errors: false alarm 6e-7).
    nll = -p.log()
    entropy, spread = (p * nll).sum(), ((p * nll**2).sum() - (p * nll).sum() ** 2).sqrt()
    assert abs(nll[draws].mean() - entropy) < 5 * spread / math.sqrt(len(draws))


def test_columns_within_a_tile(device):
    """Which column of a tile, a block or a vector lane makes no difference: 1100 equal columns, a count each."""
    counts = torch.bincount(
        sample_categorical(torch.zeros(1, 1100, device=device), 500_000, seed=2).tokens[0].cpu(), minlength=1100
    )
    assert g_test(counts.double(), torch.full((1100,), 1 / 1100)) > 1e-6


def test_tail_is_drawn(device):
    """50 257 tokens 20.5 nats below the top: 33 hits expected in 525 000 draws; float32 noise gives none.

    P(Poisson(33) < 9) + P(Poisson(33) > 66) is below 1e-6.
    """
    logits = torch.full((1, 50258), -20.5, device=device)
    logits[0, 1234] = 0
    tail = 50257 * math.exp(-20.5)
    n = round(33 / (tail / (1 + tail)))
    hits = int((sample_categorical(logits, n, seed=3).tokens != 1234).sum())
    assert 9 <= hits <= 66


def test_every_one_of_many_equals_is_reached(device):
    """All logits equal at V = 2**18: as many distinct tokens as draws with replacement give (occupancy, 6 sigma)."""
    v, n = 2**18, 2**18
    distinct = len(sample_categorical(torch.zeros(1, v, device=device), n, seed=9).tokens.unique())
    mean = v * (1 - math.exp(-n / v))
    sigma = math.sqrt(v * math.exp(-n / v) * (1 - (1 + n / v) * math.exp(-n / v)))
    assert abs(distinct - mean) < 6 * sigma


@pytest.mark.parametrize("what", ["rows", "candidates", "offsets", "seeds", "positions"])
def test_independence(what, device):
    """Draws at neighbouring counters: a 5 x 5 contingency table against the product law."""
    n, p = 40_000, torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    logits = p.log().float().expand(n, 5).to(device)
    seed = torch.arange(n) * 1000

    def draw(**changes):
        arguments = {"seed": seed, "position": torch.arange(n, device=device), "offset": 0} | changes
        return sample_categorical(logits, 2, **arguments).tokens.cpu()

    first = draw()
    a = first[:, 0]
    b = {
        "rows": lambda: a.roll(1),
        "candidates": lambda: first[:, 1],
        "offsets": lambda: draw(offset=1)[:, 0],
        "seeds": lambda: draw(seed=seed + 1)[:, 0],
        "positions": lambda: draw(position=torch.arange(n, device=device) + 1)[:, 0],
    }[what]()
    assert not torch.equal(a, b)
    assert g_test(torch.bincount(5 * a + b, minlength=25).double(), torch.outer(p, p).flatten()) > 1e-6


def test_temperature_law(device):
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]], device=device)
    draws = sample_categorical(logits, 200_000, temperature=0.5, seed=1)
    law = torch.softmax(logits[0].double().cpu() / 0.5, 0)
    assert g_test(torch.bincount(draws.tokens[0].cpu(), minlength=4).double(), law) > 1e-6
    torch.testing.assert_close(draws.log_probs.cpu(), law.log()[draws.tokens.cpu()].float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        draws.model_log_probs.cpu(),
        torch.log_softmax(logits.double().cpu(), -1)[0][draws.tokens.cpu()].float(),
        atol=1e-6,
        rtol=0,
    )


# --- filters ---------------------------------------------------------------------------------------------------------------------


def filtered_law(logits, temperature, top_k, top_p, min_p, forbidden=()):
    """The definition, one row at a time: top-k, then top-p, then min-p of the tempered law; lowest id first among equals."""
    x = logits.double().tolist()
    order = sorted((i for i in range(len(x)) if i not in forbidden), key=lambda i: (-x[i], i))
    order = order[: top_k or len(order)]
    p = torch.softmax(torch.tensor([x[i] / temperature for i in order], dtype=torch.float64), 0).tolist()
    if top_p is not None:
        kept, mass = 0, 0.0
        while kept < len(p) and mass < top_p:
            mass += p[kept]
            kept += 1
        order, p = order[:kept], p[:kept]
    if min_p is not None:
        order = [i for i, q in zip(order, p, strict=True) if q >= min_p * p[0]]
    law = torch.zeros(len(x), dtype=torch.float64)
    law[order] = torch.softmax(torch.tensor([x[i] / temperature for i in order], dtype=torch.float64), 0)
    return law


FILTERS = [
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.3},
    {"top_k": 5, "top_p": 0.8, "min_p": 0.2},
    {"top_k": 1},
    {"top_p": 1e-6},
    {"min_p": 1.0},
    {"top_k": 100, "top_p": 1.0, "min_p": 0.0},
]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("filters", FILTERS)
def test_filters(filters, temperature, device):
    logits = torch.tensor([[0.3, 1.7, 1.7, -0.5, 0.9, 9.0, 0.3], [2.0, 0.0, 0.1, 0.2, 0.3, -4.0, 1.9]], device=device)
    got = sample_categorical(logits, 30_000, temperature=temperature, forbidden=5, seed=4, **filters)
    for b in range(2):
        law = filtered_law(
            logits[b].cpu(), temperature, filters.get("top_k"), filters.get("top_p"), filters.get("min_p"), forbidden=(5,)
        )
        counts = torch.bincount(got.tokens[b].cpu(), minlength=7).double()
        assert counts[law == 0].sum() == 0
        if (law > 0).sum() > 1:
            assert g_test(counts, law) > 1e-6
        torch.testing.assert_close(got.log_probs[b].cpu(), law.log()[got.tokens[b].cpu()].float(), atol=2e-6, rtol=0)
        model = torch.log_softmax(logits[b].cpu().double().index_fill(0, torch.tensor([5]), -math.inf), 0)
        torch.testing.assert_close(got.model_log_probs[b].cpu(), model[got.tokens[b].cpu()].float(), atol=2e-6, rtol=0)


def test_filters_on_candidates_leave_other_rows_alone(device):
    logits = torch.randn(2, 4, 9, device=device)
    logits[0, 1] = math.nan  # a clean row: nobody looks at it
    xt = torch.tensor([[8, 3, 8, 1], [2, 8, 8, 8]], device=device)
    active = torch.tensor([[True, True, False, True], [True, True, True, False]], device=device)
    got = sample_candidates(logits, xt, 8, 3, active=active, top_k=2, temperature=0.9, seed=0)
    untouched = (xt != 8) | ~active
    assert torch.equal(
        got.tokens.masked_select(untouched[:, None]), xt[:, None].expand(2, 3, 4).masked_select(untouched[:, None])
    )
    for log_probs in (got.log_probs, got.model_log_probs):
        assert (log_probs.masked_select(untouched[:, None]) == 0).all()
        assert (log_probs.masked_select(~untouched[:, None]) < 0).all()
    rows = (xt == 8) & active
    b, i = rows.nonzero().T
    alone = sample_categorical(logits[b, i], 3, position=i, forbidden=8, top_k=2, temperature=0.9, seed=b.cpu())
    assert torch.equal(alone.tokens, got.tokens[b, :, i])


# --- invariance, bitwise ---------------------------------------------------------------------------------------------------------


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [27, 513, 8200])
def test_a_row_depends_on_itself_alone(vocab_size, dtype, device):
    """Number and order of rows, threads, strides, alignment and storage offset: not a bit changes."""
    n = 33
    logits = (torch.randn(n, vocab_size) * 2).to(dtype).to(device)
    seed = torch.arange(n) * 7
    whole = sample_categorical(logits, 6, seed=seed, position=4)
    for rows in ([5], [5, 2], list(range(n - 1, -1, -1))):
        assert same(sample_categorical(logits[rows], 6, seed=seed[rows], position=4), [x[rows] for x in whole])
    padded = torch.zeros(n, vocab_size + 3, dtype=dtype, device=device)
    for shift in (0, 1, 3):  # a row stride larger than V, every alignment
        view = padded[:, shift : shift + vocab_size]
        view.copy_(logits)
        assert same(sample_categorical(view, 6, seed=seed, position=4), whole)
    assert same(sample_categorical(logits.T.contiguous().T, 6, seed=seed, position=4), whole)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert same(sample_categorical(logits, 6, seed=seed, position=4), whole)
            assert same(sample_categorical(logits[:1], 6, seed=seed[:1], position=4), [x[:1] for x in whole])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_of_batch_and_length(dtype, device):
    """[L, B, V] read as [B, L, V], and a slice of a larger tensor: read in place, with the same bits."""
    logits = torch.randn(3, 5, 700).to(dtype).to(device)
    xt = torch.full((3, 5), 699, device=device)
    whole = sample_candidates(logits, xt, 699, 4, seed=1)
    swapped = logits.transpose(0, 1).contiguous().transpose(0, 1)
    larger = torch.zeros(4, 9, 705, dtype=dtype, device=device)[1:, 2:7, 3:703]
    larger.copy_(logits)
    for view in (swapped, larger):
        assert not view.is_contiguous() and view.stride(-1) == 1
        assert same(sample_candidates(view, xt, 699, 4, seed=1), whole)


def test_first_candidates_do_not_depend_on_how_many(device):
    logits = torch.randn(4, 300, device=device)
    assert torch.equal(sample_categorical(logits, 16, seed=0).tokens[:, :3], sample_categorical(logits, 3, seed=0).tokens)


def test_compacted_rows_are_the_full_batchs_rows(device):
    logits, mask = torch.randn(3, 6, 40, device=device), 39
    xt = torch.full((3, 6), mask, device=device)
    seed = torch.tensor([5, 50, 500])
    full = sample_candidates(logits, xt, mask, 4, seed=seed, offset=9)
    b, i = torch.tensor([0, 2, 2, 1]), torch.tensor([3, 0, 5, 2])
    compact = sample_categorical(logits[b, i], 4, position=i.to(device), forbidden=mask, seed=seed[b], offset=9)
    assert torch.equal(compact.tokens, full.tokens[b, :, i]) and torch.equal(compact.log_probs, full.log_probs[b, :, i])


def test_a_sequence_does_not_depend_on_its_batch(device):
    logits = torch.randn(5, 6, 40, device=device)
    xt = torch.full((5, 6), 39, device=device)
    full = sample_candidates(logits, xt, 39, 4, seed=100)
    for b in range(5):
        alone = sample_candidates(logits[b : b + 1], xt[:1], 39, 4, seed=100 + b)
        assert torch.equal(alone.tokens[0], full.tokens[b])


def test_global_generator_is_not_touched(device):
    state = torch.get_rng_state()
    sample_categorical(torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).to(device), 3, seed=0)
    assert torch.equal(state, torch.get_rng_state())


def test_more_than_two_to_the_31_elements(device, is_emulated):
    if is_emulated:
        pytest.skip("42 735 rows of 50 258 columns take a minute there; test_rows_far_apart has the offsets")
    row = torch.randn(1, 50258, device=device)
    n = 2**31 // 50258 + 7
    seed = torch.zeros(n, dtype=torch.int64)
    got = sample_categorical(row.expand(n, -1), 1, seed=seed, position=torch.arange(n, device=device))
    assert got.tokens.shape == (n, 1) and got.tokens.min() >= 0 and got.tokens.max() < 50258
    tail = sample_categorical(row.expand(3, -1), 1, seed=seed[:3], position=torch.arange(n - 3, n, device=device))
    assert torch.equal(got.tokens[-3:], tail.tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_far_apart(dtype, device):
    """Rows 2**31 and 2**32 elements behind the first: nothing lies between them, so no memory is taken for it."""
    for stride in (2**31 + 5, 2**32 + 5):
        if device.type != "cpu" and 2 * stride * dtype.itemsize > torch.cuda.mem_get_info()[0]:
            pytest.skip("the device has no room for it: there, memory is taken at once")
        far = torch.empty(stride + 1000, dtype=dtype, device=device).as_strided((2, 1000), (stride, 1))
        logits = (torch.randn(2, 1000) * 2).to(dtype).to(device)
        far.copy_(logits)
        assert same(sample_categorical(far, 5, seed=3), sample_categorical(logits, 5, seed=3))
