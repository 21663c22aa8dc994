"""What ``edlm eval`` says: the JSON document, and the tables on the terminal that are printed from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..eval import Estimate
from ..eval.documents import FEW_DRAWS, is_distrusted
from .printing import number

if TYPE_CHECKING:
    from ..samplers import SampleOutput
    from ..train.distributed import World

UNITS = ("nats/token", "bits/token", "bits/character", "perplexity")
NOTHING = {"mean": None, "stderr": None}
_BINS = 10  # of t, over (0, 1]


def plain(estimate: Estimate) -> dict[str, float | None]:
    return {"mean": number(estimate.mean), "stderr": number(estimate.stderr)}


def units(nats: Estimate, characters_per_token: float) -> dict[str, dict[str, float | None]]:
    """An estimate in nats/token, by the names of the four units in a row."""
    found = (nats, nats.bits_per_token(), nats.bits_per_character(characters_per_token), nats.perplexity())
    return {unit.replace("/", "_per_"): plain(estimate) for unit, estimate in zip(UNITS, found, strict=True)}


def machine(world: World) -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    return {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads(), "processes": world.size}


def show(document: dict[str, Any], unit: str) -> str:
    """The document as it is printed."""
    body = _likelihood(document, unit) if document["kind"] == "likelihood" else _texts(document)
    return "\n".join([*body, *(f"note: {text}" for text in document["warnings"])])


# --- likelihood -------------------------------------------------------------------------------------------------------------------

_NAMES = {
    "nelbo": "NELBO of the proposal",
    "ar_nll": "AR NLL",
    "joint_nll": "joint NLL",
    "finite_step_elbo": "NELBO of the ideal model",
    "sampler_elbo": "NELBO of the sampler",
    "paper_joint": "paper_joint",
}
_LOG_Z = {None: "", "exact": "exact", "lower": "from below", "upper_asymptotic": "from above"}


def measure_name(row: dict[str, Any]) -> str:
    steps = "" if row["steps"] is None else f", T = {row['steps']}"
    return _NAMES[row["measure"]] + steps + ("" if row["num_candidates"] is None else f", n = {row['num_candidates']}")


def notes_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is to be known of these rows, each said once."""
    notes, several = [], len({row["text"] for row in rows}) > 1
    low = [measure_name(row) + (f" ({row['text']})" if several else "") for row in rows if is_distrusted(row)]
    if low:
        notes.append(f"not to be trusted: {'; '.join(dict.fromkeys(low))}: {FEW_DRAWS}")
    known = dict.fromkeys(_NAMES[row["measure"]] for row in rows if row["log_Z"] == "exact")
    if known:
        notes.append(
            f"{', '.join(known)}, exact: with an autoregressive energy this is the likelihood of that model itself, and says nothing "
            "of decoding"
        )
    if any(row["measure"] == "paper_joint" for row in rows):
        notes.append(
            "paper_joint: no bound of the likelihood; it is how the paper's perplexities were made, to be compared with those"
        )
    return notes


def _likelihood(document: dict[str, Any], unit: str) -> list[str]:
    """A row a measure, a column a text."""
    texts, rows = document["texts"], document["rows"]
    key, of = unit.replace("/", "_per_"), {}
    for row in rows:
        of.setdefault((measure_name(row), row["log_Z"], row["direction"]), {})[row["text"]] = row
    with_energy = any(row["log_Z"] for row in rows)
    head = ["", *(["log Z"] if with_energy else []), "direction", *texts, *(["ESS"] if with_energy else []), "sequences/s"]
    lines = []
    for (name, log_Z, direction), columns in of.items():
        row = next(iter(columns.values()))
        ess = [column["ess"]["mean"] for column in columns.values() if column["ess"] is not None]
        doubted = any(is_distrusted(column) for column in columns.values())
        shown = f"{math.floor(100 * min(ess) + 1e-6) / 100:.2f}" if ess else ""  # 1.9997 is below 2
        seconds = sum(column["sequences"] / column["sequences_per_second"] for column in columns.values())
        lines.append(
            [
                name,
                *([_LOG_Z[log_Z]] if with_energy else []),
                "not to be trusted" if doubted else direction,
                *(estimate(columns[text][key]) if text in columns else "-" for text in texts),
                *([f"{shown} of {row['num_candidates']}{' !' * doubted}" if ess else "-"] if with_energy else []),
                f"{sum(column['sequences'] for column in columns.values()) / seconds:.3g}",
            ]
        )
    counts = [
        f"{text['sequences']} of {text['windows_available']} windows" + (f" of {name}" if len(texts) > 1 else "")
        for name, text in texts.items()
    ]
    length = rows[0]["length"]
    entropy = [f"{estimate(text['entropy'])}" + (f" ({name})" if len(texts) > 1 else "") for name, text in texts.items()]
    return [
        f"{document['label']}: {', '.join(counts)} of {length} tokens; {unit}, +- is one standard error over windows",
        *aligned(head, lines),
        f"unigram entropy of the text, bits: {', '.join(entropy)}",
    ]


