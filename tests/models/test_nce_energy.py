"""NCEEnergy: the zero start, what it takes from a denoiser, the pools written out, what it must not depend on, decoding, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from edlm.models import CausalLM, CausalLMConfig, DiT, DiTConfig, NCEEnergy, NCEEnergyConfig
from edlm.protocols import EnergyModel
from edlm.samplers import generate
from torch.profiler import ProfilerActivity, profile

SIZES = {"vocab_size": 7, "mask_token_id": 6, "dim": 16, "num_layers": 2, "num_heads": 2, "cond_dim": 8, "dropout": 0.0}
T = torch.tensor([0.9, 0.5, 0.1])


def scattered(model):
    """Every parameter away from its start, so that nothing is multiplied by 0; in eval mode."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def network(**change):
    return scattered(NCEEnergy(NCEEnergyConfig(**(SIZES | change))))


def denoiser(**change):
    model = scattered(DiT(DiTConfig(**(SIZES | change))))
    torch.nn.init.normal_(model.linear.weight, std=0.03)  # an entropy worth sampling
    return model


@pytest.fixture
def xt():
    return torch.tensor([[6, 6, 6, 6], [1, 6, 3, 6], [6, 2, 6, 0]])


@pytest.fixture
def x0(xt):
    """[3, 5, 4]: five different completions of each."""
    drawn = torch.randint(0, 6, (3, 5, 4), generator=torch.Generator().manual_seed(2))
    return torch.where((xt == 6)[:, None], drawn, xt[:, None])


both_pools = pytest.mark.parametrize("pooling", ["sum", "mean"])


# --- the start --------------------------------------------------------------------------------------------------------------------


@both_pools
def test_it_starts_at_zero(x0, xt, pooling):
    """E = 0 exactly, new or from a denoiser, and yet the first gradient step moves it."""
    torch.manual_seed(0)
    for model in (
        NCEEnergy(NCEEnergyConfig(**SIZES, pooling=pooling)),
        NCEEnergy.from_denoiser(denoiser(), pooling=pooling),
    ):
        assert isinstance(model, EnergyModel)
        energy = model(x0, xt, T, torch.zeros(x0.shape))
        assert energy.dtype == torch.float32 and torch.equal(energy, torch.zeros(3, 5))
        energy[:, 0].sum().backward()
        assert model.mlp[-1].weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("time_conditioning", [False, True])
def test_what_comes_from_the_denoiser(x0, xt, time_conditioning):
    """At the start the hidden rows for (x0, xt) are the denoiser's own for x0, bitwise; nothing is shared; all is carried."""
    dit = denoiser(time_conditioning=time_conditioning, dropout=0.2)
    dit.tokenizer_description = {"kind": "characters"}
    model = NCEEnergy.from_denoiser(dit)
    expected = vars(dit.config) | {"pooling": "sum"}
    assert vars(model.config) == expected and model.tokenizer_description == {"kind": "characters"}
    assert (model.mask_token_id, model.vocab_size, model.training) == (6, 7, False)
    for k in range(5):
        hidden = model.hidden(x0[:, k], xt, T)
        assert torch.equal(hidden, dit.hidden(x0[:, k], T))
        assert not torch.equal(hidden, dit.hidden(xt, T))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(dit.hidden(xt, T), denoiser(time_conditioning=time_conditioning, dropout=0.2).hidden(xt, T))

    other = NCEEnergy.from_denoiser(dit.double().train(), pooling="mean", dropout=0.0)
    assert (other.config.dropout, other.config.pooling, other.training) == (0.0, "mean", True)
    assert {p.dtype for p in other.parameters()} == {torch.float64}


# --- the equations ----------------------------------------------------------------------------------------------------------------


