"""What ``generate`` accepts: every argument that does not fit is named, with what was expected and what came."""

from __future__ import annotations

import math
import os

import torch

from ..diffusion import LogLinearSchedule, NoiseSchedule
from ..ops._philox import expand_seed
from ..ops.importance import SCHEMES
from ..protocols import Denoiser, EnergyModel
from .steps import Ancestral, Clock, FirstHitting, LeftToRight, Remasking

SAMPLERS = ("ancestral", "first_hitting", "remasking", "left_to_right")
ON_A_GRID = ("ancestral", "remasking")
_MOST_OFFSETS = 2**32  # where the step's word of the RNG counter ends


def check_denoiser(denoiser: Denoiser) -> tuple[int, int]:
    """Its mask and its vocabulary."""
    for name in ("mask_token_id", "vocab_size"):
        value = getattr(denoiser, name, None)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"denoiser: expected an int attribute {name} (edlm.protocols.Denoiser), got {value!r}")
    if not 0 <= denoiser.mask_token_id < denoiser.vocab_size:
        raise ValueError(
            f"denoiser: mask_token_id: expected an id in 0 .. {denoiser.vocab_size - 1}, got {denoiser.mask_token_id}"
        )
    return denoiser.mask_token_id, denoiser.vocab_size


def device_of(denoiser: Denoiser, prompt: torch.Tensor | None, device: torch.device | str | None) -> torch.device:
    if device is not None:
        try:
            return torch.device(device)
        except (RuntimeError, TypeError):
            raise ValueError(f"device: expected a torch device such as 'cpu' or 'cuda:0', got {device!r}") from None
    if isinstance(prompt, torch.Tensor):
        return prompt.device
    parameter = next(denoiser.parameters(), None) if isinstance(denoiser, torch.nn.Module) else None
    return parameter.device if parameter is not None else torch.device("cpu")


