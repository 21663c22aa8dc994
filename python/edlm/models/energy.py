"""Residual energies of whole sequences from an autoregressive model. Low energy is good."""

from __future__ import annotations

import torch

from ..ops import gather_log_probs, linear_log_probs, upload
from ..protocols import CausalLM, offers_cache

# One more pass of the network costs about as much as this many tokens more in a large one: what a group of its own has to save.
# On a CPU core 16 to 65 at dims 768 to 64 were measured; on a GPU it is the launches of all layers, taken as a millisecond.
PASS_TOKENS = {"cpu": 32, "cuda": 1024}


def ar_residual(
    causal_lm: CausalLM,
    x0: torch.Tensor,
    xt: torch.Tensor,
    log_p: torch.Tensor,
    *,
    carry_over: bool,
    mask_token_id: int | None,
) -> torch.Tensor:
    """E = -sum log p_AR(x_i | x_<i) + log mu(x0 | xt), differentiable in the model: what ``ARResidualEnergy`` is made of.

    All candidates go through the model at once, in the mode (train or eval) that it is in. To fine-tune the model by NCE, hand this
    energy to ``edlm.diffusion.nce_loss``.

    Args:
        causal_lm: anything with ``log_probs(x0 [N, L]) -> [N, L]``.
        x0: int64 [B, K, L], complete. xt: int64 [B, L]. log_p: float [B, K, L], log mu a token, 0 at clean positions.
        carry_over: sum over masked positions of xt alone; else over all. mask_token_id: needed with carry_over.

    Returns:
        float32 [B, K], in nats; sums over positions are float64.

    Raises:
        ValueError: shapes that do not fit, of the model's answer too (every token is to be scored, the first one included);
            carry_over without a mask.

    Source: Xu et al., arXiv 2410.21357, section 4.
    """
    _check_shapes(x0, xt, log_p)
    _check_mask(carry_over, mask_token_id)
    rows = x0.flatten(0, 1)
    scored = causal_lm.log_probs(rows)
    if scored.shape != rows.shape:
        raise ValueError(
            f"causal_lm: expected log_probs of every token, [N, L] = {list(rows.shape)}, got {list(scored.shape)}; "
            "position 0 is scored too, after BOS"
        )
    terms = scored.double().reshape(x0.shape)
    if carry_over:
        # Not a product with 0: a token that the model holds impossible has -inf.
        terms = terms.masked_fill((xt != mask_token_id)[:, None], 0.0)
    return (log_p.sum(-1, dtype=torch.float64) - terms.sum(-1)).float()


def _check_shapes(x0: torch.Tensor, xt: torch.Tensor, log_p: torch.Tensor) -> None:
    if x0.dim() != 3 or tuple(xt.shape) != (x0.shape[0], x0.shape[2]) or log_p.shape != x0.shape:
        raise ValueError(
            f"x0, xt, log_p: expected [B, K, L], [B, L] and [B, K, L], got {list(x0.shape)}, {list(xt.shape)}, {list(log_p.shape)}"
        )


def _check_mask(carry_over: bool, mask_token_id: int | None) -> None:
    if carry_over and mask_token_id is None:
        raise ValueError(
            "mask_token_id: expected the denoiser's mask with carry_over, which scores masked positions alone; got None"
        )


_MOST_PREFIXES = 64  # in a group: the search is quadratic up to there, and linear behind


def group_by_prefix(prefix: list[int], end: list[int], num_candidates: int, pass_tokens: int) -> list[tuple[list[int], int, int]]:
    """Which sequences go through the network together, and how many first positions each of them then shares among its candidates.

    Sequence b has ``prefix[b]`` positions that its candidates share, and nothing is wanted of it behind ``end[b]``. A group of n runs
    to the largest end among its sequences, K = ``num_candidates`` times from position 0 on (n K end tokens, one pass), or once up to
    the smallest prefix and K times from there (n prefix + n K (end - prefix) tokens, two passes, or one if nothing is left).

    Returns:
        [(sequences, shared, end)]: of the partitions of the sequences in order of their prefixes (equal ones stay together, and at most
        64 different ones are in a group) the one with the smallest sum of tokens + ``pass_tokens`` x passes. ``shared`` is 0 where it
        does not pay.
    """
    runs: dict[int, list[int]] = {}
    for b in sorted(range(len(prefix)), key=prefix.__getitem__):
        runs.setdefault(prefix[b], []).append(b)
    cuts, members = list(runs), list(runs.values())
    best: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)]  # of the first j runs: cost, where the last group starts, shared, end
    for j in range(1, len(cuts) + 1):
        options, count, last = [], 0, 0
        for i in range(j - 1, max(-1, j - 1 - _MOST_PREFIXES), -1):
            count, last = count + len(members[i]), max(last, *(end[b] for b in members[i]))
            for shared in {0, cuts[i]}:
                tokens = count * (shared + num_candidates * (last - shared))
                passes = (shared > 0) + (shared < last)
                options.append((best[i][0] + tokens + pass_tokens * passes, i, shared, last))
        best.append(min(options))
    groups, j = [], len(cuts)
    while j:
        _, i, shared, last = best[j]
        groups.append(([b for run in members[i:j] for b in run], shared, last))
        j = i
    return groups


