"""Compacted rows and fixed shapes: the same draws, no more work than is needed, and nothing that waits for a device."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
from edlm.models import DiT
from edlm.models.dit import DiTConfig
from edlm.ops import deferred_checks
from edlm.samplers import generate
from edlm.samplers.choose import Scorer
from edlm.samplers.ends import Ends
from edlm.samplers.move import Move, Names
from edlm.samplers.propose import Proposal
from edlm.samplers.reverse import Reverse
from edlm.samplers.stages import Stages
from exact import SplitDenoiser, TabularDenoiser

SAMPLERS = ["ancestral", "first_hitting", "remasking", "left_to_right"]
VARIANTS = [
    {"num_candidates": 1}, {"num_candidates": 3}, {"num_candidates": 3, "top_k": 2, "temperature": 1.3, "min_p": 0.0},
    {"num_candidates": 2, "num_particles": 3}, {"num_candidates": 2, "block_length": 2}, {"num_candidates": 2, "top_p": 1.0},
]  # fmt: skip


@pytest.mark.parametrize(("sampler", "variant"), list(itertools.product(SAMPLERS, VARIANTS)), ids=str)
def test_compaction_changes_no_bit(universe, denoiser, energy, sampler, variant):
    """With and without, in halves or whole: one result. Among them K = 1, which is the plain sampler."""
    m = universe.mask
    prompt = torch.tensor([(m, m, m), (1, m, m), (m, m, 2)]).repeat(30, 1)
    common = {
        "prompt": prompt, "sampler": sampler, "steps": 4 if sampler in ("ancestral", "remasking") else None, "seed": 81,
        "window": (0.3, 1), "energy": energy, "return_history": True, **variant,
    }  # fmt: skip
    first = generate(denoiser, **common)
    for network, compact in ((denoiser, False), (SplitDenoiser(denoiser), True), (SplitDenoiser(denoiser), False)):
        other = generate(network, compact=compact, **common)
        assert torch.equal(first.tokens, other.tokens) and torch.equal(first.history, other.history)
        assert first.nfe == other.nfe and torch.equal(first.num_candidates, other.num_candidates)
        for name in ("ess", "log_Z", "energy", "step_times"):
            assert torch.equal(getattr(first, name).nan_to_num(), getattr(other, name).nan_to_num())
    if variant == {"num_candidates": 1}:
        plain = generate(denoiser, **{**common, "energy": None, "num_candidates": None})
        never = generate(denoiser, **{**common, "num_candidates": 8, "window": (1, 1)})
        assert torch.equal(first.tokens, plain.tokens) and torch.equal(first.tokens, never.tokens)


def test_candidates_are_allocated_once(universe, denoiser):
    """The buffers of the largest step serve all others."""
    proposal = Proposal(SplitDenoiser(denoiser), True, temperature=1.0, top_k=None, top_p=None, min_p=None)
    xt = torch.full((8, 3), universe.mask)
    places = set()
    for rows in (8, 3, 8, 1):
        part, ones = xt[:rows], torch.ones(rows, 3)
        move = Move(part, ones[:, 0], torch.arange(rows), torch.arange(rows), ones, ones.bool(), ones[:, 0].bool())
        drawn = proposal.draw(denoiser(part, None), move, 5, Names(0, torch.arange(rows), (0, 3), ones.bool()))
        places.add((drawn.tokens.data_ptr(), drawn.log_probs.data_ptr()))
        assert drawn.tokens.is_contiguous() and (drawn.tokens != universe.mask).all() and (drawn.log_probs < 0).any()
    assert len(places) == 1


class Uniform:
    """Logits from the device's own numbers, so that a fake device has something to compute."""

    mask_token_id, vocab_size = 7, 8

    def __call__(self, xt, t):
        return torch.nn.functional.one_hot(xt, 8).float() + t[:, None, None]


def energy_of(x0, xt, t, log_p):
    return -log_p.sum(-1) + (x0 == xt[:, None]).sum(-1)


