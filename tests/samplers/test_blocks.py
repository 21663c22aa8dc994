"""Blocks, contexts, lengths and stop tokens: laws by enumeration, and that nobody sees what he should not.

Every G-test has a fixed seed and a false-alarm rate of 1e-6.
"""

from __future__ import annotations

import pytest
import torch
from edlm.samplers import generate
from exact import TabularDenoiser, TabularEnergy, Universe, g_test, law_of_states, pick_law, residual_energy, transition

N = 40_000


@pytest.fixture(scope="module")
def four():
    return Universe(num_tokens=2, length=4, seed=5)


class ByWidth:
    """Perfect denoisers of universes of several lengths, by how many columns they are shown; it records these."""

    def __init__(self, *universes):
        self.tables = {u.length: TabularDenoiser(u) for u in universes}
        self.mask_token_id, self.vocab_size, self.widths = universes[0].mask, universes[0].num_tokens + 1, []

    def __call__(self, xt, t):
        self.widths.append(xt.shape[1])
        return self.tables[xt.shape[1]](xt, t)


def counts(universe, tokens):
    assert (tokens != universe.mask).all()
    return torch.bincount(universe.index(tokens), minlength=len(universe.q)).double()


@pytest.mark.parametrize(("sampler", "steps", "k"), [("ancestral", 2, 1), ("ancestral", 2, 2), ("first_hitting", None, 2)])
def test_law_of_blocks_that_see_everything(four, sampler, steps, k):
    """Two blocks of two: the second starts when the first is complete, on a grid of its own; energies see the masked rest completed."""
    denoiser, energy = TabularDenoiser(four), TabularEnergy(four, residual_energy(four))

    def completion(xt):
        return pick_law(four.product(xt), residual_energy(four)(xt), k)

    m = four.mask
    for start in ((m, m, m, m), (m, 1, m, m)):
        states = {start: 1.0}
        for block in ((0, 1), (2, 3)):
            if sampler == "ancestral":
                for i in range(steps):
                    states = transition(four, states, completion, 1 / (steps - i), among=block)
            else:  # a random order within the block
                orders = [[i for i in order if start[i] == m] for order in (block, block[::-1])]
                mixed = {}
                for order in orders:
                    after = states
                    for i in order:
                        after = transition(four, after, completion, 1.0, among=(i,))
                    for state, mass in after.items():
                        mixed[state] = mixed.get(state, 0.0) + mass / 2
                states = mixed
        out = generate(
            denoiser, prompt=torch.tensor([start]).repeat(N, 1), sampler=sampler, steps=steps, energy=energy if k > 1 else None,
            num_candidates=k, window=(0, 1), seed=51, block_length=2,
        )  # fmt: skip
        assert g_test(counts(four, out.tokens), law_of_states(four, states)) > 1e-6


def test_law_beyond_the_context(four):
    """Four tokens from a denoiser that knows two: the second block is drawn given its neighbour alone (context 3 of blocks of 1)."""
    two, three = Universe(num_tokens=2, length=2, seed=6), Universe(num_tokens=2, length=3, seed=7)
    denoiser = ByWidth(two, three)
    law = torch.zeros(16, dtype=torch.float64)
    out = generate(denoiser, batch_size=N, length=4, sampler="first_hitting", block_length=1, context_length=2, seed=52)
    assert set(denoiser.widths) == {2}
    for row, x in enumerate(four.sequences.tolist()):
        m = two.mask
        p = float(two.marginals((m, m))[0, x[0]])
        for i in range(1, 4):  # each block sees the one before it, and itself
            p *= float(two.marginals((x[i - 1], m))[1, x[i]])
        law[row] = p
    assert abs(float(law.sum()) - 1) < 1e-12
    assert g_test(counts(four, out.tokens), law) > 1e-6
    wider = generate(denoiser, batch_size=50, length=4, sampler="first_hitting", block_length=1, context_length=3, seed=52)
    assert set(denoiser.widths) == {2, 3} and (wider.tokens != two.mask).all()


def test_max_length_is_the_context(four):
    two = Universe(num_tokens=2, length=2, seed=6)
    denoiser = ByWidth(two)
    denoiser.max_length = 2
    with pytest.raises(ValueError, match=r"at most 2 tokens \(max_length\), got 4 tokens .* block_length=1, context_length=2"):
        generate(denoiser, batch_size=1, length=4, steps=2)
    with pytest.raises(ValueError, match=r"at most 2 tokens .* got context_length = 3"):
        generate(denoiser, batch_size=1, length=4, steps=2, block_length=1, context_length=3)
    with pytest.raises(ValueError, match=r"context_length: a network sees 2 of 4 tokens only where they are decoded in blocks"):
        generate(denoiser, batch_size=1, length=4, steps=2, context_length=2)
    with pytest.raises(
        ValueError, match=r"context_length: expected at least the 2 columns of a block, got 1; take block_length <= 1"
    ):
        generate(denoiser, batch_size=1, length=4, steps=2, block_length=2, context_length=1)
    a = generate(denoiser, batch_size=20, length=4, steps=2, block_length=1, seed=1)
    b = generate(denoiser, batch_size=20, length=4, steps=2, block_length=1, context_length=2, seed=1)
    assert torch.equal(a.tokens, b.tokens)


