"""The decode loop of EDLM as it was published, in eager PyTorch: what ``edlm.generate`` is compared with.

Written for this comparison from Algorithm 1 of Xu et al., arXiv 2410.21357, and from how code of that line of work goes about it
(MDLM, Sahoo et al., arXiv 2406.07524: carry-over, cached predictions, the noise of the categorical). Every step holds tensors
[B, L, V]: the logits, the normalised log-probabilities with clean positions written into them, their exponential, q(xs | xt, x0) and a
float32 noise number for each entry; inside the window also [K B, L, V]: the probabilities repeated, their noise, the quotient, and the
probabilities repeated once more for the energy. The denoiser is not called again while xt stays as it is and the network ignores t.

Repaired, so that both sides do the same job:
- candidates are weighed by softmax(-E), not by softmax(+E);
- candidates are drawn in the order (K, B) and read in that order, not as (B, K);
- the energy gets log mu, not mu: the probabilities of the tokens are gathered and their logarithm is taken;
- every token is scored by the autoregressive model, the first one included;
- a cached prediction does not outlive the window in which it was made;
- the last s is 0, and what is masked there is drawn like everything else: no argmax at the end.

Left out, where it only costs time: the released code takes a plain step inside the window too and throws it away, and calls the
denoiser once more at the end. Kept: float32 noise, which is how the tail of a large vocabulary gets lost.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from edlm.protocols import Denoiser, EnergyModel

NOTHING = -1e6  # the logarithm of no probability, as such code writes it: exp gives 0
STAGES = ("denoise", "propose", "energy", "select", "reverse")

# (x0 [K B, L], xt [K B, L], t [K B], p_x0 [K B, L, V]) -> energy [K B], rows in the order (K, B)
Energy = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Decoded:
    tokens: torch.Tensor  # int64 [B, L]
    nfe: int
    energy_nfe: int
    stage_seconds: dict[str, float]
    cache: torch.Tensor | None  # [B, L, V]: what the next step would use
    corrected: bool  # whether that is a choice by energy


class _Stopwatch:
    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin


def sample_categorical(probs: torch.Tensor) -> torch.Tensor:
    """[..., V] -> [...]: an exponential race in float32. The first to arrive wins with a probability in proportion to its rate."""
    arrival = 1e-10 - (torch.rand_like(probs) + 1e-10).log()
    return (probs / arrival).argmax(-1)


def predict(denoiser: Denoiser, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """[B, L, V]: mu(. | xt), without the mask and with clean positions carried over."""
    logits, mask = denoiser(xt, t), denoiser.mask_token_id
    logits[..., mask] += NOTHING
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    clean = xt != mask
    log_p[clean] = NOTHING
    log_p[clean, xt[clean]] = 0.0
    return log_p.exp()


def reverse(xt: torch.Tensor, p_x0: torch.Tensor, t: torch.Tensor, s: torch.Tensor, mask: int) -> torch.Tensor:
    """xs ~ q(xs | xt, x0), x0 known or itself a law: over the whole vocabulary, and clean positions copied."""
    q_xs = p_x0 * (t - s)[:, None, None]
    q_xs[..., mask] = s[:, None]
    xs = sample_categorical(q_xs)
    clean = (xt != mask).to(xt.dtype)
    return clean * xt + (1 - clean) * xs


def _choose(
    p_x0: torch.Tensor,
    xt: torch.Tensor,
    t: torch.Tensor,
    energy: Energy,
    num_candidates: int,
    temperature: float,
    timed: _Stopwatch,
) -> torch.Tensor:
    """[B, L, V]: the chosen candidate as one-hot rows."""
    batch, length = xt.shape
    with timed("propose"):
        x0 = sample_categorical(p_x0.repeat(num_candidates, 1, 1))
    with timed("energy"):
        repeated = p_x0.repeat(num_candidates, 1, 1)
        value = energy(x0, xt.repeat(num_candidates, 1), t.repeat(num_candidates), repeated).view(num_candidates, batch).T
    with timed("select"):
        index = torch.multinomial((-value / temperature).softmax(-1), 1).squeeze(1)
        chosen = x0.view(num_candidates, batch, length)[index, torch.arange(batch, device=xt.device)]
        return torch.nn.functional.one_hot(chosen, p_x0.shape[-1]).to(p_x0.dtype)


@torch.no_grad()
def decode(
    denoiser: Denoiser,
    start: torch.Tensor | Decoded,
    steps: int,
    *,
    energy: Energy | None = None,
    num_candidates: int = 8,
    window: tuple[float, float] = (0.8, 1.0),
    temperature: float = 1.0,
    time_conditioning: bool = False,
    only: Sequence[int] | None = None,
) -> Decoded:
    """From xt [B, L], masked wherever text is wanted, through the grid t_i = 1 - i / steps; the energy is used iff lo < t <= hi.

    ``only``: these steps of the grid, to time a part of a long loop: from an xt that is masked as it would be there, or from where a
    decode of the steps before has ended, with what it has cached.
    """
    xt, cache, corrected = (start.tokens, start.cache, start.corrected) if isinstance(start, Decoded) else (start, None, False)
    batch, mask, device = len(xt), denoiser.mask_token_id, xt.device
    timed, nfe, energy_nfe = _Stopwatch(), 0, 0
    for i in range(steps) if only is None else only:
        t, s = (torch.full((batch,), (steps - j) / steps, device=device) for j in (i, i + 1))
        inside = energy is not None and window[0] < (steps - i) / steps <= window[1]
        if inside != corrected:
            cache = None
        if cache is None:
            with timed("denoise"):
                cache = predict(denoiser, xt, t)
                nfe += 1
            if inside:
                cache = _choose(cache, xt, t, energy, num_candidates, temperature, timed)
                energy_nfe += 1
            corrected = inside
        with timed("reverse"):
            xs = reverse(xt, cache, t, s, mask)
            if time_conditioning or not torch.equal(xs, xt):
                cache = None
        xt = xs
    return Decoded(xt, nfe, energy_nfe, timed.seconds, cache, corrected)


# --- energies of K B rows ---------------------------------------------------------------------------------------------------------


def _log_mu(x0: torch.Tensor, p_x0: torch.Tensor) -> torch.Tensor:
    return p_x0.gather(-1, x0[..., None]).squeeze(-1).log()


class AutoregressiveResidual:
    """-log p_AR(x0) + log mu(x0 | xt), as published: the logits of all K B sequences at once, normalised, then gathered.

    ``logits(x0 [N, L]) -> [N, L, V]``, those at position i predicting x0[:, i]: a ``edlm.models.CausalLM`` is such a function.
    """

    def __init__(self, logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.logits = logits

    def __call__(self, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor, p_x0: torch.Tensor) -> torch.Tensor:
        logits = self.logits(x0)
        log_p = logits - logits.logsumexp(-1, keepdim=True)
        return _log_mu(x0, p_x0).sum(-1) - log_p.gather(-1, x0[..., None]).squeeze(-1).sum(-1)


class Adapted:
    """Any energy of ``edlm.protocols`` in this loop."""

    def __init__(self, energy: EnergyModel, batch: int) -> None:
        self.energy, self.batch = energy, batch

    def __call__(self, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor, p_x0: torch.Tensor) -> torch.Tensor:
        def by_sequence(rows: torch.Tensor) -> torch.Tensor:
            return rows.view(-1, self.batch, rows.shape[-1]).transpose(0, 1).contiguous()

        value = self.energy(by_sequence(x0), xt[: self.batch], t[: self.batch], by_sequence(_log_mu(x0, p_x0)))
        return value.T.flatten()
