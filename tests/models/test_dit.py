"""DiT: MDLM's names and shapes, the zero start, the two halves, and what the time does and does not do."""

from __future__ import annotations

import math

import pytest
import torch
from edlm.models import PRESETS, DiT, DiTConfig, preset
from edlm.protocols import Denoiser

SIZES = {"vocab_size": 7, "mask_token_id": 6, "dim": 16, "num_layers": 2, "num_heads": 2, "cond_dim": 8, "dropout": 0.0}


def network(**change):
    """Every parameter away from its start, so that nothing is multiplied by 0."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(**(SIZES | change))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def xt():
    return torch.tensor([[6, 6, 6, 6], [1, 6, 3, 6], [6, 2, 6, 0]])


T = torch.tensor([0.9, 0.5, 0.1])


def test_it_is_a_denoiser(xt):
    model = network()
    assert isinstance(model, Denoiser)
    assert model(xt, T).shape == (3, 4, 7)


def test_untrained_logits_are_zero(xt):
    torch.manual_seed(0)
    assert torch.equal(DiT(DiTConfig(**SIZES))(xt, T), torch.zeros(3, 4, 7))


def test_untrained_blocks_pass_their_input_through(xt):
    """adaLN-Zero: the gates are 0, so the hidden state is the norm of the embedding, whatever the time."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(**(SIZES | {"time_conditioning": True}))).eval()
    embedded = model.vocab_embed(xt)
    torch.testing.assert_close(model.hidden(xt, T), torch.nn.functional.layer_norm(embedded, (16,)))


def test_time_acts_with_time_conditioning_alone(xt):
    later = T - 0.05
    off, on = network(), network(time_conditioning=True)
    on.load_state_dict(off.state_dict())
    assert torch.equal(off(xt, T), off(xt, later))
    moved = (on(xt, T) - on(xt, later)).abs().amax((1, 2))
    assert (moved > 1e-4).all()
    # At t = 0 both see sigma = 0; each sequence sees its own time.
    torch.testing.assert_close(on(xt, torch.zeros(3)), off(xt, T))
    one = T.clone()
    one[1] = 0.7
    moved = (on(xt, T) - on(xt, one)).abs().amax((1, 2)) > 1e-6
    assert moved.tolist() == [False, True, False]


def test_the_condition_is_silu_of_the_embedded_sigma(xt):
    """sigma(t) = -log(1 - (1 - 1e-3) t), embedded, through SiLU once, into every modulation as it is."""
    model = network(time_conditioning=True)
    seen = []
    for layer in [*(b.adaLN_modulation for b in model.transformer.blocks), model.adaLN_final]:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(xt, T)
    sigma = torch.tensor([-math.log(1 - 0.999 * t) for t in T.tolist()])
    expected = torch.nn.functional.silu(model.sigma_map(sigma))
    assert len(seen) == 3
    for condition in seen:
        torch.testing.assert_close(condition, expected)


def test_the_final_layer_has_its_shift_and_scale(xt):
    """hidden = norm(x) (1 + scale) + shift, shift in the first half of the modulation."""
    model = network()
    with torch.no_grad():
        condition = torch.nn.functional.silu(model.sigma_map(torch.zeros(3)))
        x = model.norm_final(model.transformer(model.vocab_embed(xt), condition))
        both = (condition @ model.adaLN_final.weight.t() + model.adaLN_final.bias)[:, None]
        torch.testing.assert_close(model.hidden(xt, T), x * (1 + both[..., 16:]) + both[..., :16])


def test_head_of_hidden_is_the_call(xt):
    model = network()
    hidden, logits = model.hidden(xt, T), model(xt, T)
    assert torch.equal(model.head(hidden), logits)
    rows = xt == 6
    torch.testing.assert_close(model.head(hidden[rows]), logits[rows])


def test_rows_are_independent_and_both_sides_are_seen(xt):
    model = network().double()
    logits = model(xt, T.double())
    for b in range(3):
        torch.testing.assert_close(model(xt[b : b + 1], T[b : b + 1].double())[0], logits[b])
    other = xt.clone()
    other[0, 2] = 4
    moved = (model(other, T.double()) - logits).abs().amax(-1) > 1e-9
    assert moved[0].all() and not moved[1:].any()


