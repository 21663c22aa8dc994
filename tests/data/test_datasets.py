"""Windows in a shuffled order: each once an epoch, and a function of (seed, step) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from edlm.data import WindowDataset, pack, windows
from edlm.data.tokenizers import CharTokenizer

LENGTH, BATCH = 7, 4
TOKENS = np.arange(100, dtype=np.uint8)  # each token tells its position


def dataset(seed=0, tokens=TOKENS, length=LENGTH, batch_size=BATCH):
    return WindowDataset(tokens, length, batch_size, seed=seed)


def test_an_epoch_visits_each_window_once():
    data = dataset()
    assert data.num_windows == 100 // LENGTH - 1
    offsets = set()
    for epoch in range(50):
        starts = np.sort(data.starts(epoch))
        assert len(starts) == data.num_windows
        assert (np.diff(starts) == LENGTH).all()
        assert 0 <= starts[0] < LENGTH and starts[-1] + LENGTH <= len(TOKENS)
        offsets.add(int(starts[0]))
    assert offsets == set(range(LENGTH))


def test_batches_walk_through_the_epochs():
    """Across an edge as well: 13 windows in batches of 4."""
    data, expected = dataset(), []
    for epoch in range(4):
        expected += [TOKENS[s : s + LENGTH].tolist() for s in dataset().starts(epoch)]
    got = torch.cat([data.batch(step) for step in range(13)])
    assert got.dtype == torch.int64 and got.shape == (13 * BATCH, LENGTH)
    assert data.num_windows == 13 and got.tolist() == expected


def test_a_batch_larger_than_an_epoch():
    batch = dataset(batch_size=30).batch(1)
    together = torch.cat([dataset(batch_size=1).batch(step) for step in range(30, 60)])
    assert torch.equal(batch, together)


def test_a_batch_is_a_function_of_seed_and_step():
    steps = [0, 9, 3, 100, 2, 9, 10_000]
    in_this_order = dataset()
    for step in steps:
        assert torch.equal(in_this_order.batch(step), dataset().batch(step))


def test_seeds_and_epochs_differ():
    orders = {tuple(dataset(seed).starts(0) - dataset(seed).starts(0).min()) for seed in range(-2, 8)}
    orders |= {tuple(dataset().starts(epoch) - dataset().starts(epoch).min()) for epoch in range(1, 11)}
    assert len(orders) == 20
    assert not torch.equal(dataset(0).batch(0), dataset(1).batch(0))


def test_the_order_is_uniform():
    """Which window comes first: 2 600 epochs over 13 windows, a chi-square of 12 degrees, false alarm 1e-6."""
    data, counts = dataset(), np.zeros(13)
    for epoch in range(2600):
        starts = data.starts(epoch)
        counts[starts[0] // LENGTH] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 53.5


def test_rows_are_rows_of_the_batch():
    """Any division among processes gives the same rows, in any order of asking, across an epoch's end as well."""
    whole = dataset(batch_size=30)
    for step in (0, 1, 7):
        batch = whole.batch(step)
        assert batch.dtype == torch.int64 and batch.shape == (30, LENGTH)
        for first, last in ((20, 30), (0, 1), (1, 20), (5, 5)):
            assert torch.equal(dataset(batch_size=30).rows(step, first, last), batch[first:last])
    for first, last in ((-1, 2), (3, 2), (0, 31)):
        with pytest.raises(ValueError, match=f"expected 0 <= first <= last <= 30, got {first}, {last}"):
            whole.rows(0, first, last)


def test_an_order_is_drawn_once_an_epoch(monkeypatch):
    """Rows on both sides of an epoch's end, asked for in turn: as two processes' loaders in one would."""
    drawn, real = [], np.random.SeedSequence
    monkeypatch.setattr(np.random, "SeedSequence", lambda key: drawn.append(key[1]) or real(key))
    data = dataset()  # 13 windows: batch 3 is windows 12, then 0, 1, 2 of the next epoch
    for _ in range(5):
        data.rows(3, 0, 1)
        data.rows(3, 1, 4)
    for step in range(4, 12):
        data.batch(step)
    assert drawn == [0, 1, 2, 3]


FRAME = (200, 201)