def start_of(prompt: torch.Tensor | None, batch_size: int | None, length: int | None, mask: int, vocab_size: int) -> torch.Tensor:
    """The first state, int64 [B, L]."""
    if prompt is None:
        for name, value in (("batch_size", batch_size), ("length", length)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int >= 1 where there is no prompt, got {value!r}")
        return torch.full((batch_size, length), mask, dtype=torch.int64)
    if not isinstance(prompt, torch.Tensor) or prompt.dtype != torch.int64 or prompt.dim() != 2:
        got = f"{prompt.dtype} {list(prompt.shape)}" if isinstance(prompt, torch.Tensor) else type(prompt).__name__
        raise ValueError(f"prompt: expected an int64 tensor [B, L], got {got}; one sequence is prompt[None]")
    for name, value, size in (("batch_size", batch_size, prompt.shape[0]), ("length", length, prompt.shape[1])):
        if value is not None and value != size:
            raise ValueError(f"{name}: the prompt has {size}, got {value}; leave {name} out")
    outside = (prompt < 0) | (prompt >= vocab_size)
    if outside.any():
        raise ValueError(f"prompt: expected ids in 0 .. {vocab_size - 1}, got {int(prompt[outside][0])}")
    if not (prompt == mask).any():
        raise ValueError(f"prompt: expected the mask ({mask}) wherever text is wanted, got none; there is nothing to generate")
    return prompt


def lengths_of(lengths: torch.Tensor | None, batch: int, size: int) -> torch.Tensor:
    """int64 [B] on the CPU."""
    if lengths is None:
        return torch.full((batch,), size, dtype=torch.int64)
    if not isinstance(lengths, torch.Tensor) or lengths.dtype != torch.int64 or tuple(lengths.shape) != (batch,):
        got = f"{lengths.dtype} {list(lengths.shape)}" if isinstance(lengths, torch.Tensor) else type(lengths).__name__
        raise ValueError(f"lengths: expected an int64 tensor [B] = [{batch}], got {got}")
    lengths = lengths.cpu()
    outside = (lengths < 1) | (lengths > size)
    if bool(outside.any()):
        raise ValueError(f"lengths: expected numbers of tokens in 1 .. {size}, got {int(lengths[outside][0])}")
    return lengths


def check_ends(stop: int | None, pad: int | None, mask: int, vocab_size: int, padded: bool) -> None:
    for name, value in (("stop_token_id", stop), ("pad_token_id", pad)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise ValueError(f"{name}: expected an id of the denoiser's vocabulary, 0 .. {vocab_size - 1}, got {value!r}")
    if stop == mask:
        raise ValueError(f"stop_token_id: expected a token that can be drawn, got the mask ({mask})")
    if padded and pad is None and stop is None:
        raise ValueError("pad_token_id: sequences of several lengths need a token to fill up with, got None; the mask will do")


def seeds_of(seed: int | torch.Tensor, batch: int) -> torch.Tensor:
    """int64 [B] on the CPU."""
    return expand_seed(seed, batch, "cpu")


def clock_of(sampler: str, steps: int | None, remask_prob: float | None, schedule: NoiseSchedule | None, blocks: int) -> Clock:
    """The sampler's clock, for sequences of so many blocks."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if sampler in ON_A_GRID:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps: expected an int >= 1 for the {sampler} sampler, got {steps!r}")
        if steps * blocks > _MOST_OFFSETS:
            raise ValueError(f"steps: expected at most 2**32 in all, where the step's word of the RNG counter ends, got {steps}")
    elif steps is not None:
        name = sampler.replace("_", "-")
        raise ValueError(f"steps: the {name} sampler opens one position at a time and has no grid: expected None, got {steps!r}")
    if remask_prob is not None and sampler != "remasking":
        raise ValueError(f"remask_prob: it is for the remasking sampler, got {remask_prob!r} with {sampler!r}; leave it out")
    if sampler == "ancestral":
        return Ancestral(steps)
    if sampler == "first_hitting":
        return FirstHitting()
    if sampler == "left_to_right":
        return LeftToRight()
    remask_prob = 0.02 if remask_prob is None else remask_prob
    if not 0 <= remask_prob <= 1:
        raise ValueError(f"remask_prob: expected a probability in [0, 1], got {remask_prob!r}")
    return Remasking(steps, remask_prob, schedule or LogLinearSchedule(eps=0.0))


def window_of(window: tuple[float, float] | str, window_ess: float) -> tuple[float, float]:
    """(lo, hi); (0, 1), from which ESS takes away, for "auto"."""
    if window == "auto":
        if not 0 < window_ess <= 1:
            raise ValueError(f"window_ess: expected a share of the candidates in (0, 1], got {window_ess!r}")
        return 0.0, 1.0
    try:
        low, high = window
        fits = 0 <= low <= high <= 1
    except (TypeError, ValueError):
        raise ValueError(f"window: expected a pair (lo, hi), or 'auto', got {window!r}") from None
    if not fits:
        raise ValueError(f"window: expected 0 <= lo <= hi <= 1, got {window!r}; (0, 1) is always, (1, 1) never")
    return low, high


def candidates_of(
    num_candidates: int | str | None, max_candidates: int, ess_target: float, energy: EnergyModel | None
) -> tuple[int, float | None]:
    """K and no ESS target, or the cap of K and the target."""
    for name, value in (("max_candidates", max_candidates), ("num_candidates", num_candidates)):
        if value not in (None, "auto") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: expected an int >= 1{', or auto' if name[0] == 'n' else ''}, got {value!r}")
    if num_candidates == "auto" and not 1 <= ess_target <= max_candidates:
        raise ValueError(f"ess_target: expected 1 .. max_candidates = {max_candidates}, got {ess_target!r}")
    count = max_candidates if num_candidates == "auto" else num_candidates or (1 if energy is None else 8)
    if energy is None and (count > 1 or num_candidates == "auto"):
        raise ValueError(
            f"num_candidates: {num_candidates} candidates need an energy to choose by, got energy=None; pass one, or leave both out"
        )
    return count, ess_target if num_candidates == "auto" else None


def check_energy(energy: EnergyModel | None, temperature: float, mask: int, vocab_size: int) -> None:
    if not temperature >= 0:
        raise ValueError(f"energy_temperature: expected a number >= 0 (0 picks the lowest energy), got {temperature}")
    if energy is None:
        return
    if not callable(energy):
        raise ValueError(f"energy: expected a callable x0, xt, t, log_p -> [B, K] (edlm.protocols.EnergyModel), got {energy!r}")
    size = getattr(energy, "vocab_size", None)
    # A model that reads no mask may do without it where it is the last id.
    if isinstance(size, int) and size != vocab_size and not (size == vocab_size - 1 == mask):
        raise ValueError(
            f"energy: expected a model of the denoiser's {vocab_size} ids (the mask, {mask}, may be missing at the end), got one of "
            f"{size}; the two must read the same tokens"
        )


def check_particles(count: int, threshold: float, scheme: str, energy: EnergyModel | None, temperature: float) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"num_particles: expected an int >= 1, got {count!r}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"resample_threshold: expected a share of the particles in [0, 1], got {threshold!r}")
    if scheme not in SCHEMES:
        raise ValueError(f"resample_scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
    if count > 1 and energy is None:
        raise ValueError(f"num_particles: {count} particles need an energy to be weighed by, got energy=None; leave both out")
    if count > 1 and temperature == 0:
        raise ValueError("energy_temperature: expected a number > 0 with particles, whose weights have no value at 0")


def check_span(denoiser: Denoiser, length: int, block_length: int | None, context_length: int | None) -> int | None:
    """How many columns a network may see at once; all if None."""
    for name, value in (("block_length", block_length), ("context_length", context_length)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
    limit = getattr(denoiser, "max_length", None)
    context = context_length or (limit if block_length else None)
    if context is not None and block_length is not None and context < min(block_length, length):
        raise ValueError(f"context_length: expected at least block_length = {block_length}, got {context}")
    if context is not None and block_length is None and context < length:
        raise ValueError(
            f"context_length: a network sees {context} of {length} tokens only where they are decoded in blocks, got "
            "block_length=None; give block_length as well"
        )
    if limit is not None and min(context or length, length) > limit:
        what = f"context_length = {context}" if context else f"{length} tokens (the prompt's, or length)"
        raise ValueError(
            f"prompt, length: the denoiser takes at most {limit} tokens (max_length), got {what}; shorten it, or decode in blocks: "
            f"block_length={max(1, limit // 2)}, context_length={limit}"
        )
    return context


def check_shape(
    compact: bool, cuda_graph: bool, device: torch.device, target: float | None, window: object, energy_rows: int | None
) -> None:
    if energy_rows is not None and (isinstance(energy_rows, bool) or not isinstance(energy_rows, int) or energy_rows < 1):
        raise ValueError(f"energy_rows: expected an int >= 1, or None for no bound, got {energy_rows!r}")
    if not cuda_graph:
        return
    if device.type != "cuda":
        raise ValueError(f"cuda_graph: expected a CUDA device, got {device}; leave it out")
    if compact:
        raise ValueError("cuda_graph: a graph has one shape: expected compact=False, got True")
    if target is not None or window == "auto":
        raise ValueError("cuda_graph: num_candidates and window 'auto' are decided by the host: expected numbers, got 'auto'")


def check_memory(rows: int, count: int, length: int, device: torch.device) -> None:
    """ValueError where the candidates of one step cannot fit, with how many would."""
    left = memory_left(device)
    # Tokens, two log-probabilities, and a copy of each for an energy that sees some of the sequences.
    each = 2 * (8 + 4 + 4) * rows * length
    if left is not None and each * count > left:
        fits = int(left // each)
        raise ValueError(
            f"num_candidates: {count} candidates of {rows} sequences of {length} tokens need {each * count / 2**30:.1f} GiB, got "
            f"{left / 2**30:.1f} GiB free on {device}; "
            + (f"{fits} fit" if fits else "not even one fits: decode fewer sequences at a time")
        )


def memory_left(device: torch.device) -> int | None:
    """Bytes that may still be allocated; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None


def window_holds_a_step(clock: Clock, window: tuple[float, float]) -> bool:
    """Whether the grid has one; without a grid only an empty window has none for certain."""
    (low, high), steps = window, getattr(clock, "steps", None)
    if steps is None:
        return low < high
    last = math.floor(high * steps)  # the largest grid point that is not above hi, or a neighbour of it
    return any(low < n / steps <= high for n in (last - 1, last, last + 1) if 1 <= n <= steps)
