"""The decode loop, the only one: denoise, propose, energy, select, reverse.

Source: Xu et al., arXiv 2410.21357, Algorithm 1. What is skipped, and why that changes nothing: steps and sequences in which nothing
opens (their output would not be used), rows that do not open outside the energy window (nobody reads their tokens).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from ..diffusion import LogLinearSchedule, MaskedDiffusion, NoiseSchedule
from ..ops import deferred_checks, reverse_step, select_candidate
from ..ops._philox import expand_seed
from ..protocols import Denoiser, EnergyModel
from .propose import denoise, propose
from .steps import ancestral, first_hitting

SAMPLERS = ("ancestral", "first_hitting")


@dataclass(frozen=True, eq=False)
class SampleOutput:
    """What was generated, and what it took. S is the number of steps at which something opened; NaN where a sequence had no part."""

    tokens: torch.Tensor  # int64 [B, L], no mask left
    nfe: int  # denoiser calls; each may serve many sequences
    energy_nfe: int  # energy calls
    ess: torch.Tensor  # float32 [S, B], effective sample size in 1 .. K, where the energy was used
    log_Z: torch.Tensor  # float32 [S, B], log of the mean weight there: a lower bound of log Z(xt) in expectation
    step_times: torch.Tensor  # float64 [S, B], the t of each step
    history: torch.Tensor | None  # int64 [S + 1, B, L]: the start and every state after a step, if asked for
    stage_seconds: dict[str, float] = field(default_factory=dict)  # host time a stage; on CUDA that is launches, not execution


class _Stages:
    """Profiler ranges of the five stages, and the host's time in each."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(("denoise", "propose", "energy", "select", "reverse"), 0.0)
        self.cuda = device.type == "cuda"

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        nvtx = torch.cuda.nvtx.range(name) if self.cuda else contextlib.nullcontext()
        with torch.profiler.record_function(name), nvtx:
            yield
        self.seconds[name] += time.perf_counter() - start