class ARResidualEnergy:
    """An autoregressive model as the energy of EDLM-AR, or of EDLM-coAR with ``carry_over``.

    EDLM-AR: E = -sum_i log p_AR(x_i | x_<i) + log mu(x0 | xt), so that mu exp(-E) = p_AR(x0) and Z(xt) = p_AR(what is observed).
    Carry-over: E = -sum over masked i of log p_AR(x_i | x_<i) + log mu(x0 | xt), with Z = 1 for every xt; it does not see that
    a candidate makes the observed tokens to its right unlikely.

    Where the model has a KV cache (``edlm.protocols.offers_cache``) and it is known on the host which positions are masked, the tokens
    before a sequence's first mask go through the network once and not K times, and with carry-over nothing behind its last mask goes
    through at all, and the head runs on masked positions alone. Sequences whose prefixes differ go together where that is cheaper
    (``group_by_prefix``). The energies are those of the plain way, but for the last bits of matrix products.

    Args:
        causal_lm: anything with ``log_probs(x0 [N, L]) -> [N, L]``. A torch module is put in eval mode here and must stay there.
        carry_over: score masked positions alone.
        mask_token_id: of the denoiser: it tells which positions of xt are masked.
        max_bytes: sequences go through the model in chunks that this bounds, by ``bytes_per_token``; the result does not depend on
            it but for the last bits of matrix products.
        bytes_per_token: what the model needs for one token of one sequence while scoring. The default estimates it from the
            model's configuration (``dim``: attention inputs and the MLP, 4 bytes a number), and is 64 KiB for a model without one.
            A cached prefix is counted too: 2 x layers x dim numbers a token of a sequence, and what one layer needs of it a
            candidate; without a configuration, ``bytes_per_token`` for either.
            NOTE: what does not grow with the chunk comes on top: one sequence at least, and the head's own chunk of logits,
            about 50 MiB at a vocabulary of 50 257.

    Source: Xu et al., arXiv 2410.21357, section 4.
    """

    def __init__(
        self,
        causal_lm: CausalLM,
        carry_over: bool = False,
        *,
        mask_token_id: int | None = None,
        max_bytes: int = 256 << 20,
        bytes_per_token: int | None = None,
    ) -> None:
        if not callable(getattr(causal_lm, "log_probs", None)):
            raise ValueError(f"causal_lm: expected log_probs(x0 [N, L]) -> [N, L] (edlm.protocols.CausalLM), got {causal_lm!r}")
        _check_mask(carry_over, mask_token_id)
        if max_bytes < 1:
            raise ValueError(f"max_bytes: expected a number >= 1, got {max_bytes}")
        if bytes_per_token is not None and bytes_per_token < 1:
            raise ValueError(f"bytes_per_token: expected a number >= 1, or None for an estimate, got {bytes_per_token}")
        if isinstance(causal_lm, torch.nn.Module):
            causal_lm.eval()
        self.causal_lm, self.carry_over, self.mask_token_id, self.max_bytes = causal_lm, carry_over, mask_token_id, max_bytes
        dim = getattr(getattr(causal_lm, "config", None), "dim", None)
        num_layers = getattr(getattr(causal_lm, "config", None), "num_layers", None)
        # Residual, norm, q, k, v, attention output, two of the MLP's 4 x dim.
        self.bytes_per_token = bytes_per_token or (14 * 4 * dim if dim else 64 << 10)
        # All layers' keys and values of a token that is shared; and one layer's, spread over candidates, with a copy under way.
        self.cache_bytes_per_token = 2 * 4 * dim * num_layers if dim and num_layers else self.bytes_per_token
        self.spread_bytes_per_token = 3 * 4 * dim if dim else self.bytes_per_token

    @property
    def max_length(self) -> int | None:
        """The most tokens that the model is meant for; None where it does not say."""
        return getattr(self.causal_lm, "max_length", None)

    @property
    def vocab_size(self) -> int | None:
        """The ids that the model reads are 0 .. vocab_size - 1; None where it does not say."""
        return getattr(self.causal_lm, "vocab_size", None)

    @torch.no_grad()
    def log_Z(self, xt: torch.Tensor) -> torch.Tensor:
        """log E_mu[exp(-E)] where it is known exactly, NaN elsewhere: int64 [B, L] -> float32 [B], in nats.

        With carry-over it is 0. Without, it is log p_AR(observed tokens), known where they are a prefix, the empty one included.
        """
        if self.carry_over:
            return torch.zeros(len(xt), device=xt.device)
        if self.mask_token_id is None:
            raise ValueError("mask_token_id: expected the denoiser's mask, to tell what is observed; got None")
        masked = xt == self.mask_token_id
        prefix = masked.long().cumsum(1) == 0
        known = (prefix | masked).all(1)
        result = torch.full((len(xt),), torch.nan, device=xt.device).masked_fill(known, 0.0)
        chunk = max(1, self.max_bytes // max(1, self.bytes_per_token * xt.shape[1]))
        self._check_mode()
        for rows in (known & prefix.any(1)).nonzero()[:, 0].split(chunk):
            if len(rows):
                terms = self.causal_lm.log_probs(xt[rows].masked_fill(masked[rows], 0)).double()
                result[rows] = terms.masked_fill(~prefix[rows], 0.0).sum(1).float()
        return result

    @torch.no_grad()
    def __call__(self, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        """Energies of K candidates a sequence, in nats.

        Args:
            x0: int64 [B, K, L], complete. xt: int64 [B, L]. t: floating [B], not used. log_p: float32 [B, K, L], log mu a token.

        Returns:
            float32 [B, K]; sums over positions are float64.

        Raises:
            ValueError: shapes that do not fit, of the model's answer too (every token is to be scored, the first one included); a
                module, or a part of one, in train mode (dropout would be part of the energy).
        """
        _check_shapes(x0, xt, log_p)
        if self.mask_token_id is not None and xt.device.type == "cpu":  # looking at a GPU's would make the host wait
            return self.score(x0, xt, t, log_p, masked=xt == self.mask_token_id)
        self._check_mode()
        return self._plain(x0, xt, log_p)

    @torch.no_grad()
    def score(
        self, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor, log_p: torch.Tensor, *, masked: torch.Tensor
    ) -> torch.Tensor:
        """The same for a caller who knows on the host what is masked, as a decode loop does: then nothing waits for a device.

        Args:
            x0, xt, t, log_p: as above; x0 equals xt where xt is not masked. masked: bool [B, L] on the CPU, where xt is masked.

        Returns, raises: as above; a ``masked`` that is something else; on a CPU, with a model that has a cache, an x0 that
            contradicts xt.
        """
        _check_shapes(x0, xt, log_p)
        if masked.shape != xt.shape or masked.dtype != torch.bool or masked.device.type != "cpu":
            raise ValueError(
                f"masked: expected bool [B, L] = {list(xt.shape)} on the CPU, got {masked.dtype} {list(masked.shape)} on "
                f"{masked.device}; call the energy without it where only the device knows"
            )
        self._check_mode()
        if not offers_cache(self.causal_lm) or not x0.numel():
            return self._plain(x0, xt, log_p)
        if x0.device.type == "cpu" and bool(((x0 != xt[:, None]) & ~masked[:, None]).any()):
            raise ValueError(
                "x0: expected xt's tokens where xt is not masked, got others; [B, K, L] has the candidates of a "
                "sequence together, on axis 1"
            )
        batch, k, length = x0.shape
        some = masked.any(1)
        first = torch.where(some, masked.int().argmax(1), length).tolist()
        end = (length - masked.flip(1).int().argmax(1)).tolist() if self.carry_over else [length] * batch
        wanted = masked if self.carry_over else torch.ones_like(masked)
        there = some.nonzero().squeeze(1).tolist() if self.carry_over else list(range(batch))
        groups = group_by_prefix(
            [first[b] for b in there], [end[b] for b in there], k, PASS_TOKENS["cpu" if x0.device.type == "cpu" else "cuda"]
        )
        log_ar = torch.zeros(batch, k, dtype=torch.float64, device=x0.device)
        for members, shared, last in groups:
            once = shared * (self.bytes_per_token + self.cache_bytes_per_token)
            for part in torch.tensor([there[m] for m in members]).split(max(1, self.max_bytes // once) if once else batch):
                index = upload(part, x0.device)
                log_ar[index] = self._continue(x0[index, :, :last], wanted[part, :last], shared)
        return (log_p.sum(-1, dtype=torch.float64) - log_ar).float()

    def _continue(self, x0: torch.Tensor, wanted: torch.Tensor, shared: int) -> torch.Tensor:
        """sum log p_AR over ``wanted`` (bool [n, L], on the CPU) of x0 [n, K, L], whose first ``shared`` tokens are the same for all
        K -> float64 [n, K]. The head runs on shared positions without carry-over alone: with it none of them is wanted."""
        n, k, length = x0.shape
        rows = torch.cat([torch.full_like(x0[..., :1], self.causal_lm.bos_token_id), x0], -1).flatten(0, 1)  # inputs, one behind
        out, cache = torch.zeros(n * k, dtype=torch.float64, device=x0.device), None
        if shared:
            prefixes = rows[::k, : shared + 1]
            hidden, cache = self._extend(prefixes[:, :-1], None, keep=shared < length)
            if not self.carry_over:
                terms = self._log_probs(hidden.flatten(0, 1), prefixes[:, 1:].flatten())
                out += terms.double().view(n, shared).sum(1).repeat_interleave(k)
        if shared == length:
            return out.view(n, k)
        size = length - shared
        room = self.max_bytes - n * shared * self.cache_bytes_per_token
        chunk = max(1, room // (size * self.bytes_per_token + shared * self.spread_bytes_per_token))
        # A chunk may end among a sequence's candidates.
        for first in range(0, n * k, chunk):
            part = slice(first, first + chunk)
            tokens, owner = rows[part, shared:], torch.arange(first, min(first + chunk, n * k)) // k
            past = None if cache is None else cache.rows(upload(owner, x0.device))
            hidden = self._extend(tokens[:, :-1], past, keep=False)[0].flatten(0, 1)
            here = wanted[owner, shared:].flatten()
            terms = torch.zeros(len(here), dtype=torch.float64, device=x0.device)
            if here.all():
                terms[:] = self._log_probs(hidden, tokens[:, 1:].flatten())
            else:
                at = upload(here.nonzero().squeeze(1), x0.device)
                terms[at] = self._log_probs(hidden[at], tokens[:, 1:].flatten()[at]).double()
            out[part] += terms.view(-1, size).sum(1)
        return out.view(n, k)

    def _extend(self, inputs: torch.Tensor, cache: object | None, *, keep: bool) -> tuple[torch.Tensor, object | None]:
        hidden, cache = self.causal_lm.extend(inputs, cache, keep=keep)
        if hidden.shape[:2] != inputs.shape:
            raise ValueError(
                f"causal_lm: expected extend to return hidden [N, M, D] with [N, M] = {list(inputs.shape)}, got {list(hidden.shape)}"
            )
        return hidden, cache

    def _log_probs(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """[N, D], int64 [N] -> float32 [N]; N x V logits are never stored."""
        layer = getattr(self.causal_lm, "output_layer", None)
        if layer is not None:
            return linear_log_probs(hidden, layer.weight, tokens, layer.bias)
        pieces = zip(hidden.split(256), tokens.split(256), strict=True)
        return torch.cat([gather_log_probs(self.causal_lm.head(h), ids) for h, ids in pieces])

    def _check_mode(self) -> None:
        parts = self.causal_lm.modules() if isinstance(self.causal_lm, torch.nn.Module) else [self.causal_lm]
        if any(getattr(part, "training", False) for part in parts):
            raise ValueError("causal_lm: expected a model in eval mode, got one in train mode; call eval() before sampling")

    def _plain(self, x0: torch.Tensor, xt: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        """Every candidate on its own, from BOS to its end."""
        batch, k, length = x0.shape
        rows, log_mu = x0.reshape(batch * k, 1, length), log_p.reshape(batch * k, 1, length)
        owner = torch.arange(batch, device=x0.device).repeat_interleave(k)
        chunk = max(1, self.max_bytes // max(1, self.bytes_per_token * length))
        energy = torch.empty(batch * k, 1, dtype=torch.float32, device=x0.device)
        # A chunk may end among a sequence's candidates, so each row is a sequence with one candidate here.
        for first in range(0, batch * k, chunk):
            part = slice(first, first + chunk)
            energy[part] = ar_residual(
                self.causal_lm,
                rows[part],
                xt[owner[part]],
                log_mu[part],
                carry_over=self.carry_over,
                mask_token_id=self.mask_token_id,
            )
        return energy.view(batch, k)
