"""The masking process: forward noise, its posterior, when positions open, and the times at which a batch is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops import Purpose, philox_uniform
from ..ops._philox import expand_offset, expand_seed
from .schedule import NoiseSchedule

_BELOW_ONE = 1.0 - 2.0**-53


def check_tokens(name: str, tokens: torch.Tensor) -> None:
    """ValueError unless ``tokens`` is int64 [B, L]."""
    if not isinstance(tokens, torch.Tensor) or tokens.dtype != torch.int64 or tokens.dim() != 2:
        got = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise ValueError(f"{name}: expected int64 tokens [B, L], got {got}; one sequence is tokens[None]")


def check_times(name: str, times: float | torch.Tensor, batch: int, device: torch.device) -> torch.Tensor:
    """float64 [B] from a number or a floating tensor [B] with values in [0, 1]; ValueError otherwise."""
    if isinstance(times, torch.Tensor) and (not times.is_floating_point() or times.shape not in ((), (batch,))):
        raise ValueError(f"{name}: expected a number or a floating tensor [{batch}], got {times.dtype} {list(times.shape)}")
    t = torch.as_tensor(times, dtype=torch.float64, device=device)
    wrong = ~((t >= 0) & (t <= 1))  # NaN is wrong too
    if bool(wrong.any()):
        raise ValueError(f"{name}: expected times in [0, 1] (0 is data, 1 is noise), got {t[wrong].flatten()[0].item()}")
    return t.expand(batch)


def stratified_uniforms(
    n: int, *, seed: int, offset: int | torch.Tensor = 0, device: torch.device | str | None = None
) -> torch.Tensor:
    """float64 [n] in [0, 1): (u + i) / n with one uniform u, so that every n-th of [0, 1) holds one; each is uniform by itself.

    RNG: Philox(seed; 0, 0, offset, TIME), one uniform a call.
    """
    key = expand_seed(seed, 1, device)
    u, _ = philox_uniform(key, offset=expand_offset("stratified_uniforms", offset, 1, key.device), purpose=Purpose.TIME)
    # u + n - 1 may round up to n.
    return ((u + torch.arange(n, dtype=torch.float64, device=key.device)) / max(n, 1)).clamp_max(_BELOW_ONE)


def corruption_uniforms(
    batch: int,
    length: int,
    *,
    seed: int | torch.Tensor,
    offset: int | torch.Tensor = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """float64 [B, L] in [0, 1): the mask probability from which on each position is masked. RNG: as ``q_sample``."""
    seeds = expand_seed(seed, batch, device)
    u, _ = philox_uniform(
        seeds[:, None],
        position=torch.arange(length, device=seeds.device),
        offset=expand_offset("corruption_uniforms", offset, batch, seeds.device)[:, None],
        purpose=Purpose.CORRUPT,
    )
    return u


@dataclass(frozen=True)
class MaskedDiffusion:
    """Masked (absorbing) diffusion. Positions are independent: q(x_t | x_0) = alpha(t) delta(x_0) + (1 - alpha(t)) delta(mask).

    Args:
        schedule: alpha(t).
        mask_token_id: the id of the mask, >= 0.

    Source: Sahoo et al., arXiv 2406.07524.
    """

    schedule: NoiseSchedule
    mask_token_id: int

    def __post_init__(self) -> None:
        if isinstance(self.mask_token_id, bool) or not isinstance(self.mask_token_id, int) or self.mask_token_id < 0:
            raise ValueError(f"mask_token_id: expected an id >= 0, got {self.mask_token_id!r}; use the tokenizer's mask_token_id")

    def q_sample(
        self, x0: torch.Tensor, t: float | torch.Tensor, *, seed: int | torch.Tensor, offset: int | torch.Tensor = 0
    ) -> torch.Tensor:
        """xt ~ q(x_t | x_0): position i becomes the mask iff u_i < mask_prob(t).

        At t = 0 nothing is masked; at t = 1 everything is if eps = 0. With one seed and offset, what is masked at s < t is also
        masked at t: the draws are one path of the process.

        Args:
            x0: int64 [B, L]. t: a number or floating [B], in [0, 1].
            seed: an int s (row b draws with s + b) or int64 [B]. offset: the training step or draw: an int, or int64 of 1 or [B].

        Returns:
            int64 [B, L].

        Raises:
            ValueError: wrong shapes or dtypes; t outside [0, 1].

        RNG: Philox(seed[b]; i, 0, offset[b], CORRUPT), the first uniform. Row b does not depend on B.
        """
        check_tokens("x0", x0)
        batch, length = x0.shape
        mask_prob = self.schedule._mask_prob(check_times("t", t, batch, x0.device))
        u = corruption_uniforms(batch, length, seed=seed, offset=offset, device=x0.device)
        return torch.where(u < mask_prob[:, None], self.mask_token_id, x0)

    def q_posterior(
        self, x0_probs: torch.Tensor, xt: torch.Tensor, t: float | torch.Tensor, s: float | torch.Tensor
    ) -> torch.Tensor:
        """q(x_s | x_t, x_0) for s < t, averaged over x_0 ~ x0_probs position by position.

        A clean position keeps its token. A masked one stays masked with probability mask_prob(s) / mask_prob(t), and otherwise
        takes token v with x0_probs[v]. A table over the vocabulary, for tests and small ones: the decode loop draws from this law
        by opening times instead.

        Args:
            x0_probs: float [B, L, V], probabilities (a one-hot x_0, or a denoiser's), with 0 in the mask's column where xt is
                masked.
            xt: int64 [B, L]. t, s: numbers or floating [B], 0 <= s <= t <= 1, t > 0.

        Returns:
            float [B, L, V] with the dtype of x0_probs.

        Raises:
            ValueError: wrong shapes; s > t or t = 0; values that are no probabilities (log-probabilities, for example).
        """
        check_tokens("xt", xt)
        batch, _ = xt.shape
        if x0_probs.dim() != 3 or x0_probs.shape[:2] != xt.shape or x0_probs.shape[2] <= self.mask_token_id:
            raise ValueError(
                f"x0_probs: expected [B, L, V] = [{xt.shape[0]}, {xt.shape[1]}, more than mask_token_id = {self.mask_token_id}], "
                f"got {list(x0_probs.shape)}"
            )
        masked = xt == self.mask_token_id
        rows = x0_probs[masked]
        if bool((rows < 0).any()) or not torch.allclose(rows.sum(-1), torch.ones_like(rows[:, 0]), atol=1e-3):
            raise ValueError("x0_probs: expected probabilities that sum to 1 at masked positions; pass log_probs.exp(), not logs")
        if bool((rows[:, self.mask_token_id] > 0).any()):
            raise ValueError("x0_probs: expected 0 in the mask's column; subs_log_probs(...).exp() has it so")
        t, s = check_times("t", t, batch, xt.device), check_times("s", s, batch, xt.device)
        wrong = (s > t) | (t == 0)
        if bool(wrong.any()):
            raise ValueError(f"s: expected s <= t and t > 0, got s = {s[wrong][0].item()}, t = {t[wrong][0].item()}")
        stay = (self.schedule._mask_prob(s) / self.schedule._mask_prob(t)).to(x0_probs.dtype)[:, None, None]
        opened = (1 - stay) * x0_probs
        opened[..., self.mask_token_id] = stay[..., 0]
        clean = torch.nn.functional.one_hot(xt, x0_probs.shape[2]).to(x0_probs.dtype)
        return torch.where(masked[..., None], opened, clean)

    def opening_times(
        self, seed: int | torch.Tensor, batch: int, length: int, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """When each position opens in the reverse process that starts fully masked at t = 1: float64 [B, L] in [0, 1).

        P(open_time < s), still masked at s, is mask_prob(s) / mask_prob(1). Opening depends on no token, so all of it can be
        drawn before the first network call. In a step t -> s a masked position opens iff open_time >= s; at s = 0 all of them do.

        Args:
            seed: an int s (row b draws with s + b) or int64 [B]. batch, length: >= 0.

        RNG: Philox(seed[b]; i, 0, 0, OPEN), the first uniform; open_time = time_of_mask_prob(u mask_prob(1)). Row b does not
        depend on B, nor position i on L.
        """
        if batch < 0 or length < 0:
            raise ValueError(f"batch, length: expected numbers >= 0, got {batch}, {length}")
        seeds = expand_seed(seed, batch, device)
        u, _ = philox_uniform(seeds[:, None], position=torch.arange(length, device=seeds.device), purpose=Purpose.OPEN)
        # Below 1 whatever the rounding: at t = 1 every position is still masked.
        return self.schedule._time_of_mask_prob(u * (1 - self.schedule.eps)).clamp_max(_BELOW_ONE)

    def training_times(
        self,
        batch: int,
        *,
        seed: int,
        offset: int | torch.Tensor = 0,
        t_min: float = 0.0,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Times for a batch, stratified: float64 [B] in (t_min, 1], one in each B-th of the interval, each uniform by itself.

        Args:
            t_min: in [0, 1). 0 is unbiased for the NELBO, but its terms have infinite variance (their weight is 1/t); 1e-3 bounds
                the weight by 1000, and the mean is over the times above it.

        RNG: Philox(seed; 0, 0, offset, TIME), one uniform for the batch.
        """
        if not 0 <= t_min < 1:
            raise ValueError(f"t_min: expected a number in [0, 1), got {t_min}")
        v = stratified_uniforms(batch, seed=seed, offset=offset, device=device)
        return 1 - (1 - t_min) * v
