"""Windows of tokens in a shuffled order that is a function of (seed, step): to resume, the number of the step is enough."""

from __future__ import annotations

import numpy as np
import torch

from .shards import Tokens


class WindowDataset:
    """Fixed-length windows over tokens, shuffled anew each epoch; an epoch visits each of its windows once.

    Each epoch cuts at another offset below the window's length, so that windows do not always begin at the same tokens.

    Args:
        tokens: integer [M]: an array, memory-mapped or not, or ``Tokens``. length: L. batch_size: B. seed: of the order.
        frame: (bos, eos): each row is bos, L - 2 tokens, eos; the windows are then L - 2 tokens long. This is how OpenWebText is read
            in the published work (MDLM, arXiv 2406.07524): documents joined by eos, blocks framed. Without it a row is L tokens.

    Raises:
        ValueError: fewer than two windows' worth of tokens, or sizes below 1 (below 3 with a frame).
    """

    def __init__(
        self, tokens: np.ndarray | Tokens, length: int, batch_size: int, *, seed: int, frame: tuple[int, int] | None = None
    ) -> None:
        if length < 1 or batch_size < 1:
            raise ValueError(f"length, batch_size: expected numbers >= 1, got {length}, {batch_size}")
        self._inner = inner = _inner(length, frame)
        # One window is given up to the offset, so that all epochs are equally long.
        self.num_windows = len(tokens) // inner - 1
        if self.num_windows < 1:
            raise ValueError(
                f"text: expected at least {2 * inner} tokens for windows of length {length}, got {len(tokens)}; "
                "take more text or shorter windows"
            )
        self.tokens, self.length, self.batch_size, self.seed, self.frame = tokens, length, batch_size, seed, frame
        self._epochs: dict[int, np.ndarray] = {}

    def starts(self, epoch: int) -> np.ndarray:
        """int64 [num_windows]: where the windows of an epoch begin, in the order in which they are visited."""
        if epoch not in self._epochs:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed & (2**64 - 1), epoch])))
            shift = int(generator.integers(self._inner))
            starts = generator.permutation(self.num_windows) * self._inner + shift
            # The one before stays: rows on both sides of an epoch's end may be asked for in turn, and 4 million windows take 0.2 s.
            self._epochs = dict([*self._epochs.items()][-1:]) | {epoch: starts}
        return self._epochs[epoch]

    def rows(self, step: int, first: int, last: int) -> torch.Tensor:
        """int64 [last - first, L]: rows ``first`` .. ``last`` - 1 of batch ``step``, for one of several processes or for accumulation.

        Raises:
            ValueError: rows that the batch does not have.
        """
        if not 0 <= first <= last <= self.batch_size:
            raise ValueError(f"first, last: expected 0 <= first <= last <= {self.batch_size}, got {first}, {last}")
        table = np.empty((last - first, self.length), dtype=np.int64)
        begin = step * self.batch_size
        for row, n in zip(table, range(begin + first, begin + last), strict=True):
            start = self.starts(n // self.num_windows)[n % self.num_windows]
            _fill(row, self.tokens[start : start + self._inner], self.frame)
        return torch.from_numpy(table)

    def batch(self, step: int) -> torch.Tensor:
        """int64 [B, L]: batch ``step`` of the run, a function of (seed, step) alone."""
        return self.rows(step, 0, self.batch_size)


def windows(
    tokens: np.ndarray | Tokens, length: int, count: int | None = None, *, frame: tuple[int, int] | None = None
) -> torch.Tensor:
    """int64 [N, L]: consecutive windows from the start, all of them or ``count`` spread evenly: what is evaluated.

    ``frame``: as for ``WindowDataset``: each row is bos, L - 2 tokens, eos.

    Raises:
        ValueError: not one whole window; sizes below 1 (below 3 with a frame).
    """
    if length < 1 or (count is not None and count < 1):
        raise ValueError(f"length, count: expected numbers >= 1, got {length}, {count}")
    inner = _inner(length, frame)
    available = len(tokens) // inner
    if available < 1:
        raise ValueError(
            f"text: expected at least {inner} tokens for one window of length {length}, got {len(tokens)}; "
            "take more text or shorter windows"
        )
    count = available if count is None else min(count, available)
    # In int64: a step in float32 would be too coarse for the index of a long text.
    index = np.arange(count) if count == available else np.arange(count) * (available - 1) // max(1, count - 1)
    table = np.empty((count, length), dtype=np.int64)
    if 4 * count >= available:
        _fill(table, np.asarray(tokens[: available * inner]).reshape(available, inner)[index], frame)
    else:  # a few of many: the others are not read
        for row, i in zip(table, index.tolist(), strict=True):
            _fill(row, tokens[i * inner : (i + 1) * inner], frame)
    return torch.from_numpy(table)


def _inner(length: int, frame: tuple[int, int] | None) -> int:
    """How many tokens of the text a row holds."""
    if frame is None:
        return length
    if length < 3 or min(frame) < 0:
        raise ValueError(f"length, frame: expected a length >= 3 and two ids for framed windows, got {length}, {frame}")
    return length - 2


def _fill(row: np.ndarray, tokens: np.ndarray, frame: tuple[int, int] | None) -> None:
    if frame is None:
        row[...] = tokens
    else:
        row[..., 0], row[..., 1:-1], row[..., -1] = frame[0], tokens, frame[1]
