"""Autoregressive sampling against the enumerated joint, with and without a cache; prompts, lengths and stop tokens."""

from __future__ import annotations

import pytest
import torch
from edlm.models import CausalLM
from edlm.models.causal_lm import CausalLMConfig
from edlm.samplers import NextToken, generate, sample_autoregressive
from exact import g_test

N = 40_000


class TabularLogits:
    """p(x_i | x_<i) of an enumerated joint, as logits [N, L, V]; what stands from i on is never read."""

    def __init__(self, universe):
        self.universe, self.vocab_size = universe, universe.num_tokens

    def __call__(self, x0):
        columns = []
        for i in range(x0.shape[1]):
            same = (self.universe.sequences[None, :, :i] == x0[:, None, :i]).all(2).double() * self.universe.q
            onehot = torch.nn.functional.one_hot(self.universe.sequences[:, i], self.vocab_size).double()
            columns.append((same @ onehot).log())
        return torch.stack(columns, 1).float()


class CachedLogits(TabularLogits):
    """The same behind the cache's interface: the cache is what was read. It counts the inputs that it is given."""

    bos_token_id = 99

    def __init__(self, universe):
        super().__init__(universe)
        self.inputs = 0

    class Cache:
        def __init__(self, read):
            self.read = read

        def rows(self, index):
            return CachedLogits.Cache(self.read[index])

    def extend(self, inputs, cache=None, *, keep=True):
        self.inputs += inputs.numel()
        read = inputs if cache is None else torch.cat([cache.read, inputs], 1)
        assert (read[:, 0] == self.bos_token_id).all() and (read[:, 1:] < self.vocab_size).all()
        # Row m predicts the token behind input m.
        padded = torch.cat([read[:, 1:], torch.zeros_like(read[:, :1])], 1)
        return super().__call__(padded)[:, -inputs.shape[1] :], CachedLogits.Cache(read)

    def head(self, rows):
        return rows


def test_the_law_is_the_joint(universe):
    cached = CachedLogits(universe)
    out = sample_autoregressive(cached, batch_size=N, length=3, seed=71)
    assert g_test(torch.bincount(universe.index(out.tokens), minlength=27).double(), universe.q) > 1e-6
    assert out.nfe == 3 and cached.inputs == 3 * N  # BOS and all but the last token, once each
    plain = sample_autoregressive(TabularLogits(universe), batch_size=N, length=3, seed=71)
    assert torch.equal(plain.tokens, out.tokens)


