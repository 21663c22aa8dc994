"""An n-gram language model: a judge of samples that shares nothing with the networks that it judges."""

from __future__ import annotations

import numpy as np
import torch

from .judges import check_count


class NGramModel:
    """Interpolated Witten-Bell n-grams over token ids; fits the CausalLM protocol.

        p_k(w | h) = (c(h w) + T(h) p_{k-1}(w | h')) / (c(h) + T(h)),    p_0 = 1 / V,

    h being the k - 1 tokens before w, h' the last k - 2 of them, c a count and T(h) the number of distinct tokens seen after h.
    Where h was never seen, p_k = p_{k-1}. Every context so gives a proper distribution over the V ids, none of them 0.

    The first positions of a sequence have fewer tokens before them and use the shorter orders: a sequence is scored as a window
    into running text, with nothing known of what preceded it.

    Args:
        tokens: integers [M] (running text) or [N, L] (sequences; n-grams do not cross them), torch or numpy.
        vocab_size: V, the ids being 0 .. V-1. Leave the mask out where it is the last id: it takes a share of p_0.
        order: n >= 1, with V**n < 2**63.

    Raises:
        ValueError: numbers that are no int >= 1; ids outside the vocabulary; an empty text; an order too high for V.

    Cost: a sort of the text for each order; memory for its distinct n-grams.
    Source: Witten and Bell, IEEE Transactions on Information Theory 37(4), 1991, method C; interpolation as in Chen and Goodman,
    1998.
    """

    def __init__(self, tokens: torch.Tensor | np.ndarray, vocab_size: int, *, order: int = 6) -> None:
        check_count("vocab_size", vocab_size)
        check_count("order", order)
        if vocab_size**order >= 2**63:
            raise ValueError(
                f"order: expected vocab_size**order < 2**63, got order {order} with vocab_size {vocab_size}; lower the order"
            )
        self.vocab_size, self.order = vocab_size, order
        rows = self._ids(tokens)
        if rows.size == 0:
            raise ValueError("tokens: expected at least one token to count, got none")
        self._tables: list[tuple[np.ndarray, ...]] = []
        for codes in self._codes(rows):
            grams, counts = np.unique(codes, return_counts=True)
            # An n-gram's number is context * V + token, so contexts come sorted, each with its followers in one run.
            contexts, starts = np.unique(grams // vocab_size, return_index=True)
            if len(grams):
                totals = np.add.reduceat(counts, starts)
                distinct = np.diff(np.append(starts, len(grams)))
            else:
                totals = distinct = np.zeros(0, np.int64)
            self._tables.append((grams, counts, contexts, totals, distinct))

    def _ids(self, tokens: torch.Tensor | np.ndarray) -> np.ndarray:
        ids = tokens.detach().cpu().numpy() if isinstance(tokens, torch.Tensor) else np.asarray(tokens)
        if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
            raise ValueError(f"tokens: expected integers [M] or [N, L], got {ids.dtype} {list(ids.shape)}")
        if ids.size and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            raise ValueError(
                f"tokens: expected ids in 0 .. {self.vocab_size - 1}, got {ids.min()} .. {ids.max()}; replace masks first"
            )
        return np.atleast_2d(ids).astype(np.int64)

    def _codes(self, rows: np.ndarray) -> list[np.ndarray]:
        """For k = 1 .. order the numbers of the k-grams, [N, max(L - k + 1, 0)], by the position of their first token."""
        codes = [rows]
        for k in range(1, self.order):
            codes.append(codes[-1][:, : max(rows.shape[1] - k, 0)] * self.vocab_size + rows[:, k:])
        return codes

    def log_probs(self, x0: torch.Tensor) -> torch.Tensor:
        """log p(x_i | the order - 1 tokens before it), every token scored: int64 [N, L] -> float32 [N, L], in nats."""
        if x0.dim() != 2:
            raise ValueError(f"x0: expected int64 tokens [N, L], got {x0.dtype} {list(x0.shape)}")
        rows = self._ids(x0)
        probs = np.full(rows.shape, 1.0 / self.vocab_size)
        for k, (codes, table) in enumerate(zip(self._codes(rows), self._tables, strict=True)):
            grams, counts, contexts, totals, distinct = table
            if codes.size == 0 or grams.size == 0:
                break
            seen_gram = _find(grams, codes)
            seen_context = _find(contexts, codes // self.vocab_size)
            c = np.where(seen_gram >= 0, counts[seen_gram], 0)
            total, types = totals[seen_context], distinct[seen_context]
            shorter = probs[:, k:]
            probs[:, k:] = np.where(seen_context >= 0, (c + types * shorter) / (total + types), shorter)
        return torch.from_numpy(np.log(probs).astype(np.float32)).to(x0.device)


def _find(table: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The index of each key in a sorted table, -1 where it is absent."""
    index = np.searchsorted(table, keys).clip(max=len(table) - 1)
    return np.where(table[index] == keys, index, -1)