# --- MDLM's weights ---------------------------------------------------------------------------------------------------------------


def mdlm_shapes(vocab_size, dim, num_layers, cond_dim):
    """Names and shapes in MDLM's public checkpoints, buffers left out."""
    shapes = {
        "vocab_embed.embedding": (vocab_size, dim),
        "sigma_map.mlp.0.weight": (cond_dim, 256),
        "sigma_map.mlp.0.bias": (cond_dim,),
        "sigma_map.mlp.2.weight": (cond_dim, cond_dim),
        "sigma_map.mlp.2.bias": (cond_dim,),
        "output_layer.norm_final.weight": (dim,),
        "output_layer.linear.weight": (vocab_size, dim),
        "output_layer.linear.bias": (vocab_size,),
        "output_layer.adaLN_modulation.weight": (2 * dim, cond_dim),
        "output_layer.adaLN_modulation.bias": (2 * dim,),
    }
    block = {
        "norm1.weight": (dim,),
        "attn_qkv.weight": (3 * dim, dim),
        "attn_out.weight": (dim, dim),
        "norm2.weight": (dim,),
        "mlp.0.weight": (4 * dim, dim),
        "mlp.0.bias": (4 * dim,),
        "mlp.2.weight": (dim, 4 * dim),
        "mlp.2.bias": (dim,),
        "adaLN_modulation.weight": (6 * dim, cond_dim),
        "adaLN_modulation.bias": (6 * dim,),
    }
    return shapes | {f"blocks.{i}.{name}": shape for i in range(num_layers) for name, shape in block.items()}


def ours(name):
    if name.startswith("blocks."):
        return f"transformer.{name}"
    renamed = {"vocab_embed.embedding": "vocab_embed.weight"}
    renamed |= {f"output_layer.adaLN_modulation.{part}": f"adaLN_final.{part}" for part in ("weight", "bias")}
    return renamed.get(name, name.removeprefix("output_layer."))


def test_parameters_map_one_to_one_to_mdlm():
    expected = {ours(name): shape for name, shape in mdlm_shapes(7, 16, 2, 8).items()}
    assert {name: tuple(tensor.shape) for name, tensor in network().state_dict().items()} == expected


def test_small_is_the_published_size():
    """OpenWebText's vocabulary of 50 258, mask included: 169.6 million parameters."""
    with torch.device("meta"):
        model = DiT(DiTConfig(vocab_size=50_258, mask_token_id=50_257, **preset("small")))
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(math.prod(shape) for shape in mdlm_shapes(50_258, 768, 12, 128).values()) == 169_627_218


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    with torch.device("meta"):
        model = DiT(DiTConfig(vocab_size=28, mask_token_id=27, **preset(name)))
    assert model.config.dim == PRESETS[name]["dim"] and len(model.transformer.blocks) == PRESETS[name]["num_layers"]


def test_presets_are_copies_and_names_are_checked():
    preset("tiny")["dim"] = 1
    assert PRESETS["tiny"]["dim"] > 1
    with pytest.raises(ValueError, match="preset: expected one of tiny, mini, medium, small, got 'huge'"):
        preset("huge")


# --- errors -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [-1, 7])
def test_bad_mask(mask):
    with pytest.raises(ValueError, match=rf"mask_token_id: expected an id in 0 .. 6, got {mask}"):
        DiTConfig(vocab_size=7, mask_token_id=mask)


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.rand(2), torch.rand(3, 1), torch.ones(3, dtype=torch.int64)])
def test_bad_times(xt, t):
    with pytest.raises(ValueError, match=r"t: expected a floating tensor \[B\] = \[3\], got "):
        network()(xt, t)


def test_bad_tokens(xt):
    with pytest.raises(ValueError, match=r"xt: expected ids in 0 .. 6, got 7"):
        network()(xt + 1, T)
