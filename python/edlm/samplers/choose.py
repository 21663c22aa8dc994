"""One of K candidates by its energy: scored all at once, or twice as many at a time until the effective sample size suffices."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..ops import Candidates, select_candidate
from ..protocols import EnergyModel


@dataclass(frozen=True, eq=False)
class Choice:
    """What was taken in R sequences, and why; all on the device."""

    index: torch.Tensor  # int64 [R] in 0 .. K-1
    ess: torch.Tensor  # float32 [R]
    log_Z: torch.Tensor  # float32 [R]
    energy: torch.Tensor  # float32 [R], of the candidate that was taken
    num_candidates: torch.Tensor  # int64 [R], how many were scored

    def only(self, rows: torch.Tensor) -> Choice:
        return Choice(*(value[rows] for value in vars(self).values()))


@dataclass
class Scorer:
    """The energy model and how it is used. ``nfe`` counts its calls, ``unread`` holds what a device was not asked for yet."""

    model: EnergyModel
    num_candidates: int  # the cap, where ess_target is given
    ess_target: float | None
    temperature: float
    shaped: bool  # whether the proposal was tempered or filtered
    max_rows: int | None  # completed sequences in one call
    particles: int  # rows of a sequence
    stage: Callable[[str], contextlib.AbstractContextManager]
    nfe: int = 0
    unread: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def choose(
        self,
        candidates: Candidates,
        xt: torch.Tensor,
        t: torch.Tensor,
        masked: torch.Tensor | None,
        rows: torch.Tensor,
        seed: torch.Tensor,
        offset: torch.Tensor,
        where: str,
    ) -> Choice:
        """Score and pick, R sequences with their candidates [R, K, W].

        Args:
            masked: bool [R, W] on the CPU, for energies that offer ``score``; None where the host must not know.
            rows: int64 [R], the sequences' names for an error; where: the step's.
        """
        stages = self._stages()
        if len(stages) == 1:
            return self._pick(candidates, xt, t, masked, rows, seed, offset, where, None)[0]
        # The host reads each ESS here: the number of candidates is decided by it.
        found: list[tuple[torch.Tensor, Choice]] = []
        left, scored = torch.arange(len(xt)), None
        for count in stages:
            on = left.to(xt.device)
            part = Candidates(*(c[on, :count] for c in (candidates.tokens, candidates.log_probs, candidates.model_log_probs)))
            choice, scored = self._pick(
                part, xt[on], t[on], None if masked is None else masked[left], rows[left], seed[on], offset[on], where, scored
            )
            done = (choice.ess >= self.ess_target).cpu() if count < stages[-1] else torch.ones(len(left), dtype=torch.bool)
            keep = done.to(xt.device)
            found.append((on[keep], choice.only(keep)))
            left, scored = left[~done], scored[~keep]
            if not len(left):
                break
        order = torch.cat([on for on, _ in found]).argsort()
        parts = zip(*(vars(choice).values() for _, choice in found), strict=True)
        return Choice(*(torch.cat(values)[order] for values in parts))

    def _stages(self) -> list[int]:
        """How many candidates are scored before the ESS is looked at: no fewer than its target, which no fewer can reach."""
        if self.ess_target is None:
            return [self.num_candidates]
        counts = [min(self.num_candidates, 2 ** math.ceil(math.log2(max(2.0, self.ess_target))))]
        while counts[-1] < self.num_candidates:
            counts.append(min(self.num_candidates, 2 * counts[-1]))
        return counts

    def _pick(
        self,
        candidates: Candidates,
        xt: torch.Tensor,
        t: torch.Tensor,
        masked: torch.Tensor | None,
        rows: torch.Tensor,
        seed: torch.Tensor,
        offset: torch.Tensor,
        where: str,
        before: torch.Tensor | None,
    ) -> tuple[Choice, torch.Tensor]:
        """Of candidates of which the first have the energies ``before`` [R, k]; all energies too."""
        first = 0 if before is None else before.shape[1]
        with self.stage("energy"):
            fresh = self._score(candidates.tokens[:, first:], xt, t, candidates.model_log_probs[:, first:], masked)
            energy = fresh if before is None else torch.cat([before, fresh.to(before.dtype)], 1)
            self._check(energy, rows, where)
        with self.stage("select"):
            correction = None
            if self.shaped:
                correction = (candidates.model_log_probs.double() - candidates.log_probs.double()).sum(-1)
            selection = select_candidate(
                energy, temperature=self.temperature, log_correction=correction, seed=seed, offset=offset
            )
        taken = energy.gather(1, selection.index[:, None]).squeeze(1).float()
        count = torch.full_like(selection.index, energy.shape[1])
        return Choice(selection.index, selection.ess, selection.log_Z, taken, count), energy

    def _score(
        self, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor, log_p: torch.Tensor, masked: torch.Tensor | None
    ) -> torch.Tensor:
        """[R, K], in calls of at most ``max_rows`` completed sequences."""
        r, k = x0.shape[:2]
        limit = self.max_rows or r * k
        wide, tall = min(k, limit), max(1, limit // k)
        rows = []
        for b in range(0, r, tall):
            part = slice(b, b + tall)
            known = None if masked is None else masked[part]
            calls = [
                self._call(x0[part, i : i + wide], xt[part], t[part], log_p[part, i : i + wide], known) for i in range(0, k, wide)
            ]
            rows.append(calls[0] if len(calls) == 1 else torch.cat(calls, 1))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _call(
        self, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor, log_p: torch.Tensor, masked: torch.Tensor | None
    ) -> torch.Tensor:
        self.nfe += 1
        score = None if masked is None else getattr(self.model, "score", None)
        value = score(x0, xt, t, log_p, masked=masked) if callable(score) else self.model(x0, xt, t, log_p)
        expected = tuple(x0.shape[:2])
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != expected or not value.is_floating_point():
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"energy: expected a floating tensor [B, K] = {list(expected)}, got {got}")
        return value.detach()

    def _check(self, energy: torch.Tensor, rows: torch.Tensor, where: str) -> None:
        """NaN, -inf, or +inf everywhere: raised here on a CPU, kept for ``read`` on a device, which is not waited for."""
        wrong = energy.isnan() | (energy == -math.inf) | (energy == math.inf).all(1, keepdim=True)
        if energy.device.type == "cpu":
            self._raise(where, rows, wrong, energy)
        else:
            self.unread.append((where, rows, wrong))

    def read(self) -> None:
        """Raise what was wrong with the energies, at the end."""
        for where, rows, wrong in self.unread:
            self._raise(where, rows, wrong.cpu(), None)
        self.unread.clear()

    def _raise(self, where: str, rows: torch.Tensor, wrong: torch.Tensor, energy: torch.Tensor | None) -> None:
        if not bool(wrong.any()):
            return
        row, candidate = (int(i) for i in wrong.nonzero()[0])
        candidates = f"all {wrong.shape[1]} candidates" if bool(wrong[row].all()) else f"candidate {candidate}"
        value = "NaN, -inf, or +inf for all" if energy is None else float(energy[row, candidate])
        sequence, particle = divmod(int(rows[row]), self.particles)
        whose = f"sequence {sequence}" if self.particles == 1 else f"sequence {sequence}, particle {particle},"
        raise ValueError(
            f"energy: expected finite energies (+inf excludes a candidate, and one must be left), got {value} for {candidates} of "
            f"{whose} in {where}"
        )
