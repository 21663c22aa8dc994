"""The distribution that the compiled kernel samples from, computed without a draw, against the float64 softmax.

``edlm_sampling_law`` in the CPU library returns the probability of each column as the numbers have it that a draw compares its
uniforms with: tile masses, block and group sums, prefixes. Nothing here is statistical.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from edlm.ops import _library, sample_categorical
from edlm.ops._philox import Purpose, philox_uniform
from edlm.ops.sampling import TILE
from test_sampling import filtered_law

pytestmark = pytest.mark.skipif("cpu" not in _library.LOADED, reason="nothing is compiled")


def law(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """float64 [V] for float32 logits [V]."""
    function = ctypes.CDLL(str(_library.LOADED["cpu"])).edlm_sampling_law
    function.restype = ctypes.c_int64
    pointer, number = ctypes.c_void_p, ctypes.c_double
    function.argtypes = [pointer, ctypes.c_int64, number, ctypes.c_int64, number, number, pointer]
    probs = torch.empty(len(logits), dtype=torch.float64)
    code = function(logits.data_ptr(), len(logits), temperature, top_k, top_p, min_p, probs.data_ptr())
    assert code == -1
    return probs


def families(vocab_size):
    """Logits that a network might give: spread, flat, with a heavy tail, peaked, and with all its mass in one place."""
    ranks = torch.arange(1, vocab_size + 1).double()
    one = torch.full((vocab_size,), -20.5)
    one[vocab_size // 3] = 0
    return {
        "normal": torch.randn(vocab_size) * 2,
        "wide": torch.randn(vocab_size) * 8,
        "flat": torch.rand(vocab_size) * 1e-3,
        "equal": torch.zeros(vocab_size),
        "zipf": (-1.1 * ranks.log()).float()[torch.randperm(vocab_size)],
        "shifted": torch.randn(vocab_size) * 2 + 1000,
        "one": one,
    }


@pytest.mark.parametrize("vocab_size", [1, 27, 128, 129, 513, 50258, 151936])
def test_total_variation(vocab_size):
    """At most 1e-7 (a few 1e-8 are measured), and no column that cannot be reached: each is within 1e-5 of itself and 2^-51."""
    for name, logits in families(vocab_size).items():
        exact = torch.softmax(logits.double(), -1)
        ours = law(logits)
        assert abs(ours.sum() - 1) < 1e-12
        assert (ours - exact).abs().sum() / 2 <= 1e-7, name
        assert ((ours - exact).abs() <= 1e-5 * exact + 2.0**-51).all(), name
        # Within its tile, where the second uniform works: nothing that has 2^-50 of the tile gets less than half of it.
        # (A tile that has less than 2^-50 of the row is as far out of the first one's reach.)
        exact, ours = (torch.nn.functional.pad(p, (0, -vocab_size % TILE)).view(-1, TILE) for p in (exact, ours))
        within = exact.sum(1) >= 2.0**-50
        exact, ours = ((p / p.sum(1, keepdim=True))[within] for p in (exact, ours))
        assert (ours >= exact / 2)[exact >= 2.0**-50].all(), name


def test_total_variation_at_a_temperature():
    """1 / T is a float inside a tile, where only distances to the tile's maximum feel it."""
    logits = torch.randn(151936) * 2
    for temperature in (0.3, 0.7, 0.83, 1.3):
        exact = torch.softmax(logits.double() / temperature, -1)
        assert (law(logits, temperature) - exact).abs().sum() / 2 <= 1e-7, temperature


@pytest.mark.parametrize("vocab_size", [100, 700, 5000])
def test_filtered_law(vocab_size):
    """What a filter removes has probability 0 exactly; what it leaves, the law of the definition."""
    logits = (torch.randn(vocab_size) * 2).round(decimals=1)  # many ties
    for filters in ((20, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.02), (50, 0.9, 0.01), (1, 1.0, 0.0)):
        top_k, top_p, min_p = filters
        expected = filtered_law(logits, 0.8, top_k or None, top_p, min_p)
        ours = law(logits, 0.8, *filters)
        assert torch.equal(ours > 0, expected > 0), filters
        assert (ours - expected).abs().sum() / 2 <= 1e-7, filters


@pytest.mark.parametrize("vocab_size", [27, 129, 50258])
def test_draws_follow_this_law(vocab_size):
    """Each token is where the law's own prefix sums and the counter's two uniforms put it: the function speaks of the draws."""
    n, logits = 20_000, torch.randn(vocab_size) * 2
    tokens = sample_categorical(logits[None], n, seed=7, position=3, offset=2).tokens[0]
    u_tile, u_column = philox_uniform(torch.tensor([7]), position=3, candidate=torch.arange(n), offset=2, purpose=Purpose.TOKEN)
    p = torch.nn.functional.pad(law(logits), (0, -vocab_size % TILE)).view(-1, TILE)
    tile = torch.searchsorted(p.sum(1).cumsum(0), u_tile, right=True).clamp_max(len(p) - 1)
    columns = p[tile].cumsum(1)
    column = torch.searchsorted(columns, (u_column * columns[:, -1])[:, None], right=True).squeeze(1)
    assert torch.equal(tile * TILE + column, tokens)


@pytest.mark.parametrize("isa", ["baseline", "x86_64_v3"])
def test_every_instruction_set(isa):
    build = pytest.importorskip("edlm._build", reason="nothing is compiled")
    names = build.info()["cpu_isa_compiled"]
    if isa not in names or names.index(isa) >= names.index(build.info()["cpu_isa_used"]):
        pytest.skip(f"{isa} is what runs here anyway, or is not compiled in, or this processor does not run it")
    program = """
import torch, edlm._build
import test_sampling_law as t
assert edlm._build.info()["cpu_isa_used"] == %r
torch.manual_seed(0)
for v in (27, 513, 151936):
    t.test_total_variation(v)
    t.test_draws_follow_this_law(v)
t.test_filtered_law(700)
"""
    environment = {**os.environ, "EDLM_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program % isa], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
