"""Energies that read what candidates share once: the plain energies, whatever is masked and in whatever pieces; what goes through."""

from __future__ import annotations

import math

import pytest
import torch
from edlm.models import ARResidualEnergy, CausalLM, CausalLMConfig, ar_residual
from edlm.models.energy import PASS_TOKENS, group_by_prefix
from edlm.protocols import offers_cache
from exact import TabularCausalLM, Universe
from torch.profiler import ProfilerActivity, profile

V, MASK = 7, 7
both = pytest.mark.parametrize("carry_over", [False, True])


def network(**change):
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "bos_token_id": MASK, "dim": 32, "num_layers": 2, "num_heads": 2}
    causal = CausalLM(CausalLMConfig(**(sizes | change))).eval()
    for parameter in causal.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return causal


def candidates(masked, k=3, seed=0):
    """x0, xt, t, log_p for bool [B, L]."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = masked.shape
    xt = torch.randint(0, V, (batch, length), generator=generator).masked_fill(masked, MASK)
    x0 = torch.where(masked[:, None], torch.randint(0, V, (batch, k, length), generator=generator), xt[:, None])
    return x0, xt, torch.ones(batch), -torch.rand(batch, k, length, generator=generator) * masked[:, None]


def pattern(*rows):
    return torch.tensor([[letter == "m" for letter in row] for row in rows])


PATTERNS = {
    "all": pattern("mmmmmmmm", "mmmmmmmm"),
    "prompts": pattern("....mmmm", ".......m", "..mmmmmm", "....mmmm"),
    "suffix": pattern("mmmm....", "m.......", "mmmmmmm."),
    "infilling": pattern("..m.mm..", "m......m", "...m....", ".m.m.m.m"),
    "nothing_in_a_row": pattern("........", "..mm..m.", "........"),
    "nothing": pattern("........", "........"),
    "one_row_many_ends": pattern(".m......", ".m....m.", ".......m"),
}


def plain(causal, given, carry_over):
    x0, xt, _, log_p = given
    with torch.no_grad():
        return ar_residual(causal, x0, xt, log_p, carry_over=carry_over, mask_token_id=MASK)


@both
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("max_bytes", [1, 20_000, 60_000, 256 << 20])
def test_it_is_the_plain_energy(monkeypatch, name, carry_over, max_bytes):
    """At any budget, and with groups of their own (a pass costs nothing), one group (it costs everything), and as they come."""
    causal, masked = network(), PATTERNS[name]
    given = candidates(masked)
    expected = plain(causal, given, carry_over)
    energy = ARResidualEnergy(causal, carry_over, mask_token_id=MASK, max_bytes=max_bytes)
    for pass_tokens in (0, PASS_TOKENS["cpu"], 10**9):
        monkeypatch.setitem(PASS_TOKENS, "cpu", pass_tokens)
        got = energy.score(*given, masked=masked)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(energy(*given), got)  # it looks for masks itself on a CPU
    if name != "nothing":
        assert expected.std() > 0.1


@both
def test_random_masks(monkeypatch, carry_over):
    monkeypatch.setitem(PASS_TOKENS, "cpu", 3)
    causal = network()
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        batch, k, length = 1 + seed % 7, 1 + seed % 4, 1 + 3 * seed
        masked = torch.rand(batch, length, generator=generator) < torch.rand(batch, 1, generator=generator)
        given = candidates(masked, k, seed)
        energy = ARResidualEnergy(causal, carry_over, mask_token_id=MASK, max_bytes=[1, 50_000, 1 << 30][seed % 3])
        got = energy.score(*given, masked=masked)
        torch.testing.assert_close(got, plain(causal, given, carry_over), rtol=1e-5, atol=1e-4)


@both
def test_bfloat16(carry_over):
    """Bodies in bfloat16 differ in their last bits with shapes; scores are float32."""
    causal, masked = network().bfloat16(), PATTERNS["prompts"]
    given = candidates(masked)
    energy = ARResidualEnergy(causal, carry_over, mask_token_id=MASK)
    torch.testing.assert_close(energy(*given), plain(causal, given, carry_over), rtol=0.05, atol=0.5)


# --- what goes through the network ------------------------------------------------------------------------------------------------


class Counter:
    """Tokens that go through the transformer and rows that go through the head."""

    def __init__(self, causal, monkeypatch):
        self.tokens = self.passes = self.rows = 0
        causal.transformer.register_forward_pre_hook(self.count)
        from edlm.models import energy

        inner = energy.linear_log_probs

        def counted(hidden, *rest):
            self.rows += len(hidden)
            return inner(hidden, *rest)

        monkeypatch.setattr(energy, "linear_log_probs", counted)

    def count(self, _, inputs):
        self.tokens += inputs[0].shape[:2].numel()
        self.passes += 1


@both
def test_a_prompt_goes_through_once(monkeypatch, carry_over):
    """96 of 128 tokens given, K = 8: about a third of the tokens, and of the head's rows what is to be scored."""
    causal = network()
    counter = Counter(causal, monkeypatch)
    masked = torch.zeros(4, 128, dtype=torch.bool)
    masked[:, 96:] = True
    given = candidates(masked, 8)
    ARResidualEnergy(causal, carry_over, mask_token_id=MASK).score(*given, masked=masked)
    assert counter.tokens == 4 * (96 + 8 * 32) <= 4 * (96 + 8 * 33)
    assert counter.passes == 2
    assert counter.rows == 4 * 8 * 32 + (0 if carry_over else 4 * 96)