@both_pools
def test_the_pools_written_out(x0, xt, pooling):
    """E from hidden rows, one at a time, in float64: masked positions alone, sum of f or f of the mean."""
    model = network(pooling=pooling)
    first, last = model.mlp[0], model.mlp[2]

    def f(row):
        inner = first.weight.double() @ row + first.bias.double()
        inner = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
        return (last.weight.double() @ inner + last.bias.double())[0]

    energy = model(x0, xt, T)
    for b in range(3):
        masked = (xt[b] == 6).nonzero().squeeze(1).tolist()
        for k in range(5):
            rows = model.hidden(x0[b : b + 1, k], xt[b : b + 1], T[b : b + 1])[0].double()
            pooled = sum(f(rows[i]) for i in masked) if pooling == "sum" else f(sum(rows[i] for i in masked) / len(masked))
            torch.testing.assert_close(energy[b, k].double(), pooled, rtol=1e-5, atol=1e-5)
    assert energy.std() > 0.01


def test_hidden_written_out(x0, xt):
    """[xt's embedding, x0's embedding] in this order, from one table, through the projection, the blocks, the modulated norm."""
    model = network(time_conditioning=True)
    with torch.no_grad():
        table = model.vocab_embed.weight
        x = torch.cat([table[xt], table[x0[:, 0]]], -1) @ model.project.weight.t() + model.project.bias
        sigma = torch.tensor([-math.log(1 - 0.999 * t) for t in T.tolist()])
        condition = torch.nn.functional.silu(model.sigma_map(sigma))
        shift, scale = model.adaLN_final(condition)
        expected = model.norm_final(model.transformer(x, condition)) * (1 + scale) + shift
        torch.testing.assert_close(model.hidden(x0[:, 0], xt, T), expected)


@both_pools
def test_clean_positions_are_in_no_pool(x0, xt, pooling):
    """The rows of clean positions may hold anything, nan included, in value and gradient; without a mask E = 0 exactly."""
    model = network(pooling=pooling)
    expected = model(x0, xt, T)

    def poison(_, inputs, hidden):
        return hidden.masked_fill((xt.repeat_interleave(5, 0) != 6)[..., None], math.nan)

    handle = model.norm_final.register_forward_hook(poison)
    energy = model(x0, xt, T)
    handle.remove()
    assert torch.equal(energy, expected)
    hidden = {}
    model.norm_final.register_forward_hook(lambda _, inputs, output: hidden.setdefault("rows", output).retain_grad())
    model(x0, xt, T).sum().backward()
    moved = hidden["rows"].grad.abs().amax(-1).view(3, 5, 4) > 0
    assert torch.equal(moved, (xt == 6)[:, None].expand_as(moved))

    clean = torch.tensor([[1, 2, 3, 4], [6, 0, 0, 0]])
    complete = clean[:, None].repeat(1, 2, 1).masked_fill((clean == 6)[:, None], 5)
    energy = network(pooling=pooling)(complete, clean, T[:2])
    assert energy[0].tolist() == [0.0, 0.0] and (energy[1] != 0).all()


def test_the_sum_grows_with_the_masked_positions_and_the_mean_does_not():
    """Equal rows (no attention to speak of, one token): n masked positions have n times the energy of one, or the same."""
    length = 8
    xt = torch.full((length, length), 6)
    for n in range(length):
        xt[n, n + 1 :] = 2
    x0 = torch.full((length, 1, length), 2)
    for pooling in ("sum", "mean"):
        model = network(pooling=pooling)
        torch.nn.init.zeros_(model.project.weight[:, :16])  # xt is not looked at
        for block in model.transformer.blocks:
            torch.nn.init.zeros_(block.attn_out.weight)
        energy = model(x0, xt, torch.ones(length))[:, 0]
        expected = energy[0] * (torch.arange(1, length + 1) if pooling == "sum" else torch.ones(length))
        torch.testing.assert_close(energy, expected, rtol=1e-4, atol=1e-5)


def test_both_inputs_and_both_sides_are_seen(x0, xt):
    """A token of x0 moves E wherever it stands; so does xt where x0 is the same: which positions are masked is part of it."""
    model = network()
    energy = model(x0, xt, T)
    for i in range(4):
        other = x0.clone()
        other[0, :, i] = (other[0, :, i] + 1) % 6
        moved = (model(other, xt, T) - energy).abs() > 1e-5
        assert moved[0].all() and not moved[1:].any()
    opened = xt.clone()
    opened[0, 0] = 3
    pair = x0.clone()
    pair[0, :, 0] = 3
    assert ((model(pair, opened, T) - model(pair, xt, T)).abs() > 1e-5)[0].all()


