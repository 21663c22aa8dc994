"""Windows of tokens in a shuffled order that is a function of (seed, step): to resume, the number of the step is enough."""

from __future__ import annotations

import numpy as np
import torch


class WindowDataset:
    """Fixed-length windows over a token array, shuffled anew each epoch; an epoch visits each of its windows once.

    Each epoch cuts at another offset below ``length``, so that windows do not always begin at the same tokens.

    Args:
        tokens: integer [M], memory-mapped or not. length: L. batch_size: B. seed: of the order.

    Raises:
        ValueError: fewer than two windows' worth of tokens, or sizes below 1.
    """

    def __init__(self, tokens: np.ndarray, length: int, batch_size: int, *, seed: int) -> None:
        if length < 1 or batch_size < 1:
            raise ValueError(f"length, batch_size: expected numbers >= 1, got {length}, {batch_size}")
        # One window is given up to the offset, so that all epochs are equally long.
        self.num_windows = len(tokens) // length - 1
        if self.num_windows < 1:
            raise ValueError(
                f"text: expected at least {2 * length} tokens for windows of length {length}, got {len(tokens)}; "
                "take more text or shorter windows"
            )
        self.tokens, self.length, self.batch_size, self.seed = tokens, length, batch_size, seed
        self._epoch, self._starts = -1, np.empty(0, dtype=np.int64)

    def starts(self, epoch: int) -> np.ndarray:
        """int64 [num_windows]: where the windows of an epoch begin, in the order in which they are visited."""
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed & (2**64 - 1), epoch])))
            shift = int(generator.integers(self.length))
            self._epoch, self._starts = epoch, generator.permutation(self.num_windows) * self.length + shift
        return self._starts

    def batch(self, step: int) -> torch.Tensor:
        """int64 [B, L]: batch ``step`` of the run, a function of (seed, step) alone."""
        rows = []
        for n in range(step * self.batch_size, (step + 1) * self.batch_size):
            start = self.starts(n // self.num_windows)[n % self.num_windows]
            rows.append(self.tokens[start : start + self.length])
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def windows(tokens: np.ndarray, length: int, count: int | None = None) -> torch.Tensor:
    """int64 [N, L]: consecutive windows from the start, all of them or ``count`` spread evenly: what is evaluated.

    Raises:
        ValueError: not one whole window; sizes below 1.
    """
    if length < 1 or (count is not None and count < 1):
        raise ValueError(f"length, count: expected numbers >= 1, got {length}, {count}")
    available = len(tokens) // length
    if available < 1:
        raise ValueError(
            f"text: expected at least {length} tokens for one window of length {length}, got {len(tokens)}; "
            "take more text or shorter windows"
        )
    table = torch.from_numpy(np.asarray(tokens[: available * length]).astype(np.int64)).view(available, length)
    if count is None or count >= available:
        return table
    return table[torch.arange(count) * (available - 1) // max(1, count - 1)]
