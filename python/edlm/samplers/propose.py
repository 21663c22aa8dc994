"""K candidates from one denoiser call: the head and the sampler see the rows that are wanted, and no others where the model allows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch

from ..ops import Candidates, sample_candidates, sample_categorical, upload
from ..protocols import Denoiser, offers_head
from .move import Move, Names

# Rows go through the head in chunks of which the float32 logits, and what is drawn from them, stay below this.
_HEAD_BYTES = 64 << 20


def denoise(denoiser: Denoiser, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The network, once: hidden [B, L, D] where it offers ``hidden`` and ``head``, logits [B, L, V] otherwise."""
    split = offers_head(denoiser)
    output = denoiser.hidden(xt, t) if split else denoiser(xt, t)
    what, expected = ("hidden", "[B, L, D]") if split else ("logits", "[B, L, V]")
    sizes = (*xt.shape, None if split else denoiser.vocab_size)
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else ()
    if len(shape) != 3 or any(size not in (None, found) for size, found in zip(sizes, shape, strict=True)):
        got = list(shape) if isinstance(output, torch.Tensor) else type(output).__name__
        wanted = [size or "D" for size in sizes]
        raise ValueError(f"denoiser: expected {what} {expected} = {wanted}, got {got}".replace("'D'", "D"))
    return output


class Proposal:
    """Draws from mu, tempered and filtered, into buffers that are allocated once.

    ``compact``: the rows that are wanted are known on the host and picked out, and nothing else is computed. Otherwise every row goes
    through the head, and all shapes are the same whatever is wanted, as a CUDA graph needs it. Both give the same draws: a row's
    counter knows its sequence and position, not where its logits lie.
    """

    def __init__(self, denoiser: Denoiser, compact: bool, **filters: float | int | None) -> None:
        self.denoiser, self.compact, self.filters = denoiser, compact, filters
        self.shaped = filters["temperature"] != 1 or any(filters[name] is not None for name in ("top_k", "top_p", "min_p"))
        self._buffers: dict[object, torch.Tensor] = {}

    def draw(self, output: torch.Tensor, move: Move, num_candidates: int, names: Names) -> Candidates:
        """The active masked rows of xt, drawn K times each from what ``denoise`` returned; overwritten by the next draw."""
        xt, mask, filters = move.xt, self.denoiser.mask_token_id, self.filters
        if not offers_head(self.denoiser):
            active = upload(move.active, xt.device) if self.compact else move.active
            with self._blaming(output, lambda: (active & (xt == mask)).nonzero().cpu(), names):
                return sample_candidates(
                    output, xt, mask, num_candidates, active=active, seed=move.seed, offset=move.offset, **filters
                )
        candidates = self._candidates(xt, num_candidates)
        each = max(4 * self.denoiser.vocab_size, 16 * num_candidates)  # bytes of a row
        if self.compact:
            for chunk in move.active.nonzero().split(max(1, _HEAD_BYTES // each)):
                b, i = (upload(index, xt.device) for index in chunk.T.contiguous())
                logits = self._head(output[b, i])
                with self._blaming(logits, lambda chunk=chunk: chunk, names):
                    drawn = sample_categorical(
                        logits, num_candidates, position=i, forbidden=mask, seed=move.seed[b], offset=move.offset[b], **filters
                    )
                self._store(candidates, (b, slice(None), i), drawn)
            return candidates
        batch, length = xt.shape
        sequences = max(1, _HEAD_BYTES // (each * length))
        for first in range(0, batch, sequences):
            part = slice(first, first + sequences)
            logits = self._head(output[part].flatten(0, 1)).view(-1, length, self.denoiser.vocab_size)
            x, active = xt[part], move.active[part]
            # Of the logits the rows count from ``first`` on.
            with self._blaming(logits, lambda x=x, on=active: (on & (x == mask)).nonzero().cpu(), names, first):
                drawn = sample_candidates(
                    logits, x, mask, num_candidates, active=active, seed=move.seed[part], offset=move.offset[part], **filters
                )
            self._store(candidates, part, drawn)
        return candidates

    def _store(self, candidates: Candidates, where: slice | tuple, drawn: Candidates) -> None:
        candidates.tokens[where], candidates.log_probs[where] = drawn.tokens, drawn.log_probs
        if self.shaped:
            candidates.model_log_probs[where] = drawn.model_log_probs

    def _head(self, rows: torch.Tensor) -> torch.Tensor:
        logits = self.denoiser.head(rows)
        if not isinstance(logits, torch.Tensor) or logits.shape != (len(rows), self.denoiser.vocab_size):
            got = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ValueError(
                f"denoiser: expected logits [N, V] = [{len(rows)}, {self.denoiser.vocab_size}] of its head, got {got}"
            )
        return logits

    @contextlib.contextmanager
    def _blaming(self, logits: torch.Tensor, rows: Callable[[], torch.Tensor], names: Names, first: int = 0) -> Iterator[None]:
        """Where an op refuses logits, say of which sequence, position and step; ``rows`` gives int64 [N, 2] of (sequence, column)."""
        try:
            yield
        except ValueError as error:
            at = rows()
            flat = logits if logits.dim() == 2 else logits[at[:, 0], at[:, 1]]
            keep = torch.arange(flat.shape[-1], device=flat.device) != self.denoiser.mask_token_id
            bad = (flat.isnan() | (flat == math.inf))[:, keep].any(-1) | ~flat[:, keep].isfinite().any(-1)
            if not bool(bad.any()):
                raise
            b, i = at[int(bad.long().argmax())].tolist()
            raise ValueError(
                f"denoiser: expected logits that are finite or -inf, and a finite one, got others at position "
                f"{names.columns[0] + i} of {names.whose(first + b)}"
            ) from error

    def _candidates(self, xt: torch.Tensor, num_candidates: int) -> Candidates:
        """xt K times with log-probabilities 0, in the buffers."""
        batch, length = xt.shape
        shape, names = (batch, num_candidates, length), ("log_probs", "model_log_probs") if self.shaped else ("log_probs",)
        tokens = self._buffer("tokens", shape, torch.int64, xt.device).copy_(xt[:, None])
        logs = [self._buffer(name, shape, torch.float32, xt.device).zero_() for name in names]
        return Candidates(tokens, logs[0], logs[-1])

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Of that shape, at the start of a buffer as large as ever was asked for; for a graph, in one that keeps its address."""
        key, size = name if self.compact else (name, shape), math.prod(shape)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return self._buffers[key][:size].view(shape)