def test_time_acts_with_time_conditioning_alone(x0, xt):
    one = T.clone()
    one[1] = 0.7
    off, on = network(), network(time_conditioning=True)
    assert torch.equal(off(x0, xt, T), off(x0, xt, one))
    moved = (on(x0, xt, T) - on(x0, xt, one)).abs() > 1e-6
    assert moved[1].all() and not moved[[0, 2]].any()


# --- what it must not depend on ---------------------------------------------------------------------------------------------------


@both_pools
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 14, 15])
def test_chunks(x0, xt, pooling, rows):
    """Without gradients candidates go through in chunks, that cut through a sequence's; the result is that of one piece."""
    model = network(pooling=pooling, time_conditioning=True)
    expected = model(x0, xt, T).detach()
    seen = []
    model.transformer.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    model.max_bytes = rows * 4 * model.bytes_per_token + 3
    with torch.no_grad():
        energy = model(x0, xt, T)
    assert seen == [rows] * (15 // rows) + ([15 % rows] if 15 % rows else [])
    torch.testing.assert_close(energy, expected, rtol=1e-5, atol=1e-5)
    assert not energy.requires_grad
    model.max_bytes = 1
    with torch.inference_mode():
        torch.testing.assert_close(model(x0, xt, T), expected, rtol=1e-5, atol=1e-5)
    assert seen[-15:] == [1] * 15
    model(x0, xt, T)  # with gradients: in one piece
    assert seen[-1] == 15


@both_pools
@pytest.mark.parametrize(("dim", "length", "rows"), [(16, 64, 64), (128, 128, 16)])
def test_scoring_takes_the_memory_that_is_estimated(pooling, dim, length, rows):
    """The allocator's peak while a chunk that just fills ``max_bytes`` is scored: within the bound, and not far below it."""
    model = network(dim=dim, num_heads=4, pooling=pooling)
    model.max_bytes = model.bytes_per_token * length * rows
    given = torch.randint(0, 5, (1, 4 * rows, length)), torch.full((1, length), 6), torch.ones(1)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(*given)
    now = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert 0.6 * model.max_bytes < peak <= model.max_bytes


@both_pools
def test_candidates_and_sequences_are_on_their_own(x0, xt, pooling):
    """Permuting candidates permutes energies; a sequence scored alone, and a candidate scored alone, has the same energy."""
    model = network(pooling=pooling, time_conditioning=True)
    energy = model(x0, xt, T)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(model(x0[:, order], xt, T), energy[:, order])
    for b in range(3):
        here = slice(b, b + 1)
        torch.testing.assert_close(model(x0[here], xt[here], T[here]), energy[here])
        for k in range(5):
            torch.testing.assert_close(model(x0[here, k : k + 1], xt[here], T[here]), energy[here, k : k + 1])
    assert not torch.allclose(energy[0], energy[1])


def test_nothing_to_score():
    model = network()
    with torch.no_grad():
        assert model(torch.zeros(0, 3, 4, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64), torch.ones(0)).shape == (0, 3)
        assert model(torch.zeros(2, 0, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64), torch.ones(2)).shape == (2, 0)


# --- precision, training ----------------------------------------------------------------------------------------------------------


@both_pools
def test_low_precision(pooling):
    """Under autocast, and cast to bfloat16: what is summed and what comes out is float32, not rounded to bfloat16's spacing."""
    model, terms = network(pooling=pooling), []
    model.mlp.register_forward_hook(lambda _, inputs, output: terms.append(output.detach()))
    xt = torch.full((8, 64), 6)
    x0 = torch.randint(0, 6, (8, 4, 64), generator=torch.Generator().manual_seed(0))
    given = x0, xt, torch.ones(8)
    exact = model(*given).detach()
    for cast in (False, True):
        model = model.bfloat16() if cast else model
        with torch.autocast("cpu", torch.bfloat16, enabled=not cast):
            energy = model(*given)
        assert energy.dtype == torch.float32
        for values in (energy, terms[-1]):
            assert values.dtype == torch.float32 and (values != values.bfloat16().float()).any()
        assert (energy - exact).abs().mean() < 0.05 * exact.abs().mean()
        energy.sum().backward()


@both_pools
def test_every_parameter_is_trained(x0, xt, pooling):
    model = network(pooling=pooling, time_conditioning=True).train()
    model(x0, xt, T).square().sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]


