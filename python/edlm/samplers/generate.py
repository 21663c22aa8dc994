"""The decode loop, the only one: every sampler is a plan of what opens when, and what becomes of the candidates in between.

Source: Xu et al., arXiv 2410.21357, Algorithm 1. What is skipped, and why that changes nothing: steps and sequences in which nothing
opens (their output would not be used), rows that do not open outside the energy window (nobody reads their tokens).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from tqdm import tqdm

from ..diffusion import LogLinearSchedule, MaskedDiffusion, NoiseSchedule
from ..ops import deferred_checks, upload
from ..protocols import Denoiser, EnergyModel
from . import arguments as check
from .choose import Scorer
from .cuda_graph import Replayed
from .ends import Ends
from .evaluating import evaluating
from .move import inputs
from .propose import Proposal
from .reverse import Reverse
from .sample_output import Record, SampleOutput, StepReport
from .smc import Population
from .stages import Stages
from .steps import Plan


def generate(
    denoiser: Denoiser,
    *,
    batch_size: int | None = None,
    length: int | None = None,
    prompt: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    steps: int | None = None,
    energy: EnergyModel | None = None,
    num_candidates: int | str | None = None,
    window: tuple[float, float] | str = (0.8, 1.0),
    energy_temperature: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    sampler: str = "ancestral",
    remask_prob: float | None = None,
    block_length: int | None = None,
    context_length: int | None = None,
    stop_token_id: int | None = None,
    pad_token_id: int | None = None,
    num_particles: int = 1,
    resample_threshold: float = 0.5,
    resample_scheme: str = "systematic",
    ess_target: float = 4.0,
    max_candidates: int = 32,
    window_ess: float = 0.95,
    energy_batch_size: int | None = None,
    schedule: NoiseSchedule | None = None,
    seed: int | torch.Tensor = 0,
    device: torch.device | str | None = None,
    compact: bool = True,
    cuda_graph: bool = False,
    return_history: bool = False,
    on_step: Callable[[StepReport], None] | None = None,
    progress: bool = False,
) -> SampleOutput:
    """Decode sequences from a masked-diffusion proposal, corrected by an energy through parallel importance sampling.

    In a step t -> s with lo < t <= hi, K candidates x0 ~ mu(. | xt) are drawn from one denoiser call, scored in one energy call,
    and one is picked with probability softmax(-E / energy_temperature); outside the window x0 ~ mu. Positions that open between t and
    s then take their token from it. As K grows the step tends to p(x0 | xt) = mu exp(-E) / Z; the bias at finite K is
    O(1 / K). K = 1, an empty window or no energy is plain masked diffusion, bitwise under the same seed. Each sequence keeps its own
    clock, so a batch costs no more denoiser calls than its busiest sequence: at most min(T, L) on the ancestral grid, L where one
    position opens at a time, T with remasking; in each block, and for each length.

    What to decode:
        denoiser: any ``edlm.protocols.Denoiser``. With ``hidden`` and ``head`` the head runs on the rows that are drawn only.
        batch_size, length: how many sequences, of how many tokens, all masked at the start. Or
        prompt: int64 [B, L] with the denoiser's mask wherever text is wanted: at the end, in the middle, anywhere.
        lengths: int64 [B], where sequences are to end before L. No network sees what lies behind: those of one length go through it
            together, those of different lengths in separate calls.
        stop_token_id: a sequence ends with the first such token that is generated (a prompt's do not count). Steps that could change
            nothing before it are left out: at once on a CPU; from block to block on a GPU, where looking waits, and with remasking.
        pad_token_id: what is behind the end in the output; the stop token if left out.

    In which order:
        sampler: "ancestral", on the grid t_i = 1 - i/T. "first_hitting": one position at a time, each at its own time, without a grid.
            "remasking" (ReMDM): the grid, on which open positions become masked again with probability up to ``remask_prob``
            (its eta_cap; default 0.02) a step. "left_to_right": one position at a time, as ``sample_autoregressive`` does.
        steps: T >= 1, for the samplers with a grid (of every block). At s = 0 everything still masked opens.
        block_length: decode in blocks of so many columns from the left, each by a run of the sampler of its own from t = 1 to 0
            (semi-autoregressive). context_length: the networks see so many columns, up to the end of the block or further where it
            is near the start; the networks' ``max_length``, or all, if left out. So texts longer than the training length are made.
        schedule: of the opening times; log-linear (the default) opens positions uniformly in t.

    The energy:
        energy: any ``edlm.protocols.EnergyModel``; low energy is good.
        num_candidates: K >= 1; 1 without an energy, 8 with one. "auto": the smallest of 2, 4, 8, .. ``max_candidates`` at which the
            ESS reaches ``ess_target``, for each sequence and step. NOTE: to stop where the weights look even favours candidates
            that look alike, so the law at a finite cap is biased otherwise than that of a fixed K; it tends to the target as the
            ESS target grows.
        window: (lo, hi) within [0, 1]: the energy is used iff lo < t <= hi. (0, 1) is always, (1, 1) never. "auto": from t = 1
            on, until a sequence's ESS first reaches ``window_ess`` x K. NOTE: an ESS that is high by chance ends it too early, and one
            that overlooks rare good candidates as well; both leave the rest to the proposal. Both autos make the host read the ESS.
        energy_temperature: > 0 usually; 0 picks the lowest energy, inf ignores it.
        energy_batch_size: at most so many completed sequences in one energy call; all of them if None.
        num_particles: N > 1 is sequential Monte Carlo: N trajectories a sequence, weighted by the mean weight of every step, resampled
            by ``resample_scheme`` (``edlm.ops.resample``) where their ESS falls below ``resample_threshold`` x N. One is returned,
            chosen by weight. What this targets: ``edlm.samplers.smc``. Not together with "auto".

    The proposal:
        temperature, top_k, top_p, min_p: as in ``edlm.ops.sample_candidates``. The importance weights are corrected
            by log mu - log proposal, so that the target stays mu exp(-E) on the support that the filters leave.

    How:
        seed: an int s (sequence b uses s + b) or int64 [B]. A sequence's result depends on its own seed, prompt and length alone.
        device: where to decode; that of the denoiser's parameters, else the prompt's, else the CPU.
        compact: pick out the sequences and rows that a step needs. False computes all of them, in one shape: the same draws.
        cuda_graph: capture that shape as a CUDA graph, and replay it. It has never run on a GPU yet.
        return_history: keep every state. on_step: called after every step. progress: a bar on stderr.

    Returns:
        SampleOutput.

    Raises:
        ValueError: whatever argument does not fit, by name; a prompt without masks, or longer than the networks' ``max_length``; NaN
            logits or energies (with step, sequence and candidate); more candidates than there is memory for (with how many fit).

    RNG: opening times Philox(seed[b]; i, 0, 0, OPEN); a step draws with the offset of its index in the grid, of its opening
    (first-hitting) or column (left-to-right), block j's grid from j T on; i is the column as the networks see it. Particles n >= 1
    draw with seeds Philox(seed[b]; 0, n, 0, PARTICLE), also after they were resampled. torch's generator is neither read nor changed.
    Networks whose rows depend on how many rows are asked for, as matrix products do in their last bits, pass such differences on.
    """
    mask, vocab_size = check.check_denoiser(denoiser)
    device = check.device_of(denoiser, prompt, device)
    start = check.start_of(prompt, batch_size, length, mask, vocab_size)
    batch, size = start.shape
    ends = check.lengths_of(lengths, batch, size)
    check.check_ends(stop_token_id, pad_token_id, mask, vocab_size, bool((ends < size).any()))
    check.check_energy(energy, energy_temperature, mask, vocab_size)
    context = check.check_span(denoiser, energy, int(ends.max()), block_length, context_length)
    clock = check.clock_of(sampler, steps, remask_prob, schedule, -(-size // (block_length or size)))
    low_high = check.window_of(window, window_ess)
    count, target = check.candidates_of(num_candidates, max_candidates, ess_target, energy)
    automatic = target is not None or window == "auto"
    check.check_particles(num_particles, resample_threshold, resample_scheme, energy, energy_temperature, automatic, denoiser)
    check.check_shape(denoiser, compact, cuda_graph, device, automatic)
    check.check_proposal(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    check.check_calls(energy_batch_size, on_step)
    check.check_memory(batch * num_particles, count, min(context or size, size), device)
    corrects = energy is not None and (count > 1 or num_particles > 1)
    warned = corrects and low_high[0] < low_high[1] and not check.window_holds_a_step(clock, low_high)
    if warned:
        warnings.warn(
            f"window: none of {steps} steps starts within {window!r}: the energy will not be used; widen it, or take more steps",
            stacklevel=2,
        )

    seeds = check.seeds_of(seed, batch)
    open_time = MaskedDiffusion(schedule or LogLinearSchedule(eps=0.0), mask).opening_times(seeds, batch, size)
    wanted = (start == mask).cpu() & (torch.arange(size) < ends[:, None])
    if not bool(wanted.any()):
        raise ValueError(
            "prompt, lengths: expected a mask within the length of some sequence, got none; there is nothing to generate"
        )
    # Particles are rows of their own, N of them in all, with the clock of their sequence.
    per_row = [value.repeat_interleave(num_particles, 0) for value in (open_time, wanted, seeds, ends)]
    plan = Plan(clock, low_high, *per_row, block_length=block_length, context=context)
    population = None
    if num_particles > 1:
        population = Population(seeds, num_particles, resample_threshold, resample_scheme, device)
    draws = upload(seeds if population is None else population.seeds, device)
    xt = start.to(device).repeat_interleave(num_particles, 0)  # a copy: the loop writes into it

    stages = Stages(device)
    proposal = Proposal(denoiser, compact, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    scorer = None
    if corrects:
        scorer = Scorer(energy, count, target, energy_temperature, proposal.shaped, energy_batch_size, stages)
    reverse = Reverse(denoiser, proposal, scorer, stages, compact)
    record = Record(xt, num_particles, return_history)
    # Particles stay together; what is shown may be masked again until its block ends; and on a GPU to look is to wait.
    when = "never" if population else "step" if device.type == "cpu" and sampler != "remasking" else "block"
    finish = Ends(start.to(device), ends, stop_token_id, mask, when)
    correcting = torch.full((len(xt),), corrects)  # until the ESS says otherwise, with window "auto"
    nfe, most = 0, plan.most()
    # no_grad rather than inference_mode: what comes out may be trained on.
    # On a GPU what the ops report is read at the end: the loop waits for nothing of theirs.
    with torch.no_grad(), evaluating(denoiser, energy), deferred_checks(device.type != "cpu") as reports:
        advance = Replayed(reverse, reports) if cuda_graph else reverse
        for step in tqdm(plan, desc="decode", total=most, disable=not progress):
            step = step.only(finish.open[step.rows // num_particles])
            if not len(step.rows):  # all of them have ended before
                finish.look(xt, step.ends_block)
                if not bool(finish.open.any()):
                    break
                continue
            rows, seen = upload(step.rows, device), slice(*step.columns)
            if step.remask is not None:
                xt[rows, seen] = xt[rows, seen].masked_fill(upload(step.remask, device), mask)
            scored = step.rows[step.in_window & correcting[step.rows]]
            move, names = inputs(step, scored, xt, draws, number=nfe, particles=num_particles, compact=compact)
            xs, choice = advance(move, names, len(scored) > 0)
            nfe += 1
            xt[rows, seen] = xs if compact else xs[rows]
            scored_there = upload(scored, device)
            if choice is not None and not compact:  # a fixed shape chooses for everybody
                choice = choice.only(scored_there)
            record.add(step.rows, step.t, scored_there, choice, xt)
            if window == "auto" and choice is not None:
                correcting[scored[(choice.ess >= window_ess * choice.num_candidates).cpu()]] = False
            if population is not None:
                xt = xt[population.update(rows, upload(step.offset, device), scored_there, choice)]
            finish.look(xt, step.ends_block)
            if on_step is not None:
                on_step(record.report(step.rows, step.t, xt, most, nfe, scorer.nfe if scorer else 0))
        chosen = None if population is None else population.choose()
        try:
            reports.check()
        except ValueError as error:
            if scorer is not None and str(error).startswith("select_candidate"):
                scorer.read()  # says more
            raise
        if scorer is not None and not scorer.nfe and low_high[0] < low_high[1] and not warned:
            warnings.warn(f"window: no step started within {window!r}: the energy was not used; widen it", stacklevel=2)
    tokens, lengths = finish.cut(xt if chosen is None else xt[chosen], pad_token_id)
    return record.finish(
        tokens, lengths, chosen, population, xt, nfe=nfe, energy_nfe=scorer.nfe if scorer else 0, stage_seconds=stages.seconds
    )
