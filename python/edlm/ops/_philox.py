"""Philox4x32-10 (Salmon et al., SC 2011) in torch integer arithmetic: the reference of csrc/philox.h, and the RNG contract.

Key: the 64-bit seed of a sequence. Counter: (position, candidate, step offset, purpose), 32 bits each. So a draw depends on the
seed of its sequence, its position, candidate, step and purpose alone: never on the batch, the order of rows, chunks, threads or
ranks, and never on torch's global generator. ``offset`` and ``position`` wrap at 2**32.
"""

from __future__ import annotations

from enum import IntEnum

import torch

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


class Purpose(IntEnum):
    """Last word of the counter: streams of different purpose are independent. Values are part of the contract."""

    TOKEN = 0  # sample_candidates, sample_categorical: (position, candidate, offset)
    SELECT = 1  # select_candidate: (0, 0, offset)
    RESAMPLE = 2  # resample: (0, particle, offset)
    OPEN = 3  # opening times: (position, 0, 0)
    CORRUPT = 4  # q_sample: (position, 0, offset)
    TIME = 5  # the diffusion time of a training or evaluation example: (0, 0, offset)
    REMASK = 6  # what opens and what is masked again in a step of a remasking sampler: (position, 0, offset)
    PARTICLE = 7  # the seeds of a sequence's particles: (0, particle, 0)


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds. Words are int64 tensors that hold 0 .. 2**32 - 1; they broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap into the sign bit; shifting and masking recovers both halves all the same.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _to_double(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The top 53 bits of a 64-bit word as a double in [0, 1)."""
    return ((high << 21) | (low >> 11)).double() * 2.0**-53


def philox_uniform(
    seed: torch.Tensor,
    *,
    position: torch.Tensor | int = 0,
    candidate: torch.Tensor | int = 0,
    offset: torch.Tensor | int = 0,
    purpose: Purpose,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent float64 uniforms in [0, 1) for every element of the broadcast arguments (int64, on one device)."""
    seed = torch.as_tensor(seed, dtype=torch.int64)

    def word(value: torch.Tensor | int) -> torch.Tensor:
        return torch.as_tensor(value, dtype=torch.int64, device=seed.device) & _MASK

    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    counter = (word(position), word(candidate), word(offset), zero + int(purpose))
    r0, r1, r2, r3 = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return _to_double(r0, r1), _to_double(r2, r3)


def expand_seed(seed: int | torch.Tensor, n: int, device: torch.device | str | None = None) -> torch.Tensor:
    """One int64 seed a row: an int s means s, s + 1, ..., s + n - 1 (wrapping at 2**63); a tensor must already be int64 [n]."""
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.shape != (n,):
            raise ValueError(
                f"seed: expected an int or an int64 tensor of shape [{n}] (one seed a row), got {seed.dtype} {list(seed.shape)}"
            )
        return seed if device is None else seed.to(device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed: expected an int or an int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a 64-bit integer, got {seed}")
    if seed < 2**63 - n:  # one small op where the seeds do not wrap
        return torch.arange(seed, seed + n, dtype=torch.int64, device=device)
    return torch.arange(n, dtype=torch.int64, device=device) + seed


def expand_offset(name: str, offset: int | torch.Tensor, n: int, device: torch.device) -> torch.Tensor:
    """int64 [1] or [n]: the step, for all rows or for each."""
    if isinstance(offset, torch.Tensor):
        if offset.dtype != torch.int64 or offset.numel() not in (1, n):
            raise ValueError(
                f"{name}: offset: expected an int or an int64 tensor of one element or [{n}], got {offset.dtype} "
                f"{list(offset.shape)}"
            )
        return offset.reshape(-1).to(device)
    if isinstance(offset, bool) or not isinstance(offset, int) or not -(2**63) <= offset < 2**63:
        raise ValueError(f"{name}: offset: expected a 64-bit integer or an int64 tensor, got {offset!r}")
    return torch.full((1,), offset, dtype=torch.int64, device=device)