def estimate(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:.4f}" if value["stderr"] is None else f"{value['mean']:.4f} +- {value['stderr']:.4f}"


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns two spaces apart, the first ones of words to the left, a line below the head."""
    table = [list(head), *map(list, lines)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return [shown[0], "-" * max(map(len, shown)), *shown[1:]]


# --- texts ------------------------------------------------------------------------------------------------------------------------


def _texts(document: dict[str, Any]) -> list[str]:
    """Two tables: how good, and what it took; how different."""
    rows, decoding = document["rows"], document["kind"] == "decoding"
    judges = list(dict.fromkeys(name for row in rows for name in row["judges"]))
    taken = ["calls", "energy calls", "seconds", "ESS"] if decoding else []
    lossy = {name for row in rows for name, judged in row["judges"].items() if judged.get("left_out")}
    columns = {name: ("perplexity", "bits/character", *(["left out"] if name in lossy else [])) for name in judges}
    good = [[f"{name}: {what}" for name in judges for what in columns[name]] + ["MAUVE", "texts", *taken]]
    different = [["entropy", "distinct-1", "distinct-2", "distinct-4", "repetition-4", "self-BLEU"]]
    for row in rows:
        cells = []
        for name in judges:
            judged = row["judges"].get(name, {})
            cells += [_estimate(judged.get("perplexity", NOTHING), 1), _estimate(judged.get("bits_per_character", NOTHING), 3)]
            if name in lossy:
                cells.append(_cell(None if judged.get("left_out") is None else f"{judged['left_out']:.1%}"))
        spent = (row.get("nfe"), row.get("energy_nfe"), _short(row.get("seconds")), _mean_ess(row.get("ess"))) if decoding else ()
        good.append([*cells, *map(_cell, (_short(row["mauve"]), row["num_texts"], *spent))])
        shares = [_cell(_short(row["distinct"][n])) for n in ("1", "2", "4")]
        rest = [_estimate(row["repetition"]["4"], 3), _estimate(row["self_bleu"] or NOTHING, 3)]
        different.append([_estimate(row["entropy"], 2), *shares, *rest])
    names = [["method", "steps" if decoding else "file"]]
    names += [[row["method"], _cell(row.get("steps" if decoding else "file"))] for row in rows]
    of = f": {rows[-1]['num_texts']} texts of {rows[-1]['length']} tokens" if decoding else ""
    said = [f"{document['label']}{of}; +- is one standard error over texts"]
    for table in (good, different):
        head, *lines = [[*name, *cells] for name, cells in zip(names, table, strict=True)]
        said += [*aligned(head, lines), ""]
    if decoding:
        said += ["seconds: of decoding alone, all texts, after a call of a few steps to warm up; calls: of one batch"]
    said += [f"diversity: of {document['unit_of_diversity']}; entropy in bits"]
    for (method, which), row in zip(names[1:], rows, strict=True):
        if row["example"]:
            shown = method if which == "-" else f"{which} steps" if decoding else which
            said.append(f"{shown}: {' '.join(row['example'].split())[:120]}")
    return said


def ess_by_time(samples: Sequence[SampleOutput]) -> list[dict[str, Any]] | None:
    """The mean effective sample size in each tenth of t, over the steps that used the energy; its error is over texts."""
    import torch

    found = []
    for n in range(_BINS):
        columns = []  # of each text: sum of ESS, of steps, of candidates
        for sample in samples:
            tenth = (sample.step_times * _BINS - 1e-9).ceil() - 1  # (0, 0.1] is the first; a t of the grid may be off by an ulp
            ess, candidates = sample.ess.cpu().double(), sample.num_candidates.cpu().double()
            here = (tenth.cpu() == n) & ~ess.isnan()
            columns.append(torch.stack([(x * here).sum(0) for x in (ess.nan_to_num(), torch.ones_like(ess), candidates)]))
        total, steps, candidates = torch.cat(columns, 1)
        part = steps > 0
        if bool(part.any()):
            mean = plain(Estimate.ratio(total[part], steps[part], "of K"))
            counts = {"count": int(steps.sum()), "num_candidates": float(candidates.sum() / steps.sum())}
            found.append({"t": (n + 0.5) / _BINS, **mean, **counts})
    return found or None


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


def _estimate(value: dict[str, float | None], digits: int) -> str:
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:.{digits}f}" + ("" if value["stderr"] is None else f" +- {value['stderr']:.{digits}f}")


def _mean_ess(bins: list[dict[str, Any]] | None) -> str | None:
    if not bins:
        return None
    count = sum(b["count"] for b in bins)
    return f"{math.fsum(b['mean'] * b['count'] for b in bins) / count:.2f}"
