"""K exact draws a row, with their log-probabilities, from one read of the logits: ``sample_candidates``, ``sample_categorical``.

The algorithm is the tile-mass inverse CDF (docs/algorithms.md): a row's softmax mass in tiles of 512 columns, then per draw one
uniform that picks a tile and one that picks inside it, in float64. The functions named ``_..._reference`` are its specification;
csrc/cpu/sampling.cpp and csrc/cuda/sampling.cu are the kernels. Random numbers: Philox with the counter (position, candidate, offset,
TOKEN) under the seed of the sequence (``_philox.py``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ._library import check_invalid, check_logits, check_number, check_tensor, define_op, forbidden_ids, unit_stride
from ._philox import Purpose, expand_offset, expand_seed, philox_uniform

TILE = 512  # columns; part of the RNG contract, since the first uniform picks a tile

# A row is reported as 4 * row + code; the smallest wins, so that the message does not depend on the order of rows.
_NON_FINITE, _NO_SUPPORT, _OUT_OF_RANGE = 0, 1, 2
_NOTHING = torch.iinfo(torch.int64).max


_PLAIN = (1.0, 0, 1.0, 0.0)  # temperature, top_k, top_p, min_p: nothing tempered, nothing filtered


class Candidates(NamedTuple):
    """Draws and their natural-log probabilities; shapes as the function that returns them says."""

    tokens: torch.Tensor
    log_probs: torch.Tensor  # under the proposal that was drawn from (tempered, filtered)
    model_log_probs: torch.Tensor  # under softmax(logits), forbidden ids excluded: temperature 1, no filter


# --- the reference --------------------------------------------------------------------------------------------------------------


def _sample_rows(
    x: torch.Tensor,
    num_samples: int,
    seed: torch.Tensor,
    position: torch.Tensor,
    offset: torch.Tensor,
    temperature: float,
    filters: tuple[int, float, float],
    forbidden: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """[n, V] float64 -> tokens, log_probs, model_log_probs [n, K], code [n] (-1 where the row is valid)."""
    n, vocab_size = x.shape
    if forbidden.numel():
        x = x.index_fill(-1, forbidden, -math.inf)
    non_finite = (x.isnan() | (x == math.inf)).any(-1)
    no_support = (x == -math.inf).all(-1)
    code = torch.where(non_finite, _NON_FINITE, torch.where(no_support, _NO_SUPPORT, -1))
    x = torch.where((code >= 0)[:, None], 0.0, x)
    centred = x - x.amax(-1, keepdim=True)
    if temperature == 0:  # greedy; argmax returns the lowest of equal ids
        tokens = x.argmax(-1, keepdim=True).expand(n, num_samples)
        log_probs = torch.zeros(n, num_samples, dtype=torch.float64, device=x.device)
    else:
        y = _filter(centred / temperature, *filters)
        p = torch.nn.functional.pad(y.exp(), (0, -vocab_size % TILE)).view(n, -1, TILE)
        tiles = p.sum(-1).cumsum(-1)  # [n, tiles]
        candidate = torch.arange(num_samples, device=x.device)
        u_tile, u_column = philox_uniform(
            seed[:, None], position=position[:, None], candidate=candidate, offset=offset[:, None], purpose=Purpose.TOKEN
        )
        tile = torch.searchsorted(tiles, u_tile * tiles[:, -1:], right=True).clamp_max(tiles.shape[1] - 1)
        columns = p.gather(1, tile[:, :, None].expand(-1, -1, TILE)).cumsum(-1)  # [n, K, 512]
        column = torch.searchsorted(columns, u_column[:, :, None] * columns[:, :, -1:], right=True)
        last = (columns < columns[:, :, -1:]).sum(-1, keepdim=True)  # the last column that has mass
        tokens = tile * TILE + torch.minimum(column, last).squeeze(-1)
        tokens = tokens.clamp_max(vocab_size - 1)
        log_probs = (y.gather(-1, tokens) - y.logsumexp(-1, keepdim=True)).clamp_max(0)
    model_log_probs = (centred.gather(-1, tokens) - centred.logsumexp(-1, keepdim=True)).clamp_max(0)
    return tokens, log_probs.float(), model_log_probs.float(), code


def _filter(y: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """[n, V] float64 with maximum 0 -> the same with -inf at what the filters remove; 0, 1 and 0 remove nothing.

    A stable sort puts the lowest id first among equals, and each filter keeps a prefix of that order.
    """
    if (top_k, top_p, min_p) == (0, 1, 0):
        return y
    x, order = y.sort(dim=-1, descending=True, stable=True)
    keep = x >= (math.log(min_p) if min_p > 0 else -math.inf)
    if top_k:
        keep[:, top_k:] = False
        x[:, top_k:] = -math.inf
    if top_p < 1:  # the token that crosses top_p is kept
        mass = x.exp().cumsum(-1)
        keep[:, 1:] &= mass[:, :-1] < top_p * mass[:, -1:]
    return y.masked_fill(~torch.empty_like(keep).scatter_(-1, order, keep), -math.inf)


def _chunks(rows: torch.Tensor, columns: int) -> tuple[torch.Tensor, ...]:
    return rows.split(max(1, (4 << 20) // columns))  # 32 MiB of float64 at a time


def _sample_candidates_reference(
    logits: torch.Tensor,
    xt: torch.Tensor,
    mask_token_id: int,
    num_candidates: int,
    active: torch.Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: torch.Tensor,
    offset: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length, vocab_size = logits.shape
    tokens = torch.where((xt < 0) | (xt >= vocab_size), 0, xt)[:, None, :].repeat(1, num_candidates, 1)
    log_probs = torch.zeros(tokens.shape, dtype=torch.float32, device=logits.device)
    model_log_probs = torch.zeros(tokens.shape, dtype=torch.float32, device=logits.device)
    row_index = torch.arange(batch * length, device=logits.device)
    out_of_range = ((xt < 0) | (xt >= vocab_size)).flatten()
    invalid = torch.where(out_of_range, 4 * row_index + _OUT_OF_RANGE, _NOTHING).min() if row_index.numel() else None
    drawn = xt == mask_token_id if active is None else (xt == mask_token_id) & active
    mask = torch.full((1,), mask_token_id, device=logits.device)
    for rows in _chunks(drawn.flatten().nonzero().squeeze(1), max(vocab_size, TILE * num_candidates)):
        if not rows.numel():
            continue
        b, i = rows // length, rows % length
        drawn_tokens, lp, model_lp, code = _sample_rows(
            logits[b, i].double(), num_candidates, seed[b], i, offset.expand(batch)[b], temperature, (top_k, top_p, min_p), mask
        )
        tokens[b, :, i], log_probs[b, :, i], model_log_probs[b, :, i] = drawn_tokens, lp, model_lp
        invalid = torch.minimum(invalid, torch.where(code >= 0, 4 * rows + code, _NOTHING).min())
    plain = (temperature, top_k, top_p, min_p) == _PLAIN
    return tokens, log_probs, log_probs.new_empty(0) if plain else model_log_probs, _report(invalid, logits)


def _sample_categorical_reference(
    logits: torch.Tensor,
    num_samples: int,
    position: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    forbidden: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    n, vocab_size = logits.shape
    tokens = torch.empty(n, num_samples, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(n, num_samples, dtype=torch.float32, device=logits.device)
    model_log_probs = torch.empty(n, num_samples, dtype=torch.float32, device=logits.device)
    invalid = None
    for rows in _chunks(torch.arange(n, device=logits.device), max(vocab_size, TILE * num_samples)):
        if not rows.numel():
            continue
        tokens[rows], log_probs[rows], model_log_probs[rows], code = _sample_rows(
            logits[rows].double(),
            num_samples,
            seed[rows],
            position[rows],
            offset.expand(n)[rows],
            temperature,
            (top_k, top_p, min_p),
            forbidden,
        )
        worst = torch.where(code >= 0, 4 * rows + code, _NOTHING).min()
        invalid = worst if invalid is None else torch.minimum(invalid, worst)
    plain = (temperature, top_k, top_p, min_p) == _PLAIN
    return tokens, log_probs, log_probs.new_empty(0) if plain else model_log_probs, _report(invalid, logits)


def _report(invalid: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    if invalid is None:
        return torch.full((1,), -1, dtype=torch.int64, device=logits.device)
    return torch.where(invalid == _NOTHING, -1, invalid).reshape(1)


def _fake(logits: torch.Tensor, shape: tuple[int, ...], *proposal: float) -> tuple[torch.Tensor, ...]:
    log_probs = logits.new_empty(shape, dtype=torch.float32)
    return (
        logits.new_empty(shape, dtype=torch.int64),
        log_probs,
        log_probs.new_empty(0 if proposal == _PLAIN else shape),
        logits.new_empty(1, dtype=torch.int64),
    )


_sample_candidates = define_op(
    "sample_candidates(Tensor logits, Tensor xt, int mask_token_id, int num_candidates, Tensor? active, float temperature,"
    " int top_k, float top_p, float min_p, Tensor seed, Tensor offset) -> (Tensor, Tensor, Tensor, Tensor)",
    _sample_candidates_reference,
    lambda logits, xt, mask_token_id, num_candidates, active, temperature, top_k, top_p, min_p, seed, offset: _fake(
        logits, (xt.shape[0], num_candidates, xt.shape[1]), temperature, top_k, top_p, min_p
    ),
)
_sample_categorical = define_op(
    "sample_categorical(Tensor logits, int num_samples, Tensor position, float temperature, int top_k, float top_p, float min_p,"
    " Tensor forbidden, Tensor seed, Tensor offset) -> (Tensor, Tensor, Tensor, Tensor)",
    _sample_categorical_reference,
    lambda logits, num_samples, position, temperature, top_k, top_p, min_p, forbidden, seed, offset: _fake(
        logits, (logits.shape[0], num_samples), temperature, top_k, top_p, min_p
    ),
)


# --- the public functions -------------------------------------------------------------------------------------------------------


def _proposal(
    name: str, count_name: str, count: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> tuple[float, int, float, float]:
    """temperature, top_k, top_p, min_p as the ops want them, checked: 0, 1 and 0 are no filter."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name}: {count_name}: expected an integer >= 1, got {count!r}")
    check_number(name, "temperature", temperature)
    if not 0 <= temperature < math.inf:  # not math.isfinite: torch.compile traces a temperature that varies
        raise ValueError(f"{name}: temperature: expected a finite number >= 0 (0 is greedy), got {temperature}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"{name}: top_k: expected an integer >= 1 or None, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{name}: top_p: expected a number in (0, 1] or None, got {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"{name}: min_p: expected a number in [0, 1] or None, got {min_p}")
    if temperature == 0:  # greedy draws the most probable token, which no filter removes
        return 0.0, 0, 1.0, 0.0
    return float(temperature), top_k or 0, 1.0 if top_p is None else float(top_p), float(min_p or 0)


_REASONS = {
    _NON_FINITE: "logits: expected finite numbers or -inf, got NaN or +inf in {where}; look for an overflow in the network",
    _NO_SUPPORT: "logits: expected a finite logit besides the forbidden ids, got none in {where}",
    _OUT_OF_RANGE: "xt: expected ids in 0 .. {last}, got one outside in {where}",
}


def sample_candidates(
    logits: torch.Tensor,
    xt: torch.Tensor,
    mask_token_id: int,
    num_candidates: int = 1,
    *,
    active: torch.Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | torch.Tensor,
    offset: int | torch.Tensor = 0,
) -> Candidates:
    """Complete every masked position of xt K times, independently, from softmax(logits / temperature) without the mask.

    One read of the masked rows serves all K draws. Clean positions carry their token over with log-probability 0.

    Args:
        logits: float32, bfloat16 or float16 [B, L, V]; unit stride in V is read in place, any other layout is copied once.
            The mask's column is ignored, whatever it holds.
        xt: int64 [B, L], ``mask_token_id`` where a token is wanted.
        mask_token_id: in 0 .. V-1.
        num_candidates: K >= 1.
        active: bool [B, L] or None. Only masked rows where it is true are drawn; the others keep the mask, log-probability 0.
        temperature: >= 0; 0 is greedy: the lowest id among the largest logits, with log-probability 0.
        top_k, top_p, min_p: filters of the tempered distribution, applied in this order, each on what the one before left.
            Ties go to the lowest id; the most probable token always stays; top_p keeps the token that crosses it; min_p is
            relative to the largest probability.
        seed: an int s (sequence b draws with s + b) or int64 [B]. offset: the step: an int, or int64 of one element or [B].

    Returns:
        Candidates: tokens int64 [B, K, L], log_probs float32 [B, K, L] under the distribution that was drawn from, and
        model_log_probs float32 [B, K, L] under softmax(logits): the same tensor where nothing was tempered or filtered.

    Raises:
        ValueError: wrong shapes, dtypes or devices; K < 1; ids outside the vocabulary; NaN or +inf, or no finite logit, in a row
            that is drawn. Inside ``torch.compile`` these last become a RuntimeError of the graph.

    RNG: position i of sequence b, candidate k, draws Philox(seed[b]; i, k, offset[b], TOKEN): the same whatever the batch, the
    order of rows or the number of threads. Against a float64 softmax, tail included: tests/ops/test_sampling.py.
    """
    name = "sample_candidates"
    check_logits(name, logits, "[B, L, V]")
    batch, length, vocab_size = logits.shape
    check_tensor(name, "xt", xt, torch.int64, (batch, length), logits.device)
    if active is not None:
        check_tensor(name, "active", active, torch.bool, (batch, length), logits.device)
        active = active.contiguous()
    if isinstance(mask_token_id, bool) or not isinstance(mask_token_id, int) or not 0 <= mask_token_id < vocab_size:
        raise ValueError(f"{name}: mask_token_id: expected an id in 0 .. {vocab_size - 1}, got {mask_token_id}")
    proposal = _proposal(name, "num_candidates", num_candidates, temperature, top_k, top_p, min_p)
    seeds = expand_seed(seed, batch, logits.device).contiguous()
    offsets = expand_offset(name, offset, batch, logits.device)
    tokens, log_probs, model_log_probs, invalid = _sample_candidates(
        unit_stride(logits.detach()), xt.contiguous(), mask_token_id, num_candidates, active, *proposal, seeds, offsets
    )

    def describe(code: int) -> str:
        row = code // 4
        return _REASONS[code % 4].format(where=f"sequence {row // length}, position {row % length}", last=vocab_size - 1)

    check_invalid(name, invalid, describe)
    return Candidates(tokens, log_probs, log_probs if proposal == _PLAIN else model_log_probs)


def sample_categorical(
    logits: torch.Tensor,
    num_samples: int = 1,
    *,
    position: int | torch.Tensor = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    forbidden: int | list[int] | torch.Tensor | None = None,
    seed: int | torch.Tensor,
    offset: int | torch.Tensor = 0,
) -> Candidates:
    """K independent draws from each row's softmax(logits / temperature): ``sample_candidates`` for rows that stand alone.

    Args:
        logits: float32, bfloat16 or float16 [N, V].
        num_samples: K >= 1.
        position: int or int64 [N], the position of each row in its sequence, for the counter of its draws.
        forbidden: ids that are never drawn (an id, a list, or int64 [F]); they count in no normaliser.
        seed: an int s (row n draws with s + n) or int64 [N]. offset: an int, or int64 of one element or [N].
        temperature, top_k, top_p, min_p: as in ``sample_candidates``.

    Returns:
        Candidates: tokens int64 [N, K], log_probs and model_log_probs float32 [N, K].

    Raises:
        ValueError: as ``sample_candidates``.

    RNG: with ``seed=seed_B[b]``, ``position=i`` these are the very draws that ``sample_candidates`` makes at row (b, i).
    """
    name = "sample_categorical"
    check_logits(name, logits, "[N, V]")
    n, vocab_size = logits.shape
    proposal = _proposal(name, "num_samples", num_samples, temperature, top_k, top_p, min_p)
    ids = forbidden_ids(name, forbidden, vocab_size, logits.device)
    seeds = expand_seed(seed, n, logits.device).contiguous()
    offsets = expand_offset(name, offset, n, logits.device)
    if isinstance(position, torch.Tensor):
        check_tensor(name, "position", position, torch.int64, (n,), logits.device)
        positions = position.contiguous()
    elif isinstance(position, bool) or not isinstance(position, int):
        raise ValueError(f"{name}: position: expected an int or an int64 tensor [{n}], got {position!r}")
    else:
        positions = torch.full((n,), position, dtype=torch.int64, device=logits.device)
    tokens, log_probs, model_log_probs, invalid = _sample_categorical(
        unit_stride(logits.detach()), num_samples, positions, *proposal, ids, seeds, offsets
    )
    check_invalid(name, invalid, lambda code: _REASONS[code % 4].format(where=f"row {code // 4}", last=vocab_size - 1))
    return Candidates(tokens, log_probs, log_probs if proposal == _PLAIN else model_log_probs)
