"""Compacted rows and fixed shapes: the same draws, no more work than is needed, and nothing that waits for a device."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from edlm.models import DiT
from edlm.models.dit import DiTConfig
from edlm.ops import deferred_checks
from edlm.samplers import generate
from edlm.samplers.choose import Scorer
from edlm.samplers.ends import Ends
from edlm.samplers.propose import Proposal
from edlm.samplers.reverse import Move, Names, Reverse
from edlm.samplers.stages import Stages
from exact import TabularDenoiser


class Split:
    """A denoiser in two halves; it records which rows the head was asked for."""

    def __init__(self, inner):
        self.inner, self.mask_token_id, self.vocab_size, self.rows = inner, inner.mask_token_id, inner.vocab_size, []

    def hidden(self, xt, t):
        return self.inner(xt, t)

    def head(self, hidden):
        self.rows.append(len(hidden))
        return hidden

    def __call__(self, xt, t):
        raise AssertionError("a denoiser with hidden and head is not asked for all logits")


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
    for network, compact in ((denoiser, False), (Split(denoiser), True), (Split(denoiser), False)):
        other = generate(network, compact=compact, **common)
        assert torch.equal(first.tokens, other.tokens) and torch.equal(first.history, other.history)
        assert first.nfe == other.nfe and torch.equal(first.num_candidates, other.num_candidates)
        for name in ("ess", "log_Z", "energy", "step_times"):
            assert torch.equal(getattr(first, name).nan_to_num(), getattr(other, name).nan_to_num())
    if variant == {"num_candidates": 1}:
        plain = generate(denoiser, **{**common, "energy": None, "num_candidates": None})
        never = generate(denoiser, **{**common, "num_candidates": 8, "window": (1, 1)})
        assert torch.equal(first.tokens, plain.tokens) and torch.equal(first.tokens, never.tokens)


def test_the_head_sees_what_is_needed(universe, denoiser, energy):
    """Masked rows of sequences in the window, opening rows of the others, and nothing of those in which nothing opens."""
    split = Split(denoiser)
    out = generate(
        split, batch_size=50, length=3, sampler="first_hitting", seed=14, energy=energy, num_candidates=3, window=(0.5, 1),
        return_history=True,
    )  # fmt: skip
    before = out.history[:-1] == universe.mask
    opened = before & (out.history[1:] != universe.mask)
    assert split.rows == torch.where((out.step_times > 0.5)[..., None], before, opened).sum((1, 2)).tolist()


def test_candidates_are_allocated_once(universe, denoiser):
    """The buffers of the largest step serve all others."""
    proposal = Proposal(Split(denoiser), True, temperature=1.0, top_k=None, top_p=None, min_p=None)
    xt = torch.full((8, 3), universe.mask)
    seed = torch.arange(8)
    places = set()
    for rows in (8, 3, 8, 1):
        drawn = proposal.draw(
            denoiser(xt[:rows], None), xt[:rows], torch.ones(rows, 3, dtype=torch.bool), 5, seed=seed[:rows], offset=seed[:rows]
        )
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
    scorer = Scorer(energy_of, 3, None, 1.0, True, None, 1, stages)
    reverse = Reverse(network, proposal, scorer, stages, compact=False)
    names = Names("step 0", torch.arange(batch), (0, length), torch.ones(batch, length, dtype=torch.bool))
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_captured_graph_gives_the_same_tokens():
    torch.manual_seed(0)
    config = DiTConfig(vocab_size=100, mask_token_id=99, dim=64, num_layers=2, num_heads=2)
    model = DiT(config).cuda().eval()
    torch.nn.init.normal_(model.linear.weight, std=0.3)
    common = {
        "batch_size": 4, "length": 32, "steps": 16, "energy": energy_of, "num_candidates": 4, "window": (0.5, 1), "seed": 3,
        "device": "cuda",
    }  # fmt: skip
    fixed = generate(model, compact=False, **common)
    graph = generate(model, compact=False, cuda_graph=True, **common)
    assert torch.equal(fixed.tokens, graph.tokens) and fixed.energy_nfe == graph.energy_nfe
    compacted = generate(model, **common)
    assert (compacted.tokens == fixed.tokens).double().mean() > 0.9


def test_a_real_network_is_the_same_to_rounding():
    """The share of equal tokens, compact against not: shapes of matrix products differ, and a rare token with them."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(vocab_size=300, mask_token_id=299, dim=48, num_layers=2, num_heads=3)).eval()
    torch.nn.init.normal_(model.linear.weight, std=0.3)
    common = {
        "batch_size": 6, "length": 40, "steps": 20, "energy": energy_of, "num_candidates": 4, "window": (0.5, 1), "seed": 3,
    }  # fmt: skip
    compact, fixed = generate(model, **common), generate(model, compact=False, **common)
    assert (compact.tokens == fixed.tokens).all(1).double().mean() >= 0.5
    assert (compact.tokens == fixed.tokens).double().mean() > 0.8
    one = generate(model, **{**common, "batch_size": 1, "seed": 5})
    assert (one.tokens[0] == compact.tokens[2]).double().mean() > 0.8


def test_prepare_tells_what_comes(universe, denoiser):
    """A denoiser that keeps something a sequence learns on the host which sequences come, and what of them is masked."""

    class Told(TabularDenoiser):
        told = None

        def prepare(self, rows, columns, masked):
            self.told = (rows, columns, masked)

        def __call__(self, xt, t):
            rows, columns, masked = self.told
            assert len(rows) == len(xt) and columns == (0, 3) and torch.equal(masked, xt == universe.mask)
            return super().__call__(xt, t)

    told = Told(universe)
    out = generate(told, batch_size=40, length=3, steps=5, seed=4)
    assert torch.equal(out.tokens, generate(denoiser, batch_size=40, length=3, steps=5, seed=4).tokens)
