"""The stack: what attends to what, rows on their own, dropout, and the block against its equations written out."""

from __future__ import annotations

import pytest
import torch
from edlm.models.transformer import Block, Transformer, check_ids


def stack(*, causal, cond_dim=None, dropout=0.0, dim=16):
    torch.manual_seed(0)
    transformer = Transformer(dim, 2, 2, dropout, causal=causal, cond_dim=cond_dim)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return transformer.double()


def changed(transformer, j, *condition):
    """bool [B, L]: where the output differs after x_j of sequence 0 was moved."""
    torch.manual_seed(1)
    x = torch.randn(3, 6, 16, dtype=torch.float64)
    y = x.clone()
    y[0, j] += 1
    return ((transformer(x, *condition) - transformer(y, *condition)).abs() > 1e-9).any(-1)


@pytest.mark.parametrize("j", range(6))
def test_who_sees_whom(j):
    """Causal: j reaches j and what follows. Bidirectional: it reaches all. Neither reaches another sequence."""
    seen = changed(stack(causal=True), j)
    assert seen[0].tolist() == [i >= j for i in range(6)]
    assert not seen[1:].any()
    seen = changed(stack(causal=False, cond_dim=4), j, torch.randn(3, 4, dtype=torch.float64))
    assert seen[0].all() and not seen[1:].any()


def test_order_matters_through_the_rotary_embedding_alone():
    transformer = stack(causal=False, cond_dim=4)
    x, condition = torch.randn(1, 6, 16, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    forward, backward = transformer(x, condition), transformer(x.flip(1), condition).flip(1)
    assert (forward - backward).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [False, True])
def test_block_against_its_equations(causal):
    """Pre-norm, q k v in this order with heads inside, shift-scale-gate twice in this order, GELU by tanh, gates on the branches."""
    torch.manual_seed(0)
    dim, heads, batch, length = 8, 2, 3, 5
    size = dim // heads
    transformer = Transformer(dim, 1, heads, 0.0, causal=causal, cond_dim=4).double()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    block = transformer.blocks[0]
    x, condition = torch.randn(batch, length, dim, dtype=torch.float64), torch.randn(batch, 4, dtype=torch.float64)

    angle = torch.arange(length).double()[:, None] * 10_000.0 ** (-torch.arange(0, size, 2).double() / size)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(a):  # [L, size]
        number = torch.complex(a[:, : size // 2], a[:, size // 2 :]) * turn
        return torch.cat([number.real, number.imag], 1)

    def norm(a, weight):
        centred = a - a.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    expected = []
    for b in range(batch):
        six = block.adaLN_modulation.weight @ condition[b] + block.adaLN_modulation.bias
        shift1, scale1, gate1, shift2, scale2, gate2 = six.split(dim)
        qkv = (norm(x[b], block.norm1.weight) * (1 + scale1) + shift1) @ block.attn_qkv.weight.t()
        heads_out = []
        for h in range(heads):
            q, k, v = (qkv[:, part * dim + h * size : part * dim + (h + 1) * size] for part in range(3))
            scores = rotate(q) @ rotate(k).t() / size**0.5
            if causal:
                scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            heads_out.append(scores.softmax(-1) @ v)
        y = x[b] + gate1 * (torch.cat(heads_out, 1) @ block.attn_out.weight.t())
        inner = (norm(y, block.norm2.weight) * (1 + scale2) + shift2) @ block.mlp[0].weight.t() + block.mlp[0].bias
        inner = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
        expected.append(y + gate2 * (inner @ block.mlp[2].weight.t() + block.mlp[2].bias))
    # The layer norm and the angles are float32.
    torch.testing.assert_close(transformer(x, condition), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_dropout_in_train_mode_alone():
    transformer, x = stack(causal=True, dropout=0.5), torch.randn(2, 6, 16, dtype=torch.float64)
    assert not torch.equal(transformer(x), transformer(x))
    transformer.eval()
    assert torch.equal(transformer(x), transformer(x))


def test_a_network_cast_to_bfloat16_keeps_its_positions():
    """Its outputs stay near the float32 ones at L = 1024: what is cast must not be the rotary frequencies."""
    torch.manual_seed(0)
    transformer = Transformer(32, 1, 2, 0.0, causal=True)
    torch.nn.init.normal_(transformer.blocks[0].attn_qkv.weight, std=0.5)
    transformer.bfloat16()
    x = torch.randn(2, 1024, 32).bfloat16()
    low = transformer(x).float()
    high = transformer.float()(x.float())
    assert (low - high).abs().mean() < 0.02 * high.std()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "num_heads: expected a divisor of dim 16 that leaves an even head size, got 3"),
        ({"num_heads": 16}, "num_heads: expected a divisor of dim 16 that leaves an even head size, got 16"),
        ({"num_heads": 0}, "num_heads: expected a number >= 1, got 0"),
        ({"num_layers": 0}, "num_layers: expected a number >= 1, got 0"),
        ({"dim": -16}, "dim: expected a number >= 1, got -16"),
        ({"cond_dim": 0}, "cond_dim: expected a number >= 1, got 0"),
        ({"dropout": 1.0}, r"dropout: expected a share in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout: expected a share in \[0, 1\), got -0.1"),
    ],
)
def test_bad_sizes(change, message):
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0, "causal": False, "cond_dim": 4} | change
    with pytest.raises(ValueError, match=message):
        Transformer(**sizes)


def test_bad_ids():
    check_ids("xt", torch.tensor([[0, 4]]), 5)
    check_ids("xt", torch.zeros(0, 3, dtype=torch.int64), 5)
    for ids, message in (
        (torch.tensor([[0, 5]]), r"xt: expected ids in 0 .. 4, got 5"),
        (torch.tensor([[-1, 5]]), r"xt: expected ids in 0 .. 4, got -1"),
        (torch.tensor([0, 1]), r"xt: expected int64 tokens \[B, L\], got torch.int64 \[2\]"),
        (torch.tensor([[0.0]]), r"xt: expected int64 tokens \[B, L\], got torch.float32 \[1, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            check_ids("xt", ids, 5)


def test_unconditioned_blocks_have_no_modulation():
    assert not [n for n, _ in Block(8, 2, 0.0, causal=True, cond_dim=None).named_parameters() if "adaLN" in n]