@contextlib.contextmanager
def _evaluating(*networks: object) -> Iterator[None]:
    """Dropout off while sampling: a proposal in train mode is another proposal. The mode found is restored."""
    training = [m for n in networks if isinstance(n, torch.nn.Module) for m in n.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def generate(
    denoiser: Denoiser,
    *,
    batch_size: int | None = None,
    length: int | None = None,
    prompt: torch.Tensor | None = None,
    steps: int | None = None,
    energy: EnergyModel | None = None,
    num_candidates: int | None = None,
    window: tuple[float, float] = (0.8, 1.0),
    energy_temperature: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    sampler: str = "ancestral",
    schedule: NoiseSchedule | None = None,
    seed: int | torch.Tensor = 0,
    device: torch.device | str | None = None,
    return_history: bool = False,
    progress: bool = False,
) -> SampleOutput:
    """Decode sequences from a masked-diffusion proposal, corrected by an energy through parallel importance sampling.

    In a step t -> s with lo < t <= hi, K candidates x0 ~ mu(. | xt) are drawn from one denoiser call, scored in one energy call,
    and one is picked with probability softmax(-E / energy_temperature); outside the window x0 ~ mu. Positions whose opening time is
    at least s then take their token from it. As K grows the step tends to p(x0 | xt) = mu exp(-E) / Z; the bias at finite K is
    O(1 / K). K = 1, an empty window or no energy is plain masked diffusion, bitwise under the same seed.

    Args:
        denoiser: any ``edlm.protocols.Denoiser``. With ``hidden`` and ``head`` the head runs on the rows that are drawn only.
        batch_size, length: how many sequences, of how many tokens, all masked at the start. Or
        prompt: int64 [B, L] with the denoiser's mask wherever text is wanted: at the end, in the middle, anywhere.
        steps: T >= 1, for the ancestral sampler: t_i = 1 - i/T. At s = 0 everything still masked opens.
        energy: any ``edlm.protocols.EnergyModel``; low energy is good.
        num_candidates: K >= 1; 1 without an energy, 8 with one.
        window: (lo, hi) within [0, 1]: the energy is used iff lo < t <= hi. (0, 1) is always, (1, 1) never.
        energy_temperature: > 0 usually; 0 picks the lowest energy, inf ignores it.
        temperature, top_k, top_p, min_p: of the proposal, as in ``edlm.ops.sample_candidates``. The importance weights are corrected
            by log mu - log proposal, so that the target stays mu exp(-E) on the support that the filters leave.
        sampler: "ancestral", or "first_hitting": one position at a time, each at its own time, without a grid (steps is then None).
        schedule: of the opening times; log-linear (the default) opens positions uniformly in t.
        seed: an int s (sequence b uses s + b) or int64 [B]. A sequence's result depends on its own seed and prompt alone.
        device: where to decode; the prompt's, else that of the denoiser's parameters, else the CPU.
        return_history: keep every state. progress: a bar on stderr.

    Returns:
        SampleOutput.

    Raises:
        ValueError: whatever argument does not fit, by name; a prompt without masks; NaN logits or energies.

    RNG: opening times Philox(seed[b]; i, 0, 0, OPEN); step n draws with offset n, the index in the grid (ancestral) or of the
    opening (first-hitting). torch's generator is neither read nor changed. Networks whose rows depend on how many rows are asked for,
    as matrix products do in their last bits, pass such differences on.
    """
    mask, vocab_size = _check_denoiser(denoiser)
    device = _device(denoiser, prompt, device)
    xt = _start(prompt, batch_size, length, mask, vocab_size).to(device)
    batch, size = xt.shape
    count = _check_decoding(steps, energy, num_candidates, window, energy_temperature, sampler)
    proposal = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    shaped = temperature != 1 or any(value is not None for value in (top_k, top_p, min_p))

    seeds = expand_seed(seed, batch, "cpu")
    diffusion = MaskedDiffusion(schedule or LogLinearSchedule(eps=0.0), mask)
    open_time = diffusion.opening_times(seeds, batch, size)
    masked = (xt == mask).cpu()
    if sampler == "ancestral":
        plan, longest = ancestral(open_time, masked, steps, window), min(steps, int(masked.sum()))
    else:
        plan, longest = first_hitting(open_time, masked, window), int(masked.sum(1).max())

    stages, energy_nfe = _Stages(device), 0
    seeds_there, open_time_there = (
        seeds.to(device),
        open_time.to(device),
    )  # once: a copy of pageable memory may wait for the device
    step_times, ess, log_z = [], [], []
    history = [xt] if return_history else None
    # no_grad rather than inference_mode: what comes out may be trained on.
    # On a GPU what the ops report is read at the end: the loop waits for nothing of theirs.
    with torch.no_grad(), _evaluating(denoiser, energy), deferred_checks(device.type == "cuda"):
        for step in tqdm(plan, desc="decode", total=longest, disable=not progress):
            live = step.live.to(device, non_blocking=True)
            x, t = xt[live], step.t.to(device, torch.float32, non_blocking=True)
            seed_live = seeds_there[live]
            scored = step.in_window if count > 1 else torch.zeros_like(step.in_window)
            # An energy reads whole sequences; without one only what opens is ever used.
            active = torch.where(scored[:, None], step.masked, step.opening)
            k = count if scored.any() else 1

            with stages("denoise"):
                output = denoise(denoiser, x, t)
            with stages("propose"):
                candidates = propose(denoiser, output, x, active, k, seed=seed_live, offset=step.offset, **proposal)
            index = torch.zeros(len(live), dtype=torch.int64, device=device)
            step_times.append(torch.full((batch,), torch.nan, dtype=torch.float64).index_copy_(0, step.live, step.t))
            for used in (ess, log_z):
                used.append(torch.full((batch,), torch.nan, device=device))
            if k > 1:
                rows = scored.nonzero().squeeze(1).to(device, non_blocking=True)
                x0, log_p, log_q = (c[rows] for c in (candidates.tokens, candidates.model_log_probs, candidates.log_probs))
                with stages("energy"):
                    value = _check_energy(energy(x0, x[rows], t[rows], log_p), len(rows), k)
                    energy_nfe += 1
                with stages("select"):
                    correction = (log_p.double() - log_q.double()).sum(-1) if shaped else None
                    selection = select_candidate(
                        value,
                        temperature=energy_temperature,
                        log_correction=correction,
                        seed=seed_live[rows],
                        offset=step.offset,
                    )
                index[rows] = selection.index
                ess[-1][live[rows]], log_z[-1][live[rows]] = selection.ess, selection.log_Z
            with stages("reverse"):
                s = step.s.to(device, non_blocking=True)
                xt = xt.index_copy(0, live, reverse_step(x, candidates.tokens, index, open_time_there[live], s))
            if history is not None:
                history.append(xt)
    return SampleOutput(
        tokens=xt,
        nfe=len(step_times),
        energy_nfe=energy_nfe,
        ess=torch.stack(ess),
        log_Z=torch.stack(log_z),
        step_times=torch.stack(step_times),
        history=None if history is None else torch.stack(history),
        stage_seconds=stages.seconds,
    )


# --- arguments --------------------------------------------------------------------------------------------------------------------


def _check_denoiser(denoiser: Denoiser) -> tuple[int, int]:
    for name in ("mask_token_id", "vocab_size"):
        value = getattr(denoiser, name, None)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"denoiser: expected an int attribute {name} (edlm.protocols.Denoiser), got {value!r}")
    if not 0 <= denoiser.mask_token_id < denoiser.vocab_size:
        raise ValueError(
            f"denoiser: mask_token_id: expected an id in 0 .. {denoiser.vocab_size - 1}, got {denoiser.mask_token_id}"
        )
    return denoiser.mask_token_id, denoiser.vocab_size


