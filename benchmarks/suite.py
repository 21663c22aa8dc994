"""One run of the suite: which families, how much of them, and where the results go."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import time
from pathlib import Path

import torch

from .arguments import SUITES, add_arguments
from .claims import judge
from .device import DeviceTimer, describe_gpu
from .harness import Inputs, inductor_problem, references
from .machine import describe
from .session import Session
from .tables import console, machine_line, markdown, verdict_lines

FORMAT = 1  # of the JSON file


def run(options: argparse.Namespace) -> int:
    """Time what the options ask for, or print the tables of a file. ValueError for a user's mistake."""
    families = list(dict.fromkeys(options.family or SUITES[options.suite]))
    foreign = [family for family in families if family not in SUITES[options.suite]]
    if foreign:
        raise ValueError(
            f"--family: expected families of {options.suite} ({', '.join(SUITES[options.suite])}), got {', '.join(foreign)}"
        )
    if options.markdown:
        print(markdown(_read(options.markdown, families), families))
        return 0
    if options.repetitions is not None and options.repetitions < 3:
        raise ValueError(f"--repetitions: expected at least 3, for quartiles, got {options.repetitions}")
    if options.json and (Path(options.json).is_dir() or not Path(options.json).resolve().parent.is_dir()):
        raise ValueError(f"--json: expected a file in a folder that exists, got {options.json}")
    device = _device(options.device)
    modules = {family: importlib.import_module(_module(family), __package__) for family in families}
    timed_ops = [op for module in modules.values() for op in module.OPS]
    slow = references(timed_ops, device.type)
    if slow and not options.allow_reference:
        raise ValueError(
            f"expected kernels compiled for {device.type}, got references of {', '.join(slow)}: timing them would say nothing of the "
            "kernels. Build edlm (`edlm info` tells what is there), choose other families with --family, or give --allow-reference"
        )
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed: expected 0 .. 2**63 - 1, got {options.seed}")
    torch.manual_seed(options.seed)
    begin, smoke = time.time(), options.effort == "smoke"
    # Half of a smoke's seconds would go into compiling what it does not time.
    problem = "not compiled in a smoke" if smoke else inductor_problem(device)
    document: dict = {
        "format": FORMAT,
        "command": command(options),
        "effort": options.effort,
        "seed": options.seed,
        **describe(device.type),
        "timed_ops": timed_ops,
        "inductor_problem": problem,
        "date": time.strftime("%Y-%m-%d"),
        "missing": [],
        "checks": [],
        "results": [],
    }
    if device.type == "cuda":
        document["machine"]["gpu"] = describe_gpu(device)
    print(machine_line(document))
    for family, module in modules.items():
        largest = 1 << 16 if smoke else module.LARGEST if device.type == "cpu" else module.LARGEST_CUDA
        inputs = Inputs(largest, options.seed, smoke, device)
        repetitions = options.repetitions or (3 if smoke else 15)
        memory = options.memory or options.effort == "full"
        timer = DeviceTimer() if device.type == "cuda" else None
        session = Session(family, options.effort, repetitions, inputs, problem is None, memory, _show, timer)
        if session.cuda:
            session.copy()
        try:
            module.run(session)
        finally:  # what was measured is kept, whatever ended it
            for key in ("results", "missing", "checks"):
                document[key] += getattr(session, key)
            document["seconds"] = round(time.time() - begin, 1)
            _write(options.json, document)
        if session.cuda:
            document["machine"]["gpu"]["clocks"] = describe_gpu(device)["clocks"]  # right after work, not those of an idle GPU
            del inputs, session  # the next family measures what is free
            gc.collect()
            torch.cuda.empty_cache()
            _write(options.json, document)
    print(verdict_lines(judge(document, families)))
    print(f"\n{document['seconds']:.0f} s")
    broken = [row for row in document["missing"] if row["name"].partition(",")[0] in timed_ops]
    wrong = [check for check in document["checks"] if check["value"] < 1]
    for row in broken:
        print(f"{row['family']}, {row['case']}: {row['name']}: {row['reason']}", file=sys.stderr)
    return 1 if broken or wrong else 0


def _module(family: str) -> str:
    suite = _suite(family)
    folder = "evaluation" if suite == "eval" else suite
    return f".ops.bench_{family}" if suite == "ops" else f".{folder}.{family}"


def _suite(family: str) -> str:
    return next(suite for suite, families in SUITES.items() if family in families)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected cpu, or cuda where torch can use a GPU, got 'cuda' where it cannot")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def _write(path: str | None, document: dict) -> None:
    """After every family: minutes are not lost to a later one."""
    if path:
        part = Path(f"{path}.part")
        part.write_text(to_json(document))
        part.replace(path)


def to_json(document: dict) -> str:
    """A result a line: a file that can be read, and compared with another."""
    rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in document["results"])
    rest = json.dumps({key: value for key, value in document.items() if key != "results"}, indent=1, allow_nan=False)
    return f'{rest.removesuffix("}").rstrip()},\n "results": [\n{rows}\n ]\n}}\n'


def _show(rows: list[dict]) -> None:
    print(console(rows), flush=True)


def _read(path: str, families: list[str]) -> dict:
    try:
        document = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"--markdown: {path}: expected a file that --json wrote ({error.strerror})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"--markdown: {path}: expected a file that --json wrote, got no JSON ({error})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        got = document.get("format", "none") if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"--markdown: {path}: expected a file that --json wrote, format {FORMAT}, got {got}; run it again")
    if not any(row["family"] in families for row in document["results"]):
        raise ValueError(f"--markdown: {path}: expected results of {', '.join(families)}, got none; run it with these families")
    return document


def command(options: argparse.Namespace) -> str:
    """What to type for this run again, without where it went."""
    words = [f"edlm bench {options.suite}", *(f"--family {family}" for family in dict.fromkeys(options.family or []))]
    words += [] if options.device == "cpu" else [f"--device {options.device}"]
    words += [] if options.effort == "quick" else [f"--{options.effort}"]
    words += [f"--repetitions {options.repetitions}"] if options.repetitions is not None else []
    words += [f"--seed {options.seed}"] if options.seed else []
    words += ["--memory"] if options.memory and options.effort != "full" else []
    words += ["--allow-reference"] if options.allow_reference else []
    return " ".join(words)


def script(family: str, description: str) -> int:
    """``python benchmarks/ops/bench_<family>.py`` or ``benchmarks/SUITE/<family>.py``: the same run, of one family."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, families=False)
    options = parser.parse_args()
    options.suite, options.family = _suite(family), [family]
    try:
        return run(options)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