def test_gradients_against_differences(x0, xt):
    """Of the last layer and the projection, by central differences: the direction that training follows."""
    model = network()
    for parameter in (model.mlp[-1].bias, model.project.weight):
        model.zero_grad()
        model(x0, xt, T).sum().backward()
        step = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        expected = (parameter.grad * step).sum()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-2 * step)
                values.append(model(x0, xt, T).double().sum())
                parameter.sub_(sign * 1e-2 * step)
        torch.testing.assert_close(((values[0] - values[1]) / 2e-2).float(), expected, rtol=2e-2, atol=1e-2)


def test_blocks_go_through_the_transformer(x0, xt):
    """Each block is called as a module, once a forward: what is hooked, compiled, or sharded there acts."""
    model, calls = network(), []
    for n, block in enumerate(model.transformer.blocks):
        block.register_forward_hook(lambda *_, n=n: calls.append(n))
    model(x0, xt, T)
    assert calls == [0, 1]


# --- disk -------------------------------------------------------------------------------------------------------------------------


def test_saved_and_read_back(tmp_path, x0, xt):
    model = network(pooling="mean", time_conditioning=True)
    model.save_pretrained(tmp_path / "energy", tokenizer={"kind": "characters"})
    read = NCEEnergy.from_pretrained(tmp_path / "energy")
    assert read.config == model.config and read.tokenizer_description == {"kind": "characters"} and not read.training
    assert torch.equal(read(x0, xt, T), model(x0, xt, T))
    assert set(read.state_dict()) == set(dict(read.named_parameters()))  # max_bytes is no part of the weights
    with pytest.raises(ValueError, match="kind"):
        DiT.from_pretrained(tmp_path / "energy")


# --- decoding ---------------------------------------------------------------------------------------------------------------------


@both_pools
def test_decoding_with_it(pooling):
    """It serves as an energy, in train mode too (the loop switches dropout off), and temperature 0 takes the lowest energy."""
    dit = denoiser()
    model = network(pooling=pooling, dropout=0.5).train()
    prompt = torch.tensor([[6, 1, 6, 6, 6, 2], [6, 6, 6, 6, 6, 6]])
    out = generate(dit, prompt=prompt, steps=4, energy=model, num_candidates=4, window=(0, 1), seed=3)
    assert model.training and out.energy_nfe > 0 and (out.tokens != 6).all()
    assert (out.tokens[0, [1, 5]] == prompt[0, [1, 5]]).all()
    assert out.ess.nan_to_num(1).min() >= 1 and out.ess.nan_to_num(0).max() > 1

    chosen = []

    def recorded(x0, xt, t, log_p):
        with torch.no_grad():
            energy = model.eval()(x0, xt, t, log_p)
        chosen.append((x0, energy))
        return energy

    out = generate(dit, prompt=prompt, steps=1, energy=recorded, num_candidates=8, window=(0, 1), energy_temperature=0.0, seed=3)
    x0, energy = chosen[0]
    assert torch.equal(out.tokens, x0[torch.arange(2), energy.argmin(1)])


