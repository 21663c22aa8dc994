"""Residual energies of whole sequences from an autoregressive model. Low energy is good."""

from __future__ import annotations

import torch

from ..protocols import CausalLM


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
    return (log_p.double().sum(-1) - terms.sum(-1)).float()


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


class ARResidualEnergy:
    """An autoregressive model as the energy of EDLM-AR, or of EDLM-coAR with ``carry_over``.

    EDLM-AR: E = -sum_i log p_AR(x_i | x_<i) + log mu(x0 | xt), so that mu exp(-E) = p_AR(x0) and Z(xt) = p_AR(what is observed).
    Carry-over: E = -sum over masked i of log p_AR(x_i | x_<i) + log mu(x0 | xt), with Z = 1 for every xt; it does not see that
    a candidate makes the observed tokens to its right unlikely.

    Args:
        causal_lm: anything with ``log_probs(x0 [N, L]) -> [N, L]``. A torch module is put in eval mode here and must stay there.
        carry_over: score masked positions alone.
        mask_token_id: of the denoiser: it tells which positions of xt are masked.
        max_bytes: sequences go through the model in chunks that this bounds, by ``bytes_per_token``; the result does not depend on
            it but for the last bits of matrix products.
        bytes_per_token: what the model needs for one token of one sequence while scoring. The default estimates it from the
            model's configuration (``dim``: attention inputs and the MLP, 4 bytes a number), and is 64 KiB for a model without one.
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
        # Residual, norm, q, k, v, attention output, two of the MLP's 4 x dim.
        self.bytes_per_token = bytes_per_token or (14 * 4 * dim if dim else 64 << 10)

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
        parts = self.causal_lm.modules() if isinstance(self.causal_lm, torch.nn.Module) else [self.causal_lm]
        if any(getattr(part, "training", False) for part in parts):
            raise ValueError("causal_lm: expected a model in eval mode, got one in train mode; call eval() before sampling")
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