def network_on_meta(halves):
    if not halves:
        return Uniform()
    return DiT(DiTConfig(vocab_size=8, mask_token_id=7, dim=16, num_layers=1, num_heads=2)).to("meta").eval()


class Done(Exception):
    """Ends a ``deferred_checks`` without its reading what the ops reported."""


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("scored", [False, True])
def test_a_fixed_shape_reads_nothing_back(halves, scored):
    """A whole step with K candidates runs on the meta device, where every value that is read, and every shape that depends on one, is
    an error. This stands in for the capture of a CUDA graph, which needs a GPU (below)."""
    meta, batch, length = torch.device("meta"), 4, 6
    network = network_on_meta(halves)
    move = Move(
        xt=torch.full((batch, length), 7, device=meta),
        t=torch.ones(batch, device=meta),
        seed=torch.arange(batch, device=meta),
        offset=torch.arange(batch, device=meta),
        opening=torch.ones(batch, length, device=meta),
        active=torch.ones(batch, length, dtype=torch.bool, device=meta),
        scored=torch.ones(batch, dtype=torch.bool, device=meta),
    )
    stages = Stages(meta)
    proposal = Proposal(network, False, temperature=0.9, top_k=5, top_p=None, min_p=None)
    scorer = Scorer(energy_of, 3, None, 1.0, True, None, stages)
    reverse = Reverse(network, proposal, scorer, stages, compact=False)
    names = Names(0, torch.arange(batch), (0, length), torch.ones(batch, length, dtype=torch.bool))
    with contextlib.suppress(Done), torch.no_grad(), deferred_checks():
        xs, choice = reverse(move, names, scored)
        raise Done
    assert xs.shape == (batch, length) and xs.device == meta and (choice is not None) is scored


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "variant",
    [
        {}, {"top_p": 0.9}, {"num_particles": 3}, {"block_length": 2, "stop_token_id": 0, "num_particles": 2}, {"compact": False},
        {"lengths": torch.tensor([6, 4, 6, 3]), "pad_token_id": 0}, {"return_history": True, "num_candidates": 1},
    ],
    ids=str,
)  # fmt: skip
def test_the_loop_waits_for_no_device(monkeypatch, halves, sampler, variant):
    """The whole loop on the meta device: nothing is read from the first step to the last. What is read at the end is put aside."""
    monkeypatch.setattr("edlm.ops._library.Reports.check", lambda self: None)
    monkeypatch.setattr(Scorer, "read", lambda self: None)
    monkeypatch.setattr(Ends, "cut", lambda self, xt, pad: (xt, self.lengths))
    out = generate(
        network_on_meta(halves),
        **{
            "batch_size": 4, "length": 6, "sampler": sampler, "steps": 5 if sampler in ("ancestral", "remasking") else None,
            "energy": energy_of, "num_candidates": 3, "window": (0.4, 1), "device": "meta", **variant,
        },
    )  # fmt: skip
    assert out.tokens.device.type == "meta" and out.nfe >= 1
    if variant.get("num_candidates") != 1:
        assert out.energy_nfe >= 1