def test_one_candidate_is_plain_diffusion():
    """K = 1, or an empty window: bitwise what the denoiser does by itself."""
    dit, model = denoiser(), network()
    plain = generate(dit, batch_size=8, length=6, steps=3, seed=7)
    one = generate(dit, batch_size=8, length=6, steps=3, seed=7, energy=model, num_candidates=1, window=(0, 1))
    never = generate(dit, batch_size=8, length=6, steps=3, seed=7, energy=model, num_candidates=4, window=(1, 1))
    assert torch.equal(plain.tokens, one.tokens) and torch.equal(plain.tokens, never.tokens)
    some = generate(dit, batch_size=8, length=6, steps=3, seed=7, energy=model, num_candidates=4, window=(0, 1))
    assert not torch.equal(plain.tokens, some.tokens)


# --- refusals ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(6, 4, dtype=torch.int64)}, r"x0, xt: expected \[B, K, L\] and \[B, L\], got \[6, 4\] and \[3, 4\]"),
        ({"x0": torch.zeros(5, 3, 4, dtype=torch.int64)}, r"x0, xt: expected .*, got \[5, 3, 4\] and \[3, 4\]"),
        ({"xt": torch.zeros(3, 3, dtype=torch.int64)}, r"x0, xt: expected .*, got \[3, 5, 4\] and \[3, 3\]"),
        ({"log_p": torch.zeros(5, 3, 4)}, r"log_p: expected \[B, K, L\] = \[3, 5, 4\], or None, got \[5, 3, 4\]"),
        ({"t": torch.ones(5)}, r"t: expected a floating tensor \[B\] = \[3\], got torch.float32 \[5\]"),
        ({"t": torch.ones(3, dtype=torch.int64)}, r"t: expected a floating tensor"),
        ({"x0": torch.zeros(3, 5, 4)}, "x0: expected int64 tokens"),
        ({"xt": torch.full((3, 4), 7)}, r"xt: expected ids in 0 .. 6, got 7"),
        ({"x0": torch.full((3, 5, 4), -1)}, r"x0: expected ids in 0 .. 6, got -1"),
        ({"x0": torch.full((3, 5, 4), 6)}, r"x0: expected complete candidates, got the mask \(6\)"),
        ({"x0": torch.full((3, 5, 4), 1)}, "x0: expected xt's tokens where xt is not masked"),
    ],
)
def test_bad_input(x0, xt, change, message):
    with pytest.raises(ValueError, match=message):
        network()(**({"x0": x0, "xt": xt, "t": T} | change))


def test_candidates_of_another_sequence_are_found_out(xt):
    """Two sequences' candidates in (K, B) order, read as (B, K): the check of clean positions says so."""
    kb = xt[None, 1:].expand(2, -1, -1).masked_fill(xt[None, 1:] == 6, 5)
    network()(kb.transpose(0, 1), xt[1:], T[1:])
    with pytest.raises(ValueError, match="on axis 1"):
        network()(kb, xt[1:], T[1:])


def test_train_mode_is_refused_without_gradients(x0, xt):
    """Of the whole and of a part. With gradients it is what training does."""
    model = network(dropout=0.5)
    for part in (model, model.transformer.blocks[0]):
        part.train()
        with torch.no_grad(), pytest.raises(ValueError, match=r"energy: expected a network in eval mode .*; call eval\(\)"):
            model(x0, xt, T)
        assert not torch.equal(model(x0, xt, T), model(x0, xt, T))
        model.eval()
    model.max_bytes = 0
    with torch.no_grad(), pytest.raises(ValueError, match="max_bytes: expected a number >= 1, got 0"):
        model(x0, xt, T)


def test_bad_construction():
    with pytest.raises(ValueError, match=r"mask_token_id: expected an id in 0 .. 6, got 7"):
        NCEEnergyConfig(vocab_size=7, mask_token_id=7)
    with pytest.raises(ValueError, match="pooling: expected 'sum' or 'mean', got 'max'"):
        NCEEnergyConfig(vocab_size=7, mask_token_id=6, pooling="max")
    causal = CausalLM(CausalLMConfig(vocab_size=5, bos_token_id=5, dim=16, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match=r"dit: expected an edlm.models.DiT, got CausalLM"):
        NCEEnergy.from_denoiser(causal)
