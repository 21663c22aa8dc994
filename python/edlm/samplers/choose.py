"""One of K candidates by its energy: scored all at once, or twice as many at a time until the effective sample size suffices."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..ops import Candidates, Selection, select_candidate, upload
from ..protocols import EnergyModel
from .move import Move, Names


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
    batch_size: int | None  # completed sequences in one call
    stage: Callable[[str], contextlib.AbstractContextManager]
    nfe: int = 0
    unread: list[tuple[Names, torch.Tensor]] = field(default_factory=list)

    def choose(self, candidates: Candidates, move: Move, names: Names, *, host_knows: bool) -> Choice:
        """Score and pick among candidates [R, K, W].

        ``host_knows`` which rows are masked, and all rows are scored; otherwise the energy is asked without, and what it says of rows
        that are not scored does not matter.
        """
        if self.ess_target is not None:
            return self._as_many_as_it_takes(candidates, move, names)
        with self.stage("energy"):
            energy = self._score(candidates, move, names.masked if host_knows else None)
            if not host_knows:
                energy = torch.where(move.scored[:, None], energy, 0)
            self._check(energy, names)
        with self.stage("select"):
            selection = self._select(energy, self._correction(candidates), move.seed, move.offset)
        return _choice(selection, energy)

    def _as_many_as_it_takes(self, candidates: Candidates, move: Move, names: Names) -> Choice:
        """The host reads each ESS here: the number of candidates is decided by it."""
        found: list[tuple[torch.Tensor, Choice]] = []
        device = move.xt.device
        left = torch.arange(len(move.xt))
        energy = torch.empty(len(left), 0, device=device)
        correction = torch.empty(len(left), 0, dtype=torch.float64, device=device) if self.shaped else None
        for count in self._stages():
            on, last, first = upload(left, device), count == self.num_candidates, energy.shape[1]
            same = candidates.model_log_probs is candidates.log_probs
            log_p = candidates.model_log_probs[on, first:count]
            fresh = Candidates(
                candidates.tokens[on, first:count], log_p if same else candidates.log_probs[on, first:count], log_p
            )
            part = Move(move.xt[on], move.t[on], move.seed[on], move.offset[on], move.opening[on], move.active, move.scored)
            with self.stage("energy"):
                energy = torch.cat([energy, self._score(fresh, part, names.masked[left])], 1)
                self._check(energy, names.only(left), all_excluded=not last)
            with self.stage("select"):
                if correction is not None:
                    correction = torch.cat([correction, self._correction(fresh)], 1)
                # Where all are excluded so far there is nothing to pick, and nothing is taken from this.
                none = (energy == math.inf).all(1)
                selection = self._select(energy.masked_fill(none[:, None], 0.0), correction, part.seed, part.offset)
                done = ((selection.ess >= self.ess_target) & ~none).cpu() if not last else torch.ones(len(left), dtype=torch.bool)
            keep, on_with = upload(done, device), upload(~done, device)
            found.append((on[keep], _choice(selection, energy).only(keep)))
            left, energy = left[~done], energy[on_with]
            correction = None if correction is None else correction[on_with]
            if not len(left):
                break
        order = torch.cat([on for on, _ in found]).argsort()
        parts = zip(*(vars(choice).values() for _, choice in found), strict=True)
        return Choice(*(torch.cat(values)[order] for values in parts))

    def _stages(self) -> list[int]:
        """How many candidates are scored before the ESS is looked at: no fewer than its target, which no fewer can reach."""
        counts = [min(self.num_candidates, 2 ** math.ceil(math.log2(max(2.0, self.ess_target or 2.0))))]
        while counts[-1] < self.num_candidates:
            counts.append(min(self.num_candidates, 2 * counts[-1]))
        return counts

    def _correction(self, candidates: Candidates) -> torch.Tensor | None:
        """log mu - log proposal of each candidate, float64 [R, K], where they differ."""
        if not self.shaped:
            return None
        return candidates.model_log_probs.sum(-1, dtype=torch.float64) - candidates.log_probs.sum(-1, dtype=torch.float64)

    def _select(
        self, energy: torch.Tensor, correction: torch.Tensor | None, seed: torch.Tensor, offset: torch.Tensor
    ) -> Selection:
        return select_candidate(energy, temperature=self.temperature, log_correction=correction, seed=seed, offset=offset)

    def _score(self, candidates: Candidates, move: Move, masked: torch.Tensor | None) -> torch.Tensor:
        """[R, K], in calls of at most ``batch_size`` completed sequences."""
        x0, log_p = candidates.tokens, candidates.model_log_probs
        r, k = x0.shape[:2]
        limit = self.batch_size or r * k
        wide, tall = min(k, limit), max(1, limit // k)
        rows = []
        for b in range(0, r, tall):
            part = slice(b, b + tall)
            known = None if masked is None else masked[part]
            calls = [
                self._call(x0[part, i : i + wide], move.xt[part], move.t[part], log_p[part, i : i + wide], known)
                for i in range(0, k, wide)
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
            raise ValueError(f"energy: expected a floating tensor [B, K] = [{expected[0]}, {expected[1]}], got {got}")
        if value.device != xt.device:
            raise ValueError(
                f"energy: expected energies on {xt.device}, beside the tokens, got them on {value.device}; move the model"
            )
        return value.detach()

    def _check(self, energy: torch.Tensor, names: Names, all_excluded: bool = False) -> None:
        """NaN, -inf, or +inf everywhere: raised here on a CPU, kept for ``read`` on a device, which is not waited for."""
        wrong = energy.isnan() | (energy == -math.inf)
        if not all_excluded:
            wrong |= (energy == math.inf).all(1, keepdim=True)
        if energy.device.type != "cpu":
            self.unread.append((names, wrong))
        elif bool(wrong.any()):
            self._raise(names, wrong, energy)

    def read(self) -> None:
        """Raise what was wrong with the energies, at the end."""
        for names, wrong in self.unread:
            if bool(wrong.any()):
                self._raise(names, wrong.cpu(), None)
        self.unread.clear()

    @staticmethod
    def _raise(names: Names, wrong: torch.Tensor, energy: torch.Tensor | None) -> None:
        row, candidate = (int(i) for i in wrong.nonzero()[0])
        which = f"all {wrong.shape[1]} candidates" if bool(wrong[row].all()) else f"candidate {candidate}"
        value = "something else" if energy is None else float(energy[row, candidate])
        raise ValueError(
            f"energy: expected finite energies (+inf excludes a candidate, and one must be left), got {value} for {which} of "
            f"{names.whose(row)}"
        )


def _choice(selection: Selection, energy: torch.Tensor) -> Choice:
    taken = energy.gather(1, selection.index[:, None]).squeeze(1).float()
    return Choice(selection.index, selection.ess, selection.log_Z, taken, torch.full_like(selection.index, energy.shape[1]))