def _device(denoiser: Denoiser, prompt: torch.Tensor | None, device: torch.device | str | None) -> torch.device:
    if device is not None:
        try:
            return torch.device(device)
        except (RuntimeError, TypeError):
            raise ValueError(f"device: expected a torch device such as 'cpu' or 'cuda:0', got {device!r}") from None
    if isinstance(prompt, torch.Tensor):
        return prompt.device
    parameter = next(denoiser.parameters(), None) if isinstance(denoiser, torch.nn.Module) else None
    return parameter.device if parameter is not None else torch.device("cpu")


def _start(prompt: torch.Tensor | None, batch_size: int | None, length: int | None, mask: int, vocab_size: int) -> torch.Tensor:
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


def _check_decoding(
    steps: int | None,
    energy: EnergyModel | None,
    num_candidates: int | None,
    window: tuple[float, float],
    energy_temperature: float,
    sampler: str,
) -> int:
    """The number of candidates, once everything about the loop fits."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if sampler == "ancestral" and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps: expected an int >= 1 for the ancestral sampler, got {steps!r}")
    if sampler == "ancestral" and steps > 2**32:
        raise ValueError(f"steps: expected at most 2**32, where the step's word of the RNG counter ends, got {steps}")
    if sampler == "first_hitting" and steps is not None:
        raise ValueError(
            f"steps: the first-hitting sampler opens one position at a time and has no grid: expected None, got {steps!r}"
        )
    count = num_candidates if num_candidates is not None else 1 if energy is None else 8
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"num_candidates: expected an int >= 1, got {num_candidates!r}")
    if energy is None and count > 1:
        raise ValueError(
            f"num_candidates: {count} candidates need an energy to choose by, got energy=None; pass one, or leave both out"
        )
    try:
        low, high = window
    except (TypeError, ValueError):
        raise ValueError(f"window: expected a pair (lo, hi), got {window!r}") from None
    if not 0 <= low <= high <= 1:
        raise ValueError(f"window: expected 0 <= lo <= hi <= 1, got {window!r}; (0, 1) is always, (1, 1) never")
    if not energy_temperature >= 0:
        raise ValueError(f"energy_temperature: expected a number >= 0 (0 picks the lowest energy), got {energy_temperature}")
    return count


def _check_energy(value: torch.Tensor, batch: int, count: int) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != (batch, count) or not value.is_floating_point():
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"energy: expected a floating tensor [B, K] = [{batch}, {count}], got {got}")
    return value
