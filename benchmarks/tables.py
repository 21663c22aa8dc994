"""Results as text: a case while it is timed, and from a JSON file the Markdown tables and the verdict for documents."""

from __future__ import annotations

from collections.abc import Sequence

from .claims import MEGABYTE, Verdict, judge


def _time(ms: float) -> str:
    """Milliseconds to three digits, or to the microsecond's tenth where a table is in microseconds."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def _scale(medians: list[float]) -> tuple[float, str]:
    """Microseconds where the shortest would be a few hundredths of a millisecond."""
    return (1e3, "us") if min(medians) < 0.1 and max(medians) < 100 else (1, "ms")


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _times(value: float | None, width: int) -> str:
    return " " * width if value is None else f"{value:>{width - 1}.2f}x"


def console(rows: list[dict]) -> str:
    """One case, every variant: median and quartiles, what must move, ratios to both floors."""
    first = rows[0]
    lines = [f"\n{first['family']}, {first['case']}" + (f", {first['dtype']}" if first["dtype"] else "")]
    for row in rows:
        if "extra_bytes" in row:
            beyond = (row["extra_bytes"] - row["gradient_bytes"]) / MEGABYTE
            gradients = f", {beyond:.1f} MB beyond the gradients" if row["gradient_bytes"] else ""
            lines.append(f"  {row['name']:<44}{row['extra_bytes'] / MEGABYTE:>9.1f} MB{gradients}  ({row['method']})")
            continue
        scale, unit = _scale([r["median"] for r in rows])
        median, low, high = (_time(scale * row[key]) for key in ("median", "low", "high"))
        moved = f"{row['bytes'] / MEGABYTE:>8.2f} MB{row['gb_per_s']:>8.2f} GB/s"
        ratios = _times(row.get("over_amax"), 9) + _times(row.get("over_exp_sum"), 9)
        ratios += "" if row.get("of_copy") is None else f"{100 * row['of_copy']:>7.1f} %"
        note = f"  {row['note']}" if row["note"] else ""
        # An event between two launches waits for the host where the host is not ahead: such a time is not the device's alone.
        note += "  host-bound" if row.get("queued") is not None and row["queued"] < 0.5 else ""
        lines.append(f"  {row['name']:<44}{median:>8} {unit} [{low}, {high}]".ljust(76) + moved + ratios + note)
    if first.get("over_amax") is not None:
        heads = f"{'x amax':>9}" + (f"{'x exp':>9}" if first["over_exp_sum"] is not None else "")
        heads += f"{'of copy':>9}" if first.get("of_copy") is not None else ""
        lines[0] = lines[0].ljust(77 + 11 + 13) + heads  # the first line starts with a line feed
    return "\n".join(lines)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in body)]


def _unit(rows: list[dict], memory: bool) -> tuple[float, str]:
    if memory:
        return 1, "MB (beyond the gradients)" if any(r["gradient_bytes"] for r in rows) else "MB"
    if "stage_seconds" in rows[0]:  # a whole decode
        return 1e-3, "s"
    if "sequences_per_second" in rows[0]:
        return 1, "sequences a second" + (f", {rows[0]['draws']} draws each" if rows[0]["draws"] else "")
    return _scale([r["median"] for r in rows])


def _pivot(rows: list[dict]) -> list[str]:
    """The cases of one kind: the shorter of (variants, cases) goes across."""
    kind = rows[0]["case"].partition(":")[0]
    cases = list(dict.fromkeys((r["case"], r["dtype"]) for r in rows))
    names = list(dict.fromkeys(r["name"] for r in rows))
    cells, scaled = {}, False
    memory = "extra_bytes" in rows[0]
    scale, unit = _unit(rows, memory)
    other = next((r["over"]["name"] for r in rows if r.get("over")), None)
    for row in rows:
        if memory:
            text = f"{row['extra_bytes'] / MEGABYTE:.0f}"
            if row["gradient_bytes"]:
                text += f" ({(row['extra_bytes'] - row['gradient_bytes']) / MEGABYTE:.0f})"
        else:
            text = _time(row.get("sequences_per_second", scale * row["median"]))
            ratios = [_ratio(row["over_amax"])] if row["over_amax"] is not None and row["name"] != "amax" else []
            ratios += [_ratio(row["over"]["value"])] if row.get("over") and row["name"] != other else []
            ratios += [] if row.get("of_copy") is None else [f"{100 * row['of_copy']:.0f} %"]
            text += f" ({'; '.join(ratios)})" if ratios else ""
            text += " *" if row["note"] else ""
            scaled = scaled or bool(row["note"])
        cells[row["case"], row["dtype"], row["name"]] = text
    shown = ["times amax"] if any(r.get("over_amax") is not None for r in rows) else []
    shown += [f"times {other}"] if other else []
    shown += ["of a copy's bandwidth"] if any(r.get("of_copy") is not None for r in rows) else []
    unit += f" ({'; '.join(shown)})" if shown else ""
    labels = [case.partition(": ")[2] + (f", {dtype}" if dtype else "") for case, dtype in cases]
    corner = f"{kind}: {unit}"
    if len(cases) > len(names):
        head = [corner, *names]
        body = [[label, *(cells.get((*c, name), "-") for name in names)] for label, c in zip(labels, cases, strict=True)]
    else:
        head = [corner, *labels]
        body = [[name, *(cells.get((*c, name), "-") for c in cases)] for name in names]
    notes = sorted({r["note"] for r in rows if r.get("note")})
    return [*_table(head, body), *(["", f"\\* {'; '.join(notes)}"] if scaled else [])]


def family_tables(document: dict, family: str) -> str:
    """A table for each kind of case; of decodes also their calls and their stages."""
    kinds: dict[str, list[dict]] = {}
    for row in document["results"]:
        if row["family"] == family:
            kinds.setdefault(row["case"].partition(":")[0], []).append(row)
    tables = []
    for rows in kinds.values():
        tables.append(_spread(rows) if "deviation" in rows[0] else _pivot(rows))
        if "stage_seconds" in rows[0]:
            tables += [_calls(rows), _stages(rows)]
    return "\n\n".join("\n".join(table) for table in tables)


def _label(row: dict) -> str:
    return row["case"].partition(": ")[2]


def _calls(rows: list[dict]) -> list[str]:
    """How often each loop called its networks."""
    loops = list(dict.fromkeys(r["name"] for r in rows if "stage_seconds" in r))
    cells = {
        (_label(r), r["name"]): f"{r['nfe']} + {r['energy_nfe']}" + (" *" if r["note"] else "")
        for r in rows
        if "stage_seconds" in r
    }
    labels = dict.fromkeys(_label(r) for r in rows)
    body = [[label, *(cells.get((label, loop), "-") for loop in loops)] for label in labels]
    note = ["", "\\* scaled, as above"] if any("*" in cell for cell in cells.values()) else []
    return [*_table(["calls: denoiser + energy", *loops], body), *note]


def _stages(rows: list[dict]) -> list[str]:
    """Where the time of the first case goes."""
    rows = [r for r in rows if r["case"] == rows[0]["case"] and "stage_seconds" in r]
    names = list(rows[0]["stage_seconds"])
    body = [[name, *(f"{r['stage_seconds'][name]:.2f}" for r in rows)] for name in names]
    # Older results had stages of one run more than their time, and no rest of their own.
    rest = [r.get("rest_seconds", max(0.0, 1e-3 * r["median"] - sum(r["stage_seconds"].values()))) for r in rows]
    body.append(["everything else", *(f"{seconds:.2f}" for seconds in rest)])
    return _table([f"stages, s ({_label(rows[0])})", *(r["name"] for r in rows)], body)


def _spread(rows: list[dict]) -> list[str]:
    """How far an estimate scatters both ways, and what an equal standard error then costs."""
    cases: dict[str, list[dict]] = {}
    for row in rows:
        cases.setdefault(_label(row), []).append(row)
    names = [row["name"] for row in next(iter(cases.values()))]
    body = []
    for label, ways in cases.items():
        last = ways[-1]
        ratio = f"{last['variance_ratio']:.2f} +- {last['variance_ratio_stderr']:.2f}"
        body.append([label, *(f"{r['mean']:.4f} ({r['deviation']:.4f})" for r in ways), ratio, f"{last['equal_error']:.2f}"])
    over = f"{names[1]} over {names[0]}"
    head = ["spread: mean (standard deviation given the text), nats/token", *names]
    return _table([*head, f"variance = calls for an equal error, {over}", f"time for an equal error, {over}"], body)


def verdict_table(found: list[Verdict]) -> str:
    """A line a claim, with every place where it was to be measured; values that miss it are bold."""
    claims: dict[tuple[str, str], list[Verdict]] = {}
    for v in found:
        claims.setdefault((v.claim, v.wanted), []).append(v)
    body = []
    for (claim, wanted), places in claims.items():
        cells = [f"{v.where}: {f'**{v.measured}**' if v.met is False else v.measured}" for v in places]
        missed, measured = sum(v.met is False for v in places), sum(v.met is not None for v in places)
        word = "not measured" if not measured else "met" if not missed else f"**NOT MET** at {missed} of {measured}"
        body.append([claim, wanted, "; ".join(cells), word])
    met, measured = sum(v.met is True for v in found), sum(v.met is not None for v in found)
    count = f"{met} of {measured} measured claims are met; {len(found) - measured} not measured."
    return "\n".join([*_table(["claim", "wanted", "measured", "verdict"], body), "", count])


def verdict_lines(found: list[Verdict]) -> str:
    """The same for a terminal."""
    measured = [v for v in found if v.met is not None]
    lines = [f"  {v.word:<13}{v.measured:>9}  wanted {v.wanted:<9}  {v.claim} ({v.where})" for v in measured]
    if len(measured) < len(found):
        lines.append(f"  {len(found) - len(measured)} claims of these families were not measured in this run")
    return "\n".join(["", "Verdict", *lines])


def machine_line(document: dict) -> str:
    m, versions = document["machine"], document["versions"]
    caches = ", ".join(f"{name} {size}" for name, size in m["caches"].items())
    run = [op for op, kind in document["ops"].items() if kind != "compiled" and op in document["timed_ops"]]
    commit = f"commit {document['commit'][:12]}" if document["commit"] else "not a checkout"
    commit += " with changes" if document["changed"] else ""
    references = f" **References, not kernels: {', '.join(run)}.**" if run else ""
    gpu = _gpu(m["gpu"]) if "gpu" in m else ""
    return (
        f"{gpu}{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['isa']}, {caches or 'caches unknown'}, "
        f"huge pages {m['transparent_huge_pages']}; torch {versions['torch']}, edlm {versions['edlm']} "
        f"({commit}). Medians of interleaved rounds; made by `{document['command']}`.{references}"
        + (
            f" Nothing was timed that torch.compile would make: {document['inductor_problem']}."
            if document["inductor_problem"]
            else ""
        )
    )


def _gpu(gpu: dict) -> str:
    clocks = ", ".join(f"{key} {value}" for key, value in gpu["clocks"].items())
    return (
        f"{gpu['name']} (capability {gpu['capability']}, {gpu['memory_bytes'] >> 20} MiB, L2 {gpu['l2_bytes'] >> 20} MiB, driver "
        f"{gpu['driver']}, CUDA {gpu['cuda']}; after the last family: {clocks or 'clocks unknown'}); "
    )


def _missing(document: dict, families: Sequence[str]) -> list[str]:
    """A line for each reason that something was not timed."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in document.get("missing", []):
        if row["family"] in families:
            reasons.setdefault((row["name"], row["reason"]), []).append(
                row["case"] + (f", {row['dtype']}" if row["dtype"] else "")
            )
    return [
        f"Not timed: {name}: {reason} ({'; '.join(cases) if len(cases) < 4 else f'{len(cases)} cases'})."
        for (name, reason), cases in reasons.items()
    ]


def markdown(document: dict, families: Sequence[str]) -> str:
    """Tables, verdict and machine, of the families that the document has."""
    there = [f for f in families if any(row["family"] == f for row in document["results"])]
    blocks = [family_tables(document, family) for family in there]
    return "\n\n".join([*blocks, verdict_table(judge(document, there)), *_missing(document, there), machine_line(document)])
