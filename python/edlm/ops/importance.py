"""From energies to the next state: ``select_candidate``, ``resample``, ``reverse_step``. Sums are float64, results float32."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ._library import check_invalid, check_number, check_tensor, define_op, first_of
from ._philox import Purpose, expand_offset, expand_seed, philox_uniform

SCHEMES = ("systematic", "stratified", "multinomial", "residual")  # csrc/importance.h has the same order
_READABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # by the kernels, whatever the strides


class Selection(NamedTuple):
    """One candidate a sequence and what the weights say. K is the number of candidates."""

    index: torch.Tensor  # int64 [B]
    log_weights: torch.Tensor  # float32 [B, K], normalised: logsumexp over K is 0
    ess: torch.Tensor  # float32 [B], in 1 .. K
    log_Z: torch.Tensor  # float32 [B], log of the mean weight: a lower bound of log Z in expectation
    log_Z_loo: torch.Tensor  # float32 [B, K], the same without candidate k; NaN at K = 1


def _pick(cumulative: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """First index whose cumulative weight exceeds u * total, never one past the last that has weight. [B, K], [B, n] -> [B, n]"""
    total = cumulative[:, -1:]
    index = torch.searchsorted(cumulative, u * total, right=True)
    last = (cumulative < total).sum(-1, keepdim=True)
    return torch.minimum(index, last)


def _leave_one_out(log_w: torch.Tensor) -> torch.Tensor:
    """log mean of the others' weights, by prefix and suffix log-sum-exps: a subtraction would lose the small ones. [B, K]"""
    k = log_w.shape[1]
    if k == 1:
        return torch.full_like(log_w, math.nan)
    edge = torch.full_like(log_w[:, :1], -math.inf)
    before = torch.cat([edge, log_w[:, :-1].logcumsumexp(-1)], 1)
    after = torch.cat([log_w[:, 1:].flip(-1).logcumsumexp(-1).flip(-1), edge], 1)
    return torch.logaddexp(before, after) - math.log(k - 1)


# --- select_candidate -----------------------------------------------------------------------------------------------------------


