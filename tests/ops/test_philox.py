"""The RNG contract: Random123's known answers, host C++ = reference, and what a draw may depend on."""

from __future__ import annotations

import pytest
import torch
from edlm.ops._philox import Purpose, expand_offset, expand_seed, philox4x32, philox_uniform
from exact import g_test

# kat_vectors of the Random123 distribution, "philox4x32 10": counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, words)) == expected
    build = pytest.importorskip("edlm._build", reason="nothing is compiled")
    assert tuple(build.philox4x32(counter, key)) == expected


def test_host_equals_reference_on_random_words():
    build = pytest.importorskip("edlm._build", reason="nothing is compiled")
    words = torch.randint(0, 2**32, (200, 6))
    ours = torch.stack(philox4x32(tuple(words[:, :4].T), tuple(words[:, 4:].T)), 1)
    assert [list(build.philox4x32(row[:4], row[4:])) for row in words.tolist()] == ours.tolist()


def test_host_uniforms_are_the_references_to_the_last_bit():
    """All 53 bits of both, for negative seeds and for words that wrap at 2**32 as well."""
    build = pytest.importorskip("edlm._build", reason="nothing is compiled")
    for seed, position, candidate, offset in [
        (0, 0, 0, 0),
        (-1, 5, 7, 9),
        (2**62 + 3, 2**32 + 5, 7, 2**33 + 1),
        (12345, 1, 2, 3),
    ]:
        for purpose in Purpose:
            u = philox_uniform(torch.tensor(seed), position=position, candidate=candidate, offset=offset, purpose=purpose)
            assert build.philox_uniform(seed, position, candidate, offset, int(purpose)) == tuple(map(float, u))


def test_uniforms_are_in_range_and_uniform():
    u = torch.stack(philox_uniform(torch.tensor(7), position=torch.arange(100_000), purpose=Purpose.TOKEN))
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    for row in u:  # false alarm 1e-6 each, fixed seed
        assert g_test(torch.histc(row, 64, 0, 1), torch.full((64,), 1 / 64)) > 1e-6
    pairs = torch.histc((u[0] * 8).floor() * 8 + (u[1] * 8).floor(), 64, 0, 63.999)
    assert g_test(pairs, torch.full((64,), 1 / 64)) > 1e-6


@pytest.mark.parametrize("what", ["seed", "position", "candidate", "offset", "purpose"])
def test_neighbours_are_independent(what):
    """Uniforms at neighbouring counters and keys: 8 x 8 contingency table, G-test, false alarm 1e-6."""
    index = torch.arange(50_000)
    base = {"seed": torch.tensor(3), "position": index, "candidate": 0, "offset": 0, "purpose": Purpose.TOKEN}
    if what in ("seed", "candidate", "offset"):
        other = base | {what: base[what] + 1}
    elif what == "position":
        other = base | {"position": index + 1}
    else:
        other = base | {"purpose": Purpose.OPEN}
    a, b = (philox_uniform(c.pop("seed"), **c)[0] for c in (dict(base), dict(other)))
    table = torch.histc((a * 8).floor() * 8 + (b * 8).floor(), 64, 0, 63.999)
    assert g_test(table, torch.full((64,), 1 / 64)) > 1e-6


def test_seeds_are_64_bit_and_consecutive():
    assert expand_seed(5, 3).tolist() == [5, 6, 7]
    low, high = (philox_uniform(torch.tensor(s), purpose=Purpose.TOKEN)[0] for s in (1, 1 + 2**32))
    assert low != high
    assert expand_seed(-1, 2).tolist() == [-1, 0]


def test_seeds_of_a_batch_wrap():
    assert expand_seed(-2, 4).tolist() == [-2, -1, 0, 1]
    for n in (2, 3, 4):
        assert expand_seed(2**63 - 3, n).tolist() == [2**63 - 3, 2**63 - 2, 2**63 - 1, -(2**63)][:n]


@pytest.mark.parametrize("seed", [1.5, True, None, 2**63, torch.tensor([1.0, 2.0]), torch.tensor([1, 2, 3])])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match=r"seed: expected"):
        expand_seed(seed, 2)


def test_bad_offset():
    with pytest.raises(ValueError, match=r"offset: expected .* got torch.int64 \[3\]"):
        expand_offset("op", torch.tensor([1, 2, 3]), 2, torch.device("cpu"))
