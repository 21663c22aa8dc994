"""Models as lm-evaluation-harness sees them, for its likelihood tasks. It needs ``pip install 'edlm-torch[lm-eval]'``.

    import lm_eval
    from edlm.data import tokenizer_from
    from edlm.eval.lm_harness import HarnessLM
    from edlm.models import DiT

    model = DiT.from_pretrained("runs/denoiser/model")
    lm = HarnessLM(model, tokenizer_from(model.tokenizer_description), num_times=128)
    results = lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])

Importing ``edlm.eval`` does not import this module.
"""

from __future__ import annotations

import warnings
import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..protocols import CausalLM, Denoiser, Tokenizer, offers_cache, offers_head
from ..samplers.evaluating import evaluating
from .likelihood import ar_nll, device_of, nelbo

try:
    from lm_eval.api.model import LM
except ImportError:
    raise ImportError("edlm.eval.lm_harness needs the package lm_eval: pip install 'edlm-torch[lm-eval]'") from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


class _Text(NamedTuple):
    """Tokens to score: the first ``given`` of them are read only."""

    ids: list[int]
    given: int
    seed: int


class HarnessLM(LM):
    """A denoiser or an autoregressive model that answers ``loglikelihood`` and ``loglikelihood_rolling``, in nats.

    What the numbers are:

    - An autoregressive model's (anything with ``log_probs``) are exact. It reads its own BOS in front of the first token, and nothing
      else is put there.
    - A denoiser's are **lower bounds**, estimated: minus the NELBO of the continuation with the context observed throughout
      (``edlm.eval.nelbo``, ``given``), from ``num_times`` draws. One scored token is exact for a denoiser that ignores t. How far
      below log p the bound lies differs between models and between the choices of a question; a denoiser's perplexity is an upper
      bound, and beside an autoregressive model's the comparison is not of like with like.
    - An energy has no part in it: these are the proposal's figures.

    A text is scored at its own length, with nothing before or behind it. A denoiser that only ever saw full windows is then asked for
    something that it was not trained on.

    Tokens: context and continuation are encoded together, white space at the context's end being the continuation's, and the
    continuation is what lies behind as many tokens as the context has by itself: where an entry spans the two, it counts as context.
    A context that is too long for the model's ``max_length`` loses its beginning. A character tokenizer (text8) normalises first:
    case, digits and punctuation are not scored as written, and what the harness calculates per byte or per word of the original text
    (bits per byte, word perplexity, acc_norm) is then of two different texts.

    ``is_greedy`` (whether greedy decoding writes the continuation) is, of an autoregressive model, that each token is the most likely
    one; where it does not offer ``extend`` and ``head`` (see the protocol) it is always False, with a warning at the start. Of a
    denoiser it is that one call with the whole continuation masked has each token as its most likely one: parallel decoding in one
    step, not the best text that more steps would find.

    Args:
        model: fits ``Denoiser`` or ``CausalLM``; with ``log_probs`` it counts as autoregressive. ``max_length`` (int, or None for
            any): the most tokens of one call. A torch module is put into eval mode while it scores, and its modes are restored.
        tokenizer: its ``encode`` is used. Its mask must be the denoiser's.
        num_times: draws a text, for a denoiser. The spread that they leave falls somewhat faster than 1 / sqrt(num_times).
        seed: an int, for a denoiser.
        batch_size: rows of one call: texts of an autoregressive model, (text, draw) of a denoiser. It does not change the draws.

    Raises:
        ValueError: a model that is neither; another mask. While scoring: counts below 1; a continuation without a token, or longer
            than ``max_length``; text that the tokenizer does not encode. ImportError: lm_eval is not installed (on import).

    RNG: a text draws as ``nelbo`` does, with ``seed`` + crc32 of the context's ids (int64): what one request gets does not depend on
    the others, and the choices of one question see the same masks where they have as many tokens, which takes noise out of their
    differences. A window of a rolling text draws with ``seed`` + crc32 of its own ids.
    """

    def __init__(
        self,
        model: Denoiser | CausalLM,
        tokenizer: Tokenizer,
        *,
        num_times: int = 32,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        self._causal = isinstance(model, CausalLM)
        if not self._causal and not isinstance(model, Denoiser):
            raise ValueError(
                f"model: expected log_probs (an autoregressive model), or mask_token_id, vocab_size and a call (a denoiser), got "
                f"{type(model).__name__}"
            )
        if not self._causal and model.mask_token_id != tokenizer.mask_token_id:
            raise ValueError(
                f"tokenizer: expected the denoiser's mask_token_id {model.mask_token_id}, got {tokenizer.mask_token_id}; take the one "
                "that the model was trained with"
            )
        if self._causal and not offers_cache(model):
            warnings.warn(
                "model: offers no extend and head, so is_greedy is always False; accuracies that ask for it mean nothing",
                stacklevel=2,
            )
        self.model, self.tokenizer = model, tokenizer
        self.num_times, self.seed, self.batch_size = num_times, seed, batch_size
        self.max_length: int | None = getattr(model, "max_length", None)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log p(continuation | context), or its lower bound; is_greedy) of each request, whose ``args`` are the two texts.

        An empty context is allowed: everything is scored. Raises ValueError as the class says.
        """
        texts = [self._pair(*request.args) for request in requests]
        return list(zip(*self._score(texts, greedy=True), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """log p of each text (``args`` is the text alone), or its lower bound.

        Where it is longer than ``max_length`` it is cut into consecutive windows of that many tokens, the last one shorter, each
        scored from its own start as a text by itself, and summed. The harness' own models let a token look back across such a cut,
        which scores better. A text without tokens has log-likelihood 0.
        """
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self._encode(request.args[0])
            size = self.max_length or max(1, len(ids))
            for start in range(0, len(ids), size):
                window = ids[start : start + size]
                windows.append(_Text(window, 0, self._seed(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, nats in zip(owners, self._score(windows, greedy=False)[0], strict=True):
            totals[i] += nats
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Not offered: the harness means greedy left-to-right text, up to a string."""
        raise NotImplementedError(
            "generate_until: HarnessLM answers likelihood tasks alone (loglikelihood, multiple_choice, loglikelihood_rolling); draw "
            "texts with edlm.samplers.generate"
        )

    def _encode(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer.encode(text)]

    def _seed(self, ids: Sequence[int]) -> int:
        return self.seed + zlib.crc32(torch.tensor(ids, dtype=torch.int64).numpy().tobytes())

    def _pair(self, context: str, continuation: str) -> _Text:
        visible = context.rstrip()
        ids = self._encode(context + continuation)
        given = len(self._encode(visible))
        scored = len(ids) - given
        if scored < 1:
            why = "this tokenizer cannot serve the task" if continuation else "the request's continuation is empty: leave it out"
            raise ValueError(
                f"continuation: expected text with a token of its own behind the context, got {continuation!r} behind "
                f"{visible[-40:]!r}; {why}"
            )
        if self.max_length is not None and scored > self.max_length:
            raise ValueError(
                f"continuation: expected at most max_length = {self.max_length} tokens, got {scored}: {continuation[:40]!r}; take a "
                "model of longer texts, or leave the request out"
            )
        cut = max(len(ids) - self.max_length, 0) if self.max_length is not None else 0
        return _Text(ids[cut:], given - cut, self._seed(ids[cut:given]))

    def _score(self, texts: list[_Text], *, greedy: bool) -> tuple[list[float], list[bool]]:
        """Total nats of the scored tokens of each text, and whether they are the greedy ones (False where not asked)."""
        nats, chosen = [0.0] * len(texts), [False] * len(texts)
        lengths: dict[int, list[int]] = defaultdict(list)
        for i, text in enumerate(texts):
            lengths[len(text.ids)].append(i)
        for length, where in sorted(lengths.items()):
            x0 = torch.tensor([texts[i].ids for i in where])
            given = torch.arange(length) < torch.tensor([texts[i].given for i in where])[:, None]
            if self._causal:
                estimate = ar_nll(self.model, x0, given=given, batch_size=self.batch_size)
            else:
                seeds = torch.tensor([texts[i].seed for i in where])
                estimate = nelbo(self.model, x0, given=given, num_times=self.num_times, seed=seeds, batch_size=self.batch_size)
            totals = -estimate.values * (~given).sum(1)
            flags = self._greedy(x0, ~given) if greedy else [False] * len(where)
            for i, total, flag in zip(where, totals.tolist(), flags, strict=True):
                nats[i], chosen[i] = total, flag
        return nats, chosen

    def _greedy(self, x0: torch.Tensor, scored: torch.Tensor) -> list[bool]:
        if self._causal and not offers_cache(self.model):
            return [False] * len(x0)
        device, flags = device_of(self.model, x0), []
        with torch.no_grad(), evaluating(self.model):
            for tokens, rows in zip(x0.to(device).split(self.batch_size), scored.to(device).split(self.batch_size), strict=True):
                logits = self._next(tokens, rows) if self._causal else self._opened(tokens, rows)
                right = torch.ones_like(rows)
                right[rows] = logits.argmax(-1) == tokens[rows]
                flags += right.all(1).tolist()
        return flags

    def _next(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] of an autoregressive model at ``rows``, bool [B, L]."""
        bos = torch.full_like(tokens[:, :1], self.model.bos_token_id)
        hidden, _ = self.model.extend(torch.cat([bos, tokens[:, :-1]], 1), keep=False)
        return self.model.head(hidden[rows])

    def _opened(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] of a denoiser at ``rows``, bool [B, L], all of them masked; the mask's own are -inf."""
        mask = self.model.mask_token_id
        xt, t = tokens.masked_fill(rows, mask), torch.ones(len(tokens), device=tokens.device)
        logits = self.model.head(self.model.hidden(xt, t)[rows]) if offers_head(self.model) else self.model(xt, t)[rows]
        return logits.index_fill(1, torch.tensor([mask], device=logits.device), -torch.inf)
