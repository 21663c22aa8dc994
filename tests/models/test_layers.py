"""The layers against their definitions."""

from __future__ import annotations

import pytest
import torch
from edlm.models.layers import LayerNorm, Modulation, Rotary, TimestepEmbedding, modulate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_is_computed_in_float32(dtype):
    """Against float64: one rounding to the input's dtype and no more, at inputs whose mean dwarfs their spread."""
    torch.manual_seed(0)
    norm = LayerNorm(96)
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(64, 96) + 8).to(dtype)
    with torch.no_grad():
        out = norm(x)
    exact = torch.nn.functional.layer_norm(x.double(), (96,), norm.weight.detach().double())
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact.to(dtype).double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    if dtype == torch.bfloat16:
        assert (out == exact.to(dtype)).double().mean() > 0.999


def test_layer_norm_of_a_network_that_was_cast():
    norm = LayerNorm(8).bfloat16()
    assert norm(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_rotary_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 1, 16), torch.randn(2, 3, 1, 16)
    rotary = Rotary(40, 16, q.device)
    scores = rotary(q.expand(-1, -1, 40, -1)) @ rotary(k.expand(-1, -1, 40, -1)).transpose(-1, -2)
    for distance in (-7, 0, 1, 20):
        diagonal = scores.diagonal(distance, -2, -1)
        torch.testing.assert_close(diagonal, diagonal[..., :1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert (scores.diagonal(3, -2, -1)[..., 0] - scores.diagonal(-3, -2, -1)[..., 0]).abs().min() > 1e-3  # before is not after


def test_rotary_against_complex_numbers():
    """Feature d and d + D/2 are the parts of one complex number, which position i turns by i * 10000^(-2d/D)."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 1024, 8)
    turned = Rotary(1024, 8, x.device)(x)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    number = torch.complex(x[..., :4].double(), x[..., 4:].double())
    angle = torch.arange(1024).double()[:, None] * 10_000.0 ** (-torch.arange(4).double() / 4)
    expected = number * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], -1).float(), rtol=1e-4, atol=3e-4)


def test_rotary_from_a_position_on():
    """What is read behind a cache is turned by where it stands, bitwise."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, 16)
    assert torch.equal(Rotary(10, 16, x.device, start=30)(x[:, :, 30:]), Rotary(40, 16, x.device)(x)[:, :, 30:])


def test_rotary_of_bfloat16_keeps_its_angles():
    """One rounding of the result: frequencies in bfloat16 would be radians off at position 1000."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, 1024, 16).bfloat16()
    rotary = Rotary(1024, 16, x.device)
    assert torch.equal(rotary(x), rotary(x.float()).bfloat16())


def test_timestep_embedding():
    """cos and sin of sigma at 128 frequencies from 1 down to nearly 1/10000, in this order, then two layers with SiLU between."""
    torch.manual_seed(0)
    embed = TimestepEmbedding(5)
    sigma = torch.tensor([0.0, 0.7, 6.9])
    angle = sigma.double()[:, None] * torch.tensor([10_000.0 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    first, _, second = embed.mlp.double()
    expected = second(torch.nn.functional.silu(first(torch.cat([angle.cos(), angle.sin()], 1))))
    embed.float()
    torch.testing.assert_close(embed(sigma), expected.float(), rtol=1e-4, atol=1e-5)


def test_modulation_starts_at_nothing_and_has_a_row_for_each_sequence():
    torch.manual_seed(0)
    modulation = Modulation(4, 3, 2)
    condition = torch.randn(5, 4)
    x = torch.randn(5, 7, 3)
    assert torch.equal(modulate(x, *modulation(condition)), x)
    torch.nn.init.normal_(modulation.weight)
    torch.nn.init.normal_(modulation.bias)
    shift, scale = modulation(condition)
    assert shift.shape == scale.shape == (5, 1, 3)
    both = condition @ modulation.weight.t() + modulation.bias
    for b in range(5):
        torch.testing.assert_close(modulate(x, shift, scale)[b], x[b] * (1 + both[b, 3:]) + both[b, :3])