def _select_reference(
    energy: torch.Tensor, temperature: float, log_correction: torch.Tensor | None, seed: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    e = energy.double().contiguous()  # the outputs follow its strides, and the fake says contiguous
    batch, k = e.shape
    bad = e.isnan() | (e == -math.inf)
    if temperature == 0:
        log_w = torch.full_like(e, -math.inf).scatter_(1, e.argmin(-1, keepdim=True), 0.0)
        bad |= (e == math.inf).all(-1, keepdim=True)
    else:
        # The one place where an energy becomes a weight: low energy is good. +inf stays impossible at any temperature.
        log_w = torch.where(e == math.inf, -math.inf, -e / temperature)
        if log_correction is not None:
            log_w = log_w + log_correction.double()
            bad |= log_correction.isnan() | (log_correction == math.inf)
        bad |= log_w.isnan() | (log_w == math.inf) | (log_w == -math.inf).all(-1, keepdim=True)
    bad_row = bad.any(-1)
    invalid = first_of(bad_row)
    log_w = torch.where(bad_row[:, None], 0.0, log_w)
    lse = log_w.logsumexp(-1, keepdim=True)
    log_weights = log_w.log_softmax(-1)  # from the differences: a common shift, however large, changes nothing
    u, _ = philox_uniform(seed, offset=offset.expand(batch), purpose=Purpose.SELECT)
    index = _pick(log_weights.exp().cumsum(-1), u[:, None]).squeeze(1)
    ess = torch.exp(-(2 * log_weights).logsumexp(-1)).clamp(1, k)
    log_z, loo = lse.squeeze(1) - math.log(k), _leave_one_out(log_w)
    if temperature == 0:
        log_z, loo = torch.full_like(log_z, math.nan), torch.full_like(loo, math.nan)
    return index, log_weights.float(), ess.float(), log_z.float(), loo.float(), invalid


def _select_fake(
    energy: torch.Tensor, temperature: float, log_correction: torch.Tensor | None, seed: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    batch = energy.shape[0]
    return (
        energy.new_empty(batch, dtype=torch.int64),
        energy.new_empty(energy.shape, dtype=torch.float32),
        energy.new_empty(batch, dtype=torch.float32),
        energy.new_empty(batch, dtype=torch.float32),
        energy.new_empty(energy.shape, dtype=torch.float32),
        energy.new_empty(1, dtype=torch.int64),
    )


_select = define_op(
    "select_candidate(Tensor energy, float temperature, Tensor? log_correction, Tensor seed, Tensor offset)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _select_reference,
    _select_fake,
)


def _check_rows(name: str, argument: str, value: torch.Tensor, axes: str) -> None:
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or not value.is_floating_point() or value.shape[1] == 0:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name}: {argument}: expected a floating tensor {axes} with at least one column, got {got}")


def _rows(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    return value if value.dtype in _READABLE else value.double()


def select_candidate(
    energy: torch.Tensor,
    *,
    temperature: float = 1.0,
    log_correction: torch.Tensor | None = None,
    seed: int | torch.Tensor,
    offset: int | torch.Tensor = 0,
) -> Selection:
    """Pick one of K candidates by self-normalised importance sampling: P(k) = softmax_k(-energy / temperature + log_correction).

    **Low energy is good.** With candidates from a proposal g the pick tends to g exp(-E / temperature + log_correction) as K grows,
    with a bias of O(1 / K); at finite K its exact law is in docs/algorithms.md.

    Args:
        energy: floating [B, K], in nats; +inf is a candidate that cannot be.
        temperature: >= 0. 0 is the lowest energy (lowest index among equals; ess 1, log_Z NaN); inf ignores finite energies.
        log_correction: floating [B, K] or None, added to the log-weight: log(target / proposal) where they differ. Ignored at 0.
        seed: an int s (sequence b picks with s + b) or int64 [B]. offset: the step: an int, or int64 of one element or [B].

    Returns:
        Selection. ess = exp(2 LSE(a) - LSE(2a)); log_Z = LSE(a) - ln K for log-weights a.

    Raises:
        ValueError: wrong shapes or dtypes; a NaN or -inf energy, or a row whose weights are all 0.

    RNG: Philox(seed[b]; 0, 0, offset[b], SELECT), one uniform a sequence. Source: Xu et al., arXiv 2410.21357, Algorithm 1.
    """
    name = "select_candidate"
    _check_rows(name, "energy", energy, "[B, K]")
    if log_correction is not None:
        if not isinstance(log_correction, torch.Tensor):
            raise ValueError(
                f"{name}: log_correction: expected a tensor {list(energy.shape)}, got {type(log_correction).__name__}"
            )
        check_tensor(name, "log_correction", log_correction, log_correction.dtype, tuple(energy.shape), energy.device)
    check_number(name, "temperature", temperature)
    if not temperature >= 0:
        raise ValueError(
            f"{name}: temperature: expected a number >= 0 (0 picks the lowest energy, inf ignores it), got {temperature}"
        )
    batch = energy.shape[0]
    seeds, offsets = expand_seed(seed, batch, energy.device), expand_offset(name, offset, batch, energy.device)
    correction = None if log_correction is None else _rows(log_correction)
    *result, invalid = _select(_rows(energy), float(temperature), correction, seeds, offsets)
    check_invalid(
        name,
        invalid,
        lambda row, values, *corrections: (
            "energy: expected finite energies, or +inf for some of the candidates, and log-weights that are finite too; got "
            + f"{values} at temperature {temperature}"
            + "".join(f" with log_correction {c}" for c in corrections)
            + f" in sequence {row}"
        ),
        energy,
        *(() if log_correction is None else (log_correction,)),
    )
    return Selection(*result)


# --- resample -------------------------------------------------------------------------------------------------------------------


def _resample_reference(
    log_weights: torch.Tensor, scheme: int, seed: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    log_w = log_weights.double().contiguous()
    batch, n = log_w.shape
    bad_row = (log_w.isnan() | (log_w == math.inf)).any(-1) | (log_w == -math.inf).all(-1)
    invalid = first_of(bad_row)
    weight = torch.softmax(torch.where(bad_row[:, None], 0.0, log_w), -1)
    particle = torch.arange(n, device=log_w.device)
    u, _ = philox_uniform(
        seed[:, None], candidate=particle, offset=offset.expand(batch)[:, None], purpose=Purpose.RESAMPLE
    )  # [B, N]
    name = SCHEMES[scheme]
    if name == "systematic":
        return _pick(weight.cumsum(-1), (particle + u[:, :1]) / n), invalid
    if name == "stratified":
        return _pick(weight.cumsum(-1), (particle + u) / n), invalid
    if name == "multinomial":
        return _pick(weight.cumsum(-1), u).sort(-1).values, invalid
    # Residual: floor(n w) copies for certain, the rest multinomial from what is left of the weights.
    certain = (n * weight + 1e-9).floor()  # n * (1 / n) may fall just short of 1
    number = certain.sum(-1, keepdim=True)
    rest = (n * weight - certain).clamp_min(0)
    drawn = _pick(torch.where(number == n, weight, rest).cumsum(-1), u)
    copies = _pick(certain.cumsum(-1), (particle + 0.5) / number.clamp_min(1))
    return torch.where(particle < number, copies, drawn).sort(-1).values, invalid


_resample = define_op(
    "resample(Tensor log_weights, int scheme, Tensor seed, Tensor offset) -> (Tensor, Tensor)",
    _resample_reference,
    lambda log_weights, scheme, seed, offset: (
        log_weights.new_empty(log_weights.shape, dtype=torch.int64),
        log_weights.new_empty(1, dtype=torch.int64),
    ),
)


def resample(
    log_weights: torch.Tensor, scheme: str = "systematic", *, seed: int | torch.Tensor, offset: int | torch.Tensor = 0
) -> torch.Tensor:
    """Ancestors of N particles a population: E[number of copies of n] = N softmax(log_weights)_n, whatever the scheme.

    Args:
        log_weights: floating [B, N], not necessarily normalised; -inf is a particle without descendants.
        scheme: "systematic" (one uniform, copies within 1 of N w), "stratified", "residual" or "multinomial".
        seed: an int s (population b uses s + b) or int64 [B]. offset: an int, or int64 of one element or [B].

    Returns:
        int64 [B, N], ascending in each row.

    Raises:
        ValueError: wrong shapes; an unknown scheme; NaN, +inf, or weights that are all 0.

    RNG: Philox(seed[b]; 0, n, offset[b], RESAMPLE). Source: Douc, Cappe, Moulines, "Comparison of resampling schemes for particle
    filtering", ISPA 2005.
    """
    name = "resample"
    _check_rows(name, "log_weights", log_weights, "[B, N]")
    if scheme not in SCHEMES:
        raise ValueError(f"{name}: scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
    batch = log_weights.shape[0]
    seeds, offsets = expand_seed(seed, batch, log_weights.device), expand_offset(name, offset, batch, log_weights.device)
    ancestors, invalid = _resample(_rows(log_weights), SCHEMES.index(scheme), seeds, offsets)
    check_invalid(
        name,
        invalid,
        lambda row, values: f"log_weights: expected finite numbers or -inf, one of them finite, got {values} in row {row}",
        log_weights,
    )
    return ancestors


# --- reverse_step ---------------------------------------------------------------------------------------------------------------


def _reverse_reference(
    xt: torch.Tensor, x0: torch.Tensor, index: torch.Tensor, open_time: torch.Tensor, s: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    bad_row = (index < 0) | (index >= x0.shape[1])
    invalid = first_of(bad_row)
    safe = index.clamp(0, x0.shape[1] - 1)
    chosen = x0.gather(1, safe[:, None, None].expand(-1, 1, x0.shape[2])).squeeze(1)
    return torch.where(open_time >= s[:, None], chosen, xt).contiguous(), invalid


_reverse = define_op(
    "reverse_step(Tensor xt, Tensor x0, Tensor index, Tensor open_time, Tensor s) -> (Tensor, Tensor)",
    _reverse_reference,
    lambda xt, x0, index, open_time, s: (xt.new_empty(xt.shape), index.new_empty(1)),
)


def reverse_step(
    xt: torch.Tensor, x0: torch.Tensor, index: torch.Tensor, open_time: torch.Tensor, s: float | torch.Tensor
) -> torch.Tensor:
    """One reverse step t -> s: positions whose opening time is at least s take the chosen candidate's token, the rest stay.

    Args:
        xt: int64 [B, L]. x0: int64 [B, K, L], equal to xt where xt is clean. index: int64 [B] in 0 .. K-1.
        open_time: float64 or float32 [B, L], drawn once by ``MaskedDiffusion.opening_times``.
        s: the time at the end of the step: a number, or a tensor of one element or [B] with the dtype of ``open_time``.

    Returns:
        xs int64 [B, L].

    Raises:
        ValueError: wrong shapes, dtypes or devices; an index outside 0 .. K-1.
    """
    name = "reverse_step"
    for argument, value in (("xt", xt), ("x0", x0), ("index", index), ("open_time", open_time)):
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name}: {argument}: expected a tensor, got {type(value).__name__}")
    if xt.dim() != 2 or xt.dtype != torch.int64:
        raise ValueError(f"{name}: xt: expected an int64 tensor [B, L], got {xt.dtype} {list(xt.shape)}")
    batch, length = xt.shape
    k = max(x0.shape[1], 1) if x0.dim() == 3 else -1
    check_tensor(name, "x0", x0, torch.int64, (batch, k, length), xt.device)
    check_tensor(name, "index", index, torch.int64, (batch,), xt.device)
    if open_time.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: open_time: expected float64 or float32, got {open_time.dtype}")
    check_tensor(name, "open_time", open_time, open_time.dtype, (batch, length), xt.device)
    if isinstance(s, torch.Tensor):
        if s.dtype != open_time.dtype or s.numel() not in (1, batch):
            raise ValueError(
                f"{name}: s: expected a number, or a {open_time.dtype} tensor of one element or [{batch}], got {s.dtype} "
                f"{list(s.shape)}"
            )
        s = s.reshape(-1).to(xt.device)
    else:
        check_number(name, "s", s)
        s = torch.full((1,), float(s), dtype=open_time.dtype, device=xt.device)
    xs, invalid = _reverse(xt, x0, index, open_time, s)
    check_invalid(name, invalid, lambda row, at: f"index: expected indices in 0 .. {k - 1}, got {at} in sequence {row}", index)
    return xs