def test_framed_windows():
    """bos, length - 2 tokens, eos; the tokens are those of windows of length - 2, in their order."""
    framed = WindowDataset(TOKENS, LENGTH, BATCH, seed=3, frame=FRAME)
    bare = WindowDataset(TOKENS, LENGTH - 2, BATCH, seed=3)
    assert framed.num_windows == bare.num_windows == 19
    for step in (0, 4, 11):
        batch = framed.batch(step)
        assert batch.shape == (BATCH, LENGTH) and batch.dtype == torch.int64
        assert (batch[:, 0] == 200).all() and (batch[:, -1] == 201).all()
        assert torch.equal(batch[:, 1:-1], bare.batch(step))
    for count in (None, 2, 20):
        table = windows(TOKENS, LENGTH, count, frame=FRAME)
        assert torch.equal(table[:, 1:-1], windows(TOKENS, LENGTH - 2, count))
        assert (table[:, 0] == 200).all() and (table[:, -1] == 201).all()


@pytest.mark.parametrize(("length", "frame"), [(2, FRAME), (7, (-1, 3))])
def test_frames_that_cannot_be(length, frame):
    for call in (lambda: WindowDataset(TOKENS, length, 1, seed=0, frame=frame), lambda: windows(TOKENS, length, frame=frame)):
        with pytest.raises(ValueError, match="length, frame: expected a length >= 3 and two ids"):
            call()


def test_the_order_of_earlier_versions():
    """Trained results depend on it: the first windows of two epochs, as version 0.1 drew them."""
    data = WindowDataset(np.arange(1000, dtype=np.uint16), 10, 4, seed=5)
    assert data.starts(0)[:6].tolist() == [296, 496, 916, 46, 846, 176]
    assert data.starts(1)[:6].tolist() == [601, 591, 341, 951, 691, 731]


@pytest.mark.parametrize("shard_tokens", [10**6, 50])
def test_tokens_of_a_folder(tmp_path, shard_tokens):
    text = "the quick brown fox jumps over the lazy dog " * 5
    tokens = pack([text], CharTokenizer(), tmp_path / "t", source="fox", shard_tokens=shard_tokens)
    flat = CharTokenizer().encode(text)
    batch = dataset(tokens=tokens).batch(0)
    assert torch.equal(batch, dataset(tokens=flat).batch(0))
    batch[0, 0] = 5  # a copy: the file is not touched
    assert torch.equal(dataset(tokens=tokens).batch(0), dataset(tokens=flat).batch(0))
    for count in (None, 1, 3, 20):
        assert torch.equal(windows(tokens, 7, count), windows(flat, 7, count))


@pytest.mark.parametrize(("size", "enough"), [(0, False), (6, False), (13, False), (14, True), (15, True)])
def test_how_short_a_text_may_be(size, enough):
    if enough:
        assert dataset(tokens=TOKENS[:size]).batch(3).shape == (BATCH, LENGTH)
        return
    with pytest.raises(
        ValueError, match=f"text: expected at least 14 tokens for windows of length 7, got {size}; take more text"
    ):
        dataset(tokens=TOKENS[:size])


@pytest.mark.parametrize(("length", "batch_size"), [(0, 1), (1, 0), (-1, 1)])
def test_sizes_below_one(length, batch_size):
    with pytest.raises(ValueError, match=f"length, batch_size: expected numbers >= 1, got {length}, {batch_size}"):
        dataset(length=length, batch_size=batch_size)


def test_windows_are_consecutive():
    table = windows(TOKENS, 7)
    assert table.dtype == torch.int64 and table.shape == (14, 7)
    assert table.flatten().tolist() == list(range(98))
    assert torch.equal(windows(TOKENS, 7, 14), table) and torch.equal(windows(TOKENS, 7, 99), table)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 13])
def test_windows_are_spread_evenly(count):
    chosen = (windows(TOKENS, 7, count)[:, 0] // 7).tolist()
    assert len(chosen) == count and chosen[0] == 0
    if count > 1:
        assert chosen[-1] == 13
        gaps = np.diff(chosen)
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_windows_of_a_long_text_are_spread_evenly():
    """Where a step in float32 would be too coarse for an index."""
    chosen = windows(np.arange(2**24 + 101, dtype=np.uint32), 1, 2**24 + 100)[:, 0]
    assert (chosen[1:] > chosen[:-1]).all()


def test_windows_of_too_little():
    assert windows(TOKENS[:7], 7).shape == (1, 7)
    with pytest.raises(ValueError, match="text: expected at least 7 tokens for one window of length 7, got 6"):
        windows(TOKENS[:6], 7)
    for length, count in ((0, None), (7, 0), (7, -1)):
        with pytest.raises(ValueError, match="length, count: expected numbers >= 1"):
            windows(TOKENS, length, count)
