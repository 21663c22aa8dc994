"""CausalLM: a proper joint over V**L sequences, every token scored, and nothing of the future seen."""

from __future__ import annotations

import itertools

import pytest
import torch
from edlm.models import CausalLM, CausalLMConfig
from edlm.protocols import CausalLM as CausalProtocol

SIZES = {"vocab_size": 3, "dim": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.0}


def network(bos=3, **change):
    """Sharp enough that a wrong shift or a lost BOS moves probabilities by much."""
    torch.manual_seed(0)
    model = CausalLM(CausalLMConfig(bos_token_id=bos, **(SIZES | change))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def everything(length, vocab_size=3):
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=length)))


@pytest.mark.parametrize("bos", [3, 0, 9])
def test_the_joint_is_proper(bos):
    """Its sum over all sequences is 1 at each length, with BOS just outside, inside and far outside the vocabulary."""
    model = network(bos)
    assert isinstance(model, CausalProtocol)
    for length in (1, 2, 4):
        log_p = model.log_probs(everything(length)).detach().double()
        assert log_p.shape == (3**length, length)
        assert abs(float(log_p.sum(1).exp().sum()) - 1) < 1e-5
        assert log_p.std() > 0.1


def test_the_first_token_is_conditioned_on_bos():
    """One law for position 0 whatever follows; another BOS gives another law; a BOS inside the vocabulary acts as that token."""
    first = []
    for bos in (0, 1, 3):
        log_p = network(bos).log_probs(everything(3))[:, 0].detach()
        law = torch.stack([log_p[everything(3)[:, 0] == v] for v in range(3)])
        torch.testing.assert_close(law, law[:, :1].expand_as(law))
        assert abs(float(law[:, 0].exp().sum()) - 1) < 1e-5
        first.append(law[:, 0])
    assert (first[0] - first[1]).abs().max() > 0.01 and (first[0] - first[2]).abs().max() > 0.01
    model, x = network(1), torch.tensor([[0, 2], [2, 0]])
    behind_token = CausalLM.forward(model, torch.cat([torch.ones(2, 1, dtype=torch.int64), x], 1))
    assert model.vocab_embed.num_embeddings == 3  # nothing but the token's own embedding
    assert behind_token.shape == (2, 3, 3)
    torch.testing.assert_close(behind_token[:, :1], model(torch.ones(2, 1, dtype=torch.int64)))


@pytest.mark.parametrize("j", range(5))
def test_causality(j):
    """Changing x_j changes no logits at i <= j (they predict x_i from what is before it), and those of every later i."""
    model = network().double()
    torch.manual_seed(1)
    x = torch.randint(0, 3, (4, 5))
    y = x.clone()
    y[0, j] = (y[0, j] + 1) % 3
    moved = (model(x) - model(y)).abs().amax(-1) > 1e-9
    assert moved[0].tolist() == [i > j for i in range(5)]
    assert not moved[1:].any()


def test_log_probs_are_the_gathered_log_softmax():
    model = network(vocab_size=11, bos=11)
    torch.manual_seed(1)
    x = torch.randint(0, 11, (5, 7))
    expected = model(x).double().log_softmax(-1).gather(-1, x[..., None])[..., 0]
    got = model.log_probs(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn(5, 7)
    (got * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (model(x).log_softmax(-1).gather(-1, x[..., None])[..., 0] * weights).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-4)


def test_rows_are_independent():
    model = network()
    torch.manual_seed(1)
    x = torch.randint(0, 3, (6, 8))
    whole = model.log_probs(x)
    for rows in ([2], [5, 0], [3, 1, 4]):
        torch.testing.assert_close(model.log_probs(x[rows]), whole[rows], rtol=1e-4, atol=1e-5)
    assert len({tuple(row) for row in whole.tolist()}) == 6


def test_bfloat16_scores_are_float32():
    """The head's products and the softmax are float32: what is lost is the network's, not the sum's."""
    model = network(vocab_size=11, bos=11).bfloat16()
    torch.manual_seed(1)
    x = torch.randint(0, 11, (5, 7))
    got = model.log_probs(x)
    hidden = model.hidden(x).double()
    expected = (hidden @ model.linear.weight.double().t()).log_softmax(-1).gather(-1, x[..., None])[..., 0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_mask_is_never_scored():
    """With BOS on the mask's id the embedding has a row for it; as a token to score it is still refused."""
    with pytest.raises(ValueError, match=r"x0: expected ids in 0 .. 2, got 3"):
        network(3).log_probs(torch.tensor([[0, 3]]))
    with pytest.raises(ValueError, match=r"x0: expected int64 tokens \[B, L\], got torch.int64 \[2\]"):
        network().log_probs(torch.tensor([0, 1]))


def test_no_rows_and_no_positions():
    assert network().log_probs(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4)
    assert network().log_probs(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)


@pytest.mark.parametrize("change", [{"vocab_size": 0}, {"bos_token_id": -1}])
def test_bad_sizes(change):
    with pytest.raises(ValueError, match="vocab_size, bos_token_id: expected numbers >= 1 and >= 0, got "):
        CausalLMConfig(**({"vocab_size": 3, "bos_token_id": 3} | change))