@pytest.mark.parametrize("sampler", ["ancestral", "first_hitting", "remasking", "left_to_right"])
@pytest.mark.parametrize("extra", [{}, {"block_length": 2}, {"num_particles": 3}], ids=str)
def test_lengths(sampler, extra):
    """Each sequence is what it would be alone at its own length, and no network sees padding."""
    universes = [Universe(num_tokens=2, length=n, seed=n) for n in (2, 3, 4)]
    denoiser = ByWidth(*universes)
    tables = {u.length: TabularEnergy(u, residual_energy(u)) for u in universes}

    def energy(x0, xt, t, log_p):
        return tables[xt.shape[1]](x0, xt, t, log_p)

    m, pad = 2, 1
    prompt = torch.tensor([(m, m, m, m), (m, m, 0, 0), (1, m, m, m), (m, m, m, m), (m, 0, m, 1)])
    lengths = torch.tensor([4, 2, 3, 3, 3])
    seeds = torch.tensor([3, 4, 99, 6, 7])
    common = {
        "sampler": sampler, "steps": 3 if sampler in ("ancestral", "remasking") else None, "energy": energy, "num_candidates": 2,
        "window": (0, 1), **extra,
    }  # fmt: skip
    out = generate(denoiser, prompt=prompt, lengths=lengths, pad_token_id=pad, seed=seeds, **common)
    assert torch.equal(out.lengths, lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = generate(denoiser, prompt=prompt[b : b + 1, :n], seed=seeds[b : b + 1], **common)
        assert torch.equal(out.tokens[b, :n], alone.tokens[0])
        assert (out.tokens[b, n:] == pad).all()


@pytest.mark.parametrize("sampler", ["ancestral", "first_hitting", "remasking", "left_to_right"])
@pytest.mark.parametrize("block_length", [None, 2])
def test_stop_token(four, sampler, block_length):
    """Up to the first stop token that is generated the tokens are those of a run without one; behind it is padding; fewer calls."""
    denoiser = TabularDenoiser(four)
    common = {
        "prompt": torch.tensor([(2, 2, 2, 2), (1, 2, 2, 2), (2, 1, 2, 2)]).repeat(200, 1), "sampler": sampler,
        "steps": 4 if sampler in ("ancestral", "remasking") else None, "seed": 53, "block_length": block_length,
    }  # fmt: skip
    whole = generate(denoiser, **common)
    out = generate(denoiser, stop_token_id=1, pad_token_id=0, **common)
    drawn = (whole.tokens == 1) & (common["prompt"] == 2)  # a prompt's stop tokens end nothing
    ends = torch.where(drawn.any(1), drawn.long().argmax(1) + 1, 4)
    assert torch.equal(out.lengths, ends)
    kept = torch.arange(4) < ends[:, None]
    assert torch.equal(out.tokens[kept], whole.tokens[kept])
    assert (out.tokens[~kept] == 0).all()
    if sampler != "remasking" or block_length:  # there what is shown may change again until the block ends
        assert int((~out.step_times.isnan()).sum()) < int((~whole.step_times.isnan()).sum())
    assert ((ends == 4).any()) and (ends < 4).any()
    default = generate(denoiser, stop_token_id=1, **common)
    assert torch.equal(default.tokens, torch.where(torch.arange(4) < ends[:, None], out.tokens, 1))


def test_an_end_is_seen_where_the_last_step_of_its_block_is_left_out(four):
    """With remasking a sequence ends at a block's end, whoever else is in the batch: the tables are those of the sequence alone."""
    denoiser = TabularDenoiser(four)
    common = {"length": 4, "sampler": "remasking", "steps": 6, "remask_prob": 0.5, "stop_token_id": 1, "block_length": 2}
    out = generate(denoiser, batch_size=60, seed=54, **common)
    for b in range(60):
        alone = generate(denoiser, batch_size=1, seed=54 + b, **common)
        here = ~out.step_times[:, b].isnan()
        assert torch.equal(out.step_times[here, b], alone.step_times[:, 0])
        assert torch.equal(out.tokens[b], alone.tokens[0])


def test_the_loop_ends_with_the_last_sequence(four):
    looked = []
    denoiser = TabularDenoiser(four)
    out = generate(
        denoiser, batch_size=3, length=4, sampler="left_to_right", stop_token_id=1, temperature=0.0, on_step=looked.append, seed=1
    )
    assert out.nfe == len(looked) == int(out.lengths.max())


def test_bad_ends(four):
    denoiser = TabularDenoiser(four)
    full = {"batch_size": 2, "length": 4, "steps": 2}
    for change, message in (
        ({"stop_token_id": 3}, r"stop_token_id: expected an id of the denoiser's vocabulary, 0 .. 2, got 3"),
        ({"stop_token_id": -1}, r"stop_token_id: expected an id .* got -1"),
        ({"stop_token_id": 2}, r"stop_token_id: expected a token that can be drawn, got the mask \(2\)"),
        ({"pad_token_id": 7}, r"pad_token_id: expected an id .* got 7"),
        ({"lengths": torch.tensor([4, 3])}, r"pad_token_id: sequences of several lengths need a token to fill up with, got None"),
        ({"lengths": torch.tensor([4, 5]), "pad_token_id": 0}, r"lengths: expected numbers of tokens in 1 .. 4, got 5"),
        (
            {"lengths": torch.tensor([4]), "pad_token_id": 0},
            r"lengths: expected an int64 tensor \[B\] = \[2\], got torch.int64 \[1\]",
        ),
        (
            {"prompt": torch.tensor([(0, 1, 2, 2)]), "batch_size": None, "lengths": torch.tensor([2]), "pad_token_id": 0},
            r"prompt, lengths: expected a mask within the length of some sequence, got none",
        ),
        ({"block_length": 0}, r"block_length: expected an int >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(denoiser, **(full | change))