def test_nothing_behind_the_last_mask_with_carry_over(monkeypatch):
    causal = network()
    counter = Counter(causal, monkeypatch)
    masked = torch.zeros(3, 128, dtype=torch.bool)
    masked[0, 100] = masked[1, 100] = masked[1, 103] = True  # and nothing in the third
    given = candidates(masked, 8)
    ARResidualEnergy(causal, True, mask_token_id=MASK)(*given)
    assert counter.tokens == 2 * (100 + 8 * 4) and counter.rows == 8 * 3
    ARResidualEnergy(causal, False, mask_token_id=MASK)(*given)
    # The third sequence's candidates are all the same: read once, in a pass of its own.
    assert counter.tokens == 2 * (100 + 8 * 4) + 2 * (100 + 8 * 28) + 128


def test_sequences_with_short_prefixes_go_together(monkeypatch):
    """64 sequences of 64 different short prompts make a handful of passes."""
    causal = network()
    counter = Counter(causal, monkeypatch)
    masked = torch.arange(32)[None] >= torch.arange(64)[:, None] % 4
    given = candidates(masked, 2)
    ARResidualEnergy(causal, mask_token_id=MASK)(*given)
    assert counter.passes <= 4
    assert counter.tokens <= 64 * 2 * 32


def test_groups():
    """By enumeration of the rule: no partition of the sorted sequences, shared or not, costs less."""

    def cost(groups, k, pass_tokens):
        return sum(
            len(b) * (shared + k * (end - shared)) + pass_tokens * ((shared > 0) + (shared < end)) for b, shared, end in groups
        )

    generator = torch.Generator().manual_seed(0)
    for pass_tokens in (0, 5, 20, 1000):
        for k in (1, 2, 5):
            prefix = torch.randint(0, 9, (6,), generator=generator).tolist()
            end = [p + int(torch.randint(0 if p else 1, 5, (), generator=generator)) for p in prefix]
            groups = group_by_prefix(prefix, end, k, pass_tokens)
            assert sorted(b for members, _, _ in groups for b in members) == list(range(6))
            for members, shared, last in groups:
                assert shared <= min(prefix[b] for b in members) and last >= max(end[b] for b in members)
            order = sorted(range(6), key=prefix.__getitem__)
            best = math.inf
            for cuts in range(32):
                parts, current = [], [order[0]]
                for n, b in enumerate(order[1:]):
                    if cuts >> n & 1 and prefix[b] != prefix[order[n]]:  # equal prefixes stay together
                        parts.append(current)
                        current = []
                    current.append(b)
                parts.append(current)
                options = [[(p, shared, max(end[b] for b in p)) for shared in {0, min(prefix[b] for b in p)}] for p in parts]
                best = min(best, sum(min(cost([g], k, pass_tokens) for g in o) for o in options))
            assert cost(groups, k, pass_tokens) == best
    assert group_by_prefix([], [], 4, 32) == []
    assert group_by_prefix([96, 96], [128, 128], 8, 32) == [([0, 1], 96, 128)]
    assert group_by_prefix([96, 96], [128, 128], 1, 32) == [([0, 1], 0, 128)]  # one candidate shares with nobody


@both
@pytest.mark.parametrize(("rows", "prefix"), [(64, 32), (16, 100)])
def test_memory(carry_over, rows, prefix):
    """The allocator's peak is within the budget where a prefix is cached, too."""
    length = 128
    causal = network(dim=64, num_layers=6)
    masked = torch.zeros(1, length, dtype=torch.bool)
    masked[:, prefix:] = True
    model = ARResidualEnergy(causal, carry_over, mask_token_id=MASK)
    model.max_bytes = budget = model.bytes_per_token * length * rows // 2
    given = candidates(masked, 4 * rows)
    model.score(*given, masked=masked)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model.score(*given, masked=masked)
    now = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    ids = 3 * 8 * given[0].numel()  # the candidates' ids, in order and behind BOS, which no chunk bounds
    assert 0.4 * budget < peak <= budget + ids


# --- other models -----------------------------------------------------------------------------------------------------------------


