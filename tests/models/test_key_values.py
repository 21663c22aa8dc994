"""CausalLM.extend: read in any pieces, the rows of ``hidden``; a cache is a value, whatever is read behind it, cut off or picked."""

from __future__ import annotations

import pytest
import torch
from edlm.models import CausalLM, CausalLMConfig
from edlm.protocols import offers_cache

LENGTH = 17


def network(bos=11, **change):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "dim": 32, "num_layers": 3, "num_heads": 4, "dropout": 0.0}
    model = CausalLM(CausalLMConfig(bos_token_id=bos, **(sizes | change))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def x():
    return torch.randint(0, 11, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def inputs_of(model, x):
    return torch.cat([model.bos(len(x)), x[:, :-1]], 1)


def read(model, inputs, sizes, cache=None):
    pieces = []
    for piece in inputs.split(sizes, 1):
        hidden, cache = model.extend(piece, cache)
        pieces.append(hidden)
    return torch.cat(pieces, 1), cache


splits = pytest.mark.parametrize("sizes", [[17], [1] * 17, [5, 12], [16, 1], [1, 16], [4, 0, 4, 9], [3, 1, 1, 12]])


@splits
@pytest.mark.parametrize("bos", [11, 3, 20])
def test_any_split_is_the_whole(x, sizes, bos):
    model = network(bos)
    assert offers_cache(model)
    hidden, cache = read(model, inputs_of(model, x), sizes)
    expected = model.hidden(x).detach()
    assert (cache.length, cache.num_rows) == (LENGTH, 3) and not hidden.requires_grad
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    assert (expected[:, 1:] - expected[:, :-1]).abs().amax(-1).min() > 0.01  # a row that is another position's is found out


@splits
def test_any_split_in_bfloat16(x, sizes):
    model = network().bfloat16()
    hidden, _ = read(model, inputs_of(model, x), sizes)
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.float(), model.hidden(x).detach().float(), rtol=0.1, atol=0.1)


def test_the_head_gives_the_next_token(x):
    model = network()
    hidden, _ = read(model, inputs_of(model, x), [7, 10])
    scores = model.head(hidden).log_softmax(-1).gather(-1, x[..., None])[..., 0]
    torch.testing.assert_close(scores, model.log_probs(x).detach(), rtol=1e-4, atol=1e-4)
    assert model.output_layer is model.linear


def test_a_cache_is_a_value(x):
    """Extended twice, in two ways, and its first extension again: each continuation is that of its own past, in place or copied."""
    model = network()
    inputs, other = inputs_of(model, x), inputs_of(model, (x + 1) % 11)
    _, start = read(model, inputs[:, :5], [4, 1])  # the second call has made room for more
    branches = []
    for tail in (inputs[:, 5:], other[:, 5:], inputs[:, 5:]):
        first, longer = model.extend(tail[:, :1], start)
        branches.append((tail, first, longer))
    assert start.length == 5
    for tail, first, longer in branches:
        rest, end = read(model, tail[:, 1:], [1, 6, 4], longer)
        expected = model.hidden(torch.cat([inputs[:, 1:5], tail, x[:, :1]], 1)).detach()
        torch.testing.assert_close(torch.cat([first, rest], 1), expected[:, 5:], rtol=1e-5, atol=1e-5)
        assert end.length == LENGTH and longer.length == 6


def test_room_is_made_ahead_and_used(x):
    """Token by token, most steps copy nothing: the layers' storage changes rarely."""
    model, seen, cache = network(), set(), None
    for piece in inputs_of(model, x).split(1, 1):
        _, cache = model.extend(piece, cache)
        seen.add(cache._layers[0].data_ptr())
        assert cache._layers[0].shape[3] <= 1.5 * max(cache.length, 2)
    assert len(seen) <= 8


@pytest.mark.parametrize("keep", [True, False])
def test_rows_and_truncate(x, keep):
    """Rows in another order and repeated, of rows that were picked before, and behind a cut: as if they had been read so."""
    model = network()
    inputs = inputs_of(model, x)
    _, cache = read(model, inputs[:, :12], [9, 3])
    picked = cache.rows(torch.tensor([2, 0, 0, 1])).truncate(8).rows(torch.tensor([3, 0, 1, 2, 0]))
    assert (picked.length, picked.num_rows, cache.length, cache.num_rows) == (8, 5, 12, 3)
    order = torch.tensor([1, 2, 0, 0, 2])
    tails = torch.randint(0, 11, (5, 6), generator=torch.Generator().manual_seed(2))
    for m in (1, 5):
        hidden, longer = model.extend(tails[:, :m], picked, keep=keep)
        expected = model.hidden(torch.cat([inputs[order, 1:8], tails], 1)).detach()[:, 8 : 8 + m]
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
        assert (longer.length, longer.num_rows) == (8 + m, 5) if keep else longer is None
    hidden, _ = read(model, inputs[:, 12:], [2, 3], cache)  # untouched by all this
    torch.testing.assert_close(hidden, model.hidden(x).detach()[:, 12:], rtol=1e-5, atol=1e-5)
    again, _ = model.extend(inputs[:, :4], cache.truncate(0))
    torch.testing.assert_close(again, model.hidden(x).detach()[:, :4], rtol=1e-5, atol=1e-5)


def test_nothing_to_read(x):
    model = network()
    _, cache = model.extend(inputs_of(model, x)[:, :4])
    assert model.extend(x[:, :0], cache)[0].shape == (3, 0, 32)
    assert model.extend(x[:0, :4])[0].shape == (0, 4, 32)


def test_refusals(x):
    model = network(bos=20)
    _, cache = model.extend(inputs_of(model, x)[:, :4])
    for ids, message in (
        (torch.tensor([[20, 11]]), r"inputs: expected ids in 0 .. 10, got 11"),
        (torch.tensor([[20, -1]]), r"inputs: expected ids in 0 .. 10, got -1"),
        (torch.tensor([20]), r"inputs: expected int64 tokens \[B, L\], got torch.int64 \[1\]"),
        (torch.tensor([[20.0]]), r"inputs: expected int64 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            model.extend(ids)
    with pytest.raises(ValueError, match=r"cache: expected one of 2 rows, as inputs has, got 3; cache.rows\(index\) takes rows"):
        model.extend(x[:2, :1], cache)
    with pytest.raises(ValueError, match=r"length: expected a number in 0 .. 4, the cache's length, got 5"):
        cache.truncate(5)
    with pytest.raises(ValueError, match=r"index: expected int64 rows \[M\], got torch.bool \[3\]"):
        cache.rows(torch.ones(3, dtype=torch.bool))