def test_prompts_of_several_lengths_and_gaps(universe):
    """Each row follows its conditional law and does not depend on the others; tokens behind a gap are read once it is passed."""
    m = 3
    prompts = [(1, m, m), (m, m, m), (0, 2, m), (m, 1, m), (m, m, 0)]
    prompt = torch.tensor(prompts).repeat(N // 5, 1)
    out = sample_autoregressive(CachedLogits(universe), prompt=prompt, seed=72)
    joint = universe.conditionals(universe.q)  # [S, L]
    for row, start in enumerate(prompts):
        given = torch.tensor([token != m for token in start])
        law = torch.where(universe.agrees(start), joint[:, ~given].sum(1).exp(), 0.0)
        assert abs(float(law.sum()) - 1) < 1e-9
        assert g_test(torch.bincount(universe.index(out.tokens[row::5]), minlength=27).double(), law) > 1e-6
    some = [3, 0, 4]
    part = sample_autoregressive(CachedLogits(universe), prompt=prompt[some], seed=torch.tensor(some) + 72)
    assert torch.equal(part.tokens, out.tokens[some])
    assert torch.equal(sample_autoregressive(TabularLogits(universe), prompt=prompt, seed=72).tokens, out.tokens)


def test_stop_and_lengths(universe):
    cached = CachedLogits(universe)
    lengths = torch.tensor([3, 2, 3, 1] * 50)
    common = {"batch_size": 200, "length": 3, "seed": 73, "lengths": lengths, "pad_token_id": 0}
    whole = sample_autoregressive(TabularLogits(universe), **common)
    out = sample_autoregressive(cached, stop_token_id=2, **common)
    stops = (whole.tokens == 2) & (torch.arange(3) < lengths[:, None])
    ends = torch.where(stops.any(1), stops.long().argmax(1) + 1, lengths)
    assert torch.equal(out.lengths, ends)
    kept = torch.arange(3) < ends[:, None]
    assert torch.equal(out.tokens[kept], whole.tokens[kept]) and (out.tokens[~kept] == 0).all()
    assert (ends < lengths).any()


def test_a_real_model_with_and_without_its_cache():
    """Logits agree to float32 rounding, so nearly every token does; sequences of all lengths at once; train mode is restored."""
    torch.manual_seed(0)
    model = CausalLM(CausalLMConfig(vocab_size=50, bos_token_id=50, dim=32, num_layers=2, num_heads=2, dropout=0.5)).train()
    torch.nn.init.normal_(model.linear.weight, std=0.5)
    prompt = torch.full((32, 24), 50)
    prompt[:, :5] = torch.arange(5)
    prompt[::3, 5:9] = 7
    cached = sample_autoregressive(model, prompt=prompt, seed=74)
    assert model.training

    class Plain:
        vocab_size = 50

        def __call__(self, x0):
            return model(x0)

    model.eval()
    plain = sample_autoregressive(Plain(), prompt=prompt, seed=74)
    assert (cached.tokens == plain.tokens).all(1).double().mean() > 0.9
    assert (cached.tokens < 50).all() and torch.equal(cached.tokens[prompt != 50], prompt[prompt != 50])
    filtered = sample_autoregressive(model, prompt=prompt, seed=74, top_k=1)
    logits = model(filtered.tokens)
    drawn = prompt == 50
    assert (logits.argmax(-1) == filtered.tokens)[drawn].double().mean() > 0.99


def test_bad_models(universe):
    with pytest.raises(ValueError, match=r"causal_lm: expected vocab_size, and extend, head and bos_token_id or a call"):
        sample_autoregressive(object(), batch_size=1, length=3)
    with pytest.raises(ValueError, match=r"steps: it has no meaning for autoregressive sampling"):
        sample_autoregressive(TabularLogits(universe), batch_size=1, length=3, steps=4)
    with pytest.raises(ValueError, match=r"mask_token_id: expected an id of the model, or the one after them, 3; got 7"):
        NextToken(TabularLogits(universe), 7)


def test_the_cache_is_of_one_run(universe):
    """The same object again, after a run that was broken off, with another prompt: nothing of the old cache is used."""
    denoiser = NextToken(CachedLogits(universe))

    def stop(report):
        if report.number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(denoiser, batch_size=20, length=3, sampler="left_to_right", seed=76, on_step=stop)
    prompt = torch.tensor([(2, 3, 3)]).repeat(20, 1)
    for _ in range(2):
        again = generate(denoiser, prompt=prompt, sampler="left_to_right", seed=77)
        assert torch.equal(again.tokens, sample_autoregressive(CachedLogits(universe), prompt=prompt, seed=77).tokens)


def test_other_orders_are_refused(universe):
    for sampler, steps in (("ancestral", 3), ("first_hitting", None)):
        with pytest.raises(
            ValueError, match=r"NextToken knows one position of all sequences at a time: expected sampler='left_to_right'"
        ):
            generate(NextToken(CachedLogits(universe)), batch_size=20, length=3, sampler=sampler, steps=steps)
    with pytest.raises(ValueError, match="compact: expected True with a denoiser that keeps something a sequence"):
        generate(NextToken(CachedLogits(universe)), batch_size=2, length=3, sampler="left_to_right", compact=False)


def test_it_is_the_same_loop(universe):
    denoiser = NextToken(CachedLogits(universe))
    a = generate(denoiser, batch_size=20, length=3, sampler="left_to_right", seed=75, return_history=True)
    b = sample_autoregressive(CachedLogits(universe), batch_size=20, length=3, seed=75)
    assert torch.equal(a.tokens, b.tokens)
    assert [int((state != 3).sum(1).max()) for state in a.history] == [0, 1, 2, 3]
