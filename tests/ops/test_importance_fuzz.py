"""The compiled importance kernels against their references: shapes, strides, dtypes and values by hypothesis, then what a row owes to
its neighbours (nothing), and every instruction set."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from edlm.ops import backends, resample, reverse_step, select_candidate
from edlm.ops.importance import (
    SCHEMES,
    _resample,
    _resample_reference,
    _reverse,
    _reverse_reference,
    _select,
    _select_reference,
)
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(backends()["select_candidate"]["cpu"] != "compiled", reason="nothing is compiled")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
fuzz = settings(derandomize=True, database=None, deadline=None, max_examples=150)


def laid_out(value: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers elsewhere in memory: transposed, with gaps on every axis, or at an odd address."""
    if layout == "transposed":
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    step = 3 if layout == "gaps" else 1
    room = torch.zeros([2 + step * n for n in value.shape], dtype=value.dtype)
    view = room[tuple(slice(1, 1 + step * n, step) for n in value.shape)]
    return view.copy_(value)


layouts = st.sampled_from(["shifted", "transposed", "gaps"])


@st.composite
def rows(draw, special):
    """[B, K] of one character: plain, ties, far apart, or all shifted far away; some numbers, or whole rows, are special.

    NOTE: count what an example tells. With plain integer ranges half of 150 examples had no rows, 13 were stratified, and none of these
    told its uniforms apart: a kernel that used one for all passed. So there are rows always, and every scheme in every example.
    """
    batch, k = draw(st.integers(1, 4)), draw(st.sampled_from([7, 12, 9, 5, 2, 8, 16, 17, 40, 3, 1]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([1.0, 3.0, 0.3, 30.0, 1e3, 1e-3, 1e300, 0.0]))
    value = torch.randn(batch, k, generator=generator, dtype=torch.float64) * scale + draw(
        st.sampled_from([0.0, -7.0, 1e9, 1e17])
    )
    if draw(st.booleans()):
        value = value.round()
    if draw(st.sampled_from([False, False, True])):
        where = torch.rand(batch, k, generator=generator) < draw(st.sampled_from([0.05, 0.5, 1.0]))
        value = torch.where(where, draw(st.sampled_from(special)), value)
    return laid_out(value.to(draw(st.sampled_from(DTYPES))), draw(layouts))


@st.composite
def streams(draw, batch):
    """seed [B], offset [1] or [B]; both may be strided."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    many = torch.randint(-(2**63), 2**63 - 1, (3, 2 * batch), generator=generator)
    return many[0, ::2], many[1, 1::2] if draw(st.booleans()) and batch != 1 else many.new_full((1,), draw(st.integers(0, 2**33)))


def assert_same(got, want):
    """Float32 results of float64 sums: the last bit may differ, and what cancels, by float64's."""
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1.5e-7, atol=1e-12, equal_nan=True)
        assert one.is_contiguous()


@fuzz
@given(st.data())
def test_select(data):
    energy = data.draw(rows([math.inf, math.inf, -math.inf, math.nan, 0.0]))
    temperature = data.draw(st.sampled_from([1.0, 0.7, 30.0, 0.0, 1e-3, math.inf, 1e-310]))
    correction = None
    if data.draw(st.booleans()):
        correction = torch.randn(energy.shape) * 4
        if data.draw(st.booleans()):
            correction[torch.rand(energy.shape) < 0.2] = data.draw(st.sampled_from([-math.inf, -math.inf, math.inf, math.nan]))
        correction = laid_out(correction.to(data.draw(st.sampled_from(DTYPES))), data.draw(layouts))
    seed, offset = data.draw(streams(len(energy)))
    for t in (0.7, temperature):
        assert_same(_select(energy, t, correction, seed, offset), _select_reference(energy, t, correction, seed, offset))


@fuzz
@given(st.data())
def test_resample(data):
    log_weights = data.draw(rows([-math.inf, -math.inf, math.inf, math.nan, 0.0]))
    seed, offset = data.draw(streams(len(log_weights)))
    for scheme in range(len(SCHEMES)):
        assert_same(_resample(log_weights, scheme, seed, offset), _resample_reference(log_weights, scheme, seed, offset))


