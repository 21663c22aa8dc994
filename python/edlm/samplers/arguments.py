"""What ``generate`` accepts: every argument that does not fit is named, with what was expected and what came."""

from __future__ import annotations

import math
import os

import torch

from ..diffusion import LogLinearSchedule, NoiseSchedule
from ..ops import backends
from ..ops._philox import expand_seed
from ..ops.importance import SCHEMES
from ..protocols import Denoiser, EnergyModel, offers_head
from .steps import Ancestral, Clock, FirstHitting, LeftToRight, Remasking

SAMPLERS = ("ancestral", "first_hitting", "remasking", "left_to_right")
ON_A_GRID = ("ancestral", "remasking")
_MOST_OFFSETS = 2**32  # where the step's word of the RNG counter ends


def _number(name: str, value: object, low: float, high: float, meaning: str) -> float:
    """A number in low .. high, both included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name}: expected {meaning}, got {value!r}")
    return value


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
    if not callable(denoiser) and not offers_head(denoiser):
        raise ValueError(f"denoiser: expected a callable xt, t -> logits, or hidden and head, got {type(denoiser).__name__}")
    return denoiser.mask_token_id, denoiser.vocab_size


def device_of(denoiser: Denoiser, prompt: torch.Tensor | None, device: torch.device | str | None) -> torch.device:
    if device is not None:
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, TypeError, AssertionError) as error:  # the last is torch's where it has no CUDA
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"device: expected a torch device that is there, such as 'cpu' or 'cuda:0', got {device!r} ({reason})"
            ) from None
    parameter = next(denoiser.parameters(), None) if isinstance(denoiser, torch.nn.Module) else None
    if parameter is not None:
        return parameter.device
    return prompt.device if isinstance(prompt, torch.Tensor) else torch.device("cpu")


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
    if schedule is not None and not isinstance(schedule, NoiseSchedule):
        raise ValueError(
            f"schedule: expected an edlm.diffusion.NoiseSchedule, got {schedule!r}; edlm.diffusion.schedule(name) makes one"
        )
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
    remask_prob = 0.02 if remask_prob is None else _number("remask_prob", remask_prob, 0, 1, "a probability in [0, 1]")
    return Remasking(steps, remask_prob, schedule or LogLinearSchedule(eps=0.0))


def window_of(window: tuple[float, float] | str, window_ess: float) -> tuple[float, float]:
    """(lo, hi); (0, 1), from which ESS takes away, for "auto"."""
    if isinstance(window, str) and window == "auto":
        _number("window_ess", window_ess, math.nextafter(0, 1), 1, "a share of the candidates in (0, 1]")
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
        free = (None, "auto") if name == "num_candidates" else ()
        if value not in free and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: expected an int >= 1{', or auto' if free else ''}, got {value!r}")
    if num_candidates == "auto":
        _number("ess_target", ess_target, 1, max_candidates, f"a number in 1 .. max_candidates = {max_candidates}")
    count = max_candidates if num_candidates == "auto" else num_candidates or (1 if energy is None else 8)
    if energy is None and (count > 1 or num_candidates == "auto"):
        raise ValueError(
            f"num_candidates: {num_candidates} candidates need an energy to choose by, got energy=None; pass one, or leave both out"
        )
    return count, ess_target if num_candidates == "auto" else None


def check_energy(energy: EnergyModel | None, temperature: float, mask: int, vocab_size: int) -> None:
    _number("energy_temperature", temperature, 0, math.inf, "a number >= 0 (0 picks the lowest energy)")
    if energy is None:
        return
    if not callable(energy):
        raise ValueError(f"energy: expected a callable x0, xt, t, log_p -> [B, K] (edlm.protocols.EnergyModel), got {energy!r}")
    if callable(getattr(energy, "log_probs", None)):
        raise ValueError(
            f"energy: expected a callable x0, xt, t, log_p -> [B, K], got an autoregressive model ({type(energy).__name__}); wrap it: "
            "edlm.models.ARResidualEnergy(model, mask_token_id=...)"
        )
    size = getattr(energy, "vocab_size", None)
    # A model that reads no mask may do without it where it is the last id.
    if isinstance(size, int) and size != vocab_size and not (size == vocab_size - 1 == mask):
        raise ValueError(
            f"energy: expected a model of the denoiser's {vocab_size} ids (the mask, {mask}, may be missing at the end), got one of "
            f"{size}; the two must read the same tokens"
        )


def check_particles(
    count: int, threshold: float, scheme: str, energy: EnergyModel | None, temperature: float, automatic: bool, denoiser: Denoiser
) -> None:
    """``automatic``: whether the ESS decides the number of candidates or the window."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"num_particles: expected an int >= 1, got {count!r}")
    _number("resample_threshold", threshold, 0, 1, "a share of the particles in [0, 1]")
    if scheme not in SCHEMES:
        raise ValueError(f"resample_scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
    if count == 1:
        return
    if energy is None:
        raise ValueError(f"num_particles: {count} particles need an energy to be weighed by, got energy=None; leave both out")
    if temperature == 0:
        raise ValueError("energy_temperature: expected a number > 0 with particles, whose weights have no value at 0, got 0")
    if automatic:
        raise ValueError(
            "num_candidates, window: expected numbers with particles, got 'auto': weights from a number of candidates that depends on "
            "them are biased, and so are those of particles of which only some are weighed"
        )
    if callable(getattr(denoiser, "prepare", None)):
        raise ValueError(
            "num_particles: expected 1 with a denoiser that keeps something a sequence (prepare), since particles change places, "
            f"got {count}"
        )


def check_span(
    denoiser: Denoiser, energy: EnergyModel | None, length: int, block_length: int | None, context_length: int | None
) -> int | None:
    """How many columns the networks may see at once; all if None."""
    for name, value in (("block_length", block_length), ("context_length", context_length)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
    limit, whose = None, ""
    for name, network in (("denoiser", denoiser), ("energy", energy)):
        most = getattr(network, "max_length", None)
        if most is None:
            continue
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(f"{name}: max_length: expected an int >= 1, or None for any, got {most!r}")
        if limit is None or most < limit:
            limit, whose = most, name
    context = context_length or (limit if block_length else None)
    if context is not None and block_length is not None and context < min(block_length, length):
        given = "" if context_length else f" (max_length of the {whose})"
        raise ValueError(
            f"context_length: expected at least the {min(block_length, length)} columns of a block, got {context}{given}; take "
            f"block_length <= {context}"
        )
    if context is not None and block_length is None and context < length:
        raise ValueError(
            f"context_length: a network sees {context} of {length} tokens only where they are decoded in blocks, got "
            "block_length=None; give block_length as well"
        )
    if limit is not None and min(context or length, length) > limit:
        what = f"context_length = {context}" if context else f"{length} tokens (the prompt's, or length)"
        # A model that keeps a cache from the left has no other context.
        blocks = (
            ""
            if callable(getattr(denoiser, "prepare", None))
            else (f", or decode in blocks: block_length={max(1, limit // 2)}, context_length={limit}")
        )
        raise ValueError(f"prompt, length: the {whose} takes at most {limit} tokens (max_length), got {what}; shorten it{blocks}")
    return context


def check_shape(denoiser: Denoiser, compact: bool, cuda_graph: bool, device: torch.device, automatic: bool) -> None:
    if not compact and callable(getattr(denoiser, "prepare", None)):
        raise ValueError(
            "compact: expected True with a denoiser that keeps something a sequence (prepare), which has to know who comes, got False"
        )
    if not cuda_graph:
        return
    if device.type != "cuda":
        raise ValueError(f"cuda_graph: expected a CUDA device, got {device}; leave it out")
    if compact:
        raise ValueError("cuda_graph: a graph has one shape: expected compact=False, got True")
    if automatic:
        raise ValueError("cuda_graph: num_candidates and window 'auto' are decided by the host: expected numbers, got 'auto'")
    missing = [
        name for name in ("sample_candidates", "select_candidate", "reverse_step") if backends()[name]["cuda"] != "compiled"
    ]
    if missing:
        raise ValueError(
            f"cuda_graph: expected compiled CUDA kernels, got references of {', '.join(missing)}, which no graph can capture; "
            "`edlm info` tells what is there"
        )


def check_proposal(**numbers: object) -> None:
    """Their values are checked where they are used; that they are numbers, before a network is called."""
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name}: expected a number, got {value!r}")


def check_calls(energy_batch_size: int | None, on_step: object) -> None:
    size = energy_batch_size
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"energy_batch_size: expected an int >= 1, or None for no bound, got {size!r}")
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step: expected a callable that takes a StepReport, got {on_step!r}")


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
    if device.type == "cuda":  # what is free, and what torch holds and does not use
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
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