class Bigram:
    """A model of somebody else's with a cache of its own making, a head, and impossible tokens; no output layer, no configuration."""

    vocab_size, bos_token_id = V, MASK

    def __init__(self):
        torch.manual_seed(0)
        self.table = torch.randn(V + 1, V).masked_fill(torch.rand(V + 1, V) < 0.15, -math.inf)
        self.table[:, 0] = 0.0
        self.read = 0

    class Rows:
        def __init__(self, count):
            self.count = count

        def rows(self, index):
            return Bigram.Rows(len(index))

    def extend(self, inputs, cache=None, *, keep=True):
        assert cache is None or cache.count == len(inputs)
        self.read += inputs.numel()
        return torch.nn.functional.one_hot(inputs, V + 1).float(), self.Rows(len(inputs))

    def head(self, hidden):
        return self.table[hidden.argmax(-1)]

    def log_probs(self, x0):
        before = torch.cat([torch.full_like(x0[:, :1], MASK), x0[:, :-1]], 1)
        return self.table[before].log_softmax(-1).gather(-1, x0[..., None])[..., 0]


@both
@pytest.mark.parametrize("max_bytes", [1, 256 << 20])
def test_a_model_of_somebody_elses_and_impossible_tokens(carry_over, max_bytes):
    """-inf in the prefix counts without carry-over alone; at a masked position the candidate is impossible: +inf, never nan."""
    model = Bigram()
    assert offers_cache(model)
    masked = torch.zeros(40, 12, dtype=torch.bool)
    masked[:, 8:] = True
    masked[20:, 3] = True
    given = candidates(masked, 5)
    energy = ARResidualEnergy(model, carry_over, mask_token_id=MASK, max_bytes=max_bytes)
    got, expected = energy.score(*given, masked=masked), plain(model, given, carry_over)
    assert not got.isnan().any() and 0.1 < got.isinf().double().mean() < 0.95
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    assert model.read < 0.8 * given[0].numel()


@both
def test_a_model_without_a_cache_is_asked_as_ever(carry_over):
    """Bitwise: the tables of the oracle, which offer log_probs alone."""
    universe = Universe()
    causal = TabularCausalLM(universe, universe.autoregressive(0.5))
    assert not offers_cache(causal)
    xt = torch.tensor(universe.states())
    masked = xt == universe.mask
    x0 = torch.where(masked[:, None], universe.sequences.expand(64, -1, -1), xt[:, None])
    given = x0, xt, torch.ones(64), -torch.rand(64, 27, 3)
    energy = ARResidualEnergy(causal, carry_over, mask_token_id=universe.mask)
    expected = ar_residual(causal, x0, xt, given[3], carry_over=carry_over, mask_token_id=universe.mask)
    assert torch.equal(energy(*given), expected) and torch.equal(energy.score(*given, masked=masked), expected)


def test_vocab_size():
    assert ARResidualEnergy(network()).vocab_size == V
    universe = Universe()
    assert ARResidualEnergy(TabularCausalLM(universe, universe.q)).vocab_size is None


def test_nothing_to_score():
    energy = ARResidualEnergy(network(), mask_token_id=MASK)
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        x0 = torch.zeros(shape, dtype=torch.int64)
        xt = x0.new_zeros(shape[0], shape[2])
        assert energy(x0, xt, torch.ones(shape[0]), torch.zeros(shape)).shape == shape[:2]


# --- refusals ---------------------------------------------------------------------------------------------------------------------


def test_refusals():
    causal, masked = network(), PATTERNS["prompts"]
    energy, given = ARResidualEnergy(causal, mask_token_id=MASK), candidates(masked)
    for bad in (masked[:2], masked.long(), masked[:, None]):
        with pytest.raises(ValueError, match=r"masked: expected bool \[B, L\] = \[4, 8\] on the CPU, got torch\..* on cpu"):
            energy.score(*given, masked=bad)
    with pytest.raises(ValueError, match=r"on the CPU, got torch\.bool .* on meta"):
        energy.score(*given, masked=masked.to("meta"))
    x0, xt, t, log_p = given
    with pytest.raises(ValueError, match="x0: expected xt's tokens where xt is not masked, got others"):
        energy.score((x0 + 1) % V, xt, t, log_p, masked=masked)
    with pytest.raises(ValueError, match=r"expected ids in 0 \.\. 6, got 7"):
        energy.score(torch.full_like(x0, MASK), torch.full_like(xt, MASK), t, log_p, masked=torch.ones_like(masked))
    causal.train()
    with pytest.raises(ValueError, match="eval mode"):
        energy.score(*given, masked=masked)
    causal.eval()
    causal.extend = lambda inputs, cache, keep: (torch.zeros(1, 2, 3), None)
    with pytest.raises(
        ValueError, match=r"causal_lm: expected extend to return hidden \[N, M, D\] with \[N, M\] = .*, got \[1, 2, 3\]"
    ):
        energy.score(*given, masked=masked)