@fuzz
@given(st.data())
def test_reverse(data):
    batch, k, length = (data.draw(st.sampled_from(sizes)) for sizes in ([3, 4, 2, 1, 0], [4, 2, 3, 1], [13, 40, 8, 3, 1, 0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    xt = torch.randint(-9, 9, (batch, length), generator=generator)
    x0 = torch.randint(10, 99, (batch, k, length), generator=generator)
    spread = data.draw(st.sampled_from([0, 0, 2]))  # 2: some indices are out of range
    index = torch.randint(-spread, k + spread, (batch,), generator=generator)
    time = data.draw(st.sampled_from([torch.float32, torch.float64]))
    open_time = torch.randint(0, 5, (batch, length), generator=generator).to(time) / 4
    s = torch.randint(0, 5, (batch if data.draw(st.booleans()) else 1,), generator=generator).to(time) / 4
    arguments = [laid_out(t, data.draw(layouts)) for t in (xt, x0, index, open_time, s)]
    got, want = _reverse(*arguments), _reverse_reference(*arguments)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and got[0].is_contiguous()


# --- many draws ------------------------------------------------------------------------------------------------------------------


def agreement():
    """Indices of the compiled kernels and of the references, over many rows: they differ at most where a boundary is hit."""
    energy, seed, offset = torch.randn(100_000, 7) * 2, torch.arange(100_000), torch.tensor([5])
    arguments = energy, 0.9, None, seed, offset
    got, want = _select(*arguments), _select_reference(*arguments)
    assert (got[0] != want[0]).double().mean() <= 1e-5
    assert_same(got[1:], want[1:])
    for scheme in range(4):
        arguments = energy[:12_000], scheme, seed[:12_000], offset
        assert (_resample(*arguments)[0] != _resample_reference(*arguments)[0]).double().mean() <= 1e-5, SCHEMES[scheme]


def test_indices_are_the_references():
    agreement()


@pytest.mark.parametrize("isa", ["baseline", "x86_64_v3", "x86_64_v4"])
def test_every_instruction_set(isa):
    """Each compiled variant, in a process of its own (the choice is made once)."""
    import edlm._build as build

    names = build.info()["cpu_isa_compiled"]
    if isa not in names or names.index(isa) > names.index(build.info()["cpu_isa_used"]):
        pytest.skip(f"{isa} is not compiled in, or this processor does not run it")
    program = f"""
import edlm._build, torch
import test_importance_fuzz as tests
assert edlm._build.info()["cpu_isa_used"] == "{isa}"
torch.manual_seed(0)
tests.agreement()
tests.test_select()
tests.test_resample()
tests.test_reverse()
"""
    environment = {**os.environ, "EDLM_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_weights_far_apart():
    """Neither the smallest weight nor the mean of the small ones is lost: 1e-300, 1e-3000, beside 1 and alone."""
    far = torch.tensor(
        [
            [0.0, 690.0, 691.0, 6900.0],
            [0.0, 0.0, 690.0, 6900.0],
            [690.0, 6900.0, math.inf, 0.0],
            [0.0, math.inf, math.inf, math.inf],
            [0.0, 36.0, 37.0, 38.0],
        ],
        dtype=torch.float64,
    )
    got = select_candidate(far, seed=0)
    assert_same(got, _select_reference(far, 1.0, None, torch.arange(5), torch.zeros(1, dtype=torch.int64))[:5])
    assert got.log_Z_loo[0, 0] == pytest.approx(-690 + math.log1p(math.exp(-1)) - math.log(3), abs=1e-4)
    assert got.log_Z_loo[2, 3] == pytest.approx(-690 - math.log(3), abs=1e-4) and got.log_Z_loo[3, 0] == -math.inf


# --- a row's bits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 16, 50, 3000])
def test_a_rows_bits_are_its_own(k):
    """Whatever the number of rows, of threads, and the strides."""
    batch, length = 301, 130
    energy, seed, offset = torch.randn(batch, k) * 3, torch.arange(batch) * 7, torch.arange(batch)
    xt, x0 = torch.randint(9, (batch, length)), torch.randint(9, (batch, 3, length))
    index, open_time = torch.randint(3, (batch,)), torch.rand(batch, length)

    def results(i: slice, layout: str) -> list[torch.Tensor]:
        e, s, o = laid_out(energy[i], layout), laid_out(seed[i], layout), laid_out(offset[i], layout)
        ancestors = [resample(-e, scheme, seed=s, offset=o) for scheme in SCHEMES]
        xs = reverse_step(
            laid_out(xt[i], layout), laid_out(x0[i], layout), laid_out(index[i], layout), laid_out(open_time[i], layout), 0.5
        )
        return [*select_candidate(e, temperature=0.7, log_correction=e, seed=s, offset=o), *ancestors, xs]

    def bits(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [t.view(torch.int32) if t.dtype == torch.float32 else t for t in tensors]

    whole = bits(results(slice(None), "shifted"))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for layout in ("shifted", "transposed", "gaps"):
                assert all(map(torch.equal, bits(results(slice(None), layout)), whole))
    finally:
        torch.set_num_threads(before)
    for i in (slice(0, 1), slice(17, 20), slice(300, 301)):
        assert all(torch.equal(a, b[i]) for a, b in zip(bits(results(i, "gaps")), whole, strict=True))


def test_expanded_rows():
    """Strides of 0."""
    energy, seed = torch.tensor([[0.3, -1.0, 2.0]]), torch.arange(6)
    for wide in (energy.expand(6, 3), energy[:, :1].expand(6, 3)):
        for got, want in zip(select_candidate(wide, seed=seed), select_candidate(wide.contiguous(), seed=seed), strict=True):
            assert torch.equal(got, want)
        assert torch.equal(resample(wide, "stratified", seed=seed), resample(wide.contiguous(), "stratified", seed=seed))
    xt, x0 = torch.arange(4).expand(6, 4), torch.arange(8).view(1, 2, 4).expand(6, 2, 4)
    index, open_time = torch.tensor([1]).expand(6), torch.tensor([0.1, 0.9, 0.5, 0.2], dtype=torch.float64).expand(6, 4)
    assert reverse_step(xt, x0, index, open_time, 0.5).tolist() == [[0, 5, 6, 3]] * 6
