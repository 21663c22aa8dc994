"""Autoregressive sampling, the baseline: the same loop, from left to right, with a causal model in the denoiser's place."""

from __future__ import annotations

from typing import Any

import torch

from ..ops import upload
from ..protocols import CausalLM, offers_cache
from .evaluating import evaluating
from .generate import generate
from .sample_output import SampleOutput


class NextToken:
    """A causal model as a denoiser that knows the first masked position of each sequence, and nothing of those behind it.

    What was read is kept where the model offers ``extend`` (edlm.protocols.CausalLM): a step then reads one token a sequence. A
    sequence that was not in the step before, as one with a longer prompt, makes the step read all of them anew.
    """

    def __init__(self, causal_lm: CausalLM, mask_token_id: int | None = None) -> None:
        size = getattr(causal_lm, "vocab_size", None)
        if not isinstance(size, int) or not (offers_cache(causal_lm) or callable(causal_lm)):
            raise ValueError(
                "causal_lm: expected vocab_size, and extend, head and bos_token_id or a call that gives logits "
                f"(edlm.protocols.CausalLM), got {type(causal_lm).__name__}"
            )
        mask_token_id = size if mask_token_id is None else mask_token_id
        if not 0 <= mask_token_id <= size:
            raise ValueError(f"mask_token_id: expected an id of the model, or the one after them, {size}; got {mask_token_id}")
        self.causal_lm, self.mask_token_id, self.vocab_size = causal_lm, mask_token_id, max(size, mask_token_id + 1)
        self.max_length = getattr(causal_lm, "max_length", None)
        self._rows = torch.empty(0, dtype=torch.int64)  # whose inputs the cache holds
        self._columns, self._position, self._read, self._cache = (0, 0), 0, 0, None
        self._taken: torch.Tensor | None = None

    def prepare(self, number: int, rows: torch.Tensor, columns: tuple[int, int], masked: torch.Tensor) -> None:
        """The next call is step ``number`` of these sequences, all at the same position: the first that is masked."""
        first = masked.long().argmax(1)
        if not bool((first == first[0]).all()):
            raise ValueError(
                "denoiser: NextToken knows one position of all sequences at a time: expected sampler='left_to_right', got another; "
                "edlm.samplers.sample_autoregressive does it"
            )
        self._position, self._taken = int(first[0]), None
        follows = number > 0 and columns[0] == self._columns[0] and bool(torch.isin(rows, self._rows).all())
        if not follows:
            self._cache, self._read = None, 0
        elif not torch.equal(rows, self._rows):
            self._taken = torch.searchsorted(self._rows, rows)
        self._rows, self._columns = rows, columns

    def hidden(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """[R, W, D], the row of the one position that is known in every column."""
        at = self._position
        if not offers_cache(self.causal_lm):
            known = torch.where(xt == self.mask_token_id, 0, xt)[:, : at + 1]
            return self.causal_lm(known)[:, -1:].expand(-1, xt.shape[1], -1)
        if self._taken is not None and self._cache is not None:
            self._cache, self._taken = self._cache.rows(upload(self._taken, xt.device)), None
        bos = torch.full_like(xt[:, :1], self.causal_lm.bos_token_id)
        inputs = torch.cat([bos, xt[:, :at]], 1)[:, self._read :]
        hidden, self._cache = self.causal_lm.extend(inputs, self._cache)
        self._read = at + 1
        return hidden[:, -1:].expand(-1, xt.shape[1], -1)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, D] -> logits [N, V], the mask's among them."""
        logits = self.causal_lm.head(hidden) if offers_cache(self.causal_lm) else hidden
        return torch.nn.functional.pad(logits, (0, self.vocab_size - logits.shape[-1]), value=-torch.inf)

    def __call__(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(xt, t).flatten(0, 1)).view(*xt.shape, -1)


def sample_autoregressive(causal_lm: CausalLM, *, mask_token_id: int | None = None, **options: Any) -> SampleOutput:
    """Sample x_i ~ p(x_i | x_<i) from left to right, with a KV cache where the model has one.

    Args:
        causal_lm: ``vocab_size``, and ``extend``, ``head`` and ``bos_token_id`` (a KV cache), or a call x0 [N, L] -> logits [N, L, V]
            of which row i predicts x0[:, i] and reads nothing from i on.
        mask_token_id: what stands in a prompt where text is wanted; the id after the model's last one if left out. Text behind such
            a place is kept, and read once the sampler is past it; it does not know of it before.
        options: of ``generate``: batch_size and length, or prompt; lengths, stop_token_id, pad_token_id, temperature, top_k, top_p,
            min_p, seed, device, return_history, on_step, progress.

    Returns:
        SampleOutput; nfe counts the steps, each one token of every sequence that is not yet complete.

    Raises:
        ValueError: as ``generate``; a model of another kind; an option that has no meaning here.

    RNG: position i draws Philox(seed[b]; i, 0, i, TOKEN).
    """
    allowed = {"batch_size", "length", "prompt", "lengths", "stop_token_id", "pad_token_id", "temperature", "top_k", "top_p",
               "min_p", "seed", "device", "return_history", "on_step", "progress"}  # fmt: skip
    for name in options.keys() - allowed:
        raise ValueError(f"{name}: it has no meaning for autoregressive sampling; expected one of {', '.join(sorted(allowed))}")
    if options.get("device") is None and options.get("prompt") is None and isinstance(causal_lm, torch.nn.Module):
        parameter = next(causal_lm.parameters(), None)
        options["device"] = None if parameter is None else parameter.device
    with evaluating(causal_lm):
        return generate(NextToken(causal_lm, mask_token_id), sampler="left_to_right", **options)