def test_a_real_network_is_the_same_to_rounding():
    """The share of equal tokens, compact against not: shapes of matrix products differ, and a rare token with them."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(vocab_size=300, mask_token_id=299, dim=48, num_layers=2, num_heads=3)).eval()
    torch.nn.init.normal_(model.linear.weight, std=0.3)
    common = {
        "batch_size": 6, "length": 40, "steps": 20, "energy": energy_of, "num_candidates": 4, "window": (0.5, 1), "seed": 3,
    }  # fmt: skip
    compact, fixed = generate(model, **common), generate(model, compact=False, **common)
    assert (compact.tokens == fixed.tokens).double().mean() > 0.98
    one = generate(model, **{**common, "batch_size": 1, "seed": 5})
    assert (one.tokens[0] == compact.tokens[2]).double().mean() > 0.98


def test_prepare_tells_what_comes(universe, denoiser):
    """A denoiser that keeps something a sequence learns on the host which sequences come, and what of them is masked."""

    class Told(TabularDenoiser):
        told = None

        def prepare(self, number, rows, columns, masked):
            self.told = (number, rows, columns, masked)

        def __call__(self, xt, t):
            number, rows, columns, masked = self.told
            assert len(rows) == len(xt) and columns == (0, 3) and torch.equal(masked, xt == universe.mask)
            assert number == self.calls
            return super().__call__(xt, t)

    told = Told(universe)
    out = generate(told, batch_size=40, length=3, steps=5, seed=4)
    assert torch.equal(out.tokens, generate(denoiser, batch_size=40, length=3, steps=5, seed=4).tokens)
    with pytest.raises(ValueError, match=r"compact: expected True with a denoiser that keeps something a sequence"):
        generate(told, batch_size=4, length=3, steps=5, compact=False)
    with pytest.raises(ValueError, match=r"num_particles: expected 1 with a denoiser that keeps something a sequence .* got 2"):
        generate(told, batch_size=4, length=3, steps=5, energy=energy_of, num_particles=2)


def test_a_fixed_shape_does_not_mind_who_is_not_scored(universe, denoiser, energy):
    """An energy that has no value for a complete sequence: it is asked of all, and heard of those in the window."""

    def mean(x0, xt, t, log_p):
        masks = (xt == universe.mask).sum(1)
        return energy(x0, xt, t, log_p) / torch.where(masks > 0, masks, math.nan)[:, None]

    prompt = torch.tensor([(3, 3, 3), (1, 3, 3), (0, 1, 2), (3, 3, 2)]).repeat(20, 1)
    common = {"prompt": prompt, "steps": 4, "energy": mean, "num_candidates": 3, "window": (0.3, 1), "seed": 82}
    compact, fixed = generate(denoiser, **common), generate(denoiser, compact=False, **common)
    assert torch.equal(compact.tokens, fixed.tokens) and torch.equal(compact.ess.nan_to_num(), fixed.ess.nan_to_num())


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_wrong_logits_are_named(monkeypatch, universe, denoiser, split, bad, compact):
    """Sequence and position of the batch, and the step; the first sequences are complete, so that rows of a step are others."""

    class Bad:
        mask_token_id, vocab_size = 3, 4

        def __call__(self, xt, t):
            logits = denoiser(xt, t)
            logits[(xt[:, 0] == 2)] = bad
            return logits

    prompt = torch.tensor([(0, 1, 2), (1, 1, 1), (1, 3, 0), (2, 0, 3), (3, 3, 3)])
    with pytest.raises(ValueError, match=r"denoiser: expected logits .* got others at position 2 of sequence 3 in step 0$"):
        generate(SplitDenoiser(Bad()) if split else Bad(), prompt=prompt, sampler="first_hitting", compact=compact)
    monkeypatch.setattr("edlm.samplers.propose._HEAD_BYTES", 100)  # two sequences, or six rows, at a time
    with pytest.raises(ValueError, match=r"got others at position 2 of sequence 3 in step 0$"):
        generate(SplitDenoiser(Bad()), prompt=prompt, sampler="first_hitting", compact=compact)


def test_wrong_shapes_are_named(denoiser):
    class Halves:
        mask_token_id, vocab_size, wide, narrow = 3, 4, 4, False

        def hidden(self, xt, t):
            return torch.zeros(*xt.shape, 2)[:, : xt.shape[1] - self.narrow]

        def head(self, rows):
            return torch.zeros(len(rows), self.wide)

    full = {"batch_size": 2, "length": 3, "steps": 1}
    network = Halves()
    for compact in (True, False):
        for network.wide in (3, 6):
            with pytest.raises(
                ValueError, match=rf"denoiser: expected logits \[N, V\] = \[6, 4\] of its head, got \[6, {network.wide}\]"
            ):
                generate(network, compact=compact, **full)
    network.narrow = True
    with pytest.raises(ValueError, match=r"denoiser: expected hidden \[B, L, D\] = \[2, 3, D\], got \[2, 2, 2\]"):
        generate(network, **full)
